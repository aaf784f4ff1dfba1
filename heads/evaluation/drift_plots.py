"""Pictures of how two embeddings of the same patches differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from heads.evaluation.drift import Drift
from heads.evaluation.drift_words import SHARES, shares
from heads.evaluation.plots import COLORS, DPI, save, shorten

MOST_CASES = 60
_BINS = 60
_REST = "0.55"


def plot_drift(
    drift: Drift, folder: Path, aucs: tuple[float | None, float | None] | None = None
) -> list[Path]:
    """Draw what is defined; an older picture of something that is not is removed.

    Args:
        drift: What was found.
        folder: Where to write; it is there.
        aucs: Test AUC of the same head on A and on B.

    Returns:
        The pictures written.
    """
    drawings: dict[str, Callable[[], Figure | None]] = {
        "measures": lambda: _measures(drift, aucs),
        "cosine_by_stain": lambda: _by_stain(drift),
        "cosine_by_case": lambda: _by_case(drift),
        "pairs": lambda: _pairs(drift),
        "norms": lambda: _norms(drift),
    }
    written = []
    for name, draw in drawings.items():
        path, figure = folder / f"{name}.png", draw()
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        save(figure, path)
        written.append(path)
    return written


def _axes(width: float, height: float, title: str, **texts: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, **texts)
    axes.grid(visible=True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, axes: Axes, names: Sequence[str], title: str) -> None:
    """A legend at the right; texts are set after, as one with a `_` or `$` would be left out or parsed."""
    handles = axes.get_lines()[: len(names)]
    legend = figure.legend(handles, [""] * len(names), loc="outside right upper", title=title)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(parse_math=False, text=name)


def _codes(drift: Drift) -> NDArray[np.int64]:
    return np.concatenate([case.stains for case in drift.pairing.cases])


def _by_stain(drift: Drift) -> Figure | None:
    """Histograms of the centred cosine, a line a stain; of many stains the smallest share one."""
    cosine = drift.patches["cosine_centred"].astype(np.float64)
    known = ~np.isnan(cosine)
    if not known.any():
        return None
    codes, stains = _codes(drift)[known], drift.pairing.stains
    cosine = cosine[known]
    sizes = np.bincount(codes, minlength=len(stains))
    order = np.argsort(-sizes, kind="stable").tolist()
    own = order if len(stains) <= len(COLORS) else order[: len(COLORS) - 1]
    groups: list[tuple[str, str, NDArray[np.bool_]]] = [
        (f"{shorten(stains[code])} ({sizes[code]:,})", color, codes == code)
        for code, (color, _) in zip(own, COLORS, strict=False)
        if sizes[code]
    ]
    if len(own) < len(stains):
        others = ~np.isin(codes, own)
        groups.append((f"{len(stains) - len(own)} others ({int(others.sum()):,})", _REST, others))
    edges = _edges(cosine)
    title = "Cosine of each patch in A with itself in B, centred"
    figure, axes = _axes(
        9.5, 4.8, title, xlabel="cosine (1: not moved)", ylabel="share of the stain's patches (%)"
    )
    for _, color, mine in groups:
        share = 100 * np.histogram(cosine[mine], edges)[0] / mine.sum()
        axes.plot(np.repeat(edges, 2)[1:-1], np.repeat(share, 2), color=color, linewidth=1.6)
    for _, color, mine in groups:
        axes.axvline(float(np.median(cosine[mine])), color=color, linestyle=":", linewidth=1.4)
    axes.set_ylim(bottom=0)
    _legend(figure, axes, [name for name, _, _ in groups], "stain; dotted: median")
    return figure


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of bins over all values, which may be equal."""
    low, high = float(values.min()), float(values.max())
    air = max(1e-3, 0.02 * (high - low))
    return np.linspace(low - air, high + air, _BINS + 1)


def _by_case(drift: Drift) -> Figure | None:
    """Boxes of the centred cosine, the case that moved most first."""
    cosine, boxes = drift.patches["cosine_centred"].astype(np.float64), []
    for case in drift.pairing.cases:
        values = cosine[case.start : case.start + len(case.in_a)]
        values = values[~np.isnan(values)]
        if len(values):
            low, first, middle, third, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            name = shorten(case.case_id)
            stats = {"whislo": low, "q1": first, "med": middle, "q3": third, "whishi": high, "fliers": []}
            boxes.append({"label": name, **stats})
    if not boxes:
        return None
    boxes.sort(key=lambda box: float(box["med"]))
    shown = boxes[:MOST_CASES]
    title = f"Centred cosine by case: {len(boxes)} cases, the most drifted first"
    if len(shown) < len(boxes):
        title = f"Centred cosine by case: the {len(shown)} most drifted of {len(boxes)} cases"
    width = float(np.clip(2.5 + 0.22 * len(shown), 6.0, 15.0))
    figure, axes = _axes(
        width, 4.8, title, xlabel="case", ylabel="cosine; box 25 to 75%, whiskers 5 to 95%"
    )
    style: dict[str, Any] = {
        "boxprops": {"facecolor": "#CFE3F1", "edgecolor": COLORS[0][0]},
        "medianprops": {"color": COLORS[1][0], "linewidth": 1.8},
        "whiskerprops": {"color": COLORS[0][0]},
        "capprops": {"color": COLORS[0][0]},
    }
    axes.bxp(shown, showfliers=False, patch_artist=True, widths=0.6, **style)
    names = [str(box["label"]) for box in shown]
    steep = len(names) > 12 or max(map(len, names)) > 6
    ticks = range(1, len(names) + 1)
    axes.set_xticks(ticks, names, rotation=90 if steep else 0, fontsize=8, parse_math=False)
    return figure


