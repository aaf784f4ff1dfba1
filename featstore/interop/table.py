"""A table of bags: CSV or Parquet with ``bag_id, bag_label, f0, f1, …``, or NPZ with one array a bag.

That is how the classic data sets of multiple instance learning are passed around.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.cohort.names import integral, natural_key
from featstore.interop.source import Entry, ImportProblem, Options, Source, file_state

_FEATURE = re.compile(r"f(\d+)")
_SUFFIXES = (".csv", ".parquet", ".npz")


class Table(Source):
    """One file that holds all bags; a row's patch number is its place in its bag."""

    format = "table"
    is_one_file = True
    layout = "a .csv or .parquet with bag_id, bag_label, f0, f1, …, or an .npz with one (N, D) array a bag"

    def __init__(self, root: Path, options: Options) -> None:
        super().__init__(root.parent, options)
        self._file = root
        self._bags: dict[str, NDArray[Any]] = {}
        self._state = (0, 0)

    @classmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether it is a file of one of these kinds."""
        return path.is_file() and path.suffix.lower() in _SUFFIXES

    def bags(self) -> list[tuple[str, str]]:
        """Every bag; reads the whole file."""
        if not self._file.is_file() or self._file.suffix.lower() not in _SUFFIXES:
            raise self._problem("it is no table of bags")
        self._state = file_state(self._file)  # as it was when it was read, however long ago that is
        if self._file.suffix.lower() == ".npz":
            self._bags = self._arrays()
        else:
            self._bags = self._rows()
        if not self._bags:
            raise self._problem("there are no bags in it")
        return [(name, self._file.name) for name in sorted(self._bags, key=natural_key)]

    def look(self, name: str, path: str) -> Entry:
        """Shape and dtype of a bag."""
        return self.entry(name, path, self._bags[name].shape, self._bags[name].dtype.name)

    def features(self, entry: Entry) -> NDArray[Any]:
        """A bag's rows."""
        return self._bags[entry.name]

    def states(self, entry: Entry) -> Mapping[str, tuple[int, int]]:
        """Size and modification time of the table when it was read."""
        return {entry.path: self._state}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        try:
            with open(self._file, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file}
        except Exception as error:  # what numpy raises depends on where the bytes stop making sense
            raise self._problem(f"the file cannot be read ({error})") from error
        odd = next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None)
        if odd is not None:
            raise self._problem(f"{odd!r} is no array")
        return arrays

    def _rows(self) -> dict[str, NDArray[Any]]:
        frame = self._frame()
        columns = [str(column) for column in frame.columns]
        if "bag_id" not in columns:
            raise self._problem(f"no column bag_id; it has {', '.join(columns[:8])}")
        features = self._feature_columns(columns)
        if ignored := sorted(set(columns) - {"bag_id", "bag_label", *features}):
            self.notes.append(f"{len(ignored)} columns are not read: {', '.join(ignored[:8])}")
        values = np.empty((len(frame), len(features)), np.float32)
        for i, column in enumerate(features):
            numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64)
            if not np.isfinite(numbers).all():
                row = int(np.flatnonzero(~np.isfinite(numbers))[0])
                raise self._problem(f"{column} is {frame[column].iloc[row]!r} in row {row + 1}", "a number")
            with np.errstate(over="ignore"):
                values[:, i] = numbers
            if not np.isfinite(values[:, i]).all():
                row = int(np.flatnonzero(~np.isfinite(values[:, i]))[0])
                raise self._problem(
                    f"{column} is {numbers[row]} in row {row + 1}", "a number within float32"
                )
        names = frame["bag_id"].fillna("").astype(str).str.strip()
        if (names == "").any():
            row = int(np.flatnonzero(names == "")[0])
            raise self._problem(f"no bag_id in row {row + 1}", "the name of a bag in every row")
        if "bag_label" in columns:
            self._read_labels(names, frame["bag_label"])
        groups = names.groupby(names, sort=False).indices
        return {str(name): values[np.sort(rows)] for name, rows in groups.items()}

    def _frame(self) -> pd.DataFrame:
        try:
            if self._file.suffix.lower() == ".parquet":
                return pd.read_parquet(self._file)
            text = {"bag_id": str, "bag_label": str}
            return pd.read_csv(self._file, dtype=text, keep_default_na=False, encoding="utf-8-sig")
        except ImportError as error:
            raise ImportProblem(
                "reading Parquet needs pyarrow, which is not installed",
                expected="pyarrow, or a table as CSV",
                where=str(self._file),
                fix="pip install 'featstore[parquet]', or save the table as CSV",
            ) from error
        except Exception as error:  # a parser's own errors are many
            raise self._problem(f"the file cannot be read ({error})") from error

    def _feature_columns(self, columns: Sequence[str]) -> list[str]:
        found = {int(match[1]): column for column in columns if (match := _FEATURE.fullmatch(column))}
        if not found or sorted(found) != list(range(len(found))):
            raise self._problem(f"feature columns {', '.join(list(found.values())[:8]) or 'missing'}")
        return [found[i] for i in range(len(found))]

    def _read_labels(self, names: pd.Series[str], labels: pd.Series[Any]) -> None:
        for name, label in zip(names, labels.fillna("").astype(str), strict=True):
            raw = integral(label.strip())
            if raw and self.labels.setdefault(name, raw) != raw:
                raise self._problem(f"bag {name!r} has two labels, {self.labels[name]!r} and {raw!r}")

    def _problem(self, found: str, expected: str = "") -> ImportProblem:
        return ImportProblem(
            found, expected=expected or self.layout, where=str(self._file), fix="mend the table"
        )
