"""`featstore bench train` measures what it says, on a cohort small enough for a test."""

from __future__ import annotations

import json

import pytest
import torch

from heads import bench


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DIM", 8), ("LAB_TRAIN", 4), ("LAB_OTHER", 2), ("LAB_PATCHES", 400)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "LARGE", 4)


def test_it_tells_in_figures_what_it_tells_in_words() -> None:
    measured = bench.bench_train("cpu", rounds=1)
    found = json.loads(json.dumps(measured.to_json()))
    assert found["step_over_floor"] == pytest.approx(found["step_seconds"] / found["floor_seconds"])
    assert all(value > 0 for name, value in found.items() if "_seconds" in name)
    assert {"step_seconds", "floor_seconds", "step_over_floor", "epoch_seconds"} <= set(found)
    kind = "float32" if found["precision"] == "off" else found["precision"]
    assert found["epoch_seconds"] == found[f"epoch_seconds_{kind}"]
    text = measured.to_text()
    assert f"ratio {found['step_over_floor']:.2f}" in text
    assert "epoch, 4 cases, 400 patches" in text


def test_its_floor_has_no_more_than_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x (N, D): N·(2·D·E + 3·E·H) multiplications, each counted where it is done."""
    done: list[int] = []
    plain = torch.Tensor.__matmul__

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        done.append(a.shape[0] * a.shape[1] * b.shape[1])
        return plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    bench._floor(torch.zeros(10, bench.DIM))()
    assert sum(done) == 10 * (2 * bench.DIM * 512 + 3 * 512 * 128)
