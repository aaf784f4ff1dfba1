"""Attention where it lies: patches outlined and shaded on their slice's image, or on a mosaic of them.

No torch in this file: pictures are drawn by processes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from featstore.slides import SlideImage, misfit
from featstore.store.format import GEOMETRY_COLUMNS
from heads.inspect.mosaics import MOST_TILES, Images, mosaic
from heads.inspect.shading import (
    AttentionScale,
    Body,
    Color,
    Floats,
    Ints,
    framed,
    pixel_points,
    tinted,
    title,
    tuples,
)

__all__ = ["AttentionScale", "Overlay", "overlay"]

Polygon = tuple[tuple[float, float], ...]

OPACITY = 115  # of 255: tissue stays visible under it
_OUTLINE, _FAINT = (40, 40, 40), 90  # colour; opacity, of 255, around tiny patches
_TINY, _LARGE = 14, 40  # pixels a side: patches without solid outlines, with thick ones
_NAMED = 20  # patch numbers that a note lists
_CROWDED = 0.5  # of the width and of the height: patches that reach no further may be misplaced


@dataclass(frozen=True, eq=False)
class Overlay:
    """Two pictures of a slice, of the same size.

    Attributes:
        shaded: Patches in the colour of their attention.
        plain: The same without colour.
        kind: Whether patches lie on the slice's image or side by side.
        note: What could not be shown, and why; may be empty.
        outlines: Of every patch that is shown its file and its corners in pixels of the pictures,
            clockwise from the top left; 0, 0 is the outer corner of the first pixel.
        values: Their effective attention.
    """

    shaded: Image.Image
    plain: Image.Image
    kind: Literal["slide", "mosaic"]
    note: str
    outlines: tuple[tuple[str, Polygon], ...]
    values: tuple[float, ...]


def overlay(
    patches: pd.DataFrame,
    scale: AttentionScale,
    slide: SlideImage | None,
    why_no_slide: str,
    images: Images,
    max_side: int = 1000,
    most_tiles: int = MOST_TILES,
) -> Overlay:
    """Show the attention of one slice's patches where they lie.

    Args:
        patches: One slice in patch order: ``case_id, stain, slice_id, path, patch, effective_attention``
            and, where known, ``x0 … y3`` in level-0 pixels, clockwise from the top left.
        scale: The case's.
        slide: The slice's image.
        why_no_slide: The reason where there is none.
        images: The patches' pictures, for a mosaic.
        max_side: Pixels of the longer side of the image or mosaic, without title and legend.
        most_tiles: Of a mosaic; of more patches the most attended are shown.

    Returns:
        On the slice's image if it is there and the corners of any patch are known, else a mosaic.

    Raises:
        ValueError: There are no patches or several slices, or an attention is no number from 0 to the
            scale's largest.
    """
    values = patches["effective_attention"].to_numpy(np.float64)
    if len(patches) == 0 or len(patches[["case_id", "stain", "slice_id"]].drop_duplicates()) > 1:
        raise ValueError(f"{len(patches)} patches, where those of one slice were expected")
    if not ((values >= 0) & (values <= scale.largest)).all():
        raise ValueError(f"attention from {values.min()} to {values.max()} on a scale to {scale.largest}")
    corners = _corners(patches)
    why = why_no_slide or "no image of the slice" if slide is None else _why_not_on(slide, corners)
    if slide is None or corners is None or why:
        body = mosaic(patches, values, scale, images, max_side, most_tiles)
        why = f"a mosaic in patch order: {why}"
    else:
        body = _on_slide(patches, values, scale, slide, corners, max_side)
    kind: Literal["slide", "mosaic"] = "mosaic" if why else "slide"
    downsample = 1.0 if slide is None else slide.downsample
    lines = title(patches, values, bool(why), len(body.rows), downsample)
    shaded, plain, corner = framed(body, lines, scale)
    moved = body.polygons + np.array(corner)
    paths = patches["path"].tolist()
    return Overlay(
        shaded,
        plain,
        kind,
        "; ".join([why, *body.notes] if why else body.notes),
        tuple(
            (paths[row], tuple((float(x), float(y)) for x, y in polygon))
            for row, polygon in zip(body.rows, moved, strict=True)
        ),
        tuple(values[body.rows].tolist()),
    )


def _corners(patches: pd.DataFrame) -> Floats | None:
    """(P, 4, 2), NaN where not known; None without geometry."""
    if not set(GEOMETRY_COLUMNS) <= set(patches.columns):
        return None
    return patches[list(GEOMETRY_COLUMNS)].to_numpy(np.float64).reshape(-1, 4, 2)


def _why_not_on(slide: SlideImage, corners: Floats | None) -> str:
    """Why patches cannot be drawn on their slice's image; empty if they can."""
    if corners is None or not np.isfinite(corners).any():
        return "it is not known where the patches lie (patches.geometry)"
    if not np.isfinite(corners).all(axis=(1, 2)).any():
        return "only the patches' top left corners are known, not their width and height"
    return misfit(slide, corners) or ""


