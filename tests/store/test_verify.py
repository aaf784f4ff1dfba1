"""`verify` finds what is damaged, says where, and goes on."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featstore.errors import ConfigError, StoreError
from featstore.store import Store, StoreWriter
from featstore.store.findings import VerifyReport
from featstore.store.format import Part
from featstore.store.listing import read_plain
from featstore.store.partcheck import check_bytes, check_file
from featstore.store.verify import verify
from tests.store.builders import make_slice, make_spec
from tests.store.damage import encode_as, fill, flip, part_of, record_of, rewrite

pytestmark = pytest.mark.filterwarnings("error")
LEVELS = ("quick", "default", "full")


@pytest.fixture(params=["hdf5", "zarr"])
def whole(whole_stores: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return whole_stores[request.param]


def kinds(report: VerifyReport) -> list[str]:
    return [finding.kind for finding in report.damage]


@pytest.mark.parametrize("level", LEVELS)
def test_a_whole_store(store: Path, level: str) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(store, level, observe=lambda done, total: seen.append((done, total)))
    assert (report.findings, report.exit_code, report.to_json()["ok"]) == ([], 0, True)
    assert (report.cases, report.parts, report.patches) == (3, 6, 360)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert "no damage" in report.to_text()


def test_the_oldest_store_is_whole() -> None:
    assert verify(Path(__file__).parent / "golden" / "1.0", "full").findings == []


def test_what_cannot_be_read_at_all(store: Path) -> None:
    """A part of the right size with nothing right in it; the search goes on after it."""
    part = part_of(store, "1")
    part.write_bytes(b"\0" * part.stat().st_size)
    other = part_of(store, "2")
    other.write_bytes(random.Random(0).randbytes(other.stat().st_size))
    assert kinds(verify(store)) == ["part-damaged"] * 2
    assert kinds(verify(store, "quick")) == []


def forge(store: Path, case: str, change: dict[str, np.ndarray], stain: str = "sox10") -> None:
    """Put a part of right checksums and wrong content under a right record."""
    item = make_slice(case, stain, "s9", [1, 2, 3])
    for name, values in change.items():
        item.columns[name] = values
    writer = StoreWriter(store, make_spec(), {})
    writer.commit(case, [make_slice(case, stain, "s9", [1, 2, 3])])
    record = Store.open(store).record(case)
    data = encode_as(record.parts[-1].name, item)
    last = replace(record.parts[-1], size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (store / "cases" / case / last.name).write_bytes(data)
    rewrite(store, case, (*record.parts[:-1], last))


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("not-finite", "features", np.array([[1.0] * 7, [np.nan] * 7, [np.inf] * 7], np.float16)),
        ("part-damaged", "features", np.ones((3, 6), np.float16)),
        ("part-damaged", "features", np.ones((3, 7), np.float32)),
        ("part-damaged", "quality", np.ones((2, 8), np.float32)),
        ("patch-order", "patch", np.array([1, 3, 2])),
        ("patch-missing", "patch", np.array([1, 2, 4])),
        ("part-damaged", "source_name", np.array([b"a", b"\xff", b"c"])),
    ],
)
def test_values_that_no_extraction_writes(store: Path, kind: str, name: str, values: np.ndarray) -> None:
    forge(store, "1", {name: values})
    for level in ("default", "full"):
        report = verify(store, level)
        assert kinds(report) == [kind]
        assert report.damage[0].case == "1"
        assert "sox10/s9" in report.to_text()


def test_rows_that_are_dead_may_hold_anything(store: Path) -> None:
    forge(store, "1", {"features": np.array([[1.0] * 7, [np.nan] * 7, [1.0] * 7], np.float16)})
    record = Store.open(store).record("1")
    last = record.parts[-1]
    rewrite(store, "1", (*record.parts[:-1], replace(last, groups=(replace(last.groups[0], live="1,3"),))))
    assert verify(store, "full").findings == []


def test_a_column_that_is_missing(store: Path) -> None:
    item = make_slice("1", "x", "s9", [1])
    del item.columns["source_stat"]
    record = Store.open(store).record("1")
    data = encode_as(record.parts[-1].name, item)
    last = replace(record.parts[-1], size=len(data), sha256=hashlib.sha256(data).hexdigest())
    group = replace(last.groups[0], stain="x", slice_id="s9", rows=1, live="1")
    (store / "cases" / "1" / last.name).write_bytes(data)
    rewrite(store, "1", (record.parts[0], replace(last, groups=(group,))))
    assert kinds(verify(store)) == ["column-missing"]


def test_a_patch_that_is_live_twice(store: Path) -> None:
    record = Store.open(store).record("1")
    StoreWriter(store, make_spec(), {}).commit("1", [make_slice("1", "h&e", "s1", [3, 4], version=1)])
    newest = Store.open(store).record("1")
    rewrite(store, "1", (*record.parts, newest.parts[-1]))
    assert kinds(verify(store, "quick")) == []
    report = verify(store)
    assert kinds(report) == ["live-twice"]
    assert "h&e/s1: patches 3, 4 are live in two parts" in report.to_text()


def test_links_are_told_and_not_followed(store: Path, tmp_path: Path) -> None:
    for case in ("1", "2"):
        file = part_of(store, case) if case == "1" else record_of(store, case)
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    folder = Store.open(store).folder("TCGA-AA")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (store / "cases" / "1" / "note").symlink_to("/etc/passwd")
    for level in LEVELS:
        report = verify(store, level)
        assert kinds(report) == ["link"] * 3
        assert [note.kind for note in report.notes] == ["link"]
        assert report.cases == 2


def test_a_link_that_comes_between_looking_and_reading_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "000001.json").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        read_plain(tmp_path / "000001.json")
    problem = check_bytes(tmp_path / "000001.json", Part("", 4, hashlib.sha256(b"mine").hexdigest(), ()))
    assert problem is not None


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_file_blocks_nothing(store: Path) -> None:
    part = part_of(store, "1")
    for file in (part, record_of(store, "2")):
        file.unlink()
        os.mkfifo(file)
    assert kinds(verify(store, "full")) == ["part-size", "record-damaged"]
    # A pipe's size is 0, and so may be the one that a forged record names.
    found = check_file(part, Part(part.name, 0, "", ()))
    assert found is not None
    assert "plain file" in found[1]


def test_a_record_of_another_store_or_case(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for patch in (1, 2, 3):
        StoreWriter(other, make_spec(pool=2), {}).commit("1", [make_slice("1", "x", "s", [patch])])
    shutil.copy(record_of(other, "1"), store / "cases" / "1" / "000003.json")
    shutil.copy(record_of(store, "TCGA-AA"), record_of(store, "2"))
    report = verify(store, "quick")
    assert kinds(report) == ["record-damaged"] * 2
    assert "fingerprint" in report.damage[0].found
    assert "TCGA-AA" in report.damage[1].found


def test_superseded_parts_are_no_finding(store: Path) -> None:
    writer = StoreWriter(store, make_spec(), {})
    writer.commit("1", [make_slice("1", "h&e", "s2", list(range(40)), version=1)])
    assert verify(store).findings == []


def test_litter_is_noted(store: Path) -> None:
    (store / "cases" / "1" / ".abc.tmp").write_bytes(b"x")
    (store / ".probe-abc.tmp").write_bytes(b"x")
    (store / "cases" / "1" / "notes.txt").write_text("mine")
    (store / "cases" / "lost+found").write_text("")
    (store / "thesis.docx").write_text("mine")
    (store / "cases" / "1" / ("0" * 32 + ".h5")).write_bytes(b"")
    (store / "cases" / "empty").mkdir()
    old = store / "cases" / "2" / "000001.json"
    flip(old, 50)
    report = verify(store)
    assert report.damage == []
    assert sorted(note.kind for note in report.notes) == sorted(
        ["temporary"] * 2 + ["foreign"] * 3 + ["part-unnamed", "no-record", "old-record"]
    )


def test_a_record_with_another_spelling_of_its_number(store: Path) -> None:
    (store / "cases" / "1" / "0000009.json").write_text("{}")
    assert kinds(verify(store, "quick")) == ["record-damaged"]


def test_there_is_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "deeper"):
        with pytest.raises(StoreError, match="no embedding store"):
            verify(path)


def test_the_shares_cover_the_store_once(tmp_path: Path) -> None:
    path = tmp_path / "store"
    fill(path, tuple(str(n) for n in range(30)), patches=2)
    found = [verify(path, "quick", f"{n}/4").cases for n in range(4)]
    assert sum(found) == 30
    assert max(found) < 20
    for wrong in ("4/4", "1", "-1/4", "1/0", "a/b"):
        with pytest.raises(ConfigError, match="share"):
            verify(path, "quick", wrong)
    with pytest.raises(ConfigError, match="level"):
        verify(path, "thorough")


def test_a_commit_meanwhile_is_no_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is gone since a newer record no longer names it was never missing."""
    from featstore.store import casecheck

    real = casecheck.check_file

    def supersede(path: Path, part: object) -> object:
        monkeypatch.setattr(casecheck, "check_file", real)
        old = part_of(store, "1", 1)
        StoreWriter(store, make_spec(), {}).commit("1", [make_slice("1", "h&e", "s2", list(range(40)), 1)])
        old.unlink()
        return real(path, part)  # type: ignore[arg-type]

    monkeypatch.setattr(casecheck, "check_file", supersede)
    assert kinds(verify(store)) == []


def test_hostile_names_reach_neither_terminal_nor_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "store"
    hostile = "=HYPERLINK(1)\x1b[31m\nx"
    writer = StoreWriter(path, make_spec(), {})
    writer.commit(hostile, [make_slice(hostile, "\x1b]0;t\x07", "a\nb", [1])])
    part_of(path, hostile).write_bytes(b"")
    (path / "cases" / os.fsdecode(b"\xff\n\x1b[2J")).write_text("")
    report = verify(path)
    text = report.to_text()
    assert "\x1b" not in text
    assert all(line.startswith(("  ", str(path))) for line in text.splitlines())
    text.encode("utf-8")
    report.write_csv(tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 3
    cells = [cell for row in rows for cell in row]
    assert any("HYPERLINK" in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith("=") or "\x1b" in cell or "\n" in cell]
