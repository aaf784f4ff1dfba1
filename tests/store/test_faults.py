"""A disk that refuses any one step of writing: what was acknowledged stays, the error is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import StoreError
from featstore.store import StoreWriter, files
from featstore.store.records import read_manifest
from featstore.store.verify import verify
from tests.extraction.zygote import Steps, failing_steps, fatal_step, is_given_up, killing_steps
from tests.store.builders import make_slice, make_spec
from tests.store.damage import Contents, contents, ended, started

Operation = Callable[[StoreWriter], object]


def commit(case: str, *slices: tuple[str, str, list[int], int]) -> Operation:
    return lambda writer: writer.commit(case, [make_slice(case, *item) for item in slices])


def drop(case: str, stain: str, slice_id: str, patches: list[int], version: int) -> Operation:
    item = make_slice(case, stain, slice_id, patches, version)
    digests = [digest.tobytes() for digest in item.columns["source_sha256"]]
    doomed = {(stain, slice_id, patch): digest for patch, digest in zip(patches, digests, strict=True)}
    return lambda writer: writer.drop(case, doomed)


OPERATIONS: tuple[Operation, ...] = (
    commit("1", ("h&e", "s1", [0, 1, 2, 3], 0), ("sox10", "s1", [5, 7], 0)),
    commit("TCGA-AA", ("h&e", "s1", [1, 2], 0)),
    # Some rows of the first commit are made anew, and some are added.
    commit("1", ("h&e", "s1", [2, 3, 4], 1), ("h&e", "s2", [1], 0)),
    drop("1", "h&e", "s1", [0, 3], 1),
    # What another writer has done already.
    commit("TCGA-AA", ("h&e", "s1", [1, 2], 0)),
)


@dataclass
class Attempt:
    """What came of the operations: how many were acknowledged, what stopped the next one.

    ``links`` counts the links made in the operation that failed.
    """

    acknowledged: int
    error: StoreError | None
    links: int


def attempt(
    store: Path, file_format: str, steps: Steps | None = None, tally: Path | None = None
) -> Attempt:
    """Make a store and carry out all operations with one writer, until one fails.

    A file, if one is given, grows by a byte for every operation that was acknowledged.
    """
    done: list[str] = [] if steps is None else steps.done
    acknowledged, begun = 0, 0
    with pytest.MonkeyPatch.context() as patch:
        if steps is not None:
            patch.setattr(files, "os", steps)
        try:
            writer = StoreWriter(store, make_spec(), {"test": True}, file_format)
            for operation in OPERATIONS:
                begun = len(done)
                operation(writer)
                acknowledged += 1
                if tally is not None:
                    tally.write_bytes(bytes(acknowledged))
        except StoreError as error:
            made = done[begun:].count("link") if begun else 0  # those that make the store commit nothing
            return Attempt(acknowledged, error, made)
    return Attempt(acknowledged, None, 0)


@pytest.fixture
def states(tmp_path: Path, file_format: str) -> list[Contents]:
    """What is in the store after each number of operations."""
    writer = StoreWriter(tmp_path / "whole", make_spec(), {"test": True}, file_format)
    found: list[Contents] = [{}]
    for operation in OPERATIONS:
        operation(writer)
        found.append(contents(writer.path))
    assert len({len(state) for state in found}) == len(OPERATIONS)  # all but the last do something
    return found


def check(store: Path, expected: Contents) -> None:
    """The store holds this and is undamaged; before it is made, there is none."""
    if read_manifest(store) is None:
        assert expected == {}
        return
    assert contents(store) == expected
    report = verify(store, "full")
    assert report.damage == []
    assert report.patches == len(expected)


def litter(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob(f".*{files.TEMPORARY_SUFFIX}")}


# A disk that fails once is the harder test: a retry would succeed and pretend that all is well.
@pytest.mark.parametrize(
    ("error", "lasting", "stride"),
    [
        ("EIO", False, 3),
        ("ENOSPC", False, 5),
        pytest.param("EIO", False, 1, marks=pytest.mark.slow),
        pytest.param("EIO", True, 1, marks=pytest.mark.slow),
        pytest.param("ENOSPC", False, 1, marks=pytest.mark.slow),
        pytest.param("EDQUOT", True, 1, marks=pytest.mark.slow),
    ],
)
def test_any_step_may_fail(
    tmp_path: Path, file_format: str, states: list[Contents], error: str, lasting: bool, stride: int
) -> None:
    unharmed = failing_steps(None, error)
    attempt(tmp_path / "unharmed", file_format, unharmed)
    count = len(unharmed.done)
    assert count > 100
    for at in range(1, count + 2, stride):
        store = tmp_path / f"at{at}" / "store"
        store.parent.mkdir()
        steps = failing_steps(at, error, lasting)
        found = attempt(store, file_format, steps)
        check_attempt(found, steps, store, states, error)
        again = attempt(store, file_format)
        assert (again.acknowledged, again.error) == (len(OPERATIONS), None)
        check(store, states[-1])


def check_attempt(found: Attempt, steps: Steps, store: Path, states: list[Contents], error: str) -> None:
    fatal = fatal_step(steps.done)
    assert is_given_up(steps.done)
    assert (found.error is None) == (fatal is None)
    if found.error is None:
        assert found.acknowledged == len(OPERATIONS)
    else:
        assert type(found.error) is StoreError
        assert found.error.found == f"could not write: {os.strerror(getattr(errno, error))}"
        assert found.error.where.startswith(str(store.parent))
        assert {"EIO": "mend the disk", "ENOSPC": "make space", "EDQUOT": "quota"}[error] in found.error.fix
    # Only what failed after its record was linked may be there without an acknowledgement.
    check(store, states[found.acknowledged + found.links])
    assert not litter(store.parent) or "unlink!" in steps.done


@pytest.mark.parametrize(
    ("after", "stride"),
    [
        pytest.param(False, 5, id="before-some"),
        pytest.param(False, 1, id="before", marks=pytest.mark.slow),
        pytest.param(True, 1, id="after", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_step(
    tmp_path: Path, file_format: str, states: list[Contents], after: bool, stride: int
) -> None:
    at, killed = 1, True
    while killed:
        store, tally = tmp_path / f"at{at}", tmp_path / f"tally{at}"
        steps = killing_steps(at, after)
        child = started(partial(attempt, store, file_format, steps, tally))
        at += stride
        killed = ended(child) != 0
        count = tally.stat().st_size if tally.exists() else 0
        found = contents(store) if read_manifest(store) else {}
        assert found in states[count : count + 2]
        check(store, found)
        attempt(store, file_format)
        check(store, states[-1])
    assert count == len(OPERATIONS)
    assert at > 100


@pytest.mark.parametrize("most", [1, 1000])
def test_a_short_write_is_gone_on_with(
    tmp_path: Path, file_format: str, states: list[Contents], most: int
) -> None:
    def around(number: int, call: Any) -> Any:
        handle, data = call.args
        return os.write(handle, data[:most])

    steps = Steps(("write",), around)
    assert attempt(tmp_path / "store", file_format, steps).error is None
    assert len(steps.done) > 30
    assert verify(tmp_path / "store", "full").findings == []
    check(tmp_path / "store", states[-1])


def test_a_write_that_writes_nothing_is_an_error(tmp_path: Path, states: list[Contents]) -> None:
    """A file system in user space may answer so; to ask for ever would help nobody."""
    found = attempt(tmp_path / "store", "hdf5", Steps(("write",), lambda number, call: 0))
    assert found.error is not None
    assert found.error.found == "could not write: Input/output error"
    assert not litter(tmp_path)
