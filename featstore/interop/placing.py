"""Which case, stain and slice a foreign bag belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from featstore.cohort.names import check_id, integral, normalize_case, normalize_slice, stain_lookup
from featstore.cohort.tables import Table
from featstore.config import FeatstoreConfig
from featstore.errors import CohortError
from featstore.interop.source import Entry, ImportProblem, Key

_COLUMNS = {
    "bag": ("slide_id", "slide", "bag_id", "bag", "filename", "file"),
    "case": ("case_id", "case", "patient_id", "patient"),
    "stain": ("stain",),
    "slice": ("slice_id", "slice"),
}

# Of bags' files, and of the slides that tables often name in their place.
_SUFFIXES = (".h5", ".pt", ".npy", ".svs", ".ndpi", ".tif", ".tiff", ".mrxs", ".scn", ".vms", ".bif")


@dataclass(frozen=True)
class _Row:
    """What the map says of a bag; None where it has no such column, or nothing in it."""

    case: str
    stain: str | None
    slice_id: str | None


class Placing:
    """Gives every bag its case, stain and slice.

    Without a map a bag is a case of its own, of the one stain, and its only slice bears its name.

    Args:
        config: Normalisation of ids and stains.
        stain: Stain of bags for which nobody says another.
        table: CSV with the columns ``slide_id, case_id[, stain][, slice]``; None for none.

    Raises:
        CohortError: The map cannot be read, or names a bag twice.
        ConfigError: The stain is no usable id.
    """

    def __init__(self, config: FeatstoreConfig, stain: str, table: Path | None) -> None:
        self._config = config
        self._lookup = stain_lookup(config.stains)
        self._stain = self._canonical(stain, "imports.default_stain")
        self._map = None if table is None else _read_map(table)
        self._table = table

    @property
    def is_mapped(self) -> bool:
        """Whether a map says whose a bag is; else every bag is a case of its own."""
        return self._map is not None

    def key(self, entry: Entry) -> Key:
        """Where a bag's rows go.

        Raises:
            CohortError: An id is not usable.
            ImportProblem: The map does not name the bag.
        """
        where = entry.path
        if entry.key is not None:
            return entry.key
        row = _Row(entry.name, None, None)
        if self._map is not None:
            found = self._map.get(entry.name)
            if found is None:
                near = difflib.get_close_matches(entry.name, self._map, n=1)
                hint = f" (nearest: {near[0]!r})" if near else ""
                raise ImportProblem(
                    f"the map does not name the bag {entry.name!r}{hint}",
                    expected="a row for every bag",
                    where=f"{self._table}, for {entry.path}",
                    fix="add it there, or leave such bags out with --on-bad skip",
                )
            row, where = found, str(self._table)
        check_id(row.case, "case", where)
        case = normalize_case(integral(row.case)) if self._config.patches.normalize_cases else row.case
        slice_id = row.slice_id or entry.name
        check_id(slice_id, "slice", where)
        if self._config.patches.normalize_slices:
            slice_id = normalize_slice(slice_id)
        stain = self._stain if row.stain is None else self._canonical(row.stain, where)
        return Key(case, stain, slice_id)

    def unused(self, entries: Iterable[Entry]) -> list[str]:
        """Bags that the map names and the source does not have."""
        there = {entry.name for entry in entries}
        return [name for name in self._map or () if name not in there]

    def _canonical(self, stain: str, where: str) -> str:
        check_id(stain, "stain", where)
        return self._lookup.get(stain.casefold(), stain)


def _read_map(path: Path) -> Mapping[str, _Row]:
    table = Table(path, "--map")
    at = {what: _column(table, names) for what, names in _COLUMNS.items()}
    for what in ("bag", "case"):
        if at[what] is None:
            raise CohortError(
                f"{path} has no column for the {what}; it has {', '.join(table.columns)}",
                expected=f"one of {', '.join(_COLUMNS[what])}",
                where="--map",
                fix="rename one of its columns",
            )
    found: dict[str, _Row] = {}
    for line, cells in table.rows():

        def cell(what: str, cells: list[str] = cells) -> str:
            place = at[what]
            return "" if place is None else cells[place]

        name = cell("bag")
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        row = _Row(cell("case"), cell("stain") or None, cell("slice") or None)
        if found.setdefault(name, row) != row:
            raise CohortError(
                f"{path} says two things of the bag {name!r}, the second in line {line}",
                expected="one row a bag",
                where="--map",
                fix="remove one of them",
            )
    return found


def _column(table: Table, names: Iterable[str]) -> int | None:
    folded = [column.casefold() for column in table.columns]
    return next((folded.index(name) for name in names if name in folded), None)
