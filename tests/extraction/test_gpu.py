"""What a GPU computes is what a CPU computes: precision, memory that runs out, copies, resuming."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore.backbones import build_backbone
from featstore.config import BackboneConfig, FeatstoreConfig
from featstore.extraction import ExtractionReport, extract
from featstore.extraction.forward import Embedder, make_embedder
from tests.extraction.conftest import TINY, contents, make_project
from tests.extraction.runtimes import tissue

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20


def embedder(name: str, size: int, device: torch.device, compute_dtype: str, batch_size: int) -> Embedder:
    config = BackboneConfig(name=name, weights="random:0", resize=size)
    backbone = build_backbone(config, Path())
    return make_embedder(backbone, device, compute_dtype, "float32", batch_size, "torch, folded", False)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest of all patches."""
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize(("compute_dtype", "most"), [("float32", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("name", ["densenet121", "timm:resnet18"])
def test_features_are_those_of_the_cpu(name: str, compute_dtype: str, most: float) -> None:
    pixels = tissue(11, 224, 224)
    expected = embedder(name, 224, CPU, "float32", 4)(pixels).result()
    found = embedder(name, 224, CUDA, compute_dtype, 4)(pixels).result()
    assert relative_error(found, expected) < most


def tf32_flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 allowed, as somebody else in this process may have done."""
    # Not by monkeypatch, which deletes what it set: these are no plain attributes.
    before = tf32_flags()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("compute_dtype", "allowed"), [("float32", False), ("bfloat16", True)])
@pytest.mark.usefixtures("tf32")
def test_float32_is_not_rounded_to_tf32_and_the_flags_are_put_back(
    compute_dtype: str, allowed: bool
) -> None:
    seen = []
    backbone = build_backbone(BackboneConfig(**TINY), Path())

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backbone.module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tf32_flags())
            return self.inner(x)

    watched = replace(backbone, module=Watching().eval())
    made = make_embedder(watched, CUDA, compute_dtype, "float32", 4, "torch", False)
    made(tissue(2, 32, 32)).result()
    assert seen == [(allowed, allowed)]
    assert tf32_flags() == (True, True)


def test_when_memory_is_exhausted_the_batch_is_halved_until_it_fits() -> None:
    pixels = tissue(256, 224, 224)
    made = embedder("timm:resnet18", 224, CUDA, "float32", 256)
    gc.collect()
    resting = torch.cuda.memory_allocated(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    # Also loads the kernels, which take memory that PyTorch does not count.
    expected = made(pixels).result()
    needed = torch.cuda.max_memory_allocated(CUDA) - resting
    assert made.batch_size == 256
    torch.cuda.empty_cache()
    # Too little for this batch; room for half of it, its kernels, and what lies between blocks.
    left = needed * 3 // 4 + 128 * MIB
    assert left < needed, "the batch is too small for this test"
    ballast = torch.empty(torch.cuda.mem_get_info(CUDA)[0] - left, dtype=torch.uint8, device=CUDA)
    found = made(pixels).result()
    halved, batch_size = made.halved, made.batch_size
    del ballast
    assert halved >= 1
    assert batch_size == 256 >> halved >= 16
    assert relative_error(found, expected) < 1e-3
    # What has once run out is not tried again.
    assert np.array_equal(made(pixels).result(), found)
    assert made.halved == halved


def test_every_batch_goes_through_pinned_memory_and_may_be_overwritten_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned, copied = [], []
    pin, to = torch.Tensor.pin_memory, torch.Tensor.to

    def noting_pin(self: torch.Tensor, *arguments: object) -> torch.Tensor:
        result = pin(self, *arguments)
        pinned.append(result.data_ptr())
        return result

    def noting_to(self: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        result = to(self, *arguments, **options)
        # The pixels on their way; no other tensor has bytes.
        if self.dtype == result.dtype == torch.uint8 and result.is_cuda and not self.is_cuda:
            copied.append((self.data_ptr() in pinned, options.get("non_blocking")))
        return result

    made = embedder("timm:resnet18", 64, CUDA, "bfloat16", 16)
    batches = [tissue(16, 64, 64)[np.random.default_rng(n).permutation(16)] for n in range(30)]
    expected = [made(batch).result() for batch in batches]
    monkeypatch.setattr(torch.Tensor, "pin_memory", noting_pin)
    monkeypatch.setattr(torch.Tensor, "to", noting_to)
    buffer, pending = np.empty_like(batches[0]), []
    for batch in batches:  # all of them under way together
        buffer[:] = batch
        pending.append(made(buffer))
        buffer[:] = 0
    for features, right in zip(pending, expected, strict=True):
        assert np.array_equal(features.result(), right)
    assert copied == [(True, True)] * len(batches)


class Stop(Exception):
    """Ends a pass from outside."""


def run(project: Path, store: str, compute: str, stop_after: int | None = None) -> ExtractionReport:
    sections = json.loads((project / "featstore.yaml").read_text())
    sections["backbone"] |= {"name": "timm:resnet18", "resize": 64}
    sections["extract"] |= {"device": str(CUDA), "amp": compute, "batch_size": 8}
    batches = 0

    def observe(progress: object) -> None:
        nonlocal batches
        batches += 1
        if batches == stop_after:
            raise Stop

    config = FeatstoreConfig.model_validate({**sections, "store": {"path": store}})
    return extract(config, project, observe)


def hide(files: list[Path]) -> Callable[[], None]:
    """Take files away; the function that is returned brings them back."""
    away = [file.rename(file.with_suffix(".hidden")) for file in files]

    def bring_back() -> None:
        for moved, file in zip(away, files, strict=True):
            moved.rename(file)

    return bring_back


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_resumed_pass_gives_the_same_bits(tmp_path: Path, amp: str) -> None:
    project = make_project(tmp_path, cases=3, stains=("h&e",), slices=2, patches=9)
    assert run(project, "whole", amp).committed == 54
    # Without the first three, so that afterwards no batch has the neighbours that it had before.
    bring_back = hide(sorted((project / "patches").glob("case_1_match_1_*"))[:3])
    with pytest.raises(Stop):
        run(project, "resumed", amp, stop_after=2)
    bring_back()
    assert len(contents(project / "resumed")) == 16
    assert run(project, "resumed", amp).committed == 38
    assert contents(project / "resumed") == contents(project / "whole")


def test_the_report_says_on_what_and_at_which_precision(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=1, stains=("h&e",), slices=1, patches=5)
    found = run(project, "store", "auto").to_json()
    assert found["compute_dtype"] in ("bfloat16", "float16")
    assert (found["device"], found["runtime"]) == ("cuda", "torch, folded")
    assert torch.cuda.get_device_name(CUDA) in found["provenance"]["device"]
