"""Where cases and patches were made: the optional column `domain`."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.cohort import build_table, read_labels
from featstore.cohort.labels import read_domains
from featstore.config import LabelsConfig, PatchesConfig
from featstore.errors import CohortError

LABELS = LabelsConfig(file="labels.csv")
PATHS = [f"case_{case}_match_1_he_patch{n}.png" for case in (1, 2) for n in (1, 2)]


def labels(folder: Path, text: str) -> dict[str, str]:
    (folder / "labels.csv").write_text(text)
    assert read_labels(LABELS, {}, folder, True).by_case  # which does not mind
    return read_domains(LABELS, folder, True)


def test_the_domain_of_a_case(tmp_path: Path) -> None:
    text = "Case,DOMAIN,Class\n001,north,0\n2, Lab 3 ,1\n3,,1\n1,north,0\n"
    assert labels(tmp_path, text) == {"1": "north", "2": "Lab 3"}
    assert labels(tmp_path, "Case,Class\n1,0\n") == {}
    assert read_domains(LabelsConfig(), tmp_path, True) == {}


def test_a_case_with_two_domains(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="case 1 two domains, 'a' and 'b'") as caught:
        labels(tmp_path, "Case,Class,domain\n1,0,a\n01,0,b\n")
    assert caught.value.where == "labels.file, line 3"


def geometry(folder: Path, text: str) -> list[str] | None:
    (folder / "g.csv").write_text(text)
    table = build_table(PATHS, PatchesConfig(geometry="g.csv"), base=folder).table
    assert table["x"].notna().tolist() == [True, False, True, True]
    return table["domain"].tolist() if "domain" in table.columns else None


def test_the_domain_of_a_patch(tmp_path: Path) -> None:
    rows = [f"{path},1,2" for path in PATHS]
    del rows[1]
    assert geometry(tmp_path, "\n".join(["path,x,y", *rows])) is None
    with_domain = ["path,x,y,Domain", *(f"{row},{domain}" for row, domain in zip(rows, "a b", strict=True))]
    assert geometry(tmp_path, "\n".join(with_domain)) == ["a", "", "", "b"]
    with_domain[1] = with_domain[1].replace(",a", ",a\\b")
    with pytest.raises(CohortError, match="backslash"):
        geometry(tmp_path, "\n".join(with_domain))
