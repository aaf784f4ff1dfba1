"""The forward pass in OpenVINO: the fastest that a CPU offers, where the package is installed.

Every core gets a stream of its own, which computes a few patches at a time and waits for no other
core. Patches of the one configured size go through a graph of fixed shape, short requests filled
up; patches of other sizes one at a time through a graph that takes any, because a graph of fixed
shape costs half a second a size. In neither way an embedding depends on what is computed beside it;
with several patches of a changing number it would, in the last bits.
"""

from __future__ import annotations

import queue
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.backbones import Backbone, normalize
from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.forward import (
    DTYPES,
    PendingFeatures,
    budgeted_patches,
    is_out_of_memory,
    no_memory_for_one,
)
from featstore.process import usable_cores

Features = NDArray[np.float32]

# What the plugin calls a precision: its hint, and the capability that the hardware must have.
_PRECISIONS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}
# What one stream takes at a time: feature maps must fit into a core's own cache, and very small
# patches one by one would keep it busy with everything but arithmetic.
_PIXELS_A_REQUEST = 4 * 224**2
# Relative error that a converted network may show: rounding, not another function.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}


def load_openvino() -> ModuleType:
    """The package ``openvino``, without its telemetry. A process that has used it must not fork workers.

    Raises:
        ConfigError: It is not installed.
    """
    # Importing openvino otherwise reports to its makers over the network, unless this is missing.
    telemetry = "openvino_telemetry"
    hidden = telemetry not in sys.modules
    if hidden:
        sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            f"OpenVINO is not installed ({error})",
            expected="the package openvino",
            where="extract.runtime",
            fix="pip install 'featstore[openvino]', or set extract.runtime: torch (another store)",
        ) from error
    finally:
        if hidden:
            del sys.modules[telemetry]
    return openvino  # type: ignore[no-any-return]


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
        self._backbone = backbone
        self._compute = compute_dtype
        self._stored = DTYPES[stored_dtype]
        preprocessing = backbone.preprocessing
        self._size = None if preprocessing.is_native else preprocessing.size
        self._most = batch_size
        self._openvino = load_openvino()
        self._core = self._openvino.Core()
        _check_precision(self._core, compute_dtype)
        self._model = _convert(self._openvino, backbone)
        self._graphs: dict[int | None, _Graph] = {}
        self._building = threading.Lock()
        # One request more than streams, so that a stream finds its next one waiting.
        self._jobs = ThreadPoolExecutor(self.streams + 1, "featstore-openvino")
        # Those who call wait while this much is under way: pixels must not pile up here.
        self._places = threading.BoundedSemaphore(2 * (self.streams + 1))
        self._graph(None if self._size is None else self._together(self._size, self._size))

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
                return np.concatenate([graph.infer(part) for part in parts])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if together == 1:
                    raise no_memory_for_one(self.device, pixels) from error
            self._halve(together)

    def _halve(self, together: int) -> None:
        with self._building:
            if self._most >= together:  # otherwise another thread was first
                self._most = together // 2
                self.halved += 1
                self._graphs.pop(together, None)

    def _graph(self, together: int | None) -> _Graph:
        """The graph for this many patches of the configured size, or (None) for one of any size."""
        with self._building:
            if together not in self._graphs:
                graph = self._compile(together)
                self._verify(graph, together)
                self._graphs[together] = graph
            return self._graphs[together]

    def _compile(self, together: int | None) -> _Graph:
        side = -1 if together is None else self._size
        model = self._model.clone()
        model.reshape([together or 1, 3, side, side])
        steps = self._openvino.preprocess.PrePostProcessor(model)
        tensor = steps.input().tensor()
        tensor.set_element_type(self._openvino.Type.u8).set_layout(self._openvino.Layout("NHWC"))
        preprocessing = self._backbone.preprocessing
        steps.input().preprocess().convert_element_type(self._openvino.Type.f32).mean(
            [255 * value for value in preprocessing.mean]
        ).scale([255 * value for value in preprocessing.std])
        steps.input().model().set_layout(self._openvino.Layout("NCHW"))
        options = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self._compute][0],
            "NUM_STREAMS": self.streams,
            "INFERENCE_NUM_THREADS": self.streams,
            # Two jobs on one node would pin themselves to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = self._core.compile_model(steps.build(), "CPU", options)
        return _Graph(self._openvino, compiled, self.streams + 1, together or 1)

    def _verify(self, graph: _Graph, together: int | None) -> None:
        """Compare one patch with PyTorch: tracing takes what depends on the input for constant.

        Raises:
            ConfigError: The graph computes something else.
        """
        # Another size than the traced one, and no square.
        shape = (160, 224) if self._size is None or together is None else (self._size, self._size)
        noise = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
        p = self._backbone.preprocessing
        with torch.inference_mode():
            batch = normalize(torch.from_numpy(noise), p.mean, p.std, torch.float32)
            expected = self._backbone.module(batch).float().numpy()
        difference = np.linalg.norm(graph.infer(noise) - expected)
        if not difference <= _TOLERANCE[self._compute] * np.linalg.norm(expected):
            raise _unfit(self._backbone, "the converted network gives other features than PyTorch's")


