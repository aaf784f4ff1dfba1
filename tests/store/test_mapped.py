"""Some rows of a case, taken out of mapped parts: as its bag has them, checked, safe in workers."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featstore.errors import StoreDamaged, StoreError
from featstore.store import Store, StoreWriter, hdf5, mapped, parts, zarr_zip
from tests.store.builders import DIM, make_slice, make_spec
from tests.store.damage import ended, flip, part_of, started

ROW = 2 * DIM
PER_CHUNK = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (hdf5, zarr_zip):
        monkeypatch.setattr(backend, "_CHUNK_BYTES", PER_CHUNK * ROW)


@pytest.fixture
def store(writer: StoreWriter) -> Store:
    """Of "1", slices grow, rows are superseded and dropped; "2" is whole; "3" has one row."""
    writer.commit("1", [make_slice("1", "sox10", "s1", list(range(9))), make_slice("1", "h&e", "s2", [7])])
    writer.commit("1", [make_slice("1", "h&e", "s2", [1, 3, 5, 11]), make_slice("1", "h&e", "s10", [1, 2])])
    writer.commit("1", [make_slice("1", "sox10", "s1", [4, 5, 20], version=1)])
    writer.commit("2", [make_slice("2", "h&e", "s1", list(range(50))), make_slice("2", "x", "s", [3])])
    writer.commit("3", [make_slice("3", "h&e", "s1", [8])])
    name = make_slice("1", "sox10", "s1", [2]).columns["source_sha256"]
    assert writer.drop("1", {("sox10", "s1", 2): name[0].tobytes()}) == 1
    return Store.open(writer.path)


def agrees(store: Store, case: str, index: Any) -> None:
    want, found = Store.open(store.path).bag(case).features[index], store.take(case, index)
    assert (found.shape, found.dtype) == (want.shape, want.dtype)
    assert found.tobytes() == want.tobytes()


def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the chunks that are read from now on, to be checked."""
    seen: list[int] = []
    for backend in (hdf5, zarr_zip):
        real = backend.Column.read_chunk

        def count(self: Any, number: int, into: Any, real: Any = real) -> None:
            seen.append(number)
            real(self, number, into)

        monkeypatch.setattr(backend.Column, "read_chunk", count)
    return seen


def chunk_of(store: Store, case: str, number: int) -> tuple[Path, int]:
    """The part that holds a case's first slice, and the byte where a chunk of its embeddings starts."""
    path = part_of(store.path, case)
    group = store.record(case).parts[0].groups[0]
    with parts.open_part(path, path.stat().st_size) as reader:
        found = reader.column(group.stain, group.slice_id, "features", group.rows).chunks()
    assert found is not None
    assert found[0] == PER_CHUNK
    return path, int(found[1][number])


# The same as the bag ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["1", "2", "3"])
def test_any_rows_are_those_of_the_bag(store: Store, case: str) -> None:
    size, rng = len(store.outline(case)), np.random.default_rng(0)
    agrees(store, case, np.arange(size))
    agrees(store, case, np.arange(size)[::-1])
    for count in (0, 1, 3, 2 * size):
        for _ in range(5):
            agrees(Store.open(store.path), case, rng.integers(-size, size, count))
    for row in range(size):
        agrees(Store.open(store.path), case, [row])


def test_the_case_is_as_tangled_as_it_should_be(store: Store) -> None:
    """Else the tests above would not see the ways in which rows can lie."""
    pieces = store.layout("1").pieces
    assert len({piece.part.name for piece in pieces}) == 3
    assert sum(piece.span is None for piece in pieces) >= 3
    assert len(store.layout("2").pieces[0].patches) > 10 * PER_CHUNK


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_real_chunks_of_both_dtypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, dtype: str
) -> None:
    monkeypatch.undo()
    writer = StoreWriter(tmp_path / "store", make_spec(dim=1024, stored_dtype=dtype), {}, file_format)
    item = make_slice("1", "h&e", "s", list(range(1300)))
    item.columns["features"] = np.random.default_rng(0).normal(size=(1300, 1024)).astype(dtype)
    writer.commit("1", [item])
    agrees(Store.open(writer.path), "1", [0, 433, 434, 512, 1299, 5])


