"""The forward pass: device, precision, batches of one size, and out-of-memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.backbones import Backbone, normalize
from featstore.errors import ConfigError, FeatstoreError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AMP = {"bf16": "bfloat16", "fp16": "float16", "off": "float32"}
# On CPUs a small batch stays in the caches; on GPUs a large one fills the processors.
# Allocators of the CPU, of cuBLAS and cuDNN and of pinned memory raise plain RuntimeErrors.
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "CUDA error: out of memory",
)
_AUTO_BATCH = {"cpu": 16, "cuda": 256}


def choose_device(text: str) -> torch.device:
    """The device that ``extract.device`` names.

    Raises:
        ConfigError: A GPU was asked for and there is none.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(text)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"no GPU {text!r}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices",
            expected="a CUDA device and a driver that this PyTorch can use",
            where="--gpu (extract.device)",
            fix="ask the scheduler for a GPU, check `nvidia-smi`, or run without --gpu on the CPU",
        )
    return device


def choose_compute_dtype(amp: str, device: torch.device, stored: str | None) -> str:
    """The precision of the forward pass.

    Args:
        amp: ``auto``, ``bf16``, ``fp16`` or ``off``.
        device: Where the forward pass runs.
        stored: The precision of a store that is to be extended; ``auto`` keeps it.
    """
    if amp != "auto":
        return _AMP[amp]
    if stored is not None:
        return stored
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bfloat16" if fast is not None and fast() else "float32"


def choose_batch_size(batch_size: int | str, device: torch.device) -> int:
    """The number of patches in a forward pass."""
    return _AUTO_BATCH[device.type] if batch_size == "auto" else int(batch_size)


class PendingFeatures:
    """Embeddings on their way to the host, (n, D); `result` waits for them."""

    def __init__(self, chunks: list[torch.Tensor], event: Any) -> None:
        self._chunks = chunks
        self._event = event

    def result(self) -> NDArray[Any]:
        """(n, D) float16 or float32 array."""
        if self._event is not None:
            self._event.synchronize()
        arrays = [chunk.numpy() for chunk in self._chunks]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class Embedder:
    """Pixels in, embeddings out.

    Every forward pass has exactly ``batch_size`` patches, short ones filled up by
    repeating the last: kernels are chosen by shape, and with one shape a patch's
    embedding does not depend on which patches are left to do after an interruption.

    Args:
        backbone: The frozen network.
        device: Where it runs.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16`` (autocast).
        stored_dtype: ``float16`` or ``float32``.
        batch_size: Patches in a forward pass; halved when memory runs out.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        compute_dtype: str,
        stored_dtype: str,
        batch_size: int,
    ) -> None:
        self.batch_size = batch_size
        self.halved = 0
        self.device = device
        self._backbone = backbone
        self._module = backbone.module.to(device).to(memory_format=torch.channels_last)
        self._compute = DTYPES[compute_dtype]
        self._stored = DTYPES[stored_dtype]

    def __call__(self, pixels: NDArray[np.uint8]) -> PendingFeatures:
        """Start a forward pass.

        Args:
            pixels: (n, H, W, 3) uint8.

        Returns:
            The n embeddings; on a GPU they may still be in the making.

        Raises:
            FeatstoreError: Memory does not suffice for one patch.
        """
        while True:
            try:
                with self._on_device():
                    return self._run(pixels)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise FeatstoreError(
                        f"{self.device} has too little memory for one patch of "
                        f"{pixels.shape[1]} × {pixels.shape[2]} px",
                        where="extract.batch_size",
                        fix="use a smaller --resize, another --device, or free the memory",
                    ) from error
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
        chunks = []
        for start in range(0, len(pixels), self.batch_size):
            chunk = pixels[start : start + self.batch_size]
            chunks.append(self._forward(chunk)[: len(chunk)])
        if self.device.type != "cuda":
            return PendingFeatures(chunks, None)
        hosts = [torch.empty(c.shape, dtype=c.dtype, pin_memory=True) for c in chunks]
        for host, chunk_on_device in zip(hosts, chunks, strict=True):
            host.copy_(chunk_on_device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return PendingFeatures(hosts, event)

    def _forward(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        if len(pixels) < self.batch_size:
            fill = np.repeat(pixels[-1:], self.batch_size - len(pixels), axis=0)
            pixels = np.concatenate((pixels, fill))
        batch = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        preprocessing = self._backbone.preprocessing
        x = normalize(batch, preprocessing.mean, preprocessing.std, torch.float32)
        with torch.autocast(self.device.type, self._compute, enabled=self._compute != torch.float32):
            features: torch.Tensor = self._module(x)
        return features.to(self._stored)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
