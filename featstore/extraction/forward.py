"""The forward pass: where, how exactly, and by what it is computed; `pytorch` and `openvino` do it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.backbones import Backbone
from featstore.errors import ConfigError, FeatstoreError
from featstore.precision import has_fast_bf16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AMP = {"bf16": "bfloat16", "fp16": "float16", "off": "float32"}
# Allocators of the CPU, of cuBLAS and cuDNN, of pinned memory and of OpenVINO raise plain RuntimeErrors.
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",  # within the error of a compiler
    "bad_alloc",
    "bad allocation",
)
# On CPUs a small batch stays in the caches; on GPUs a large one fills the processors, up to a point.
# At 224 px, where more do not fit into a core's caches, and of whatever size.
_CPU_BATCH, _MOST_ON_CPU, _GPU_BATCH = 16, 128, 512
# Patches of other sizes than the usual: as many pixels in a pass as this side would make.
_USUAL_SIDE = 224
# Bytes that a forward pass takes for each pixel of its input. Measured as growth of the peak resident
# size at 1,536 and 3,000 px: at most 351 in bfloat16 and 701 in float32 (DenseNet121 in OpenVINO).
BYTES_A_PIXEL = {"bfloat16": 400, "float16": 400, "float32": 800}
# Texts of the fingerprint. Stores from before folding say `torch`, and are extended with the same bits.
UNFOLDED, FOLDED, OPENVINO = "torch", "torch, folded", "openvino"


def choose_device(text: str, setting: str = "extract.device") -> torch.device:
    """The device that a setting names.

    Args:
        text: ``auto``, ``cpu`` or ``cuda[:N]``.
        setting: Which, for errors.

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
            where=f"--gpu ({setting})",
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
    if has_fast_bf16(device):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def choose_batch_size(
    batch_size: int | str,
    device: torch.device,
    compute_dtype: str,
    size: int | None = None,
    runtime: str = FOLDED,
) -> int:
    """The number of patches in a forward pass.

    Args:
        batch_size: The setting; ``auto``: on a CPU 16, of patches smaller than 224 px up to 128 with as
            many pixels; on a GPU what a quarter of its memory allows.
        device: Where it runs.
        compute_dtype: Of the forward pass.
        size: Side of the configured size in px; None where every patch keeps its own.
        runtime: What computes it; OpenVINO takes a few patches at a time, whatever the batch.
    """
    if batch_size != "auto":
        return int(batch_size)
    if device.type != "cuda":
        if size is None or runtime == OPENVINO:
            return _CPU_BATCH
        fitting = _CPU_BATCH * _USUAL_SIDE**2 // size**2
        return _power_of_two(max(_CPU_BATCH, min(_MOST_ON_CPU, fitting)))
    # All of its memory, not what is free: a run that is resumed shall have the same batch, and bits.
    total = int(torch.cuda.get_device_properties(device).total_memory)
    return affordable_patches(total // 4, compute_dtype, size or _USUAL_SIDE)


def affordable_patches(memory: int, compute_dtype: str, size: int) -> int:
    """The number of patches, a power of two, whose forward pass fits into so many bytes; 1 … 512."""
    fitting = memory // (BYTES_A_PIXEL[compute_dtype] * size**2)
    return _power_of_two(max(1, min(_GPU_BATCH, fitting)))


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def choose_runtime(text: str, device: torch.device, stored: str | None) -> str:
    """What computes the forward pass, as the fingerprint calls it.

    Args:
        text: ``auto``, ``torch`` or ``openvino``.
        device: Where the forward pass runs.
        stored: The runtime of a store that is to be extended; kept where it can be.

    Returns:
        ``torch``, ``torch, folded`` or ``openvino``.

    Raises:
        ConfigError: OpenVINO is needed and is not installed, or was asked for on a GPU.
    """
    chosen = _chosen_runtime(text, device, stored)
    if chosen == OPENVINO and device.type != "cpu":
        reason = "the store was computed with OpenVINO" if text == "auto" else "extract.runtime is openvino"
        raise ConfigError(
            f"{reason}, which does not run on {device}",
            expected="a CPU for OpenVINO, PyTorch for a GPU",
            where="extract.runtime, extract.device",
            fix="use --device cpu, or set extract.runtime: torch and another store: --store-path FOLDER",
        )
    if chosen == OPENVINO:
        from featstore.extraction.openvino_model import load_openvino

        load_openvino()
    return chosen


def _chosen_runtime(text: str, device: torch.device, stored: str | None) -> str:
    if text == "openvino":
        return OPENVINO
    if stored in (UNFOLDED, FOLDED) or (stored == OPENVINO and text == "auto"):
        return stored
    # Asked without importing it: whoever does not use it must not wait for it.
    if text == "auto" and device.type == "cpu" and find_spec("openvino") is not None:
        return OPENVINO
    return FOLDED


def make_embedder(
    backbone: Backbone,
    device: torch.device,
    compute_dtype: str,
    stored_dtype: str,
    batch_size: int,
    runtime: str,
    compile: bool,
) -> Embedder:
    """The backbone, ready to take batches.

    Args:
        backbone: The frozen network.
        device: Where it runs.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16``.
        stored_dtype: ``float16`` or ``float32``.
        batch_size: Patches in a forward pass.
        runtime: As `choose_runtime` gives it.
        compile: Use ``torch.compile``; means nothing to OpenVINO.

    Raises:
        ConfigError: The runtime is not there, or cannot run this backbone.
    """
    if runtime == OPENVINO:
        from featstore.extraction.openvino import OpenVinoEmbedder

        return OpenVinoEmbedder(backbone, compute_dtype, stored_dtype, batch_size)
    from featstore.extraction.pytorch import TorchEmbedder

    fold = runtime == FOLDED
    return TorchEmbedder(backbone, device, compute_dtype, stored_dtype, batch_size, fold, compile)


class Outcome(Protocol):
    """What a forward pass will have computed."""

    def collect(self) -> list[torch.Tensor]:
        """The embeddings, (n, D) in all, on the host; waits for them."""
        ...


class PendingFeatures:
    """Embeddings on their way to the host, (n, D); `result` waits for them."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def result(self) -> NDArray[Any]:
        """(n, D) float16 or float32 array.

        Raises:
            FeatstoreError: Memory does not suffice for one patch.
        """
        arrays = [chunk.numpy() for chunk in self._outcome.collect()]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class Embedder(Protocol):
    """Pixels in, embeddings out, whatever computes them.

    Attributes:
        batch_size: Patches of the usual size in a forward pass.
        halved: How often memory ran out.
        device: Where it runs.
        runtime: What computes, as the fingerprint calls it.
        folding: What became of batch normalisation, in words.
    """

    batch_size: int
    halved: int
    device: torch.device
    runtime: str
    folding: str

    @property
    def busy_seconds(self) -> float | None:
        """How long it has computed; None where only the device's driver knows."""
        ...

    def forward_size(self, height: int, width: int) -> int:
        """How many patches of a size in pixels go into one forward pass."""
        ...

    def __call__(self, pixels: NDArray[np.uint8]) -> PendingFeatures:
        """Start a forward pass of patches (n, H, W, 3) uint8: any n, any size."""
        ...

    def close(self) -> None:
        """Give threads and memory back."""
        ...


def budgeted_patches(batch_size: int, size: int | None, height: int, width: int) -> int:
    """Patches in a forward pass: ``batch_size`` of the configured size, of others as many pixels.

    Args:
        batch_size: Patches of 224 × 224 px, or of the configured size.
        size: Side of the configured size in px; None where every patch keeps its own.
        height: In px.
        width: In px.
    """
    if (height, width) == (size, size):
        return batch_size
    return max(1, batch_size * _USUAL_SIDE**2 // (height * width))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or OpenVINO says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def no_memory_for_one(device: torch.device, pixels: NDArray[np.uint8]) -> FeatstoreError:
    """The error for patches (n, H, W, 3) of which not even one can be computed."""
    return FeatstoreError(
        f"{device} has too little memory for one patch of {pixels.shape[1]} × {pixels.shape[2]} px",
        where="extract.batch_size",
        fix="use a smaller --resize, another --device, or free the memory",
    )
