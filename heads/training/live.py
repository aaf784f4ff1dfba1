"""A backbone at work on pixels: embeddings with or without a gradient, in memory that does not grow.

The exact gradient of a case of any size, in two passes. The first computes every patch's embedding
without a gradient, chunk by chunk, and keeps nothing else. The head says what the loss wants of each
embedding: G = ∂L/∂F, a (P, D) table. The second pass computes each chunk once more, now with all that
a gradient needs, and hands it its rows of G: ∂L/∂θ = Σ_chunks (∂F_c/∂θ)ᵀ G_c. No activation is ever
held but those of one chunk. Dropout of a chunk is drawn from the same seed in both.

Source: gradient caching, Gao et al. 2021 (arXiv 2101.06983), there for the batches of a contrastive loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featstore.augmentation import Augmentation
from featstore.backbones import Backbone, normalize
from featstore.bags import Bag
from featstore.extraction.forward import budgeted_patches
from featstore.patch_pixels import Chunk, PatchPixels
from heads.training.course import seeded
from heads.training.optimizer import Amp, autocast

Index = NDArray[np.int64]
# Bytes that a forward pass with its gradient may take for each pixel of its input: ten times what
# extraction reckons with for a forward pass alone. Where it is too few the chunk is halved.
_GRADIENT_BYTES = 4000
_CPU_CHUNK, _MOST_ON_CPU, _MOST_ON_GPU = 16, 128, 512


@dataclass(frozen=True)
class Sight:
    """How the patches of some bags are seen: what pixels are asked for.

    Attributes:
        rows: (P,) rows of `Store.table`, bag after bag.
        pieces: Positions in ``rows`` that go through the backbone together; of one size each.
        twice: Whether pixels are asked for once more for the second pass.
        augmentation: Of the patches; None: plain.
        seed: Of whatever is drawn for them.
    """

    rows: Index
    pieces: list[Index]
    twice: bool = False
    augmentation: Augmentation | None = None
    seed: tuple[int, ...] = ()

    def requests(self) -> Iterator[Chunk]:
        """The pixels of every piece, in the order in which they are used."""
        for _ in range(1 + self.twice):
            for piece in self.pieces:
                yield Chunk(self.rows[piece], self.augmentation, self.seed)


class LiveBackbone:
    """A backbone on its device, that takes pixels as they are decoded.

    Args:
        backbone: Its module may be trained.
        device: Where it runs.
        amp: Precision; settled, not ``auto``.
        chunk: Patches of the usual size that are computed at once.
        least: Fewer are not computed alone, but with others: BatchNorm in training needs two.

    Attributes:
        module: Normalised patches to features.
        chunk: As given; halved by whoever runs out of memory.
        dtype: Of the parameters.
    """

    def __init__(
        self, backbone: Backbone, device: torch.device, amp: Amp, chunk: int, least: int = 1
    ) -> None:
        self.module: nn.Module = backbone.module.to(device)
        if device.type == "cuda":  # on a CPU, channels_last is slower with a gradient
            self.module = self.module.to(memory_format=torch.channels_last)
        self.device, self.amp, self.chunk, self.dim = device, amp, chunk, backbone.dim
        self.preprocessing, self.least = backbone.preprocessing, least
        self.dtype = next(iter(self.module.parameters())).dtype

    def pieces(self, sizes: Index) -> list[Index]:
        """Positions of patches that go through the backbone together, of one size each.

        Args:
            sizes: (P, 2) height and width in pixels.
        """
        usual = None if self.preprocessing.is_native else self.preprocessing.size
        found: list[Index] = []
        _, number = np.unique(sizes, axis=0, return_inverse=True)
        for each in range(int(number.max()) + 1):
            members = np.flatnonzero(number.ravel() == each)
            height, width = sizes[members[0]].tolist()
            count = -(-len(members) // budgeted_patches(self.chunk, usual, height, width))
            count = max(1, min(count, len(members) // self.least))
            # Strides, so that each is of all the cases: BatchNorm in training would otherwise take out
            # what tells one case from another.
            found += [members[i::count] for i in range(count)]
        return found

    def upload(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """(n, H, W, 3) uint8 on the device; from page-locked memory, so that nobody waits for it."""
        tensor = torch.from_numpy(pixels)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (n, D) of pixels (n, H, W, 3) uint8 on the device, in the parameters' precision."""
        seen = self.preprocessing
        x = normalize(pixels, seen.mean, seen.std, self.dtype)
        with autocast(self.device, self.amp):
            features: torch.Tensor = self.module(x)
        return features.to(self.dtype)

    def of(self, module: nn.Module) -> LiveBackbone:
        """The same with another module of its kind, such as a moving average."""
        found = copy.copy(self)
        found.module = module
        return found

    @torch.no_grad()
    def embed(self, sight: Sight, pixels: Iterator[NDArray[np.uint8]]) -> torch.Tensor:
        """(P, D) features, without a gradient."""
        found = torch.empty((len(sight.rows), self.dim), dtype=self.dtype, device=self.device)
        for piece in sight.pieces:
            found[self.index(piece)] = self(self.upload(next(pixels)))
        return found

    def index(self, piece: Index) -> torch.Tensor:
        """Positions, on the device."""
        return torch.from_numpy(piece).to(self.device, non_blocking=True)


