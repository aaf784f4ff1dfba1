"""Who spoke: the attention of a run's cases by patch, slice and stain, as tables.

No torch in this file: pictures are drawn from these tables by processes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

NEUTRAL = 0.2  # from equal probabilities: what is called neither
_OF_STAIN = ["case_id", "stain", "slices"]
IDENTITY = ["case_id", "stain", "slice_id", "patch", "path"]


@dataclass(frozen=True, eq=False)
class AttentionTables:
    """What a head attended to (N cases, ΣP patches, ΣS slices, ΣT stains).

    *Effective attention* of a patch is how much of its case's embedding it makes up: its weight × its
    slice's × its stain's. Of a head that attends over a whole case at once it is the weight itself, and
    that of a slice or a stain is the sum over its patches.

    Attributes:
        cases: ``case_id, true_label, predicted_label, prob_<class>…, correct``, and the case's size:
            ``patches, slices, stains``; ``effective_patches`` is exp(H) of the effective attention, H its
            entropy in nats: of how many patches of equal attention it would be.
        patches: `IDENTITY`, ``effective_attention``, and the attention of every level as
            `heads.evaluation.predict.PatchAttention` has it; the index is the row in `Store.table`.
        slices: ``case_id, stain, slice_id, patches, slice_attention`` (of its stain's),
            ``effective_attention`` (of its case's), ``uniform`` (what slice_attention would be if all
            members had the same).
        stains: ``case_id, stain, slices, patches, stain_attention`` (of its case's), ``uniform``.
        levels: Whether the head attends level by level; else over a whole case at once.
    """

    cases: pd.DataFrame
    patches: pd.DataFrame
    slices: pd.DataFrame
    stains: pd.DataFrame
    levels: bool

    @property
    def sums(self) -> pd.Series:
        """The effective attention of every case, which is 1."""
        return self.patches.groupby("case_id", sort=False)["effective_attention"].sum()

    def each(self) -> Iterator[AttentionTables]:
        """The tables of every case by itself, in order."""
        whole = (self.patches, self.slices, self.stains)
        bounds = [_bounds(frame["case_id"].to_numpy()) for frame in whole]
        for i in range(len(self.cases)):
            patches, slices, stains = (f.iloc[b[i] : b[i + 1]] for f, b in zip(whole, bounds, strict=True))
            yield AttentionTables(self.cases.iloc[i : i + 1], patches, slices, stains, self.levels)


def attention_tables(patches: pd.DataFrame, cases: pd.DataFrame) -> AttentionTables:
    """Slices and stains out of a table of patches.

    Args:
        patches: In the patch table's order, with ``effective_attention`` and, of a head that attends level
            by level, ``slice_attention`` and ``stain_attention``.
        cases: As `case_table` makes it, in the same order.
    """
    patches = patches.astype({"effective_attention": np.float64})
    effective = patches["effective_attention"].to_numpy()
    levels = {"slice_attention", "stain_attention"} <= set(patches)
    case, stain = patches["case_id"].to_numpy(), patches["stain"].to_numpy()
    by_slice = _bounds(case, stain, patches["slice_id"].to_numpy())
    first = patches.iloc[by_slice[:-1]]
    slices = first[["case_id", "stain", "slice_id"]].reset_index(drop=True)
    slices["patches"] = np.diff(by_slice)
    share = np.add.reduceat(effective, by_slice[:-1])
    by_stain = _bounds(first["case_id"].to_numpy(), first["stain"].to_numpy())
    stains = slices.iloc[by_stain[:-1]][["case_id", "stain"]].reset_index(drop=True)
    stains["slices"] = np.diff(by_stain)
    stains["patches"] = np.add.reduceat(slices["patches"].to_numpy(), by_stain[:-1])
    of_stain = np.repeat(np.arange(len(stains)), stains["slices"])
    by_case = _bounds(stains["case_id"].to_numpy())
    of_case = np.repeat(np.arange(len(cases)), np.diff(by_case))
    if levels:
        slices["slice_attention"] = first["slice_attention"].to_numpy(np.float64)
        stains["stain_attention"] = first["stain_attention"].to_numpy(np.float64)[by_stain[:-1]]
        uniform = 1 / stains["slices"].to_numpy()[of_stain], 1 / np.diff(by_case)[of_case]
    else:
        stains["stain_attention"] = np.add.reduceat(share, by_stain[:-1])
        whole = stains["stain_attention"].to_numpy()[of_stain]
        slices["slice_attention"] = np.divide(share, whole, out=np.zeros_like(share), where=whole > 0)
        counts = np.add.reduceat(stains["patches"].to_numpy(), by_case[:-1])
        uniform = (
            slices["patches"].to_numpy() / stains["patches"].to_numpy()[of_stain],
            stains["patches"].to_numpy() / counts[of_case],
        )
    slices["effective_attention"] = share
    slices["uniform"], stains["uniform"] = uniform
    cases = cases.reset_index(drop=True)
    cases["patches"] = np.add.reduceat(stains["patches"].to_numpy(), by_case[:-1])
    cases["slices"] = np.add.reduceat(stains["slices"].to_numpy(), by_case[:-1])
    cases["stains"] = np.diff(by_case)
    surprise = np.where(effective > 0, -effective * np.log(np.maximum(effective, 1e-300)), 0.0)
    entropy = np.add.reduceat(surprise, _bounds(case)[:-1])
    cases["effective_patches"] = np.exp(entropy)
    return AttentionTables(cases, patches, slices, stains, levels)


def _bounds(*columns: NDArray[Any]) -> NDArray[np.int64]:
    """Where runs of equal rows begin, and the number of rows at the end."""
    n = len(columns[0])
    changed = np.zeros(max(n - 1, 0), bool)
    for column in columns:
        changed |= column[1:] != column[:-1]
    return np.concatenate(([0], np.flatnonzero(changed) + 1, [n])).astype(np.int64)


def case_bounds(patches: pd.DataFrame) -> NDArray[np.int64]:
    """(N + 1,) where each case's rows begin, in a table whose cases follow one another."""
    return _bounds(patches["case_id"].to_numpy())


def slice_equality(tables: AttentionTables) -> pd.DataFrame:
    """How equally the slices of each case's stains are attended to.

    Returns:
        One row a case and stain: ``case_id, stain, slices``, ``normalized_entropy`` (H / log S of the S
        slices' attention: 1 if all are equal, 0 if one has all; NaN for one slice), ``equal_shares``
        (what that would be with equal shares: less than 1 only of a head of one level, whose larger slices
        have more patches to attend to), ``effective_slices`` (exp H), ``largest`` (the most attended
        slice's attention), ``true_label, predicted_label, correct``.
    """
    rows = []
    for (case, stain), group in tables.slices.groupby(["case_id", "stain"], sort=False):
        a = group["slice_attention"].to_numpy()
        entropy, most = _entropy(a), math.log(len(a)) or math.nan
        equal = _entropy(group["uniform"].to_numpy()) / most
        rows.append((case, stain, len(a), entropy / most, equal, math.exp(entropy), float(a.max())))
    columns = [*_OF_STAIN, "normalized_entropy", "equal_shares", "effective_slices", "largest"]
    found = pd.DataFrame(rows, columns=columns)
    return found.merge(tables.cases[["case_id", "true_label", "predicted_label", "correct"]], on="case_id")


def _entropy(a: NDArray[np.float64]) -> float:
    return float(-(a[a > 0] * np.log(a[a > 0])).sum())


def top_patches(tables: AttentionTables, percent: float) -> pd.DataFrame:
    """The most attended patches of every case: so many percent of them, rounded up.

    Returns:
        One row a patch, by case and rank: ``case_id, true_label, predicted_label, rank`` (from 1),
        ``stain, slice_id, patch, path, effective_attention, times_equal`` (× what it would be if all
        patches had the same), ``cumulative`` (this patch's and those before it).
    """
    found = []
    for each in tables.each():
        case, patches = each.cases.iloc[0], each.patches
        n = max(1, math.ceil(round(len(patches) * percent / 100, 9)))
        chosen = ranked(patches).iloc[:n]
        part = chosen[IDENTITY].copy()
        part.insert(1, "true_label", case["true_label"])
        part.insert(2, "predicted_label", case["predicted_label"])
        part.insert(3, "rank", np.arange(1, n + 1))
        part["effective_attention"] = chosen["effective_attention"]
        part["times_equal"] = chosen["effective_attention"] * len(patches)
        part["cumulative"] = chosen["effective_attention"].cumsum()
        found.append(part)
    return pd.concat(found, ignore_index=True)


def ranked(patches: pd.DataFrame, by: str = "effective_attention") -> pd.DataFrame:
    """Patches by attention, the most first; equal ones in the patch table's order."""
    return patches.iloc[np.argsort(-patches[by].to_numpy(np.float64), kind="stable")]


def neutral(patches: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Patches whose probabilities in these columns are within `NEUTRAL` of equal ones, nearest first."""
    away = (patches[list(columns)] - 1 / len(columns)).abs().max(axis=1)
    return patches.loc[away[away < NEUTRAL].sort_values(kind="stable").index]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, each with its columns' names."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
