from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.cohort.names import natural_key
from featstore.cohort.patches import Scan, build_table, scan
from featstore.cohort.tables import printable
from featstore.config import PatchesConfig
from featstore.errors import CohortError, ConfigError

PLAIN = PatchesConfig()
SKIP = PatchesConfig(on_unparsed="skip")
GOOD = "case_1_match_1_h&e_patch1.png"


def rows(result: Scan) -> list[tuple[object, ...]]:
    return list(result.table[["case_id", "stain", "slice_id", "patch"]].itertuples(index=False, name=None))


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


SAFE = st.from_regex(r"[A-Za-z0-9é&+-]{1,8}", fullmatch=True)
SLICES = st.from_regex(r"(un)?match(ed)?_[1-9]{1,2}|s[1-9]|[b-df-z]{1,3}_[a-g]{3}", fullmatch=True)


@given(
    SAFE,
    SLICES,
    st.sampled_from(["h&e", "melan", "sox10"]),
    st.integers(0, 2**63 - 1),
    st.sampled_from(["", "a/b c/"]),
)
def test_names_round_trip(case: str, slice_id: str, stain: str, patch: int, folder: str) -> None:
    path = f"{folder}case_{case}_{slice_id}_{stain}_patch{patch}.png"
    result = build_table([path], PatchesConfig(normalize_cases=False, normalize_slices=False))
    assert rows(result) == [(case, stain, slice_id, patch)]
    assert result.table["path"].tolist() == [path]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("case_1_match_1_h&e-labels_patch53.png", "unknown stain 'h&e-labels'"),
        ("case_1_match_1_sox10._patch24.png", "unknown stain 'sox10.'"),
        ("case_1_match_1_sox10_patch66(1).png", "copy mark after the patch number"),
        ("case_1_match_1_sox10_patch123 2.png", "copy mark after the patch number"),
        ("case_1_match_1_sox10_patch71 (3).png", "copy mark after the patch number"),
        ("case_1_match_1_sox10_patch7 - Copy.png", "copy mark after the patch number"),
        ("case_1_match_1_sox10_patch7_x.png", "further text after the patch number"),
        ("case_1_match_1_sox10.png", "no patch number"),
        ("case_1_match_1_sox10_patch.png", "no patch number"),
        ("case_1_match_1_sox10_patch-1.png", "no patch number"),
        ("case_1_match_1_sox10_patch٣.png", "no patch number"),
        ("case_1_match_1_sox10_patch9223372036854775808.png", "patch number beyond 64 bits"),
        (f"case_1_match_1_sox10_patch{'9' * 200}.png", "patch number beyond 64 bits"),
        ("case_1_h&e_patch1.png", "no slice id between case and stain"),
        ("case_h&e_patch1.png", "no case id"),
        ("case__match_1_h&e_patch1.png", "case id is empty"),
        ("case_..._match_1_h&e_patch1.png", "case id contains '..' or is '.'"),
        ("case_12_b_match_1_h&e_patch1.png", "underscore in the case id (needs a pattern)"),
        ("case_1_match_1_melan_h&e_patch1.png", "two stains in the name"),
        ("case_1_match_1_patch3_x_h&e_patch1.png", "two patch numbers in the name"),
        ("Case_1_match_1_h&e_patch1.png", "does not start with 'case_'"),
        ("plot.png", "does not start with 'case_'"),
        ("case_1_match_1\udc80_h&e_patch1.png", "path is not valid UTF-8"),
    ],
)
def test_oddities_are_never_guessed(name: str, reason: str) -> None:
    result = build_table([name, GOOD], SKIP)
    assert [item.reason for item in result.unparsed] == [reason]
    assert rows(result) == [("1", "h&e", "match_1", 1)]
    with pytest.raises(CohortError, match="1 of 2 file names cannot be read") as caught:
        build_table([name, GOOD], PLAIN)
    text = str(caught.value)
    assert reason in text
    assert "--on-unparsed skip" in text
    assert "--pattern" in text


