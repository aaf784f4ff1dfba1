"""Pictures of a training: its curves; `case_plots.py` draws its cases.

Everything is drawn on ``Figure`` objects without pyplot, which keeps global state and picks a screen.
Colours are Okabe & Ito's (2008), safe for the colour-blind; training is solid, validation dashed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from featstore.cohort.tables import printable
from featstore.files import replacing

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DPI = 150
COLORS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
          ("#56B4E9", "P"))  # fmt: skip
PARTS = {"train": ("training", "-"), "val": ("validation", "--")}
LEVELS = ("patch", "slice", "stain", "selection")
TERMS = ("entropy_penalty", "confidence_penalty", "elastic_net_penalty", "aux_loss")
MARKED = 40  # up to so many points of a curve get a marker, and so many cases their names
WIDE = 50.0  # from this ratio of its largest to its least value, a panel is logarithmic
NAME_LENGTH = 24
_ONE_AT_A_TIME = threading.Lock()  # two threads in `catch_warnings` can leave a filter behind


class _Line(NamedTuple):
    """A column of the history and how it is drawn."""

    column: str
    label: str
    color: str = COLORS[0][0]
    style: str = "-"
    marker: str = "o"
    width: float = 1.8


class _Panel(NamedTuple):
    """One pair of axes; logarithmic always, or where values are positive and wide apart; or 0 to 1."""

    label: str
    lines: Sequence[_Line]
    scale: Literal["linear", "log", "auto", "share"] = "linear"


def plot_history(history: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the curves of a training, as many as its columns allow.

    A picture for which there is no finite value is not written, and an older one of its name is removed,
    so that no folder mixes the curves of two trainings.

    Args:
        history: One row an epoch, numbered from 1 in ``epoch``; every other column may be absent, and
            any value NaN. Unknown columns are passed over.
        folder: Created if need be.

    Returns:
        The pictures written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _history_figures(history):
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        save(figure, path)
        written.append(path)
    return written


def _both(name: str, label: str = "", width: float = 1.8) -> list[_Line]:
    return [
        _Line(f"{part}_{name}", label + text, color, style, marker, width)
        for (part, (text, style)), (color, marker) in zip(PARTS.items(), COLORS[:2], strict=True)
    ]


def _levels(name: str) -> list[_Line]:
    """An attention statistic's lines, a colour and a marker a level."""
    return [
        _Line(f"{part}_{name}_{level}", f"{level}, {text}", color, style, marker)
        for level, (color, marker) in zip(LEVELS, COLORS, strict=False)
        for part, (text, style) in PARTS.items()
    ]


