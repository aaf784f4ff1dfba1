"""Cross-entropy with class weights that act at any batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from featstore.errors import ConfigError


def class_weights(labels: Sequence[int], class_names: Sequence[str]) -> torch.Tensor:
    """``balanced`` weights: N / (C · n_c), of the training cases.

    Args:
        labels: (N,) class indices of the training cases.
        class_names: C names, in config order.

    Returns:
        (C,) float32; their mean over the cases is 1.

    Raises:
        ConfigError: A class has no training case.
    """
    count = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=len(class_names))
    if (count == 0).any():
        missing = [class_names[c] for c in torch.nonzero(count == 0).flatten().tolist()]
        raise ConfigError(
            f"no training case is of class {', '.join(missing)}",
            expected="training cases of every class, to balance them",
            where="class weights, the split",
            fix="use another split, or no class weights",
        )
    return len(labels) / (len(class_names) * count.float())


CaseLoss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
_LOSSES: dict[str, CaseLoss] = {}


def register_loss(name: str) -> Callable[[CaseLoss], CaseLoss]:
    """Make a loss known by a name: a function of logits (b, C), labels (b,) and smoothing to (b,)."""

    def register(loss: CaseLoss) -> CaseLoss:
        _LOSSES[name] = loss
        return loss

    return register


def get_loss(name: str) -> CaseLoss:
    """The loss of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in _LOSSES:
        raise ConfigError(
            f"there is no loss {name!r}",
            expected=f"one of {', '.join(_LOSSES)}",
            where="train.loss",
            fix="choose one, or register your own: head.plugin",
        )
    return _LOSSES[name]


@register_loss("cross_entropy")
def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The cross-entropy of every case.

    Class weights multiply it, and a batch's loss is Σ w_y · CE / B: divided by the number of cases,
    not by the sum of their weights. A weighted mean over a batch of one would give back the plain
    loss, whatever the weights.

    Args:
        logits: (b, C).
        labels: (b,) int64.
        smoothing: ε: the target is 1 − ε on the label and ε / C on every class besides.

    Returns:
        (b,) float32 or wider.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
