"""All patches on one plane: the first two principal components of their embeddings, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from featstore.errors import ConfigError, StoreError
from featstore.store import Store
from heads.evaluation.plots import COLORS, DPI, shorten
from heads.inspect.tables import IDENTITY

Floats = NDArray[np.float64]
Coloring = Literal["stain", "class", "attention"]

# By what a map is coloured: the column that it needs.
COLUMNS: dict[Coloring, str] = {"stain": "stain", "class": "class", "attention": "times_equal"}
EXPLAINED = "explained_variance_ratio"  # a key of the table's `attrs`
MOST_POINTS = 20_000
_BLOCK = 2048  # rows that are held in float64 at a time
_ROUNDS = 8  # groups of points are drawn in turn, so that no group covers all others


def project_2d(store: Store, cases: Sequence[str] | None = None) -> pd.DataFrame:
    """Project embeddings onto their first two principal components.

    The covariance (D × D) is accumulated in float64, case by case: memory does not grow with their
    number. Embeddings are centred, not scaled. Of each component, the largest loading is positive.

    Args:
        store: Where the embeddings are.
        cases: Which, in this order; by default all.

    Returns:
        ``case_id, stain, slice_id, patch, path, pc1, pc2``, a row a patch, indexed as `Store.table`;
        ``attrs["explained_variance_ratio"]`` has the two components' shares of the variance.

    Raises:
        StoreError: A case is not in the store, there is none, or an embedding is not finite.
    """
    wanted = store.cases() if cases is None else list(cases)
    if not wanted:
        raise StoreError("no cases to project", where=str(store.path), fix="name cases of the store")
    mean, covariance = _moments(store, wanted)
    values, vectors = np.linalg.eigh(covariance)
    dim = store.spec.dim
    axes = np.zeros((2, dim))
    axes[: min(2, dim)] = vectors[:, ::-1].T[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes *= np.where(axes[np.arange(2), largest] < 0, -1.0, 1.0)[:, None]
    total = float(np.trace(covariance))
    shares = [max(0.0, float(v)) / total if total > 0 else 0.0 for v in values[::-1][:2]]
    frames = []
    for case in wanted:
        places = np.concatenate([(block - mean) @ axes.T for block in _blocks(store, case)])
        frames.append(store.table(case)[IDENTITY].assign(pc1=places[:, 0], pc2=places[:, 1]))
    table = pd.concat(frames)
    table.attrs[EXPLAINED] = (*shares, 0.0)[:2]
    return table


def _blocks(store: Store, case: str) -> Iterator[Floats]:
    """A case's embeddings in float64, some rows at a time."""
    features = store.features(case)
    for start in range(0, len(features), _BLOCK):
        yield features[start : start + _BLOCK].astype(np.float64)


def _moments(store: Store, cases: Sequence[str]) -> tuple[Floats, Floats]:
    """Mean (D,) and covariance (D, D) of the cases' patches, in one pass."""
    dim = store.spec.dim
    # Squares of what lies near 0 cancel little: all is taken from one of the embeddings.
    origin = store.take(cases[0], [0])[0].astype(np.float64)
    count, total, squares = 0, np.zeros(dim), np.zeros((dim, dim))
    for case in cases:
        for block in _blocks(store, case):
            if not np.isfinite(block).all():
                raise StoreError(
                    f"case {case} has embeddings that are not finite (NaN or infinite)",
                    expected="finite numbers",
                    where=str(store.folder(case)),
                    fix="leave the case out, or embed or import it again",
                )
            block -= origin
            count += len(block)
            total += block.sum(axis=0)
            squares += block.T @ block
    mean = total / count
    return origin + mean, (squares - count * np.outer(mean, mean)) / max(1, count - 1)