def _column(history: pd.DataFrame, name: str) -> Floats:
    """(epochs,) as numbers; NaN where the column is absent or a value is not finite."""
    if name not in history:
        return np.full(len(history), np.nan)
    values = pd.to_numeric(history[name], errors="coerce").to_numpy(dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _figure(history: pd.DataFrame, title: str, panels: Sequence[_Panel]) -> Figure | None:
    """The panels that have a finite value one below the other, or None where none has."""
    drawn = [p for p in panels if any(np.isfinite(_column(history, line.column)).any() for line in p.lines)]
    if not drawn:
        return None
    # Eight lines a panel leave no room for a legend in it: one for all then stands at the right.
    outside = len(drawn[0].lines) > 4
    height = 4.5 if len(drawn) == 1 else 0.7 + 2.4 * len(drawn)
    figure = Figure(figsize=(9.0 if outside else 7.5, height), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    for axes, panel in zip(grid, drawn, strict=True):
        _draw(axes, history, panel)
        if not outside:
            axes.legend()
    grid[0].set_title(title)
    grid[-1].set_xlabel("epoch")
    if outside:
        found = {line.get_label(): line for axes in grid for line in axes.lines}
        figure.legend(handles=list(found.values()), loc="outside right upper")
    return figure


def _draw(axes: Axes, history: pd.DataFrame, panel: _Panel) -> None:
    """Draw those of a panel's lines that have a finite value."""
    epoch, least, largest = _column(history, "epoch"), np.inf, -np.inf
    for line in panel.lines:
        values = _column(history, line.column)
        if np.isnan(values).all():
            continue
        least, largest = min(least, np.nanmin(values)), max(largest, np.nanmax(values))
        axes.plot(
            epoch, values, color=line.color, linestyle=line.style, linewidth=line.width, label=line.label,
            marker=line.marker, markersize=2 + line.width, markevery=_marked(values),
            markerfacecolor="white" if line.style == "--" else line.color,
        )  # fmt: skip
    if (panel.scale == "log" and largest > 0) or (panel.scale == "auto" and 0 < WIDE * least < largest):
        axes.set_yscale("log")
    if panel.scale == "share":
        axes.set_ylim(-0.02, 1.02)
    # One epoch has no extent: half an epoch of air at both ends, and ticks at whole numbers only.
    first, last = np.nanmin(epoch), np.nanmax(epoch)
    air = max(0.5, 0.02 * (last - first))
    axes.set(ylabel=panel.label, xlim=(first - air, last + air))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=True, color="0.9", linewidth=0.8)


def _marked(values: Floats) -> list[int]:
    """Which points get a marker: all of a few, else those that no line reaches, alone between gaps."""
    finite = np.isfinite(values)
    if finite.sum() > MARKED:
        beside = np.pad(finite, 1)
        finite = finite & ~beside[:-2] & ~beside[2:]
    return [int(index) for index in np.flatnonzero(finite)]


def _loss_figure(history: pd.DataFrame) -> Figure | None:
    """Cross-entropy and objective; the epoch of the least validation cross-entropy marked."""
    lines = _both("cross_entropy", "cross-entropy, ") + _both("loss", "objective, ", width=0.8)
    figure = _figure(history, "Loss", [_Panel("loss", lines, "auto")])
    loss = _column(history, "val_cross_entropy")
    if figure is not None and np.isfinite(loss).any():
        epoch = _column(history, "epoch")[np.nanargmin(loss)]
        label = f"best epoch: {epoch:.0f} ({np.nanmin(loss):.3g})"
        figure.axes[0].axvline(epoch, color="0.35", linestyle=":", linewidth=1.4, label=label)
        figure.axes[0].legend()
    return figure


def _rate_figure(history: pd.DataFrame) -> Figure | None:
    """Learning rate, and the temperature on an axis of its own at the right."""
    rate = _Panel("learning rate", [_Line("lr", "learning rate")], "log")
    heat = _Panel("temperature", [_Line("temperature", "temperature", COLORS[1][0], "--", "s")])
    figure = _figure(history, "Learning rate", [rate])
    if figure is None:
        return _figure(history, "Temperature", [heat])
    if np.isfinite(_column(history, "temperature")).any():
        left = figure.axes[0]
        right = left.twinx()
        _draw(right, history, heat)
        right.grid(visible=False)
        left.set_title("Learning rate and temperature")
        left.legend(handles=[*left.lines, *right.lines])
    return figure


def _history_figures(history: pd.DataFrame) -> Iterator[tuple[str, Figure | None]]:
    """Name of the picture and its figure, None where there is nothing to draw; one held at a time."""
    yield "model_loss", _loss_figure(history)
    yield "model_accuracy", _figure(history, "Accuracy", [_Panel("accuracy", _both("accuracy"), "share")])
    yield "model_auc", _figure(history, "Area under the ROC curve", [_Panel("AUC", _both("auc"), "share")])
    terms = [_Panel(term.replace("_", " "), _both(term), "auto") for term in TERMS]
    yield "loss_terms", _figure(history, "Terms of the objective besides cross-entropy", terms)
    yield "learning_rate", _rate_figure(history)
    norm = _Panel("gradient norm", [_Line("grad_norm", "training")], "auto")
    variance = _Panel("variance of batch losses", _both("batch_loss_variance"), "auto")
    yield "gradient_norm", _figure(history, "Batches", [norm, variance])
    entropy = _Panel("entropy H (nats)", _levels("attention_entropy"))
    effective = _Panel("effective instances exp(H)", _levels("effective_instances"), "auto")
    largest = _Panel("largest weight", _levels("top1_attention"), "share")
    yield "attention", _figure(history, "Attention", [entropy, effective, largest])


def shorten(name: str) -> str:
    """A name of the user's as one short line of printable text; its end is kept, where ids differ."""
    text = printable(str(name)).replace("\n", "\\n")
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 9]}…{text[-8:]}"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG aside and move it into place, with a box for every letter that the font lacks."""
    with replacing(path) as aside, _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(aside, dpi=DPI, format="png", backend="agg")
