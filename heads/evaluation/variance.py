"""How much of the embeddings' variance lies between cases, between stains and between classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from heads.evaluation.cka import LEAST


@dataclass
class _Groups:
    """Σ over patches of the vectors and squares, and Σ over groups of |sum|² / size."""

    count: float
    total: torch.Tensor
    squares: float
    between: float = 0.0

    def share(self) -> float:
        """Between groups, of all variance; NaN where nothing varies."""
        if not self.count:
            return math.nan
        common = float(self.total @ self.total) / self.count
        spread = self.squares - common
        return max(0.0, self.between - common) / spread if spread > LEAST * self.squares else math.nan


class Spread:
    """Shares of variance (η²), summed up case by case: how far a batch effect reaches.

    Args:
        dim: D.
        stains: How many there are.
        classes: How many there are; 0: none are known.
    """

    def __init__(self, dim: int, stains: int, classes: int) -> None:
        self._stains = torch.zeros((stains, dim), dtype=torch.float64)
        self._stain_sizes = torch.zeros(stains, dtype=torch.float64)
        self._classes = torch.zeros((classes, dim), dtype=torch.float64)
        self._class_sizes = torch.zeros(classes, dtype=torch.float64)
        self._all = _Groups(0, torch.zeros(dim, dtype=torch.float64), 0.0)
        self._labelled = 0.0
        self._within, self._cases = 0.0, 0

    def add_case(self, sums: torch.Tensor, sizes: torch.Tensor, squares: float, label: int | None) -> None:
        """Add a case.

        Args:
            sums: (T, D) float64, each stain's sum of the case's centred embeddings; T is all stains.
            sizes: (T,) patches of each; 0 where the case lacks it.
            squares: Sum of the squared lengths of the case's centred embeddings.
            label: Its class, if it has one.
        """
        self._cases += 1
        total, size, there = sums.sum(dim=0), float(sizes.sum()), sizes > 0
        self._stains += sums
        self._stain_sizes += sizes
        self._within += float((sums[there].square().sum(dim=1) / sizes[there]).sum())
        self._all.count += size
        self._all.total += total
        self._all.squares += squares
        self._all.between += float(total @ total) / size
        if label is not None:
            self._classes[label] += total
            self._class_sizes[label] += size
            self._labelled += squares

    def shares(self) -> dict[str, float]:
        """Between ``cases``, ``stains``, ``cases_within_stains`` and ``classes``, each in [0, 1].

        Returns:
            Sum of squares between groups / of all, over all features. ``cases_within_stains`` is of what
            is left within the stains; ``classes`` of the labelled cases' patches. NaN where undefined:
            nothing varies, or there are fewer than two groups of the kind.
        """
        stains = self._of(self._stains, self._stain_sizes, self._all.squares)
        classes = self._of(self._classes, self._class_sizes, self._labelled)
        left = self._all.squares - stains.between
        inside = (
            max(0.0, self._within - stains.between) / left if left > LEAST * self._all.squares else None
        )
        stain_count, class_count = (int((n > 0).sum()) for n in (self._stain_sizes, self._class_sizes))
        several = self._cases > 1
        return {
            "cases": self._all.share() if several else math.nan,
            "stains": stains.share() if stain_count > 1 else math.nan,
            "cases_within_stains": inside if several and inside is not None else math.nan,
            "classes": classes.share() if class_count > 1 else math.nan,
        }

    @staticmethod
    def _of(sums: torch.Tensor, sizes: torch.Tensor, squares: float) -> _Groups:
        there = sizes > 0
        between = float((sums[there].square().sum(dim=1) / sizes[there]).sum())
        return _Groups(float(sizes.sum()), sums.sum(dim=0), squares, between)
