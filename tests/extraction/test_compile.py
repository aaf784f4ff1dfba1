"""`extract.compile`: the same features within rounding, and a plain word where nothing can be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore.backbones import Backbone, build_backbone
from featstore.config import BackboneConfig
from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.forward import Embedder, make_embedder
from tests import command_line, helpers
from tests.extraction.conftest import TINY, contents, make_project
from tests.extraction.runtimes import assert_close, tissue

CPU = torch.device("cpu")
NOTHING_TO_COMPILE_WITH = (
    "InvalidCxxCompiler: No working C++ compiler found in config.cpp.cxx: (None, 'g++')"
)


def backbone(**changes: object) -> Backbone:
    return build_backbone(BackboneConfig(**{**TINY, **changes}), Path())


def embedder(network: Backbone, compute_dtype: str = "float32", compile: bool = True) -> Embedder:
    return make_embedder(network, CPU, compute_dtype, "float32", 4, "torch, folded", compile)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A `torch.compile` whose modules raise the test's error in the first forward pass, as the real one."""

    def compile_(module: torch.nn.Module, **options: object) -> Any:
        def fail(x: torch.Tensor) -> torch.Tensor:
            raise request.param

        return fail

    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.parametrize(
    "failing",
    [
        RuntimeError(NOTHING_TO_COMPILE_WITH + "\n\nSet TORCHDYNAMO_VERBOSE=1 for the full stack trace"),
        OSError(f"[Errno 30] Read-only file system: {NOTHING_TO_COMPILE_WITH}"),
    ],
    ids=["no compiler", "no cache"],
    indirect=True,
)
@pytest.mark.usefixtures("failing")
def test_where_nothing_can_be_compiled_the_setting_is_named_before_any_work() -> None:
    with pytest.raises(ConfigError) as error:
        embedder(backbone())
    assert "extract.compile" in str(error.value)
    assert "--no-compile" in str(error.value)
    assert NOTHING_TO_COMPILE_WITH in str(error.value)
    assert "TORCHDYNAMO_VERBOSE" not in str(error.value)


@pytest.mark.parametrize("failing", [torch.OutOfMemoryError("CUDA out of memory")], indirect=True)
@pytest.mark.usefixtures("failing")
def test_memory_that_runs_out_while_compiling_is_a_matter_of_memory() -> None:
    with pytest.raises(FeatstoreError, match="too little memory for one patch of 32 × 32 px"):
        embedder(backbone())


@pytest.mark.parametrize("failing", [RuntimeError(NOTHING_TO_COMPILE_WITH)], indirect=True)
@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("resize", ["native", "native32"])
def test_patches_of_their_own_sizes_are_not_compiled(resize: str) -> None:
    pixels = tissue(3, 64, 96)
    found = embedder(backbone(resize=resize))(pixels).result()
    assert np.array_equal(found, embedder(backbone(resize=resize), compile=False)(pixels).result())


def test_a_compiled_network_is_used_for_the_configured_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def compile_(module: torch.nn.Module, **options: object) -> Any:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(x.shape))
            return module(x)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    made = embedder(backbone())
    made(tissue(3, 48, 40)).result()
    made(tissue(6, 32, 32)).result()
    # Of one shape: every other would be compiled anew.
    assert set(sizes) == {(4, 3, 32, 32)}


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing compiled before, and nothing left behind."""
    folder = tmp_path / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    yield folder
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.timeout(900)  # DenseNet121 has a hundred and twenty kernels of its own
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["timm:resnet18", "densenet121"])
def test_what_is_really_compiled_gives_the_same_features(name: str, compute_dtype: str) -> None:
    pixels = tissue(11, 64, 64)
    network = {"name": name, "resize": 64}
    exact = make_embedder(backbone(**network), CPU, "float32", "float32", 4, "torch", False)
    expected = exact(pixels).result()
    eager = embedder(backbone(**network), compute_dtype, compile=False)(pixels).result()
    made = embedder(backbone(**network), compute_dtype)
    found = made(pixels).result()
    assert_close(found, expected, compute_dtype)
    assert np.linalg.norm(found - eager) < 1e-2 * np.linalg.norm(eager)
    # Whatever stands beside them, and again: the same bits.
    for picked in (slice(0, 1), slice(5, 8), slice(10, None, -1)):
        assert np.array_equal(made(pixels[picked]).result(), found[picked])


def extract(project: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, where every warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(helpers.ROOT / "cli.py"), "extract", *flags],
        cwd=project,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(project / "inductor"), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_compiles_without_a_warning_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=1, patches=5)
    for flags in (("--store-path", "eager"), ("--compile", "--store-path", "compiled")):
        done = extract(project, *flags)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    eager, compiled = contents(project / "eager"), contents(project / "compiled")
    assert eager.keys() == compiled.keys()
    for key, values in eager.items():
        right, found = np.frombuffer(values, np.float16), np.frombuffer(compiled[key], np.float16)
        assert np.allclose(found, right, rtol=2e-3, atol=1e-3)
    # A compiled network is no other network: its store is extended by either.
    assert json.loads(extract(project, "--store-path", "compiled", "--json").stdout)["already_done"] == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PATH": "", "CXX": "g++"},
        {"CXX": "/bin/false"},
    ],
    ids=["no compiler", "a broken compiler"],
)
def test_without_a_compiler_the_command_says_so_and_writes_nothing(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    project = make_project(tmp_path, cases=1, stains=("h&e",), slices=1, patches=5)
    done = extract(project, "--compile", **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "extract.compile" in done.stderr
    assert "--no-compile" in done.stderr
    assert not (project / "store").exists()


def test_a_network_that_does_not_run_is_not_blamed_on_the_compiler_when_it_is_not_used() -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such network")

    made = embedder(replace(backbone(), module=Broken().eval()), compile=False)
    with pytest.raises(ValueError, match="no such network"):
        made(tissue(1, 32, 32))


def test_with_nothing_left_to_do_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("compiled for nothing")

    project = make_project(tmp_path, cases=1, stains=("h&e",), slices=1, patches=5)
    assert command_line.answer(project, "extract")["computed"] == 5
    monkeypatch.setattr(torch, "compile", refuse)
    assert command_line.answer(project, "extract", "--compile")["already_done"] == 5
