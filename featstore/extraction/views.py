"""Augmented views of a patch, cached beside the plain one, so that a frozen cache keeps augmentation.

A view depends on nothing but the seed, the patch's ids and its own number: not on the order of the
work, on shards or on interruptions.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from featstore.augmentation import Augmentation, augment
from featstore.images import Preprocessing, prepare

# Part of the fingerprint of stores with views: change it with what it describes.
VIEW_POLICY = "flips, right-angle turns, crops of 0.7 to 1, brightness contrast and colours by 0.1; v1"
_AUGMENTATION = Augmentation(least_area=0.7, flip=True, rotate=True, jitter=0.1)


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
        views[number] = augment(pixels, preprocessing, _AUGMENTATION, rng)
    return views
