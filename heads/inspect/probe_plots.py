"""Plots of probing: what patches say alone, attention against effect, deletion and insertion curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heads.evaluation.plots import COLORS, DPI, shorten
from heads.inspect.probe_tables import ProbeTables

_POINTS = 20_000  # drawn of a scatter, evenly chosen
_DASH = {"attention": "-", "effect": "--", "alone": "-.", "random": ":"}
_ORDER = {
    "attention": "by attention",
    "effect": "by the effect of leaving one out",
    "alone": "by what each says alone",
    "random": "at random",
}


def alone_figure(tables: ProbeTables, class_names: Sequence[str], mode: str = "alone") -> Figure:
    """How probable each class is by single patches, by the true class of their cases.

    Args:
        tables: Of a run.
        class_names: In config order; of two, the second alone is drawn.
        mode: ``alone`` or ``in_place``.
    """
    shown = class_names[1:] if len(class_names) == 2 else class_names
    true = tables.patches["case_id"].map(tables.cases.set_index("case_id")["true_label"])
    figure = Figure(figsize=(min(16.0, 2.0 + 4.6 * len(shown)), 4.2), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False)[0]
    what = "alone" if mode == "alone" else "in the place of its slice"
    for axes, name in zip(grid, shown, strict=True):
        for c, label in enumerate(class_names):
            mine = tables.patches[f"{mode}_{name}"][true == label].to_numpy()
            if not mine.size:
                continue
            color = COLORS[c % len(COLORS)][0]
            weights = np.full(mine.size, 100 / mine.size)
            axes.hist(
                mine, bins=40, range=(0, 1), weights=weights, histtype="step", linewidth=2, color=color,
                linestyle=("-", "--", "-.", ":")[c % 4], label=f"{shorten(label)}: {mine.size:,} patches",
            )  # fmt: skip
        axes.set(xlim=(0, 1), ylabel="patches of the class's cases (%)")
        axes.set_xlabel(f"probability of {shorten(name)} by one patch {what}", parse_math=False)
        _legend(axes, "true class of the case")
    figure.suptitle("What single patches say")
    return figure


def effect_figure(tables: ProbeTables) -> Figure:
    """Every patch's attention against the effect of leaving it out on the class its case is called."""
    patches, cases = tables.patches, tables.cases
    called = patches["case_id"].map(cases.set_index("case_id")["predicted_label"]).to_numpy()
    effect = np.full(len(patches), np.nan)
    for name in dict.fromkeys(called):
        mine = called == name
        effect[mine] = patches[f"effect_{name}"].to_numpy()[mine]
    size = patches["case_id"].map(cases.set_index("case_id")["patches"]).to_numpy(np.float64)
    times = np.maximum(patches["effective_attention"].to_numpy(np.float64) * size, 1e-6)
    kept = np.unique(np.linspace(0, len(patches) - 1, min(len(patches), _POINTS)).astype(np.int64))
    figure = Figure(figsize=(7.5, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot(times[kept], effect[kept], ".", color=COLORS[0][0], markersize=3, alpha=0.5, rasterized=True)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.axvline(1, color="0.25", linestyle="--", linewidth=1.2, label="equal shares")
    largest = np.nanmax(np.abs(effect)) if np.isfinite(effect).any() else 0.0
    axes.set_xscale("log")
    if largest > 0:
        axes.set_yscale("symlog", linthresh=largest / 1e3)
    axes.set(xlabel="effective attention × patches of the case")
    axes.set_ylabel("probability of the called class\nwith the patch, less that without it")
    some = "" if len(kept) == len(patches) else f" ({len(kept):,} of {len(patches):,} drawn)"
    axes.set_title(f"Attention against effect, patch by patch{some}")
    axes.legend(fontsize=9)
    return figure


def curves_figure(table: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Deletion and insertion curves, mean over the cases, a line an order.

    Args:
        table: As `heads.inspect.curve_tables.read_curves`.
        summary: As `heads.inspect.curve_tables.area_summary`.
    """
    figure = Figure(figsize=(10.0, 4.4), dpi=DPI, layout="constrained")
    titles = {"deletion": "Patches taken away", "insertion": "These patches alone"}
    areas = summary.set_index(["order", "kind"])["area"]
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for i, order in enumerate(dict.fromkeys(table["order"])):
            mine = table[(table["order"] == order) & (table["kind"] == kind)]
            mean = mine.groupby("fraction")["probability"].mean()
            label = f"{_ORDER.get(order, order)}: area {areas[order, kind]:.3f}"
            color, dash = COLORS[i % len(COLORS)][0], _DASH.get(order, "-")
            axes.plot(100 * mean.index.to_numpy(), mean.to_numpy(), dash, color=color, label=label)
        axes.set(xlim=(0, 100), ylim=(0, 1.02), title=title, xlabel="patches, most important first (%)")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("mean probability of the called class")
    return figure


def _legend(axes: Axes, title: str) -> None:
    legend = axes.legend(fontsize=9, title=title, title_fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
