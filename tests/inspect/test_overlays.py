"""Overlays: every colour and outline is its patch's, on the slide and on a mosaic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from featstore.config import FeatstoreConfig
from featstore.slides import SlideImage, SlideImages
from featstore.store.format import GEOMETRY_COLUMNS
from heads.inspect import mosaics, overlays
from heads.inspect.overlays import AttentionScale, Overlay, overlay
from heads.inspect.pictures import PictureError
from tests import helpers


class FakeImages:
    """Patches of one size, of colours that follow from their number; some missing. Notes what is read."""

    def __init__(self, size: tuple[int, int] = (60, 60), missing: Sequence[str] = ()) -> None:
        self.size, self.missing = size, missing
        self.read: list[str] = []

    def thumbnail(self, path: str, side: int) -> Image.Image:
        self.read.append(path)
        if path in self.missing:
            raise PictureError("file missing")
        scale = min(1.0, side / max(self.size))
        size = [max(1, round(length * scale)) for length in self.size]
        return Image.new("RGB", (size[0], size[1]), colour(path))


def colour(path: str) -> tuple[int, int, int]:
    n = int("".join(c for c in path if c.isdigit()) or 0)
    return 150 + n * 7 % 90, 90 + n * 13 % 90, 140 + n * 29 % 90


def square(x: float, y: float, side: float, degrees: float = 0.0) -> list[float]:
    """Corners around a centre, clockwise from the one that is the top left where it is upright."""
    c, s, h = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), side / 2
    ends = ((-h, -h), (h, -h), (h, h), (-h, h))
    return [v for a, b in ends for v in (x + c * a - s * b, y + s * a + c * b)]


def slice_of(n: int, corners: Sequence[Sequence[float]] | None = None, **ids: str) -> pd.DataFrame:
    """Patches 1 … n, with shares of attention that grow and fall."""
    table = pd.DataFrame(
        {
            "case_id": ids.get("case_id", "38"),
            "stain": ids.get("stain", "h&e"),
            "slice_id": ids.get("slice_id", "match_1"),
            "patch": np.arange(1, n + 1),
            "path": [f"p{i}.png" for i in range(1, n + 1)],
            "effective_attention": [(1 + i * 37 % 101) / (101.0 * n) for i in range(n)],
        }
    )
    if corners is not None:
        table[list(GEOMETRY_COLUMNS)] = np.array(corners, np.float64)
    return table


def slide_image(width: int = 400, height: int = 300, downsample: float = 10.0) -> SlideImage:
    pixels = np.random.default_rng(0).integers(150, 255, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    return SlideImage(image, (downsample, downsample), Path("a.png"), (width, height), downsample)


def draw(patches: pd.DataFrame, slide: SlideImage | None = None, **settings: Any) -> Overlay:
    images = settings.pop("images", None) or FakeImages()
    scale = settings.pop("scale", None) or AttentionScale.of_case(patches["effective_attention"])
    return overlay(patches, scale, slide, "" if slide else "no image is named", images, **settings)


def viridis(value: float, largest: float) -> np.ndarray:
    return np.array(matplotlib.colormaps["viridis"](value / largest, bytes=True)[:3], float)


def assert_shaded_by_value(found: Overlay, largest: float, opacity: int) -> None:
    """In the middle of every outline: the plain picture's pixel, blended with the value's colour."""
    assert found.shaded.size == found.plain.size
    plain, shaded = (np.asarray(image).astype(float) for image in (found.plain, found.shaded))
    a = opacity / 255
    for (_, polygon), value in zip(found.outlines, found.values, strict=True):
        x, y = (int(v) for v in np.mean(polygon, axis=0))
        wanted = a * viridis(value, largest) + (1 - a) * plain[y, x]
        assert np.abs(shaded[y, x] - wanted).max() <= 1


RINGS = [square(500 + 700 * i, 600 + 800 * j, 300, 15 * (i + 4 * j)) for j in range(3) for i in range(5)]


def test_rotated_patches_are_shaded_by_their_own_attention_on_the_slide() -> None:
    patches = slice_of(15, RINGS)
    found = draw(patches, slide_image())
    assert (found.kind, found.note) == ("slide", "")
    assert [path for path, _ in found.outlines] == patches["path"].tolist()
    assert list(found.values) == patches["effective_attention"].tolist()
    assert_shaded_by_value(found, patches["effective_attention"].max(), overlays.OPACITY)


def test_outlines_are_the_corners_divided_by_the_scale() -> None:
    patches = slice_of(15, RINGS)
    found = draw(patches, slide_image())
    moved = np.array([polygon for _, polygon in found.outlines]) - np.array(RINGS).reshape(-1, 4, 2) / 10
    assert np.abs(moved - moved[0, 0]).max() < 1e-9  # all by the place of the slide in the picture
    left, top = moved[0, 0]
    inside = found.plain.crop((round(left), round(top), round(left) + 400, round(top) + 300))
    same = np.asarray(inside) == np.asarray(slide_image().pixels)
    assert same.all(axis=2).mean() > 0.9  # but for the outlines


def test_exactly_the_pixels_of_an_upright_patch_are_shaded() -> None:
    found = draw(slice_of(1, [[100, 50, 130, 50, 130, 75, 100, 75]]), slide_image(downsample=1.0))
    ((_, polygon),) = found.outlines
    left, top = (round(v) for v in np.array(polygon[0]) - (100, 50))
    different = np.asarray(found.shaded) != np.asarray(found.plain)
    changed = different.any(axis=2)[top : top + 300, left : left + 400]
    wanted = np.zeros_like(changed)
    wanted[50:75, 100:130] = True
    assert (changed == wanted).all()


def test_a_slide_in_which_x_and_y_differ_in_scale_keeps_both() -> None:
    image = slide_image()
    stretched = SlideImage(image.pixels, (10, 20), image.file, (4000, 6000), 1.0)
    ((_, polygon),) = draw(
        slice_of(1, [[1000, 1000, 2000, 1000, 2000, 3000, 1000, 3000]]), stretched
    ).outlines
    assert np.ptp(np.array(polygon), axis=0).tolist() == [100, 100]


def test_where_patches_overlap_the_more_attended_is_seen() -> None:
    patches = slice_of(2, [square(2000, 1500, 900), square(2000, 1500, 900)])
    for values in ([0.9, 0.1], [0.1, 0.9]):
        patches["effective_attention"] = values
        found = draw(patches, slide_image())
        most = Overlay(found.shaded, found.plain, "slide", "", found.outlines[:1], (0.9,))
        assert_shaded_by_value(most, 0.9, overlays.OPACITY)


def test_patches_whose_place_is_not_known_are_listed_and_the_others_drawn() -> None:
    patches = slice_of(15, RINGS)
    patches.loc[[2, 5], "x3"] = np.nan
    found = draw(patches, slide_image())
    assert found.kind == "slide"
    assert len(found.outlines) == 13
    assert "2 of 15 patches are not drawn" in found.note
    assert found.note.endswith("where they lie: 3, 6")
    assert_shaded_by_value(found, patches["effective_attention"].max(), overlays.OPACITY)


def reaching(right: float, bottom: float) -> pd.DataFrame:
    """Of a slide of 400 × 300 pixels at downsample 10: two patches, in its top left and further on."""
    low = [
        square(50, 50, 100),
        [right - 60, bottom - 60, right, bottom - 60, right, bottom, right - 60, bottom],
    ]
    return slice_of(2, low)


@pytest.mark.parametrize(
    ("right", "bottom", "says"),
    [
        (920, 690, "the patches reach over 23 % of the image's width and 23 % of its height: with a "
         "downsample of 10. Is that right?"),
        (1999, 600, "reach over 50 % of the image's width and 20 % of its height"),
        (2001, 600, ""),
        (600, 1501, ""),
    ],
)  # fmt: skip
def test_patches_that_crowd_in_the_top_left_are_drawn_with_a_doubt_about_the_downsample(
    right: float, bottom: float, says: str
) -> None:
    found = draw(reaching(right, bottom), slide_image())
    assert (found.kind, len(found.outlines)) == ("slide", 2)
    assert says in found.note
    assert bool(found.note) == bool(says)


def test_patches_whose_place_is_not_known_do_not_hide_that_the_others_crowd() -> None:
    patches = reaching(900, 600)
    patches.loc[1, "x0"] = np.nan
    assert "reach over 2 % of the image's width and 3 % of its height" in draw(patches, slide_image()).note


@pytest.mark.parametrize(
    ("downsample", "corners", "says"),
    [(16.0, RINGS, "; downsample 16"), (2.5, None, ""), (1.0, [square(200, 200, 50)] * 15, "")],
    ids=["on a slide", "on a mosaic", "level 0"],
)
def test_the_title_says_a_downsample_that_is_not_1(
    downsample: float, corners: Any, says: str, written: list[tuple[str, float, float]]
) -> None:
    draw(slice_of(15, corners), slide_image(downsample=downsample))
    (subtitle,) = {text for text, _, _ in written if text.startswith("15 patches")}
    assert subtitle.endswith(says)
    assert ("downsample" in subtitle) == bool(says)


def only_top_left(patches: pd.DataFrame) -> pd.DataFrame:
    return patches.assign(**dict.fromkeys(GEOMETRY_COLUMNS[2:], np.nan))


@pytest.mark.parametrize(
    ("patches", "slide", "says"),
    [
        (slice_of(15, RINGS), None, "no image is named"),
        (slice_of(15), slide_image(), "it is not known where the patches lie"),
        (slice_of(15, [[math.nan] * 8] * 15), slide_image(), "it is not known where the patches lie"),
        (only_top_left(slice_of(15, RINGS)), slide_image(), "only the patches' top left corners are known"),
        (slice_of(15, RINGS), slide_image(downsample=2.0), "they fit from a downsample of"),
    ],
    ids=["no slide", "no geometry", "unknown geometry", "only the top left corners", "wrong size"],
)
def test_without_a_place_on_a_slide_there_is_a_mosaic_and_the_reason(
    patches: pd.DataFrame, slide: SlideImage | None, says: str
) -> None:
    found = draw(patches, slide)
    assert found.kind == "mosaic"
    assert found.note.startswith("a mosaic in patch order: ")
    assert says in found.note


@pytest.mark.parametrize("n", [1, 2, 7, 150, 400])
@pytest.mark.parametrize("size", [(60, 60), (90, 20), (7576, 50)])
def test_a_mosaic_shows_all_patches_in_order_by_their_own_attention(n: int, size: tuple[int, int]) -> None:
    patches, images = slice_of(n), FakeImages(size)
    found = draw(patches, images=images)
    assert images.read == [path for path, _ in found.outlines] == patches["path"].tolist()
    assert list(found.values) == patches["effective_attention"].tolist()
    assert_shaded_by_value(found, patches["effective_attention"].max(), mosaics.OPACITY)
    centres = np.array([np.mean(polygon, axis=0) for _, polygon in found.outlines])
    assert sorted(range(n), key=lambda i: (round(centres[i, 1]), centres[i, 0])) == list(range(n))
    plain = found.plain
    for (path, polygon), (x, y) in zip(found.outlines, centres, strict=True):
        assert plain.getpixel((int(x), int(y))) == colour(path)
        width, height = np.ptp(np.array(polygon), axis=0)
        assert (width, height) <= size
    body = np.ptp(np.concatenate([polygon for _, polygon in found.outlines]), axis=0)
    assert body.max() <= 1000


@pytest.mark.parametrize("n", [401, 5000])
def test_of_too_many_patches_the_most_attended_are_shown_and_no_others_read(n: int) -> None:
    patches, images = slice_of(n), FakeImages()
    patches["effective_attention"] = np.random.default_rng(n).permutation(n) / n
    found = draw(patches, images=images, most_tiles=400)
    most = patches.nlargest(400, "effective_attention").sort_index()
    assert images.read == most["path"].tolist()
    assert list(found.values) == most["effective_attention"].tolist()
    assert f"the 400 most attended of {n:,} patches are shown" in found.note


def test_5000_patches_with_corners_are_all_drawn_on_the_slide() -> None:
    corners = [square(100 + 38 * (i % 100), 100 + 55 * (i // 100), 30) for i in range(5000)]
    patches, images = slice_of(5000, corners), FakeImages()
    found = draw(patches, slide_image(), images=images)
    assert (len(found.outlines), images.read) == (5000, [])
    assert_shaded_by_value(found, patches["effective_attention"].max(), overlays.OPACITY)


def test_missing_files_are_hatched_tiles_that_are_counted() -> None:
    patches = slice_of(9)
    found = draw(patches, images=FakeImages(missing=("p2.png", "p7.png")))
    assert "2 of 9 files could not be shown (p2.png: file missing)" in found.note
    assert len(found.outlines) == 9
    for path, polygon in found.outlines:
        box = tuple(round(v) for v in (*polygon[0], *polygon[2]))
        tile = np.asarray(found.plain.crop(box)).reshape(-1, 3)  # type: ignore[arg-type]
        hatched = len(np.unique(tile, axis=0)) > 1 and (np.ptp(tile, axis=1) == 0).all()
        assert hatched == (path in ("p2.png", "p7.png"))


def test_a_mosaics_frames_have_the_pure_colour_and_the_plain_one_none() -> None:
    patches = slice_of(9)
    found = draw(patches)
    largest = patches["effective_attention"].max()
    for (_, polygon), value in zip(found.outlines, found.values, strict=True):
        beside = (round(polygon[0][0]) - 2, round(polygon[0][1] + polygon[2][1]) // 2)
        assert found.shaded.getpixel(beside) == tuple(viridis(value, largest))
        assert found.plain.getpixel(beside) == (255, 255, 255)


HOSTILE = [
    "x" * 200,
    "TCGA-" + "9" * 190 + "-END",
    "𓀀" * 100,
    "עברית" * 30,
    "a\nb",
    "<script>&amp;",
    "W" * 199,
]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float]]:
    """Every text drawn, where it ends, and the width of what it is drawn on."""
    found: list[tuple[str, float, float]] = []
    real = ImageDraw.ImageDraw.text

    def noted(self: Any, at: tuple[float, float], text: str, ink: Any, font: Any) -> None:
        found.append((text, at[0] + font.getlength(text), self.im.size[0]))
        real(self, at, text, ink, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return found


@pytest.mark.parametrize("case", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("slice_id", ["match_1", "unmatched_" + "8" * 190], ids=["short", "long"])
def test_no_id_is_cut_off_or_pushes_others_out(
    case: str, slice_id: str, written: list[tuple[str, float, float]]
) -> None:
    draw(slice_of(3, case_id=case, slice_id=slice_id))
    assert all(right <= width for _, right, width in written)
    (title,) = {text for text, _, _ in written if text.startswith("case ")}
    assert " · h&e · " in title
    assert title.endswith(slice_id[-5:])
    if len(case) > 150:
        assert "…" in title
        assert case[-3:] in title


def test_the_title_and_the_legend_say_the_numbers(written: list[tuple[str, float, float]]) -> None:
    patches = slice_of(2)
    patches["effective_attention"] = [0.25, 0.125]
    draw(patches, scale=AttentionScale(0.25, 1 / 40))
    assert {
        "case 38 · h&e · match_1",
        "2 patches, 37.5% of the case's attention; mosaic in patch order",
        "equal shares: 0.025", "0.125", "0.25", "0 × equal share", "5 × equal share", "10 × equal share",
    } <= {text for text, _, _ in written}  # fmt: skip
    draw(slice_of(500), most_tiles=100)
    assert any("mosaic in patch order of the 100 most attended" in text for text, _, _ in written)


def test_all_slices_of_a_case_have_one_scale() -> None:
    scale = AttentionScale.of_case([0.5, 0.3, 0.2])
    assert scale == AttentionScale(0.5, 1 / 3)
    one = slice_of(1, [square(2000, 1500, 900)])
    one["effective_attention"] = 0.2
    assert_shaded_by_value(draw(one, slide_image(), scale=scale), 0.5, overlays.OPACITY)


@pytest.mark.parametrize("value", [math.nan, -0.1, 0.6, math.inf])
def test_attention_that_is_not_on_the_scale_is_a_mistake(value: float) -> None:
    patches = slice_of(2)
    patches["effective_attention"] = [0.5, value]
    with pytest.raises(ValueError, match="attention from"):
        draw(patches, scale=AttentionScale(0.5, 0.5))


def test_patches_of_two_slices_are_a_mistake() -> None:
    patches = slice_of(2)
    patches["slice_id"] = ["match_1", "match_2"]
    with pytest.raises(ValueError, match="one slice"):
        draw(patches)


def test_a_case_without_any_attention_is_drawn_dark() -> None:
    patches = slice_of(3)
    patches["effective_attention"] = 0.0
    assert_shaded_by_value(draw(patches), 1.0, mosaics.OPACITY)


def cut(image: Image.Image, corners: Sequence[float], side: int) -> Image.Image:
    p = [tuple(corners[i : i + 2]) for i in range(0, 8, 2)]
    quad = (*p[0], *p[3], *p[2], *p[1])
    return image.transform((side, side), Image.Transform.QUAD, quad, Image.Resampling.BILINEAR)


def test_patches_cut_from_real_sections_lie_where_they_were_cut(shared_data: Path) -> None:
    for name, (case, stain) in helpers.MULTISTAIN_FILES.items():
        whole = Image.open(shared_data / "multistain" / name).convert("RGB")
        corners = [
            square(90 + 150 * i, 90 + 140 * j, 80, 23 * (i + j))
            for j in range(4) for i in range(5)
        ]  # fmt: skip
        level0 = np.array(corners) * 4  # as if the image were a quarter of the scan
        patches = slice_of(len(corners), level0, case_id=case, stain=stain)
        slide = SlideImage(whole, (4, 4), Path(name), whole.size, 4.0)
        found = draw(patches, slide, max_side=2000)
        assert found.kind == "slide"
        for (_, polygon), original in zip(found.outlines, corners, strict=True):
            again = np.asarray(cut(found.plain, [v for point in polygon for v in point], 80))
            patch = np.asarray(cut(whole, original, 80))
            # The outlines, which are drawn over it, left out.
            difference = np.abs(again.astype(int) - patch)[6:-6, 6:-6]
            assert difference.max() <= 1


def test_a_slide_read_small_still_has_patches_in_their_places(shared_data: Path, tmp_path: Path) -> None:
    name, (case, stain) = next(iter(helpers.MULTISTAIN_FILES.items()))
    whole = Image.open(shared_data / "multistain" / name).convert("RGB")
    whole.save(tmp_path / f"case_{case}_match_1_{stain}.png")
    settings = {"images": {"slides": str(tmp_path), "slides_downsample": 3.0}}
    slides = SlideImages.of_project(FeatstoreConfig.model_validate(settings), tmp_path)
    corners = np.array(square(200, 200, 160, 30))
    patches = slice_of(1, [3 * corners], case_id=case, stain=stain)
    found = draw(patches, slides.read(case, stain, "match_1", 400), max_side=300)
    ((_, polygon),) = found.outlines
    moved = np.array(polygon) - corners.reshape(4, 2) * 300 / whole.width
    assert np.abs(moved - moved.mean(axis=0)).max() < 0.2  # 300 pixels of 892: sides are rounded
    small = [np.asarray(cut(whole.reduce(3), (corners / 3).tolist(), 54)),
             np.asarray(cut(found.plain, [v for point in polygon for v in point], 54))]  # fmt: skip
    assert np.corrcoef(*(pixels[6:-6, 6:-6].ravel() for pixels in small))[0, 1] > 0.9
