"""repair: what is damaged goes to quarantine, just that is computed again, and a kill does no harm."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.errors import StoreDamaged, StoreError
from featstore.store import Store, StoreWriter, files
from featstore.store.maintenance import repair
from featstore.store.records import highest_record
from featstore.store.verify import verify
from tests.command_line import listing
from tests.store.builders import make_slice, make_spec
from tests.store.damage import (
    break_part,
    contents,
    encode_as,
    flip,
    kill_at,
    link_record,
    part_of,
    record_of,
    refill,
    rewrite,
)

pytestmark = pytest.mark.filterwarnings("error")


def lose_part(store: Path) -> None:
    part_of(store, "1", 1).unlink()


def link_part(store: Path) -> None:
    file = part_of(store, "1", 1)
    file.unlink()
    file.symlink_to("/etc/passwd")


def spoil_features(store: Path) -> None:
    record = Store.open(store).record("1")
    item = make_slice("1", "h&e", "s2", list(range(40)))
    item.columns["features"][7] = np.nan
    data = encode_as(record.parts[1].name, item)
    last = replace(record.parts[1], size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (store / "cases" / "1" / last.name).write_bytes(data)
    rewrite(store, "1", (record.parts[0], last))


def double_rows(store: Path) -> None:
    record = Store.open(store).record("1")
    StoreWriter(store, make_spec(), {}).commit("1", [make_slice("1", "h&e", "s2", [3, 4], version=1)])
    rewrite(store, "1", (*record.parts, Store.open(store).record("1").parts[-1]))


def break_record(store: Path) -> None:
    flip(record_of(store, "1"), 100)


def empty_record_of_a_hashed_name(store: Path) -> None:
    """Nothing but a hash of the case's id is left: both records are empty."""
    for file in Store.open(store).folder("TCGA-AA").glob("*.json"):
        file.write_bytes(b"")


def foreign_record(store: Path) -> None:
    rewrite(store, "1", (), fingerprint="f" * 64)


# The damage, how many embeddings extract must compute again, and how many files are moved.
DAMAGE: list[tuple[Callable[[Path], None], int, int]] = [
    (break_part, 40, 1),
    (lose_part, 40, 0),
    (link_part, 40, 1),
    (spoil_features, 40, 1),
    (double_rows, 2, 0),
    (break_record, 120, 1),
    (empty_record_of_a_hashed_name, 120, 1),
    (link_record, 120, 1),
    (foreign_record, 120, 1),
]


@pytest.mark.parametrize("whole", ["hdf5", "zarr"], indirect=True)
@pytest.mark.parametrize(("damage", "again", "moved"), DAMAGE, ids=[d[0].__name__ for d in DAMAGE])
def test_repair_and_extract_make_the_store_whole(
    store: Path, damage: Callable[[Path], None], again: int, moved: int
) -> None:
    before = contents(store)
    damage(store)
    broken = listing(store)
    planned = repair(store)
    assert listing(store) == broken
    assert (planned.exit_code, len(planned.repairs), planned.left) == (1, 1, [])
    assert "nothing is changed yet" in planned.to_text()
    report = repair(store, apply=True)
    assert (report.exit_code, len(report.repairs), report.left) == (0, 1, [])
    assert len(report.repairs[0].moved) == moved
    assert verify(store, "full").damage == []
    # Every byte is still there, under the same name or in quarantine.
    kept = sorted(data for data in listing(store).values() if data is not None)
    for data in broken.values():
        assert data is None or data in kept
    if report.quarantine is not None:
        place = Path(report.quarantine)
        assert place.parent == store / "quarantine"
        for file in report.repairs[0].moved:
            assert os.path.lexists(place / file)
    assert contents(store).items() <= before.items()
    assert repair(store, apply=True).repairs == []
    assert refill(store) == again
    assert contents(store) == before
    assert verify(store, "full").damage == []


def test_a_damaged_newest_record_never_brings_an_older_state_back(store: Path) -> None:
    break_record(store)
    repair(store, apply=True, level="quick")
    assert Store.open(store).cases() == ["2", "TCGA-AA"]
    assert highest_record(store / "cases" / "1") == 3
    # Someone deletes what repair wrote: that must not bring it back either.
    (store / "cases" / "1" / "000003.json").unlink()
    (found,) = verify(store, "quick").damage
    assert found.kind == "record-missing"
    repair(store, apply=True)
    assert Store.open(store).cases() == ["2", "TCGA-AA"]
    assert verify(store).damage == []


def test_a_case_that_was_moved_whole_may_begin_anew(store: Path) -> None:
    before = contents(store)
    empty_record_of_a_hashed_name(store)
    repair(store, apply=True)
    refill(store)
    assert highest_record(Store.open(store).folder("TCGA-AA")) == 1
    assert (verify(store, "full").damage, contents(store)) == ([], before)


def test_what_may_be_readable_elsewhere_is_left(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.store import partcheck

    def refuse(path: Path, size: int) -> Any:
        raise StoreError("a part may not be read", where=str(path))

    monkeypatch.setattr(partcheck, "open_part", refuse)
    before = listing(store)
    report = repair(store, apply=True, level="default")
    assert (report.exit_code, report.repairs, len(report.left)) == (1, [], 6)
    assert listing(store) == before


def test_a_commit_that_comes_between_is_kept(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(store)
    break_part(store)
    real = files.publish

    def second(path: Path, data: bytes) -> bool:
        monkeypatch.setattr(files, "publish", real)
        StoreWriter(store, make_spec(), {}).commit("1", [make_slice("1", "new", "s", [1])])
        return real(path, data)

    monkeypatch.setattr(files, "publish", second)
    report = repair(store, apply=True)
    assert len(report.repairs) == 1
    found = contents(store)
    assert ("1", "new", "s", 1) in found
    assert len(found) == len(before) - 40 + 1


def test_repair_killed_at_every_step(whole: Path, tmp_path: Path) -> None:
    before, step = contents(whole), 0
    while True:
        step += 1
        path = Path(shutil.copytree(whole, tmp_path / str(step)))
        break_part(path)
        flip(record_of(path, "2"), 100)
        code = kill_at(step, lambda path=path: repair(path, apply=True))  # type: ignore[misc]
        # No case is ever read as something else than it was, or than nothing.
        view = Store.open(path)
        for case in ("1", "TCGA-AA"):
            assert len(view.layout(case).patches) in (80, 120)
        try:
            assert len(view.layout("2").patches) == 0
        except StoreDamaged:
            assert code == -9
        repair(path, apply=True)
        assert verify(path, "full").damage == []
        assert refill(path) == 160
        assert contents(path) == before
        shutil.rmtree(path)
        if code == 0:
            break
        assert code == -9
    assert step > 20
