"""Whatever computes the forward pass, and however patches are grouped: the same features."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore.backbones import Backbone, build_backbone
from featstore.config import BackboneConfig
from featstore.demo_tissue import tissue_pixels
from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction import ExtractionReport, extract, forward
from featstore.extraction.forward import Embedder, choose_runtime, make_embedder
from featstore.store.verify import verify
from tests.extraction.conftest import TINY, config_of, make_project
from tests.extraction.test_native import SIZES, rewrite
from tests.extraction.test_resume_ways import Held, held
from tests.extraction.test_resume_ways import assert_close as assert_held_close

CPU = torch.device("cpu")
RUNTIMES = ("torch", "torch, folded", "openvino")
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="the package openvino is not installed")
runtimes = pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=needs_openvino if name == "openvino" else ()) for name in RUNTIMES]
)


def tissue(count: int, height: int, width: int) -> np.ndarray:
    """Crops of real tissue, (count, height, width, 3)."""
    image, rng = tissue_pixels(), np.random.default_rng(count)
    rows = rng.integers(0, len(image) - height, count)
    columns = rng.integers(0, len(image) - width, count)
    return np.stack([image[y : y + height, x : x + width] for y, x in zip(rows, columns, strict=True)])


def has_bfloat16() -> bool:
    if not HAS_OPENVINO:
        return True
    from featstore.extraction.openvino_model import load_openvino

    return "BF16" in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def densenet() -> Backbone:
    return build_backbone(BackboneConfig(name="densenet121", weights="random:0", resize=64), Path())


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return build_backbone(BackboneConfig(**TINY), Path())


@pytest.fixture(scope="module")
def tiny_native() -> Backbone:
    return build_backbone(BackboneConfig(**{**TINY, "resize": "native"}), Path())


@contextmanager
def embedder(
    backbone: Backbone, runtime: str, compute_dtype: str = "float32", batch_size: int = 8
) -> Iterator[Embedder]:
    if runtime == "openvino" and compute_dtype == "bfloat16" and not has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    made = make_embedder(backbone, CPU, compute_dtype, "float32", batch_size, runtime, False)
    yield made
    made.close()


def embed(backbone: Backbone, pixels: np.ndarray, runtime: str, compute_dtype: str) -> np.ndarray:
    with embedder(backbone, runtime, compute_dtype) as made:
        return made(pixels).result()


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    products = (found.astype(np.float64) * expected).sum(axis=1)
    return products / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)


def assert_close(found: np.ndarray, expected: np.ndarray, compute_dtype: str) -> None:
    if compute_dtype == "float32":
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
        return
    mean = expected.mean(axis=0)
    assert cosines(found, expected).min() >= 0.9999
    # What all patches share says nothing about how well they can be told apart.
    assert cosines(found - mean, expected - mean).min() >= 0.99


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@runtimes
def test_every_runtime_gives_the_features_of_plain_pytorch(
    densenet: Backbone, runtime: str, compute_dtype: str
) -> None:
    pixels = tissue(13, 64, 64)
    expected = embed(densenet, pixels, "torch", "float32")
    assert_close(embed(densenet, pixels, runtime, compute_dtype), expected, compute_dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "resnet50"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@runtimes
def test_so_it_is_at_full_size(name: str, runtime: str, compute_dtype: str) -> None:
    backbone = build_backbone(BackboneConfig(name=name, weights="random:0", resize=224), Path())
    pixels = tissue(24, 224, 224)
    expected = embed(backbone, pixels, "torch", "float32")
    assert_close(embed(backbone, pixels, runtime, compute_dtype), expected, compute_dtype)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@runtimes
def test_an_embedding_does_not_depend_on_its_neighbours(
    tiny: Backbone, runtime: str, compute_dtype: str
) -> None:
    pixels = tissue(21, 32, 32)
    with embedder(tiny, runtime, compute_dtype) as made:
        whole = made(pixels).result()
        for picked in (slice(0, 1), slice(5, 8), slice(20, None, -1), slice(None, None, 4)):
            assert np.array_equal(made(pixels[picked]).result(), whole[picked])


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@runtimes
def test_patches_of_any_size_get_the_features_that_they_have_alone(
    tiny_native: Backbone, runtime: str, compute_dtype: str
) -> None:
    with embedder(tiny_native, runtime, compute_dtype) as made:
        for height, width in ((48, 80), (33, 57), (64, 64), (48, 80)):
            pixels = tissue(6, height, width)
            found = made(pixels).result()
            alone = np.concatenate([made(patch[None]).result() for patch in pixels])
            assert np.array_equal(found, alone)
            assert_close(found, embed(tiny_native, pixels, "torch", "float32"), compute_dtype)


@runtimes
def test_another_size_beside_the_configured_one_is_no_trouble(tiny: Backbone, runtime: str) -> None:
    pixels = tissue(3, 40, 52)
    expected = embed(tiny, pixels, "torch", "float32")
    assert_close(embed(tiny, pixels, runtime, "float32"), expected, "float32")


@runtimes
def test_forward_size_keeps_the_configured_size_and_spends_a_budget_on_others(
    tiny: Backbone, tiny_native: Backbone, runtime: str
) -> None:
    with embedder(tiny, runtime, "bfloat16") as made:
        assert made.forward_size(32, 32) == made.batch_size == 8
        assert made.forward_size(2000, 3000) == 1
    # PyTorch takes no more than give the bits of one alone; OpenVINO takes them one by one anyway.
    expected = [4, 8, 15 if runtime == "openvino" else 8]
    with embedder(tiny_native, runtime, "bfloat16") as made:
        assert [made.forward_size(*s) for s in ((224, 448), (224, 224), (112, 225))] == expected


def test_pytorch_on_a_cpu_takes_other_sizes_one_by_one_in_float32(tiny: Backbone) -> None:
    with embedder(tiny, "torch", "float32") as made:
        assert (made.forward_size(32, 32), made.forward_size(48, 48)) == (8, 1)


@runtimes
def test_pixels_may_change_once_the_call_has_returned(tiny: Backbone, runtime: str) -> None:
    pixels = tissue(16, 32, 32)
    with embedder(tiny, runtime) as made:
        expected = made(pixels.copy()).result()
        pending = made(pixels)
        pixels[:] = 0
        assert np.array_equal(pending.result(), expected)


@runtimes
def test_stored_values_that_are_too_large_are_infinite_without_a_warning(
    tiny: Backbone, runtime: str
) -> None:
    class Loud(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return tiny.module(x) * 1e6

    loud = replace(tiny, module=Loud().eval())
    made = make_embedder(loud, CPU, "float32", "float16", 4, runtime, False)
    assert np.isinf(made(tissue(2, 32, 32)).result()).any()
    made.close()


@pytest.mark.parametrize(
    ("text", "stored", "chosen"),
    [
        ("auto", "torch", "torch"),
        ("auto", "torch, folded", "torch, folded"),
        ("torch", None, "torch, folded"),
        ("torch", "torch", "torch"),
        # The fingerprint then refuses the store, which says more than an error here could.
        ("torch", "openvino", "torch, folded"),
    ],
)
def test_auto_keeps_the_runtime_of_a_store(text: str, stored: str | None, chosen: str) -> None:
    assert choose_runtime(text, CPU, stored) == chosen


@pytest.mark.parametrize("stored", [None, "openvino", "imported"])
@needs_openvino
def test_auto_takes_openvino_on_a_cpu_where_it_is_installed(stored: str | None) -> None:
    assert choose_runtime("auto", CPU, stored) == "openvino"
    assert choose_runtime("auto", torch.device("cuda"), "torch") == "torch"
    assert choose_runtime("auto", torch.device("cuda"), None) == "torch, folded"


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(forward, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_openvino")
def test_without_the_package_auto_is_pytorch() -> None:
    assert choose_runtime("auto", CPU, None) == "torch, folded"


@pytest.mark.usefixtures("no_openvino")
@pytest.mark.parametrize(("text", "stored"), [("openvino", None), ("auto", "openvino")])
def test_without_the_package_what_needs_it_says_how_to_get_it(text: str, stored: str | None) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'featstore\[openvino\]'"):
        choose_runtime(text, CPU, stored)


@pytest.mark.parametrize(("text", "stored"), [("openvino", None), ("auto", "openvino")])
def test_openvino_on_a_gpu_is_refused(text: str, stored: str | None) -> None:
    with pytest.raises(ConfigError, match="does not run on cuda"):
        choose_runtime(text, torch.device("cuda"), stored)


def test_compiling_changes_features_by_rounding_only(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_(module: torch.nn.Module, **options: object) -> torch.nn.Module:
        compiled.append(options)
        return module

    # What a compiler does with it is PyTorch's own affair, and takes half a minute.
    monkeypatch.setattr(torch, "compile", compile_)
    pixels = tissue(5, 32, 32)
    made = make_embedder(tiny, CPU, "float32", "float32", 4, "torch, folded", True)
    assert_close(made(pixels).result(), embed(tiny, pixels, "torch", "float32"), "float32")
    assert compiled == [{"dynamic": False}]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_features_of_the_cpu(compute_dtype: str, compile: bool) -> None:
    config = BackboneConfig(name="densenet121", weights="random:0", resize=64)
    pixels = tissue(29, 64, 64)
    expected = embed(build_backbone(config, Path()), pixels, "torch", "float32")
    made = make_embedder(
        build_backbone(config, Path()),
        torch.device("cuda"),
        compute_dtype,
        "float32",
        8,
        "torch, folded",
        compile,
    )
    # Many at once: copies to the device overlap with the work on earlier batches.
    pending = [made(pixels[start : start + 8]) for _ in range(20) for start in range(0, 29, 8)]
    found = np.concatenate([features.result() for features in pending]).reshape(20, 29, -1)
    assert np.array_equal(found, np.broadcast_to(found[:1], found.shape))
    assert_close(found[0], expected, compute_dtype)


def test_memory_for_not_one_patch_of_another_size_leaves_the_batch_as_it_is(tiny: Backbone) -> None:
    class Hungry(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[2] > 32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return tiny.module(x)

    with embedder(replace(tiny, module=Hungry()), "torch") as made:
        with pytest.raises(FeatstoreError, match="one patch of 48 × 48 px"):
            made(tissue(2, 48, 48))
        assert (made.batch_size, made.halved) == (8, 0)
        assert made(tissue(2, 32, 32)).result().shape == (2, tiny.dim)


@needs_openvino
@pytest.mark.parametrize(("limit", "halved"), [(4, 1), (1, 3)])
def test_when_memory_runs_out_openvino_takes_fewer_patches_at_a_time(
    tiny: Backbone, limit: int, halved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = tissue(19, 32, 32)
    with embedder(tiny, "openvino") as made:
        expected = made(pixels).result()
    starve_openvino(monkeypatch, limit)
    with embedder(tiny, "openvino") as made:
        assert np.allclose(made(pixels).result(), expected, atol=1e-5)
        assert made.halved == halved


@needs_openvino
def test_openvino_without_memory_for_one_patch_says_so(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedder(tiny, "openvino") as made:
        made(tissue(1, 32, 32)).result()
        starve_openvino(monkeypatch, 0)
        with pytest.raises(FeatstoreError, match="too little memory for one patch of 32 × 32 px"):
            made(tissue(2, 32, 32)).result()


def starve_openvino(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Let graphs of more than so many patches fail as if there were no memory."""
    from featstore.extraction.openvino_model import Graph

    infer = Graph.infer

    def hungry(self: Graph, pixels: np.ndarray) -> np.ndarray:
        if self._together > limit and len(pixels) > 1:
            raise RuntimeError("Exception from src/inference: std::bad_alloc")
        if limit == 0:
            raise MemoryError
        return infer(self, pixels)

    monkeypatch.setattr(Graph, "infer", hungry)


