"""Where the demo's planted patches stand when patches are ranked by what a head makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from heads.evaluation.metrics import rank_auc


@dataclass(frozen=True)
class PlantedRank:
    """Of the test cases that have planted patches.

    Attributes:
        cases: How many.
        patches: Their patches.
        planted: Those that are planted.
        auc: Mean over the cases of P(a planted patch is ranked above another); 0.5: chance.
        found: Planted patches among each case's n first, n its number of planted ones.
        by: What they are ranked by.
    """

    cases: int
    patches: int
    planted: int
    auc: float
    found: int
    by: str = "effective attention"

    def to_text(self) -> str:
        """One line."""
        expected = self.planted / self.patches
        return (
            f"planted patches by {self.by}: AUC {self.auc:.3f} within {self.cases} high-grade test cases; "
            f"{self.found} of {self.planted} at the top of their cases (chance: {expected:.0%})"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return dict(vars(self))


def planted_rank(
    table: pd.DataFrame,
    planted: Path,
    column: str = "effective_attention",
    by: str = "effective attention",
) -> PlantedRank:
    """Hold a ranking of patches against the demo's list of planted ones.

    Args:
        table: One row a patch: ``case_id, path`` and the column.
        planted: The demo's ``planted.csv``.
        column: Patches are ranked by it, the largest first.
        by: What it is, in words.
    """
    table = table[["case_id", "path", column]].copy()
    truth = pd.read_csv(planted).set_index("path")["planted"]
    table["planted"] = table["path"].map(truth).astype(int)
    aucs, found, patches, total = [], 0, 0, 0
    for _, case in table.groupby("case_id"):
        n = int(case["planted"].sum())
        if not n:
            continue
        score = case[column].to_numpy(np.float64)
        # A monotone map to (0, 1) keeps every rank.
        share = score / score.max()
        aucs.append(rank_auc(case["planted"].to_numpy(), np.stack((1 - share, share), axis=1)))
        found += int(case.nlargest(n, column)["planted"].sum())
        patches, total = patches + len(case), total + n
    return PlantedRank(len(aucs), patches, total, float(np.mean(aucs)), found, by)
