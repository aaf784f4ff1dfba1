"""The forward pass in PyTorch: on GPUs, and on CPUs without OpenVINO."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.backbones import Backbone, normalize
from featstore.backbones.folding import fold_batch_norms
from featstore.errors import ConfigError, FeatstoreError, first_line
from featstore.extraction.forward import (
    DTYPES,
    FOLDED,
    UNFOLDED,
    PendingFeatures,
    budgeted_patches,
    is_out_of_memory,
    no_memory_for_one,
)
from featstore.extraction.utilisation import BusyClock

# Calls that a GPU works on or waits for: enough that it never idles; pixels must not pile up before it.
_IN_FLIGHT = 4


class _Copied:
    """Embeddings on the host, or being copied there."""

    def __init__(self, chunks: list[torch.Tensor], event: Any) -> None:
        self._chunks = chunks
        self._event = event

    def collect(self) -> list[torch.Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._chunks


# Patches of a size of their own in a pass on a CPU in bfloat16.
_ALIKE = 8


class TorchEmbedder:
    """Pixels in, embeddings out; see `forward.Embedder` for what it promises.

    Every forward pass of patches of the configured size has exactly ``batch_size`` patches, short
    ones filled up by repeating the last: kernels are chosen by shape, and with one shape a patch's
    embedding does not depend on which patches are left to do after an interruption. Of other sizes
    there may be any number in a pass on a GPU. On a CPU there is one in float32, for the same reason,
    and in bfloat16 up to eight, which give the same bits as one alone: of sixteen, DenseNet121's
    do not at 64 px and below.

    Args:
        backbone: The frozen network.
        device: Where it runs.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16`` (autocast).
        stored_dtype: ``float16`` or ``float32``.
        batch_size: Patches in a forward pass; halved when memory runs out.
        fold: Fold batch normalisation into convolutions.
        compile: Use ``torch.compile`` for patches of the configured size.

    Raises:
        ConfigError: Nothing can be compiled here.

    Attributes:
        batch_size: As given, or what memory allows.
        halved: How often memory ran out.
        device: Where it runs.
        runtime: What computes, as the fingerprint calls it.
        folding: What became of batch normalisation, in words.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        compute_dtype: str,
        stored_dtype: str,
        batch_size: int,
        fold: bool = False,
        compile: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.halved = 0
        self.device = device
        self.runtime = FOLDED if fold else UNFOLDED
        self.folding = "not asked for"
        self._preprocessing = backbone.preprocessing
        self._size = None if backbone.preprocessing.is_native else backbone.preprocessing.size
        module = backbone.module
        if fold:
            folded = fold_batch_norms(module, backbone.preprocessing.size)
            module, self.folding = folded.module, str(folded)
        self._module = module.to(device).to(memory_format=torch.channels_last)
        self._compiled = self._module
        self._compute = DTYPES[compute_dtype]
        self._stored = DTYPES[stored_dtype]
        # Copies to a GPU go beside its work on earlier batches.
        self._copies: Any = None
        self._in_flight: deque[Any] = deque()
        self._clock = BusyClock()
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if compile and self._size is not None:
            self._compile(self._size)

    @property
    def busy_seconds(self) -> float | None:
        """How long it has computed, in seconds; None on a GPU."""
        return None if self.device.type == "cuda" else self._clock.seconds

    def forward_size(self, height: int, width: int) -> int:
        """How many patches of a size in pixels go into one forward pass."""
        usual = (height, width) == (self._size, self._size)
        most = budgeted_patches(self.batch_size, self._size, height, width)
        if usual or self.device.type != "cpu":
            return most
        return min(most, 1 if self._compute == torch.float32 else _ALIKE)

    def _compile(self, size: int) -> None:
        """Compile now, before anything is written, and not at the first batch.

        Raises:
            ConfigError: Nothing can be compiled here.
        """
        try:
            self._compiled = cast(nn.Module, torch.compile(self._module, dynamic=False))
            self(np.zeros((1, size, size, 3), np.uint8)).result()
            self._clock = BusyClock()
        except FeatstoreError:
            raise
        # Compilers, their caches and their processes raise errors of any kind.
        except Exception as error:
            raise ConfigError(
                f"torch.compile cannot compile this backbone: {first_line(error)}",
                expected="a C++ compiler (g++, or what CXX names), Triton on a GPU, a cache folder",
                where="extract.compile",
                fix="install a compiler, or leave it out: --no-compile (extract.compile: false)",
            ) from error

    def close(self) -> None:
        """Nothing to give back before the object itself goes."""

    def __call__(self, pixels: NDArray[np.uint8]) -> PendingFeatures:
        """Start a forward pass; on a GPU, waits only while it is far behind.

        Args:
            pixels: (n, H, W, 3) uint8.

        Returns:
            The n embeddings; on a GPU they may still be in the making.

        Raises:
            FeatstoreError: Memory does not suffice for one patch.
        """
        while True:
            try:
                with self._on_device(), self._clock:
                    return self._run(pixels)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.forward_size(*pixels.shape[1:3]) == 1:
                    raise no_memory_for_one(self.device, pixels) from error
            # Outside the handler, so that the failed pass's tensors are free again.
            self.batch_size //= 2
            self.halved += 1
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Events, streams and precision as this device's, whichever one is current."""
        if self.device.type != "cuda":
            yield
            return
        # float32 must mean float32: TF32 rounds to 10 bits, and the fingerprint would not say so.
        exact = self._compute == torch.float32
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        with torch.cuda.device(self.device):
            try:
                if exact:
                    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
                yield
            finally:
                torch.backends.cudnn.allow_tf32 = convolutions
                torch.backends.cuda.matmul.allow_tf32 = products

    @torch.inference_mode()
    def _run(self, pixels: NDArray[np.uint8]) -> PendingFeatures:
        while len(self._in_flight) >= _IN_FLIGHT:
            self._in_flight.popleft().synchronize()
        step = self.forward_size(*pixels.shape[1:3])
        chunks = []
        for start in range(0, len(pixels), step):
            chunk = pixels[start : start + step]
            chunks.append(self._forward(chunk)[: len(chunk)])
        if self.device.type != "cuda":
            return PendingFeatures(_Copied(chunks, None))
        hosts = [torch.empty(c.shape, dtype=c.dtype, pin_memory=True) for c in chunks]
        for host, chunk_on_device in zip(hosts, chunks, strict=True):
            host.copy_(chunk_on_device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._in_flight.append(event)
        return PendingFeatures(_Copied(hosts, event))

    def _forward(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        usual = pixels.shape[1:3] == (self._size, self._size)
        if usual and len(pixels) < self.batch_size:
            fill = np.repeat(pixels[-1:], self.batch_size - len(pixels), axis=0)
            pixels = np.concatenate((pixels, fill))
        x = normalize(
            self._on_its_way(torch.from_numpy(np.ascontiguousarray(pixels))),
            self._preprocessing.mean,
            self._preprocessing.std,
            torch.float32,
        )
        module = self._compiled if usual else self._module
        with torch.autocast(self.device.type, self._compute, enabled=self._compute != torch.float32):
            features: torch.Tensor = module(x)
        return features.to(self._stored)

    def _on_its_way(self, batch: torch.Tensor) -> torch.Tensor:
        """The batch on the device; a GPU's current stream waits for it, the host does not."""
        if self._copies is None:
            return batch
        pinned = batch.pin_memory()
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            copied = pinned.to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        # Otherwise its memory could be given to the next copy while it is still being read.
        copied.record_stream(current)
        return copied
