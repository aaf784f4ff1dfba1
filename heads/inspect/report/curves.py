"""How well probabilities rank cases, and how far to believe them: ROC, precision-recall, reliability."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from heads.evaluation.metrics import ECE_BINS, evaluate
from heads.evaluation.plots import Floats, Ints
from heads.evaluation.study_plots import roc
from heads.inspect.report.content import Chart
from heads.inspect.report.svg import (
    DASHES,
    DOTTED,
    GRID,
    INK,
    LEFT,
    MUTED,
    PALE,
    ROW,
    SIDE,
    TOP,
    Axes,
    box,
    color,
    drawing,
    legend,
    line,
    marker,
    short,
    stroke_symbol,
    text,
)

NAMED = 6  # up to so many curves have a colour and a line each in the legend

ROC = (
    "Each step lowers the bar for calling a case positive. The further the curve bends to the upper left, "
    "the better; the dotted diagonal is chance."
)
PRECISION_RECALL = (
    "Of the cases called positive, how many are (precision), against how many of the positive cases are "
    "found (recall). The dotted line is chance: the share of positive cases."
)
CALIBRATION = (
    "Can the probabilities be taken at their word? Of cases called with a probability near 0.8, about 80% "
    "should be right: points on the diagonal. Numbers are the cases in each bin; few cases say little."
)


@dataclass(frozen=True, eq=False)
class Scores:
    """Predictions of one model.

    Attributes:
        name: In the legend; empty for the only one.
        labels: (N,) true class indices.
        probabilities: (N, C).
        called: (N,) predicted class indices.
        bold: Whether its curves stand out among others'.
    """

    name: str
    labels: Ints
    probabilities: Floats
    called: Ints
    bold: bool = False


@dataclass(frozen=True, eq=False)
class _Curve:
    xs: Floats
    ys: Floats
    value: float
    chance: float


class _Style(NamedTuple):
    """Of a curve; what is grey has no row of its own in the legend."""

    stroke: str
    dash: str = ""
    width: float = 1.9


_BOLD, _GREY = _Style(INK, "", 2.6), _Style(PALE, "", 1.2)
_Named = tuple[str, _Style, _Curve]


def roc_charts(every: Sequence[Scores], class_names: Sequence[str]) -> tuple[Chart, ...]:
    """ROC curves: of two classes, the second's; of more, each class's against the rest.

    Several models share a chart, with a chart a class.
    """

    def curve(positive: NDArray[np.bool_], score: Floats) -> _Curve:
        xs, ys = roc(positive, score)
        return _Curve(xs, ys, _worth(positive, score)[0], 0.0)

    return _charts(every, class_names, curve, ("ROC curve", ROC, "AUC"), _roc_axes)


def precision_recall_charts(every: Sequence[Scores], class_names: Sequence[str]) -> tuple[Chart, ...]:
    """Precision-recall curves; arguments as `roc_charts`."""

    def curve(positive: NDArray[np.bool_], score: Floats) -> _Curve:
        xs, ys = precision_recall(positive, score)
        return _Curve(xs, ys, _worth(positive, score)[1], float(positive.mean()))

    return _charts(
        every, class_names, curve, ("Precision and recall", PRECISION_RECALL, "AP"), _precision_axes
    )


def precision_recall(positive: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    """Recall and precision at every distinct score, as corners of steps.

    The area below the steps is the average precision: precision is that of the recall it leads to.

    Args:
        positive: (N,), at least one of them true.
        score: (N,).
    """
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(score[order])), len(score) - 1]
    hits = positive[order].cumsum()[last]
    recall, precision = hits / positive.sum(), hits / (last + 1)
    return np.repeat(np.r_[0.0, recall], 2)[1:-1], np.repeat(precision, 2)


def _worth(positive: NDArray[np.bool_], score: Floats) -> tuple[float, float]:
    """AUC and average precision, as in `metrics.json`."""
    p = np.stack((1 - score, score), axis=1)
    found = evaluate(positive.astype(np.int64), p, ("rest", "class"), resamples=0)
    return float(found.auc.value or 0.0), float(found.average_precision.value or 0.0)


def _charts(
    every: Sequence[Scores],
    class_names: Sequence[str],
    curve: Callable[[NDArray[np.bool_], Floats], _Curve],
    words: tuple[str, str, str],
    axes: Callable[[], tuple[Axes, list[str]]],
) -> tuple[Chart, ...]:
    """One chart for one model or for two classes, else one a class."""
    title, explanation, _ = words
    labels = np.concatenate([each.labels for each in every])
    classes = [1] if len(class_names) == 2 else range(len(class_names))
    shown = [c for c in classes if 0 < (labels == c).sum() < len(labels)]
    if not shown:
        found = ", ".join(class_names[c] for c in np.unique(labels))
        only = f"There is no curve: every test case is of class {found}, and a curve needs two."
        return (Chart(title, explanation=explanation, note=only),)
    if len(every) == 1:
        one, several = every[0], len(class_names) > 2
        named = [
            (
                class_names[c],
                _Style(color(c), DASHES[place % len(DASHES)]),
                curve(one.labels == c, one.probabilities[:, c]),
            )
            for place, c in enumerate(shown)
        ]
        whole = f"{title}, each class against the rest" if several else f"{title}: {class_names[1]}"
        return (_chart(whole, named, words, axes),)
    many, charts = len(every) > NAMED, []
    for c in shown:
        named = []
        for place, each in enumerate(every):
            if 0 < (each.labels == c).sum() < len(each.labels):
                own = _GREY if many else _Style(color(place), DASHES[place % len(DASHES)])
                drawn = curve(each.labels == c, each.probabilities[:, c])
                named.append((each.name, _BOLD if each.bold else own, drawn))
        charts.append(_chart(f"{title}: {class_names[c]}", named, words, axes))
    return tuple(charts)


def _chart(
    title: str,
    named: Sequence[_Named],
    words: tuple[str, str, str],
    axes: Callable[[], tuple[Axes, list[str]]],
) -> Chart:
    """The curves, and below them what each is and is worth."""
    _, explanation, value = words
    frame, parts = axes()
    for chance in sorted({each.chance for *_, each in named if each.chance}):
        parts.append(line(frame.points((0, 1), (chance, chance)), MUTED, 1, DOTTED))
    rows = []
    for name, style, each in named:
        parts.append(line(frame.points(each.xs, each.ys), style.stroke, style.width, style.dash))
        if style is not _GREY:
            rows.append(
                (stroke_symbol(style.stroke, style.dash), f"{short(name)}: {value} {each.value:.3f}")
            )
    if grey := [each.value for _, style, each in named if style is _GREY]:
        said = f"{len(grey)} seeds: {value} {min(grey):.3f} to {max(grey):.3f}"
        rows.append((stroke_symbol(_GREY.stroke), said))
    below = frame.top + frame.height + 58
    parts += legend(LEFT, below, rows)
    said = "; ".join(f"{name} {value} {each.value:.3f}" for name, _, each in named[:12])
    height = below + ROW * len(rows)
    return Chart(title, drawing(LEFT + SIDE + 14, height, f"{title}. {said}", parts), explanation)


def _roc_axes() -> tuple[Axes, list[str]]:
    axes = Axes(LEFT, TOP, SIDE, SIDE)
    parts = axes.frame("false positive rate", "true positive rate")
    return axes, [*parts, line(axes.points((0, 1), (0, 1)), MUTED, 1, DOTTED)]


def _precision_axes() -> tuple[Axes, list[str]]:
    axes = Axes(LEFT, TOP, SIDE, SIDE, y_limits=(0, 1.02))
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    return axes, axes.frame("recall", "precision", y_ticks=ticks)


def reliability(scores: Scores) -> tuple[Ints, Floats, Floats]:
    """Cases, mean confidence and share right in each of ten equal bins, open on the left, as in the ECE."""
    confidence = scores.probabilities[np.arange(len(scores.labels)), scores.called]
    bins = np.searchsorted(np.arange(1, ECE_BINS) / ECE_BINS, confidence, side="left")
    count = np.bincount(bins, minlength=ECE_BINS)
    whole = np.maximum(count, 1)
    mean = np.bincount(bins, confidence, ECE_BINS) / whole
    right = np.bincount(bins, scores.called == scores.labels, ECE_BINS) / whole
    return count, mean, right


def calibration_chart(every: Sequence[Scores], remarks: Mapping[str, str] | None = None) -> Chart:
    """Confidence against the share of right cases, with the number of cases in each bin.

    Args:
        every: Of one or two models.
        remarks: By a model's name, added to the legend, such as its ECE.
    """
    axes = Axes(LEFT, TOP, SIDE, SIDE)
    parts = axes.frame("probability of the called class", "share called right")
    parts.append(line(axes.points((0, 1), (0, 1)), MUTED, 1, DOTTED))
    rows, said = [], []
    strip = TOP + SIDE + 46  # a strip of bars for each model below the frame
    for place, scores in enumerate(every):
        count, mean, right = reliability(scores)
        kept = np.flatnonzero(count)
        top = strip + 44 * place
        parts.append(line([(LEFT, top + 34), (LEFT + SIDE, top + 34)], GRID))
        parts.append(text(LEFT - 6, top + 34, "cases", "end", 11, MUTED))
        for b in kept:
            tall = 20 * count[b] / count.max()
            x = axes.x(b / ECE_BINS)
            title = f"{count[b]} cases, probability {mean[b]:.3f} on average, {right[b]:.0%} right"
            parts.append(box(x + 1, top + 34 - tall, SIDE / ECE_BINS - 2, tall, color(place), title))
            middle = x + SIDE / ECE_BINS / 2
            parts.append(text(middle, top + 31 - tall, str(count[b]), "middle", 10, MUTED))
        points = axes.points(mean[kept], right[kept])
        parts.append(line(points, color(place), 1.4, DASHES[place % len(DASHES)]))
        parts += [marker(place, x, y, 4.5) for x, y in points]
        name = scores.name or "test cases"
        rows.append((marker(place, 0, 0, 4.5), f"{short(name)}{(remarks or {}).get(scores.name, '')}"))
        said += [f"{count[b]} cases at {mean[b]:.2f}: {right[b]:.0%} right" for b in kept]
    below = strip + 44 * len(every) + 14
    parts += legend(LEFT, below, rows)
    label = f"Calibration. {'; '.join(said)}"
    height = below + ROW * len(rows)
    return Chart("Calibration", drawing(LEFT + SIDE + 14, height, label, parts), CALIBRATION)