def _pairs(drift: Drift) -> Figure | None:
    """Distances between patches in A against those in B."""
    if not len(drift.pairs):
        return None
    a, b = (1 - drift.pairs.astype(np.float64)).T
    title = f"Distances between patches: {len(a):,} random pairs"
    if not math.isnan(drift.pair_correlation):
        title += f", rank correlation {drift.pair_correlation:.3f}"
    figure, axes = _axes(
        7.2, 6.2, title, xlabel="1 − centred cosine in A", ylabel="1 − centred cosine in B"
    )
    _density(figure, axes, a, b, "pairs")
    return figure


def _norms(drift: Drift) -> Figure | None:
    """Lengths of the embeddings in A against those in B."""
    a, b = (drift.patches[name].astype(np.float64) for name in ("norm_a", "norm_b"))
    title = "Length of each patch's embedding, not centred"
    figure, axes = _axes(7.2, 6.2, title, xlabel="length in A", ylabel="length in B")
    _density(figure, axes, a, b, "patches", alike=drift.has_cosine)
    return figure


def _density(
    figure: Figure,
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    what: str,
    alike: bool = True,
) -> None:
    """How many points lie where, on a logarithmic scale, and the line of equals."""
    bins = [_edges(x), _edges(y)]
    counts, _, _, image = axes.hist2d(x, y, bins=bins, cmin=1, cmap="viridis", norm=LogNorm(1, None))
    most = max(2.0, float(np.nanmax(counts)))
    image.set_clim(1, most)
    figure.colorbar(image, ax=axes, label=f"{what} (logarithmic)")
    low, high = max(bins[0][0], bins[1][0]), min(bins[0][-1], bins[1][-1])
    if alike and low < high:
        axes.plot(
            [low, high], [low, high], color=COLORS[1][0], linestyle="--", linewidth=1.4, label="equal"
        )
        axes.legend(loc="upper left")


def _measures(drift: Drift, aucs: tuple[float | None, float | None] | None) -> Figure | None:
    """Bars: what both have in common, and what each has of its own."""
    whole = drift.alignment[0]
    agreement = {
        "cosine, median": drift.median("cosine"),
        "centred cosine, median": drift.median("cosine_centred"),
        "linear CKA": whole.linear,
        "linear CKA, debiased": whole.debiased,
        "rank correlation of pairs": drift.pair_correlation,
        f"{drift.neighbours['all'].k} nearest, same": drift.neighbours["all"].overlap,
        f"{drift.neighbours['other_cases'].k} nearest of other cases": drift.neighbours[
            "other_cases"
        ].overlap,
    }
    known = {name: value for name, value in agreement.items() if not math.isnan(value)}
    own = {f"variance {SHARES[name]}": pair for name, pair in shares(drift).items()}
    if aucs is not None and aucs[0] is not None and aucs[1] is not None:
        own["test AUC of the same head"] = (aucs[0], aucs[1])
    heights = [size for size in (len(known), 2 * len(own)) if size]
    if not heights:
        return None
    figure = Figure(figsize=(8.0, 1.8 + 0.3 * sum(heights)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if known:
        panels[0].set_title("A and B: 1 where they are alike")
        _bars(panels[0], {name: (value,) for name, value in known.items()}, [("", _REST)])
    if own:
        panels[-1].set_title("A beside B")
        _bars(panels[-1], own, [("A", COLORS[0][0]), ("B", COLORS[1][0])])
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _bars(axes: Axes, values: Mapping[str, tuple[float, ...]], sides: Sequence[tuple[str, str]]) -> None:
    """Horizontal bars with their numbers, the first on top."""
    height = 0.8 / len(sides)
    for side, (label, color) in enumerate(sides):
        widths = [each[side] for each in values.values()]
        places = [row + (side - (len(sides) - 1) / 2) * height for row in range(len(widths))]
        axes.barh(places, widths, height * 0.92, color=color, label=label)
        for place, width in zip(places, widths, strict=True):
            axes.text(max(width, 0) + 0.01, place, f"{width:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(values)), list(values))
    least = min([0.0, *(number for pair in values.values() for number in pair)])
    axes.set(xlim=(min(0.0, least * 1.1), 1.12), ylim=(len(values) - 0.5, -0.5))
    axes.grid(visible=True, axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