class _Graph:
    """A compiled network, and requests to it that are not in use."""

    def __init__(self, openvino: ModuleType, compiled: Any, requests: int, together: int) -> None:
        self._openvino = openvino
        self._together = together
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(requests):
            self._idle.put(compiled.create_infer_request())

    def infer(self, pixels: NDArray[np.uint8]) -> Features:
        """Features (n, D) of n patches, at most as many as the graph takes; the rest is filled up."""
        count = len(pixels)
        if count < self._together:
            fill = np.repeat(pixels[-1:], self._together - count, axis=0)
            pixels = np.concatenate((pixels, fill))
        request = self._idle.get()
        try:
            request.set_input_tensor(self._openvino.Tensor(pixels, shared_memory=True))
            request.start_async()
            request.wait()
            # A copy: the request uses its memory again.
            return np.array(request.get_output_tensor().data[:count], np.float32)
        finally:
            self._idle.put(request)


class _Outcome:
    """The jobs that make up one call."""

    def __init__(self, futures: list[Future[Features]], stored: torch.dtype) -> None:
        self._futures = futures
        self._stored = stored

    def collect(self) -> list[torch.Tensor]:
        """What they computed, (n, D) each; waits for them."""
        return [torch.from_numpy(future.result()).to(self._stored) for future in self._futures]


def _check_precision(core: Any, compute_dtype: str) -> None:
    found = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if _PRECISIONS[compute_dtype][1] not in found:
        # It would silently compute in float32, and the fingerprint would not say so.
        raise ConfigError(
            f"OpenVINO cannot compute in {compute_dtype} on this CPU",
            expected="one of " + ", ".join(name for name, (_, c) in _PRECISIONS.items() if c in found),
            where="extract.amp, extract.runtime",
            fix="use --amp off with a store of its own, extract.runtime: torch, or another machine",
        )


def _convert(openvino: ModuleType, backbone: Backbone) -> Any:
    """The network as OpenVINO's model, input (?, 3, ?, ?) float32."""
    size = backbone.preprocessing.size
    example = torch.zeros(1, 3, size, size)
    try:
        with _quiet(), torch.no_grad():
            # Traced here: OpenVINO's own tracing of a module takes four times as long.
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                backbone.module, example, check_trace=False
            )
            return openvino.convert_model(traced, example_input=example)
    # Both run the model's code on tensors of their own: anything may be raised.
    except Exception as error:
        raise _unfit(backbone, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about tracing, which do not concern the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unfit(backbone: Backbone, reason: str) -> FeatstoreError:
    return ConfigError(
        f"{backbone.name} cannot be run by OpenVINO: {reason}",
        expected="a network that can be traced",
        where="extract.runtime",
        fix="set extract.runtime: torch",
    )
