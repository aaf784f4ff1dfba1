"""From a commit record to arrays in bag order: what is live, where it lies, and reading it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.cohort.names import natural_key
from featstore.errors import StoreDamaged
from featstore.quality import QUALITY_COLUMNS
from featstore.store.format import (
    COORDS_COLUMNS,
    GEOMETRY_COLUMNS,
    OPTIONAL_COLUMNS,
    ROWS,
    Group,
    Part,
    Record,
)
from featstore.store.parts import PartReader, damaged, open_part


@dataclass(frozen=True)
class Piece:
    """The live rows of one group: ``patches`` (n,), which go to ``target`` (n,) in bag order."""

    part: Part
    group: Group
    patches: NDArray[np.int64]
    target: NDArray[np.int64]

    @property
    def span(self) -> slice | None:
        """Where in the bag the group lies, if all its rows are live and lie together."""
        first, last = int(self.target[0]), int(self.target[-1]) + 1
        whole = len(self.patches) == self.group.rows and last - first == len(self.target)
        return slice(first, last) if whole else None


@dataclass(frozen=True)
class Layout:
    """A case's live rows in bag order (P patches, S slices, T stains)."""

    case_id: str
    pieces: tuple[Piece, ...]
    patches: NDArray[np.int64]
    slices: tuple[str, ...]
    slice_sizes: NDArray[np.int64]
    stains: tuple[str, ...]
    stain_sizes: NDArray[np.int64]


def layout(record: Record, where: str) -> Layout:
    """Put what a record lists into natural order: stain, slice, patch.

    Raises:
        StoreDamaged: A patch is live twice.
    """
    members: dict[tuple[str, str], list[tuple[Part, Group, NDArray[np.int64]]]] = {}
    for part in record.parts:
        for group in part.groups:
            patches = group.patches(where)
            if len(patches):
                members.setdefault((group.stain, group.slice_id), []).append((part, group, patches))
    keys = sorted(members, key=lambda key: (natural_key(key[0]), natural_key(key[1])))
    pieces: list[Piece] = []
    ordered: list[NDArray[np.int64]] = []
    start = 0
    for key in keys:
        numbers = np.concatenate([patches for _, _, patches in members[key]])
        order = np.argsort(numbers, kind="stable")
        numbers_sorted = numbers[order]
        if (np.diff(numbers_sorted) == 0).any():
            raise StoreDamaged(f"a patch of {key[0]}/{key[1]} is live in two parts", where=where)
        positions = np.empty(len(numbers), np.int64)
        positions[order] = np.arange(start, start + len(numbers))
        taken = 0
        for part, group, patches in members[key]:
            pieces.append(Piece(part, group, patches, positions[taken : taken + len(patches)]))
            taken += len(patches)
        ordered.append(numbers_sorted)
        start += len(numbers)
    stains = tuple(dict.fromkeys(stain for stain, _ in keys))
    return Layout(
        case_id=record.case_id,
        pieces=tuple(pieces),
        patches=np.concatenate(ordered) if ordered else np.empty(0, np.int64),
        slices=tuple(slice_id for _, slice_id in keys),
        slice_sizes=np.array([len(numbers) for numbers in ordered], np.int64),
        stains=stains,
        stain_sizes=np.array([sum(s == stain for s, _ in keys) for stain in stains], np.int64),
    )


def live_sizes(record: Record, where: str) -> dict[str, int]:
    """How many live rows a record lists of every stain that has some; quicker than its `layout`.

    Raises:
        StoreDamaged: A patch is live twice.
    """
    sizes: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    groups = [group for part in record.parts for group in part.groups if group.live]
    for group in groups:
        seen.add((group.stain, group.slice_id))
        sizes[group.stain] = sizes.get(group.stain, 0) + len(group.patches(where))
    if len(seen) < len(groups):
        layout(record, where)  # a slice in several groups: only this looks for patches that they share
    return sizes