def test_many_oddities_are_counted_with_few_examples() -> None:
    bad = [f"case_1_match_1_xyz_patch{i}.png" for i in range(300)] + ["a.png"]
    with pytest.raises(CohortError) as caught:
        build_table([*bad, GOOD], PLAIN)
    text = str(caught.value)
    assert "301 of 302" in text
    assert "300  unknown stain 'xyz'" in text
    assert "`stains:`" in text
    assert text.count("e.g. ") == 5
    assert "e.g. a.png" in text


def test_a_folder_of_nothing_readable_offers_no_skip() -> None:
    with pytest.raises(CohortError) as caught:
        build_table(["a.png"], SKIP)
    assert "on-unparsed" not in str(caught.value)


def test_ids_are_normalised_and_reported() -> None:
    paths = [
        "case_038_unmatched2_HE_patch2.png",
        "case_38_match_01_mart1_patch10.PNG",
        "case_000_match_1_Sox-10_patch3.png",
    ]
    result = build_table(paths, PLAIN)
    assert rows(result) == [
        ("0", "sox10", "match_1", 3),
        ("38", "h&e", "unmatched_2", 2),
        ("38", "melan", "match_1", 10),
    ]
    assert result.normalized["case"] == {"038": "38", "000": "0"}
    assert result.normalized["slice"] == {"unmatched2": "unmatched_2", "match_01": "match_1"}
    assert result.merged["case"] == {"38": ["038", "38"]}
    raw = build_table(paths, PatchesConfig(normalize_cases=False, normalize_slices=False))
    assert {row[0] for row in rows(raw)} == {"038", "38", "000"}
    assert {row[2] for row in rows(raw)} == {"unmatched2", "match_01", "match_1"}


def test_table_has_the_promised_columns_and_order() -> None:
    paths = [
        f"case_{c}_match_{s}_{t}_patch{n}.png"
        for c in (10, 9)
        for s in (2, 10)
        for t in ("melan", "h&e")
        for n in (2, 10, 1)
    ]
    table = build_table(paths, PLAIN).table
    assert list(table.columns) == ["case_id", "stain", "slice_id", "patch", "path"]
    assert table["case_id"].cat.categories.tolist() == ["9", "10"]
    assert table["slice_id"].cat.categories.tolist() == ["match_2", "match_10"]
    assert table["patch"].dtype == np.int64
    assert isinstance(table.index, pd.RangeIndex)
    keys = [
        (natural_key(c), natural_key(t), natural_key(s), p)
        for c, t, s, p in rows(build_table(paths, PLAIN))
    ]
    assert keys == sorted(keys)


@given(st.randoms(use_true_random=False))
def test_order_of_input_does_not_matter(shuffler: random.Random) -> None:
    paths = [
        f"{f}case_{c}_match_{s}_{t}_patch{n}.png"
        for f, c in (("x/", "07"), ("", "a"))
        for s in (1, 11)
        for t in ("he", "melan")
        for n in (0, 12)
    ]
    paths += ["b.png", "a.png", "case_1_match_1_zz_patch1.png"]
    expected = build_table(paths, SKIP, exclude=["7"])
    shuffled = list(paths)
    shuffler.shuffle(shuffled)
    result = build_table(shuffled, SKIP, exclude=["7"])
    pd.testing.assert_frame_equal(result.table, expected.table)
    assert result.unparsed == expected.unparsed
    assert result.normalized == expected.normalized


def test_two_files_for_one_patch_are_named() -> None:
    with pytest.raises(CohortError, match="1 patch has two files") as caught:
        build_table(["a/case_38_match_1_h&e_patch5.png", "b/case_038_match1_HE_patch05.png"], PLAIN)
    assert "a/case_38_match_1_h&e_patch5.png and b/case_038_match1_HE_patch05.png" in str(caught.value)
    many = [f"{f}/case_1_match_1_h&e_patch{n}.png" for n in range(9) for f in "ab"]
    with pytest.raises(CohortError, match="9 patches have two files") as caught:
        build_table(many, PLAIN)
    assert "and 4 more" in str(caught.value)


