"""A copy of the store on the node's own disk: the same, made once, never half, never in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featstore.errors import ConfigError, StoreDamaged, StoreError
from featstore.store import Store, StoreWriter, scratch
from featstore.store.copied import CopiedStore
from featstore.store.scratch import copy_to_scratch, scratch_folder
from featstore.store.verify import verify
from tests.store.builders import make_slice, make_spec
from tests.store.damage import CASES, contents, ended, flip, part_of, record_of, started


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder on the node's own disk, which is not there yet."""
    return tmp_path / "local" / "disk"


def home_of(node: Path) -> Path:
    return node / f"featstore-{os.getuid()}"


def copied(store: Store, node: Path, cases: tuple[str, ...] = CASES) -> tuple[CopiedStore, list[str]]:
    """The store with its copy, and what was told."""
    told: list[str] = []
    found = copy_to_scratch(store, cases, node, told.append)
    assert isinstance(found, CopiedStore), told
    return found, told


def not_copied(store: Store, node: Path) -> str:
    """The warning with which the store itself comes back."""
    told: list[str] = []
    assert copy_to_scratch(store, CASES, node, told.append) is store
    assert told[-1].startswith("warning: no copy in store.scratch"), told
    assert str(store.path) in told[-1]
    return told[-1]


def same(found: Store, store: Store) -> None:
    """Everything that can be asked of a store."""
    assert (found.path, found.spec, found.cases()) == (store.path, store.spec, store.cases())
    assert found.digest(CASES) == store.digest(CASES)
    pd.testing.assert_frame_equal(found.table(), store.table())
    pd.testing.assert_frame_equal(found.sources(), store.sources())
    for case in store.cases():
        a, b = found.bag(case), store.bag(case)
        for name, value in vars(a).items():
            assert np.array_equal(value, getattr(b, name)), name
        assert np.array_equal(found.take(case, [3, 0, 3]), store.take(case, [3, 0, 3]))
        assert np.array_equal(found.views(case), store.views(case))


def test_the_copy_is_the_store(small_store: Path, node: Path) -> None:
    store = Store.open(small_store)
    found, told = copied(store, node)
    same(found, store)
    assert contents(found.copy) == contents(small_store)
    assert re.fullmatch(r"copying 3 cases, 0\.00 GB, to .*", told[0])
    assert re.fullmatch(r"copied in \d+\.\d s", told[1])
    assert verify(found.copy, "full").findings == []


def test_parts_are_read_from_the_copy_alone(small_store: Path, node: Path) -> None:
    found, _ = copied(Store.open(small_store), node)
    known = contents(small_store)
    again = pickle.loads(pickle.dumps(found))
    shutil.rmtree(small_store)
    for store in (found, again):
        for case in CASES:
            table, features = store.table(case), store.features(case)
            rows = [(case, r.stain, r.slice_id, r.patch) for r in table.itertuples()]
            assert [known[row] for row in rows] == [row.tobytes() for row in features]
            assert np.array_equal(store.take(case, [1, 5]), features[[1, 5]])


