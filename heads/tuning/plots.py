"""Pictures of an outer fold's trials, in the manner of `heads.evaluation.plots`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from heads.evaluation.plots import COLORS, DPI, save, shorten
from heads.tuning.findings import OuterFindings, TrialRow
from heads.tuning.space import Space

Floats = NDArray[np.float64]
_LEAST = 10  # finished trials below which a forest of trees tells nothing
_SHOWN = {"val_loss": "validation log loss", "val_auc": "validation AUC"}
_CLIP = 95  # per cent: beyond, a diverging trial would press all others into a line


def plot_trials(
    folder: Path, found: OuterFindings, study: optuna.Study, space: Space, objective: str
) -> list[str]:
    """Draw ``history``, ``importance``, ``parallel`` and ``slices``; what cannot be drawn is removed.

    Args:
        folder: Where to.
        found: The trials.
        study: The same, for the importances.
        space: What was searched over.
        objective: ``val_loss`` or ``val_auc``.

    Returns:
        What is not drawn though there are trials enough, and why.
    """
    rows = [row for row in found.trials if row.state == "finished" and row.value is not None]
    minimize = study.direction == optuna.study.StudyDirection.MINIMIZE
    shares = importances(study) if len(rows) >= _LEAST else {}
    drawn: dict[str, Callable[[], Figure | None]] = {
        "history": lambda: _history(found.trials, objective, minimize) if rows else None,
        "importance": lambda: _importance(shares) if shares else None,
        "parallel": lambda: _parallel(rows, space, objective, minimize) if len(rows) > 1 else None,
        "slices": lambda: _slices(found.trials, space, objective, found.best) if rows else None,
    }
    for name, draw in drawn.items():
        path, figure = folder / f"{name}.png", draw()
        path.unlink(missing_ok=True)
        if figure is not None:
            save(figure, path)
    if shares or len(rows) < _LEAST:
        return []
    return [
        "importance.png is not drawn: no setting that all finished trials have tells their values apart"
    ]


def _values(rows: Sequence[TrialRow]) -> Floats:
    return np.array([np.nan if row.value is None else row.value for row in rows], np.float64)


def _limits(values: Floats, minimize: bool) -> tuple[float, float]:
    """The range that is shown: the worst few do not count."""
    kept = values[np.isfinite(values)]
    low, high = kept.min(), kept.max()
    if minimize:
        high = max(np.percentile(kept, _CLIP), low)
    else:
        low = min(np.percentile(kept, 100 - _CLIP), high)
    air = 0.06 * (high - low) or 0.05
    return float(low - air), float(high + air)


def _history(rows: Sequence[TrialRow], objective: str, minimize: bool) -> Figure:
    """Values by trial, the best so far, pruned and failed ones marked."""
    figure = Figure(figsize=(8.0, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    number, value = np.array([row.number for row in rows]), _values(rows)
    state = np.array([row.state for row in rows])
    done = state == "finished"
    limits = _limits(value[done], minimize)
    running = (np.minimum if minimize else np.maximum).accumulate(
        np.where(done, value, np.inf if minimize else -np.inf)
    )
    seen = np.isfinite(running)
    axes.step(number[seen], running[seen], where="post", color="black", linewidth=1.6, label="best so far")
    for name, (color, marker), filled in (
        ("finished", COLORS[0], True),
        ("pruned", COLORS[1], False),
    ):
        mine = (state == name) & np.isfinite(value)
        if mine.any():
            inside = np.clip(value[mine], *limits)
            axes.scatter(
                number[mine], inside, s=26, marker=marker, edgecolors=color,
                facecolors=color if filled else "white",
                label=f"{name} ({(state == name).sum()})", zorder=3,
            )  # fmt: skip
    if (failed := state == "failed").any():
        edge = np.full(failed.sum(), limits[1] if minimize else limits[0])
        axes.scatter(number[failed], edge, s=40, marker="x", color="0.35", label=f"failed ({failed.sum()})")
    beyond = int(((value < limits[0]) | (value > limits[1])).sum())
    axes.set(xlabel="trial", ylabel=_SHOWN[objective], ylim=_wider(limits))
    axes.set_title("Trials" + (f" (drawn at the edge, and beyond it: {beyond})" if beyond else ""))
    _grid(axes)
    axes.legend()
    return figure


def _wider(limits: tuple[float, float]) -> tuple[float, float]:
    air = 0.03 * (limits[1] - limits[0])
    return limits[0] - air, limits[1] + air


def _grid(axes: Axes) -> None:
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def importances(study: optuna.Study) -> dict[str, float]:
    """Each setting's share of the objective's variance (fANOVA: Hutter et al. 2014), the largest first.

    Only settings that every finished trial has can be told apart; empty where none of them does, or the
    values do not differ.

    Args:
        study: With finished trials.
    """
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len({trial.value for trial in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # no tree of the forest has found anything to part the trials by
        return {}
    return {name: float(value) for name, value in found.items()}


def _importance(found: Mapping[str, float]) -> Figure:
    figure = Figure(figsize=(7.5, 1.3 + 0.42 * len(found)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names, shares = list(found)[::-1], list(found.values())[::-1]
    bars = axes.barh(names, shares, color=COLORS[0][0], height=0.65)
    axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=3)
    axes.set(xlabel="share of the variance between finished trials (fANOVA)", xlim=(0, 1.08))
    axes.set_title("What the objective depends on, over the whole space")
    axes.grid(visible=True, axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def _scale(path: str, space: Space, rows: Sequence[TrialRow]) -> tuple[Floats, list[tuple[float, str]]]:
    """Where on 0 … 1 each row's value of a setting lies (NaN: it has none), and the axis' ticks."""
    given = [row.settings.get(path) for row in rows]
    own = next((each for each in space.dimensions if each.path == path), None)
    if own is None or own.choices:
        choices = list(space.heads) if own is None else list(own.choices)
        places = np.linspace(0.0, 1.0, len(choices)) if len(choices) > 1 else np.array([0.5])
        at = {str(choice): float(place) for choice, place in zip(choices, places, strict=True)}
        drawn = [at.get(str(value), np.nan) if path in row.settings else np.nan
                 for value, row in zip(given, rows, strict=True)]  # fmt: skip
        return np.array(drawn, np.float64), [(place, shorten(name)) for name, place in at.items()]
    low, high = (np.log10(own.low), np.log10(own.high)) if own.log else (own.low, own.high)
    width = (high - low) or 1.0
    raw = np.array([np.nan if value is None else float(value) for value in given], np.float64)
    at01 = ((np.log10(raw) if own.log else raw) - low) / width
    ticks = [(place, f"{_number(low + place * (high - low), own.log):.3g}") for place in (0.0, 0.5, 1.0)]
    return at01, ticks


def _number(value: float, log: bool) -> float:
    return float(10**value) if log else float(value)


def _parallel(rows: Sequence[TrialRow], space: Space, objective: str, minimize: bool) -> Figure:
    """A line a finished trial through its settings to its value; the best in colour, on top."""
    value, paths = _values(rows), space.paths
    low, high = _limits(value, minimize)
    norm = Normalize(low, high, clip=True)
    colors = "viridis_r" if minimize else "viridis"
    figure = Figure(figsize=(max(6.5, 1.5 * len(paths) + 2.5), 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    scales = [_scale(path, space, rows) for path in paths]
    at = np.stack([place for place, _ in scales], axis=1)
    mapped = ScalarMappable(norm, colors)
    order = np.argsort(-value if minimize else value, kind="stable")
    for rank, i in enumerate(order):
        best = rank == len(order) - 1
        axes.plot(
            np.arange(len(paths)), at[i], color=COLORS[1][0] if best else mapped.to_rgba(value[i]),
            linewidth=2.6 if best else 0.9, alpha=1.0 if best else 0.7,
            marker="o" if best or np.isnan(at[i]).any() else None, markersize=4 if best else 2.5,
        )  # fmt: skip
    for x, (_, ticks) in enumerate(scales):
        axes.axvline(x, color="0.5", linewidth=0.8, zorder=0)
        for place, text in ticks:
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            axes.text(x + 0.04, place, text, fontsize=8, va="center", parse_math=False, bbox=box)
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.3, len(paths) - 0.4), yticks=[])
    axes.set_xticks(range(len(paths)), [path.replace(".", ".\n", 1) for path in paths], fontsize=8)
    axes.set_title(f"Finished trials; the best, {value[order[-1]]:.4g}, thick")
    figure.colorbar(mapped, ax=axes, label=_SHOWN[objective], pad=0.01)
    return figure


def _slices(rows: Sequence[TrialRow], space: Space, objective: str, best: int | None) -> Figure:
    """The objective against every setting, one panel each."""
    shown = [row for row in rows if row.state in ("finished", "pruned") and row.value is not None]
    value = _values(shown)
    done = np.array([row.state == "finished" for row in shown])
    limits = _limits(value[done], objective == "val_loss")
    paths = space.paths
    columns = min(4, len(paths))
    height = -(-len(paths) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.9 * height + 0.5), dpi=DPI, layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False, sharey=True).ravel()
    for number, (axes, path) in enumerate(zip(grid, paths, strict=False)):
        at, ticks = _scale(path, space, shown)
        for mine, (color, marker), name in ((done, COLORS[0], "finished"), (~done, COLORS[1], "pruned")):
            axes.scatter(
                at[mine], np.clip(value[mine], *limits), s=16, marker=marker, edgecolors=color,
                facecolors=color if name == "finished" else "white", label=name, linewidths=0.8,
            )  # fmt: skip
        for i, row in enumerate(shown):
            if row.number == best and row.outer == shown[0].outer:
                axes.scatter(at[i], value[i], s=120, marker="*", color="black", label="best", zorder=4)
        axes.set(xlabel=path, xlim=(-0.08, 1.08), ylim=_wider(limits))
        axes.set_xticks([place for place, _ in ticks], [_tick(text) for _, text in ticks], fontsize=8)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        if number % columns == 0:
            axes.set_ylabel(_SHOWN[objective])
    for axes in grid[len(paths) :]:
        axes.remove()
    handles = {text: line for line, text in zip(*grid[0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return figure


def _tick(text: Any) -> str:
    return str(text).replace("$", r"\$")