class TwoPass:
    """Features of a batch's patches, and their gradient passed on to the backbone.

    Where all patches go through the backbone at once, they do so once, with the gradient.

    Args:
        live: The backbone, of which something learns.
        sight: What is looked at.
        pixels: What `Sight.requests` asks for, in this order.
        seed: Of dropout in the backbone.

    Attributes:
        features: (P, D), of which a loss is to be computed; then `backward`.
    """

    def __init__(
        self, live: LiveBackbone, sight: Sight, pixels: Iterator[NDArray[np.uint8]], seed: int
    ) -> None:
        self._live, self._sight, self._pixels, self._seed = live, sight, pixels, seed
        self._held: list[torch.Tensor] = []
        self.once = len(sight.pieces) == 1
        if self.once:
            with seeded(live.device, seed):
                found = live(live.upload(next(pixels)))
            # One piece may still be in an order of its own.
            self.features = found[live.index(np.argsort(sight.pieces[0]))]
            return
        self.features = torch.empty((len(sight.rows), live.dim), dtype=live.dtype, device=live.device)
        with torch.no_grad(), _statistics_kept(live.module):
            for number, piece in enumerate(sight.pieces):
                seen = live.upload(next(pixels))
                with seeded(live.device, seed + number):
                    self.features[live.index(piece)] = live(seen)
                if not sight.twice:
                    self._held.append(seen)
        self.features.requires_grad_()

    def backward(self) -> None:
        """Pass the gradient of ``features`` on to the backbone's parameters, and forget the pixels."""
        if self.once:
            return
        wanted = self.features.grad
        if wanted is None:
            raise RuntimeError("the loss has not been differentiated yet")
        live = self._live
        for number, piece in enumerate(self._sight.pieces):
            seen = live.upload(next(self._pixels)) if self._sight.twice else self._held[number]
            with seeded(live.device, self._seed + number):
                found = live(seen)
            torch.autograd.backward(found, wanted[live.index(piece)])
        self._held = []


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm in training updates its statistics in the second pass alone, not in both."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def sight_of(
    live: LiveBackbone,
    pixels: PatchPixels,
    bags: Sequence[Bag],
    held: int = 0,
    augmentation: Augmentation | None = None,
    seed: tuple[int, ...] = (),
    learns: bool = False,
) -> Sight:
    """How the patches of bags are seen.

    Args:
        live: The backbone.
        pixels: The patches' files.
        bags: One or more.
        held: Bytes of pixels that may be kept for the second pass.
        augmentation: Of the patches; None: plain.
        seed: Of whatever is drawn for them.
        learns: Whether there will be a second pass.
    """
    rows = np.concatenate([bag.rows for bag in bags])
    sizes = pixels.size_of(rows)
    pieces = live.pieces(sizes)
    bytes_ = 3 * int(sizes.prod(axis=1).sum())
    twice = learns and len(pieces) > 1 and bytes_ > held
    return Sight(rows, pieces, twice, augmentation, seed)


def choose_chunk(chunk: int | str, device: torch.device, size: int) -> int:
    """Patches of a size (side in px) that are computed at once with what their gradient needs.

    Args:
        chunk: The setting; ``auto``: on a CPU as many pixels as 16 patches of 224 px have, at most 128
            patches; on a GPU what half of its memory allows, at most 512.
        device: Where it is computed.
        size: Side in px.
    """
    if chunk != "auto":
        return int(chunk)
    if device.type != "cuda":
        return max(1, min(_MOST_ON_CPU, _CPU_CHUNK * 224**2 // size**2))
    memory = int(torch.cuda.get_device_properties(device).total_memory)
    return max(1, min(_MOST_ON_GPU, memory // 2 // (_GRADIENT_BYTES * size**2)))
