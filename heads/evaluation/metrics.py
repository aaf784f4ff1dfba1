"""What a head's predictions are worth: metrics, each with a bootstrap 95% interval.

Every metric is a function of how often each case counts. The point value counts every case once, a
bootstrap resample counts it as often as it was drawn, so that all resamples are computed at once.

With two classes the positive class is the last in config order (index 1). With more, AUC, average
precision, F1, sensitivity and specificity are macro averages: the plain mean, one class against the
rest, over the classes that occur among the true labels. A metric is undefined, never 0 or 1, where
the class that it needs does not occur; ranking, F1 and averages need two classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FeatstoreError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Labels = NDArray[np.integer[Any]]
Scores = NDArray[np.floating[Any]]
Threshold = float | Floats | None

ECE_BINS = 10
LEVEL = 0.95
EPSILON = 2.0**-52  # the least probability of the log loss
TOLERANCE = 1e-3  # of probabilities, for half precision
BLOCK = 2**22  # resamples × cases held at once: 32 MiB an array


class EvaluationError(FeatstoreError):
    """Predictions that cannot be evaluated."""

    exit_code = 1


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its 95% interval; None where undefined, and then ``reason`` says why."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    def to_json(self) -> dict[str, float | str | None]:
        """``{"value", "low", "high"}``, or ``{"value": "undefined", "reason"}``."""
        if self.value is None:
            return {"value": "undefined", "reason": self.reason}
        reason = {"reason": self.reason} if self.reason else {}
        return {"value": self.value, "low": self.low, "high": self.high, **reason}


@dataclass(frozen=True, eq=False)
class Metrics:
    """What ``evaluate`` found.

    Definitions that differ between authors: the Brier score of more than two classes, Σ_c (p_c − y_c)²
    (Brier 1950), would for two be twice theirs, (p₁ − y)². The ECE (Guo et al. 2017) has ten equal
    bins, open on the left, of the predicted class's probability; resampling adds noise to every bin,
    so its interval lies too high, at few cases even above the value.
    """

    accuracy: Estimate
    balanced_accuracy: Estimate  # the mean recall of the classes that occur; Brodersen et al. 2010
    auc: Estimate  # P(a positive scores above a negative), ties count ½; Hanley & McNeil 1982
    average_precision: Estimate  # Σ (Rₙ − Rₙ₋₁)·Pₙ over distinct scores, not interpolated: scikit-learn
    f1: Estimate  # 2TP / (2TP + FP + FN)
    sensitivity: Estimate  # TP / (TP + FN); its macro average is the balanced accuracy
    specificity: Estimate  # TN / (TN + FP)
    brier: Estimate  # the mean squared error of the probabilities
    ece: Estimate  # Σ_bins |bin| / N · |accuracy − mean confidence|
    log_loss: Estimate  # the mean of −ln p of the true class, p at least 2.2e−16: scikit-learn
    recall: dict[str, Estimate]  # per class, the share of its cases that were called right
    confusion_matrix: Ints  # (C, C), how many cases of the row's true class got the column's class
    class_names: tuple[str, ...]  # in config order
    n: int  # cases
    threshold: Threshold  # the least probability called positive; None: the most probable
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values that strict JSON can hold (no NaN)."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {key: value.to_json() for key, value in content.items() if isinstance(value, Estimate)}
        content["recall"] = {name: estimate.to_json() for name, estimate in self.recall.items()}
        content["confusion_matrix"] = self.confusion_matrix.tolist()
        content["class_names"] = list(self.class_names)
        content["threshold"] = None if self.threshold is None else np.asarray(self.threshold).tolist()
        content["positive_class"] = self.class_names[1] if len(self.class_names) == 2 else None
        return content | {"interval": f"{LEVEL:.0%} percentile bootstrap over cases"}


def evaluate(
    true: Labels,
    probabilities: Scores,
    class_names: Sequence[str],
    *,
    threshold: Threshold = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Metrics:
    """Compare predicted probabilities with the true classes.

    Intervals are percentiles of plain resampling of the cases with replacement (Efron & Tibshirani
    1993, ch. 13). Resamples in which a metric is undefined are left out of its interval; if they are
    more than half, there is none; nor if all resamples give one value, as when every case is right:
    resampling cannot say how sure that is.

    Args:
        true: (N,) class indices in config order.
        probabilities: (N, C), rows summing to 1.
        class_names: C ≥ 2 names in config order; of two, the last is the positive class.
        threshold: Of two classes, from validation, or (N,); None: the most probable, the first of equals.
        resamples: How many bootstrap resamples; 0 for no intervals.
        seed: Of the resamples.

    Raises:
        EvaluationError: No cases, labels out of range, or probabilities that are none.
        ValueError: Arrays whose shapes, types or names do not belong together.
    """
    label, p = _checked(true, probabilities, class_names, threshold, resamples)
    predicted = p.argmax(axis=1) if threshold is None else (p[:, 1] >= threshold).astype(np.int64)
    (n, classes), names = p.shape, tuple(map(str, class_names))
    confusion = np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes)
    absent = [names[c] for c in np.flatnonzero(~confusion.any(axis=1))]
    point = weighted_statistics(np.ones((1, n)), label, p, predicted)
    resampled: dict[str, list[Floats]] = {name: [] for name in point}
    generator, size = np.random.default_rng(seed), max(1, BLOCK // n)
    for start in range(0, resamples, size):
        weights = resample(generator, min(size, resamples - start), n)
        for name, values in weighted_statistics(weights, label, p, predicted).items():
            resampled[name].append(values)
    estimates = {name: interval_of(float(point[name][0]), resampled[name], absent) for name in point}
    recall = {name: estimates.pop(f"recall {index}") for index, name in enumerate(names)}
    return Metrics(
        **estimates, recall=recall, confusion_matrix=confusion, class_names=names,
        n=n, threshold=threshold, resamples=resamples, seed=seed,
    )  # fmt: skip


def rank_auc(true: Labels, probabilities: Scores) -> float:
    """The AUC as `evaluate` defines it, without an interval; NaN where a class is missing.

    Args:
        true: (N,) class indices.
        probabilities: (N, C); need not be finite.
    """
    label, p = np.asarray(true), np.nan_to_num(np.asarray(probabilities, np.float64), nan=0.5)
    present = np.unique(label)
    if len(present) < 2:
        return float("nan")
    ones = np.ones((1, len(label)))
    of = [p.shape[1] - 1] if p.shape[1] == 2 else present.tolist()
    return float(np.mean([_ranking(ones, p[:, c], label == c)[0][0] for c in of]))


def youden_threshold(true: Labels, probability_of_positive: Scores) -> float:
    """The threshold with the largest sensitivity + specificity − 1 (Youden 1950), from validation cases.

    It lies midway between two neighbouring scores; of equally good ones the closest to 0.5 is taken,
    then the lower. Where none is better than chance it is 0.5.

    Args:
        true: (N,) 0 or 1.
        probability_of_positive: (N,).

    Raises:
        EvaluationError: As ``evaluate``, or one of the two classes does not occur.
    """
    positive = np.asarray(probability_of_positive, dtype=np.float64)
    label, p = _checked(true, np.stack((1 - positive, positive), axis=-1), ("0", "1"), None, 0)
    total = np.bincount(label, minlength=2)
    if not total.all():
        found = f"no threshold can be chosen: no validation case is of class {total.argmin()}"
        raise EvaluationError(found, fix="split again, stratified, or leave the threshold out")
    score, inverse = np.unique(p[:, 1], return_inverse=True)
    low, middle = score[:-1], (score[:-1] + score[1:]) / 2
    # Between neighbouring floats there is no middle; the lower must stay below the threshold.
    candidate = np.where(middle > low, middle, score[1:])
    below = np.stack([np.bincount(inverse[label == c], minlength=len(score)).cumsum()[:-1] for c in (0, 1)])
    # J · N₀ · N₁ in whole numbers, so that equally good thresholds are exactly equal.
    index = below[0] * total[1] - below[1] * total[0]
    if not index.size or index.max() <= 0:
        return 0.5
    best = candidate[index == index.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def resample(generator: np.random.Generator, resamples: int, n: int) -> Floats:
    """How often every case is drawn: (resamples, N), each row summing to N."""
    drawn = generator.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def weighted_statistics(weights: Floats, true: Ints, p: Floats, predicted: Ints) -> dict[str, Floats]:
    """Every metric under every weighting of the cases.

    With ``weights`` (R, N), how often each case counts, ``true`` (N,), ``p`` (N, C) and ``predicted``
    (N,): (R,) per metric, NaN where undefined; the recall of class c as ``recall c``.
    """
    n, classes = p.shape
    binary = classes == 2
    cell = np.eye(classes**2)[true * classes + predicted]
    confusion = (weights @ cell).reshape(-1, classes, classes)
    right, count, called = np.einsum("rcc->rc", confusion), confusion.sum(axis=2), confusion.sum(axis=1)
    recall = _ratio(right, count)
    ranking = [_ranking(weights, p[:, c], true == c) for c in ((1,) if binary else range(classes))]

    def defined(each: Floats) -> Floats:
        return np.where((count > 0).sum(axis=1) > 1, each, np.nan)

    def average(each: Floats) -> Floats:
        """The positive class's column, or the mean over the classes that occur."""
        return defined(each[:, -1] if binary else _mean_where(each, count > 0))

    balanced = defined(_mean_where(recall, count > 0))
    specificity = _ratio(n - count - (called - right), n - count)
    return {
        "accuracy": right.sum(axis=1) / n,
        "balanced_accuracy": balanced,
        "auc": average(np.stack([auc for auc, _ in ranking], axis=1)),
        "average_precision": average(np.stack([precision for _, precision in ranking], axis=1)),
        "f1": average(_ratio(2 * right, count + called)),
        "sensitivity": recall[:, 1] if binary else balanced,
        "specificity": specificity[:, 1] if binary else average(specificity),
        **_calibration(weights, true, p, predicted),
        **{f"recall {c}": recall[:, c] for c in range(classes)},
    }


