"""Stores to be damaged, and ways to damage them."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featstore.store import Slice, Store, StoreWriter, files
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


def parts_of(path: Path) -> list[Path]:
    """The parts that the newest records name."""
    view = Store.open(path)
    return [view.folder(case) / part.name for case in view.cases() for part in view.record(case).parts]


# Of every dose of flipped bits this share falls on the values of parts, the rest of parts, newest and older
# records, and the description.
_SHARES = {"payload": 0.4, "metadata": 0.3, "record": 0.2, "old record": 0.05, "description": 0.05}


def dose(count: int) -> list[str]:
    """What a number of bits to be flipped lie in."""
    return [kind for kind, share in _SHARES.items() for _ in range(round(share * count))]


def spot(path: Path, kind: str, chance: random.Random) -> tuple[Path, int]:
    """A random file of a store and a random byte in it, of one of the kinds of `dose`."""
    if kind == "description":
        file = path / "featstore.json"
        text = file.read_bytes()
        # Every byte but the minor version's, which no reader goes by.
        minor = range(text.rindex(b",", 0, text.index(b"]")), text.index(b"]"))
        return file, chance.choice([at for at in range(len(text)) if at not in minor])
    if kind in ("record", "old record"):
        newest = record_of(path, chance.choice(Store.open(path).cases()))
        old = sorted(set(newest.parent.glob("*.json")) - {newest})
        file = chance.choice(old) if kind == "old record" and old else newest
        return file, chance.randrange(file.stat().st_size)
    file = chance.choice(parts_of(path))
    inside = np.concatenate([np.array(span) for span in payload(file)])
    rest = np.setdiff1d(np.arange(file.stat().st_size), inside)
    return file, int(chance.choice(inside if kind == "payload" else rest))


def payload(part: Path) -> list[range]:
    """The bytes of a part that values are made of, with their checksums."""
    if part.suffix == ".h5":
        found: list[range] = []

        def visit(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                chunks = (item.id.get_chunk_info(i) for i in range(item.id.get_num_chunks()))
                found.extend(range(c.byte_offset, c.byte_offset + c.size) for c in chunks)

        with h5py.File(part, "r") as file:
            file.visititems(visit)
        return found
    with zipfile.ZipFile(part) as archive:
        return [
            range(start := i.header_offset + 30 + len(i.filename), start + i.file_size)
            for i in archive.infolist()
            if "/c/" in i.filename
        ]


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


def ended(child: int, within: float = 60) -> int:
    """How a child ended: 0, or the negative number of the signal that killed it.

    One that hangs is killed: it would keep open what it inherited, such as the pipes of other tests.
    """
    deadline = time.monotonic() + within
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"a child process had not ended after {within:g} s and was killed")
        time.sleep(0.002)


STEPS = ("open", "write", "fsync", "link", "unlink", "mkdir", "rename")


class Killing:
    """Stands in for `os`: kills the process before its n-th step."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return step


def kill_at(step: int, work: Callable[[], object]) -> int:
    """Do this in a child that is killed before its n-th step of `repair`; how it ended."""
    from featstore.store import repair as module

    def doomed() -> None:
        module.os = files.os = Killing(step)  # type: ignore[assignment]
        work()

    return ended(started(doomed))


def break_part(store: Path) -> None:
    file = part_of(store, "1", 1)
    flip(file, file.stat().st_size // 2)


def link_record(store: Path) -> None:
    file = record_of(store, "1")
    file.rename(store.parent / "moved.json")
    file.symlink_to(store.parent / "moved.json")
