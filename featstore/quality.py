"""Numbers that tell a blank, black or blurred patch, computed beside its embedding.

Everything is taken on the decoded patch at its native size, before any resize. Large
patches are looked at in part, so that the cost has a bound: colour, entropy and tissue
on every k-th pixel of every k-th row, with the smallest k for which `GRID` a side
suffice; sharpness in a central window of at most `WINDOW` pixels a side, where a
subsample would not do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

QUALITY_COLUMNS = (
    "width",
    "height",
    "mean_red",
    "mean_green",
    "mean_blue",
    "entropy",
    "tissue_fraction",
    "sharpness",
)

GRID = 128
WINDOW = 160
# White glass, grey shadow and out-of-focus dust have next to no saturation, JPEG
# noise included; black corners of rotated patches have no brightness.
MIN_SATURATION_PERCENT = 8
MIN_BRIGHTNESS = 30
# Rec. 601 luma in 256ths, as in Pillow's conversion to grey.
_LUMA = (77, 150, 29)


def quality(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The quality columns of one patch.

    Args:
        pixels: (H, W, 3) uint8 RGB, at least 1 × 1.

    Returns:
        (8,) float32 in the order of `QUALITY_COLUMNS`: native width and height in
        pixels; mean red, green and blue (0…255); Shannon entropy of the 256-bin grey
        histogram in bits (0…8); the share of tissue (0…1), pixels of HSV saturation
        ≥ 8% and brightness (largest channel) ≥ 30; sharpness, the variance of the
        Laplacian (4 neighbours) of the grey image, 0 if a side is under 3 pixels.
    """
    height, width = pixels.shape[:2]
    channels = _channels(pixels[:: -(-height // GRID), :: -(-width // GRID)])
    red, green, blue = (int(c.sum(dtype=np.uint32)) / c.size for c in channels)
    top, left = max(0, (height - WINDOW) // 2), max(0, (width - WINDOW) // 2)
    window = _channels(pixels[top : top + WINDOW, left : left + WINDOW])
    return np.array(
        [
            width,
            height,
            red,
            green,
            blue,
            _entropy(_grey(*channels)),
            _tissue_fraction(*channels),
            _laplacian_variance(_grey(*window)),
        ],
        np.float32,
    )


def _channels(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Each of its own and contiguous: arithmetic on every third byte takes more than twice as long."""
    return [np.ascontiguousarray(pixels[..., c]) for c in range(3)]


def _grey(red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma, rounded; the sum is at most 256 · 255 + 128 and so fits 16 bits."""
    luma = np.multiply(red, _LUMA[0], dtype=np.uint16)
    luma += np.multiply(green, _LUMA[1], dtype=np.uint16)
    luma += np.multiply(blue, _LUMA[2], dtype=np.uint16)
    luma += np.uint16(128)
    luma >>= np.uint16(8)
    return luma.astype(np.uint8)


def _entropy(grey: NDArray[np.uint8]) -> float:
    counts = np.bincount(grey.ravel(), minlength=256)
    share = counts[counts > 0] / grey.size
    # `+ 0.0`: a single grey level gives -0.0.
    return float(-(share * np.log2(share)).sum() + 0.0)


def _tissue_fraction(red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8]) -> float:
    brightest = np.maximum(np.maximum(red, green), blue)
    chroma = brightest - np.minimum(np.minimum(red, green), blue)
    saturated = np.multiply(chroma, 100, dtype=np.uint16) >= np.multiply(
        brightest, MIN_SATURATION_PERCENT, dtype=np.uint16
    )
    return float(np.count_nonzero(saturated & (brightest >= MIN_BRIGHTNESS)) / red.size)


def _laplacian_variance(grey: NDArray[np.uint8]) -> float:
    if min(grey.shape) < 3:
        return 0.0
    g = grey.astype(np.int16)
    middle = g[1:-1]
    laplacian = middle[:, :-2] + middle[:, 2:]
    laplacian += (g[:-2] + g[2:])[:, 1:-1]
    laplacian -= middle[:, 1:-1] << 2
    # Sums of integers: exact, and a third of the time of NumPy's variance.
    n, total = laplacian.size, int(laplacian.sum(dtype=np.int32))
    squares = int(np.multiply(laplacian, laplacian, dtype=np.int32).sum(dtype=np.int64))
    return (n * squares - total * total) / (n * n)