def test_positions_that_are_none_are_refused(store: Store) -> None:
    for index in ([50, 51], [-52], [2**40]):
        with pytest.raises(IndexError, match="of 51 patches"):
            store.take("2", index)
    for strange in (np.zeros((2, 2), int), [0.0], np.ones(51, bool), 3):
        with pytest.raises(IndexError, match="for a row of positions"):
            store.take("2", strange)
    with pytest.raises(StoreError, match="no case 'nobody'"):
        store.take("nobody", [0])


def test_embeddings_can_be_read_into_memory_at_hand(store: Store) -> None:
    want = store.bag("1").features
    out = np.zeros_like(want)
    assert store.features("1", out) is out
    assert np.array_equal(out, want)
    for wrong in (out[1:], out.astype(np.float32)):
        with pytest.raises(ValueError, match="for embeddings of"):
            store.features("1", wrong)


# Checked once, and told by name ----------------------------------------------------------------


def test_only_what_is_wanted_is_checked_and_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = checks(monkeypatch)
    store.take("2", [5, 6, 45])
    assert seen == [1, 11]
    store.take("2", [4, 47, 12])
    assert seen == [1, 11, 3]
    monkeypatch.setattr(mapped, "open_part", None)
    agrees(store, "2", [4, 5, 6, 7, 12, 44, 45])


@pytest.mark.parametrize(
    "place", [0, ROW * PER_CHUNK - 1, ROW * PER_CHUNK], ids=["first", "last", "checksum"]
)
def test_damage_is_told_where_it_is(store: Store, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, start = chunk_of(store, "2", 3)
    whole = path.read_bytes()
    flip(path, start + place)
    elsewhere = store.take("2", [0, 11, 16, 49])
    for _ in range(2):
        with pytest.raises(StoreDamaged) as error:
            store.take("2", [0, 13])
        assert error.value.where == str(path)
        assert error.value.fix
    path.unlink()
    path.write_bytes(whole)  # put back from a backup
    seen = checks(monkeypatch)
    agrees(store, "2", [0, 13])
    assert {0, 3} <= set(seen)  # also what had been checked of the file that was there
    assert np.array_equal(store.take("2", [0, 11, 16, 49]), elsewhere)


@pytest.mark.parametrize("harm", ["missing", "cut", "longer", "other bytes"])
def test_a_part_that_is_not_what_the_record_says_is_told(store: Store, harm: str) -> None:
    path = part_of(store.path, "2")
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"cut": data[:-9], "longer": data + b"1", "other bytes": b"\1" * len(data)}[harm])
    for read in (lambda: store.take("2", [3]), lambda: store.bag("2")):
        with pytest.raises(StoreDamaged) as error:
            read()
        assert error.value.where == str(path)


