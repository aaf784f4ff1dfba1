"""The forward pass in OpenVINO: the fastest that a CPU offers, where the package is installed.

Every core gets a stream of its own, which computes a few patches at a time and waits for no other
core. Patches of the one configured size go through a graph of fixed shape, short requests filled
up; patches of other sizes one at a time through a graph that takes any, because a graph of fixed
shape costs half a second a size. In neither way an embedding depends on what is computed beside it;
with several patches of a changing number it would, in the last bits.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.backbones import Backbone
from featstore.errors import FeatstoreError, first_line
from featstore.extraction.forward import (
    DTYPES,
    PendingFeatures,
    budgeted_patches,
    is_out_of_memory,
    no_memory_for_one,
)
from featstore.extraction.openvino_model import Converted, Features, Graph
from featstore.extraction.utilisation import BusyClock
from featstore.process import usable_cores

# What one stream takes at a time: feature maps must fit into a core's own cache, and very small
# patches one by one would keep it busy with everything but arithmetic.
_PIXELS_A_REQUEST = 4 * 224**2


class OpenVinoEmbedder:
    """Pixels in, embeddings out, on the CPU; the same contract as `forward.Embedder`.

    Has as many threads as PyTorch would, at most one for each core that the process may use. Is
    safe to interrupt: what has begun ends within one request. Not to be used in a fork.

    Args:
        backbone: The frozen network, on the CPU.
        compute_dtype: ``float32`` (exactly), ``bfloat16`` or ``float16``.
        stored_dtype: ``float16`` or ``float32``.
        batch_size: Patches a call; a request may have fewer.

    Raises:
        ConfigError: The package is missing, the hardware lacks the precision, or the network
            cannot be converted.

    Attributes:
        batch_size: As given.
        halved: How often memory ran out.
        device: The CPU.
        runtime, folding: As in `forward.Embedder`.
    """

    runtime = "openvino"
    folding = "all that can be, by OpenVINO"

    def __init__(self, backbone: Backbone, compute_dtype: str, stored_dtype: str, batch_size: int) -> None:
        self.batch_size = batch_size
        self.halved = 0
        self.device = torch.device("cpu")
        self.streams = min(torch.get_num_threads(), usable_cores())
        self._stored = DTYPES[stored_dtype]
        preprocessing = backbone.preprocessing
        self._size = None if preprocessing.is_native else preprocessing.size
        self._most = batch_size
        self._model = Converted(backbone, compute_dtype, self.streams)
        self._graphs: dict[int | None, Graph] = {}
        self._building = threading.Lock()
        self._clock = BusyClock()
        # One request more than streams, so that a stream finds its next one waiting.
        self._jobs = ThreadPoolExecutor(self.streams + 1, "featstore-openvino")
        # Those who call wait while this much is under way: pixels must not pile up here.
        self._places = threading.BoundedSemaphore(2 * (self.streams + 1))
        self._graph(None if self._size is None else self._together(self._size, self._size))

    @property
    def busy_seconds(self) -> float:
        """How long at least one request was under way."""
        return self._clock.seconds

    def forward_size(self, height: int, width: int) -> int:
        """How many patches of a size in pixels belong into one call."""
        return budgeted_patches(self.batch_size, self._size, height, width)

    def __call__(self, pixels: NDArray[np.uint8]) -> PendingFeatures:
        """Start a forward pass; waits only while too much is under way.

        Args:
            pixels: (n, H, W, 3) uint8; is copied.

        Returns:
            The n embeddings, in the making. Their `result` raises FeatstoreError where memory
            does not suffice for one patch.
        """
        step = self._together(*pixels.shape[1:3])
        futures: list[Future[Features]] = []
        for start in range(0, len(pixels), step):
            chunk = pixels[start : start + step].copy()
            self._places.acquire()
            try:
                future = self._jobs.submit(self._embed, chunk)
            except BaseException:
                self._places.release()
                raise
            future.add_done_callback(self._leave)
            futures.append(future)
        return PendingFeatures(_Outcome(futures, self._stored))

    def close(self) -> None:
        """Let what has begun end, and give threads and memory back."""
        self._jobs.shutdown(wait=True, cancel_futures=True)
        self._graphs.clear()
        del self._model

    def _leave(self, future: Future[Features]) -> None:
        self._places.release()

    def _together(self, height: int, width: int) -> int:
        """How many patches of a size in pixels go into one request."""
        if (height, width) != (self._size, self._size):
            return 1
        return min(self._most, max(1, _PIXELS_A_REQUEST // (height * width)))

    def _embed(self, pixels: NDArray[np.uint8]) -> Features:
        """Features (n, D) of patches (n, H, W, 3) in as few requests as memory allows."""
        size = pixels.shape[1:3]
        while True:
            together = self._together(*size)
            parts = (pixels[start : start + together] for start in range(0, len(pixels), together))
            try:
                graph = self._graph(together if size == (self._size, self._size) else None)
                with self._clock:
                    return np.concatenate([graph.infer(part) for part in parts])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise FeatstoreError(
                        f"OpenVINO failed: {first_line(error)}",
                        where="extract.runtime",
                        fix="run the command again; if it stays, use another store with --runtime torch",
                    ) from error
                if together == 1:
                    raise no_memory_for_one(self.device, pixels) from error
            self._halve(together)

    def _halve(self, together: int) -> None:
        with self._building:
            if self._most >= together:  # otherwise another thread was first
                self._most = together // 2
                self.halved += 1
                self._graphs.pop(together, None)

    def _graph(self, together: int | None) -> Graph:
        """The graph for this many patches of the configured size, or (None) for one of any size."""
        with self._building:
            if together not in self._graphs:
                self._graphs[together] = self._model.compiled(together)
            return self._graphs[together]


class _Outcome:
    """The jobs that make up one call."""

    def __init__(self, futures: list[Future[Features]], stored: torch.dtype) -> None:
        self._futures = futures
        self._stored = stored

    def collect(self) -> list[torch.Tensor]:
        """What they computed, (n, D) each; waits for them."""
        return [torch.from_numpy(future.result()).to(self._stored) for future in self._futures]
