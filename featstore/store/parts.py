"""A part, whatever its file format: `encode` makes its bytes, `open_part` reads them back.

A backend is a module with ``SUFFIX``, ``encode(slices, attributes)`` and ``open_part(path, size)``,
whose readers have ``columns`` and ``read``; see `featstore.store.hdf5`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from featstore.errors import StoreDamaged
from featstore.store import hdf5
from featstore.store.format import Slice


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
    """A part's bytes in a file format (``store.format``), and the suffix of its name."""
    backend = {"hdf5": hdf5}[file_format]
    return backend.encode(slices, attributes), backend.SUFFIX


def open_part(path: Path, size: int) -> AbstractContextManager[PartReader]:
    """Open a part for reading, by the suffix of its name.

    Args:
        path: The part file.
        size: The number of bytes that the record promises.

    Raises:
        StoreDamaged: The file is missing, has another size, or is not of its format.
        StoreError: The file may not be read.
    """
    return hdf5.open_part(path, size)


def damaged(path: Path, found: str, expected: str = "") -> StoreDamaged:
    """The error for a part that is not what its record says."""
    return hdf5.damaged(path, found, expected)
