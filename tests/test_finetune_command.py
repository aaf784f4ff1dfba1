"""`featstore finetune`: from a run to a tuned backbone, and back to a cache, in three commands."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests import helpers
from tests.command_line import answer, featstore, make_project, refused, succeeded
from tests.inspect.projects import drawing_nothing, project_with

TUNE = ("--epochs", 1, "--unfreeze", "last:1", "--backbone-lr", 1e-3, "--patches-per-case", 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run of each of two heads; to be copied, not changed."""
    return project_with(tmp_path_factory.mktemp("trained"), "hierarchical", "abmil")


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "project"))


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a fine-tuning of its newest run; to be read."""
    project = Path(shutil.copytree(trained, tmp_path_factory.mktemp("tuned") / "project"))
    with drawing_nothing():
        succeeded(project, "finetune", *TUNE, "--suffix", "t")
    return project


def run_of(project: Path, suffix: str = "t") -> Path:
    (path,) = (project / "runs").glob(f"finetune_*_{suffix}")
    return path


def test_a_fine_tuning_is_a_run_with_a_backbone_beside_it(tuned: Path) -> None:
    run = run_of(tuned)
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["num_samples"] == 3
    assert 0 <= results["test"]["test_auc"] <= 1 or results["test"]["test_auc"] is None
    history = pd.read_csv(run / "history.csv")
    assert {"train_loss", "val_cross_entropy", "lr", "lr_head", "seconds"} <= set(history)
    steps = pd.read_csv(run / "steps.csv")
    assert steps["step"].tolist() == list(range(1, 10))
    about = json.loads((run / "run.json").read_text())
    assert about["finetuned"]["run"].endswith("_abmil")
    assert about["finetuned"]["backbone"]["name"] == "timm:test_resnet"
    described = json.loads((run / "backbone" / "backbone.json").read_text())
    assert described["made_by"]["run"] == run.name
    assert "layer4" in described["made_by"]["learned"]


def test_back_to_a_cache_which_says_the_same(tuned: Path) -> None:
    """extract with what finetune printed, then evaluate its run and train a head, and attention on it."""
    run = run_of(tuned)
    store = json.loads((run / "run.json").read_text())["store"]
    succeeded(tuned, "extract", "--backbone", f"runs/{run.name}/backbone", "--store", store["path"])
    assert answer(tuned, "info", "--store", store["path"])["fingerprint"].startswith(
        store["fingerprint"][:12]
    )
    direct = json.loads((run / "results.json").read_text())["test"]
    before = (run / "results.json").read_bytes()
    cached = answer(tuned, "evaluate", f"runs/{run.name}")
    assert cached["best"]["loss"] == pytest.approx(direct["test_loss"], rel=2e-3)
    assert (run / "results.json").read_bytes() == before
    succeeded(tuned, "attention", f"runs/{run.name}")
    with drawing_nothing():
        succeeded(tuned, "train-head", "--model", "abmil", "--store", store["path"], "--suffix", "again")
    # The newest run is that of train-head, not the fine-tuning.
    (again,) = (tuned / "runs").glob("run_*_again")
    assert answer(tuned, "evaluate")["run"].endswith(again.name)
    with drawing_nothing():  # and on it another can be started
        succeeded(tuned, "finetune", *TUNE, "--store", store["path"], "--suffix", "second")
    second = run_of(tuned, "second")
    assert (
        json.loads((second / "backbone/backbone.json").read_text())["description"]["name"]
        == "timm:test_resnet"
    )


def test_evaluating_before_there_is_a_cache_says_what_to_do(trained: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    with drawing_nothing():
        succeeded(project, "finetune", *TUNE, "--suffix", "t")
    name = run_of(project).name
    assert "finetune_" in refused(project, "evaluate", f"runs/{name}", to_do=False)
    message = refused(project, "finetune", f"runs/{name}")
    assert "not cached yet" in message
    assert f"--store store_{name}" in message
    assert "is finished" in refused(project, "finetune", "--resume", f"runs/{name}")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--unfreeze", "last:9"), ("'last:9'", "stem, layer1, layer2, layer3, layer4")),
        (("--unfreeze", "nothing_like_it"), ("no parameter", "layer4")),
        (("--unfreeze", "none", "--freeze-head"), ("nothing is to learn",)),
        (("--unfreeze", "("), ("regular expression",)),
        (("--backbone", "timm:test_vit"), ("another backbone",)),
        (("--weights", "random:1"), ("another backbone", "weights")),
        (("--patches-folder", "nowhere"), ("no folder of patches",)),
        (("--gpu",), ("GPU",)),
        (("--epochs", 0), ("finetune.epochs",)),
        (("--augment-area", 0), ("augment_area",)),
        (("nothing",), ("nothing is no run",)),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    trained: Path, flags: tuple[Any, ...], says: tuple[str, ...]
) -> None:
    if flags == ("--gpu",):
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    if flags[0] in ("--backbone", "--weights"):
        # What the run names is taken where the settings of now do not fit: both must be wrong.
        config = trained / "runs" / next(iter((trained / "runs").glob("run_*_abmil"))).name / "config.yaml"
        text = config.read_text()
        config.write_text(text.replace("random:0", "random:2"))
        try:
            refused(trained, "finetune", *flags, says=says)
        finally:
            config.write_text(text)
        return
    refused(trained, "finetune", *flags, says=says)


def test_a_run_on_imported_features_is_refused(tmp_path: Path) -> None:
    import numpy as np

    project = make_project(
        tmp_path, {"labels": {"file": "labels.csv"}, "classes": {"a": ["1"], "b": ["3"]}}
    )
    helpers.write_labels(project, {str(i): "13"[i % 2] for i in range(1, 13)})
    rng = np.random.default_rng(0)
    rows = [
        f"{i},{i % 2}," + ",".join(f"{v:.3f}" for v in rng.normal(size=4))
        for i in range(1, 13)
        for _ in "ab"
    ]
    (project / "bags.csv").write_text("bag_id,bag_label,f0,f1,f2,f3\n" + "\n".join(rows))
    succeeded(project, "import", "bags.csv", "--store", "imported")
    with drawing_nothing():
        succeeded(project, "train-head", "--store", "imported", "--epochs", 1)
    message = refused(project, "finetune", "--store", "imported")
    assert "imported features" in message
    assert "featstore extract" in message


def test_a_damaged_checkpoint_is_refused(tuned: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(tuned, tmp_path / "project"))
    run = run_of(project)
    (run / "results.json").unlink()
    state = run / "checkpoints" / "finetune.pth"
    whole = state.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2], _flipped(whole)):
        state.write_bytes(damaged)
        message = refused(project, "finetune", "--resume", f"runs/{run.name}")
        assert "checkpoint cannot be read" in message
    state.unlink()
    assert "checkpoint cannot be read" in refused(project, "finetune", "--resume", f"runs/{run.name}")
    assert "is no fine-tuning" in refused(project, "finetune", "--resume", next(project.glob("runs/run_*")))


def _flipped(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


@contextlib.contextmanager
def tuning(project: Path, *flags: object) -> Iterator[subprocess.Popen[str]]:
    """A real process that fine-tunes, slowly enough to be stopped."""
    command = [sys.executable, "-m", "cli", "finetune", *map(str, flags)]
    process = subprocess.Popen(
        [sys.executable, "-c", "import cli; cli.app()", *command[3:]],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(helpers.ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_or_killed_one_goes_on(project: Path, number: int, code: int) -> None:
    flags = ("--epochs", 60, "--patience", 60, "--unfreeze", "last:1", "--suffix", "s", "--save-seconds", 0)
    with tuning(project, *flags) as process:
        wait_for(lambda: list(project.glob("runs/finetune_*_s/history.csv")))
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    run = run_of(project, "s")
    if number == signal.SIGTERM:
        assert f"featstore finetune --resume {run}" in out
    assert not (run / "results.json").exists()
    config = run / "config.yaml"  # shorter, to come to an end
    done = len(pd.read_csv(run / "history.csv"))
    config.write_text(config.read_text().replace("epochs: 60", f"epochs: {done + 1}"))
    with drawing_nothing():
        result = succeeded(project, "finetune", "--resume", f"runs/{run.name}")
    assert "going on with" in result.output
    assert len(pd.read_csv(run / "history.csv")) == done + 1
    steps = pd.read_csv(run / "steps.csv")
    assert not steps.duplicated(["epoch", "step"]).any()
    assert steps["epoch"].max() == done + 1
    assert len(steps) == 9 * (done + 1)


def test_changed_files_are_told(project: Path) -> None:
    files = sorted((project / "patches").glob("*.png"))
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    with drawing_nothing():
        result = succeeded(project, "finetune", *TUNE)
    assert "no longer the files that were embedded" in result.output


def test_attended_patches_of_a_head_without_attention(project: Path) -> None:
    with drawing_nothing():
        succeeded(project, "train-head", "--model", "mean", "--suffix", "mean")
        result = featstore(project, "finetune", *TUNE, "--sampling", "attended")
        assert result.exit_code == 2
        assert "no attention" in result.stderr
        (abmil,) = (project / "runs").glob("run_*_abmil")
        succeeded(project, "finetune", abmil, *TUNE, "--sampling", "attended")
