"""What overlays on slides and on mosaics share: colours of attention, shading, title and legend.

The colours are viridis at an opacity of 0.45. On sections stained with H&E, a pixel's colour after
shading was nearest to that of the right one of five levels for 81 to 92 % of the pixels, with cividis
for 60 to 80 %: its grey middle is hard to tell from tissue that is lighter or darker, while nothing in
tissue is as green as viridis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from featstore.cohort.tables import printable
from heads.inspect.pictures import INK, PALE, font, shortened

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Color = tuple[int, int, int]

COLOR_MAP = "viridis"
_MARGIN, _LEAST_WIDTH, _LONGEST_BAR, _BAR = 12, 440, 520, 12
_TITLE, _LEGEND = 50, 92  # heights in pixels


@dataclass(frozen=True)
class AttentionScale:
    """From attention to colour, one for all slices of a case, so that their colours compare.

    Attributes:
        largest: The largest effective attention of the case: the brightest colour; 0 is the darkest.
        uniform: What each patch would have if all had the same, 1 / P.
    """

    largest: float
    uniform: float

    @classmethod
    def of_case(cls, attention: Iterable[float]) -> AttentionScale:
        """The scale of a case.

        Args:
            attention: (P,) effective attention of all patches of the case.
        """
        values = np.asarray(list(attention), np.float64)
        return cls(float(values.max()), 1 / len(values))

    def colors(self, attention: Floats) -> NDArray[np.uint8]:
        """(n,) values to (n, 3) RGB."""
        share = attention / self.largest if self.largest > 0 else np.zeros_like(attention)
        return np.asarray(matplotlib.colormaps[COLOR_MAP](share, bytes=True)[..., :3])


class Body(NamedTuple):
    """The pictures without title and legend.

    `rows` (n,) says which patches are shown, `polygons` (n, 4, 2) where: corners in pixels.
    """

    shaded: Image.Image
    plain: Image.Image
    rows: Ints
    polygons: Floats
    notes: list[str]


def tuples(colors: NDArray[np.uint8]) -> list[Color]:
    """(n, 3) colours as Pillow takes them."""
    return [(r, g, b) for r, g, b in colors.tolist()]


def pixel_points(polygons: Floats) -> list[list[tuple[int, int]]]:
    """Corners as indices of the pixels just inside them, which is what Pillow draws to."""
    centre = polygons.mean(axis=1, keepdims=True)
    inside = polygons - 0.5 + 0.01 * np.sign(centre - polygons)
    return [[(x, y) for x, y in polygon] for polygon in np.rint(inside).astype(int).tolist()]


def tinted(
    base: Image.Image,
    points: Sequence[Sequence[tuple[int, int]]],
    colors: NDArray[np.uint8],
    order: Ints,
    opacity: int,
) -> Image.Image:
    """The picture with each polygon in its colour; where they overlap, the last one's is seen."""
    tint, mask = base.copy(), Image.new("L", base.size, 0)
    on_tint, on_mask, found = ImageDraw.Draw(tint), ImageDraw.Draw(mask), tuples(colors)
    for i in order:
        on_tint.polygon(points[i], fill=found[i])
        on_mask.polygon(points[i], fill=opacity)
    return Image.composite(tint, base, mask)


