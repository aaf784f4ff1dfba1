"""Random variants of a patch."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featstore.augmentation import Augmentation, augment
from featstore.extraction.views import make_views
from featstore.images import Preprocessing, prepare

HALF = (0.5, 0.5, 0.5)
FIXED = Preprocessing(32, None, "bilinear", HALF, HALF)
NATIVE = Preprocessing("native", None, "bilinear", HALF, HALF)
NATIVE32 = Preprocessing("native32", None, "bilinear", HALF, HALF)
CROPPED = Preprocessing(36, 32, "bicubic", HALF, HALF)
NOTHING = Augmentation(least_area=1, flip=False, rotate=False, jitter=0)
PREPROCESSINGS = st.sampled_from([FIXED, NATIVE, NATIVE32, CROPPED])
AUGMENTATIONS = st.builds(
    Augmentation,
    least_area=st.floats(0.01, 1),
    flip=st.booleans(),
    rotate=st.booleans(),
    jitter=st.floats(0, 0.9),
)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("preprocessing", "square", "oblong"),
    [
        (FIXED, "5d9f427dc0486e63", "15245d53d17e2a22"),
        (NATIVE, "3bc06925ff7041c2", "297595926856bf48"),
        (NATIVE32, "4b810895782c5f24", "31de2320f115e1f5"),
        (CROPPED, "cd47596ca3a44b87", "2264b604fe51638c"),
    ],
    ids=["fixed", "native", "native32", "cropped"],
)
def test_the_views_of_stores_stay_what_they_were(
    preprocessing: Preprocessing, square: str, oblong: str
) -> None:
    found = [
        sha256(make_views(noise(*size), preprocessing, 6, 3, "1\0h&e").tobytes()).hexdigest()[:16]
        for size in ((40, 40), (40, 60))
    ]
    assert found == [square, oblong]  # else VIEW_POLICY must have another name


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    seed=st.integers(0, 2**32 - 1),
    preprocessing=PREPROCESSINGS,
    augmentation=AUGMENTATIONS,
)
def test_any_variant_has_the_backbones_size_and_as_many_draws_as_any_other(
    size: tuple[int, int], seed: int, preprocessing: Preprocessing, augmentation: Augmentation
) -> None:
    pixels = noise(*size)
    before = pixels.copy()
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed)
    variant = augment(pixels, preprocessing, augmentation, rng)
    assert variant.shape == prepare(pixels, preprocessing).shape
    assert variant.dtype == np.uint8
    assert variant.flags.c_contiguous
    assert np.array_equal(pixels, before)
    assert np.array_equal(augment(pixels, preprocessing, NOTHING, other), prepare(pixels, preprocessing))
    assert rng.random() == other.random()


def by_hand(pixels: np.ndarray, augmentation: Augmentation, seed: int, side: int) -> np.ndarray:
    """What the docstrings say, of whole numbers one by one."""
    rng = np.random.default_rng(seed)
    area = augmentation.least_area + (1 - augmentation.least_area) * rng.random()
    down, right = rng.random(), rng.random()
    turns, mirrored = rng.integers(4), rng.integers(2)
    brightness, contrast, *colors = (
        1 - augmentation.jitter + 2 * augmentation.jitter * rng.random() for _ in range(5)
    )
    height, width = (round(n * np.sqrt(area)) for n in pixels.shape[:2])
    top, left = int(down * (len(pixels) - height + 1)), int(right * (pixels.shape[1] - width + 1))
    cut = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    shown = cut.resize((side, side), Image.Resampling.BILINEAR)
    for _ in range(int(turns) if augmentation.rotate else 0):
        shown = shown.transpose(Image.Transpose.ROTATE_90)
    if augmentation.flip and mirrored:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = ((np.asarray(shown, np.float64) - 127.5) * contrast + 127.5) * brightness * np.array(colors)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(least_area=0.3, flip=False, rotate=True, jitter=0.4),
        Augmentation(least_area=0.9, flip=True, rotate=False, jitter=0),
    ],
)
def test_a_variant_by_hand(augmentation: Augmentation) -> None:
    pixels = noise(48, 64)
    for seed in range(20):
        variant = augment(pixels, FIXED, augmentation, np.random.default_rng(seed))
        expected = by_hand(pixels, augmentation, seed, 32).astype(int)
        # A level that is half-way is rounded as the last bit of the products has it.
        assert np.abs(variant - expected).max() <= 1
        assert (variant == expected).mean() > 0.99


@pytest.mark.parametrize("wrong", [{"least_area": 0}, {"least_area": 1.1}, {"jitter": 1}, {"jitter": -0.1}])
def test_settings_without_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is not in"):
        Augmentation(**wrong)  # type: ignore[arg-type]
