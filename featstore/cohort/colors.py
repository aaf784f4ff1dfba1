"""Red and blue swapped when the patches were saved? A cautious test, and a sheet for a person's eye.

Every score below is antisymmetric: swapping red and blue flips its sign. Positive
speaks for colours as they should be. The thresholds were calibrated on real H&E and
DAB tissue (lung, kidney, colon), natural and swapped: natural tissue must never warn,
and where the evidence is thin the answer is "undecided".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Verdict = Literal["natural", "swapped", "undecided"]
Rgb = NDArray[np.uint8]

WHITE = 215  # the darkest channel of background is above this
BLACK = 40  # the brightest channel of rotated squares' corners is below this
MIN_PIXELS = 200  # tissue pixels below which a patch says nothing
MIN_PATCHES = 4  # patches with evidence below which a stain is undecided
AGREEMENT = 0.75  # share of patches that must point the same way
THRESHOLD_HE = 0.5
THRESHOLD_CHROMOGEN = 0.6
MIN_PIGMENT = 0.002  # share of brown (melanin) or, swapped, azure pixels that counts as pigmented
MIN_CHROMA = 15  # max − min channel (8-bit) below which a hue is noise
STRONG_RED_CHROMA = 60  # haematoxylin, swapped to red, is paler than AEC or Fast Red
MAX_STRONG_RED = 0.1

# Histochemical stains have blues, reds and greens of their own: neither rule fits them.
_OTHER_DYES = (
    "masson",
    "trichrome",
    "alcian",
    "pas",
    "giemsa",
    "reticulin",
    "gram",
    "nissl",
    "congo",
    "elastic",
)
_SHEET_PATCHES = 12
_SHEET_SIDE = 96


@dataclass(frozen=True)
class ColorVerdict:
    """What a stain's sample says about red and blue.

    Attributes:
        verdict: natural, swapped, or undecided.
        score: Median over patches; positive speaks for natural colours. NaN without evidence.
        patches: How many sampled patches had evidence.
    """

    verdict: Verdict
    score: float
    patches: int


def judge(stain: str, patches: Sequence[Rgb]) -> ColorVerdict:
    """Whether a stain's red and blue look swapped.

    Args:
        stain: The stain's canonical name; decides which rule applies.
        patches: Decoded patches, each (H, W, 3) uint8, in the configured channel order.

    Returns:
        The verdict; stains dyed with neither H&E nor a chromogen are undecided.
    """
    if any(word in stain.casefold() for word in _OTHER_DYES):
        return ColorVerdict("undecided", float("nan"), 0)
    rule, threshold = (he_score, THRESHOLD_HE) if stain == "h&e" else (chromogen_score, THRESHOLD_CHROMOGEN)
    scores = np.array([s for s in map(rule, patches) if s is not None])
    if len(scores) == 0:
        return ColorVerdict("undecided", float("nan"), 0)
    score = float(np.median(scores))
    agree = float((np.sign(scores) == np.sign(score)).mean())
    verdict: Verdict = "undecided"
    if len(scores) >= MIN_PATCHES and agree >= AGREEMENT and abs(score) >= threshold:
        verdict = "natural" if score > 0 else "swapped"
    return ColorVerdict(verdict, score, len(scores))


def _tissue(rgb: Rgb) -> NDArray[np.float64]:
    """Pixels that are neither background nor black corner, (N, 3)."""
    pixels: NDArray[np.float64] = rgb.reshape(-1, 3).astype(np.float64)
    tissue: NDArray[np.float64] = pixels[(pixels.min(axis=1) < WHITE) & (pixels.max(axis=1) > BLACK)]
    return tissue


def _hue(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hue in degrees, (N,), of pixels that are not grey."""
    red, green, blue = pixels.T
    top, chroma = pixels.max(axis=1), np.maximum(np.ptp(pixels, axis=1), 1)
    sector = np.where(
        top == red,
        (green - blue) / chroma,
        np.where(top == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    return np.asarray((60 * sector) % 360)


def he_score(rgb: Rgb) -> float | None:
    """Evidence of one H&E patch: dark nuclei are bluer than light eosin; magenta is eosin.

    Two differences, because neither suffices alone. (R − B) of light minus dark
    tissue is positive where nuclei are the dark part; in eosin-rich, low-power tissue
    the dark part is eosin. There, haematoxylin (which absorbs relatively less green)
    takes more red than blue: the share of green in a pixel's optical density runs
    against (OD_R − OD_B). Pixels in which green is not absorbed most are left out:
    melanin, blood pigment and ink, or these with red and blue swapped.

    Args:
        rgb: (H, W, 3) uint8.

    Returns:
        (Δ(R − B) / 20) − 1.5 · correlation, or None without enough tissue.
    """
    pixels = _tissue(rgb)
    if len(pixels) < MIN_PIXELS:
        return None
    pigment = _pigment(pixels)
    density = np.maximum(-np.log10(np.maximum(pixels, 1) / 245), 0)
    dyed = density[:, 1] >= np.maximum(density[:, 0], density[:, 2])
    pixels, density = pixels[dyed], density[dyed]
    if len(pixels) < MIN_PIXELS:
        return None
    light = pixels.sum(axis=1)
    red_blue = pixels[:, 0] - pixels[:, 2]
    low, high = np.quantile(light, (0.2, 0.8))
    contrast = red_blue[light >= high].mean() - red_blue[light <= low].mean()

    total = density.sum(axis=1)
    enough = total > 0.3
    green = density[enough, 1] / total[enough]
    balance = (density[enough, 0] - density[enough, 2]) / total[enough]
    score = contrast / 20
    if len(green) >= MIN_PIXELS / 2 and green.std() > 1e-6 and balance.std() > 1e-6:
        score -= 1.5 * np.corrcoef(green, balance)[0, 1]
    # Melanin turns both differences round: where the pigment's own colour objects, nothing is known.
    return 0.0 if score * pigment < 0 else float(score)


def _pigment(pixels: NDArray[np.float64]) -> int:
    """1 where brown pigment (natural), −1 where azure (swapped) is seen, else 0."""
    hue, coloured = _hue(pixels), np.ptp(pixels, axis=1) >= MIN_CHROMA
    brown = float((coloured & (hue >= 5) & (hue <= 60)).mean())
    azure = float((coloured & (hue >= 180) & (hue <= 235)).mean())
    return (brown > azure) - (azure > brown) if max(brown, azure) >= MIN_PIGMENT else 0


def chromogen_score(rgb: Rgb) -> float | None:
    """Evidence of one immunostained patch: brown and violet-blue against azure and pale red.

    Hues of DAB (14–50°) and haematoxylin (232–278°) become 190–226° and 322–8° when
    red and blue are swapped. Strong reds may be a red chromogen, whose swapped hue
    is haematoxylin's own: such patches say nothing.

    Args:
        rgb: (H, W, 3) uint8.

    Returns:
        (natural − swapped) / (natural + swapped) pixels, or None without enough colour.
    """
    pixels = _tissue(rgb)
    chroma = np.ptp(pixels, axis=1)
    pixels, chroma = pixels[chroma >= MIN_CHROMA], chroma[chroma >= MIN_CHROMA]
    if len(pixels) < MIN_PIXELS:
        return None
    hue = _hue(pixels)
    reddish = (hue >= 322) | (hue <= 8)
    if (reddish & (chroma > STRONG_RED_CHROMA)).mean() > MAX_STRONG_RED:
        return None
    natural = ((hue >= 14) & (hue <= 50)) | ((hue >= 232) & (hue <= 278))
    swapped = ((hue >= 190) & (hue <= 226)) | reddish
    evidence = int(natural.sum() + swapped.sum())
    if evidence < MIN_PIXELS:
        return None
    return float((natural.sum() - swapped.sum()) / evidence)


def contact_sheet(
    samples: Mapping[str, Sequence[Rgb]], verdicts: Mapping[str, ColorVerdict]
) -> Image.Image:
    """Each stain's patches as they are and, below, with red and blue swapped.

    Args:
        samples: Stain → decoded patches, (H, W, 3) uint8; at most 12, evenly spaced, are shown.
        verdicts: Stain → what the test says, printed in the title.

    Returns:
        An RGB image: the upper row of a stain should look like the stain, the lower should not.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    cell, label, title, margin = _SHEET_SIDE + 4, 100, 28, 8
    width = margin + label + _SHEET_PATCHES * cell + margin
    block = title + 2 * cell + margin
    sheet = Image.new("RGB", (width, max(1, len(samples)) * block + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (stain, patches) in enumerate(samples.items()):
        top = row * block + margin
        verdict = verdicts[stain].verdict if stain in verdicts else "undecided"
        note = {"swapped": "red and blue look SWAPPED", "natural": "colours look natural (a hint)"}.get(
            verdict, "colours undecided: please look"
        )
        draw.text((margin, top), _drawable(f"{stain}: {note}"), fill="black", font=font)
        for line, text in enumerate(("as read", "swapped")):
            y = top + title + line * cell
            draw.text((margin, y + cell // 2 - 8), text, fill="black", font=font)
            for column, patch in enumerate(patches[:: -(-len(patches) // _SHEET_PATCHES) or 1]):
                image = _fitted(patch if line == 0 else np.ascontiguousarray(patch[..., ::-1]))
                x = margin + label + column * cell
                sheet.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    return sheet


def _drawable(text: str) -> str:
    """Pillow's built-in bitmap font, used where FreeType is missing, knows Latin-1 alone."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _fitted(patch: Rgb) -> Image.Image:
    from PIL import Image

    image = Image.fromarray(patch)
    scale = _SHEET_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)
