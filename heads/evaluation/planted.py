"""Where the demo's planted patches stand when patches are ranked by attention."""

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
        auc: Mean over the cases of P(a planted patch has more attention than another); 0.5: chance.
        found: Planted patches among each case's n most attended, n its number of planted ones.
    """

    cases: int
    patches: int
    planted: int
    auc: float
    found: int

    def to_text(self) -> str:
        """One line."""
        expected = self.planted / self.patches
        return (
            f"planted patches by effective attention: AUC {self.auc:.3f} within {self.cases} high-grade "
            f"test cases; {self.found} of {self.planted} among the most attended (chance: {expected:.0%})"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return dict(vars(self))


def planted_rank(attention: Path, planted: Path) -> PlantedRank:
    """Hold a run's attention against the demo's list of planted patches.

    Args:
        attention: ``patch_attention.csv`` of the run.
        planted: The demo's ``planted.csv``.
    """
    table = pd.read_csv(attention)
    truth = pd.read_csv(planted).set_index("path")["planted"]
    table["planted"] = table["path"].map(truth).astype(int)
    aucs, found, patches, total = [], 0, 0, 0
    for _, case in table.groupby("case_id"):
        n = int(case["planted"].sum())
        if not n:
            continue
        score = case["effective_attention"].to_numpy()
        # A monotone map to (0, 1) keeps every rank.
        share = score / score.max()
        aucs.append(rank_auc(case["planted"].to_numpy(), np.stack((1 - share, share), axis=1)))
        found += int(case.nlargest(n, "effective_attention")["planted"].sum())
        patches, total = patches + len(case), total + n
    return PlantedRank(len(aucs), patches, total, float(np.mean(aucs)), found)
