"""Images of slices: which file is whose, what is read of it, and whether patches fit on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featstore import slide_files
from featstore.config import FeatstoreConfig
from featstore.errors import CohortError
from featstore.slides import SlideError, SlideImage, SlideImages, misfit

KEY = ("38", "h&e", "unmatched_2")


def ramp(width: int = 64, height: int = 48) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=2).astype(np.uint8))


def slides(folder: Path, **images: Any) -> SlideImages:
    config = FeatstoreConfig.model_validate({"images": {"slides": "slides", **images}})
    return SlideImages.of_project(config, folder)


def in_folder(folder: Path, name: str, image: Image.Image | None = None, **save: Any) -> Path:
    file = folder / "slides" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or ramp()).save(file, **save)
    return file


def in_table(folder: Path, *rows: str, header: str = "case_id,slice_id,stain,path") -> Path:
    file = folder / "slides"
    file.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return file


def tiled_tiff(file: Path, image: Image.Image, levels: int = 3) -> Path:
    """A pyramid that OpenSlide opens as a generic tiled TIFF."""
    tifffile = pytest.importorskip("tifffile", reason="no tifffile to write a pyramid with")
    with tifffile.TiffWriter(file) as writer:
        for level in range(levels):
            step = 2**level
            small = image.resize((image.width // step, image.height // step), Image.Resampling.BOX)
            writer.write(np.asarray(small), tile=(64, 64), photometric="rgb", subfiletype=int(level > 0))
    return file


@pytest.mark.parametrize(
    "name",
    [
        "case_38_unmatched_2_h&e.png",
        "case_038_unmatched2_HE.PNG",
        "sub/folder/case_0038_unmatched_02_he.jpg",
        "case_38_unmatched_2_H&E.tif",
        "case_38_unmatched_2_he.jpeg",
    ],
)
def test_ids_in_file_names_are_normalised_as_those_of_patches(tmp_path: Path, name: str) -> None:
    file = in_folder(tmp_path, name)
    found = slides(tmp_path)
    assert list(found.files) == [KEY]
    assert found.find(*KEY) == file
    assert found.find("38", "h&e", "match_1") is None
    assert found.read(*KEY).pixels.size == (64, 48)


def test_normalisation_can_be_switched_off_as_for_patches(tmp_path: Path) -> None:
    in_folder(tmp_path, "case_038_unmatched2_he.png")
    off = {"patches": {"normalize_cases": False, "normalize_slices": False}, "images": {"slides": "slides"}}
    found = SlideImages.of_project(FeatstoreConfig.model_validate(off), tmp_path)
    assert list(found.files) == [("038", "h&e", "unmatched2")]


def test_a_table_names_files_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    ramp().save(tmp_path / "scans" / "anything.png")
    in_table(
        tmp_path,
        "038,unmatched2,HE,scans/anything.png,4",
        "38,match_1,sox-10,scans/anything.png,",
        header="case_id,slice_id,stain,path,downsample",
    )
    found = slides(tmp_path, slides_downsample=2.5)
    assert list(found.files) == [KEY, ("38", "sox10", "match_1")]
    assert found.read(*KEY).scale == (4, 4)
    assert found.read("38", "sox10", "match_1").scale == (2.5, 2.5)


@pytest.mark.parametrize("other", ["case_038_unmatched2_he.png", "case_38_unmatched_2_h&e.tif"])
def test_two_images_of_a_slice_are_an_error_that_names_both(tmp_path: Path, other: str) -> None:
    in_folder(tmp_path, "case_38_unmatched_2_h&e.png")
    in_folder(tmp_path, other)
    with pytest.raises(CohortError) as error:
        slides(tmp_path)
    assert other in error.value.found
    assert "case_38_unmatched_2_h&e.png" in error.value.found


def test_two_rows_of_a_slice_are_an_error_that_names_both(tmp_path: Path) -> None:
    in_table(tmp_path, "38,unmatched_2,he,a.png", "1,match_1,he,b.png", "038,unmatched2,HE,c.png")
    with pytest.raises(CohortError, match=r"a\.png \(line 2\) and c\.png \(line 4\)"):
        slides(tmp_path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("38,match_1,giemsa,a.png", "line 2: unknown stain 'giemsa'"),
        ("../38,match_1,he,a.png", "line 2: case id '../38' contains '..'"),
        ("38,,he,a.png", "slice id '' is empty"),
        ("38,match_1,he,", "no path"),
        ("38,match_1,he", "3 cells in line 2"),
    ],
)
def test_a_bad_row_is_an_error_that_names_its_line(tmp_path: Path, row: str, says: str) -> None:
    in_table(tmp_path, row)
    with pytest.raises(CohortError) as error:
        slides(tmp_path)
    assert says in error.value.found


@pytest.mark.parametrize("cell", ["0", "-4", "nan", "inf", "four"])
def test_a_downsample_that_is_no_positive_number_is_an_error(tmp_path: Path, cell: str) -> None:
    in_table(tmp_path, f"38,match_1,he,a.png,{cell}", header="case_id,slice_id,stain,path,downsample")
    with pytest.raises(CohortError, match=f"downsample = '{cell}' in line 2"):
        slides(tmp_path)


def test_images_whose_names_say_no_slice_are_listed_and_patches_are_not(tmp_path: Path) -> None:
    for name in ("case_38_unmatched_2_h&e.png", "overview.png", "case_1_match_1_h&e_patch3.png"):
        in_folder(tmp_path, name)
    (tmp_path / "slides" / "case_9_match_1_he.txt").write_text("no image")
    found = slides(tmp_path)
    assert list(found.files) == [KEY]
    assert found.unread == (("overview.png", "does not start with 'case_'"),)


def test_images_that_are_not_used_are_told_in_a_line_with_examples_and_reasons(tmp_path: Path) -> None:
    used = [KEY, ("9", "sox10", "match_1")]
    assert SlideImages.of_project(FeatstoreConfig(), tmp_path).remark(used) is None
    in_folder(tmp_path, "case_38_unmatched_2_h&e.png")
    assert slides(tmp_path).remark(used) is None
    in_folder(tmp_path, "overview.png")
    in_folder(tmp_path, "case_038_match_7_he.png")
    begin = "images of slices that are not used (images.slides): "
    names = "1 whose names say no slice: overview.png (does not start with 'case_')"
    assert slides(tmp_path).remark(used) == (
        f"{begin}{names}; 1 of no slice looked at: case_038_match_7_he.png (38 · h&e · match_7)"
    )
    assert slides(tmp_path).remark([*used, ("38", "h&e", "match_7")]) == begin + names
    for n in range(1, 5):
        in_folder(tmp_path, f"case_2_match_{n}_he.png")
    told = slides(tmp_path).remark(used) or ""
    assert "; 5 of no slice looked at: " in told
    assert told.endswith("(2 · h&e · match_2), …")
    assert "match_3" not in told


def test_without_images_the_reason_says_what_to_set(tmp_path: Path) -> None:
    found = SlideImages.of_project(FeatstoreConfig(), tmp_path)
    image, why = found.read_or_why(*KEY)
    assert image is None
    assert "no images of slices are named" in why
    assert "--slides" in why


def test_a_missing_or_damaged_file_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    whole = in_folder(tmp_path / "other", "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    in_table(
        tmp_path, "1,match_1,he,gone.png", "2,match_1,he,text.jpg", "3,match_1,he,half.png",
        "4,match_1,he,scan.czi", "5,match_1,he,text.svs", f"6,match_1,he,{'n' * 300}.png",
    )  # fmt: skip
    (tmp_path / "scan.czi").write_bytes(b"czi")
    (tmp_path / "text.svs").write_bytes(b"no slide")
    found = slides(tmp_path)
    for case, says in (
        ("1", "gone.png is not there"),
        ("2", "text.jpg cannot be read"),
        ("3", "half.png cannot be read"),
        ("4", "scan.czi is of no known kind"),
        ("5", "text.svs"),
        ("6", "nnn.png cannot be read"),
    ):
        image, why = found.read_or_why(case, "h&e", "match_1")
        assert image is None
        assert says in why


def test_what_is_returned_fits_and_says_its_scale_in_both_directions(tmp_path: Path) -> None:
    in_folder(tmp_path, "case_38_unmatched_2_he.png", ramp(999, 333))
    read = slides(tmp_path, slides_downsample=2.0).read(*KEY, max_side=100)
    assert read.pixels.size == (100, 33)
    assert read.scale == (999 * 2 / 100, 333 * 2 / 33)
    assert slides(tmp_path).read(*KEY, max_side=5000).pixels.size == (999, 333)


@pytest.mark.parametrize("size", [(1000, 800), (1001, 803), (1007, 170)])
def test_a_large_jpeg_is_decoded_small_and_nothing_is_shifted(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    in_folder(tmp_path, "case_38_unmatched_2_he.jpg", ramp(*size), quality=95, subsampling=0)
    read = slides(tmp_path).read(*KEY, max_side=100)
    exact = ramp(*size).resize(read.pixels.size, Image.Resampling.LANCZOS)
    difference = np.asarray(read.pixels).astype(int)[..., :2] - np.asarray(exact)[..., :2]
    assert np.abs(difference).mean() < 0.7


def as_16_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def half_clear(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.new("L", image.size, 128))
    return image


@pytest.mark.parametrize(
    ("suffix", "convert", "pixel"),
    [
        ("png", lambda i: i.convert("L"), lambda p: (round(np.dot(p, (0.299, 0.587, 0.114))),) * 3),
        ("png", as_16_bit, lambda p: (round(np.dot(p, (0.299, 0.587, 0.114))),) * 3),
        ("tif", as_16_bit, lambda p: (round(np.dot(p, (0.299, 0.587, 0.114))),) * 3),
        ("png", lambda i: i.convert("P", palette=Image.Palette.ADAPTIVE), lambda p: p),
        ("png", half_clear, lambda p: tuple(round((128 * c + 127 * 255) / 255) for c in p)),
        ("tif", lambda i: i.convert("CMYK"), lambda p: p),
        ("png", lambda i: i.convert("1"), None),
    ],
    ids=["grey", "16-bit PNG", "16-bit TIFF", "palette", "alpha", "CMYK", "1 bit"],
)
def test_pixels_of_any_kind_become_rgb(
    tmp_path: Path,
    suffix: str,
    convert: Callable[[Image.Image], Image.Image],
    pixel: Callable[[tuple[int, ...]], tuple[int, ...]] | None,
) -> None:
    in_folder(tmp_path, f"case_38_unmatched_2_he.{suffix}", convert(ramp(16, 16)))
    found = slides(tmp_path).read(*KEY).pixels
    assert found.mode == "RGB"
    if pixel is not None:
        wanted = pixel(ramp(16, 16).getpixel((12, 5)))  # type: ignore[arg-type]
        assert np.abs(np.subtract(found.getpixel((12, 5)), wanted)).max() <= 4


def test_an_image_too_large_to_decode_is_refused_from_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folder(tmp_path, "case_38_unmatched_2_he.png")
    in_folder(tmp_path, "case_39_unmatched_2_he.jpg", ramp(320, 240))
    in_folder(tmp_path, "case_40_unmatched_2_he.jpg", ramp(320, 240), progressive=True)
    monkeypatch.setattr("featstore.slides.MOST_PIXELS", 3000)
    found = slides(tmp_path, max_pixels=1000)
    with pytest.raises(SlideError, match="3,072 pixels to decode") as error:
        found.read(*KEY)
    assert "slides_downsample" in error.value.fix
    # A JPEG is decoded at a fraction of its size, unless it is progressive.
    assert found.read("39", "h&e", "unmatched_2", 40).pixels.size == (40, 30)
    with pytest.raises(SlideError, match="76,800 pixels"):
        found.read("40", "h&e", "unmatched_2", 40)
    assert slides(tmp_path, max_pixels=5000).read(*KEY).pixels.size == (64, 48)


def test_pillows_own_limit_neither_stops_large_slides_nor_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folder(tmp_path, "case_38_unmatched_2_he.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert slides(tmp_path).read(*KEY).pixels.size == (64, 48)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_pyramid_gives_the_same_with_openslide_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openslide", reason="no OpenSlide: pip install 'featstore[slides]'")
    (tmp_path / "slides").mkdir()
    tiled_tiff(tmp_path / "slides" / "case_38_unmatched_2_he.tiff", ramp(512, 384))
    found = slides(tmp_path, slides_downsample=8.0)
    opened: list[int] = []
    real = slide_files._with_openslide

    def counted(*args: Any) -> Any:
        opened.append(1)
        return real(*args)

    monkeypatch.setattr(slide_files, "_with_openslide", counted)
    with_openslide = found.read(*KEY, max_side=100)
    monkeypatch.setattr(slide_files, "_openslide", lambda name: None)
    without = found.read(*KEY, max_side=100)
    assert len(opened) == 1
    # It is no scanner's file: what its pixels are is for the project to say, either way.
    assert with_openslide.scale == without.scale == (512 * 8 / 100, 384 * 8 / 75)
    difference = np.asarray(with_openslide.pixels).astype(int) - np.asarray(without.pixels)
    assert np.abs(difference).max() <= 4


class FakeScan:
    """A scanner's file of 4,000 × 2,000 level-0 pixels, in two levels."""

    dimensions = (4000, 2000)
    level_dimensions = ((4000, 2000), (1000, 500))

    def __init__(self, path: str) -> None:
        self.properties = {"openslide.vendor": "aperio"}

    def __enter__(self) -> FakeScan:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def get_best_level_for_downsample(self, downsample: float) -> int:
        return int(downsample >= 4)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        assert location == (0, 0)
        return Image.new("RGBA", size, (200, 100, 150, 255) if level else (0, 0, 0, 0))


