"""Pictures of a study: ROC curves, every case's probability, and metrics by fold and seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from featstore.cohort.names import natural_key
from heads.evaluation.metrics import rank_auc
from heads.evaluation.plots import COLORS, DPI, save, shorten
from heads.evaluation.study_results import CasePredictions, StudyResults

NAMED = 120  # up to so many cases have their names below their boxes
SEEDS_NAMED = 10  # up to so many seeds have a line each in a legend
Floats = NDArray[np.float64]
_CASES = "cases, by true class and median (box: quartiles; whiskers: least, largest)"


def plot_study(
    folder: Path, results: StudyResults, seeds: Mapping[int, CasePredictions], whole: CasePredictions | None
) -> list[Path]:
    """Draw what a study found; where nothing is finished, older pictures are removed.

    Args:
        folder: The study's.
        results: What its trainings found.
        seeds: The pooled predictions of every seed.
        whole: The mean over the seeds; None where no training is finished.

    Returns:
        The pictures written.
    """
    drawn: dict[str, Figure | None] = dict.fromkeys(("roc", "case_probabilities", "metrics_by_fold"))
    if whole is not None:
        drawn["roc"] = _roc_figure(results, seeds, whole)
        drawn["case_probabilities"] = _case_figure(results)
        drawn["metrics_by_fold"] = _fold_figure(results)
    written = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            save(figure, path)
            written.append(path)
    return written


def roc(positive: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    """False and true positive rate at every distinct score, from (0, 0) to (1, 1).

    Args:
        positive: (N,), both kinds in it.
        score: (N,).
    """
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(score[order])), len(score) - 1]
    hits = positive[order].cumsum()[last]
    return np.r_[0, (last + 1 - hits) / (~positive).sum()], np.r_[0, hits / positive.sum()]


def _roc_figure(
    results: StudyResults, seeds: Mapping[int, CasePredictions], whole: CasePredictions
) -> Figure | None:
    """One panel of two classes, else one a class against the rest."""
    names, done, wanted = results.class_names, len(results.finished), len(results.trainings)
    what = "test cases of all folds" if done == wanted else f"test cases of {done} of {wanted} trainings"
    together = "ensemble of the seeds" if done == wanted else "ensemble of what is there"
    classes = [1] if len(names) == 2 else range(len(names))
    shown = [c for c in classes if 0 < (whole.labels == c).sum() < len(whole.labels)]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 5.2 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, c in zip(grid, shown, strict=False):
        for number, (seed, each) in enumerate(seeds.items()):
            _curve(axes, each, c, f"seed {seed}", number, len(seeds))
        if len(seeds) > 1:
            _curve(axes, whole, c, together, None, 1)
        axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1.0)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        axes.set_title(f"ROC, {shorten(names[c])} against the rest", fontsize=11, parse_math=False)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.legend(loc="lower right", fontsize=8, title=what)
    for axes in grid[len(shown) :]:
        axes.remove()
    return figure


def _curve(axes: Axes, each: CasePredictions, c: int, name: str, number: int | None, count: int) -> None:
    """The curve of one class, with its AUC; many seeds are grey, with one line in the legend."""
    positive = each.labels == c
    if positive.all() or not positive.any():
        return
    score = each.probabilities[:, c]
    auc = rank_auc(positive.astype(np.int64), np.stack((1 - score, score), axis=1))
    label: str | None = f"{name}: AUC {auc:.3f}"
    color, width = "black", 2.2
    if number is not None:
        color, width = COLORS[number % len(COLORS)][0], 1.2
        if count > SEEDS_NAMED:
            color, label = "0.6", f"{count} seeds" if number == 0 else None
    axes.plot(*roc(positive, score), color=color, linewidth=width, label=label)


def _case_figure(results: StudyResults) -> Figure:
    """The probability of each case's true class over its trainings, a box a case, by class and median."""
    table = results.table
    p = table[results.probability_columns].to_numpy(np.float64)
    own = p[np.arange(len(p)), table["true"].to_numpy(np.int64)]
    found = []
    for case, rows in table.groupby("case_id", sort=False).indices.items():
        values = own[rows]
        right = (table["called"].to_numpy()[rows] == table["true"].to_numpy()[rows]).sum()
        found.append((int(table["true"].iloc[rows[0]]), float(np.median(values)), str(case), values, right))
    found.sort(key=lambda each: (each[0], each[1], natural_key(each[2])))
    width = float(np.clip(3 + 0.17 * len(found), 8.0, 22.0))
    figure = Figure(figsize=(width, 5.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    gap = max(1, len(found) // 100)
    present = sorted({each[0] for each in found})
    handles = []
    for c in present:
        mine = [(i + gap * present.index(c), each) for i, each in enumerate(found) if each[0] == c]
        color = COLORS[c % len(COLORS)][0]
        axes.boxplot(
            [each[3] for _, each in mine], positions=[i for i, _ in mine], widths=0.7, patch_artist=True,
            boxprops={"facecolor": color, "alpha": 0.55, "linewidth": 0.6}, whis=(0, 100),
            medianprops={"color": "black", "linewidth": 1.2}, whiskerprops={"color": color},
            capprops={"color": color}, manage_ticks=False,
        )  # fmt: skip
        handles.append(Line2D([], [], color=color, linewidth=7, alpha=0.55))
    never = [i + gap * present.index(each[0]) for i, each in enumerate(found) if not each[4]]
    names = [f"{shorten(results.class_names[c])}: {sum(e[0] == c for e in found)} cases" for c in present]
    if never:
        marks = axes.plot(never, [-0.04] * len(never), "x", color="black", markersize=5, clip_on=False)
        handles.append(marks[0])
        names.append(f"wrong in every training: {len(never)}")
    legend = figure.legend(handles, [""] * len(names), loc="outside right upper", fontsize=9)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(parse_math=False, text=name)
    if len(results.class_names) == 2:
        axes.axhline(0.5, color="0.35", linestyle="--", linewidth=1.0)
    places = [i + gap * present.index(each[0]) for i, each in enumerate(found)]
    if len(found) <= NAMED:
        size = 8 if len(found) <= 60 else 6
        ids = [shorten(each[2]) for each in found]
        axes.set_xticks(places, ids, rotation=90, fontsize=size, parse_math=False)
    else:
        axes.set_xticks([])
    axes.set(
        xlim=(-1, places[-1] + 1),
        ylim=(-0.07, 1.03),
        xlabel=_CASES,
    )
    axes.set_ylabel("probability of the true class")
    trainings = len(results.finished)
    axes.set_title(f"Test cases over {trainings} trainings")
    return figure


def _fold_figure(results: StudyResults) -> Figure:
    """AUC, accuracy and loss on the test cases of every fold: a point a seed, and their mean."""
    panels = {"auc": "test AUC", "accuracy": "test accuracy", "loss": "test loss (cross-entropy)"}
    folds = sorted({each.fold for each in results.finished})
    seeds = sorted({each.seed for each in results.finished})
    width = float(np.clip(4 + 0.8 * len(folds), 7.0, 16.0))
    figure = Figure(figsize=(width, 8.5), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True)
    many = len(seeds) > SEEDS_NAMED
    for axes, (name, label) in zip(grid, panels.items(), strict=True):
        means: dict[int, list[float]] = {fold: [] for fold in folds}
        for number, seed in enumerate(seeds):
            points = [(each.fold, value) for each in results.finished if each.seed == seed
                      for value in _values(each.results, name)]  # fmt: skip
            for fold, value in points:
                means[fold].append(value)
            color, marker = ("0.55", "o") if many else COLORS[number % len(COLORS)]
            shift = (number - (len(seeds) - 1) / 2) * 0.6 / max(len(seeds), 4)
            title = f"{len(seeds)} seeds" if many else f"seed {seed}"
            axes.plot(
                [folds.index(fold) + shift for fold, _ in points], [value for _, value in points], marker,
                color=color, markersize=5, alpha=0.8, label=title if not many or number == 0 else None,
            )  # fmt: skip
        for place, fold in enumerate(folds):
            if means[fold]:
                mean = float(np.mean(means[fold]))
                axes.hlines(mean, place - 0.38, place + 0.38, color="black", linewidth=1.4, zorder=0)
        axes.plot([], [], color="black", linewidth=1.4, label="mean of the seeds")
        axes.set_ylabel(label)
        axes.grid(visible=True, axis="y", color="0.9", linewidth=0.8)
        axes.set_xlim(-0.6, len(folds) - 0.4)
    grid[-1].set_xticks(range(len(folds)), [str(fold) for fold in folds])
    grid[-1].set_xlabel("fold")
    grid[0].set_title("Best epoch on the test cases, by fold and seed")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    return figure


def _values(results: dict[str, object] | None, name: str) -> list[float]:
    """The metric of one training, or nothing where it is undefined."""
    test = (results or {}).get("test")
    value = test.get(f"test_{name}") if isinstance(test, dict) else None
    return [] if value is None else [float(value)]
