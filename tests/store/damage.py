"""Stores to be damaged, and ways to damage them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from featstore.store import Slice, Store, StoreWriter
from featstore.store.format import Part, Record, encode_record
from featstore.store.parts import encode
from tests.store.builders import make_slice, make_spec

Contents = dict[tuple[str, str, str, int], bytes]
CASES = ("1", "2", "TCGA-AA")


def fill(
    path: Path, cases: tuple[str, ...] = CASES, patches: int = 40, file_format: str = "hdf5"
) -> StoreWriter:
    """Every case: two stains in a first part, one of them grown by a second."""
    writer = StoreWriter(path, make_spec(), {"test": True}, file_format)
    for case in cases:
        grown = list(range(patches))
        writer.commit(case, [make_slice(case, "h&e", "s1", grown), make_slice(case, "sox10", "s1", grown)])
        writer.commit(case, [make_slice(case, "h&e", "s2", grown)])
    return writer


def refill(path: Path, cases: tuple[str, ...] = CASES, patches: int = 40) -> int:
    """Write what `fill` wrote and is not there any more, as `extract` does; how many rows that are."""
    found, written = contents(path), 0
    writer = StoreWriter(path, make_spec(), {"test": True})
    for case in cases:
        slices = []
        for stain, slice_id in (("h&e", "s1"), ("sox10", "s1"), ("h&e", "s2")):
            missing = [p for p in range(patches) if (case, stain, slice_id, p) not in found]
            if missing:
                slices.append(make_slice(case, stain, slice_id, missing))
                written += len(missing)
        if slices:
            writer.commit(case, slices)
    return written


def contents(path: Path) -> Contents:
    """Every embedding by its key."""
    view = Store.open(path)
    found = {}
    for case in view.cases():
        bag, table = view.bag(case), view.table(case)
        for row, values in zip(table.itertuples(), bag.features, strict=True):
            found[case, row.stain, row.slice_id, row.patch] = values.tobytes()
    return found


def part_of(path: Path, case: str, index: int = 0) -> Path:
    """A part file of a case, in the order of its record."""
    view = Store.open(path)
    return view.folder(case) / view.record(case).parts[index].name


def record_of(path: Path, case: str) -> Path:
    """The newest record's file."""
    view = Store.open(path)
    return view.folder(case) / view.record(case).name


def encode_as(name: str, item: Slice) -> bytes:
    """A part's bytes in the file format that a part's name stands for."""
    return encode("zarr" if "zarr" in name else "hdf5", [item], {})[0]


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Turn one bit over."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))


def rewrite(path: Path, case: str, parts: tuple[Part, ...], **changes: object) -> Record:
    """Put a valid record of our own making in the newest one's place."""
    file, record = record_of(path, case), Store.open(path).record(case)
    record = replace(record, parts=parts, **changes)  # type: ignore[arg-type]
    file.write_bytes(encode_record(record))
    return record


def age(path: Path, seconds: float) -> None:
    """Let everything below a folder look older."""
    for file in path.rglob("*"):
        found = file.lstat()
        os.utime(file, (found.st_atime - seconds, found.st_mtime - seconds), follow_symlinks=False)


def started(work: Callable[[], object]) -> int:
    """The number of a child process that does this."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()  # else nothing says why
            os._exit(1)
    return child


def ended(child: int) -> int:
    """How a child ended: 0, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def break_part(store: Path) -> None:
    file = part_of(store, "1", 1)
    flip(file, file.stat().st_size // 2)


def link_record(store: Path) -> None:
    file = record_of(store, "1")
    file.rename(store.parent / "moved.json")
    file.symlink_to(store.parent / "moved.json")