def test_exclusions() -> None:
    paths = [
        "case_038_match_1_h&e_patch1.png",
        "case_38_match_1_h&e_patch1.png",
        "case_2_match_1_h&e_patch1.png",
    ]
    result = build_table(paths, PLAIN, exclude=["038", "7"])
    assert [row[0] for row in rows(result)] == ["2"]
    assert result.table["case_id"].cat.categories.tolist() == ["2"]
    assert (result.excluded, result.excluded_patches, result.unknown_exclusions) == (["38"], 2, ["7"])
    with pytest.raises(CohortError, match="no patches are left"):
        build_table(paths, PLAIN, exclude=["2", "38"])
    with pytest.raises(CohortError, match=r"contains '\.\.'"):
        build_table(paths, PLAIN, exclude=["../x"])


PATTERN = r"(?P<case>\w+?)-(?P<slice>\w+)-(?P<stain>[^-]+)-(?P<patch>\d+)-(?P<x>[^-]*)-(?P<y>[^-]*)\.png"


def test_pattern_with_positions() -> None:
    config = PatchesConfig(pattern=PATTERN, on_unparsed="skip")
    names = ["q/a_1-s-he-12-100.5-7.png", "a_1-s-he-2-nan-7.png", "a_1-s-xx-2-1-7.png", GOOD]
    result = build_table(names, config)
    assert rows(result) == [("a_1", "h&e", "s", 12)]
    assert result.table[["x", "y"]].to_numpy().tolist() == [[100.5, 7.0]]
    reasons = {item.path: item.reason for item in result.unparsed}
    assert reasons[names[1]] == "x or y is not a number"
    assert reasons[names[2]] == "unknown stain 'xx'"
    assert reasons[GOOD] == "does not match patches.pattern"
    with pytest.raises(ConfigError, match="two sources"):
        build_table(names, PatchesConfig(pattern=PATTERN, geometry="g.csv"))


def test_pattern_with_a_slash_sees_the_path() -> None:
    config = PatchesConfig(pattern=r"(?P<case>[^/]+)/(?P<stain>[^/]+)/(?P<slice>.+)_(?P<patch>\d+)\.png")
    assert rows(build_table(["007/HE/s_1_4.png"], config)) == [("7", "h&e", "s_1", 4)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        (r"(?P<case>.)(?P<slice>.)(?P<stain>.)", "lacks the groups patch"),
        (r"(?P<case>.)(?P<slice>.)(?P<stain>.)(?P<patch>.)(?P<x>.)", "lacks the groups y"),
        (r"(?P<case>.)(?P<slice>.)(?P<stain>.)(?P<patch>.)(?P<z>.)", "unknown groups z"),
    ],
)
def test_bad_patterns(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_table([GOOD], PatchesConfig(pattern=pattern))
    assert caught.value.where == "patches.pattern"


def test_pattern_that_matches_nothing_or_half() -> None:
    with pytest.raises(CohortError, match="1 of 1 file names"):
        build_table([GOOD], PatchesConfig(pattern=r"(?P<case>x)(?P<slice>.)(?P<stain>.)(?P<patch>.)"))
    optional = PatchesConfig(
        pattern=r"(?P<case>\d)?-(?P<slice>.)-(?P<stain>he)?-(?P<patch>.)\.png", on_unparsed="skip"
    )
    result = build_table(["-1-he-1.png", "1-1--1.png", "1-1-he-x.png", "1-1-he-3.png"], optional)
    assert {item.reason for item in result.unparsed} == {
        "case id is empty",
        "unknown stain ''",
        "no patch number",
    }


def test_scan_finds_what_there_is(tmp_path: Path) -> None:
    touch(tmp_path, f"sub/deep/{GOOD}", "case_2_match_1_he_patch1.PNG", "a.jpg", "Thumbs.db", ".DS_Store")
    touch(tmp_path, f"sub/._{GOOD}", f".cache/{GOOD}", f"__MACOSX/{GOOD}", "README")
    result = scan(tmp_path, PLAIN)
    assert result.table["path"].tolist() == [f"sub/deep/{GOOD}", "case_2_match_1_he_patch1.PNG"]
    assert result.ignored == {".db": 1, ".jpg": 1, "hidden": 2, "litter folder": 2, "no suffix": 1}
    assert result.folder == tmp_path


def test_scan_of_the_wrong_place(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="No such file"):
        scan(tmp_path / "absent", PLAIN)
    touch(tmp_path, "file.jpg")
    with pytest.raises(CohortError, match="is not a folder"):
        scan(tmp_path / "file.jpg", PLAIN)
    with pytest.raises(CohortError, match=r"no PNG files below .*\(but 1 \.jpg\)"):
        scan(tmp_path, PLAIN)


def test_an_unreadable_subfolder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, GOOD, "locked/x.png")
    real = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CohortError, match=r"locked.* cannot be read: Permission denied"):
        scan(tmp_path, PLAIN)


