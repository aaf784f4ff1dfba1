"""Where patches lie on their slice: a CSV of positions joined to the patch table."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import check_id
from featstore.cohort.tables import Table
from featstore.errors import CohortError

BOX = ("x", "y", "width", "height")
CORNERS = ("x0", "y0", "x1", "y1", "x2", "y2", "x3", "y3")
KEY = "patches.geometry"

DOMAIN = "domain"  # where a patch was made: a scanner, a hospital; text, and optional

Columns = dict[str, NDArray[Any]]


def read_geometry(file: Path, paths: Sequence[str]) -> tuple[Columns, int, int]:
    """Read patch positions and put them in the order of the patches.

    Args:
        file: CSV with `path` (relative to the patch folder, or a bare file name that is
            unique) and `x,y[,width,height]` or `x0,y0..x3,y3`, level-0 pixels; perhaps `domain`.
        paths: The patches' paths, POSIX, relative to the patch folder; P of them.

    Returns:
        The columns, each (P,) float64 with NaN for patches without a row, `domain` of text, empty for
        these; the number of rows that match no patch; the number of patches without a row.

    Raises:
        CohortError: Columns are missing, a value is no number, or a patch has two rows.
    """
    table = Table(file, KEY)
    at = table.column("path", ignore_case=True, fix="name the column of file names 'path'")
    wanted = _wanted(table)
    places = [table.column(name, ignore_case=True, fix=f"add '{name}'") for name in wanted]
    by_path = {path: row for row, path in enumerate(paths)}
    by_name = _unique_names(paths)

    lines = np.zeros(len(paths), dtype=np.int64)
    columns: Columns = {name: np.full(len(paths), np.nan) for name in wanted}
    domain_at = _domain_column(table)
    if domain_at is not None:
        columns[DOMAIN] = np.full(len(paths), "", object)
    unmatched = 0
    for line, cells in table.rows():
        values = _numbers(file, line, wanted, [cells[i] for i in places])
        name = cells[at].replace("\\", "/").removeprefix("./")
        row = by_path.get(name, -1)
        if row < 0 and "/" not in name:
            row = by_name.get(name, -1)
            if row == _AMBIGUOUS:
                raise _ambiguous(file, line, name)
        if row < 0:
            unmatched += 1
            continue
        if lines[row]:
            raise CohortError(
                f"{file} gives '{name}' two positions, in lines {lines[row]} and {line}",
                expected="one row a patch",
                where=KEY,
                fix="remove one of them",
            )
        lines[row] = line
        for key, value in zip(wanted, values, strict=True):
            columns[key][row] = value
        if domain_at is not None and cells[domain_at]:
            check_id(cells[domain_at], DOMAIN, f"{file}, line {line}")
            columns[DOMAIN][row] = cells[domain_at]
    return columns, unmatched, int((lines == 0).sum())


_AMBIGUOUS = -2


def _unique_names(paths: Sequence[str]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, path in enumerate(paths):
        name = path.rpartition("/")[2]
        rows[name] = _AMBIGUOUS if name in rows else row
    return rows


def _ambiguous(file: Path, line: int, name: str) -> CohortError:
    return CohortError(
        f"{file} names '{name}' in line {line}, and several folders hold such a file",
        expected="the path relative to the patch folder",
        where=KEY,
        fix="write the path with its folders",
    )


def _domain_column(table: Table) -> int | None:
    if DOMAIN not in {column.casefold() for column in table.columns}:
        return None
    return table.column(DOMAIN, ignore_case=True, fix="rename one")


def _wanted(table: Table) -> tuple[str, ...]:
    found = {column.casefold() for column in table.columns}
    corners, box = found & set(CORNERS), found & set(BOX)
    if corners and not box:
        return CORNERS
    if box and not corners:
        return BOX if found & {"width", "height"} else BOX[:2]
    raise CohortError(
        f"{table.path} has the columns {', '.join(table.columns)}",
        expected="'path' and either x, y[, width, height] or x0, y0, x1, y1, x2, y2, x3, y3",
        where=KEY,
        fix="rename its columns, keeping one of the two forms",
    )


def _numbers(file: Path, line: int, names: Sequence[str], cells: Sequence[str]) -> array[float]:
    values = array("d")
    for name, cell in zip(names, cells, strict=True):
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (name in BOX[2:] and value <= 0):
            raise CohortError(
                f"{file} has {name} = '{cell}' in line {line}",
                expected="a positive number" if name in BOX[2:] else "a number (level-0 pixels)",
                where=KEY,
                fix="mend that cell, or remove the line",
            )
        values.append(value)
    return values
