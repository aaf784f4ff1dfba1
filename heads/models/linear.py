"""The baseline: elastic-net logistic regression on the mean embedding of a case, by scikit-learn."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.bags import BagBatch
from heads.models.config import LinearConfig
from heads.models.elastic_net import ElasticNetLogistic
from heads.models.head import Fit, Float32Linear, Head, register_head
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_sum
from heads.models.standardize import usable_deviation

# A class without training cases gets this logit, in nats below the mean class.
_ABSENT = -10.0
# Without L1 no penalty is so strong that all weights are 0; as if there were at least so much of it.
_LEAST_L1 = 1e-3


@register_head("linear", LinearConfig)
class Linear(Head):
    """Logits = W z + b, z = the standardised mean Σ x / N over the N patches of a case.

    W and b are not learned step by step: every epoch gives the minimum of
    Σ CE + λ (ρ ‖W‖₁ + (1 − ρ)/2 ‖W‖₂²) over the training cases (`ElasticNetLogistic`), ρ = ``l1_ratio``,
    with the training's class weights and label smoothing; b is free. The epochs are a path of penalties
    from λ_max, the least at which W is 0, down to ``path_end`` · λ_max, evenly in log λ; each starts from
    the one before.
    Validation thus chooses λ as it chooses the epoch of other heads, and early stopping ends the path.
    With two classes the penalty is on the difference of the two rows of W, which are ± half of it.

    z is standardised over the training cases (``standardize: train``), not over their patches: means vary
    less than patches, and the penalty should not depend on that. Learning rate, optimiser, clipping, moving
    average and dropout have nothing to act on. There is no attention.

    Source: Zou and Hastie 2005 (elastic net); the path of Friedman, Hastie and Tibshirani 2010 (glmnet).

    Args:
        dim: D, the number of features.
        classes: C.
        config: The path.
    """

    solved = True

    def __init__(self, dim: int, classes: int, config: LinearConfig) -> None:
        super().__init__(dim)
        self.config = config
        self.classifier = Float32Linear(dim, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def schedule(self, epoch: int, epochs: int) -> dict[str, float]:
        """``penalty``: λ / λ_max, 1 in the first epoch; with one epoch alone it is the end's."""
        return {"penalty": self.config.path_end ** (min(epoch / (epochs - 1), 1.0) if epochs > 1 else 1.0)}

    def forward(self, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify a batch.

        Args:
            batch: B cases.
            schedule: Not used: the weights hold it.

        Returns:
            Logits (B, C), no attention.
        """
        return HeadOutput(self.classifier(self.standardize(mean_features(batch))))

    @torch.no_grad()
    def solve(self, batches: Iterable[BagBatch], fit: Fit, **schedule: float) -> None:
        """Set weights and standardisation to what the training cases and the penalty give."""
        parts = [(mean_features(batch).double().cpu(), batch.labels) for batch in batches]
        x = torch.cat([means for means, _ in parts])
        y = np.concatenate([labels.cpu().numpy() for _, labels in parts if labels is not None])
        # Where nothing is standardised, b takes up what centring leaves: it is free.
        centre, scale = x.mean(0), torch.ones_like(x[0])
        if fit.standardize:
            scale = usable_deviation(x.std(0, correction=0))
            self.standardize.mean.copy_(centre)
            self.standardize.std.copy_(scale)
        weight, bias = self._minimum(((x - centre) / scale).numpy(), y, fit, schedule["penalty"])
        if not fit.standardize:
            bias = bias - weight @ centre.numpy()
        self.classifier.weight.copy_(torch.from_numpy(weight))
        self.classifier.bias.copy_(torch.from_numpy(bias))

    def _minimum(
        self, x: NDArray[np.float64], y: NDArray[np.int64], fit: Fit, penalty: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(C, D) weights and (C,) biases at the minimum, from (B, D) means and (B,) labels."""
        before = self.classifier.weight.double().cpu().numpy()
        share = soft_labels(y, len(before), fit)
        known = np.flatnonzero(share.sum(0))
        problem = ElasticNetLogistic(x, share[:, known])
        strength = penalty * problem.largest / max(self.config.l1_ratio, _LEAST_L1)
        rows, free = before[known], self.classifier.bias.double().cpu().numpy()[known]
        start = rows[1:] - rows[:1] if len(known) == 2 else rows
        free = free[1:] - free[:1] if len(known) == 2 else free
        if not start.any() or not fit.standardize:  # unstandardised, b holds what centring took
            free = problem.null
        if strength:
            l1 = self.config.l1_ratio
            start, free = problem.minimum(start, free, strength * l1, strength * (1 - l1))
        if len(known) == 2:
            start, free = np.concatenate((-start, start)) / 2, np.concatenate((-free, free)) / 2
        weight, bias = np.zeros_like(before), np.full(len(before), free.mean() + _ABSENT)
        weight[known], bias[known] = start, free
        return weight, bias


def mean_features(batch: BagBatch) -> torch.Tensor:
    """(B, D): the mean of every feature over all patches of a case, in float32 or float64."""
    offsets = batch.case_patch_offsets
    return segment_sum(batch.features, offsets) / offsets.diff()[:, None]


def soft_labels(y: NDArray[np.int64], classes: int, fit: Fit) -> NDArray[np.float64]:
    """(B, C): how much of each case is of each class: smoothed, and times the weight of its own class."""
    share = (1 - fit.label_smoothing) * np.eye(classes)[y] + fit.label_smoothing / classes
    if fit.class_weights is not None:
        share *= fit.class_weights.double().cpu().numpy()[y][:, None]
    return np.asarray(share)