@needs_openvino
def test_openvino_goes_on_after_an_interruption(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = tissue(40, 32, 32)
    with embedder(tiny, "openvino") as made:
        expected = made(pixels).result()
        submit, calls = made._jobs.submit, []

        def interrupted(*job: object) -> object:
            calls.append(job)
            if len(calls) % 3 == 0:
                raise KeyboardInterrupt
            return submit(*job)

        monkeypatch.setattr(made._jobs, "submit", interrupted)
        # Often enough to use up every place, were one lost each time.
        for _ in range(20):
            with pytest.raises(KeyboardInterrupt):
                made(pixels)
        monkeypatch.undo()
        assert np.array_equal(made(pixels).result(), expected)


@needs_openvino
def test_a_network_that_openvino_takes_for_another_is_refused(tiny: Backbone) -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Tracing sees a black patch, and takes that side for the only one.
            return tiny.module(x if bool(x.sum() == 0) else x.flip(2))

    with pytest.raises(ConfigError, match="other features than PyTorch"):
        make_embedder(
            replace(tiny, module=Branching().eval()), CPU, "float32", "float32", 4, "openvino", False
        )


@needs_openvino
def test_importing_openvino_reports_to_nobody() -> None:
    from featstore.extraction.openvino_model import load_openvino

    load_openvino()
    reporter = sys.modules["openvino.tools.ovc.telemetry_utils"].tm  # type: ignore[attr-defined]
    assert reporter.__name__.endswith("telemetry_stub")
    assert "openvino_telemetry" not in sys.modules


# Whole runs that end early; those that are killed are in test_resume_ways.py.

PATCHES = 21
RUN = {"extract__runtime": "openvino", "extract__dtype": "float32"}
WAYS = {
    "one size": RUN,
    "views": RUN | {"extract__views": 3},
    "native with views": RUN | {"backbone__resize": "native", "extract__views": 3},
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(
        tmp_path_factory.mktemp("cohort"), cases=3, stains=("h&e",), slices=1, patches=PATCHES // 3, size=32
    )
    rewrite(project, SIZES)
    return project


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, object]:
    return WAYS[request.param]


def run_into(
    project: Path, store: Path, way: dict[str, object], stop_at: int | None = None
) -> ExtractionReport:
    """An extraction, told to stop after so many batches."""
    batches = []

    def observe(progress: object) -> None:
        batches.append(progress)
        if len(batches) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    return extract(config_of(project, **way, store__path=str(store)), project, observe)


def whole_run(project: Path, store: Path, way: dict[str, object]) -> Held:
    assert run_into(project, store, way).committed == PATCHES
    return held(store)


@needs_openvino
def test_openvino_stopped_and_resumed_gives_the_same_bits(
    cohort: Path, tmp_path: Path, way: dict[str, object]
) -> None:
    whole, store = whole_run(cohort, tmp_path / "whole", way), tmp_path / "store"
    stopped = run_into(cohort, store, way, stop_at=2)
    assert stopped.interrupted == signal.SIGTERM
    assert 0 < stopped.committed < PATCHES
    assert len(held(store)[0]) == stopped.committed
    assert run_into(cohort, store, way).committed == PATCHES - stopped.committed
    assert held(store) == whole
    assert verify(store, "full").damage == []


@needs_openvino
@pytest.mark.parametrize("at", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_a_run_in_which_memory_runs_out_once_loses_nothing_with_openvino(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, object], at: int
) -> None:
    from featstore.extraction.openvino_model import Graph

    whole, store = whole_run(cohort, tmp_path / "whole", way), tmp_path / "store"
    infer, requests, lock = Graph.infer, [0], threading.Lock()

    def hungry(self: Graph, pixels: np.ndarray) -> np.ndarray:
        if threading.current_thread().name.startswith("featstore-openvino"):
            with lock:
                requests[0] += 1
                if requests[0] == at:
                    raise RuntimeError("Exception from src/inference: can't allocate memory")
        return infer(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Graph, "infer", hungry)
        if "backbone__resize" in way:  # a request is of one image: there is nothing to halve
            with pytest.raises(FeatstoreError, match="too little memory for one patch of"):
                run_into(cohort, store, way)
        else:
            report = run_into(cohort, store, way)
            assert (report.committed, report.settings["batch_size_halved"]) == (PATCHES, 1)
            assert_held_close(held(store), whole)
            return
    some = held(store)
    assert all(part.items() <= all_.items() for part, all_ in zip(some, whole, strict=True))
    assert run_into(cohort, store, way).committed == PATCHES - len(some[0])
    assert held(store) == whole
