"""The baseline: elastic-net logistic regression on the mean embedding of a case, by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.bags import BagBatch
from heads.models.config import LinearConfig
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

    W and b are not learned step by step: in every epoch scikit-learn's SAGA minimises
    Σ CE + λ (ρ ‖W‖₁ + (1 − ρ)/2 ‖W‖₂²) over the training cases, with ρ = ``l1_ratio`` and the training's
    class weights and label smoothing; b is free. The epochs are a path of penalties from λ_max, the least
    at which W is 0, down to ``path_end`` · λ_max, evenly in log λ; each starts from the one before.
    SAGA ends where a pass changes no weight by more than 10⁻⁴ of the largest, or after 1,000 passes: with
    far more features than cases it is then near the minimum, not at it, the more so the weaker the penalty
    (1,024 features: probabilities within 0.02 on a path of 30 epochs, up to 0.2 where a few epochs leap).
    Validation thus chooses λ as it chooses the epoch of other heads, and early stopping ends the path.
    With two classes the penalty is on the difference of the two rows of W, which are ± half of it.

    z is standardised over the training cases (``standardize: train``), not over their patches: means vary
    less than patches, and the penalty should not depend on that. Learning rate, optimiser, clipping, moving
    average and dropout have nothing to act on. There is no attention.

    Source: Zou and Hastie 2005 (elastic net); the path of Friedman, Hastie and Tibshirani 2010 (glmnet);
    Defazio, Bach and Lacoste-Julien 2014 (SAGA, arXiv 1407.0202).

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
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        before = self.classifier.weight.double().cpu().numpy()
        share = soft_labels(y, len(before), fit)
        known = np.flatnonzero(share.sum(0))
        l1 = self.config.l1_ratio
        largest = largest_penalty(x, share) / max(l1, _LEAST_L1)
        model = LogisticRegression(
            C=1 / (penalty * largest) if largest else 1.0,
            l1_ratio=l1,
            solver="saga",
            max_iter=1000,
            random_state=fit.seed % 2**32,
            warm_start=True,
        )
        rows, free = before[known], np.log(share.sum(0)[known])
        model.coef_ = rows[1:] - rows[:1] if len(known) == 2 else rows
        null = free[1:] - free[:1] if len(known) == 2 else free - free.mean()  # b at the minimum if W = 0
        model.intercept_ = null.copy()
        # A case counts once for every class that it is of in part.
        case, column = np.nonzero(share)
        with warnings.catch_warnings():
            # A weak penalty on few cases has its minimum far away; validation judges what is found.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x[case], column, sample_weight=share[case, column])
        # SAGA ends as soon as W stands still, wherever b is: with W = 0 after one pass.
        found, free = model.coef_, model.intercept_ if model.coef_.any() else null
        if len(known) == 2:
            found, free = np.concatenate((-found, found)) / 2, np.concatenate((-free, free)) / 2
        weight, bias = np.zeros_like(before), np.full(len(before), free.mean() + _ABSENT)
        weight[known], bias[known] = found, free
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


def largest_penalty(x: NDArray[np.float64], share: NDArray[np.float64]) -> float:
    """The least weight of ‖W‖₁ at which W = 0 minimises Σ CE: the largest derivative there.

    Args:
        x: (B, D).
        share: (B, C) of `soft_labels`.
    """
    prior = share.sum(0) / share.sum()
    return float(np.abs(x.T @ (share - share.sum(1, keepdims=True) * prior)).max())
