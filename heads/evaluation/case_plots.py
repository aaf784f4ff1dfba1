"""Pictures of a run's cases: the confusion matrix, and how far each case is from right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heads.evaluation.plots import COLORS, DPI, MARKED, Floats, Ints, save, shorten


def plot_confusion(matrix: Ints, class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix: counts, and below them the share of the true class.

    Args:
        matrix: (C, C), how many cases of the row's true class got the column's class.
        class_names: C names in config order.
        path: The PNG to write.

    Raises:
        ValueError: Shapes that do not belong together.
    """
    save(_confusion_figure(matrix, class_names), path)


def plot_deviation(
    case_ids: Sequence[str],
    true: Ints,
    probabilities: Floats,
    class_names: Sequence[str],
    path: Path,
    threshold: float | None = None,
) -> None:
    """Draw 1 − p of the true class for every case, by class and in rising order, the wrong ones marked.

    Wrong is a case whose most probable class, the first of equals, is not the true one; with a
    threshold, one on the wrong side of it. Of two classes a dashed line shows from where on that is.

    Args:
        case_ids: N names, shown where there are at most 40.
        true: (N,) class indices in config order.
        probabilities: (N, C).
        class_names: C names in config order.
        path: The PNG to write.
        threshold: Of two classes, the probability of the second from which on it is called; None: the
            most probable class is called.

    Raises:
        ValueError: Shapes that do not belong together.
    """
    save(_deviation_figure(case_ids, true, probabilities, class_names, threshold), path)


def _confusion_figure(matrix: Ints, class_names: Sequence[str]) -> Figure:
    counts, names, classes = np.asarray(matrix), [*map(shorten, class_names)], len(class_names)
    if counts.shape != (classes, classes) or not classes:
        raise ValueError(f"confusion matrix {counts.shape}, {classes} class names: no match")
    total = counts.sum(axis=1, keepdims=True)
    share = 100 * counts / np.maximum(total, 1)
    side = float(np.clip(1.1 * classes, 3.2, 14.0))
    cell = 72 * side / classes  # points
    figure = Figure(figsize=(side + 2.4, side + 1.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    size = float(np.clip(cell / 4.5, 3, 13))
    for (row, column), percent in np.ndenumerate(share):
        text = f"{counts[row, column]}\n" + (f"{percent:.0f} %" if total[row, 0] else "–")
        ink = "black" if percent > 50 else "white"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=size)
    ticks, size = range(classes), float(np.clip(cell / 2.5, 5, 10))
    steep = max(map(len, names)) * 0.6 * size > cell
    axes.set_xticks(
        ticks, names, fontsize=size, parse_math=False, rotation_mode="anchor",
        rotation=45 if steep else 0, ha="right" if steep else "center",
    )  # fmt: skip
    axes.set_yticks(ticks, names, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"Confusion matrix, {counts.sum()} cases")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.9)
    return figure


def _deviation_figure(
    case_ids: Sequence[str],
    true: Ints,
    probabilities: Floats,
    class_names: Sequence[str],
    threshold: float | None = None,
) -> Figure:
    label, p, classes = np.asarray(true), np.asarray(probabilities, dtype=np.float64), len(class_names)
    n = len(case_ids)
    if label.shape != (n,) or p.shape != (n, classes) or not n:
        raise ValueError(f"{n} case ids, labels {label.shape}, probabilities {p.shape}, {classes} classes")
    called = p.argmax(axis=1) if threshold is None else p[:, 1] >= threshold
    deviation, wrong = 1 - p[np.arange(n), label], called != label
    # By class, then rising; between two classes some air.
    order = np.lexsort((deviation, label))
    present, place = np.unique(label), np.empty(n)
    place[order] = np.arange(n) + max(1, n // 100) * np.searchsorted(present, label[order])
    figure = Figure(figsize=(float(np.clip(4.5 + 0.16 * n, 8.0, 15.0)), 5.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    size, names = float(np.clip(400 / n, 2.5, 7)), []
    for c in present:
        mine, (color, marker) = label == c, COLORS[c % len(COLORS)]
        axes.vlines(place[mine], 0, deviation[mine], color=color, linewidth=size / 2)
        axes.plot(place[mine], deviation[mine], marker, color=color, markersize=size)
        names.append(f"{shorten(class_names[c])}: {wrong[mine].sum()} of {mine.sum()} wrong")
    if wrong.any():
        axes.plot(place[wrong], deviation[wrong], "x", color="black", markersize=size + 3)
        names.append("wrong")
    # A class named "_x" as a line's label would be left out of the legend, so the texts are set after.
    blank, columns = [""] * len(names), 1 + len(names) // 20
    legend = figure.legend(axes.lines[:], blank, loc="outside right upper", ncols=columns, fontsize=9)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(parse_math=False, text=name)
    if classes == 2:
        _draw_limits(axes, [place[label == c] for c in (0, 1)], threshold)
    shown = order if n <= MARKED else order[:0]
    ids = [shorten(case_ids[i]) for i in shown]
    axes.set_xticks(place[shown], ids, rotation=90, fontsize=8, parse_math=False)
    axes.set(xlim=(-1, place.max() + 1), ylim=(0, 1.05), title="Deviation from the true class")
    axes.set(xlabel="cases, by true class", ylabel="1 − probability of the true class")
    return figure


def _draw_limits(axes: Axes, places: Sequence[Floats], threshold: float | None) -> None:
    """Lines above which a case is wrong: one for both classes, or with a threshold one for each."""
    if threshold is None:
        axes.axhline(0.5, color="0.35", linestyle="--", linewidth=1.2)
        return
    for mine, limit in zip(places, (threshold, 1 - threshold), strict=True):
        if mine.size:
            reach = [mine.min() - 0.5, mine.max() + 0.5]
            axes.plot(reach, [limit, limit], color="0.35", linestyle="--", linewidth=1.2)