def test_a_wrong_place_is_never_served(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (hdf5, zarr_zip):
        real = backend.Column.chunks

        def shifted(self: Any, real: Any = real) -> Any:
            rows, starts = real(self)
            return rows, starts + 2 * DIM

        monkeypatch.setattr(backend.Column, "chunks", shifted)
    with pytest.raises(StoreDamaged, match="changes while it is being read"):
        store.take("2", [3])


@pytest.mark.parametrize("way", ["columns", "a missing chunk"])
def test_parts_that_cannot_be_mapped_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def write(group: Any, name: str, array: np.ndarray) -> None:
        how: dict[str, Any] = {"chunks": (PER_CHUNK, *array.shape[1:]), "fletcher32": True}
        if way == "columns" and array.ndim > 1:
            how |= {"chunks": (PER_CHUNK, 2)}
        if way != "a missing chunk" or name != "features":
            group.create_dataset(name, data=array, **how)
            return
        made = group.create_dataset(name, array.shape, array.dtype, **how)
        made[PER_CHUNK:] = array[PER_CHUNK:]

    monkeypatch.setattr(hdf5, "_write", write)
    writer = StoreWriter(tmp_path / "store", make_spec(), {})
    writer.commit("1", [make_slice("1", "h&e", "s1", list(range(20)))])
    agrees(Store.open(writer.path), "1", [19, 0, 7, 7])


@pytest.mark.parametrize(
    "how", [{}, {"fletcher32": True, "compression": "gzip"}], ids=["unchecked", "gzip"]
)
def test_what_nothing_checks_or_is_compressed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    def write(group: Any, name: str, array: np.ndarray) -> None:
        group.create_dataset(name, data=array, chunks=array.shape, **how)

    monkeypatch.setattr(hdf5, "_write", write)
    writer = StoreWriter(tmp_path / "store", make_spec(), {})
    writer.commit("1", [make_slice("1", "h&e", "s1", list(range(20)))])
    store = Store.open(writer.path)
    for read in (lambda: store.take("1", [3]), lambda: store.bag("1")):
        with pytest.raises(StoreDamaged, match="checksummed and not compressed"):
            read()


# Many parts, threads, processes ----------------------------------------------------------------


def open_files(store: Store) -> int:
    links = Path("/proc/self/fd")
    return sum(os.path.realpath(link).startswith(str(store.path)) for link in links.iterdir())


@pytest.fixture
def few_maps(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(mapped, "_MAPS", 2)
    return 2


def test_few_files_are_open_and_a_check_outlives_its_map(
    store: Store, few_maps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, seen = Store.open(store.path), checks(monkeypatch)
    for again in range(3):
        if again:
            seen.clear()
        for case in ("1", "2", "3"):
            fresh.take(case, np.arange(len(store.outline(case))))
            assert open_files(fresh) <= few_maps
        assert bool(seen) == (not again)
    assert open_files(fresh) == few_maps


def test_nothing_open_is_pickled(store: Store) -> None:
    want = store.take("1", [3, 1])
    assert open_files(store)
    there = pickle.loads(pickle.dumps(store))
    assert there._mapped._plans._held == {}
    assert np.array_equal(there.take("1", [3, 1]), want)
    assert there.cases() == store.cases()


def test_threads_and_forks_take_the_same(store: Store, few_maps: int) -> None:
    """While threads take rows, of files that come and go, children that were forked do as well."""
    bags = {case: store.bag(case).features for case in store.cases()}
    fresh = Store.open(store.path)
    done, failed = threading.Event(), []

    def some(seed: int, times: int = 20) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(times):
            case = str(rng.integers(1, 4))
            index = rng.integers(0, len(bags[case]), 5)
            assert np.array_equal(fresh.take(case, index), bags[case][index])

    def on(seed: int) -> None:
        try:
            while not done.is_set():
                fresh._mapped._plans.forget("1")
                some(seed)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=on, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    codes = [ended(started(lambda seed=seed: some(seed))) for seed in range(10)]
    done.set()
    for thread in threads:
        thread.join()
    assert (codes, failed) == ([0] * 10, [])


def test_a_fork_while_another_thread_lists_the_cases(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the child inherits half done, it does again; nothing is locked that nobody would unlock."""
    fresh = Store.open(store.path)
    want = store.take("1", [3, 1])
    parent, read = os.getpid(), Store._read
    listing, forked = threading.Event(), threading.Event()

    def slow(store: Store, name: str) -> object:
        if os.getpid() == parent:
            listing.set()
            assert forked.wait(60)
        return read(store, name)

    monkeypatch.setattr(Store, "_read", slow)
    thread = threading.Thread(target=fresh.cases)
    thread.start()
    assert listing.wait(60)

    def work() -> None:
        assert np.array_equal(fresh.take("1", [3, 1]), want)

    try:
        assert ended(started(work), within=20) == 0
    finally:
        forked.set()
        thread.join()
    assert fresh.cases() == store.cases()


def test_a_child_goes_on_with_what_its_parent_has_checked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = store.take("2", [5, 45])
    monkeypatch.setattr(mapped, "open_part", None)

    def work() -> None:
        assert np.array_equal(store.take("2", [5, 45]), want)

    assert ended(started(work)) == 0


def test_the_values_used_last_are_kept() -> None:
    held: mapped.Recent[int, str] = mapped.Recent(2)
    made: list[int] = []

    def value(key: int) -> str:
        return held.get(key, lambda: made.append(key) or str(key))  # type: ignore[func-returns-value]

    assert [value(key) for key in (1, 2, 1, 3, 1, 2)] == ["1", "2", "1", "3", "1", "2"]
    assert made == [1, 2, 3, 2]
    held.forget(1)
    held.forget(9)
    assert value(1) == "1"
    assert made == [1, 2, 3, 2, 1]


def test_plain_h5py_finds_the_rows_where_we_map_them(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", make_spec(), {})
    writer.commit("2", [make_slice("2", "h&e", "s1", list(range(10)))])
    path, start = chunk_of(Store.open(writer.path), "2", 1)
    with h5py.File(path, "r") as file:
        want = file["h&e/s1/features"][4:8]
    assert path.read_bytes()[start : start + 4 * ROW] == want.tobytes()
