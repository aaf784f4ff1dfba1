"""Some rows of a case, out of its parts as they lie in the page cache: the rest is not read.

In both file formats a part holds embeddings as they are in memory, chunk after chunk. A part is
mapped into memory once in a process. The first rows that are wanted of a chunk let the backend read
all of it, which holds it against its checksum, and the map must show the same bytes; from then on
rows are copied straight out of the map. That pays for both formats: HDF5's own way to read some
rows reads all of every chunk that they lie in, each time.

Nothing here is locked or open in a way that a fork could break: maps are read-only, a child may go
on using its parent's, and no HDF5 object outlives the call that opened it. Threads at worst map or
check twice. Pickled, it is empty.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreDamaged
from featstore.store.damage import damaged, opening
from featstore.store.format import Group
from featstore.store.parts import Column, PartReader, open_part
from featstore.store.reading import Layout, by_part, live_rows

K = TypeVar("K")
V = TypeVar("V")

# A map holds a file open, of which a process has 1024 unless told otherwise.
_MAPS = 128
# About 2 kB for a case of 10,000 rows.
_CASES = 20_000
_PAGE = mmap.ALLOCATIONGRANULARITY


class Recent(Generic[K, V]):
    """The values that were used last.

    Needs no lock (which a fork could leave locked for ever): every step on the dictionary is a
    single one. That holds for keys whose hash and comparison run no Python, such as str; between
    those of a Path, another thread may come in and break the dictionary's order for good.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of this key, made where it is not kept."""
        with suppress(KeyError):
            self._held.move_to_end(key)
            return self._held[key]
        return self.put(key, make())

    def put(self, key: K, value: V) -> V:
        """Keep a value; the one that was used longest ago may go."""
        self._held[key] = value
        while len(self._held) > self._most:
            try:
                self._held.popitem(last=False)
            except KeyError:  # others have just made room
                break
        return value

    def forget(self, key: K) -> None:
        """Keep this key's value no longer."""
        self._held.pop(key, None)


class _Chunk(NamedTuple):
    """One chunk of a group's embeddings: number, byte of the file where it starts, rows that count."""

    part: int
    group: Group
    number: int
    offset: int
    rows: int


@dataclass(frozen=True)
class _Plan:
    """Where the embeddings of a case lie: R runs of rows that follow one another in bag and in file.

    Attributes:
        parts: The files.
        chunks: C chunks.
        part_of: (C,) the part of each, as an index of ``parts``.
        checked: (C,) whether this process has held it against its checksum.
        first: (R,) the position in the bag where each run starts, ascending.
        start: (R,) the byte of the file where it starts.
        chunk_of: (R,) its chunk.
    """

    parts: list[tuple[Path, int]]
    chunks: list[_Chunk]
    part_of: NDArray[np.int64]
    checked: NDArray[np.bool_]
    first: NDArray[np.int64]
    start: NDArray[np.int64]
    chunk_of: NDArray[np.int64]


