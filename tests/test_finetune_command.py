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
from unittest import mock

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from heads.training.finetune import FineTuning
from tests import helpers
from tests.command_line import answer, featstore, make_project, refused, succeeded
from tests.inspect.projects import drawing_nothing, project_with

TUNE = ("--epochs", 1, "--unfreeze", "last:1", "--backbone-lr", 1e-3, "--patches-per-case", 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run; to be copied, not changed."""
    return project_with(tmp_path_factory.mktemp("trained"), "abmil")


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
    assert about["finetuned"]["changed_files"] == 0


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
    assert cached["best"]["loss"] == pytest.approx(direct["test_loss"], rel=1e-2)
    said = succeeded(tuned, "evaluate", f"runs/{run.name}").stdout
    assert "test, best epoch" in said
    assert "test, last epoch" not in said
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
    named = number == signal.SIGKILL  # of a name, it goes on by the same command
    name = ("--as", "s") if named else ("--suffix", "s")
    flags = ("--epochs", 60, "--patience", 60, "--unfreeze", "last:1", *name, "--save-seconds", 0)
    with tuning(project, *flags) as process:
        wait_for(lambda: list(project.glob("runs/finetune_*s/history.csv")))
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    run = project / "runs" / "finetune_s" if named else run_of(project, "s")
    if number == signal.SIGTERM:
        assert f"featstore finetune --resume {run}" in out
    assert not (run / "results.json").exists()
    config = run / "config.yaml"  # shorter, to come to an end
    done = len(pd.read_csv(run / "history.csv"))
    config.write_text(config.read_text().replace("epochs: 60", f"epochs: {done + 1}"))
    with drawing_nothing():
        result = succeeded(project, "finetune", *(flags if named else ("--resume", f"runs/{run.name}")))
    assert "going on with" in result.output
    assert len(pd.read_csv(run / "history.csv")) == done + 1
    steps = pd.read_csv(run / "steps.csv")
    assert not steps.duplicated(["epoch", "step"]).any()
    assert steps["epoch"].max() == done + 1
    assert len(steps) == 9 * (done + 1)
    if named:
        before = (run / "results.json").read_bytes()
        said = succeeded(project, "finetune", "--as", "s").stdout
        assert f"{run} is finished; nothing is done again" in said
        assert "test accuracy" in said.lower()
        assert (run / "results.json").read_bytes() == before
        refused(project, "finetune", "--as", "s", "--resume", "x", says=("--as s at once",))


def test_changed_files_are_told_also_of_test_cases(project: Path) -> None:
    newest = next((project / "runs").glob("run_*_abmil"))
    case = json.loads((newest / "results.json").read_text())["test"]["case_ids"][0]
    files = sorted((project / "patches").glob(f"case_{case}_*.png"))
    for file in files[1:3]:
        file.write_bytes(files[0].read_bytes())
    with drawing_nothing():
        result = succeeded(project, "finetune", *TUNE, "--suffix", "c")
    assert "2 patches are no longer the files that were embedded" in result.output
    assert json.loads((run_of(project, "c") / "run.json").read_text())["finetuned"]["changed_files"] == 2


def test_the_best_epoch_is_exported_and_evaluated(project: Path) -> None:
    flags = ("--epochs", 4, "--patience", 4, "--backbone-lr", 0.05, "--head-lr", 0.05, "--unfreeze", "all")
    with drawing_nothing():
        succeeded(project, "finetune", *flags, "--suffix", "b", "--seed", 3)
    run = run_of(project, "b")
    state = torch.load(run / "checkpoints" / "finetune.pth", weights_only=True)
    assert 0 < state["progress"]["best_epoch"] < state["progress"]["epoch"]
    (weights,) = (run / "backbone").glob("*.safetensors")
    prefix = "backbone.model."
    best = {n.removeprefix(prefix): v for n, v in state["best"].items() if n.startswith(prefix)}
    exported = load_file(weights)
    assert exported.keys() == best.keys()
    assert all(torch.equal(exported[name], best[name]) for name in best)
    store = json.loads((run / "run.json").read_text())["store"]["path"]
    succeeded(project, "extract", "--backbone", f"runs/{run.name}/backbone", "--store", store)
    direct = json.loads((run / "results.json").read_text())
    assert answer(project, "evaluate", run.name)["best"]["loss"] == pytest.approx(
        direct["test"]["test_loss"], rel=1e-2
    )
    assert direct["test"]["test_loss"] != direct["test_last"]["test_loss"]


def test_a_head_is_not_tuned_on_embeddings_of_another_make(project: Path) -> None:
    shutil.rmtree(project / "store")
    succeeded(project, "extract", "--weights", "random:1")
    message = refused(project, "finetune", "--weights", "random:1")
    assert "the embeddings that the run was trained on" in message


def test_the_runs_own_backbone_will_do_where_that_of_now_cannot_be_had(project: Path) -> None:
    with drawing_nothing():
        succeeded(project, "finetune", *TUNE, "--backbone", "timm:nothing_like_it")


def test_a_divergence_leaves_what_was_good_and_it_can_be_finished(project: Path) -> None:
    with drawing_nothing():
        succeeded(project, "finetune", *TUNE[2:], "--epochs", 2, "--suffix", "d")
    run = run_of(project, "d")
    (run / "results.json").unlink()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 3"))
    real = FineTuning.update

    def diverge(self: FineTuning, loss: torch.Tensor) -> None:
        real(self, loss * float("nan"))

    with mock.patch.object(FineTuning, "update", diverge):
        result = featstore(project, "finetune", "--resume", run.name, "--save-seconds", 0)
    assert result.exit_code == 1
    assert "--finish" in result.stderr
    state = torch.load(run / "checkpoints" / "finetune.pth", weights_only=True)
    assert state["progress"]["epoch"] == 2
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    with drawing_nothing():
        succeeded(project, "finetune", "--resume", run.name, "--finish")
    assert (run / "results.json").is_file()
    refused(project, "finetune", "--finish", says=("--finish without --resume",))
    refused(project, "finetune", "a", "--resume", "b", says=("one to resume",))


def test_flags_that_resuming_does_not_use_are_told(project: Path) -> None:
    with drawing_nothing():
        succeeded(project, "finetune", *TUNE, "--suffix", "f")
    run = run_of(project, "f")
    (run / "results.json").unlink()
    steps = run / "steps.csv"
    kept = steps.read_bytes()
    for damaged in (b"", b"a,b\n1,2\n"):
        steps.write_bytes(damaged)
        message = featstore(project, "finetune", "--resume", run.name)
        assert message.exit_code == 2
        assert "move the file away" in message.stderr
    steps.write_bytes(kept)
    with drawing_nothing():
        result = succeeded(project, "finetune", "--resume", run.name, "--epochs", 5, "--unfreeze", "all")
    assert "not used: finetune.unfreeze, finetune.epochs" in result.output
    (run / "results.json").unlink()
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**about, "finetuned": 3}))
    assert "does not say what was fine-tuned" in refused(project, "finetune", "--resume", run.name)


def test_attended_patches_of_a_head_without_attention(project: Path) -> None:
    with drawing_nothing():
        succeeded(project, "train-head", "--model", "mean", "--suffix", "mean")
        result = featstore(project, "finetune", *TUNE, "--sampling", "attended")
        assert result.exit_code == 2
        assert "no attention" in result.stderr
        (abmil,) = (project / "runs").glob("run_*_abmil")
        succeeded(project, "finetune", abmil, *TUNE, "--sampling", "attended")


def test_a_store_of_any_name_is_taken_if_it_holds_what_the_run_is_of(project: Path) -> None:
    with drawing_nothing():
        result = succeeded(project, "finetune", *TUNE, "--suffix", "n")
    assert "validation loss before any step" in result.output
    run = run_of(project, "n")
    succeeded(project, "extract", "--backbone", f"runs/{run.name}/backbone", "--store", "mine")
    direct = json.loads((run / "results.json").read_text())["test"]["test_loss"]
    found = answer(project, "evaluate", run.name, "--store", "mine")
    assert found["best"]["loss"] == pytest.approx(direct, rel=1e-2)
    assert json.loads((run / "run.json").read_text())["store"]["spec"]["backbone"] == "timm:test_resnet"


def test_a_worse_model_than_the_first_is_told(project: Path) -> None:
    with drawing_nothing():
        result = succeeded(project, "finetune", *TUNE, "--backbone-lr", 0.3, "--head-lr", 0.3)
    assert "no epoch was better than the model that it began with" in result.output


def test_an_unfinished_one_is_sent_on(project: Path) -> None:
    with drawing_nothing():
        succeeded(project, "finetune", *TUNE, "--suffix", "u")
    run = run_of(project, "u")
    (run / "results.json").unlink()
    assert f"featstore finetune --resume {run.name}" in refused(project, "finetune", run.name)
    assert "featstore finetune --resume" in refused(project, "report", run.name)
