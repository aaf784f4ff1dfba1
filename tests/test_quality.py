"""The quality columns against a plain version, and on tissue that is blank, black or blurred."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from skimage import data

from featstore.quality import GRID, QUALITY_COLUMNS, WINDOW, quality


def plain(pixels):
    """The definitions, pixel by pixel."""
    height, width = pixels.shape[:2]
    sample = [
        [int(v) for v in pixels[y, x]]
        for y in range(0, height, math.ceil(height / GRID))
        for x in range(0, width, math.ceil(width / GRID))
    ]
    n = len(sample)
    means = [sum(p[c] for p in sample) / n for c in range(3)]

    def grey(p):
        return (77 * int(p[0]) + 150 * int(p[1]) + 29 * int(p[2]) + 128) // 256

    levels = {}
    for p in sample:
        levels[grey(p)] = levels.get(grey(p), 0) + 1
    entropy = -sum(k / n * math.log2(k / n) for k in levels.values())
    tissue = sum(max(p) >= 30 and (max(p) - min(p)) / max(p) >= 0.08 for p in sample) / n
    top, left = max(0, (height - WINDOW) // 2), max(0, (width - WINDOW) // 2)
    window = pixels[top : top + WINDOW, left : left + WINDOW]
    g = [[grey(p) for p in row] for row in window]
    laplacian = [
        g[y - 1][x] + g[y + 1][x] + g[y][x - 1] + g[y][x + 1] - 4 * g[y][x]
        for y in range(1, len(g) - 1)
        for x in range(1, len(g[0]) - 1)
    ]
    sharp = 0.0
    if laplacian:
        mean = sum(laplacian) / len(laplacian)
        sharp = sum((v - mean) ** 2 for v in laplacian) / len(laplacian)
    return [width, height, *means, entropy, tissue, sharp]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_equals_the_plain_version(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_allclose(quality(pixels), plain(pixels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(170, 131), (128, 300)])
def test_equals_the_plain_version_where_it_samples(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    np.testing.assert_allclose(quality(pixels), plain(pixels), rtol=1e-5)


def columns(pixels):
    values = quality(np.asarray(pixels))
    assert values.dtype == np.float32
    assert values.shape == (len(QUALITY_COLUMNS),)
    return dict(zip(QUALITY_COLUMNS, values.tolist(), strict=True))


def test_blank_black_blurred_and_real_tissue():
    tissue = Image.fromarray(data.immunohistochemistry()[100:324, 100:324])
    sharp = columns(tissue)
    blurred = columns(tissue.filter(ImageFilter.GaussianBlur(3)))
    white = columns(np.full((224, 224, 3), 243, np.uint8))
    black = columns(np.zeros((224, 224, 3), np.uint8))
    assert sharp["sharpness"] > 20 * blurred["sharpness"] > 0
    assert sharp["tissue_fraction"] > 0.5
    for empty in (white, black):
        assert (empty["tissue_fraction"], empty["entropy"], empty["sharpness"]) == (0, 0, 0)
    assert sharp["entropy"] > 5
    assert (white["mean_red"], black["mean_red"]) == (243, 0)


def test_a_black_corner_is_no_tissue():
    pixels = data.immunohistochemistry()[100:228, 100:228].copy()
    before = columns(pixels)["tissue_fraction"]
    pixels[:64] = 0
    assert columns(pixels)["tissue_fraction"] < 0.6 * before


def test_a_giant_costs_no_more_than_a_few_milliseconds():
    giant = np.broadcast_to(np.uint8(200), (7576, 7576, 3))
    best = min(_seconds(giant) for _ in range(5))
    assert best < 0.05


def _seconds(pixels):
    start = time.perf_counter()
    quality(pixels)
    return time.perf_counter() - start