def _calibration(weights: Floats, true: Ints, p: Floats, predicted: Ints) -> dict[str, Floats]:
    """Brier score, log loss and ECE, arguments and result as ``weighted_statistics``."""
    n, classes = p.shape
    own, confidence = np.clip(p[np.arange(n), true], EPSILON, 1.0), p[np.arange(n), predicted]
    squared = (p - np.eye(classes)[true]) ** 2
    brier = squared[:, 1] if classes == 2 else squared.sum(axis=1)
    in_bin = np.eye(ECE_BINS)[np.searchsorted(np.arange(1, ECE_BINS) / ECE_BINS, confidence, side="left")]
    ece = np.abs(weights @ (in_bin * ((predicted == true) - confidence)[:, None])).sum(axis=1) / n
    return {"brier": weights @ brier / n, "log_loss": -weights @ np.log(own) / n, "ece": ece}


def _ranking(weights: Floats, score: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """AUC and average precision under every weighting, ties exact; arguments as ``weighted_statistics``."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    weights, positive = weights[:, order], positive[order]
    # Per distinct score, the highest first: (R, distinct).
    hits = np.add.reduceat(weights * positive, starts, axis=1)
    misses = np.add.reduceat(weights * ~positive, starts, axis=1)
    above = hits.cumsum(axis=1)
    won = (misses * (above - hits / 2)).sum(axis=1)
    # A score that was not drawn, nor any above it, has no precision, and no hits to weigh it with.
    drawn = np.maximum(above + misses.cumsum(axis=1), 1.0)
    precision = (hits * above / drawn).sum(axis=1)
    return _ratio(won, above[:, -1] * misses.sum(axis=1)), _ratio(precision, above[:, -1])


def _ratio(part: Floats, whole: Floats) -> Floats:
    ratio = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean_where(values: Floats, mask: NDArray[np.bool_]) -> Floats:
    return _ratio(np.where(mask, values, 0.0).sum(axis=1), mask.sum(axis=1).astype(np.float64))


def interval_of(value: float, resampled: list[Floats], absent: list[str]) -> Estimate:
    """A value and the percentiles of its resampled ones, (R,) in blocks; NaN is undefined."""
    if np.isnan(value):
        return Estimate(None, None, None, f"no true case of class {', '.join(absent)}")
    if not resampled:
        return Estimate(value, None, None, "no interval: no resamples were asked for")
    values = np.concatenate(resampled)
    undefined = int(np.isnan(values).sum())
    if 2 * undefined > len(values):
        share = f"{undefined} of {len(values)}"
        return Estimate(value, None, None, f"no interval: undefined in {share} resamples")
    if np.nanmin(values) == np.nanmax(values):
        return Estimate(value, None, None, "no interval: all resamples give the same value")
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def _checked(
    true: Labels, probabilities: Scores, class_names: Sequence[str], threshold: Threshold, resamples: int
) -> tuple[Ints, Floats]:
    """Labels (N,) as int64 and probabilities (N, C) as float64, or what is wrong with them."""
    label, p, classes = np.asarray(true), np.asarray(probabilities, dtype=np.float64), len(class_names)
    if label.ndim != 1 or p.shape != (len(label), classes):
        raise ValueError(f"labels {label.shape}, probabilities {p.shape}, {classes} class names: no match")
    if classes < 2 or len(set(map(str, class_names))) < classes:
        raise ValueError(f"expected two or more different class names, got {list(class_names)}")
    if resamples < 0:
        raise ValueError(f"resamples must be 0 or more, got {resamples}")
    if not len(label):
        raise EvaluationError("there are no cases to evaluate")
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers, got {label.dtype}")
    if threshold is not None and (classes != 2 or not np.isfinite(threshold).all()):
        raise EvaluationError(f"threshold {threshold} for {classes} classes", expected="a number, and two")
    bad = np.flatnonzero((label < 0) | (label >= classes)).tolist()
    if bad:
        raise EvaluationError(f"case {bad[0]} has label {label[bad[0]]}", expected=f"0 to {classes - 1}")
    # What is not finite fails the second comparison.
    total = np.where(np.isfinite(p), p, np.nan).sum(axis=1)
    bad = np.flatnonzero((p < -TOLERANCE).any(axis=1) | ~(np.abs(total - 1) <= TOLERANCE)).tolist()
    if bad:
        found = (
            f"{len(bad)} of {len(p)} cases have no valid probabilities, case {bad[0]} {p[bad[0]].tolist()}"
        )
        fix = "logits need a softmax; NaN comes from a training that diverged: lower lr, or set grad_clip"
        raise EvaluationError(found, expected="finite, none negative, with a sum of 1", fix=fix)
    return label.astype(np.int64), p