def test_records_beyond_those_kept_are_read_from_the_copy(
    small_store: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_RECORDS", "_LAYOUTS"):
        monkeypatch.setattr(f"featstore.store.store.{name}", 1)
    store = Store.open(small_store)
    before = store.bag("1")
    found, _ = copied(store, node)
    shutil.rmtree(small_store)
    assert {case: found.record(case).case_id for case in CASES} == {case: case for case in CASES}
    assert np.array_equal(found.bag("1").features, before.features)


def test_some_cases_and_only_what_is_live(small_store: Path, node: Path) -> None:
    StoreWriter(small_store, make_spec(), {}).commit("1", [make_slice("1", "h&e", "s1", list(range(4)), 1)])
    store = Store.open(small_store)
    found, _ = copied(store, node, ("1",))
    same(found, store)  # the others are read from the store
    record = store.record("1")
    names = {path.name for path in (found.copy / "cases" / "1").iterdir()}
    assert names == {record.name, *(part.name for part in record.parts)}
    assert os.listdir(found.copy / "cases") == ["1"]
    with pytest.raises(StoreError, match="no case 'nobody'"):
        copy_to_scratch(store, ["1", "nobody"], node)


def test_a_copy_is_made_once_and_anew_when_a_case_has_changed(small_store: Path, node: Path) -> None:
    first, _ = copied(Store.open(small_store), node)
    before = contents(small_store)
    again, told = copied(Store.open(small_store), node, tuple(reversed(CASES)))
    assert (again.copy, told) == (first.copy, [])
    over, told = copied(again, node)  # of a copy, too
    assert (over.copy, told) == (first.copy, [])
    StoreWriter(small_store, make_spec(), {}).commit("2", [make_slice("2", "h&e", "s1", [0], 7)])
    newer, told = copied(Store.open(small_store), node)
    assert newer.copy != first.copy
    assert len(told) == 2
    assert contents(newer.copy) == contents(small_store)
    assert contents(first.copy) == before  # whoever has it open goes on
    same(newer, Store.open(small_store))


def test_a_flipped_bit_in_the_copy_is_found_and_told(small_store: Path, node: Path) -> None:
    store = Store.open(small_store)
    found, _ = copied(store, node)
    part = part_of(found.copy, "2")
    value = store.features("2")[0].tobytes()
    flip(part, part.read_bytes().index(value))
    for read in (lambda: found.features("2"), lambda: found.bag("2"), lambda: found.take("2", [0])):
        with pytest.raises(StoreDamaged, match="in the copy") as error:
            read()
        assert str(part) in error.value.where
        assert f"remove the folder {found.copy}:" in error.value.fix
    assert np.array_equal(found.features("1"), store.features("1"))


@pytest.mark.parametrize("lost", ["cut", "gone", "record", "description", "cases"])
def test_a_copy_that_lost_something_is_made_anew(small_store: Path, node: Path, lost: str) -> None:
    store = Store.open(small_store)
    first, _ = copied(store, node)
    part = part_of(first.copy, "TCGA-AA", 1)
    if lost == "cut":
        os.truncate(part, 100)
    elif lost == "cases":
        shutil.rmtree(first.copy / "cases")
        (first.copy / "cases").touch()
    else:
        {"gone": part, "record": record_of(first.copy, "1"), "description": first.copy / "featstore.json"}[
            lost
        ].unlink()
    found, told = copied(store, node)
    assert told[0] == f"warning: the copy in {first.copy} is not whole any more, and is made anew"
    same(found, store)
    assert sorted(os.listdir(home_of(node))) == [found.copy.name, f"{found.copy.name}.lock"]


@pytest.mark.parametrize("kind", ["part", "record"])
def test_damage_in_the_store_itself_is_not_copied(small_store: Path, node: Path, kind: str) -> None:
    store = Store.open(small_store)
    store.cases()
    file = (part_of if kind == "part" else record_of)(small_store, "2")
    # In a column that training never reads: only the digest of the whole part tells.
    flip(file, file.read_bytes().index(b"_v0") if kind == "part" else 20)
    with pytest.raises(StoreDamaged, match="not what was written") as error:
        copy_to_scratch(store, CASES, node)
    assert error.value.where == str(file)
    assert [name for name in os.listdir(home_of(node)) if not name.endswith(".lock")] == []


def test_without_room_the_store_itself_is_read(
    small_store: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(small_store)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**6))
    assert "0.0 GB are free, the copy takes 0.0 GB" in not_copied(Store.open(small_store), node)


def test_a_disk_that_fills_up_meanwhile(small_store: Path, node: Path) -> None:
    def fill_up() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        assert os.strerror(errno.EFBIG) in not_copied(Store.open(small_store), node)

    assert ended(started(fill_up)) == 0
    assert [name for name in os.listdir(home_of(node)) if not name.endswith(".lock")] == []


