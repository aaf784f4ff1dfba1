"""Temperature scaling: one number, fitted on validation cases, by which logits are divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heads.evaluation.metrics import EvaluationError, Floats, Labels, weighted_statistics

COLDEST, HOTTEST = 0.1, 10.0
_HALVINGS = 60  # of the interval of 1 / T: down to the precision of float64


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Attributes:
        value: T > 0, by which logits are divided; below 1 makes probabilities surer, above 1 less sure.
        cases: Validation cases that it was fitted on.
        remark: Why T is not where the validation cases alone would have it; empty if it is.
    """

    value: float
    cases: int
    remark: str = ""

    def probabilities(self, logits: Floats) -> Floats:
        """(N, C) probabilities softmax(z / T) of (N, C) logits; the most probable class stays the same."""
        return softmax(logits / self.value)


@dataclass(frozen=True)
class Calibration:
    """What a temperature did.

    Attributes:
        temperature: The fitted one.
        fitted_on: ``log_loss`` and ``ece`` of the validation cases, ``before`` and ``after``.
        applied_to: Those of the cases that were evaluated.
    """

    temperature: Temperature
    fitted_on: dict[str, dict[str, float]]
    applied_to: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        found = self.temperature
        return {
            "method": "temperature",
            "temperature": found.value,
            "validation_cases": found.cases,
            "remark": found.remark,
            "validation": self.fitted_on,
            "evaluated": self.applied_to,
        }

    def to_text(self) -> str:
        """T, log loss and ECE before and after, on one line."""
        before, after = self.applied_to["before"], self.applied_to["after"]
        found = self.temperature
        return (
            f"temperature {found.value:.3f}, from {found.cases} validation cases"
            + (f" ({found.remark})" if found.remark else "")
            + f"; log loss {before['log_loss']:.3f} -> {after['log_loss']:.3f}"
            + f", ECE {before['ece']:.3f} -> {after['ece']:.3f}"
        )


def calibrate(
    logits: Floats, labels: Labels, others: Floats, other_labels: Labels, class_names: Sequence[str]
) -> Calibration:
    """A temperature fitted on validation cases, and what it does for them and for other cases.

    Args:
        logits: (N, C) of the validation cases.
        labels: (N,) their class indices.
        others: (M, C) of the cases that are evaluated.
        other_labels: (M,) their class indices; the temperature does not depend on them.
        class_names: C names, for remarks.

    Raises:
        EvaluationError: Logits are not finite.
    """
    for what, z in (("validation", logits), ("evaluated", others)):
        if not np.isfinite(z).all():
            raise EvaluationError(
                f"logits of the {what} cases are not finite: there is no temperature for them",
                expected="finite logits",
                where="runs.calibration",
                fix="lower train.lr, or set train.grad_clip: the training diverged",
            )
    found = fit_temperature(logits, labels, class_names)
    return Calibration(
        found, before_and_after(found, logits, labels), before_and_after(found, others, other_labels)
    )


def fit_temperature(logits: Floats, labels: Labels, class_names: Sequence[str]) -> Temperature:
    """The T > 0 at which softmax(z / T) has the least log loss, without class weights and smoothing.

    The log loss is convex in 1 / T, so that the minimum is where its derivative is 0. T is kept within
    0.1 and 10. It stays 1 where the cases cannot tell it: all of one class; all logits of a case equal;
    or every case called right, when ever smaller T are ever better, however unsure the head should be of
    the next case.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2 (arXiv 1706.04599),
    which has no bounds.

    Args:
        logits: (N, C), finite.
        labels: (N,) class indices.
        class_names: C names, for remarks.
    """
    z, label = np.asarray(logits, np.float64), np.asarray(labels)
    n, own = len(z), z[np.arange(len(z)), label]
    kinds = np.unique(label)
    if len(kinds) < 2:
        return Temperature(1.0, n, f"left at 1: all validation cases are of {class_names[kinds[0]]}")
    if (z == own[:, None]).all():
        return Temperature(1.0, n, "left at 1: the head says the same of all classes")
    if (z <= own[:, None]).all():
        return Temperature(1.0, n, "left at 1: every validation case is called right, T would go to 0")

    def slope(inverse: float) -> float:
        """The log loss's derivative by 1 / T."""
        return float(((softmax(z * inverse) * z).sum(axis=1) - own).mean())

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(low) >= 0:
        return Temperature(
            HOTTEST, n, f"the largest allowed, {HOTTEST:g}: worse than chance, or far too sure"
        )
    if slope(high) <= 0:
        return Temperature(COLDEST, n, f"the smallest allowed, {COLDEST:g}: nearly all are called right")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return Temperature(2 / (low + high), n)


def softmax(logits: Floats) -> Floats:
    """(N, C) probabilities of (N, C) logits."""
    each = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(each / each.sum(axis=1, keepdims=True))


def before_and_after(
    temperature: Temperature, logits: Floats, labels: Labels
) -> dict[str, dict[str, float]]:
    """Log loss and ECE (of the most probable class) of (N, C) logits without and with a temperature."""
    label = np.asarray(labels, np.int64)
    found = {}
    for name, p in (("before", softmax(logits)), ("after", temperature.probabilities(logits))):
        every = weighted_statistics(np.ones((1, len(label))), label, p, p.argmax(axis=1))
        found[name] = {metric: float(every[metric][0]) for metric in ("log_loss", "ece")}
    return found
