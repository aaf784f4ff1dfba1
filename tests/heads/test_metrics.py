"""Every metric against scikit-learn, on the cases themselves and on resamples written out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from featstore.errors import FeatstoreError
from heads.evaluation import metrics
from heads.evaluation.metrics import Estimate, EvaluationError, Metrics, evaluate, youden_threshold

NAMES = ("benign", "malignant", "other")
Predictions = tuple[np.ndarray, np.ndarray]
SCALARS = [field.name for field in dataclasses.fields(Metrics) if field.type == "Estimate"]


@st.composite
def predictions(draw: st.DrawFn, classes: int, all_occur: bool = True) -> Predictions:
    """Labels and probabilities out of few distinct values, so that ties are everywhere."""
    n = draw(st.integers(classes, 25))
    true = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    if all_occur:
        true[:classes] = np.arange(classes)
    row = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    counts = np.array(draw(st.lists(row, min_size=n, max_size=n)), dtype=np.float64)
    return true, counts / counts.sum(axis=1, keepdims=True)


def drawn(seed: int, n: int, classes: int = 2) -> Predictions:
    """A useful but imperfect classifier, calibrated: the labels are drawn from its probabilities."""
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.full(classes, 0.7), n)
    return (generator.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1), p


def plain_ece(true: np.ndarray, p: np.ndarray, predicted: np.ndarray) -> float:
    total = 0.0
    cases = [(float(t == c), row[c]) for t, row, c in zip(true, p, predicted, strict=True)]
    for k in range(10):
        inside = [case for case in cases if k / 10 < case[1] <= (k + 1) / 10 or (k == 0 and case[1] == 0)]
        if inside:
            right, confidence = np.mean(inside, axis=0)
            total += len(inside) / len(true) * abs(right - confidence)
    return total


def by_sklearn(true: np.ndarray, p: np.ndarray, threshold: float | None = None) -> dict[str, float]:
    """The definitions once more, NaN where undefined."""
    classes, binary = p.shape[1], p.shape[1] == 2
    predicted = p.argmax(axis=1) if threshold is None else (p[:, 1] >= threshold).astype(int)
    present = [1] if binary else sorted(set(true.tolist()))
    two = len(set(true.tolist())) > 1
    recall = {c: float((predicted[true == c] == c).mean()) for c in set(true.tolist())}

    def macro(each: Callable[[int], float]) -> float:
        return float(np.mean([each(c) for c in present])) if two else math.nan

    f1 = sk.f1_score(true, predicted, average=None, labels=range(classes), zero_division=0.0)
    squared = (p - np.eye(classes)[true]) ** 2
    true_negatives = macro(lambda c: sk.recall_score(true != c, predicted != c))
    return {
        "accuracy": sk.accuracy_score(true, predicted),
        "balanced_accuracy": float(np.mean(list(recall.values()))) if two else math.nan,
        "auc": macro(lambda c: sk.roc_auc_score(true == c, p[:, c])),
        "average_precision": macro(lambda c: sk.average_precision_score(true == c, p[:, c])),
        "f1": macro(lambda c: f1[c]),
        "sensitivity": recall.get(1, math.nan) if binary else macro(lambda c: recall[c]),
        "specificity": recall.get(0, math.nan) if binary else true_negatives,
        "brier": sk.brier_score_loss(true, p[:, 1]) if binary else squared.sum(axis=1).mean(),
        "ece": plain_ece(true, p, predicted),
        "log_loss": sk.log_loss(true, p, labels=range(classes)),
        **{f"recall {c}": recall.get(c, math.nan) for c in range(classes)},
    }


def assert_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def points(result: Metrics) -> dict[str, float]:
    estimates = {name: getattr(result, name) for name in SCALARS}
    estimates |= {f"recall {c}": estimate for c, estimate in enumerate(result.recall.values())}
    return {name: math.nan if e.value is None else e.value for name, e in estimates.items()}


@pytest.mark.parametrize("all_occur", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
@settings(max_examples=40)
@given(data=st.data())
def test_the_values_are_those_of_sklearn(classes: int, all_occur: bool, data: st.DataObject) -> None:
    true, p = data.draw(predictions(classes, all_occur))
    result = evaluate(true, p, NAMES[:classes], resamples=0)
    assert_equal(points(result), by_sklearn(true, p))
    expected = sk.confusion_matrix(true, p.argmax(axis=1), labels=range(classes))
    np.testing.assert_array_equal(result.confusion_matrix, expected)
    if all_occur:
        balanced = sk.balanced_accuracy_score(true, p.argmax(axis=1))
        assert result.balanced_accuracy.value == pytest.approx(balanced)
    if all_occur and classes == 3:
        assert result.auc.value == pytest.approx(sk.roc_auc_score(true, p, multi_class="ovr"))
        assert result.f1.value == pytest.approx(sk.f1_score(true, p.argmax(axis=1), average="macro"))
        assert result.brier.value == pytest.approx(sk.brier_score_loss(true, p, scale_by_half=False))


@settings(max_examples=40)
@given(data=predictions(2), threshold=st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.75, 1.0, 1.5]))
def test_a_threshold_decides_what_is_called_positive(data: Predictions, threshold: float) -> None:
    result = evaluate(*data, NAMES[:2], threshold=threshold, resamples=0)
    assert_equal(points(result), by_sklearn(*data, threshold))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_resample_counts_like_the_cases_written_out(classes: int) -> None:
    true, p = drawn(1, 12, classes)
    p = np.ceil(p * 4)  # ties
    p /= p.sum(axis=1, keepdims=True)
    weights = metrics.resample(np.random.default_rng(3), 20, len(true))
    found = metrics.weighted_statistics(weights, true, p, p.argmax(axis=1))
    assert (weights.sum(axis=1) == len(true)).all()
    for row, counts in enumerate(weights.astype(int)):
        index = np.repeat(np.arange(len(true)), counts)
        assert_equal({name: v[row] for name, v in found.items()}, by_sklearn(true[index], p[index]))


def test_resampling_draws_every_case_alike() -> None:
    weights = metrics.resample(np.random.default_rng(0), 4000, 10)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(weights.var(axis=0), 0.9, atol=0.1)  # binomial: N · 1/N · (1 − 1/N)


def test_the_interval_is_two_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    true, p = drawn(5, 40)
    result = evaluate(true, p, NAMES[:2], resamples=300, seed=9)
    weights = metrics.resample(np.random.default_rng(9), 300, 40)
    scores = [sk.roc_auc_score(true, p[:, 1], sample_weight=w) for w in weights]
    assert (result.auc.low, result.auc.high) == pytest.approx(tuple(np.percentile(scores, [2.5, 97.5])))
    monkeypatch.setattr(metrics, "BLOCK", 40 * 7)  # 7 resamples at once
    in_blocks = evaluate(true, p, NAMES[:2], resamples=300, seed=9)
    assert in_blocks.auc == result.auc
    assert in_blocks.brier.low == pytest.approx(result.brier.low)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_interval_contains_the_value(classes: int) -> None:
    result = evaluate(*drawn(2, 100, classes), NAMES[:classes])
    for name in set(SCALARS) - {"ece"}:  # whose resamples are biased upwards, as documented
        estimate = getattr(result, name)
        assert estimate.low < estimate.value < estimate.high, name


def test_about_95_percent_of_the_intervals_contain_the_truth() -> None:
    true, p = drawn(100, 100_000)
    truth = {"auc": sk.roc_auc_score(true, p[:, 1]), "accuracy": (p.argmax(axis=1) == true).mean()}
    covered = dict.fromkeys(truth, 0)
    for seed in range(200):
        result = evaluate(*drawn(seed, 60), NAMES[:2], resamples=200)
        for name, value in truth.items():
            estimate = getattr(result, name)
            covered[name] += estimate.low <= value <= estimate.high
    assert all(175 <= count <= 199 for count in covered.values()), covered


def test_the_seed_alone_decides_the_interval() -> None:
    first, again, other = (evaluate(*drawn(4, 50), NAMES[:2], seed=seed).to_json() for seed in (7, 7, 8))
    assert first == again
    assert [first["auc"][key] == other["auc"][key] for key in ("value", "low")] == [True, False]


@pytest.mark.parametrize(("label", "undefined"), [(0, "sensitivity"), (1, "specificity")])
def test_with_one_class_missing_nothing_is_made_up(label: int, undefined: str) -> None:
    result = evaluate(np.full(6, label), np.tile([0.3, 0.7], (6, 1)), NAMES[:2])
    missing = NAMES[1 - label]
    needs_both = {"auc", "average_precision", "f1", "balanced_accuracy", undefined}
    for name in SCALARS:
        estimate = getattr(result, name)
        if name in needs_both:
            assert estimate == Estimate(None, None, None, f"no true case of class {missing}"), name
        else:
            assert estimate.value is not None, name
            assert estimate.low is not None or "all resamples give the same value" in estimate.reason
    assert result.recall[missing].value is None
    assert result.to_json()["auc"] == {"value": "undefined", "reason": f"no true case of class {missing}"}


def test_resamples_without_a_class_are_left_out_until_they_are_most() -> None:
    true, p = np.array([1] + [0] * 9), np.linspace([0.3, 0.7], [0.6, 0.4], 10)
    one = evaluate(true, p, NAMES[:2])  # (1 − 1/10)¹⁰ = 35 % of the resamples have no positive
    same = "no interval: all resamples give the same value"
    assert one.auc == Estimate(1.0, None, None, same)
    assert one.recall["malignant"] == Estimate(1.0, None, None, same)
    half, most = [np.array([0.6, np.nan]), np.array([0.8, np.nan])], [np.array([0.6, np.nan, np.nan])]
    assert metrics.interval_of(0.7, half, []) == Estimate(0.7, pytest.approx(0.605), pytest.approx(0.795))
    few = metrics.interval_of(0.7, most, [])
    assert few == Estimate(0.7, None, None, "no interval: undefined in 2 of 3 resamples")
    assert few.to_json() == {"value": 0.7, "low": None, "high": None, "reason": few.reason}


def test_json_is_strict_and_complete() -> None:
    content = evaluate(*drawn(0, 30), NAMES[:2], threshold=0.4, resamples=50).to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content.keys() >= {*SCALARS, "recall", "confusion_matrix", "n", "threshold", "resamples", "seed"}
    assert content["recall"].keys() == {"benign", "malignant"}
    assert content["positive_class"] == "malignant"
    assert evaluate(*drawn(0, 30, 3), NAMES, resamples=5).to_json()["positive_class"] is None


@settings(max_examples=40)
@given(data=predictions(2))
def test_youden_is_beaten_by_no_other_threshold(data: Predictions) -> None:
    true, score = data[0], data[1][:, 1]

    def youden(threshold: float) -> float:
        called = score >= threshold
        return float(called[true == 1].mean() - called[true == 0].mean())

    chosen = youden_threshold(true, score)
    best = max(youden(threshold) for threshold in score)
    if best > 1e-9:
        assert youden(chosen) == pytest.approx(best)
        below, above = score[score < chosen].max(), score[score >= chosen].min()
        assert chosen == pytest.approx((below + above) / 2)
    else:
        assert chosen == 0.5


def test_youden_of_equally_good_thresholds_takes_the_one_nearest_to_a_half() -> None:
    true, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.3, 0.5, 0.9])
    assert youden_threshold(true, score) == pytest.approx(0.7)  # 0.2 is as good
    assert youden_threshold(true, 1 - score[::-1]) == pytest.approx(0.3)
    assert youden_threshold(true[[2, 0, 3, 1]], score[[2, 0, 3, 1]]) == youden_threshold(true, score)


def test_youden_at_its_limits() -> None:
    true, low, high = np.array([0, 1]), 0.25, np.nextafter(0.25, 1)
    assert youden_threshold(true, np.array([low, high])) == high  # nothing lies between them
    assert youden_threshold(true, np.array([0.2, 0.2])) == 0.5
    assert youden_threshold(true, np.array([0.9, 0.2])) == 0.5


def test_youden_needs_both_classes() -> None:
    with pytest.raises(EvaluationError, match="no validation case is of class 1"):
        youden_threshold(np.array([0, 0]), np.array([0.1, 0.2]))


HALF = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("true", "p", "options", "message"),
    [
        (np.zeros(0, int), np.zeros((0, 2)), {}, "no cases"),
        ([0, 2], HALF, {}, "case 1 has label 2"),
        ([-1, 0], HALF, {}, "case 0 has label -1"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], {}, "1 of 2 cases have no valid probabilities, case 1"),
        ([0, 1], [[0.5, 0.5], [np.inf, -np.inf]], {}, "diverged"),
        ([0, 1], [[0.5, 0.5], [2.0, -1.0]], {}, "none negative"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.502]], {}, "softmax"),
        ([0, 1], HALF, {"threshold": math.nan}, "threshold nan"),
    ],
)
def test_what_cannot_be_evaluated_is_told(true: list, p: list, options: dict, message: str) -> None:
    with pytest.raises(FeatstoreError) as error:
        evaluate(np.array(true), np.array(p), NAMES[:2], **options)
    assert message in str(error.value)
    with pytest.raises(EvaluationError, match=r"threshold 0\.5 for 3 classes"):
        evaluate(*drawn(0, 5, 3), NAMES, threshold=0.5)


@pytest.mark.parametrize(
    ("true", "p", "names", "resamples", "message"),
    [
        ([0, 1, 1], HALF, NAMES[:2], 1, "no match"),
        ([0, 1], HALF, NAMES, 1, "no match"),
        ([[0, 1]], HALF, NAMES[:2], 1, "no match"),
        ([0, 0], [[1.0], [1.0]], NAMES[:1], 1, "two or more"),
        ([0, 1], HALF, ("a", "a"), 1, "different"),
        ([0.0, 1.0], HALF, NAMES[:2], 1, "whole numbers"),
        ([0, 1], HALF, NAMES[:2], -1, "resamples"),
    ],
)
def test_arrays_that_do_not_belong_together(
    true: list, p: list, names: tuple[str, ...], resamples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(np.array(true), np.array(p), names, resamples=resamples)


def test_probabilities_may_be_certain_or_of_half_precision() -> None:
    certain = evaluate(np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]]), NAMES[:2])
    assert certain.log_loss.value == pytest.approx(-math.log(2.0**-52) / 2)
    p = np.array([[0.3, 0.7], [0.6, 0.4], [0.1, 0.9]], np.float16)
    assert evaluate(np.array([0, 1, 1], np.uint8), p, NAMES[:2], resamples=10).n == 3
