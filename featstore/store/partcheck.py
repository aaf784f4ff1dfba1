"""Whether a part holds what its record says: every value read, and every byte hashed if asked."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreDamaged, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store.format import COLUMNS, OPTIONAL_COLUMNS, ROWS, Group, Part
from featstore.store.parts import PartReader, open_part

# Kind, what was found, what was expected.
Problem = tuple[str, str, str]
# A part that may not be read is not known to be damaged: `repair` leaves it where it is.
UNREADABLE = "unreadable"
_BLOCK = 1 << 22


def check_file(path: Path, part: Part) -> Problem | None:
    """Whether the part is there as a plain file of the recorded size."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return "part-missing", "a part that the newest record names is missing", ""
    except OSError as error:
        return UNREADABLE, f"cannot be looked at ({error.strerror})", ""
    if stat.S_ISLNK(found.st_mode):
        return "link", f"a link to {os.readlink(path)} stands in for a part", "the part's own file"
    if not stat.S_ISREG(found.st_mode):
        return "part-size", "something else than a plain file stands in for a part", "the part's own file"
    if found.st_size != part.size:
        return "part-size", f"{found.st_size:,} bytes", f"{part.size:,}, as its record says"
    return None


def check_values(path: Path, part: Part, spec: EmbeddingSpec | None) -> Iterator[Problem]:
    """Read every column of every live group; nothing is kept.

    Args:
        path: The part, known to be a plain file of the right size.
        part: What the record says of it.
        spec: The store's; None where its description is lost, then shapes are not held against it.
    """
    try:
        with open_part(path, part.size) as reader:
            for group in part.groups:
                yield from _check_group(reader, part, group, spec)
    except (StoreError, MemoryError) as error:
        yield _problem(error)
    except Exception as error:
        # Of damaged bytes the libraries below raise whatever they stumble over; it must end no check.
        yield "part-damaged", f"cannot be read ({type(error).__name__}: {error})", ""


def _check_group(
    reader: PartReader, part: Part, group: Group, spec: EmbeddingSpec | None
) -> Iterator[Problem]:
    where = f"{group.stain}/{group.slice_id}"
    patches = group.patches(where)
    row = 1 if spec is None else spec.dim * np.dtype(spec.stored_dtype).itemsize
    if group.rows * row > part.size:  # before memory for as many rows is asked for
        yield "part-damaged", f"{where}: {part.size:,} bytes cannot hold {group.rows:,} rows", ""
        return
    names = reader.columns(group.stain, group.slice_id)
    for name in COLUMNS:
        needed = name not in OPTIONAL_COLUMNS or (spec is not None and name in spec.rows())
        if name not in names and needed:
            yield "column-missing", f"{where} has no column {name}", ""
    live: NDArray[np.bool_] | None = None
    # The patch numbers first: they say which rows of the other columns are live.
    for name in sorted(names, key=lambda name: name != "patch"):
        try:
            values = _read(reader, group, name, spec)
        except (StoreError, MemoryError) as error:
            yield _problem(error)
            continue
        if name == "patch":
            live = np.isin(values, patches)
            if (np.diff(values) <= 0).any():
                yield "patch-order", f"{where}: patch numbers do not ascend", ""
            if int(live.sum()) != len(patches):
                yield (
                    "patch-missing",
                    f"{where} holds {int(live.sum()):,} of the patches {group.live[:60]}",
                    f"{len(patches):,} of them",
                )
        elif name in ("features", "views") and live is not None:
            bad = int((~np.isfinite(values[live]).reshape(int(live.sum()), -1).all(axis=1)).sum())
            if bad:
                yield "not-finite", f"{where}: NaN or infinity in {bad:,} embeddings", "finite numbers"
        elif name == "source_name":
            yield from _check_names(values, where)


def _read(reader: PartReader, group: Group, name: str, spec: EmbeddingSpec | None) -> NDArray[np.generic]:
    """One column, held to the shape and type that it must have."""
    if name in ("features", "views"):
        row = None if spec is None else spec.rows().get(name)
        into = None if spec is None or row is None else np.empty((group.rows, *row), spec.stored_dtype)
    else:
        dtype, shape = ROWS.get(name, (None, ()))
        into = None if dtype is None else np.empty((group.rows, *shape), dtype)
    return reader.read(group.stain, group.slice_id, name, group.rows, into=into)


def _check_names(values: NDArray[np.generic], where: str) -> Iterator[Problem]:
    if values.dtype.kind != "S" or values.ndim != 1:
        yield "part-damaged", f"{where}: source_name holds {values.dtype}", "byte strings"
        return
    try:
        b"\n".join(values.tolist()).decode("utf-8")
    except UnicodeDecodeError as error:
        yield "part-damaged", f"{where}: source_name is no UTF-8 ({error})", ""


def check_bytes(path: Path, part: Part) -> Problem | None:
    """Hold the sha256 of the whole file against the record."""
    digest = hashlib.sha256()
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return os_problem(error, "part-damaged")
    if digest.hexdigest() == part.sha256:
        return None
    return "part-sha256", f"sha256 {digest.hexdigest()}", f"{part.sha256}, as its record says"


def os_problem(error: OSError, damaged: str) -> Problem:
    """Damage where the disk itself fails; else nothing is known but that it could not be read."""
    return (damaged if error.errno == errno.EIO else UNREADABLE), f"cannot be read ({error.strerror})", ""


def _problem(error: Exception) -> Problem:
    if isinstance(error, StoreDamaged):
        return "part-damaged", error.found, error.expected
    return UNREADABLE, getattr(error, "found", "") or str(error) or type(error).__name__, ""
