"""Charts of trainings: their curves, and a study's metrics by split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from heads.evaluation.plots import MARKED, WIDE, Floats
from heads.inspect.report.content import Chart
from heads.inspect.report.svg import (
    DOTTED,
    INK,
    LEFT,
    PALE,
    ROW,
    SIDE,
    TOP,
    Axes,
    color,
    drawing,
    legend,
    line,
    marker,
    round_ticks,
    short,
    stroke_symbol,
    text,
)

PARTS = {"train": ("training", 0, ""), "val": ("validation", 1, "6 3")}

CURVES = {
    "cross_entropy": (
        "Loss",
        "cross-entropy",
        "How surprised the model is by the truth: lower is better. The weights are those of the epoch with "
        "the least validation loss; training falling while validation rises is overfitting.",
    ),
    "accuracy": ("Accuracy", "accuracy", "The share of cases called right after each epoch."),
    "auc": ("AUC", "AUC", "How well cases are ranked after each epoch; 0.5 is chance."),
}


def training_charts(history: pd.DataFrame, best_epoch: int) -> tuple[Chart, ...]:
    """Loss, accuracy and AUC over the epochs, the best epoch marked.

    Args:
        history: As in ``history.csv``; any column may be absent, any value NaN.
        best_epoch: Its number, from 1.
    """
    return tuple(_curve(history, name, best_epoch) for name in CURVES)


def column(history: pd.DataFrame, name: str) -> Floats:
    """(epochs,) as numbers; NaN where the column is absent or a value is not finite."""
    if name not in history:
        return np.full(len(history), np.nan)
    values = pd.to_numeric(history[name], errors="coerce").to_numpy(dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _curve(history: pd.DataFrame, name: str, best_epoch: int) -> Chart:
    title, y_label, explanation = CURVES[name]
    epoch = column(history, "epoch")
    found = {part: column(history, f"{part}_{name}") for part in PARTS}
    drawn = {part: values for part, values in found.items() if np.isfinite(values + epoch).any()}
    if not drawn:
        return Chart(title, explanation=explanation, note=f"The run's history has no {y_label}.")
    lowest = min(float(np.nanmin(values)) for values in drawn.values())
    highest = max(float(np.nanmax(values)) for values in drawn.values())
    axes = _axes(
        float(np.nanmin(epoch)), float(np.nanmax(epoch)), lowest, highest, share=name != "cross_entropy"
    )
    parts = axes.frame("epoch", y_label, x_ticks=_whole(axes.x_limits))
    rows = [_best_row(axes, parts, best_epoch)]
    for part, values in drawn.items():
        label, index, dash = PARTS[part]
        kept = np.isfinite(values + epoch)
        points = axes.points(epoch[kept], values[kept])
        parts.append(line(points, color(index), 2, dash))
        if len(points) <= MARKED:
            parts += [marker(index, x, y, 2.6) for x, y in points]
        rows.append((stroke_symbol(color(index), dash), label))
    below = axes.top + axes.height + 58
    parts += legend(axes.left, below, rows)
    said = "; ".join(f"{PARTS[p][0]} ends at {v[np.isfinite(v)][-1]:.3f}" for p, v in drawn.items())
    picture = drawing(
        axes.left + axes.width + 14, below + ROW * len(rows), f"{title} by epoch. {said}", parts
    )
    return Chart(title, picture, explanation)


def _best_row(axes: Axes, parts: list[str], best_epoch: int) -> tuple[str, str]:
    x = axes.x(best_epoch)
    parts.append(line([(x, axes.top), (x, axes.top + axes.height)], INK, 1.2, DOTTED))
    return stroke_symbol(INK, DOTTED, 1.2), f"best epoch: {best_epoch}"


def _axes(first: float, last: float, lowest: float, highest: float, share: bool) -> Axes:
    air = max(0.5, 0.02 * (last - first))
    if share:
        y_limits, log = (0.0, 1.02), False
    else:
        log = 0 < WIDE * lowest < highest
        room = 0.05 * (highest - lowest) or 0.5
        y_limits = (lowest / 1.2, highest * 1.2) if log else (max(0.0, lowest - room), highest + room)
    return Axes(LEFT, TOP, SIDE, 200, (first - air, last + air), y_limits, log)


def _whole(limits: tuple[float, float]) -> list[float]:
    """Whole numbers alone."""
    ticks = [tick for tick in round_ticks(*limits) if tick == int(tick)]
    return ticks or [float(int(limits[1]))]


def validation_chart(histories: Mapping[str, pd.DataFrame]) -> Chart:
    """The validation loss of every training of a study.

    Args:
        histories: By the training's name.
    """
    title = "Validation loss of every training"
    explanation = (
        "Each line is a training. Lines that do not come down together depend on the split or the seed."
    )
    found = {}
    for name, history in histories.items():
        epoch, loss = column(history, "epoch"), column(history, "val_cross_entropy")
        kept = np.isfinite(epoch + loss)
        if kept.any():
            found[name] = (epoch[kept], loss[kept])
    if not found:
        return Chart(
            title, explanation=explanation, note="The trainings' histories have no validation loss."
        )
    epochs, losses = (np.concatenate([each[i] for each in found.values()]) for i in (0, 1))
    axes = _axes(
        float(epochs.min()), float(epochs.max()), float(losses.min()), float(losses.max()), share=False
    )
    parts = axes.frame("epoch", "validation loss", x_ticks=_whole(axes.x_limits))
    width = 1.6 if len(found) <= 10 else 0.9
    parts += [line(axes.points(*each), color(0), width) for each in found.values()]
    label = f"Validation loss by epoch of {len(found)} trainings, least {losses.min():.3f}"
    return Chart(title, drawing(340, 258, label, parts), explanation)


def split_chart(values: Mapping[int, Sequence[float]], name: str) -> Chart:
    """A metric of every training, by split: a point a seed, and least, median and largest.

    Args:
        values: By fold, of its trainings; empty where none is defined.
        name: Of the metric.
    """
    title = f"{name} by split"
    explanation = (
        "Each point is a training's test result; the bar is the median of the split. Differences between "
        "the columns come from which cases are in the test, those within a column from chance in training."
    )
    drawn = {fold: sorted(each) for fold, each in values.items() if each}
    if not drawn:
        return Chart(title, explanation=explanation, note=f"{name} is undefined in every training.")
    width = max(150.0, 44.0 * len(values))
    axes = Axes(LEFT, TOP, width, 200, (-0.5, len(values) - 0.5), (0.0, 1.02))
    parts = axes.frame("fold", name, x_ticks=[])
    for place, fold in enumerate(values):
        parts.append(text(axes.x(place), 227, short(str(fold), 6), "middle", 11))
        if fold not in drawn:
            continue
        mine, x = drawn[fold], axes.x(place)
        parts.append(line([(x, axes.y(mine[0])), (x, axes.y(mine[-1]))], PALE, 1.2))
        parts += [marker(0, x, axes.y(value), 3.2) for value in mine]
        middle = axes.y(mine[(len(mine) - 1) // 2])
        parts.append(line([(x - 9, middle), (x + 9, middle)], INK, 2.4))
    said = "; ".join(f"fold {fold}: {each[0]:.3f} to {each[-1]:.3f}" for fold, each in drawn.items())
    return Chart(title, drawing(axes.left + width + 14, 256, f"{title}. {said}", parts), explanation)
