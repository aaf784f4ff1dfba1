"""Pictures of patches: their pixels as the backbone saw them, and galleries that carry what they show.

No torch in this file: pictures are drawn by processes of their own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from featstore.config import FeatstoreConfig
from featstore.errors import FeatstoreError, ImageError
from featstore.files import replacing
from featstore.images import decode
from featstore.store import Store

INK, PALE, EMPTY = (25, 25, 25), (105, 105, 105), (232, 232, 232)
LARGEST_TILE = 256  # pixels: larger patches are scaled down in galleries, others shown as they are
KEY = "featstore"  # of the text in a gallery's PNG that says what its tiles show
_GAP, _MARGIN, _LINE = 14, 16, 17


class PictureError(FeatstoreError):
    """A patch that cannot be shown."""


@dataclass(frozen=True)
class PatchImages:
    """The patches' files.

    Attributes:
        folder: Of the patches.
        channel_order: ``rgb``, or ``bgr`` if the files hold red and blue swapped.
        max_pixels: Of an image that is read.
        digests: The sha256 of files as they were embedded, by path; those of other files are not looked at.
    """

    folder: Path
    channel_order: str = "rgb"
    max_pixels: int = 100_000_000
    digests: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, path: str) -> Image.Image:
        """A patch's pixels, RGB, as extraction decodes them.

        Args:
            path: Below the folder, as the store has it.

        Raises:
            PictureError: The file is missing, is another than was embedded, or is no picture that can be
                read.
        """
        file = self.folder / path
        try:
            data = file.read_bytes()
            if (known := self.digests.get(path)) is not None and sha256(data).digest() != known:
                raise self._error(path, "file changed since it was embedded")
            found = decode(data, path, self.channel_order, self.max_pixels)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            why = "file missing" if missing else f"not readable: {error.strerror}"
            raise self._error(path, why) from error
        except ImageError as error:
            raise self._error(path, error.reason(path)) from error
        return Image.fromarray(found.pixels)

    def thumbnail(self, path: str, side: int) -> Image.Image:
        """The whole patch in a square of ``side`` pixels, scaled down where it must be, never up."""
        return fitted(self.read(path), side)

    def _error(self, path: str, why: str) -> PictureError:
        return PictureError(
            why,
            expected="the patch that the embedding is of",
            where=str(self.folder / path),
            fix="mount or bring back the folder of patches, or name it: --set patches.folder=FOLDER",
        )


def images_of(
    config: FeatstoreConfig, project: Path, store: Store, cases: Iterable[str] = ()
) -> tuple[PatchImages | None, str]:
    """A project's patches' files, or why there are none.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        store: Of their embeddings.
        cases: Whose files must be those that were embedded; of others' that is not looked at.
    """
    folder = project / config.patches.folder
    if store.spec.is_imported:
        return None, "the features were imported: there are no pictures of their patches"
    if not folder.is_dir():
        return None, f"no pictures: there is no folder of patches {folder} (patches.folder)"
    images = PatchImages(folder, store.spec.channel_order, config.images.max_pixels)
    return with_digests(images, store, cases), ""


def with_digests(images: PatchImages, store: Store, cases: Iterable[str]) -> PatchImages:
    """The files with what they were when they were embedded, of some cases."""
    digests: dict[str, bytes] = {}
    for case in dict.fromkeys(cases):
        sources = store.sources(case)
        digests |= zip(sources["path"], map(bytes, sources["sha256"]), strict=True)
    return replace(images, digests=digests)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The picture itself if it fits into a square, else scaled down."""
    if max(image.size) <= side:
        return image
    scale = side / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    # A smaller side first by whole factors, which is many times faster for large patches.
    return image.resize((size[0], size[1]), Image.Resampling.BILINEAR, reducing_gap=2.0)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it has more letters than Pillow's own."""
    file = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    # Raqm, where Pillow has it, takes twice as long and refuses lines that are broken.
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def jpeg(image: Image.Image, most: int, quality: int = 82) -> bytes:
    """The picture as a JPEG of at most so many bytes: as good as they allow, then smaller."""
    while True:
        for q in range(quality, 39, -14):
            data = io.BytesIO()
            image.save(data, "JPEG", quality=q, optimize=True)
            if data.tell() <= most:
                return data.getvalue()
        if max(image.size) <= 32:
            return data.getvalue()
        image = fitted(image, max(32, round(0.8 * max(image.size))))


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Write a JPEG for looking at: of tissue, a PNG takes ten times as much."""
    with replacing(path) as aside:
        image.save(aside, "JPEG", quality=88, optimize=True)


def shortened(text: str, width: float, size: int) -> str:
    """The text, with its middle left out where it would be wider than so many pixels."""
    if font(size).getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if font(size).getlength(short) <= width:
            return short
    return "…"


@dataclass(frozen=True)
class GalleryTile:
    """One patch of a gallery.

    Attributes:
        path: Its file, below the folder of patches.
        title: Who it is; may have several lines.
        values: What is told of it, by name, in this order.
    """

    path: str
    title: str
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """A picture of patches side by side, and what it shows.

    Attributes:
        image: The picture.
        shown: Of every tile ``path, box`` (left, top, right, bottom), ``scaled`` (whether it is smaller
            than its file), ``values``, and ``note`` where there is no picture.
    """

    image: Image.Image
    shown: list[dict[str, Any]]

    @property
    def notes(self) -> list[str]:
        """What could not be shown."""
        return [f"{tile['path']}: {tile['note']}" for tile in self.shown if tile["note"]]

    def save(self, path: Path) -> None:
        """Write a PNG that carries what its tiles show, as JSON in a text of the key ``featstore``."""
        text = PngImagePlugin.PngInfo()
        text.add_itxt(KEY, json.dumps({"tiles": self.shown}, ensure_ascii=False))
        with replacing(path) as aside:
            self.image.save(aside, "PNG", pnginfo=text, compress_level=1)


def gallery(title: str, tiles: Sequence[GalleryTile], images: PatchImages, columns: int = 5) -> Gallery:
    """Lay patches side by side, each with its name and numbers.

    Patches are shown pixel by pixel; those above 256 pixels are scaled down. Where a file is missing,
    its place says so.

    Args:
        title: Above them.
        tiles: In order, line by line.
        images: The files.
        columns: Tiles a line.
    """
    pictures: list[Image.Image | None] = []
    notes = []
    whole: list[bool] = []
    for tile in tiles:
        try:
            read = images.read(tile.path)
        except PictureError as error:
            pictures.append(None)
            notes.append(error.found)
            whole.append(True)
            continue
        pictures.append(fitted(read, LARGEST_TILE))
        notes.append("")
        whole.append(pictures[-1] is read)
    sizes = [picture.size if picture else (128, 128) for picture in pictures]
    cell = max([200, *(width for width, _ in sizes)])
    lines = max([1, *(1 + tile.title.count("\n") + len(tile.values) for tile in tiles)])
    rows = [sizes[i : i + columns] for i in range(0, len(sizes), columns)]
    heights = [max(height for _, height in row) + 8 + _LINE * lines + _GAP for row in rows]
    wide = 2 * _MARGIN + max(1, min(columns, len(tiles))) * (cell + _GAP) - _GAP
    canvas = Image.new("RGB", (max(wide, 420), 2 * _MARGIN + 2 * _LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), shortened(title, canvas.width - 2 * _MARGIN, 15), INK, font(15))
    shown, top = [], _MARGIN + 2 * _LINE
    if not tiles:
        draw.text((_MARGIN, top - _LINE // 2), "There are none.", PALE, font(12))
    for i, (tile, picture, (width, height)) in enumerate(zip(tiles, pictures, sizes, strict=True)):
        row, column = divmod(i, columns)
        y = top + sum(heights[:row])
        x = _MARGIN + column * (cell + _GAP)
        box = (x, y, x + width, y + height)
        if picture is None:
            draw.rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=EMPTY)
            draw.text((x + 8, y + 8), shortened(notes[i], width - 16, 12), INK, font(12))
        else:
            canvas.paste(picture, box[:2])
        below = y + max(h for _, h in rows[row]) + 6
        said = [(line, INK) for line in tile.title.split("\n")]
        said += [(f"{name} {number(value)}", PALE) for name, value in tile.values.items()]
        for n, (text, ink) in enumerate(said):
            draw.text((x, below + n * _LINE), shortened(text, cell, 12), ink, font(12))
        found = {"path": tile.path, "box": list(box), "scaled": not whole[i], "values": dict(tile.values)}
        shown.append(found | {"note": notes[i]})
    return Gallery(canvas, shown)


def number(value: float) -> str:
    """Four significant digits, plainly."""
    return f"{value:.4g}"
