"""A part, whatever its file format: `encode` makes its bytes, `open_part` reads them back.

A backend is a module with ``SUFFIX``, ``encode(slices, attributes)`` and ``open_part(path, size)``,
whose readers have ``columns`` and ``read``; see `featstore.store.hdf5` and `featstore.store.zarr_zip`.
A store may hold parts of both file formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from featstore.errors import StoreError
from featstore.store import hdf5, zarr_zip
from featstore.store.damage import damaged as damaged
from featstore.store.format import Slice

_BACKENDS = {"hdf5": hdf5, "zarr": zarr_zip}


class PartReader(Protocol):
    """Reads the slices of one open part."""

    def columns(self, stain: str, slice_id: str) -> list[str]:
        """The names of the columns that a slice has here."""

    def read(
        self, stain: str, slice_id: str, name: str, rows: int, into: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """All rows of one column of one slice; `hdf5.PartReader.read` says what is checked."""


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
            opened: AbstractContextManager[PartReader] = backend.open_part(path, size)
            return opened
    raise StoreError(
        f"a part is in a file format that this version does not know ({path.name.partition('.')[2]})",
        expected=" or ".join(backend.SUFFIX for backend in _BACKENDS.values()),
        where=str(path),
        fix="read it with the featstore version that wrote it",
    )
