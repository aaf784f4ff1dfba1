"""Augmented views of a patch, cached beside the plain one, so that a frozen cache keeps augmentation.

A view depends on nothing but the seed, the patch's ids and its own number: not on the order of the
work, on shards or on interruptions.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from featstore.images import Preprocessing, prepare

# Part of the fingerprint of stores with views: change it with what it describes.
VIEW_POLICY = "flips, right-angle turns, crops of 0.7 to 1, brightness contrast and colours by 0.1; v1"
_LEAST_AREA, _JITTER = 0.7, 0.1


def make_views(
    pixels: NDArray[np.uint8], preprocessing: Preprocessing, count: int, seed: int, key: str
) -> NDArray[np.uint8]:
    """All views of a patch, as the backbone wants them.

    Args:
        pixels: (H, W, 3) uint8 RGB, as decoded.
        preprocessing: The backbone's. With native sizes views keep the patch's size: no crops, and
            half turns only unless it is square.
        count: Number of views V.
        seed: Of all views of a store.
        key: What tells this patch from all others.

    Returns:
        (V, h, w, 3) uint8; the first is the plain one.
    """
    plain = prepare(pixels, preprocessing)
    views = np.empty((count, *plain.shape), np.uint8)
    views[0] = plain
    for number in range(1, count):
        digest = hashlib.sha256(f"{seed}\0{key}\0{number}".encode("utf-8", "surrogateescape")).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
        views[number] = _view(pixels, preprocessing, rng)
    return views


def _view(
    pixels: NDArray[np.uint8], preprocessing: Preprocessing, rng: np.random.Generator
) -> NDArray[np.uint8]:
    # Every number is drawn whether or not it is used, so that views of two sizes stay alike.
    area, down, right = rng.uniform(_LEAST_AREA, 1), rng.random(), rng.random()
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    gains = 1 + rng.uniform(-_JITTER, _JITTER, 5)
    if not preprocessing.is_native:
        height, width = (max(1, round(side * area**0.5)) for side in pixels.shape[:2])
        top, left = (
            int(where * (whole - part + 1))
            for where, whole, part in ((down, pixels.shape[0], height), (right, pixels.shape[1], width))
        )
        pixels = pixels[top : top + height, left : left + width]
    view = prepare(np.ascontiguousarray(pixels), preprocessing)
    square = view.shape[0] == view.shape[1]
    view = np.rot90(view, turns if square else turns // 2 * 2)
    if flip:
        view = view[:, ::-1]
    return _jitter(view, gains)


def _jitter(view: NDArray[np.uint8], gains: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Brightness, contrast (about mid-grey) and one gain for each colour, by a table of 256 levels."""
    brightness, contrast, *colors = gains
    levels = (np.arange(256) - 127.5) * contrast + 127.5
    jittered = np.empty(view.shape, np.uint8)
    for channel, gain in enumerate(colors):
        table = np.clip(np.rint(levels * brightness * gain), 0, 255).astype(np.uint8)
        jittered[..., channel] = table[view[..., channel]]
    return jittered
