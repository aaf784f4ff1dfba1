"""A part, whatever its file format: `encode` makes its bytes, `open_part` reads them back.

A backend is a module with ``SUFFIX``, ``encode(slices, attributes)`` and ``open_part(path, size)``,
which gives a `Reader`; see `featstore.store.hdf5` and `featstore.store.zarr_zip`. What is the same for
both, above all whether a column is what the record promises, is here.
A store may hold parts of both file formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreError
from featstore.store import hdf5, zarr_zip
from featstore.store.damage import damaged as damaged
from featstore.store.format import Slice

_BACKENDS = {"hdf5": hdf5, "zarr": zarr_zip}


class Column(Protocol):
    """One column of one slice in an open part; whatever is read is held against its checksums.

    Every method raises StoreDamaged where the bytes are not those that were written.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, into: NDArray[Any]) -> None:
        """All rows, into a C-contiguous array of this shape and dtype."""

    def chunks(self) -> tuple[int, NDArray[np.int64]] | None:
        """Where the rows lie in the file, one after the other and as they are in memory.

        Returns:
            The rows of a chunk (the last may have fewer), and for each chunk the byte of the file where
            its first row starts; None if the rows are not stored like this.
        """

    def read_chunk(self, number: int, into: NDArray[Any]) -> None:
        """The rows of one chunk, into a C-contiguous array of as many rows and this dtype."""


class Reader(Protocol):
    """What a backend offers of one open part."""

    def columns(self, stain: str, slice_id: str) -> list[str]:
        """The names of the columns that a slice has here."""

    def column(self, stain: str, slice_id: str, name: str) -> Column:
        """One column of one slice."""


class PartReader:
    """Reads the slices of one open part; use `open_part`."""

    def __init__(self, reader: Reader, path: Path) -> None:
        self._reader = reader
        self._path = path

    def columns(self, stain: str, slice_id: str) -> list[str]:
        """The names of the columns that a slice has here.

        Raises:
            StoreDamaged: The slice is not there, or cannot be read.
        """
        return self._reader.columns(stain, slice_id)

    def column(
        self,
        stain: str,
        slice_id: str,
        name: str,
        rows: int,
        row: tuple[tuple[int, ...], Any] | None = None,
    ) -> Column:
        """One column of one slice, not read yet.

        Args:
            stain: Stain name.
            slice_id: Slice id.
            name: One of `format.COLUMNS`.
            rows: The number of rows that the record promises.
            row: Shape of a row and dtype, where they are known.

        Raises:
            StoreDamaged: The column is missing, or has another shape or dtype.
        """
        found = self._reader.column(stain, slice_id, name)
        shape, dtype = (found.shape[1:], found.dtype) if row is None else row
        if found.shape != (rows, *shape) or found.dtype != dtype:
            raise damaged(
                self._path,
                f"{stain}/{slice_id}/{name} has the shape {found.shape} of {found.dtype}",
                expected=f"{(rows, *shape)}" + ("" if row is None else f" of {np.dtype(dtype)}"),
            )
        return found

    def read(
        self, stain: str, slice_id: str, name: str, rows: int, into: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """All rows of one column of one slice.

        Args:
            stain: Stain name.
            slice_id: Slice id.
            name: One of `format.COLUMNS`.
            rows: The number of rows that the record promises.
            into: Array of that many rows to read into; says which shape and dtype they must have.

        Returns:
            (rows, …) array; ``into`` if it was given.

        Raises:
            StoreDamaged: The column is missing, has another shape or dtype, or fails a checksum.
        """
        row = None if into is None else (into.shape[1:], into.dtype)
        column = self.column(stain, slice_id, name, rows if into is None else len(into), row)
        if into is not None and into.flags.c_contiguous:
            column.read(into)
            return into
        result = np.empty(column.shape, column.dtype)
        column.read(result)
        if into is None:
            return result
        into[...] = result
        return into


def encode(
    file_format: str, slices: Sequence[Slice], attributes: Mapping[str, str | int]
) -> tuple[bytes, str]:
    """A part's bytes in a file format, and the suffix of its name.

    Args:
        file_format: ``hdf5`` or ``zarr``, as in ``store.format``.
        slices: What the part holds; every slice once.
        attributes: Written to its root.

    Raises:
        StoreError: There is no such file format.
    """
    if file_format not in _BACKENDS:
        raise StoreError(
            f"no file format {file_format!r}",
            expected=" or ".join(_BACKENDS),
            fix="choose one of them as store.format",
        )
    backend = _BACKENDS[file_format]
    return backend.encode(slices, attributes), backend.SUFFIX


def open_part(path: Path, size: int) -> AbstractContextManager[PartReader]:
    """Open a part for reading, by the suffix of its name.

    Args:
        path: The part file.
        size: The number of bytes that the record promises.

    Raises:
        StoreDamaged: The file is missing, has another size, or is not of its format.
        StoreError: The file may not be read, or its format is not known.
    """
    for backend in _BACKENDS.values():
        if path.name.endswith(backend.SUFFIX):
            return _opened(backend.open_part(path, size), path)
    raise StoreError(
        f"a part is in a file format that this version does not know ({path.name.partition('.')[2]})",
        expected=" or ".join(backend.SUFFIX for backend in _BACKENDS.values()),
        where=str(path),
        fix="read it with the featstore version that wrote it",
    )


@contextmanager
def _opened(part: AbstractContextManager[Reader], path: Path) -> Iterator[PartReader]:
    with part as reader:
        yield PartReader(reader, path)
