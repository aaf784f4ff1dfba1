"""Imports for tests: a project folder beside foreign ones, and what a store holds afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.errors import FeatstoreError
from featstore.interop import ImportReport
from featstore.interop.project import import_project
from featstore.store import Store
from featstore.store.format import COORDS_COLUMNS, GEOMETRY_COLUMNS
from heads.config import Config
from tests.command_line import listing

Rows = dict[tuple[str, str, str], np.ndarray]


def imported(
    project: Path, source: Path, settings: Mapping[str, Any] | None = None, **imports: Any
) -> ImportReport:
    """Import into a project; ``imports`` are settings of that section, ``settings`` of others."""
    project.mkdir(parents=True, exist_ok=True)
    return import_project(Config.model_validate({**(settings or {}), "imports": imports}), project, source)


def refused(project: Path, source: Path, where: object, *says: str, **imports: Any) -> FeatstoreError:
    """An import must fail with a message that names a file and says what to do, and make nothing."""
    project.mkdir(parents=True, exist_ok=True)
    before = listing(project)
    with pytest.raises(FeatstoreError) as error:
        imported(project, source, **imports)
    assert str(where) in error.value.where, error.value
    assert error.value.expected
    assert error.value.fix
    for part in says:
        assert part in str(error.value)
    assert listing(project) == before
    return error.value


def rows_of(project: Path) -> Rows:
    """Every slice's embeddings, by case, stain and slice."""
    store = Store.open(project / "store")
    found = {}
    for case in store.cases():
        bag = store.bag(case)
        stains = np.repeat(np.array(bag.stains), bag.stain_sizes)
        parts = np.split(bag.features, np.cumsum(bag.slice_sizes)[:-1])
        for stain, slice_id, features in zip(stains, bag.slices, parts, strict=True):
            found[case, str(stain), slice_id] = features
    return found


def table_of(project: Path, case: str | None = None) -> pd.DataFrame:
    return Store.open(project / "store").table(case)


def geometry_of(project: Path, case: str) -> np.ndarray | None:
    """(N, 8) corners; None where the table has no such columns."""
    table = table_of(project, case)
    return table[list(GEOMETRY_COLUMNS)].to_numpy() if "x0" in table else None


def coords_of(project: Path, case: str) -> np.ndarray | None:
    """(N, 2) as the file had them; None where the table has no such columns."""
    table = table_of(project, case)
    return table[list(COORDS_COLUMNS)].to_numpy() if "coord_x" in table else None


def assert_same(found: Mapping[Any, np.ndarray], wanted: Mapping[Any, np.ndarray], dtype: str) -> None:
    """The same keys, and exactly these numbers in this dtype."""
    assert set(found) == set(wanted)
    for key, features in wanted.items():
        assert found[key].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found[key], features.astype(dtype))


def alone(features: Mapping[str, np.ndarray], stain: str = "h&e") -> Rows:
    """Where bags go without a map: each is a case of its own, whose only slice bears its name."""
    return {(name, stain, name): x for name, x in features.items()}
