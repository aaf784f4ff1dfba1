"""Random variants of a patch that say the same of the tissue: cropped, turned, flipped, recoloured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featstore.images import Preprocessing, prepare


@dataclass(frozen=True)
class Augmentation:
    """How far a variant may be from its patch.

    Attributes:
        least_area: Share of the patch's area that a crop of its own aspect keeps at least, in (0, 1].
        flip: Whether it may be mirrored.
        rotate: Whether it may be turned by right angles.
        jitter: Brightness, contrast and each colour are multiplied by 1 − jitter to 1 + jitter; in [0, 1).
    """

    least_area: float = 0.7
    flip: bool = True
    rotate: bool = True
    jitter: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.least_area <= 1 or not 0 <= self.jitter < 1:
            raise ValueError(
                f"least_area {self.least_area} is not in (0, 1], or jitter {self.jitter} in [0, 1)"
            )


def augment(
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """A random variant of a patch, as the backbone wants it.

    Args:
        pixels: (H, W, 3) uint8 RGB, as decoded; left as it is.
        preprocessing: The backbone's. With native sizes the variant keeps the patch's size: no crops,
            and half turns only unless it is square.
        augmentation: How far it may be from the patch.
        rng: Ten numbers are drawn from it, whatever is made of them.

    Returns:
        (h, w, 3) uint8 of `Preprocessing.input_size`, contiguous.
    """
    # Every number is drawn whether or not it is used, so that variants of two sizes stay alike.
    area, down, right = rng.uniform(augmentation.least_area, 1), rng.random(), rng.random()
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    gains = 1 + rng.uniform(-augmentation.jitter, augmentation.jitter, 5)
    if not preprocessing.is_native:
        height, width = (max(1, round(side * area**0.5)) for side in pixels.shape[:2])
        top, left = (
            int(where * (whole - part + 1))
            for where, whole, part in ((down, pixels.shape[0], height), (right, pixels.shape[1], width))
        )
        pixels = pixels[top : top + height, left : left + width]
    variant = prepare(np.ascontiguousarray(pixels), preprocessing)
    if augmentation.rotate:
        square = variant.shape[0] == variant.shape[1]
        variant = np.rot90(variant, turns if square else turns // 2 * 2)
    if augmentation.flip and flip:
        variant = variant[:, ::-1]
    return _recoloured(variant, gains)


def _recoloured(pixels: NDArray[np.uint8], gains: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Brightness, contrast (about mid-grey) and one gain for each colour, by a table of 256 levels."""
    brightness, contrast, *colors = gains
    levels = (np.arange(256) - 127.5) * contrast + 127.5
    changed = np.empty(pixels.shape, np.uint8)
    for channel, gain in enumerate(colors):
        table = np.clip(np.rint(levels * brightness * gain), 0, 255).astype(np.uint8)
        changed[..., channel] = table[pixels[..., channel]]
    return changed