class MappedRows:
    """Takes rows of cases out of mapped parts: of the column `features`, or single views of `views`.

    Args:
        dtype: The store's dtype of embeddings.
        dim: The store's number of features D.
        views: Of the column `views`, whose rows are (V − 1, D), that V − 1; None for `features`.
    """

    def __init__(self, dtype: str, dim: int, views: int | None = None) -> None:
        self._dtype, self._dim, self._views = np.dtype(dtype), dim, views
        self._row = (dim,) if views is None else (views, dim)
        self._taken_bytes = self._dtype.itemsize * dim
        self._row_bytes = self._taken_bytes * (1 if views is None else views)
        self._plans: Recent[str, _Plan | None] = Recent(_CASES)
        self._maps: Recent[str, mmap.mmap] = Recent(_MAPS)

    def __reduce__(self) -> tuple[type[MappedRows], tuple[str, int, int | None]]:
        return MappedRows, (self._dtype.name, self._dim, self._views)

    def take(
        self,
        folder: Path,
        case_id: str,
        layout: Callable[[], Layout],
        index: NDArray[np.int64],
        view: NDArray[np.int64] | None = None,
    ) -> NDArray[Any] | None:
        """Some rows of a case.

        Args:
            folder: The case's folder.
            case_id: The case.
            layout: Gives the case's layout; called where it is not known any more.
            index: (n,) int64 positions in the bag, none negative, none beyond it.
            view: (n,) int64 which of a row's V − 1 views is wanted, from 0; for `views` only.

        Returns:
            (n, D) array; None if a part holds its embeddings in some other way and must be read.

        Raises:
            StoreDamaged: A part is missing or is not what was written.
        """
        plan = self._plans.get(case_id, lambda: self._plan(folder, layout()))
        if plan is None:
            return None
        run = np.searchsorted(plan.first, index, side="right") - 1
        chunk = plan.chunk_of[run]
        start = plan.start[run] + (index - plan.first[run]) * self._row_bytes
        if view is not None:
            start += view * self._taken_bytes
        try:
            for number in np.unique(plan.part_of[chunk[~plan.checked[chunk]]]).tolist():
                self._check(plan, number, np.unique(chunk))
            if len(plan.parts) == 1:
                path, size = plan.parts[0]
                return self._rows(path, size, start)
            out = np.empty((len(index), self._dim), self._dtype)
            part = plan.part_of[chunk]
            for number in np.unique(part).tolist():
                mine = part == number
                path, size = plan.parts[number]
                out[mine] = self._rows(path, size, start[mine])
            return out
        except StoreDamaged:
            # A file that is put back from a backup shall be looked at anew.
            self._plans.forget(case_id)
            for path, _ in plan.parts:
                self._maps.forget(str(path))
            raise

    def _plan(self, folder: Path, case: Layout) -> _Plan | None:
        parts: list[tuple[Path, int]] = []
        chunks: list[_Chunk] = []
        runs: list[tuple[NDArray[np.int64], ...]] = []
        for part, pieces in by_part(case.pieces):
            parts.append((folder / part.name, part.size))
            with open_part(*parts[-1]) as reader:
                for piece in pieces:
                    found = self._column(reader, piece.group).chunks()
                    if found is None:
                        return None
                    rows, offsets = found
                    if piece.span is None:
                        row = np.flatnonzero(live_rows(reader, piece, folder))
                    else:
                        row = np.arange(piece.group.rows)
                    start = offsets[row // rows] + row % rows * self._row_bytes
                    chunk = row // rows + len(chunks)
                    new = np.ones(len(row), bool)
                    new[1:] = (np.diff(piece.target) != 1) | (np.diff(start) != self._row_bytes)
                    new[1:] |= np.diff(chunk) != 0
                    runs.append((piece.target[new], start[new], chunk[new]))
                    chunks += [
                        _Chunk(len(parts) - 1, piece.group, n, at, min(rows, piece.group.rows - n * rows))
                        for n, at in enumerate(offsets.tolist())
                    ]
        first, start, chunk = (np.concatenate(column) for column in zip(*runs, strict=True))
        order = np.argsort(first)
        part_of = np.array([chunk.part for chunk in chunks])
        checked = np.zeros(len(chunks), bool)
        return _Plan(parts, chunks, part_of, checked, first[order], start[order], chunk[order])

    def _column(self, reader: PartReader, group: Group) -> Column:
        row = (self._row, self._dtype)
        return reader.column(group.stain, group.slice_id, self._name, group.rows, row)

    @property
    def _name(self) -> str:
        return "features" if self._views is None else "views"

    def _check(self, plan: _Plan, part: int, wanted: NDArray[np.int64]) -> None:
        """Hold the chunks that are wanted of a part against their checksums, if that has not been done."""
        path, size = plan.parts[part]
        mapped = np.frombuffer(self._map(path, size), np.uint8)
        with open_part(path, size) as reader:
            group, column = None, None
            for number in wanted[(plan.part_of[wanted] == part) & ~plan.checked[wanted]].tolist():
                chunk = plan.chunks[number]
                if column is None or chunk.group is not group:
                    group, column = chunk.group, self._column(reader, chunk.group)
                rows = np.empty((chunk.rows, *self._row), self._dtype)
                column.read_chunk(chunk.number, rows)
                found = mapped[chunk.offset : chunk.offset + rows.nbytes]
                if not np.array_equal(found, rows.reshape(-1).view(np.uint8)):
                    where = f"{chunk.group.stain}/{chunk.group.slice_id}/{self._name}"
                    raise damaged(path, f"{where} changes while it is being read")
                plan.checked[number] = True

    def _rows(self, path: Path, size: int, start: NDArray[np.int64]) -> NDArray[Any]:
        """The D numbers that start at each of these bytes of a part."""
        mapped, length = self._map(path, size), self._taken_bytes
        for at in start.tolist():
            # All at once, where the disk has to be asked: one after the other each would be waited for.
            page = at // _PAGE * _PAGE
            mapped.madvise(mmap.MADV_WILLNEED, page, at + length - page)
        every: NDArray[Any] = np.ndarray((size - length + 1,), f"V{length}", mapped, 0, (1,))
        return every[start].view(self._dtype).reshape(len(start), self._dim)

    def _map(self, path: Path, size: int) -> mmap.mmap:
        # Of a file that was cut since, to read the rest would kill. One that is gone stays readable.
        with suppress(FileNotFoundError):
            if (found := path.stat().st_size) != size:
                raise damaged(path, f"a part has {found} bytes", f"{size} bytes, as its record says")
        return self._maps.get(str(path), lambda: _mapped(path, size))


def _mapped(path: Path, size: int) -> mmap.mmap:
    """A part's file in memory, read-only.

    Its size is looked at here only: to read beyond the end of a file that is cut later would kill the
    process. But nobody cuts a part: parts are never changed, and whoever removes one unlinks it.
    """
    with opening(path, size, "mappable"):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(handle, size, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)
        # Rows lie far apart: what the kernel would read around each is not wanted.
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped
