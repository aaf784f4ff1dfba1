"""Several processes train as one does: real processes under torchrun, one of them really killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore.errors import ConfigError
from heads.training.ranks import Ranks, joined
from tests import helpers
from tests.heads.finetuned import make_cached

EPOCHS = 7  # of three steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached")
    make_cached(path)
    return path


def train(
    folder: Path, name: str, count: int, kill: int = -1, epochs: int = EPOCHS, **settings: Any
) -> tuple[Any, Path]:
    """Train in so many processes; what the run said, and where its result is."""
    out, state = folder / f"{name}.json", folder / f"{name}.pth"
    worker = [str(helpers.ROOT / "tests/heads/rank_worker.py"), str(folder), str(out), str(epochs)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    done = subprocess.run(
        [*torchrun, *worker, str(state), str(kill), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": str(helpers.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done, out


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    done, out = train(folder, "alone", 1)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_two_processes_train_as_one(folder: Path, alone: dict[str, Any]) -> None:
    done, out = train(folder, "two", 2)
    assert done.returncode == 0, done.stderr
    together = json.loads(out.read_text())
    assert len(together["losses"]) == len(alone["losses"]) == 21
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(together["weights"], alone["weights"], rtol=1e-4, atol=1e-7)
    for mine, theirs in zip(together["history"], alone["history"], strict=True):
        assert mine["val_cross_entropy"] == pytest.approx(theirs["val_cross_entropy"], rel=1e-5)
        assert mine["train_auc"] == theirs["train_auc"]


def test_one_killed_the_other_says_so_and_they_go_on(folder: Path, alone: dict[str, Any]) -> None:
    done, out = train(folder, "killed", 2, kill=8)
    assert done.returncode != 0
    assert "another process of this training has ended" in done.stderr
    assert "featstore finetune --resume" in done.stderr
    assert not out.exists()
    done, out = train(folder, "killed", 2)
    assert done.returncode == 0, done.stderr
    resumed = json.loads(out.read_text())
    assert len(resumed["losses"]) < 21
    np.testing.assert_allclose(resumed["losses"], alone["losses"][-len(resumed["losses"]) :], rtol=1e-5)
    np.testing.assert_allclose(resumed["weights"], alone["weights"], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_what_two_processes_wrote_one_goes_on_with(folder: Path, alone: dict[str, Any]) -> None:
    """With one case a batch either way: a step keeps its two cases, whoever computes them."""
    done, _ = train(folder, "fewer", 2, kill=4, batch_size=1)
    assert done.returncode != 0
    done, out = train(folder, "fewer", 1, batch_size=1)
    assert done.returncode == 0, done.stderr
    losses = json.loads(out.read_text())["losses"]
    np.testing.assert_allclose(losses, alone["losses"][-len(losses) :], rtol=1e-5)


def test_statistics_and_averages_are_the_same_in_all_processes(folder: Path) -> None:
    """The worker compares every process's whole model, buffers of BatchNorm and standardisation too."""
    settings = {"batch_norm": "train", "ema_decay": 0.5, "chunk": 8}
    done, out = train(folder, "statistics", 2, epochs=2, **settings)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(out.read_text())["losses"]) == 6


def test_one_process_needs_no_other() -> None:
    with joined("auto") as (ranks, device):
        assert (ranks, device) == (Ranks(), "auto")
    tensor = torch.ones(2)
    ranks.sum([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert ranks.any(True, False) == (True, False)
    assert ranks.gather("a") == ["a"]
    assert ranks.from_first("a") == "a"
    assert Ranks(1, 3).share("abcdefg") == "be"


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="cuda:1, for 2 processes"), joined("cuda:1"):
        pass