def _number(value: float) -> str:
    """Three significant digits, and all of a large number's."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def title(
    patches: pd.DataFrame, values: Floats, is_mosaic: bool, shown: int, downsample: float = 1.0
) -> tuple[list[str], str]:
    """The ids, which may have to be shortened, and what is said of the slice and its image."""
    first = patches.iloc[0]
    ids = [f"case {first['case_id']}", str(first["stain"]), str(first["slice_id"])]
    what = "1 patch" if len(patches) == 1 else f"{len(patches):,} patches"
    said = f"{what}, {_number(100 * float(values.sum()))}% of the case's attention"
    if is_mosaic:
        said += "; mosaic in patch order" + (
            f" of the {shown:,} most attended" if shown < len(patches) else ""
        )
    elif shown < len(patches):
        said += f"; {shown:,} drawn"
    if not is_mosaic and downsample != 1:
        said += f"; downsample {downsample:g}"
    return [printable(text).replace("\n", "\\n") for text in ids], said


def framed(
    body: Body, text: tuple[list[str], str], scale: AttentionScale
) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """Put the title above both pictures and the legend below.

    Returns:
        The shaded and the plain picture, and where the body's upper left corner came to lie.
    """
    inner = max(body.plain.width, _LEAST_WIDTH)
    left, top = _MARGIN + (inner - body.plain.width) // 2, _TITLE
    canvas = Image.new("RGB", (inner + 2 * _MARGIN, _TITLE + body.plain.height + _LEGEND), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 7), _fitting(text[0], inner, 15), INK, font(15))
    draw.text((_MARGIN, 27), shortened(text[1], inner, 12), PALE, font(12))
    plain = canvas.copy()
    plain.paste(body.plain, (left, top))
    below = _TITLE + body.plain.height + 10
    ImageDraw.Draw(plain).text((_MARGIN, below), "not shaded", PALE, font(11))
    canvas.paste(body.shaded, (left, top))
    _legend(canvas, below, inner, scale)
    return canvas, plain, (left, top)


def _fitting(ids: Sequence[str], width: int, size: int) -> str:
    """The ids in a line; the longest loses its middle first, so that none is pushed out."""
    kept = list(ids)
    while (over := font(size).getlength(" · ".join(kept)) - width) > 0:
        widths = [font(size).getlength(each) for each in kept]
        longest = widths.index(max(widths))
        # Halved at most, so that of two long ones both are shortened.
        room = min(max(widths[longest] - over, widths[longest] / 2), widths[longest] - 1)
        shorter = shortened(ids[longest], room, size)
        if shorter == kept[longest]:
            break
        kept[longest] = shorter
    return " · ".join(kept)


def _legend(canvas: Image.Image, top: int, width: int, scale: AttentionScale) -> None:
    """A bar of the colours: numbers below it, the equal share above."""
    draw, long = ImageDraw.Draw(canvas), min(width, _LONGEST_BAR)
    draw.text((_MARGIN, top), "effective attention of a patch, one scale for the case", PALE, font(11))
    upper = top + 32
    canvas.paste(_bar().resize((long, _BAR)), (_MARGIN, upper))
    draw.rectangle((_MARGIN, upper, _MARGIN + long - 1, upper + _BAR - 1), outline=PALE)
    share = min(1.0, scale.uniform / scale.largest) if scale.largest > 0 else 0.0
    _mark(draw, share, long, upper - 17, f"equal shares: {_number(scale.uniform)}")
    at = _MARGIN + round(share * (long - 1))
    draw.line((at, upper - 4, at, upper + _BAR + 3), fill=INK, width=1)
    for place in (0.0, 0.5, 1.0):
        value = place * scale.largest
        x = _MARGIN + round(place * (long - 1))
        draw.line((x, upper + _BAR, x, upper + _BAR + 3), fill=PALE)
        _mark(draw, place, long, upper + _BAR + 4, _number(value))
        _mark(draw, place, long, upper + _BAR + 18, f"{_number(value / scale.uniform)} × equal share")


def _mark(draw: ImageDraw.ImageDraw, place: float, long: int, y: int, text: str) -> None:
    """Text centred below or above a place of the bar, but within its ends."""
    wide = font(11).getlength(text)
    x = _MARGIN + min(max(0.0, place * long - wide / 2), long - wide)
    draw.text((x, y), text, INK, font(11))


@cache
def _bar() -> Image.Image:
    colors = matplotlib.colormaps[COLOR_MAP](np.arange(256), bytes=True)[None, :, :3]
    return Image.fromarray(np.ascontiguousarray(colors))