def test_a_scanners_own_file_says_its_scale_unless_a_row_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = type(sys)("openslide")
    fake.OpenSlide, fake.PROPERTY_NAME_VENDOR = FakeScan, "openslide.vendor"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openslide", fake)
    (tmp_path / "a.svs").write_bytes(b"scan")
    in_table(
        tmp_path, "38,unmatched_2,he,a.svs,", "39,unmatched_2,he,a.svs,2",
        header="case_id,slice_id,stain,path,downsample",
    )  # fmt: skip
    found = slides(tmp_path, slides_downsample=16.0)
    read = found.read(*KEY, max_side=400)
    assert (read.pixels.size, read.scale, read.file_size) == ((400, 200), (10, 10), (4000, 2000))
    assert read.pixels.getpixel((7, 7)) == (200, 100, 150)
    assert found.read("39", "h&e", "unmatched_2", 400).scale == (20, 20)
    assert found.read(*KEY, max_side=4000).pixels.getpixel((0, 0)) == (255, 255, 255)


def test_without_openslide_a_whole_slide_file_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)  # import fails
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "case_38_unmatched_2_he.svs").write_bytes(b"scan")
    image, why = slides(tmp_path).read_or_why(*KEY)
    assert image is None
    assert "OpenSlide is not installed" in why
    assert "featstore[slides]" in why


