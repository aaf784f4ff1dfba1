"""Draw small stained patches out of the one real tissue image that ships with scikit-image.

The image (immunohistochemistry of a colon: brown DAB on blue hematoxylin) is
taken apart into what is nucleus, cytoplasm and stroma, and put together
again with the dyes of another stain.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from featstore.errors import CohortError

Map = NDArray[np.float32]

# Optical densities of (red, green, blue) of one unit of dye: Ruifrok & Johnston 2001 for
# hematoxylin and DAB (the source image), Macenko et al. 2009 for the two of H&E.
SOURCE_HEMATOXYLIN = (0.65, 0.70, 0.29)
HEMATOXYLIN = (0.63, 0.68, 0.36)
EOSIN = (0.10, 0.82, 0.44)
RED = (0.13, 0.80, 0.62)
BROWN = (0.30, 0.57, 0.76)
SECOND_DYE = {"h&e": EOSIN, "melan": RED, "sox10": BROWN}
BLOCK = 16
MIN_TISSUE = 0.75
N_DRAWN = 400
CROWDED = (0.16, 0.30)


@dataclass(frozen=True)
class Look:
    """What differs between stainings and scans, and means nothing.

    Args:
        first: Strength of the hematoxylin.
        second: Strength of the other dye.
        light: Brightness of the white.
        tint: Colour of the white, one factor a channel.
        blur: Radius of the defocus in px.
    """

    first: float
    second: float
    light: float
    tint: tuple[float, float, float]
    blur: float

    @classmethod
    def draw(cls, rng: np.random.Generator, around: Look | None = None) -> Look:
        """Draw a look: a case's, or a slice's close to its case's."""
        wide = 1.0 if around is None else 0.4
        base = around or cls(1.0, 1.0, 0.97, (1.0, 1.0, 1.0), 0.4)
        red, green, blue = (t * float(rng.uniform(1 - 0.02 * wide, 1)) for t in base.tint)
        return cls(
            first=base.first * float(rng.uniform(1 - 0.15 * wide, 1 + 0.15 * wide)),
            second=base.second * float(rng.uniform(1 - 0.2 * wide, 1 + 0.2 * wide)),
            light=base.light * float(rng.uniform(1 - 0.04 * wide, 1 + 0.02 * wide)),
            tint=(red, green, blue),
            blur=max(0.0, base.blur + float(rng.uniform(-0.4, 0.4)) * wide),
        )


