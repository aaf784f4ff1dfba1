"""Logistic regression with an elastic net, to its minimum: also with far more features than cases."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Of the largest derivative where W is 0: closer to a minimum no validation loss tells the difference.
_TOLERANCE = 1e-4
_STEPS, _HALVINGS = 200, 30
_SWEEPS = 20  # of coordinate descent a step: what is not found goes on in the next, from nearer
_NO_GAIN = 1e-13  # of the objective: what rounding leaves
# A case that is all but certain still counts for so much: its own weight would vanish.
_LEAST_VARIANCE = 1e-5


class ElasticNetLogistic:
    """Σ CE(x Wᵀ + b) + l1 ‖W‖₁ + l2/2 ‖W‖₂², minimised over W and b.

    Newton's method with the penalty left as it is: around the W and b at hand each class' part of Σ CE is
    a weighted sum of squares, whose minimum with the penalty scikit-learn's coordinate descent finds; a
    step that would not lower the objective is halved until it does. With two classes W and b are
    those of the second class against the first. Three classes or more are taken in turn, which with far
    more features than cases and a weak penalty may not be done after the 200 rounds after which it ends.

    Source: Friedman, Hastie and Tibshirani 2010 (glmnet), section 3.

    Args:
        x: (B, D).
        share: (B, C) how much of each case is of each class; C ≥ 2, every class with some.
    """

    def __init__(self, x: Floats, share: Floats) -> None:
        counted = share.sum(1) > 0  # of a class of weight 0 a case has none
        x, share = x[counted], share[counted]
        self._x, self._share, self._total = x, share, share.sum(1)
        prior = np.log(share.sum(0))
        # What is fitted: every class, or of two the second.
        self._fitted = range(1, 2) if len(prior) == 2 else range(len(prior))
        self.null = prior[1:] - prior[:1] if len(prior) == 2 else prior - prior.mean()
        slope = x.T @ (share - self._total[:, None] * np.exp(prior) / share.sum())
        self.largest = float(np.abs(slope).max())

    def minimum(self, weight: Floats, bias: Floats, l1: float, l2: float) -> tuple[Floats, Floats]:
        """(K, D) W and (K,) b at the minimum, sought from others; K is C, or 1 of two classes.

        `null` is b at the minimum if W is 0, which it is where l1 is `largest` or more.
        """
        weight, bias = weight.copy(), bias.copy()
        objective = self._objective(weight, bias, l1, l2)
        for _ in range(_STEPS):
            before = objective
            for row, column in enumerate(self._fitted):
                p = _softmax(self._logits(weight, bias))[:, column]
                slope = self._share[:, column] - self._total * p
                variance = self._total * np.maximum(p * (1 - p), _LEAST_VARIANCE)
                target = self._x @ weight[row] + bias[row] + slope / variance
                to_weight, to_bias = _least_squares(self._x, target, variance, weight[row], l1, l2)
                step_weight, step_bias = to_weight - weight[row], to_bias - bias[row]
                for halved in range(_HALVINGS):
                    tried, free = weight.copy(), bias.copy()
                    tried[row] += step_weight / 2**halved
                    free[row] += step_bias / 2**halved
                    value = self._objective(tried, free, l1, l2)
                    if value <= objective:
                        weight, bias, objective = tried, free, value
                        break
            near = self._distance(weight, bias, l1, l2) <= _TOLERANCE * self.largest
            if near or before - objective <= _NO_GAIN * abs(objective):
                break
        return weight, bias

    def _logits(self, weight: Floats, bias: Floats) -> Floats:
        logits = self._x @ weight.T + bias
        return np.column_stack((np.zeros(len(logits)), logits)) if len(bias) == 1 else logits

    def _objective(self, weight: Floats, bias: Floats, l1: float, l2: float) -> float:
        logits = self._logits(weight, bias)
        entropy = np.logaddexp.reduce(logits, axis=1) @ self._total - (self._share * logits).sum()
        return float(entropy + l1 * np.abs(weight).sum() + l2 / 2 * np.square(weight).sum())

    def _distance(self, weight: Floats, bias: Floats, l1: float, l2: float) -> float:
        """How far 0 is from the subgradients, by the worst of W and b; 0 at the minimum."""
        p = _softmax(self._logits(weight, bias))
        error = (self._total[:, None] * p - self._share)[:, list(self._fitted)]
        smooth = error.T @ self._x + l2 * weight
        at_zero = np.maximum(np.abs(smooth) - l1, 0)
        slack = np.where(weight == 0, at_zero, np.abs(smooth + l1 * np.sign(weight)))
        return float(max(slack.max(), np.abs(error.sum(0)).max()))


def _least_squares(
    x: Floats, target: Floats, variance: Floats, start: Floats, l1: float, l2: float
) -> tuple[Floats, float]:
    """(D,) w and b that minimise ½ Σ variance · (target − x w − b)² + l1 ‖w‖₁ + l2/2 ‖w‖₂²."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import ElasticNet, Ridge

    if not l1:
        model = Ridge(alpha=l2)
    else:
        # Its weights sum to the number of cases, and its squares are divided by that.
        alpha = (l1 + l2) / variance.sum()
        model = ElasticNet(
            alpha=alpha, l1_ratio=l1 / (l1 + l2), warm_start=True, max_iter=_SWEEPS, tol=1e-8
        )
        model.coef_ = start.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the next step of Newton's goes on from it
        model.fit(x, target, sample_weight=variance)
    return model.coef_, float(model.intercept_)


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
