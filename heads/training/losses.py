"""Cross-entropy with class weights that act at any batch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from featstore.errors import ConfigError


def class_weights(labels: Sequence[int], classes: int) -> torch.Tensor:
    """``balanced`` weights: N / (C · n_c), of the training cases.

    Args:
        labels: (N,) class indices of the training cases.
        classes: C.

    Returns:
        (C,) float32; their mean over the cases is 1.

    Raises:
        ConfigError: A class has no training case.
    """
    count = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=classes)
    if (count == 0).any():
        missing = [str(c) for c in torch.nonzero(count == 0).flatten().tolist()]
        raise ConfigError(
            f"no training case is of class {', '.join(missing)}",
            expected="training cases of every class, to balance them",
            where="class weights, the split",
            fix="use another split, or no class weights",
        )
    return len(labels) / (classes * count.float())


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
    cases: int | None = None,
) -> torch.Tensor:
    """Σ w_y · CE / B.

    Divided by the number of cases, not by the sum of their weights: a weighted mean over a batch
    of one gives back the plain loss, whatever the weights.

    Args:
        logits: (b, C).
        labels: (b,) int64.
        weights: (C,), or None for 1.
        smoothing: ε: the target is 1 − ε on the label and ε / C on every class besides.
        cases: B, the cases of the whole optimiser step; b by default.

    Returns:
        A scalar, in float32 or wider.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    each = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if weights is not None:
        each = each * weights.to(each)[labels]
    return each.sum() / (cases or len(labels))
