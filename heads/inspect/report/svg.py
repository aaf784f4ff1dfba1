"""SVG by hand: a few shapes and a pair of axes. No ids, so that many charts can share a page.

Colours are Okabe & Ito's (2008), safe for the colour-blind; every class has a marker of its own besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from heads.evaluation.plots import COLORS, shorten

INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
PALE = "#9aa5b1"  # of lines behind others
DASHES = ("", "6 3", "2 3", "8 3 2 3", "10 4", "1 2")
DOTTED, DASHED = "2 3", "5 4"  # what a model is held against; where its call changes
LEFT, TOP, SIDE = 56, 12, 270  # of a frame; pixels
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
ROW = 19  # of a legend


def color(index: int) -> str:
    """Of a class, or of one of several curves."""
    return COLORS[index % len(COLORS)][0]


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def text(
    x: float, y: float, content: str, anchor: str = "start", size: int = 12, fill: str = INK, turn: int = 0
) -> str:
    """A line of text; ``anchor`` is ``start``, ``middle`` or ``end``, ``turn`` in degrees."""
    turned = f' transform="rotate({turn} {number(x)} {number(y)})"' if turn else ""
    return (
        f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{fill}"{turned}>{escape(content)}</text>'
    )


def line(
    points: Iterable[tuple[float, float]], stroke: str = INK, width: float = 1.0, dash: str = ""
) -> str:
    """A line through points."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width:g}"{dashed}/>'


def box(x: float, y: float, width: float, height: float, fill: str, title: str = "") -> str:
    """A filled rectangle; ``title`` is shown when pointed at."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}" '
        f'fill="{fill}">{inner}</rect>'
    )


def marker(index: int, x: float, y: float, size: float = 4.0, fill: str | None = None) -> str:
    """The marker of a class, in its colour."""
    ink, shape, r = fill or color(index), COLORS[index % len(COLORS)][1], size
    if shape == "o":
        return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(r)}" fill="{ink}"/>'
    corners = {
        "s": ((-r, -r), (r, -r), (r, r), (-r, r)),
        "^": ((0, -1.2 * r), (1.1 * r, 0.9 * r), (-1.1 * r, 0.9 * r)),
        "D": ((0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)),
        "v": ((0, 1.2 * r), (1.1 * r, -0.9 * r), (-1.1 * r, -0.9 * r)),
    }.get(shape)
    if corners is None:
        return cross(x, y, r, ink, upright=True)
    points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{ink}"/>'


def cross(x: float, y: float, size: float, stroke: str = "#000", upright: bool = False) -> str:
    """× or, upright, +."""
    x0, x1, y0, y1 = (number(v) for v in (x - size, x + size, y - size, y + size))
    d = (
        f"M{x0} {number(y)}H{x1}M{number(x)} {y0}V{y1}"
        if upright
        else f"M{x0} {y0}L{x1} {y1}M{x0} {y1}L{x1} {y0}"
    )
    return f'<path d="{d}" stroke="{stroke}" stroke-width="1.8" fill="none"/>'


def linked(case_id: str, title: str, shapes: str) -> str:
    """Shapes that lead to a case's page; for the mouse alone: the table of cases serves the keyboard."""
    target = f"#case={quote(case_id, safe='')}"
    return f'<a href="{target}" tabindex="-1"><title>{escape(title)}</title>{shapes}</a>'


def drawing(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """The whole picture; ``label`` says what it shows to those who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" '
        f'height="{number(height)}"><title>{escape(label)}</title>{"".join(parts)}</svg>'
    )


def legend(x: float, y: float, rows: Sequence[tuple[str, str]]) -> list[str]:
    """Symbols, drawn around (0, 0), with their texts, one below the other."""
    parts = []
    for place, (symbol, name) in enumerate(rows):
        middle = y + ROW * place
        parts.append(f'<g transform="translate({number(x + 12)} {number(middle)})">{symbol}</g>')
        parts.append(text(x + 30, middle + 4, name))
    return parts


def stroke_symbol(stroke: str, dash: str = "", width: float = 2.0) -> str:
    """A short line for a legend."""
    return line([(-12, 0), (12, 0)], stroke, width, dash)


@dataclass(frozen=True)
class Axes:
    """A frame in pixels and the values at its edges.

    Attributes:
        left, top, width, height: Of the frame.
        x_limits, y_limits: Least and largest value.
        log: Whether y is logarithmic.
    """

    left: float
    top: float
    width: float
    height: float
    x_limits: tuple[float, float] = (0.0, 1.0)
    y_limits: tuple[float, float] = (0.0, 1.0)
    log: bool = False

    def x(self, value: float) -> float:
        """Pixels of a value."""
        low, high = self.x_limits
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Pixels of a value."""
        low, high = self.y_limits
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.top + self.height * (high - value) / (high - low)

    def points(self, xs: Iterable[float], ys: Iterable[float]) -> list[tuple[float, float]]:
        """Pixels of values."""
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True)]

    def frame(
        self,
        x_label: str,
        y_label: str,
        x_ticks: Sequence[float] | None = None,
        y_ticks: Sequence[float] | None = None,
    ) -> list[str]:
        """Grid, ticks and labels; no ticks along x for an empty list, round ones for None."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = []
        for tick in round_ticks(*self.y_limits, log=self.log) if y_ticks is None else y_ticks:
            parts.append(line([(self.left, self.y(tick)), (right, self.y(tick))], GRID))
            parts.append(text(self.left - 6, self.y(tick) + 4, f"{tick:g}", "end", 11, MUTED))
        for tick in round_ticks(*self.x_limits) if x_ticks is None else x_ticks:
            parts.append(line([(self.x(tick), self.top), (self.x(tick), bottom)], GRID))
            parts.append(text(self.x(tick), bottom + 15, f"{tick:g}", "middle", 11, MUTED))
        parts.append(line([(self.left, self.top), (self.left, bottom), (right, bottom)], MUTED))
        parts.append(text((self.left + right) / 2, bottom + 34, x_label, "middle", 12, MUTED))
        middle = (self.top + bottom) / 2
        parts.append(text(self.left - 40, middle, y_label, "middle", 12, MUTED, turn=-90))
        return parts


def round_ticks(low: float, high: float, wanted: int = 5, log: bool = False) -> list[float]:
    """About so many round numbers from ``low`` to ``high``; powers of ten and their halves if ``log``."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [k * 10.0**e for e in range(first, last + 1) for k in (1, 2, 5)]
        inside = [tick for tick in ticks if low <= tick <= high]
        return inside if len(inside) <= 2 * wanted else [t for t in inside if f"{t:e}"[0] == "1"]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((k * power for k in (1, 2, 5) if k * power >= rough * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(name: str, length: int = 24) -> str:
    """A name as one line that a chart has room for."""
    name = shorten(name)
    return name if len(name) <= length else f"{name[: length - 7]}…{name[-6:]}"