def square(left: float, top: float, side: float) -> np.ndarray:
    right, bottom = left + side, top + side
    return np.array([[(left, top), (right, top), (right, bottom), (left, bottom)]])


@pytest.mark.parametrize(
    ("corners", "downsample", "says"),
    [
        (square(0, 0, 500), 1.0, None),
        (square(500, 0, 504.9), 1.0, None),  # within 1 %
        (square(0, -4, 100), 1.0, None),
        (square(0, 0, 505.1), 1.0, "1,000 × 500 px, at downsample 1 1,000 × 500 level-0 px, but the "
         "patches reach to x = 506, y = 506: they fit from a downsample of 1.01 on (the next usual "
         "one: 2)"),
        (square(500, 0, 505.1), 1.0, "downsample of 1.01"),  # 1,010 wide is the most, 1,010.1 is not
        (square(15000, 7000, 500), 4.0, "4,000 × 2,000 level-0 px, but the patches reach to x = 15,500, "
         "y = 7,500: they fit from a downsample of 15.4 on (the next usual one: 16)"),
        (square(15000, 7000, 500), 16.0, None),
        (square(-300, 10, 100), 1.0, "begin at x = -300, y = 10: is it another slice's image?"),
        (np.full((1, 4, 2), np.nan), 1.0, None),
    ],
)  # fmt: skip
def test_an_image_on_which_the_patches_cannot_lie_is_told(
    corners: np.ndarray, downsample: float, says: str | None
) -> None:
    image = SlideImage(Image.new("RGB", (100, 50)), (10, 10), Path("a.png"), (1000, 500), downsample)
    found = misfit(image, corners)
    assert (found is None) == (says is None)
    assert (says or "") in (found or "")
    if found and "fit from" in found:  # what is advised fits
        advised = float(found.split("downsample of ")[-1].split(" on")[0])
        assert misfit(SlideImage(image.pixels, (10, 10), image.file, (1000, 500), advised), corners) is None
