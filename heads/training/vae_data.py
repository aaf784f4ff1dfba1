"""What a step of the β-VAE sees: batches of images, mirrored by chance, decoded ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from heads.training.environments import ImageBatches, LabelledImages
from heads.training.vae_config import VaeConfig

Ints = NDArray[np.int64]
_AHEAD = 2  # batches that are decoded before they are wanted


class Batch(NamedTuple):
    """Images on the host.

    Attributes:
        pixels: (B, H, W, 3) uint8.
        labels: (B,) class indices.
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def pinned(self) -> Batch:
        """In memory from which a GPU copies by itself."""
        return Batch(self.pixels.pin_memory(), self.labels.pin_memory())


@dataclass(frozen=True, eq=False)
class VaeData:
    """What a training learns from and is judged by.

    Attributes:
        images: All of them.
        batches: Their pixels.
        train: Indices of the images that are learned from.
        val: Indices of those that choose the best step.
    """

    images: LabelledImages
    batches: ImageBatches
    train: Ints
    val: Ints

    def load(self, chosen: Ints) -> Batch:
        """These images, as they are."""
        pixels = self.batches.batch(chosen).permute(0, 2, 3, 1).contiguous()
        return Batch(pixels, torch.from_numpy(np.asarray(self.images.label[chosen], np.int64)))

    def training_batches(self, start: int, config: VaeConfig, pin: bool) -> Generator[Batch, None, None]:
        """The batches of every step from one on, without end; each depends on the seed and its step alone.

        Args:
            start: The first step, from 0.
            config: Of the section ``vae`` batch_size, seed and flip: half of the images are mirrored left
                to right, and half of them top to bottom.
            pin: Whether they go to a GPU.
        """
        order = self.batches.endless(self.train, config.batch_size, config.seed, start)

        def load(step: int, chosen: Ints) -> Batch:
            batch = self.load(chosen)
            if config.flip:
                rng = np.random.default_rng([config.seed, step])
                for axis in (2, 1):
                    turned = torch.from_numpy(np.flatnonzero(rng.random(len(chosen)) < 0.5))
                    batch.pixels[turned] = batch.pixels[turned].flip(axis)
            return batch.pinned() if pin else batch

        return _ahead(load, enumerate(order, start))

    def plain_batches(self, chosen: Ints, size: int, pin: bool) -> Generator[Batch, None, None]:
        """These images once, in their order, as they are; so many at a time."""

        def load(first: int, part: Ints) -> Batch:
            batch = self.load(part)
            return batch.pinned() if pin else batch

        return _ahead(load, ((i, chosen[i : i + size]) for i in range(0, len(chosen), size)))


def _ahead(
    load: Callable[[int, Ints], Batch], wanted: Iterable[tuple[int, Ints]]
) -> Generator[Batch, None, None]:
    """Batches in their order, loaded by a thread while the device computes."""
    with ThreadPoolExecutor(1, "batches") as pool:
        waiting: deque[Any] = deque()
        try:
            for number, chosen in wanted:
                waiting.append(pool.submit(load, number, chosen))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
