"""Parts as HDF5: `encode` makes the bytes, `open_part` reads them back."""

from __future__ import annotations

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
    rows = min(len(array), max(1, _CHUNK_BYTES // row))
    group.create_dataset(name, data=array, chunks=(rows, *array.shape[1:]), fletcher32=True)


class PartReader:
    """Reads the slices of one open HDF5 part; use `open_part`."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path
        self._found: tuple[tuple[str, str] | None, Any] = (None, None)

    def columns(self, stain: str, slice_id: str) -> list[str]:
        """The names of the columns that a slice has here."""
        group = self._group(stain, slice_id)
        try:
            return [name for name in COLUMNS if name.encode() in group]
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise self._damaged(f"the columns of {stain}/{slice_id} cannot be listed ({error})") from error

    def read(
        self, stain: str, slice_id: str, name: str, rows: int, into: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """All rows of one column of one slice.

        Args:
            stain: Stain name.
            slice_id: Slice id.
            name: One of `format.COLUMNS`.
            rows: The number of rows that the record promises.
            into: Array of the right shape and dtype to read into.

        Returns:
            (rows, …) array; ``into`` if it was given.

        Raises:
            StoreDamaged: The column is missing, has another shape, or fails its checksum.
        """
        try:
            return self._read(stain, slice_id, name, rows, into)
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            # What HDF5 raises depends on which of its structures a damaged byte belongs to.
            raise self._damaged(f"{stain}/{slice_id}/{name} fails its checksum ({error})") from error

    def _read(
        self, stain: str, slice_id: str, name: str, rows: int, into: NDArray[Any] | None
    ) -> NDArray[Any]:
        data = self._dataset(stain, slice_id, name)
        expected = (rows, *data.shape[1:]) if into is None else into.shape
        if data.shape != expected or (into is not None and data.dtype != into.dtype):
            raise self._damaged(
                f"{stain}/{slice_id}/{name} has the shape {data.shape} of {data.dtype}",
                expected=f"{expected}" + ("" if into is None else f" of {into.dtype}"),
            )
        if into is None:
            result: NDArray[Any] = data[()]
            return result
        data.read_direct(into)
        return into

    def _dataset(self, stain: str, slice_id: str, name: str) -> Any:
        group, key = self._group(stain, slice_id), name.encode()
        if key not in group:
            raise self._damaged(f"no column {name!r} in {stain}/{slice_id}")
        # An external link or dataset would read (and trust) a file outside the store.
        if group.links.get_info(key).type == h5py.h5l.TYPE_HARD:
            found = h5py.h5o.open(group, key)
            if isinstance(found, h5py.h5d.DatasetID):
                layout = found.get_create_plist().get_layout()
                if layout == h5py.h5d.CHUNKED:
                    return h5py.Dataset(found)
        raise self._damaged(f"{stain}/{slice_id}/{name} is no plain dataset of this file")

    def _group(self, stain: str, slice_id: str) -> Any:
        """The slice's group; looked up once, since that costs as much as reading a small column."""
        key = (stain, slice_id)
        if self._found[0] != key:
            self._found = (key, self._find(stain, slice_id))
        return self._found[1]

    def _find(self, stain: str, slice_id: str) -> Any:
        try:
            group: Any = self._file.id
            for name in (component(stain).encode(), component(slice_id).encode()):
                if name not in group or group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                    raise KeyError("it is not there, or only as a link")
                group = h5py.h5o.open(group, name)
                if not isinstance(group, h5py.h5g.GroupID):
                    raise KeyError("it is no group")
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise self._damaged(f"no readable slice {stain}/{slice_id} in this part ({error})") from error
        return group

    def _damaged(self, found: str, expected: str = "") -> StoreDamaged:
        return damaged(self._path, found, expected)


@contextmanager
def open_part(path: Path, size: int) -> Iterator[PartReader]:
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
        yield PartReader(file, path)
