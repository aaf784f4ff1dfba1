"""Plots of attention: of the stains over all cases, and of one case's slices and patches.

No torch in this file: pictures are drawn by processes of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heads.evaluation.plots import COLORS, DPI, shorten

_BARS = 60  # slices of a stain that are drawn one by one; of more, the most attended
_UNIFORM: dict[str, Any] = {"color": "0.25", "linestyle": "--", "linewidth": 1.2}


def stain_figure(stains: pd.DataFrame, cases: pd.DataFrame) -> Figure:
    """The attention of every stain over the cases, by true class: a box, and a point a case.

    Args:
        stains: As `AttentionTables.stains`.
        cases: As `AttentionTables.cases`.
    """
    known = stains.merge(cases[["case_id", "true_label"]], on="case_id")
    names, there = list(dict.fromkeys(known["stain"])), set(cases["true_label"])
    columns = [column for column in map(str, cases.columns) if column.startswith("prob_")]
    classes = [name for name in (c.removeprefix("prob_") for c in columns) if name in there]
    wide = float(np.clip(3.0 + 1.1 * len(names) * len(classes), 6.0, 16.0))
    figure = Figure(figsize=(wide, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)  # the points' places beside one another, the same in every run
    step = 0.8 / max(1, len(classes))
    for c, true in enumerate(classes):
        color, marker = COLORS[c % len(COLORS)]
        for s, stain in enumerate(names):
            mine = known[(known["stain"] == stain) & (known["true_label"] == true)]["stain_attention"]
            if mine.empty:
                continue
            place = s + (c - (len(classes) - 1) / 2) * step
            axes.boxplot(
                mine, positions=[place], widths=0.8 * step, showfliers=False, manage_ticks=False,
                boxprops={"color": color}, medianprops={"color": color, "linewidth": 2},
                whiskerprops={"color": color}, capprops={"color": color},
            )  # fmt: skip
            jitter = rng.uniform(-0.25, 0.25, len(mine)) * step
            axes.plot(place + jitter, mine, marker, color=color, markersize=3.5, alpha=0.7)
        axes.plot([], [], marker, color=color, label=f"{shorten(str(true))} ({_count(cases, true)})")
    for s, stain in enumerate(names):
        equal = known[known["stain"] == stain]["uniform"].mean()
        axes.hlines(equal, s - 0.45, s + 0.45, **_UNIFORM, label="" if s else "equal shares")
    ticks = [shorten(str(name)) for name in names]
    axes.set_xticks(range(len(names)), ticks, parse_math=False)
    axes.set(ylim=(0, 1.02), ylabel="attention of the stain in its case")
    axes.set_title("How much each stain counts, case by case")
    _legend(axes)
    return figure


def _count(cases: pd.DataFrame, true: object) -> str:
    n = int((cases["true_label"] == true).sum())
    return f"{n} case{'' if n == 1 else 's'}"


def _legend(axes: Axes) -> None:
    for text in axes.legend(fontsize=9).get_texts():
        text.set_parse_math(False)


def slice_figure(case_id: str, slices: pd.DataFrame, stains: pd.DataFrame) -> Figure:
    """The attention of a case's slices, a panel a stain, the most attended first, with the uniform line.

    Args:
        case_id: The case.
        slices: Its rows of `AttentionTables.slices`.
        stains: Its rows of `AttentionTables.stains`.
    """
    counts = [min(n, _BARS) for n in stains["slices"]]
    wide = float(np.clip(2.2 + 0.35 * sum(counts), 6.0, 20.0))
    figure = Figure(figsize=(wide, 4.4), dpi=DPI, layout="constrained")
    ratios = [max(2, n) for n in counts]
    grid = figure.subplots(1, len(stains), sharey=True, squeeze=False, width_ratios=ratios)[0]
    for s, (axes, (_, stain)) in enumerate(zip(grid, stains.iterrows(), strict=True)):
        mine = slices[slices["stain"] == stain["stain"]]
        order = np.argsort(-mine["slice_attention"].to_numpy(), kind="stable")[:_BARS]
        shown = mine.iloc[order]
        color = COLORS[s % len(COLORS)][0]
        axes.bar(range(len(shown)), shown["slice_attention"], color=color, width=0.75)
        uniform = shown["uniform"].to_numpy()
        ends = np.arange(len(shown))
        axes.hlines(uniform, ends - 0.5, ends + 0.5, **_UNIFORM, label="equal shares")
        names = [shorten(str(name)) for name in shown["slice_id"]]
        size = 8 if len(shown) <= 20 else 6
        axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=size, parse_math=False)
        title = f"{shorten(str(stain['stain']))}\n{stain['stain_attention']:.3g} of the case"
        if len(mine) > len(shown):
            title += f", {len(shown)} of {len(mine)} slices"
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_ylim(0, 1.02)
    grid[0].set_ylabel("attention of the slice in its stain")
    grid[-1].legend(fontsize=9)
    figure.suptitle(f"Case {shorten(case_id)}", fontsize=11, parse_math=False)
    return figure


def patch_figure(case_id: str, patches: pd.DataFrame) -> Figure:
    """How a case's effective attention is spread over its patches, by stain, with the uniform line.

    Left: how many patches have how many times their equal share. Right: how much of the attention the
    most attended patches hold together.

    Args:
        case_id: The case.
        patches: Its rows of `AttentionTables.patches`.
    """
    a, n = patches["effective_attention"].to_numpy(np.float64), len(patches)
    figure = Figure(figsize=(9.0, 4.0), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    times = np.maximum(a * n, 1e-6)  # what has hardly any attention stands at the left end
    low, high = np.log10(min(times.min(), 0.5)), np.log10(max(times.max(), 2.0))
    edges = np.logspace(low, high, 31)
    edges[0], edges[-1] = 0.999 * edges[0], 1.001 * edges[-1]
    names = list(dict.fromkeys(patches["stain"]))
    of_stain = [times[(patches["stain"] == name).to_numpy()] for name in names]
    colors = [COLORS[i % len(COLORS)][0] for i in range(len(names))]
    labels = [f"{shorten(str(name))}: {mine.size}" for name, mine in zip(names, of_stain, strict=True)]
    left.hist(of_stain, bins=edges.tolist(), stacked=True, color=colors, label=labels)
    left.set_xscale("log")
    left.axvline(1, **_UNIFORM, label="equal shares")
    left.set(xlabel=f"effective attention × {n} patches", ylabel="patches")
    _legend(left)
    share = np.concatenate(([0.0], np.cumsum(np.sort(a)[::-1])))
    right.plot(np.arange(n + 1) / n * 100, share, color=COLORS[0][0], label="this case")
    right.plot([0, 100], [0, 1], **_UNIFORM, label="equal shares")
    right.set(xlabel="most attended patches (%)", ylabel="their effective attention together")
    right.set(xlim=(0, 100), ylim=(0, 1.02))
    right.legend(fontsize=9)
    figure.suptitle(f"Case {shorten(case_id)}: {n} patches", fontsize=11, parse_math=False)
    return figure
