"""Batches of images: their pixels, what is kept of them, and in which order they come."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featstore.errors import ImageError
from featstore.images import decode, resize
from heads.training.environments import ImageBatches, LabelledImages, read_environments
from tests.heads.labelled import SIZE, make_environments, picture, small


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("featstore-images")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environments(tmp_path_factory.mktemp("root"))


# Pixels


def by_hand(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        pixels = decode(path.read_bytes(), "", "rgb", 10**6).pixels
    else:
        pixels = np.asarray(Image.open(path).convert("RGB"))
    return resize(pixels, (SIZE, SIZE), "bilinear")


@pytest.mark.parametrize("images_held", [0, 10, 1000])
def test_pixels_of_png_and_jpeg(made: Path, monkeypatch: pytest.MonkeyPatch, images_held: int) -> None:
    images = read_environments(made, None, 0)
    decoded: list[Path] = []
    load = ImageBatches._load
    monkeypatch.setattr(ImageBatches, "_load", lambda self, path: decoded.append(path) or load(self, path))
    with ImageBatches(images, SIZE, 2, images_held * 3 * SIZE**2) as batches:
        for chosen in (np.array([5, 0, 23, 5]), np.arange(24), np.arange(24)[::-1].copy()):
            found = batches.batch(chosen)
            assert found.shape == (len(chosen), 3, SIZE, SIZE)
            assert found.dtype == torch.uint8
            assert found.is_contiguous(memory_format=torch.channels_last)
            for index, pixels in zip(chosen.tolist(), found, strict=True):
                assert np.array_equal(pixels.permute(1, 2, 0).numpy(), by_hand(images.paths[index]))
            found.zero_()  # memory of its own
        assert batches.batch(np.array([], np.int64)).shape == (0, 3, SIZE, SIZE)
    assert len(decoded) == {0: 4 + 24 + 24, 10: 4 + 21 + 14, 1000: 4 + 21}[images_held]


def test_the_content_counts_not_the_name_and_grey_is_colour(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "png.jpg", "PNG")
    picture(1).convert("L").save(tmp_path / "grey.jpg")
    picture(1).convert("CMYK").save(tmp_path / "cmyk.jpg")
    images = small([0, 0, 0], [0, 0, 0])
    paths = tuple(tmp_path / name for name in ("png.jpg", "grey.jpg", "cmyk.jpg"))
    images = LabelledImages(paths, images.environment, images.label, ("e0",), ("c0",))
    with ImageBatches(images, 30, 1, 0) as batches:
        found = batches.batch(np.arange(3)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found[0], np.asarray(picture(1)))
    assert (found[1][..., 0] == found[1][..., 2]).all()
    assert np.array_equal(found[2], np.asarray(Image.open(paths[2]).convert("RGB")))


def test_channels_may_be_swapped(made: Path) -> None:
    images = read_environments(made, None, 0)
    other = LabelledImages(
        images.paths, images.environment, images.label, images.environments, images.classes, "bgr"
    )
    with ImageBatches(images, SIZE, 1, 0) as rgb, ImageBatches(other, SIZE, 1, 0) as bgr:
        assert torch.equal(rgb.batch(np.arange(3)), bgr.batch(np.arange(3)).flip(1))


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "gone.png", "text.jpg", "huge.jpg"])
def test_images_that_cannot_be_used_are_named(tmp_path: Path, name: str) -> None:
    for file in ("a.png", "b.png"):
        picture(0).save(tmp_path / file)
    bad = tmp_path / name
    if name != "gone.png":
        picture(0, 200 if name == "huge.jpg" else 30).save(bad)
        if name.startswith("bad"):
            bad.write_bytes(bad.read_bytes()[:200])
        if name == "text.jpg":
            bad.write_text("not an image")
    paths = (tmp_path / "a.png", bad, tmp_path / "b.png", tmp_path / "gone.too.png")
    label = np.zeros(4, np.int64)
    images = LabelledImages(paths, label, label, ("e0",), ("c0",), max_pixels=100 * 100)
    with ImageBatches(images, SIZE, 2, 1 << 20) as batches:
        with pytest.raises(ImageError) as caught:
            batches.batch(np.arange(3))
        assert name in f"{caught.value.found} {caught.value.where}"
        with pytest.raises(ImageError, match="2 images cannot be used") as caught:
            batches.batch(np.arange(4))
        assert all(file in caught.value.found for file in ("gone.too.png", name))
        assert batches.batch(np.array([0, 2])).shape[0] == 2


def test_several_threads_may_ask_at_once(made: Path) -> None:
    images = read_environments(made, None, 0)
    expected = torch.from_numpy(np.stack([by_hand(path) for path in images.paths])).permute(0, 3, 1, 2)
    wrong: list[str] = []
    with ImageBatches(images, SIZE, 2, 12 * 3 * SIZE**2) as batches:

        def ask(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(10):
                chosen = rng.integers(0, 24, 9)
                if not torch.equal(batches.batch(chosen), expected[chosen]):
                    wrong.append(f"{seed}: {chosen}")

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# Order


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 99),
    start=st.integers(0, 40),
)
def test_every_environment_comes_equally_often(
    sizes: list[int], batch_size: int, seed: int, start: int
) -> None:
    environment = [2 * e for e, size in enumerate(sizes) for _ in range(size)]
    order = np.random.default_rng(seed).permutation(len(environment))
    images = small(environment, [0] * len(environment)).take(order)
    with ImageBatches(images, SIZE, 1, 0) as batches:
        indices = np.arange(len(images))

        def first(count: int, step: int) -> list[list[int]]:
            found = itertools.islice(batches.endless(indices, batch_size, seed, step), count)
            return [batch.tolist() for batch in found]

        whole = first(start + 12, 0)
        assert first(12, start) == whole[start:]  # a training that is resumed
    counts = np.array(
        [np.bincount(images.environment[batch], minlength=2 * len(sizes))[::2] for batch in whole]
    )
    assert (counts.sum(axis=1) == batch_size).all()
    assert (np.ptp(counts, axis=1) <= 1).all()
    assert np.ptp(counts.cumsum(axis=0), axis=1).max() <= 1
    for e, size in enumerate(sizes):
        drawn = [i for batch in whole for i in batch if images.environment[i] == 2 * e]
        for at in range(0, len(drawn) - size + 1, size):
            assert len(set(drawn[at : at + size])) == size  # every pass sees every image once


def test_passes_and_seeds_are_orders_of_their_own() -> None:
    images = small([0] * 8, [0] * 8)
    with ImageBatches(images, SIZE, 1, 0) as batches:
        orders = [
            batch.tolist()
            for seed in (0, 1)
            for batch in itertools.islice(batches.endless(np.arange(8), 8, seed), 3)
        ]
        assert len({tuple(order) for order in orders}) == 6
        assert set(next(batches.endless(np.array([3, 5]), 4, 0)).tolist()) == {3, 5}
        with pytest.raises(ValueError, match="no images"):
            next(batches.endless(np.array([], np.int64), 4, 0))