def test_links_are_followed_once(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "patches"
    touch(outside, "case_5_match_1_he_patch1.png")
    touch(folder, f"real/{GOOD}")
    (folder / "a_link").symlink_to(folder / "real")
    (folder / "real" / "loop").symlink_to(folder)
    (folder / "other").symlink_to(outside)
    (folder / "real" / "same").symlink_to(outside)
    (folder / "broken.png").symlink_to(tmp_path / "nowhere")
    (folder / "case_6_match_1_he_patch1.png").symlink_to(outside / "case_5_match_1_he_patch1.png")
    result = scan(folder, PLAIN)
    assert result.table["path"].tolist() == [
        f"real/{GOOD}",
        "other/case_5_match_1_he_patch1.png",
        "case_6_match_1_he_patch1.png",
    ]
    assert result.links_skipped == ["a_link", "broken.png", "real/loop", "real/same"]
    assert result.broken_links == ["broken.png"]


def test_links_that_lead_nowhere_fail_no_scan(tmp_path: Path) -> None:
    touch(tmp_path, GOOD)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "ping").symlink_to("pong")
    (tmp_path / "pong").symlink_to("ping")
    (tmp_path / "below_a_file").symlink_to(f"{GOOD}/x")
    result = scan(tmp_path, PLAIN)
    assert result.table["path"].tolist() == [GOOD]
    assert result.links_skipped == result.broken_links == ["below_a_file", "loop", "ping", "pong"]