@dataclass(frozen=True)
class Tissue:
    """The source image as densities.

    Args:
        maps: (4, H, W): nuclei, cytoplasm, stroma, and the share of a nucleus that takes brown.
        nuclei: Single real nuclei, enlarged and turned (density, 0 around), to be drawn into patches.
        covered: (H / 16, W / 16) share of tissue in each block.
    """

    maps: Map
    nuclei: tuple[Map, ...]
    covered: Map

    def crop(self, rng: np.random.Generator, width: int, height: int) -> Map:
        """Cut a random place that is mostly tissue, flipped and turned at random."""
        turned = bool(rng.integers(2))
        if turned:
            width, height = height, width
        side = self.maps.shape[1]
        for _ in range(50):
            x, y = int(rng.integers(side - width)), int(rng.integers(side - height))
            blocks = self.covered[y // BLOCK : (y + height) // BLOCK, x // BLOCK : (x + width) // BLOCK]
            if blocks.mean() >= MIN_TISSUE:
                break
        part = self.maps[:, y : y + height, x : x + width]
        part = part[:, :: -1 if rng.integers(2) else 1, :: -1 if rng.integers(2) else 1]
        return part.transpose(0, 2, 1) if turned else part


def load_tissue() -> Tissue:
    """Read the image from the installed scikit-image; nothing is ever downloaded.

    Raises:
        CohortError: scikit-image is not installed, or without its image.
    """
    rgb = tissue_pixels().astype(np.float32)
    from skimage.filters import gaussian  # slow to import; after the check that it is there

    density = -np.log(np.maximum(rgb, 1) / 255)
    dyes = np.array([SOURCE_HEMATOXYLIN, np.cross(SOURCE_HEMATOXYLIN, BROWN), BROWN], np.float32)
    dyes /= np.linalg.norm(dyes, axis=1, keepdims=True)
    blue, _, brown = np.moveaxis(density @ np.linalg.inv(dyes), -1, 0)
    nuclei = np.clip(gaussian(blue, 0.7) - 0.12, 0, 1.0) * 1.5
    cytoplasm = np.clip(brown / 2.2, 0, 1.4) ** 0.8
    solid = gaussian(density.mean(-1), 4)
    stroma = np.clip((solid - 0.07) / 0.05, 0, 1) * np.clip(density.mean(-1) * 2.2, 0.1, 0.6)
    positive = np.clip((gaussian(cytoplasm, 7) - 0.15) * 5, 0, 1)
    maps = np.stack([nuclei, cytoplasm, stroma, positive]).astype(np.float32)
    blocks = (solid > 0.09).reshape(rgb.shape[0] // BLOCK, BLOCK, rgb.shape[1] // BLOCK, BLOCK)
    # Enlarging and turning once, here, takes a fifth off the time of a cohort.
    rng, single = np.random.default_rng(0), _single_nuclei(maps)
    nuclei_drawn = tuple(_turned(single[n % len(single)], rng) for n in range(N_DRAWN))
    return Tissue(maps, nuclei_drawn, blocks.mean((1, 3)).astype(np.float32))


def tissue_pixels() -> NDArray[np.uint8]:
    """(512, 512, 3) uint8: colon tissue stained with DAB and hematoxylin.

    Raises:
        CohortError: scikit-image is not installed, or without its image.
    """
    return np.asarray(Image.open(_image_file()).convert("RGB"))


def _image_file() -> Path:
    """The file itself, since `skimage.data` would look for it on the network where pooch is installed."""
    spec = find_spec("skimage")
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        file = Path(folder) / "data" / "ihc.png"
        if file.is_file():
            return file
    raise CohortError(
        "the tissue image of the demo is missing",
        expected="data/ihc.png in the installed scikit-image",
        where=str(next(iter(folders), "scikit-image is not installed")),
        fix="pip install --force-reinstall 'scikit-image>=0.25'",
    )


def _single_nuclei(maps: Map) -> tuple[Map, ...]:
    """Nuclei that stand alone in the stroma, where no brown lies over them; with soft edges, mean 1."""
    from skimage.filters import gaussian
    from skimage.measure import label, regionprops

    nuclei, cytoplasm = maps[0], maps[1]
    found = []
    for region in regionprops(label((nuclei > 0.3) & (cytoplasm < 0.25))):
        if 50 <= region.area <= 260 and region.solidity > 0.88:
            top, left, bottom, right = region.bbox
            density = nuclei[top:bottom, left:right] / nuclei[top:bottom, left:right][region.image].mean()
            chromatin = np.pad(np.where(region.image, density, 1), 4, constant_values=1)
            edge = np.clip(gaussian(np.pad(region.image, 4).astype(float), 1.2) * 1.6 - 0.2, 0, 1)
            found.append((chromatin * edge).astype(np.float32))
    return tuple(found)


def crowd(part: Map, nuclei: tuple[Map, ...], rng: np.random.Generator) -> Map:
    """Fill a crop with large, dark, crowded nuclei: the planted change.

    Args:
        part: (4, H, W) crop.
        nuclei: Large nuclei to draw.
        rng: Source of chance.

    Returns:
        A changed copy.
    """
    _, height, width = part.shape
    solid = part[1:3].max(0) > 0.12
    field = np.zeros((height, width), np.float32)
    wanted = rng.uniform(*CROWDED) * field.size
    for _ in range(120):
        if np.count_nonzero(field > 0.4) > wanted:
            break
        nucleus = nuclei[int(rng.integers(len(nuclei)))]
        y, x = int(rng.integers(-10, height - 8)), int(rng.integers(-10, width - 8))
        nucleus = nucleus[max(0, -y) : height - y, max(0, -x) : width - x]
        place = np.s_[max(0, y) : max(0, y) + nucleus.shape[0], max(0, x) : max(0, x) + nucleus.shape[1]]
        inside = nucleus > 0.4
        if (inside & solid[place] & (field[place] < 0.4)).sum() >= 0.85 * inside.sum():
            dark = np.float32(rng.uniform(0.7, 1.1))
            field[place] = np.maximum(field[place], np.minimum(nucleus * dark, 1.5))
    changed = part.copy()
    changed[0] = np.maximum(part[0], field)
    changed[1] *= 1 - 0.5 * np.minimum(field, 1)
    return changed


def _turned(nucleus: Map, rng: np.random.Generator) -> Map:
    """One nucleus at a random angle, enlarged."""
    grown = rng.uniform(1.2, 1.9)
    size = (round(nucleus.shape[1] * grown), round(nucleus.shape[0] * grown))
    image = Image.fromarray(nucleus).resize(size, Image.Resampling.BICUBIC)
    image = image.rotate(float(rng.uniform(0, 360)), Image.Resampling.BILINEAR, expand=True)
    return np.asarray(image, np.float32).clip(0)


def paint(part: Map, stain: str, look: Look) -> Image.Image:
    """Give a crop the colours of a stain.

    Args:
        part: (4, H, W) crop.
        stain: h&e, melan or sox10.
        look: Strengths, light and focus.

    Returns:
        The patch, RGB.
    """
    nuclei, cytoplasm, stroma, positive = part
    if stain == "h&e":
        first, second = nuclei * 1.15, 0.32 * cytoplasm + 0.75 * stroma
    elif stain == "melan":
        first, second = nuclei * 0.9 + 0.12 * stroma, 0.75 * cytoplasm
    else:
        brown = nuclei * positive
        first, second = nuclei * 0.9 - 0.6 * brown + 0.15 * stroma + 0.06 * cytoplasm, 1.7 * brown
    dyes = np.array([HEMATOXYLIN, SECOND_DYE[stain]], np.float32)
    amounts = np.stack([first * look.first, second * look.second], -1).astype(np.float32)
    white = np.array(look.tint, np.float32) * min(look.light, 1.0) * 255
    image = Image.fromarray((np.exp(-(amounts @ dyes)) * white).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(look.blur))