def read_features(
    folder: Path,
    case: Layout,
    dtype: str,
    row: tuple[int, ...],
    out: NDArray[Any] | None = None,
    column: str = "features",
) -> NDArray[Any]:
    """The case's embeddings in bag order.

    Args:
        folder: The case's folder.
        case: What to read.
        dtype: The store's dtype of embeddings.
        row: Shape of a row: (D,), or (V − 1, D) for ``views``.
        out: (P, …) array of ``dtype`` to read into; memory that is new to the process costs
            as much as half of the reading.
        column: ``features`` or ``views``.

    Returns:
        (P, …) array of ``dtype``; ``out`` if it was given.

    Raises:
        StoreDamaged: A part is missing or is not what the record says.
    """
    for piece in case.pieces:
        if piece.group.rows * math.prod(row) * np.dtype(dtype).itemsize > piece.part.size:
            raise damaged(
                folder / piece.part.name,
                f"a part of {piece.part.size} bytes cannot hold {piece.group.rows} embeddings",
            )
    if out is None:
        out = np.empty((len(case.patches), *row), dtype)
    for part, pieces in by_part(case.pieces):
        with open_part(folder / part.name, part.size) as reader:
            for piece in pieces:
                name = (piece.group.stain, piece.group.slice_id, column, piece.group.rows)
                if piece.span is not None:
                    reader.read(*name, into=out[piece.span])
                    continue
                block = np.empty((piece.group.rows, *row), dtype)
                reader.read(*name, into=block)
                out[piece.target] = block[live_rows(reader, piece, folder)]
    return out


def read_columns(folder: Path, case: Layout, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns other than ``features``, in bag order.

    A column that is optional (`format.OPTIONAL_COLUMNS`) is NaN where a part lacks it.

    Returns:
        By name, arrays of P rows.

    Raises:
        StoreDamaged: A part is missing or is not what the record says.
    """
    blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    targets: list[NDArray[np.int64]] = []
    for part, pieces in by_part(case.pieces):
        with open_part(folder / part.name, part.size) as reader:
            for piece in pieces:
                live = slice(None) if piece.span is not None else live_rows(reader, piece, folder)
                for name in names:
                    blocks[name].append(_column(reader, piece, name, folder)[live])
                targets.append(piece.target)
    if not targets:
        return {name: np.empty((0, *ROWS[name][1]), ROWS[name][0] or "S1") for name in names}
    target = np.concatenate(targets)
    result = {}
    for name in names:
        values = np.concatenate(blocks[name])
        result[name] = np.empty_like(values)
        result[name][target] = values
    return result


def _column(reader: PartReader, piece: Piece, name: str, folder: Path) -> NDArray[Any]:
    group, (dtype, shape) = piece.group, ROWS[name]
    if name in OPTIONAL_COLUMNS and name not in reader.columns(group.stain, group.slice_id):
        return np.full((group.rows, *shape), np.nan, dtype)
    if dtype is not None:
        into: NDArray[Any] = np.empty((group.rows, *shape), dtype)
        return reader.read(group.stain, group.slice_id, name, group.rows, into=into)
    block = reader.read(group.stain, group.slice_id, name, group.rows)
    if block.dtype.kind != "S" or block.ndim != 1:
        raise damaged(folder / piece.part.name, f"{name} holds {block.dtype}", "byte strings")
    return block


def live_rows(reader: PartReader, piece: Piece, folder: Path) -> NDArray[np.bool_]:
    """Which of the group's rows the record lists.

    Raises:
        StoreDamaged: The part's patch numbers cannot be read, or some that the record lists are missing.
    """
    group = piece.group
    stored = reader.read(
        group.stain, group.slice_id, "patch", group.rows, into=np.empty(group.rows, np.int64)
    )
    live = np.isin(stored, piece.patches)
    if int(live.sum()) != len(piece.patches):
        raise damaged(
            folder / piece.part.name,
            f"{group.stain}/{group.slice_id} holds {int(live.sum())} of the patches {group.live}",
            f"{len(piece.patches)} of them",
        )
    return live


def by_part(pieces: Sequence[Piece]) -> list[tuple[Part, list[Piece]]]:
    """The parts, and the pieces in each."""
    parts: dict[str, tuple[Part, list[Piece]]] = {}
    for piece in pieces:
        parts.setdefault(piece.part.name, (piece.part, []))[1].append(piece)
    return list(parts.values())


def described(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Quality and positions as columns of a table, from the columns of a part."""
    names = {"quality": QUALITY_COLUMNS, "geometry": GEOMETRY_COLUMNS, "coords": COORDS_COLUMNS}
    return {name: arrays[column][:, i] for column, kept in names.items() for i, name in enumerate(kept)}


def file_states(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """What is known of the files, and positions, as columns of a table, from the columns of a part."""
    digests = arrays["source_sha256"]
    return {
        "size": arrays["source_stat"][:, 0],
        "mtime_ns": arrays["source_stat"][:, 1],
        "sha256": pd.array([row.tobytes() for row in digests], dtype=object),
        **{name: arrays["geometry"][:, i] for i, name in enumerate(GEOMETRY_COLUMNS)},
        **{name: arrays["coords"][:, i] for i, name in enumerate(COORDS_COLUMNS)},
    }
