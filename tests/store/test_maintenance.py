"""gc and rm: what they take away, what they leave, and who may work beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import ConfigError, StoreDamaged, StoreError
from featstore.store import Store, StoreWriter, files, maintenance
from featstore.store.maintenance import gc, repair, rm
from featstore.store.verify import verify
from tests.command_line import listing
from tests.store.builders import make_slice, make_spec
from tests.store.damage import (
    age,
    contents,
    ended,
    fill,
    flip,
    link_record,
    part_of,
    record_of,
    refill,
    started,
)

pytestmark = pytest.mark.filterwarnings("error")
DAY = 86400


# gc


@pytest.fixture
def by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge ages by mtime, which a test can set; ctime nobody can."""
    monkeypatch.setattr(maintenance, "_changed", lambda found: found.st_mtime)


def test_a_copied_file_is_young_whatever_its_time_stamp_says(store: Path) -> None:
    (store / "cases" / "1" / ("0" * 32 + ".h5")).write_bytes(b"x")
    age(store, 3 * DAY)
    assert sum(gc(store).files.values()) == 0


def supersede(path: Path) -> None:
    """Cases 1 to 3 of `fill` written anew: the records and parts from before are needed no more."""
    writer = StoreWriter(path, make_spec(), {})
    for case in ("1", "2"):
        for stain, slice_id in (("h&e", "s1"), ("sox10", "s1"), ("h&e", "s2")):
            writer.commit(case, [make_slice(case, stain, slice_id, list(range(40)), version=1)])


@pytest.mark.usefixtures("by_content")
def test_gc_removes_what_nobody_needs(store: Path) -> None:
    supersede(store)
    (store / "cases" / "1" / ".a.tmp").write_bytes(b"x")
    (store / "cases" / ".b.tmp").write_bytes(b"x")
    (store / "cases" / "1" / "notes.txt").write_text("mine")
    (store / "cases" / "2" / ("0" * 32 + ".h5")).write_bytes(b"x")
    before, kept = contents(store), listing(store)
    assert sum(gc(store).files.values()) == 0  # all is young
    age(store, 2 * DAY)
    (store / "cases" / "2" / ("1" * 32 + ".h5")).write_bytes(b"of a writer at work")
    kept = listing(store)
    planned = gc(store)
    assert listing(store) == kept
    report = gc(store, apply=True)
    assert report.files == planned.files
    # Two parts of two cases, and one that nobody ever named; records 1 to 4 of 5, twice, and 1 of 2.
    assert report.files == {"part": 5, "old record": 9, "unfinished file": 2, "quarantined file": 0}
    assert contents(store) == before
    assert (store / "cases" / "1" / "notes.txt").exists()
    assert [note.kind for note in verify(store, "full").findings] == ["foreign", "part-unnamed"]
    assert sum(gc(store, apply=True).files.values()) == 0


@pytest.mark.usefixtures("by_content")
def test_a_reader_from_before_keeps_working_within_the_grace_period(store: Path) -> None:
    """The record that it follows is days old, but it was the newest one until just now."""
    age(store, 9 * DAY)
    reader = Store.open(store)
    before = contents(store)
    supersede(store)
    gc(store, apply=True)
    found = {
        (case, row.stain, row.slice_id, row.patch): values.tobytes()
        for case in reader.cases()
        for row, values in zip(reader.table(case).itertuples(), reader.bag(case).features, strict=True)
    }
    assert found == before


@pytest.mark.usefixtures("by_content")
def test_gc_beside_writers(tmp_path: Path) -> None:
    path = tmp_path / "store"
    StoreWriter(path, make_spec(), {})

    def write() -> None:
        writer = StoreWriter(path, make_spec(), {})
        for n in range(60):
            writer.commit("a", [make_slice("a", "x", "s", [0, n + 1], version=n)])

    child = started(write)
    removed, done = 0, (0, 0)
    while done == (0, 0):
        # Without any grace: a reader may have to open the store again, a writer loses nothing.
        removed += sum(gc(path, grace_seconds=0, apply=True).files.values())
        done = os.waitpid(child, os.WNOHANG)
    assert done[1] == 0
    assert len(contents(path)) == 61
    assert verify(path, "full").damage == []
    removed += sum(gc(path, grace_seconds=0, apply=True).files.values())
    assert removed > 50
    assert len(contents(path)) == 61


@pytest.mark.usefixtures("by_content")
def test_gc_passes_over_what_it_cannot_judge(store: Path) -> None:
    supersede(store)
    flip(record_of(store, "1"), 100)
    age(store, 2 * DAY)
    before = {name for name in listing(store) if name.startswith("cases/1/")}
    report = gc(store, apply=True)
    assert len(report.passed_over) == 1
    assert "case 1" in report.to_text()
    assert {name for name in listing(store) if name.startswith("cases/1/")} == before
    assert report.files["part"] == 2


