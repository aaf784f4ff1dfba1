"""`featstore bench extract`: what it measures, and what it advises."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore import bench
from featstore.bench_result import Alternative, ExtractBench
from featstore.errors import ConfigError
from featstore.extraction import forward
from tests.command_line import answer, listing, refused, succeeded
from tests.extraction.conftest import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "project"
    folder.mkdir()
    return make_project(folder, cases=2, stains=("h&e",), slices=2, patches=8)


def test_rates_limit_and_other_settings_are_told(project: Path) -> None:
    before = listing(project)
    found = answer(project, "bench", "extract", "--sample", 32, "--set", "extract.workers=1")
    assert listing(project) == before  # nothing is left of what was measured
    assert found["patches"] == 32
    rates = [found[name] for name in ("decode_rate", "model_rate", "pipeline_rate", "fraction_of_limit")]
    assert min(rates) > 0
    tried = {other["setting"]: other for other in found["alternatives"]}
    cores = bench.usable_cores()
    workers = {f"extract.workers: {cores}"} if cores > 1 else set()
    tried.pop("extract.amp: auto", None)  # where this CPU has bfloat16
    assert set(tried) == {"extract.batch_size: 2", "extract.batch_size: 8"} | workers
    better = {o["setting"] for o in found["alternatives"] if o["times_as_fast"] >= 1.05 and o["least"] > 1}
    assert set(found["better_settings"]) == better
    assert any("openvino" in text for text in found["untried"])  # not to be loaded in this process
    text = succeeded(project, "bench", "extract", "--sample", 32).output
    assert "of the limit" in text
    assert "not tried: OpenVINO" in text


def made(**fields: Any) -> ExtractBench:
    rates = {"decode_rate": 9.0, "model_rate": 1.0, "pipeline_rate": 0.9, "limit": 0.9}
    return ExtractBench(
        **rates, **{"fraction_of_limit": 1.0, "rounds": 3, "patches": 32, "settings": {}, **fields}
    )


def test_only_what_gains_more_than_noise_is_called_better() -> None:
    found = made(
        alternatives=(
            Alternative("extract.batch_size: 4", 1.4, 0.9, "backbone", ""),  # not in every round
            Alternative("extract.batch_size: 8", 1.04, 1.02, "backbone", ""),
            Alternative("extract.batch_size: 32", 1.06, 1.01, "backbone", ""),
            Alternative("extract.runtime: openvino", 1.9, 1.7, "backbone", "of another make"),
        )
    )
    lines = found.to_text().splitlines()[-3:]
    assert lines == [
        "better: extract.runtime: openvino (backbone 1.90 × as fast; of another make)",
        "better: extract.batch_size: 32 (backbone 1.06 × as fast)",
        "no better: extract.batch_size: 4 1.40 ×, extract.batch_size: 8 1.04 ×",
    ]
    assert found.to_json()["better_settings"] == ["extract.batch_size: 32", "extract.runtime: openvino"]


@pytest.mark.parametrize(
    ("runtime", "compute_dtype", "best", "expected"),
    [
        ("torch, folded", "bfloat16", forward.FOLDED, {"batch_size"}),
        ("torch, folded", "bfloat16", forward.OPENVINO, {"batch_size", "runtime"}),
        ("torch, folded", "float32", forward.OPENVINO, {"batch_size", "runtime", "amp"}),
        ("openvino", "bfloat16", forward.OPENVINO, set()),
    ],
)
def test_what_is_tried_depends_on_what_is_used(
    monkeypatch: pytest.MonkeyPatch, runtime: str, compute_dtype: str, best: str, expected: set[str]
) -> None:
    monkeypatch.setattr(forward, "choose_runtime", lambda *asked: best)
    monkeypatch.setattr(forward, "choose_compute_dtype", lambda *asked: "bfloat16")
    runner: Any = SimpleNamespace(
        config=SimpleNamespace(extract=SimpleNamespace(workers="auto")),
        device=SimpleNamespace(type="cpu"),
        spec=SimpleNamespace(runtime=runtime, compute_dtype=compute_dtype),
        embedder=SimpleNamespace(batch_size=16),
    )
    others = bench._others(runner)
    assert {name for name, *_ in others} == expected
    assert {value for name, value, _ in others if name == "batch_size"} <= {8, 32}
    assert all("store of its own" in note for name, _, note in others if name in ("runtime", "amp"))


def test_another_setting_is_measured_in_turn_with_the_present_one(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drifting speed must not look like a gain."""
    rates = iter([10.0, 5.0, 30.0, 10.0, 80.0, 20.0])
    runner = object.__new__(bench.Runner)
    monkeypatch.setattr(bench.Runner, "decoding", lambda self, workers=None: next(rates))
    found = runner.alternative("workers", 2, "", 3)
    assert found is not None
    assert (found.times_as_fast, found.least) == (statistics.median([2.0, 3.0, 4.0]), 2.0)


def test_a_setting_that_cannot_be_used_here_is_told_and_the_rest_stands(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable(runner: bench.Runner, name: str, *rest: Any) -> None:
        raise ConfigError(f"no {name} here", expected="another", where="extract", fix="leave it out")

    monkeypatch.setattr(bench.Runner, "alternative", unusable)
    found = answer(project, "bench", "extract", "--sample", 32)
    assert found["alternatives"] == []
    assert any("extract.batch_size: 2: no batch_size here" in text for text in found["untried"])


def test_a_batch_size_that_leaves_the_batches_as_they_are_is_not_tried(project: Path) -> None:
    found = answer(project, "bench", "extract", "--sample", 32, "--set", "extract.batch_size=64")
    assert not [other for other in found["alternatives"] if "batch_size" in other["setting"]]


def test_a_bad_patch_that_an_extraction_would_skip_is_no_end(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=1, stains=("h&e",), slices=1, patches=8)
    sorted((project / "patches").rglob("*.png"))[0].write_bytes(b"no picture")
    skip = ("--set", "images.on_bad_image=skip")
    assert answer(project, "bench", "extract", *skip)["pipeline_rate"] > 0
    refused(project, "bench", "extract", "--set", "images.on_bad_image=stop", says=("a PNG file",))


@pytest.mark.parametrize(
    ("cases", "each", "count", "expected"), [(44, 45, 512, 12), (4, 900, 512, 4), (100, 900, 512, 8)]
)
def test_a_sample_has_as_many_patches_a_case_as_the_cohort_or_comes_from_eight(
    cases: int, each: int, count: int, expected: int
) -> None:
    table = pd.DataFrame({"case_id": np.repeat([str(case) for case in range(cases)], each)})
    found = bench._spread(table, count)
    assert found["case_id"].nunique() == expected
    assert len(found) == count
    assert found.index.is_monotonic_increasing
    assert {found["case_id"].iloc[0], found["case_id"].iloc[-1]} == {"0", str(cases - 1)}


def test_what_a_store_is_made_with_is_measured(tmp_path: Path) -> None:
    """It is what `extract` would go on with there."""
    project = make_project(tmp_path, cases=1, stains=("h&e",), slices=1, patches=8)
    answer(project, "extract", "--views", 2, "--view-seed", 3)
    assert answer(project, "bench", "extract")["settings"]["views"] == 2
    assert "by torch, folded; 2 views (seed 3)" in succeeded(project, "info").output
    assert answer(project, "bench", "extract", "--store-path", "another")["settings"]["views"] == 1
