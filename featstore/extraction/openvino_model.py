"""A backbone as OpenVINO's model: converted, compiled, and held against PyTorch."""

from __future__ import annotations

import queue
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.backbones import Backbone, normalize
from featstore.errors import ConfigError, FeatstoreError, first_line
from featstore.process import stop_on_signal

Features = NDArray[np.float32]

# What the plugin calls a precision: its hint, and the capability that the hardware must have.
_PRECISIONS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}
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


class Converted:
    """A frozen network in OpenVINO, to be compiled for one shape or another.

    Args:
        backbone: On the CPU.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16``.
        streams: Requests that are computed at the same time, on a core each.

    Raises:
        ConfigError: The package is missing, the hardware lacks the precision, or the network
            cannot be converted.
    """

    def __init__(self, backbone: Backbone, compute_dtype: str, streams: int) -> None:
        self._backbone = backbone
        self._compute = compute_dtype
        self._streams = streams
        preprocessing = backbone.preprocessing
        self._size = None if preprocessing.is_native else preprocessing.size
        self._openvino = load_openvino()
        self._core = self._openvino.Core()
        _check_precision(self._core, compute_dtype)
        self._model = _convert(self._openvino, backbone)

    def compiled(self, together: int | None) -> Graph:
        """A graph that gives the same features as PyTorch.

        Args:
            together: Patches of the configured size that it takes; None: one patch of any size.

        Raises:
            ConfigError: It computes something else.
        """
        graph = self._compile(together)
        self._verify(graph, together)
        return graph

    def _compile(self, together: int | None) -> Graph:
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
            "NUM_STREAMS": self._streams,
            "INFERENCE_NUM_THREADS": self._streams,
            # Two jobs on one node would pin themselves to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = self._core.compile_model(steps.build(), "CPU", options)
        return Graph(self._openvino, compiled, self._streams + 1, together or 1)

    def _verify(self, graph: Graph, together: int | None) -> None:
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


class Graph:
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
    # A KeyboardInterrupt within would come out of it as an error of the conversion.
    with stop_on_signal() as received:
        try:
            return _converted(openvino, backbone)
        finally:
            stopped = received[:1]
            if stopped:
                raise KeyboardInterrupt


def _converted(openvino: ModuleType, backbone: Backbone) -> Any:
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
        raise _unfit(backbone, f"{type(error).__name__}: {first_line(error)}") from error


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
