"""Many writers and readers of the same cases at once: no row lost, none twice, no view a mixture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featstore.store import Slice, Store, StoreWriter
from featstore.store.verify import verify
from tests.store.builders import feature, make_slice, make_spec
from tests.store.damage import contents, ended, started

pytestmark = pytest.mark.filterwarnings("error")
CASES = ("a", "B")
Key = tuple[str, str, str, int]


def commits(writer: int, rounds: int) -> Iterator[tuple[str, list[Slice]]]:
    """What one writer commits: rows that all write alike, rows that they supersede, and rows of its own."""
    chance = random.Random(writer)
    for n in range(rounds):
        case = chance.choice(CASES)
        version = 1 + writer * rounds + n  # of no other commit
        slices = [
            make_slice(case, "same", "s", sorted(chance.sample(range(30), 3))),
            make_slice(case, "fought over", "s", sorted(chance.sample(range(12), 4)), version),
            make_slice(case, "own", f"s{writer}", [n], version),
        ]
        yield case, chance.sample(slices, chance.randint(1, 3))


def possible(writers: int, rounds: int) -> dict[Key, set[bytes]]:
    """Every row that was written, and what may be live of it: of each writer only its last word."""
    found: dict[Key, set[bytes]] = {}
    for writer in range(writers):
        last: dict[Key, bytes] = {}
        for case, slices in commits(writer, rounds):
            for item in slices:
                for patch, values in zip(item.patch.tolist(), item.columns["features"], strict=True):
                    last[case, item.stain, item.slice_id, patch] = values.tobytes()
        for key, value in last.items():
            found.setdefault(key, set()).add(value)
    return found


def write_at_once(path: Path, writers: int, rounds: int, formats: tuple[str, ...]) -> None:
    """Real processes: each makes the store if it is first, and commits to the cases of all others."""

    def work(number: int) -> None:
        writer = StoreWriter(path, make_spec(), {}, formats[number % len(formats)])
        for case, slices in commits(number, rounds):
            writer.commit(case, slices)

    children = [started(lambda number=number: work(number)) for number in range(writers)]  # type: ignore[misc]
    assert [ended(child) for child in children] == [0] * writers
    found, wanted = contents(path), possible(writers, rounds)
    assert found.keys() == wanted.keys()
    assert [key for key, value in found.items() if value not in wanted[key]] == []
    assert len(Store.open(path).table()) == len(wanted)  # none twice
    report = verify(path, "full")
    assert report.findings == []
    assert report.patches == len(wanted)


def test_several_writers_at_once(tmp_path: Path, file_format: str) -> None:
    write_at_once(tmp_path / "store", 4, 10, (file_format,))


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "rounds"), [(2, 100), (8, 25)])
@pytest.mark.parametrize("formats", [("hdf5",), ("zarr",), ("hdf5", "zarr")], ids="+".join)
def test_two_hundred_commits_at_once(
    tmp_path: Path, writers: int, rounds: int, formats: tuple[str, ...]
) -> None:
    write_at_once(tmp_path / "store", writers, rounds, formats)


def whole(version: int) -> list[Slice]:
    """One commit: all rows of a case anew."""
    return [make_slice("a", stain, "s", list(range(12)), version) for stain in ("x", "y")]


def seen(view: Store) -> int:
    """The version of all rows that a view shows; they must be of one, features and columns alike."""
    table, bag = view.table("a"), view.bag("a")
    versions = {int(path.rpartition("_v")[2]) for path in table["path"]}
    assert len(versions) == 1, versions
    (version,) = versions
    assert bag.patches.tolist() == [*range(12), *range(12)]
    wanted = [feature("a", stain, "s", patch, version) for stain in ("x", "y") for patch in range(12)]
    assert np.array_equal(bag.features, np.stack(wanted))
    return version


def read_beside_writers(path: Path, writers: int, readers: int, rounds: int, file_format: str) -> None:
    """Readers open the store again and again, and keep some views, until all writers are done."""
    StoreWriter(path, make_spec(), {}, file_format).commit("a", whole(0))
    done, final = path.parent / "done", {(k + 1) * rounds for k in range(writers)}

    def write(number: int) -> None:
        writer = StoreWriter(path, make_spec(), {}, file_format)
        for n in range(rounds):
            writer.commit("a", whole(1 + number * rounds + n))

    def read(number: int) -> None:
        opened, kept, last = 0, [], False
        while not last:
            last = done.exists()
            view = Store.open(path)
            version = seen(view)
            opened += 1
            if opened % 5 == 1:
                kept.append((version, view))
        # Every view still shows what it showed, for those who read it only now as well.
        assert [seen(Store(path, view.spec, view._newest)) for _, view in kept] == [v for v, _ in kept]
        assert [seen(view) for _, view in kept] == [version for version, _ in kept]
        assert version in final

    reading = [started(lambda k=k: read(k)) for k in range(readers)]  # type: ignore[misc]
    writing = [started(lambda k=k: write(k)) for k in range(writers)]  # type: ignore[misc]
    assert [ended(child) for child in writing] == [0] * writers
    done.touch()
    assert [ended(child) for child in reading] == [0] * readers
    assert seen(Store.open(path)) in final
    assert verify(path, "full").findings == []


def test_readers_beside_writers_see_whole_commits(tmp_path: Path, file_format: str) -> None:
    read_beside_writers(tmp_path / "store", 2, 2, 12, file_format)


@pytest.mark.slow
def test_readers_beside_two_hundred_commits(tmp_path: Path, file_format: str) -> None:
    read_beside_writers(tmp_path / "store", 4, 3, 50, file_format)