def plot_map(table: pd.DataFrame, color_by: Coloring = "stain") -> Figure:
    """Draw the map of all patches.

    Args:
        table: From `project_2d`, with a column ``class`` (names) or ``times_equal`` (attention, in
            multiples of what each patch of its case would have if all had the same) where it is to be
            coloured by these. Patches without one (NaN) are left out.
        color_by: ``stain``, ``class``, or ``attention``, which is on a logarithmic scale.

    Returns:
        A figure. Of more than 20,000 patches evenly chosen ones are drawn, and the title says so; the
        legend counts all.

    Raises:
        ConfigError: The table has no such column, or it is empty.
    """
    column = COLUMNS.get(color_by)
    if column is None or column not in table.columns or not table[column].notna().any():
        raise ConfigError(
            f"the map has no values to be coloured by {color_by!r}",
            expected=" | ".join(name for name, needed in COLUMNS.items() if needed in table.columns),
            where="color_by",
            fix="choose one of these, or join the column to the table",
        )
    known = table[table[column].notna()]
    drawn = known
    if len(known) > MOST_POINTS:
        drawn = known.iloc[np.linspace(0, len(known) - 1, MOST_POINTS).round().astype(int)]
    wide, high = (float(np.ptp(drawn[name])) for name in ("pc1", "pc2"))
    height = float(np.clip(1.3 + 6.5 * high / wide, 4.0, 8.0)) if wide > 0 else 6.0
    figure = Figure(figsize=(9, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    # Many small points, few large ones.
    size = float(np.clip(20_000 / len(drawn), 4, 36))
    if color_by == "attention":
        _by_attention(figure, axes, drawn, size)
    else:
        _by_group(figure, axes, known[column].astype(str), drawn, column, size)
    what = f"{len(known):,} patches"
    if len(drawn) < len(known):
        what = f"{len(drawn):,} of {what}, evenly chosen"
    axes.set_title(f"Embeddings by {color_by}: {what}")
    shares = table.attrs.get(EXPLAINED, (None, None))
    said = ["" if share is None else f" ({share:.1%} of the variance)" for share in shares]
    axes.set(xlabel=f"PC 1{said[0]}", ylabel=f"PC 2{said[1]}")
    # One unit is as long in both directions: distances on the map are to be compared.
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=True, color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def _by_group(
    figure: Figure, axes: Axes, every: pd.Series[Any], drawn: pd.DataFrame, column: str, size: float
) -> None:
    counts = every.value_counts(sort=False)
    names = sorted(counts.index, key=lambda name: (-counts[name], name))
    # Of more groups than there are colours, the smallest share one.
    own = names if len(names) <= len(COLORS) else names[: len(COLORS) - 1]
    styles = dict(zip(own, COLORS, strict=False))
    rest = ("0.6", "o")
    labels = drawn[column].astype(str).to_numpy()
    x, y = drawn["pc1"].to_numpy(), drawn["pc2"].to_numpy()
    for turn in range(_ROUNDS):
        for name in [*own, None]:
            mine = np.flatnonzero(labels == name if name is not None else ~np.isin(labels, own))
            mine = mine[turn::_ROUNDS]
            color, marker = rest if name is None else styles[name]
            axes.scatter(
                x[mine], y[mine], s=size, c=color, marker=marker, alpha=0.7, linewidths=0, rasterized=True
            )
    entries = [(styles[name], f"{shorten(name)} ({counts[name]:,})") for name in own]
    if len(own) < len(names):
        others = int(sum(counts[name] for name in names[len(own) :]))
        entries.append((rest, f"{len(names) - len(own)} others ({others:,})"))
    handles = [
        Line2D([], [], linestyle="", color=color, marker=marker, markersize=7, label=label)
        for (color, marker), label in entries
    ]
    figure.legend(handles=handles, loc="outside right upper", title=column)


def _by_attention(figure: Figure, axes: Axes, drawn: pd.DataFrame, size: float) -> None:
    """On a logarithmic scale: few patches have nearly all of it."""
    values = drawn[COLUMNS["attention"]].to_numpy(np.float64)
    top = float(values.max())
    positive = values[values > 0]
    # Attention far below any share that counts would only use up colours.
    least = max(float(positive.min()), top * 1e-6) if len(positive) else 0.5
    if len(positive) == 0 or least >= top:
        least, top = (top / 10, top) if top > 0 else (0.1, 1.0)
    order = np.argsort(values, kind="stable")
    points = axes.scatter(
        drawn["pc1"].to_numpy()[order],
        drawn["pc2"].to_numpy()[order],
        s=size,
        c=np.clip(values[order], least, top),
        norm=LogNorm(least, top),
        cmap="viridis",
        linewidths=0,
        rasterized=True,
    )
    figure.colorbar(points, ax=axes, label="× equal share (logarithmic)")
