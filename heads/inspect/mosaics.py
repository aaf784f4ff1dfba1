"""A mosaic of a slice's patches, where their places are not known: side by side, in patch order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from featstore.errors import FeatstoreError
from heads.inspect.pictures import EMPTY, INK, PALE, font, shortened
from heads.inspect.shading import AttentionScale, Body, Floats, pixel_points, tinted, tuples

MOST_TILES = 400
OPACITY = 77  # of 255: the frame has the pure colour, and tissue is what a mosaic is looked at for
_LARGEST_TILE, _NUMBERED_TILE, _LEAST_TILE = 224, 40, 44
_CAPTION = 14  # pixels below a tile, for its number
_HATCH = 8  # pixels from line to line


class Images(Protocol):
    """Where patches' pictures come from; `pictures.PatchImages`."""

    def thumbnail(self, path: str, side: int) -> Image.Image:
        """A patch, RGB, scaled down to fit a square; raises a `FeatstoreError` where it cannot be read."""
        ...


class _Grid(NamedTuple):
    """How tiles are laid out, in pixels; `frame` is drawn around a tile's picture, inside the tile."""

    columns: int
    tile: int
    gap: int
    frame: int
    caption: int

    def place(self, i: int) -> tuple[int, int]:
        row, column = divmod(i, self.columns)
        step = self.tile + self.gap
        return self.gap + column * step, self.gap + row * (step + self.caption)

    def size(self, tiles: int) -> tuple[int, int]:
        x, y = self.place(self.columns * (-(-tiles // self.columns)) - 1)
        return x + self.tile + self.gap, y + self.tile + self.caption + self.gap


def _grid(tiles: int, max_side: int) -> _Grid:
    """The largest tiles that fit; of equal ones the squarest layout."""
    best, least = _Grid(tiles, 1, 1, 0, 0), (0, 0)
    for columns in range(1, tiles + 1):
        rows = -(-tiles // columns)
        for gap, frame, caption in ((6, 3, _CAPTION), (3, 2, 0), (1, 1, 0)):
            across, down = (max_side - gap) // columns - gap, (max_side - gap) // rows - gap - caption
            tile = min(_LARGEST_TILE, across, down)
            if tile < (_NUMBERED_TILE if caption else 12 if frame == 2 else 3):
                continue
            if (tile, -abs(columns - rows)) > least:
                best, least = _Grid(columns, tile, gap, frame, caption), (tile, -abs(columns - rows))
            break
    return best


def mosaic(
    patches: pd.DataFrame,
    values: Floats,
    scale: AttentionScale,
    images: Images,
    max_side: int,
    most_tiles: int,
) -> Body:
    """Lay a slice's patches side by side; arguments as in `overlays.overlay`.

    Only the files of patches that are shown are read.
    """
    rows, notes = np.arange(len(patches)), []
    if len(rows) > most_tiles:
        rows = np.sort(np.argsort(-values, kind="stable")[:most_tiles])
        notes.append(f"the {most_tiles} most attended of {len(patches):,} patches are shown")
    chosen = patches.iloc[rows]
    grid = _grid(len(rows), max_side)
    pictures, failures = _thumbnails(images, chosen["path"].tolist(), max(1, grid.tile - 2 * grid.frame))
    if failures:
        notes.append(f"{len(failures)} of {len(rows)} files could not be shown ({failures[0]})")
    # Small patches are not scaled up: their tiles are as small.
    needed = [max(picture.size) + 2 * grid.frame for picture in pictures if picture is not None]
    grid = grid._replace(tile=min(grid.tile, max([_LEAST_TILE, *needed])))
    base = Image.new("RGB", grid.size(len(rows)), "white")
    boxes = []
    for i, picture in enumerate(pictures):
        shown = _missing(grid.tile - 2 * grid.frame) if picture is None else picture
        x, y = grid.place(i)
        left, top = x + (grid.tile - shown.width) // 2, y + (grid.tile - shown.height) // 2
        base.paste(shown, (left, top))
        boxes.append((left, top, left + shown.width, top + shown.height))
    if grid.tile >= _NUMBERED_TILE:
        _number_tiles(base, grid, chosen["patch"].tolist())
    polygons = np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in boxes], float)
    colors, points = scale.colors(values[rows]), pixel_points(polygons)
    there = np.flatnonzero([picture is not None for picture in pictures])
    shaded = tinted(base, points, colors, there, OPACITY)
    draw = ImageDraw.Draw(shaded)
    for (x0, y0, x1, y1), color in zip(boxes, tuples(colors), strict=True):
        around = (x0 - grid.frame, y0 - grid.frame, x1 + grid.frame - 1, y1 + grid.frame - 1)
        draw.rectangle(around, outline=color, width=grid.frame)
    return Body(shaded, base, rows, polygons, notes)


def _thumbnails(
    images: Images, paths: Sequence[str], side: int
) -> tuple[list[Image.Image | None], list[str]]:
    """The pictures, None where a file cannot be read, and why."""
    pictures: list[Image.Image | None] = []
    failures = []
    for path in paths:
        try:
            pictures.append(images.thumbnail(path, side))
        except FeatstoreError as error:
            pictures.append(None)
            failures.append(f"{path}: {error.found}")
    return pictures, failures


def _missing(side: int) -> Image.Image:
    """The tile of a patch that cannot be shown."""
    tile = Image.new("RGB", (side, side), EMPTY)
    draw = ImageDraw.Draw(tile)
    for start in range(-side, side, _HATCH):
        draw.line((start, side, start + side, 0), fill=(200, 200, 200))
    size = 11 if side >= 50 else 8
    wide = font(size).getlength("missing")
    if wide + 4 <= side:
        x, y = (side - wide) / 2, (side - size) / 2 - 1
        draw.rectangle((x - 2, y - 1, x + wide + 2, y + size + 2), fill=EMPTY)
        draw.text((x, y), "missing", PALE, font(size))
    return tile


def _number_tiles(base: Image.Image, grid: _Grid, numbers: Sequence[int]) -> None:
    """Below the tiles where there is room for it, else small in their corner."""
    draw, size = ImageDraw.Draw(base), 10 if grid.caption else 8
    for i, patch in enumerate(numbers):
        x, y = grid.place(i)
        text = shortened(str(patch), grid.tile - 2 * grid.frame, size)
        wide = font(size).getlength(text)
        if grid.caption:
            draw.text((x + (grid.tile - wide) / 2, y + grid.tile + 1), text, INK, font(size))
            continue
        left, low = x + grid.frame, y + grid.tile - grid.frame
        draw.rectangle((left, low - 10, left + round(wide) + 1, low - 1), fill="white")
        draw.text((left + 1, low - 10), text, INK, font(size))