@pytest.mark.parametrize("obstacle", ["file", "open to all", "link", "not a folder"])
def test_a_folder_that_cannot_be_used(small_store: Path, node: Path, tmp_path: Path, obstacle: str) -> None:
    node.parent.mkdir()
    if obstacle == "file":
        node.touch()
    else:
        node.mkdir()
    home, elsewhere = home_of(node), tmp_path / "elsewhere"
    if obstacle == "open to all":
        home.mkdir()
        home.chmod(0o777)
    elif obstacle == "link":
        elsewhere.mkdir(mode=0o700)
        home.symlink_to(elsewhere)
    elif obstacle == "not a folder":
        home.touch()
    not_copied(Store.open(small_store), node)
    assert not elsewhere.is_dir() or not os.listdir(elsewhere)


def lines_of(folder: Path) -> list[str]:
    return [line for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


def at_once(
    path: Path, node: Path, out: Path, monkeypatch: pytest.MonkeyPatch, count: int = 4
) -> list[str]:
    """What four processes say that copy at once; each must end with the whole store.

    No part is copied before each of them has said something: that it copies, or that it waits.
    """
    out.mkdir()
    known, copy = contents(path), scratch._copy_part

    def later(*arguments: object) -> None:
        deadline = time.monotonic() + 60
        while len(lines_of(out)) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        copy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scratch, "_copy_part", later)

    def work(number: int) -> None:
        with (out / str(number)).open("w", buffering=1) as file:
            found = copy_to_scratch(Store.open(path), CASES, node, lambda text: print(text, file=file))
            assert isinstance(found, CopiedStore)
            assert contents(found.copy) == known

    children = [started(lambda number=number: work(number)) for number in range(4)]  # type: ignore[misc]
    assert [ended(child) for child in children] == [0] * 4
    return lines_of(out)


def test_of_several_processes_one_copies(
    small_store: Path, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = at_once(small_store, node, tmp_path / "out", monkeypatch)
    assert sum(line.startswith("copying 3 cases") for line in told) == 1
    assert sum(line.startswith("waiting for another process") for line in told) == 3
    assert sorted(name.partition(".")[2] for name in os.listdir(home_of(node))) == ["", "lock"]


def test_without_locks_all_copy_and_one_copy_stays(
    small_store: Path, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    told = at_once(small_store, node, tmp_path / "out", monkeypatch)
    assert sum(line.startswith("copying 3 cases") for line in told) == 4
    assert sorted(name.partition(".")[2] for name in os.listdir(home_of(node))) == ["", "lock"]


def test_what_a_killed_process_left_is_removed_unless_somebody_writes(
    small_store: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = scratch._copy_part

    def kill(source: Path, *arguments: object) -> None:
        copy(source, *arguments)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(scratch, "_copy_part", kill)
        for cases in (CASES, ("1",)):
            child = started(lambda cases=cases: copy_to_scratch(Store.open(small_store), cases, node))  # type: ignore[misc]
            assert ended(child) == -signal.SIGKILL
            home, written = home_of(node), scratch._look_at(Store.open(small_store), cases)[0]
            # The second one has removed what the first one left.
            assert [path.name.partition(".")[0] for path in home.glob("*.tmp")] == [written]
            assert not (home / written).exists()
    with (home / f"{written}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as whoever is making this copy now
        found, _ = copied(Store.open(small_store), node)
        assert [path.name.partition(".")[0] for path in home.glob("*.tmp")] == [written]
    same(found, Store.open(small_store))
    copied(Store.open(small_store), node, ("2",))
    assert list(home.glob("*.tmp")) == []


def test_variables_in_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DISK", "/disk/7")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    assert scratch_folder("$SOME_DISK/x") == Path("/disk/7/x")
    assert scratch_folder("${SOME_DISK}_b") == Path("/disk/7_b")
    assert scratch_folder("/as/it/is") == Path("/as/it/is")
    for text, name in (
        ("$NO_SUCH_DISK", "NO_SUCH_DISK"),
        ("/a/${NO_SUCH_DISK}/b", "NO_SUCH_DISK"),
        ("$SOME_DISK/$EMPTY", "EMPTY"),
    ):
        with pytest.raises(ConfigError, match=f"variable {name} is not set") as error:
            scratch_folder(text)
        assert error.value.where == "store.scratch"
    for text in ("local", "", "~/x"):
        with pytest.raises(ConfigError) as error:
            scratch_folder(text)
        assert "absolute" in error.value.expected
