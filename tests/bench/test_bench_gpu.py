"""The benchmark for GPUs, run on the CPU with next to nothing: it works, and its figures fit together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.demo_tissue import tissue_pixels
from featstore.extraction.pytorch import TorchEmbedder
from tests.bench import bench_gpu, tissue_tiles
from tests.extraction.conftest import TINY

SMALL = ("--device", "cpu", "--backbones", TINY["name"], "--size", TINY["resize"], "--patches", 8)
FEW = ("--rounds", 1, "--distinct", 2)
COHORT, DISTINCT = 12, 10


def run(out: Path, *more: object) -> tuple[int, dict[str, Any]]:
    """Exit code and what is kept in the file."""
    code = bench_gpu.main([str(word) for word in (*SMALL, *FEW, "--out", out, *more)])
    return code, json.loads((out / "gpu.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _one_picture_of_tissue() -> Iterator[None]:
    """Reading the shared data would take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tissue_tiles, "sources", lambda: [tissue_pixels()])
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "new folder"
    code, result = run(
        out, "--batch-sizes", 2, 4, "--rounds", 2, "--cohort", COHORT, "--distinct", DISTINCT
    )
    assert code == 0
    assert [file.name for file in out.iterdir()] == ["gpu.json"]
    return result


def test_every_backbone_is_measured_at_every_batch_size(found: dict[str, Any]) -> None:
    assert [(row["backbone"], row["batch_size"]) for row in found["rates"]] == [
        ("timm:test_resnet", 2),
        ("timm:test_resnet", 4),
    ]
    for row in found["rates"]:
        assert (row["patches"], row["out_of_memory"], len(row["rounds"])) == (8, None, 2)
        assert all(row[rate] > 0 for rate in bench_gpu.RATES)
        assert row["goal"] == 0.9


def test_the_fraction_is_that_of_the_slower_of_model_and_decoding(found: dict[str, Any]) -> None:
    for row in found["rates"]:
        for one in row["rounds"]:
            assert one["fraction"] == pytest.approx(one["pipeline"] / min(one["model"], one["decode"]))
        for key in (*bench_gpu.RATES, "fraction"):
            assert row[key] == statistics.median(one[key] for one in row["rounds"])
        assert row[row["limited_by"]] == min(row["model"], row["decode"])


def test_what_a_cpu_does_not_know_is_null(found: dict[str, Any]) -> None:
    for row in found["rates"]:
        assert row["peak_memory_bytes"] is row["peak_reserved_bytes"] is row["gpu_utilisation_mean"] is None
        assert row["gpu_utilisation"] == []
    assert found["machine"]["device_memory_bytes"] is None


def test_a_cohort_goes_through_the_real_command(found: dict[str, Any]) -> None:
    (row,) = found["cohort"]
    assert (row["error"], row["patches"], row["committed"]) == (None, COHORT, COHORT)
    assert row["wall_seconds"] > row["report_seconds"] > 0
    assert row["patches_per_second"] == pytest.approx(COHORT / row["wall_seconds"])
    assert row["compute_dtype"] == "bfloat16"
    assert found["machine"]["distinct_files"] == DISTINCT


def test_memory_that_runs_out_is_told_and_the_next_batch_size_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = TorchEmbedder._forward

    def hungry(self: TorchEmbedder, pixels: Any) -> torch.Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, pixels)

    monkeypatch.setattr(TorchEmbedder, "_forward", hungry)
    code, result = run(tmp_path, "--batch-sizes", 4, 2, "--cohort", 0)
    assert (code, result["cohort"]) == (0, [])
    four, two = result["rates"]
    assert four["out_of_memory"] == "a batch of 4 does not fit, one of 2 does"
    assert two["out_of_memory"] is None
    assert "out of memory: a batch of 4 does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "message"),
    [("_forward", "cpu has too little memory for one patch of 32 × 32 px"), ("__init__", "CUDA out of")],
    ids=["in the first pass", "on the way there"],
)
def test_memory_for_nothing_at_all_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, message: str
) -> None:
    def starved(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchEmbedder, method, starved)
    _, result = run(tmp_path, "--batch-sizes", 2, "--cohort", 0)
    assert message in result["rates"][0]["out_of_memory"]


def test_any_other_error_is_not_taken_for_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TorchEmbedder, "_forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(tmp_path, "--batch-sizes", 2, "--cohort", 0)


def test_torch_compile_is_a_column_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []
    # What a compiler does is PyTorch's own affair, and takes half a minute.
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(options) or module)
    # More than there are patches: the batch is filled up.
    _, result = run(tmp_path, "--batch-sizes", 16, "--cohort", 0, "--compile", "--json")
    (row,) = result["rates"]
    assert len(compiled) == 1
    assert row["model_compiled"] > 0
    assert row["compile_seconds"] > 0
    said = capsys.readouterr()
    assert json.loads(said.out) == result
    assert f"(ready in {row['compile_seconds']:.0f} s)" in said.err


def test_a_cohort_that_cannot_be_extracted_is_told_and_the_exit_code_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "ROOT", tmp_path / "nowhere")
    code, result = run(tmp_path, "--batch-sizes", 2, "--cohort", 2)
    assert code == 1
    assert "cli.py" in result["cohort"][0]["error"]
    assert result["rates"][0]["pipeline"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU 'cuda'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
