"""Parts as HDF5: `encode` makes the bytes, `open_part` reads them back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreDamaged
from featstore.quality import QUALITY_COLUMNS
from featstore.store.damage import damaged, opening
from featstore.store.format import COLUMNS, Slice
from featstore.store.ids import component

SUFFIX = ".h5"
# Large enough to read at 70% of the speed of contiguous data, small enough for random rows.
_CHUNK_BYTES = 1 << 20
# Checksummed object headers and compact chunk indices; readable by every HDF5 since 1.10.
_LIBVER = ("v110", "v110")
_SUM_BYTES = 4  # fletcher32, behind the values of a chunk
# What HDF5 raises depends on which of its structures a damaged byte belongs to.
_BROKEN = (KeyError, OSError, RuntimeError, ValueError)


def encode(slices: Sequence[Slice], attributes: Mapping[str, str | int]) -> bytes:
    """A part as the bytes of an HDF5 file.

    The file is built in memory: a disk that fills up while HDF5 itself writes
    crashes the interpreter, a plain write of finished bytes gives a clean error.

    Args:
        slices: What the part holds; every slice once.
        attributes: Written to the root: case id, fingerprint, provenance.
    """
    with h5py.File.in_memory(libver=_LIBVER) as file:
        file.attrs.update(attributes)
        for item in slices:
            group = file.create_group(f"{component(item.stain)}/{component(item.slice_id)}")
            group.attrs["stain"], group.attrs["slice_id"] = item.stain, item.slice_id
            for name, array in item.columns.items():
                _write(group, name, array)
            if "quality" in group:
                group["quality"].attrs["columns"] = ",".join(QUALITY_COLUMNS)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _write(group: Any, name: str, array: NDArray[Any]) -> None:
    row = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=int))
    most = max(1, _CHUNK_BYTES // row)
    # HDF5 stores the last chunk at its full size: chunks of equal size leave it less to pad.
    rows = -(-len(array) // -(-len(array) // most))
    group.create_dataset(name, data=array, chunks=(rows, *array.shape[1:]), fletcher32=True)


class Column:
    """One dataset; `featstore.store.parts.Column` says what it promises."""

    def __init__(self, found: Any, path: Path, where: str) -> None:
        self._found, self._path, self._where = found, path, where
        with self._telling():
            self.shape: tuple[int, ...] = found.shape
            self.dtype: np.dtype[Any] = found.dtype

    def read(self, into: NDArray[Any]) -> None:
        """All rows, into a C-contiguous array of this shape and dtype."""
        # Not through h5py.Dataset: for a small slice that costs as much as the reading itself.
        with self._telling():
            self._found.read(h5py.h5s.ALL, h5py.h5s.ALL, into)

    def chunks(self) -> tuple[int, NDArray[np.int64]] | None:
        """Rows a chunk, and the byte of the file where each chunk starts; None if not stored plainly."""
        with self._telling():
            plist = self._found.get_create_plist()
            rows, *rest = plist.get_chunk()
            if tuple(rest) != self.shape[1:]:
                return None
            zeros, size = (0,) * len(rest), rows * math.prod(rest) * self.dtype.itemsize + _SUM_BYTES
            found = [
                self._found.get_chunk_info_by_coord((first, *zeros))
                for first in range(0, self.shape[0], rows)
            ]
        # A filter that was left out, or a chunk that is not there, shows in these.
        if any(chunk.filter_mask or chunk.byte_offset is None or chunk.size != size for chunk in found):
            return None
        return rows, np.array([chunk.byte_offset for chunk in found], np.int64)

    def read_chunk(self, number: int, into: NDArray[Any]) -> None:
        """The rows of one chunk."""
        with self._telling():
            first = number * self._found.get_create_plist().get_chunk()[0]
            space = self._found.get_space()
            space.select_hyperslab((first, *(0 for _ in into.shape[1:])), into.shape)
            self._found.read(h5py.h5s.create_simple(into.shape), space, into)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            raise damaged(self._path, f"{self._where} fails its checksum ({error})") from error


class Reader:
    """The slices of one open HDF5 part; use `open_part`."""

    def __init__(self, file: Any, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._last: tuple[tuple[str, str] | None, Any] = (None, None)

    def columns(self, stain: str, slice_id: str) -> list[str]:
        """The names of the columns that a slice has here."""
        group = self._group(stain, slice_id)
        try:
            return [name for name in COLUMNS if name.encode() in group]
        except _BROKEN as error:
            raise self._damaged(f"the columns of {stain}/{slice_id} cannot be listed ({error})") from error

    def column(self, stain: str, slice_id: str, name: str) -> Column:
        """One column of one slice.

        Raises:
            StoreDamaged: It is missing, or no plain dataset of this file.
        """
        group, key, where = self._group(stain, slice_id), name.encode(), f"{stain}/{slice_id}/{name}"
        try:
            if key not in group:
                raise self._damaged(f"no column {name!r} in {stain}/{slice_id}")
            # An external link or dataset would read (and trust) a file outside the store.
            if group.links.get_info(key).type == h5py.h5l.TYPE_HARD:
                found = h5py.h5o.open(group, key)
                if isinstance(found, h5py.h5d.DatasetID) and self._is_plain(found):
                    return Column(found, self._path, where)
        except _BROKEN as error:
            raise self._damaged(f"{where} fails its checksum ({error})") from error
        raise self._damaged(f"{where} is no plain dataset of this file, checksummed and not compressed")

    def _is_plain(self, found: Any) -> bool:
        """Whether it is stored as `encode` does it; so memory is taken only for what is there."""
        plist = found.get_create_plist()
        if plist.get_layout() != h5py.h5d.CHUNKED or plist.get_nfilters() != 1:
            return False
        largest = math.prod(map(max, found.shape, plist.get_chunk())) * found.dtype.itemsize
        return largest <= self._size and bool(plist.get_filter(0)[0] == h5py.h5z.FILTER_FLETCHER32)

    def _group(self, stain: str, slice_id: str) -> Any:
        """The slice's group; looked up once, since that costs as much as reading a small column."""
        key = (stain, slice_id)
        if self._last[0] != key:
            self._last = (key, self._find(stain, slice_id))
        return self._last[1]

    def _find(self, stain: str, slice_id: str) -> Any:
        try:
            group: Any = self._file.id
            for name in (component(stain).encode(), component(slice_id).encode()):
                if name not in group or group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                    raise KeyError("it is not there, or only as a link")
                group = h5py.h5o.open(group, name)
                if not isinstance(group, h5py.h5g.GroupID):
                    raise KeyError("it is no group")
        except _BROKEN as error:
            raise self._damaged(f"no readable slice {stain}/{slice_id} in this part ({error})") from error
        return group

    def _damaged(self, found: str) -> StoreDamaged:
        return damaged(self._path, found)


@contextmanager
def open_part(path: Path, size: int) -> Iterator[Reader]:
    """Open a part for reading.

    Args:
        path: The part file.
        size: The number of bytes that the record promises.

    Raises:
        StoreDamaged: The file is missing, has another size, or is no HDF5 file.
        StoreError: The file may not be read.
    """
    with opening(path, size, "HDF5"):
        # Parts never change, so HDF5's file locks (which fail on many network file systems) are not needed.
        file = h5py.File(path, "r", locking=False)
    with file:
        yield Reader(file, path, size)
