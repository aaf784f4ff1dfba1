from __future__ import annotations

from pathlib import Path

import pytest

from featstore.cohort.labels import Labels, read_groups, read_labels
from featstore.config import LabelsConfig
from featstore.errors import CohortError, ConfigError

CLASSES = {"benign": ["1"], "high": ["3", "4"]}


def read(
    folder: Path, text: str | bytes, classes: dict[str, list[str]] | None = None, normalize: bool = True
) -> Labels:
    data = text.encode("utf-8") if isinstance(text, str) else text
    (folder / "l.csv").write_bytes(data)
    return read_labels(
        LabelsConfig(file="l.csv"), CLASSES if classes is None else classes, folder, normalize
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_labels(tmp_path: Path, separator: str, bom: str, newline: str) -> None:
    lines = ["note,Case,Class", "x,038,1", "x,39.0,3.0", '"a\nb",40,4', "x,41,2", ",,", "x,38,1"]
    labels = read(tmp_path, bom + newline.join(lines).replace(",", separator))
    assert labels.class_names == ["benign", "high"]
    assert labels.by_case == {"38": 0, "39": 1, "40": 1}
    assert labels.unmapped == {"41": "2"}
    assert labels.normalized == {"case": {"038": "38", "39.0": "39"}, "class": {"3.0": "3"}}
    assert labels.repeated == ["38"]


def test_zeros_are_kept_where_asked(tmp_path: Path) -> None:
    labels = read(tmp_path, "Case,Class\n038,1\n38,3\n", normalize=False)
    assert labels.by_case == {"038": 0, "38": 1}


def test_without_classes_the_raw_values_are_the_classes(tmp_path: Path) -> None:
    labels = read(tmp_path, "Case,Class\na,grade10\nb,grade2\n", classes={})
    assert labels.class_names == ["grade2", "grade10"]
    assert labels.by_case == {"a": 1, "b": 0}
    with pytest.raises(CohortError, match="class id 'a/b'"):
        read(tmp_path, "Case,Class\nx,a/b\n", classes={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id,Class\n1,1\n", r"no column 'Case' \(nearest: 'case_id'\)"),
        ("Case,grade\n1,1\n", "no column 'Class'"),
        ("Case,Case,Class\n1,1,1\n", "two columns named 'Case'"),
        ("Case,Class\n1,1\n,3\n4,\n", "lines 3, 4"),
        ("Case,Class\n38,1\n038,3\n", "case 38: '1' in line 2, '3' in line 3"),
        ("Case,Class\n../x,1\n", "contains"),
        ("Case,Class\n1,2,3\n", "3 cells in line 2"),
        ('Case,Class\n1,"2\n', "not a readable CSV"),
        ("Case,Class\n", "no rows"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        (b"PK\x03\x04\0\0", "is binary"),
        ("Case,Class\n1,a".encode("utf-16"), "is binary"),
        ("Case,Class\n1,b\nGrö,1\n".encode("latin-1"), "not UTF-8: byte 0xf6 in line 3"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(CohortError, match=message) as caught:
        read(tmp_path, text)
    assert caught.value.where
    if "nearest" in message:
        assert "--case-column" in str(caught.value)
        assert "case_id, Class" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for name in ("absent.csv", "."):
        with pytest.raises(CohortError, match="cannot be read"):
            read_labels(LabelsConfig(file=name), {}, tmp_path, True)
    with pytest.raises(ConfigError, match="no table of labels"):
        read_labels(LabelsConfig(), {}, tmp_path, True)


def test_bad_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="code '1' is mapped to two classes, 'a' and 'b'"):
        read(tmp_path, "Case,Class\n1,1\n", {"a": ["1"], "b": ["1.0"]})
    with pytest.raises(ConfigError, match="no raw codes"):
        read(tmp_path, "Case,Class\n1,1\n", {"a": []})


def test_groups(tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_text("Group,CASE\nA,038\nA,39\nB,40\nA,38\n", encoding="utf-8")
    assert read_groups("g.csv", tmp_path, True) == {"38": "A", "39": "A", "40": "B"}
    assert read_groups({"A": ["038"], "B": ["4"]}, tmp_path, False) == {"038": "A", "4": "B"}
    assert read_groups(None, tmp_path, True) == {}
    with pytest.raises(
        CohortError, match=r"case 38 is in two groups, 'A' \(groups.A\) and 'B' \(groups.B\)"
    ):
        read_groups({"A": ["038"], "B": ["38"]}, tmp_path, True)
    (tmp_path / "g.csv").write_text("Group,patient\nA,038\n", encoding="utf-8")
    with pytest.raises(CohortError, match="no column 'case'"):
        read_groups("g.csv", tmp_path, True)
