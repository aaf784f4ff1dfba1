"""Whether trainings with different seeds attend to the same patches.

For every test case and every pair of seeds of the same fold, of the effective attention on its patches:
the Jensen-Shannon divergence with logarithms of base 2 (Lin 1991), 0 where equal, 1 where no patch has a
share of both; the overlap of the 5 % most attended patches, as a share of them; and Spearman's rank
correlation, undefined where either has no order (all equal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.cohort.names import natural_key
from heads.evaluation.results import ATTENTION
from heads.evaluation.runs import RunError
from heads.evaluation.studies import Study, counted
from heads.evaluation.study_results import StudyResults

TOP = 0.05  # of a case's patches, at least one
_PATCH = ["case_id", "stain", "slice_id", "patch"]
_NUMBERS = ("jensen_shannon", "top_5pct_overlap", "spearman")
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of all cases and pairs of seeds.

    Attributes:
        table: One row a fold, case and pair of seeds, with the three numbers.
    """

    table: pd.DataFrame

    def to_json(self) -> dict[str, Any]:
        """The means over all rows; None where no row has one."""
        means = {name: float(self.table[name].mean()) for name in _NUMBERS}
        known = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
        return {**known, "pairs": len(self.table)}

    def to_text(self) -> str:
        """One line."""
        means = self.to_json()
        shown = {name: "undefined" if means[name] is None else f"{means[name]:.3f}" for name in _NUMBERS}
        pairs = counted(len(self.table), "pair")
        return (
            f"attention of two seeds, mean of {pairs}: Jensen-Shannon divergence "
            f"{shown['jensen_shannon']} (0: equal, 1: apart), overlap of the top 5% "
            f"{shown['top_5pct_overlap']}, rank correlation {shown['spearman']}"
        )


def jensen_shannon(p: Floats, q: Floats) -> float:
    """The divergence of two distributions, base 2, in [0, 1].

    Args:
        p: (N,), not negative; divided by its sum.
        q: (N,), as ``p``.
    """
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def bits(each: Floats) -> float:
        here = each > 0
        return float((each[here] * np.log2(each[here] / middle[here])).sum())

    return float(np.clip((bits(p) + bits(q)) / 2, 0.0, 1.0))


def top_overlap(p: Floats, q: Floats, share: float = TOP) -> float:
    """How many of the ``ceil(share · N)`` largest of both are the same, as a share; of equals the first."""
    count = math.ceil(round(share * len(p), 9))  # 0.05 · 20 is a little more than 1
    first, second = (set(np.argsort(-each, kind="stable")[:count].tolist()) for each in (p, q))
    return len(first & second) / count


def spearman(p: Floats, q: Floats) -> float:
    """The correlation of the ranks, equals sharing theirs; NaN where either has one rank only."""
    ranks = [pd.Series(each).rank().to_numpy() for each in (p, q)]
    centred = [each - each.mean() for each in ranks]
    norm = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / norm) if norm else math.nan


def attention_agreement(study: Study, results: StudyResults) -> Agreement | None:
    """How far the seeds of a study agree; None where fewer than two trainings of a fold wrote attention.

    Raises:
        RunError: A table of attention is damaged, or of other patches than its fold's others.
    """
    rows: list[list[Any]] = []
    for fold in study.folds:
        seeds = [each.seed for each in results.finished if each.fold == fold]
        paths = {seed: study.folder.training(fold, seed).path / ATTENTION for seed in seeds}
        found = {seed: _read(path) for seed, path in paths.items() if path.is_file()}
        for a, b in combinations(sorted(found), 2):
            if not found[a].index.equals(found[b].index):
                raise RunError(
                    f"the attention of seeds {a} and {b} is on different patches",
                    expected="the same test cases and patches for every seed of a fold",
                    where=str(paths[b]),
                    fix="was the store changed in between? train these again",
                )
            both = pd.DataFrame({"a": found[a], "b": found[b]})
            for case, mine in both.groupby(level="case_id", sort=False):
                p, q = mine["a"].to_numpy(np.float64), mine["b"].to_numpy(np.float64)
                numbers = [jensen_shannon(p, q), top_overlap(p, q), spearman(p, q)]
                rows.append([fold, str(case), a, b, len(p), *numbers])
    if not rows:
        return None
    rows.sort(key=lambda row: (row[0], natural_key(row[1]), row[2], row[3]))
    return Agreement(
        pd.DataFrame(rows, columns=["fold", "case_id", "seed_a", "seed_b", "patches", *_NUMBERS])
    )


def _read(path: Path) -> pd.Series:
    """Effective attention by case, stain, slice and patch."""
    kinds = {"case_id": str, "stain": str, "slice_id": str}
    try:
        table = pd.read_csv(path, dtype=kinds, keep_default_na=False)
        values = table.set_index(_PATCH)["effective_attention"].astype(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all() or not values.index.is_unique:
            raise ValueError("a patch stands there twice, or its attention is no share")
        return values.sort_index()
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"the table of attention cannot be read: {error}",
            expected="the file as the training wrote it",
            where=str(path),
            fix="have it written again: featstore evaluate RUN --analyze-attention",
        ) from error
