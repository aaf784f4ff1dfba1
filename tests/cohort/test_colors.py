from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.cohort.colors import ColorVerdict, Rgb, chromogen_score, contact_sheet, he_score, judge


def tiles(rgb: Rgb, side: int = 196) -> list[Rgb]:
    height, width = rgb.shape[:2]
    return [
        rgb[y : y + side, x : x + side]
        for y in range(0, height - side + 1, side)
        for x in range(0, width - side + 1, side)
    ]


def swapped(patches: list[Rgb]) -> list[Rgb]:
    return [patch[..., ::-1] for patch in patches]


def with_melanin(patches: list[Rgb], share: float) -> list[Rgb]:
    """Brown pigment laid over squares of 4 px: a pigmented lesion."""
    random = np.random.default_rng(0)
    result = []
    for patch in patches:
        height, width = patch.shape[:2]
        spots = random.random((height // 4 + 1, width // 4 + 1)) < share
        mask = np.kron(spots, np.ones((4, 4), dtype=bool))[:height, :width, None]
        result.append((patch * np.where(mask, np.exp([-0.5, -0.8, -1.1]), 1)).astype(np.uint8))
    return result


def dab() -> list[Rgb]:
    data = pytest.importorskip("skimage.data")
    return tiles(data.immunohistochemistry())


def test_dab_of_scikit_image() -> None:
    assert judge("sox10", dab()).verdict == "natural"
    assert judge("sox10", swapped(dab())).verdict == "swapped"
    assert judge("masson", swapped(dab())).verdict == "undecided"
    assert judge("sox10", swapped(dab())[:3]).verdict == "undecided"


# file → verdict on the tissue as it is; swapped, the opposite.
MULTISTAIN = {
    "29-041-Izd2-w35-CD31-3-les3": ("cd31", "natural"),
    "29-041-Izd2-w35-Cc10-5-les3": ("cc10", "natural"),
    "29-041-Izd2-w35-Ki67-7-les3": ("ki67", "natural"),
    "29-041-Izd2-w35-proSPC-4-les3": ("prospc", "natural"),
    "Izd2-29-041-w35_proSPC": ("prospc", "undecided"),
    "Rat-Kidney_PanCytokeratin": ("pancytokeratin", "undecided"),
    "Rat-Kidney_HE": ("h&e", "natural"),
    "29-041-Izd2-w35-He-les3": ("h&e", "undecided"),
    "Izd2-29-041-w35_HE": ("h&e", "undecided"),
}
OPPOSITE = {"natural": "swapped", "undecided": "undecided"}


@pytest.mark.parametrize("name", MULTISTAIN)
def test_real_tissue(shared_data: Path, name: str) -> None:
    with Image.open(shared_data / "multistain" / f"{name}.jpg") as image:
        patches = tiles(np.asarray(image.convert("RGB")))
    stain, verdict = MULTISTAIN[name]
    assert judge(stain, patches).verdict == verdict
    assert judge(stain, swapped(patches)).verdict == OPPOSITE[verdict]
    for share in (0.01, 0.2):
        assert judge(stain, with_melanin(patches, share)).verdict != "swapped"


def test_real_nuclei(shared_data: Path) -> None:
    patches = []
    for path in sorted((shared_data / "crchisto" / "patches").rglob("*.png"))[::100]:
        with Image.open(path) as image:
            patches.append(np.asarray(image.convert("RGB")))
    assert judge("h&e", patches).verdict == "natural"
    assert judge("h&e", swapped(patches)).verdict == "swapped"
    for share in (0.01, 0.2):
        assert judge("h&e", with_melanin(patches, share)).verdict != "swapped"


def test_scores_change_sign_when_swapped() -> None:
    patch = np.random.default_rng(1).integers(60, 200, (40, 40, 3), dtype=np.uint8)
    patch[..., 1] //= 2
    natural, turned = he_score(patch), he_score(patch[..., ::-1])
    assert natural is not None
    assert turned == pytest.approx(-natural)


def test_nothing_to_see_is_undecided() -> None:
    blank = [
        np.full((50, 50, 3), 240, np.uint8),
        np.zeros((50, 50, 3), np.uint8),
        np.full((50, 50, 3), 120, np.uint8),
    ]
    for stain in ("h&e", "melan"):
        for patches in ([], blank * 3, [np.full((3, 3, 3), 100, np.uint8)] * 9):
            assert judge(stain, patches).verdict == "undecided"


def test_a_red_chromogen_is_not_called_swapped() -> None:
    patch = np.full((40, 40, 3), (200, 60, 80), np.uint8)
    patch[:10] = (130, 130, 180)
    assert chromogen_score(patch) is None


def test_contact_sheet() -> None:
    red = np.zeros((10, 30, 3), np.uint8)
    red[..., 0] = 255
    sheet = contact_sheet({"h&e": [red] * 40, "日本": []}, {"h&e": ColorVerdict("swapped", -1.0, 40)})
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(axis=-1).sum() == 10 * 96 * 32
    assert (pixels == (0, 0, 255)).all(axis=-1).sum() == 10 * 96 * 32