@pytest.mark.usefixtures("by_content")
def test_quarantine_is_cleared_on_demand_only(store: Path) -> None:
    flip(part_of(store, "2"), 2000)
    link_record(store)
    repair(store, apply=True)
    age(store, 2 * DAY)
    gc(store, apply=True)
    assert list((store / "quarantine").iterdir()) != []
    planned = gc(store, quarantine=True)
    assert planned.files["quarantined file"] == 2
    assert gc(store, apply=True, quarantine=True).files["quarantined file"] == 2
    assert list((store / "quarantine").iterdir()) == []
    assert (store.parent / "moved.json").exists()


@pytest.mark.usefixtures("by_content")
def test_gc_follows_no_link(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ("0" * 32 + ".h5")).write_bytes(b"mine")
    (store / "cases" / "linked").symlink_to(outside)
    (store / "cases" / "1" / ("0" * 32 + ".h5")).symlink_to(outside)
    age(store, DAY)
    before = listing(outside)
    gc(store, grace_seconds=0, apply=True)
    assert listing(outside) == before
    assert (store / "cases" / "1" / ("0" * 32 + ".h5")).is_symlink()


# rm


@pytest.mark.parametrize(
    ("choice", "gone"),
    [
        ({"cases": ["1"]}, lambda key: key[0] == "1"),
        ({"cases": ["TCGA-AA", "2"]}, lambda key: key[0] != "1"),
        ({"stains": ["sox10"]}, lambda key: key[1] == "sox10"),
        ({"slices": ["s1"]}, lambda key: key[2] == "s1"),
        ({"cases": ["2"], "stains": ["h&e"], "slices": ["s2"]}, lambda key: key[:3] == ("2", "h&e", "s2")),
        ({"stains": ["sox10"], "slices": ["s2"]}, lambda key: False),
    ],
)
def test_rm(store: Path, choice: dict, gone: Callable[[tuple], bool]) -> None:
    before, files_before = contents(store), listing(store)
    expected = {key: value for key, value in before.items() if not gone(key)}
    doomed = [key for key in before if gone(key)]
    planned = rm(store, **choice)
    assert listing(store) == files_before
    report = rm(store, **choice, apply=True)
    assert contents(store) == expected
    assert replace_applied(report.to_json()) == replace_applied(planned.to_json())
    assert report.patches == len(doomed) == sum(report.stains.values())
    assert report.cases == len({key[0] for key in doomed})
    assert report.slices == len({key[:3] for key in doomed})
    assert f"{report.patches:,} patches" in report.to_text() or not doomed
    assert verify(store, "full").damage == []
    json.dumps(report.to_json())


def replace_applied(report: dict[str, Any]) -> dict[str, Any]:
    return {**report, "applied": None}


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"cases": ["1", "TCGA-AB"]}, "no case: 'TCGA-AB'; did you mean 'TCGA-AA'"),
        ({"stains": ["sox11"]}, "no stain: 'sox11'; did you mean 'sox10'"),
        ({"cases": ["1"], "slices": ["s1", "zzz"]}, "no slice in these cases: 'zzz'"),
        ({"cases": [""]}, "empty id"),
    ],
)
def test_rm_of_names_that_are_unknown(store: Path, choice: dict, says: str) -> None:
    before = listing(store)
    with pytest.raises(StoreError, match=says):
        rm(store, **choice, apply=True)
    assert listing(store) == before


def test_rm_needs_a_choice(store: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is chosen"):
        rm(store, apply=True)


def test_rm_touches_nothing_where_a_record_is_damaged(store: Path) -> None:
    flip(record_of(store, "TCGA-AA"), 100)
    before = listing(store)
    with pytest.raises(StoreDamaged, match="sha256") as error:
        rm(store, stains=["h&e"], apply=True)
    assert "featstore repair" in str(error.value)
    assert listing(store) == before


def test_rm_beside_a_writer_keeps_what_comes_between(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.publish

    def second(path: Path, data: bytes) -> bool:
        monkeypatch.setattr(files, "publish", real)
        StoreWriter(store, make_spec(), {}).commit("1", [make_slice("1", "new", "s", [1])])
        return real(path, data)

    monkeypatch.setattr(files, "publish", second)
    rm(store, cases=["1"], stains=["h&e"], apply=True)
    found = {key[1] for key in contents(store) if key[0] == "1"}
    assert found == {"sox10", "new"}


def test_what_was_removed_can_be_written_again(store: Path) -> None:
    before = contents(store)
    rm(store, stains=["h&e"], apply=True)
    assert refill(store) == 240
    assert contents(store) == before


def test_a_crowd_at_once(tmp_path: Path) -> None:
    """Writers, repair, gc and verify on one store that is damaged again and again."""
    path = tmp_path / "store"
    fill(path, ("1",), patches=4)

    def write() -> None:
        for n in range(25):
            StoreWriter(path, make_spec(), {}).commit("1", [make_slice("1", "w", "s", [n])])

    def mend() -> None:
        for _ in range(15):
            repair(path, apply=True)
            gc(path, apply=True)
            verify(path)

    children = [started(work) for work in (write, write, mend, mend)]
    assert [ended(child) for child in children] == [0] * 4
    assert len(contents(path)) == 12 + 25
    assert verify(path, "full").damage == []