def test_a_link_that_cannot_be_looked_behind_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, GOOD)
    (tmp_path / "link").symlink_to(tmp_path)

    def refuse(entry: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("featstore.cohort.walk._target", refuse)
    with pytest.raises(CohortError, match="Permission denied"):
        scan(tmp_path, PLAIN)


@pytest.mark.parametrize("linked", [False, True])
def test_pipes_are_unparsed(tmp_path: Path, linked: bool) -> None:
    folder, name = tmp_path / "patches", "case_1_match_1_h&e_patch9.png"
    touch(folder, GOOD)
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(folder / "other.fifo")
    if linked:
        (folder / name).symlink_to(tmp_path / "pipe")
    else:
        os.mkfifo(folder / name)
    result = scan(folder, SKIP)
    assert result.table["path"].tolist() == [GOOD]
    assert [(item.path, item.reason) for item in result.unparsed] == [(name, "not a regular file")]
    assert result.ignored == {".fifo": 1}
    with pytest.raises(CohortError, match="not a regular file"):
        scan(folder, PLAIN)
    (folder / GOOD).unlink()
    with pytest.raises(CohortError, match="not a regular file"):
        scan(folder, SKIP)


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(CohortError) as caught:
        scan(tmp_path / "x\033[31m\x9b\x7f\r", PLAIN)
    text = str(caught.value)
    assert r"x\x1b[31m\x9b\x7f\x0d cannot be read" in text
    assert "\n  where: " in text
    assert printable("a\033é\udc80\n") == "a\\x1bé\\udc80\n"
    named = build_table(["é\033/case_1_match_1_h&e_patch1.png", "é\033.png"], SKIP)
    assert len(named.table) == 1
    assert [item.path for item in named.unparsed] == [r"é\x1b.png"]
    assert named.unparsed[0].reason != "path is not valid UTF-8"


def geometry(folder: Path, text: str, paths: list[str]) -> Scan:
    (folder / "g.csv").write_text(text, encoding="utf-8")
    return build_table(paths, PatchesConfig(geometry="g.csv"), base=folder)


PATHS = [
    "a/case_1_match_1_h&e_patch1.png",
    "b/case_1_match_1_h&e_patch2.png",
    "b/case_1_match_1_h&e_patch3.png",
]


def test_geometry(tmp_path: Path) -> None:
    text = "Path,X,y,width,height\ncase_1_match_1_h&e_patch2.png,1,2,3,4\n"
    text += "./a\\case_1_match_1_h&e_patch1.png,5,6,7,8\nno.png,1,1,1,1\n"
    result = geometry(tmp_path, text, PATHS)
    table = result.table
    assert list(table.columns[-4:]) == ["x", "y", "width", "height"]
    assert table[["x", "y", "width", "height"]].to_numpy()[:2].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert table.loc[2, ["x", "y"]].isna().all()
    assert (result.geometry_unmatched, result.geometry_missing) == (1, 1)
    corners = ",".join(f"{axis}{i}" for i in range(4) for axis in "xy")
    wide = geometry(
        tmp_path, f"path;{corners}\n".replace(",", ";") + f"{PATHS[0]};0;1;2;3;4;5;6;7\n", PATHS
    )
    assert wide.table.loc[0, "y3"] == 7.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"path,x,y\n{PATHS[0]},1,2\n{PATHS[1]},1,zwei\n", r"y = 'zwei' in line 3"),
        (f"path,x,y\n{PATHS[0]},inf,2\n", r"x = 'inf' in line 2"),
        (f"path,x,y,width,height\n{PATHS[0]},1,2,0,4\n", r"width = '0' in line 2"),
        (
            f"path,x,y\n{PATHS[0]},1,2\n\ncase_1_match_1_h&e_patch1.png,1,2\n",
            r"two positions, in lines 2 and 4",
        ),
        ("path,x\na,1\n", "no column 'y'"),
        ("file,x,y\na,1,2\n", "no column 'path'"),
        ("path,a,b\n", "has the columns path, a, b"),
        ("path,x,y,x0,y0\n", "has the columns"),
        (f"path,x,y\n{PATHS[0]},1\n", "2 cells in line 2"),
    ],
)
def test_bad_geometry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CohortError, match=message):
        geometry(tmp_path, text, PATHS)


def test_geometry_with_an_ambiguous_bare_name(tmp_path: Path) -> None:
    paths = ["a/1-1-he-3.png", "b/1-1-he-3.png"]
    (tmp_path / "g.csv").write_text("path,x,y\n1-1-he-3.png,1,2\n", encoding="utf-8")
    pattern = r"(?P<case>[ab])/\d-(?P<slice>\d)-(?P<stain>he)-(?P<patch>\d)\.png"
    with pytest.raises(CohortError, match="several folders"):
        build_table(paths, PatchesConfig(pattern=pattern, geometry="g.csv"), base=tmp_path)


def test_importing_the_cohort_is_light() -> None:
    heavy = {"torch", "timm", "matplotlib", "PIL"}
    code = f"import sys, featstore.cohort; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.strip() == "[]"
