"""Arrays in other people's HDF5 files, read without following any pointer out of the file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
from numpy.typing import NDArray

from featstore.interop.source import ImportProblem

# Deflate packs at most 1032 : 1. What claims more is a bomb.
_MOST_PACKED = 1100


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file's root group.

    Raises:
        ImportProblem: It is no HDF5 file, may not be read, or breaks off within.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, MemoryError) as error:
        raise ImportProblem(
            f"the file cannot be read as HDF5 ({error})",
            expected="a whole HDF5 file",
            where=str(path),
            fix="copy or make it again, or leave it out with --on-bad skip",
        ) from error


def names(file: Any) -> set[str]:
    """What lies in the file's root."""
    return set(file.keys())


def is_array(file: Any, name: str) -> bool:
    """Whether a name in the file's root is a dataset, and no link to one elsewhere."""
    plain = name in names(file) and isinstance(file.get(name, getlink=True), h5py.HardLink)
    return plain and isinstance(file[name], h5py.Dataset)


def first_readable(paths: Sequence[Path]) -> Path | None:
    """The first file that is HDF5; None where none is."""
    for path in paths:
        try:
            with opened(path):
                return path
        except ImportProblem:
            continue
    return None


def array(file: Any, name: str, path: Path) -> Any:
    """A dataset of the file's root, all of whose bytes lie in this file.

    Raises:
        ImportProblem: It is missing, is a link or keeps its data elsewhere, lacks chunks (which
            HDF5 would read as zeros), or claims more than its bytes can hold.
    """

    def problem(found: str) -> ImportProblem:
        return ImportProblem(
            found,
            expected=f"a plain, complete array {name!r} in the file's root",
            where=str(path),
            fix="mend or remove this file, or leave it out with --on-bad skip",
        )

    if name not in names(file):
        raise problem(f"no array {name!r} (the file has {', '.join(sorted(names(file))[:8]) or 'nothing'})")
    if not is_array(file, name):
        raise problem(f"{name!r} is a link, or no array")
    data = file[name]
    layout = data.id.get_create_plist()
    if layout.get_external_count() or layout.get_layout() == h5py.h5d.VIRTUAL:
        raise problem(f"{name!r} keeps its data in another file")
    if data.dtype.kind not in "fiu":
        raise problem(f"{name!r} holds {data.dtype}, not numbers")
    size, stored = data.size * data.dtype.itemsize, data.id.get_storage_size()
    if data.chunks is not None:
        wanted = math.prod(-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True))
        if data.id.get_num_chunks() != wanted:
            raise problem(f"{name!r} lacks {wanted - data.id.get_num_chunks()} of its {wanted} chunks")
        if size > stored * _MOST_PACKED:
            raise problem(f"{name!r} claims {size:,} bytes, but has {stored:,}")
    elif layout.get_layout() != h5py.h5d.COMPACT and size > min(stored, _on_disk(path)):
        raise problem(f"{name!r} claims {size:,} bytes, but has {stored:,}")
    return data


def _on_disk(path: Path) -> int:
    """Bytes that the file really takes, holes left out; a block more, as small files may share one."""
    return os.stat(path).st_blocks * 512 + (1 << 16)


def matrix(file: Any, name: str, path: Path) -> Any:
    """An array of two dimensions, neither of them empty.

    Raises:
        ImportProblem: It has another shape, or `array` refuses it.
    """
    data = array(file, name, path)
    if data.ndim != 2 or 0 in data.shape:
        raise ImportProblem(
            f"{name!r} has the shape {data.shape}",
            expected="(number of patches, number of features)",
            where=str(path),
            fix="leave this file out with --on-bad skip, or make it again",
        )
    return data


def coordinates(file: Any, path: Path) -> NDArray[Any] | None:
    """``coords`` as they are; None where the file has none."""
    if "coords" not in names(file):
        return None
    found: NDArray[Any] = array(file, "coords", path)[()]
    return found