def _crowded(slide: SlideImage, corners: Floats) -> str:
    """A doubt about the downsample where all patches lie near the top left; else empty.

    What is too large moves all towards that corner: `misfit` tells only what is too small.
    """
    across, down = corners.max(axis=(0, 1)) / slide.downsample / np.array(slide.file_size)
    if max(across, down) >= _CROWDED:
        return ""
    return (
        f"the patches reach over {across:.0%} of the image's width and {down:.0%} of its height: "
        f"with a downsample of {slide.downsample:g}. Is that right?"
    ).replace("%", " %")


def _on_slide(
    patches: pd.DataFrame,
    values: Floats,
    scale: AttentionScale,
    slide: SlideImage,
    corners: Floats,
    max_side: int,
) -> Body:
    base, factor = slide.pixels, 1.0
    if max(base.size) > max_side:
        factor = max_side / max(base.size)
        width, height = (max(1, round(side * factor)) for side in base.size)
        base = base.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    polygons = slide.to_pixels(corners) * (np.array(base.size) / np.array(slide.pixels.size))
    known = np.isfinite(corners).all(axis=(1, 2))
    rows, notes = np.flatnonzero(known), []
    if not known.all():
        left_out = patches["patch"].to_numpy()[~known].tolist()
        notes.append(
            f"{len(left_out)} of {len(patches)} patches are not drawn, as it is not known where they lie: "
            f"{_listed(left_out)}"
        )
    if crowded := _crowded(slide, corners[rows]):
        notes.append(crowded)
    polygons = polygons[rows]
    sides = np.linalg.norm(polygons - np.roll(polygons, -1, axis=1), axis=2)
    side = float(np.median(sides)) if len(sides) else 0.0
    # Outlines of tiny patches would hide what they enclose.
    line = 2 if side >= _LARGE else 1
    colors, points = scale.colors(values[rows]), pixel_points(polygons)
    # The most attended last: where patches overlap, they shall be seen.
    order = np.argsort(values[rows], kind="stable")
    shaded = tinted(base, points, colors, order, OPACITY)
    plain = base.copy()
    if side < _TINY:
        mask = Image.new("L", base.size, 0)
        _outline(mask, points, [_FAINT] * len(points), order, line)
        plain.paste(_OUTLINE, mask=mask)
    else:
        _outline(shaded, points, tuples(colors), order, line)
        _outline(plain, points, [_OUTLINE] * len(points), order, line)
    return Body(shaded, plain, rows, polygons, notes)


def _listed(numbers: Sequence[int]) -> str:
    text = ", ".join(str(n) for n in numbers[:_NAMED])
    return text if len(numbers) <= _NAMED else f"{text} and {len(numbers) - _NAMED} more"


def _outline(
    image: Image.Image,
    points: Sequence[Sequence[tuple[int, int]]],
    inks: Sequence[Color] | Sequence[int],
    order: Ints,
    width: int,
) -> None:
    draw = ImageDraw.Draw(image)
    for i in order:
        draw.line([*points[i], *points[i][:2]], fill=inks[i], width=width)
