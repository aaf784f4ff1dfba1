"""Studies as typed: equal to single runs, resumed after kills and failures, refused where impossible."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.cohort.splits import read_split
from heads.evaluation.runs import held
from heads.evaluation.studies import open_study
from heads.training.course import TrainingError
from heads.training.loop import Training
from tests import helpers
from tests.command_line import answer, featstore, listing, refused, succeeded
from tests.heads.planted import CASES, LABELS, SMALL, make_planted_project

TABLES = ("study", "per_split", "out_of_fold", "per_case", "always_wrong", "ensemble", "pooled")
SETTINGS: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["0"], "malignant": ["1"]},
    "head": {**SMALL, "name": "abmil", "dropout": 0.2},
    "train": {"device": "cpu", "lr": 0.003, "epochs": 3, "processes": 1},
    "runs": {"resamples": 20},
}


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("results.plot_history", "results.plot_confusion", "results.plot_deviation"):
        monkeypatch.setattr(f"heads.evaluation.{name}", lambda *args: [])
    monkeypatch.setattr("heads.evaluation.study_report.plot_study", lambda *args: [])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one finished study of 3 folds and 2 seeds; not to be changed."""
    folder = make_planted_project(tmp_path_factory.mktemp("study"), SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        said = succeeded(folder, "train-head", "--folds", 3, "--seeds", 2, "--analyze-attention").stdout
    assert "6 of 6 trainings finished" in said
    return folder


@pytest.fixture
def project(whole: Path, tmp_path: Path) -> Path:
    """A copy without runs, with the splits of the study as its own."""
    new = Path(shutil.copytree(whole, tmp_path / "project", ignore=shutil.ignore_patterns("runs")))
    shutil.copytree(study_of(whole) / "splits", new / "splits")
    return new


def study_of(project: Path) -> Path:
    (path,) = (project / "runs").glob("study_*")
    return path


def results(run: Path, name: str = "results.json") -> dict[str, Any]:
    found = dict(json.loads((run / name).read_text()))
    found.pop("args", None)
    return found


def same_training(a: Path, b: Path) -> None:
    """Equal to the last bit."""
    for name in ("results.json", "metrics.json"):
        assert results(a, name) == results(b, name)
    for name in ("checkpoints/best.safetensors", "predictions.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    first, second = (pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (a, b))
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def same_study(a: Path, b: Path) -> None:
    """Equal trainings and tables, seconds apart."""
    for run in sorted((b / "trainings").iterdir()):
        same_training(a / "trainings" / run.name, run)
    for name in TABLES:
        first, second = (pd.read_csv(each / f"{name}.csv", dtype={"case_id": str}) for each in (a, b))
        pd.testing.assert_frame_equal(
            *(t.drop(columns="seconds", errors="ignore") for t in (first, second))
        )


def test_the_study_folder_holds_what_it_should(whole: Path) -> None:
    study = study_of(whole)
    names = {path.name for path in study.iterdir()}
    assert names >= {*(f"{name}.csv" for name in TABLES), "metrics.json", "study.txt", "config.yaml"}
    assert sorted(path.name for path in (study / "splits").iterdir()) == [
        f"data_splits_0{k}.npz" for k in (1, 2, 3)
    ]
    found = {path.name for path in (study / "trainings").iterdir()}
    assert found == {f"fold_{k}_seed_{seed}" for k in range(3) for seed in (42, 43)}
    tests = [read_split(study / "splits" / f"data_splits_0{k}.npz", CASES, {})[0].test for k in (1, 2, 3)]
    assert sorted(case for part in tests for case in part) == sorted(CASES)
    assert json.loads((study / "metrics.json").read_text())["trainings"]["finished"] == 6


@pytest.mark.parametrize(("fold", "seed"), [(0, 42), (2, 43)])
def test_a_training_of_a_study_equals_the_same_training_alone(
    whole: Path, project: Path, fold: int, seed: int
) -> None:
    flags = ("--fold", fold, "--train-seed", seed, "--analyze-attention")
    alone = Path(answer(project, "train-head", "--load-splits", "splits", *flags)["run"])
    mine = study_of(whole) / "trainings" / f"fold_{fold}_seed_{seed}"
    same_training(mine, alone)
    table = "attention_analysis/patch_attention.csv"
    assert (mine / table).read_bytes() == (alone / table).read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_same_trainings(whole: Path, project: Path) -> None:
    flags = ("--load-splits", "splits/data_splits_01.npz", "--seeds", 2, "--processes", 2)
    assert "2 trainings at once" in succeeded(project, "train-head", *flags).stdout
    for name in ("fold_0_seed_42", "fold_0_seed_43"):
        same_training(study_of(project) / "trainings" / name, study_of(whole) / "trainings" / name)


_DEADLY = """
import os, signal, torch
from heads.training.losses import register_loss

@register_loss("deadly")
def deadly(logits, labels, smoothing):
    if torch.initial_seed() // 1_000_003 == 43:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
"""


@pytest.mark.slow
def test_a_process_that_is_killed_fails_its_training_and_another_goes_on(project: Path) -> None:
    (project / "deadly.py").write_text(_DEADLY)
    flags = ("--plugin", "deadly.py", "--loss", "deadly", "--processes", 2)
    done = featstore(project, "train-head", "--seeds", 3, *flags)
    assert done.exit_code == 1
    table = pd.read_csv(study_of(project) / "study.csv").set_index(["seed", "fold"])["status"]
    assert {seed: set(table[seed]) for seed in (42, 43, 44)} == {
        42: {"finished"},
        43: {"failed"},
        44: {"finished"},
    }
    assert "SIGKILL; the system kills what takes too much memory" in done.stdout


def test_a_failed_training_is_told_the_others_go_on_and_it_is_trained_when_resumed(
    whole: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = Training._epoch

    def fails(training: Training) -> None:
        split = read_split(project / "splits" / "data_splits_02.npz", CASES, {})[0]
        if training.split == split and training.progress.epoch == 1:
            error = TrainingError if training.config.seed == 42 else MemoryError
            raise error("it did not go well\nat all")
        epoch(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_epoch", fails)
        done = featstore(project, "train-head", "--seeds", 2, "--analyze-attention")
    assert done.exit_code == 1
    study = study_of(project)
    assert "2 trainings failed" in done.stdout
    assert "fold 1 seed 42: it did not go well\n" in done.stdout
    table = pd.read_csv(study / "study.csv").set_index(["fold", "seed"])
    assert table["status"].value_counts().to_dict() == {"finished": 4, "failed": 2}
    assert table.loc[(1, 43), "error"] == "MemoryError: it did not go well"
    failure = json.loads((study / "trainings" / "fold_1_seed_43" / "failed.json").read_text())
    assert "in fails" in failure["traceback"]
    finished = study / "trainings" / "fold_0_seed_42" / "checkpoints" / "last.pth"
    before = finished.stat().st_mtime_ns
    again = succeeded(project, "train-head", "--resume", study.name).stdout
    assert "2 of 6 trainings to do" in again
    assert finished.stat().st_mtime_ns == before
    same_study(study, study_of(whole))


_CHILD = """
import pathlib, sys, time, cli, heads.evaluation.results, heads.evaluation.study_report, heads.run
from heads.training.loop import Training
for name in ("plot_history", "plot_confusion", "plot_deviation"):
    setattr(heads.evaluation.results, name, lambda *args: [])
heads.evaluation.study_report.plot_study = lambda *args: []
heads.run.SAVE_SECONDS, epoch, begun = 0.0, Training._epoch, []
def waits(self):  # in the second epoch of the second training
    begun.extend([self] * (self.progress.epoch == 0))
    there = len(begun) == 2 and self.progress.epoch == 1
    if there: pathlib.Path("waits").touch()
    while there and not pathlib.Path("go").exists(): time.sleep(0.005)
    epoch(self)
Training._epoch = waits
cli.app(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_or_killed_and_resumed_equals_a_study_that_was_not(
    whole: Path, project: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [sys.executable, "-c", _CHILD, "train-head", "--seeds", "2", "--analyze-attention"]
    child = subprocess.Popen(
        words, cwd=project, env={**os.environ, "PYTHONPATH": str(helpers.ROOT)}, stdout=subprocess.PIPE
    )
    while not (project / "waits").exists():
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(number)
    (project / "go").touch()
    said = child.communicate()[0].decode()
    study = study_of(project)
    assert not (study / "trainings" / "fold_2_seed_43").exists()
    if number == signal.SIGTERM:
        assert child.returncode == 128 + signal.SIGTERM
        assert f"--resume {study}" in said
        shown = featstore(project, "evaluate", "--study", study)
        assert shown.exit_code == 1
        assert "trainings are still to do" in shown.stdout
    else:
        assert child.returncode == -signal.SIGKILL
    epoch, epochs = Training._epoch, list[int]()
    monkeypatch.setattr(Training, "_epoch", lambda self: (epochs.append(1), epoch(self)))
    assert "5 of 6 trainings to do" in succeeded(project, "train-head", "--resume", study).stdout
    assert len(epochs) < 5 * 3  # the interrupted one went on
    same_study(study, study_of(whole))


def test_a_study_is_evaluated_without_a_store(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(copy / "store")
    study = study_of(copy)
    before = listing(study)
    for name in (*(f"{name}.csv" for name in TABLES), "metrics.json", "study.txt"):
        (study / name).unlink()
    found = answer(copy, "evaluate", "--study", study.name)
    assert found["trainings"]["finished"] == 6
    after = listing(study)
    after["study.txt"] = before["study.txt"]  # which names the folder's path
    assert after == before


def test_permuted_test_labels_change_nothing_before_the_final_evaluation(
    whole: Path, project: Path
) -> None:
    split = read_split(project / "splits" / "data_splits_01.npz", CASES, {})[0]
    for k in (2, 3):
        (project / "splits" / f"data_splits_0{k}.npz").unlink()
    flipped = {case: 1 - label if case in split.test else label for case, label in LABELS.items()}
    helpers.write_labels(project, flipped)
    succeeded(project, "train-head", "--seeds", 1, "--threshold", "validation")
    mine, other = (study_of(each) / "trainings" / "fold_0_seed_42" for each in (project, whole))
    best = "checkpoints/best.safetensors"
    assert (mine / best).read_bytes() == (other / best).read_bytes()
    first, second = (pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (mine, other))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    a, b = (results(run)["test"] for run in (mine, other))
    assert a["prediction_probs"] == b["prediction_probs"]
    assert [1 - label for label in a["true_labels"]] == b["true_labels"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--folds", 1), ("--folds is 1", "greater than or equal to 3", "where: --folds")),
        (("--folds", 101), ("--folds is 101", "less than or equal to 100", "where: --folds")),
        (("--seeds", 0), ("--seeds is 0", "1 or more")),
        (("--folds", 3, "--fold", 1), ("train.fold is 1", "a study trains every fold")),
        (("--folds", 4, "--load-splits", "splits"), ("--folds is 4", "holds 3 splits")),
        (("--folds", 5), ("--folds is 5", "holds 3 splits")),
        (("--seeds", 2, "--load-splits", "nowhere"), ("there are no splits in", "nowhere")),
        (("--folds", 12, "--split-path", "none"), ("class benign has 10 cases", "12 folds")),
        (("--folds", 3, "--model", "mean", "--reg-weight-entropy", 0.1), ("no attention",)),
        (("--seeds", 2, "--resume", "x"), ("--folds, --seeds or --task with --resume",)),
    ],
)
def test_what_cannot_be_a_study_is_refused(project: Path, flags: tuple[Any, ...], says: Any) -> None:
    refused(project, "train-head", *flags, says=says)
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("data_splits_2.npz", ("data_splits_02.npz and data_splits_2.npz", "both split number 2")),
        ("data_splits_a.npz", ("data_splits_a.npz", "has no number")),
        ("data_splits_00.npz", ("data_splits_00.npz", "has no number")),
        ("data_splits_b_03.npz", ("data_splits_03.npz and data_splits_b_03.npz", "split number 3")),
    ],
)
def test_split_files_that_are_no_fold_of_their_own_are_refused(
    project: Path, name: str, says: tuple[str, ...]
) -> None:
    shutil.copy(project / "splits" / "data_splits_02.npz", project / "splits" / name)
    flags = ("--load-splits", "splits", "--seeds", 1)
    refused(project, "train-head", *flags, says=(*says, "data_splits_01.npz"))


def test_settings_that_read_results_cannot_follow_are_told(whole: Path) -> None:
    study = study_of(whole)
    run = study / "trainings" / "fold_1_seed_42"
    given = ("--calibration", "temperature", "--threshold", "validation")
    for words in (("evaluate", "--study", study), ("compare", run, study)):
        said = succeeded(whole, *words, *given).stdout
        for setting in ("runs.threshold is validation", "runs.calibration is temperature"):
            assert f"warning: {setting}, but the results of {study}" in said
        assert (f"but the results of {run}" in said) == (words[0] == "compare")
        own = ("--calibration", "none", "--threshold", "argmax")
        assert "warning" not in succeeded(whole, *words, *own).stdout
    said = succeeded(whole, "evaluate", "--study", study, "--no-analyze-attention").stdout
    assert "warning: runs.analyze_attention is false" in said


def test_a_study_is_no_run_and_a_run_no_study(whole: Path, project: Path) -> None:
    study = study_of(whole)
    refused(whole, "evaluate", study.name, says=("is a study", "--study"))
    refused(whole, "evaluate", "--study", study / "trainings" / "fold_0_seed_42", says=("a single run",))
    refused(whole, "evaluate", "--study", "none", says=("is no study", "study_…"))
    refused(whole, "evaluate", study.name, "--study", study.name, says=("--study with a run",))
    refused(whole, "train-head", "--resume", study.name, "--seeds", 3, says=("with --resume",))
    either = ("none is no run and no study", "run.json or study.json")
    refused(whole, "compare", study.name, "none", says=either)
    refused(whole, "train-head", "--resume", "none", says=either)


def test_a_table_that_cannot_be_written_is_named_as_it_was_given(whole: Path, tmp_path: Path) -> None:
    study, path = study_of(whole), tmp_path / "none" / "table.csv"
    message = refused(whole, "compare", study.name, study.name, "--csv", path, says=(f"where: {path}",))
    assert ".part" not in message


@pytest.mark.parametrize("processes", [1, 2])
def test_what_all_trainings_remark_is_told_once(project: Path, processes: int) -> None:
    for path in sorted((project / "splits").iterdir())[1:]:
        path.unlink()
    flags = ("--seeds", 3, "--epochs", 1, "--model", "mean", "--analyze-attention")
    said = succeeded(project, "train-head", *flags, "--processes", processes).stdout
    assert said.count("warning: no attention table: this head has no attention") == 1
    assert "[3/3]" in said
    assert "seed 42, " in said  # one split: nothing is pooled
    assert "pooled" not in said.split("[3/3]")[1]


@pytest.mark.parametrize(
    "name",
    ["results.json", "metrics.json", "history.csv", "predictions.csv", "checkpoints/best.safetensors"],
)
def test_a_damaged_training_is_named_left_out_and_trained_anew(
    whole: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    study = study_of(copy)
    (study / "trainings" / "fold_1_seed_43" / name).write_text("[1, 2")
    done = featstore(copy, "evaluate", "--study", study)
    assert done.exit_code == 1
    assert "5 of 6 trainings finished" in done.stdout
    assert f"fold 1 seed 43: {name.rpartition('/')[2]} cannot be read" in done.stdout
    assert json.loads((study / "metrics.json").read_text())["trainings"]["damaged"] == 1
    said = succeeded(copy, "train-head", "--resume", study.name).stdout
    assert "1 of 6 trainings to do" in said
    assert "fold 1 seed 43: its files were damaged; it is trained anew" in said
    same_study(study, study_of(whole))


def test_tasks_share_a_study_and_what_they_lack_is_named_and_done(whole: Path, project: Path) -> None:
    """Four tasks, one of them twice and one never; a result is lost, another one damaged."""
    words = ("train-head", "--as", "shared", "--seeds", 2, "--analyze-attention")
    study = project / "runs" / "study_shared"
    for task in (2, 0, 0, 1):
        said = succeeded(project, *words, "--task", f"{task}/4").stdout
        assert f"task {task}/4 of {study}: {1 if task > 1 else 2} of" in said
    shown = featstore(project, "evaluate", "--study", study)
    assert shown.exit_code == 1
    assert "1 training is still to do:\n    fold 0 seed 43: missing" in shown.stdout
    shutil.rmtree(study / "trainings" / "fold_2_seed_43")
    (study / "trainings" / "fold_0_seed_42" / "results.json").write_text("{")
    shown = featstore(project, "evaluate", "--study", "study_shared")
    assert shown.exit_code == 1
    for line in ("fold 0 seed 43: missing", "fold 2 seed 43: missing", "fold 0 seed 42: results.json"):
        assert line in shown.stdout
    for task in range(4):
        succeeded(project, *words[:3], "--task", f"{task}/4")  # its folds and seeds are known
    assert "6 of 6 trainings finished" in succeeded(project, "evaluate", "--study", study).stdout
    same_study(study, study_of(whole))


def test_a_task_leaves_alone_what_another_process_is_at(project: Path) -> None:
    words = ("train-head", "--as", "shared", "--seeds", 1, "--epochs", 1, "--task")
    succeeded(project, *words, "0/3")
    study = open_study(project / "runs", Path("study_shared"))
    with study.folder.training_held(1, 42):
        done = featstore(project, *words, "1/3")
    assert done.exit_code == 1
    assert "fold 1 seed 42: left alone: another process is training here" in done.stdout
    with held(study.folder.path, shared=True):
        refused(project, "train-head", "--resume", "study_shared", says=("another process is training",))
        succeeded(project, *words, "1/3")
    with held(study.folder.path):
        refused(project, *words, "2/3", says=("another process is training here",))


def test_the_share_of_a_task_comes_from_the_scheduler(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train-head", "--as", "study_a.b", "--seeds", 1, "--epochs", 1, "--task", "auto/3")
    refused(project, *words, says=("'auto/3', but this is no task", "--task 0/3"))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert "task 2/3 of" in succeeded(project, *words).stdout
    assert (project / "runs" / "study_a.b" / "trainings" / "fold_2_seed_42" / "results.json").is_file()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    refused(project, *words, says=("there is no share 3 of 3",))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--task", "0/2"), ("without a study's name", "--as first --task 0/2")),
        (("--as", "a", "--task", "2"), ("--task is '2'", "I/N")),
        (("--as", "a", "--task", "0/0"), ("--task is '0/0'",)),
        (("--as", "../a", "--seeds", 2), ("--as is '../a'", "letters, digits")),
        (("--as", ".a"), ("--as is '.a'",)),
        (("--as", ""), ("--as is ''",)),
        (("--as", "a", "--resume", "b"), ("--resume b and --as a at once",)),
    ],
)
def test_names_and_tasks_that_cannot_be_are_refused(
    project: Path, flags: tuple[Any, ...], says: tuple[str, ...]
) -> None:
    refused(project, "train-head", *flags, says=says)
    assert not (project / "runs").exists()


def test_a_named_study_keeps_its_folds_and_seeds(project: Path) -> None:
    words = ("train-head", "--as", "s", "--epochs", 1)
    succeeded(project, *words, "--seeds", 1, "--task", "0/3")
    refused(project, *words, "--seeds", 2, says=("--seeds is 2, but study_s was begun with 1",))
    refused(project, *words, "--folds", 4, says=("--folds is 4, but study_s was begun with 3",))
    assert "2 of 3 trainings to do" in succeeded(project, *words, "--folds", 3).stdout


def test_processes_that_begin_one_study_at_once_share_it(project: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(helpers.ROOT / "cli.py"), "train-head", "--as", "s", "--seeds", "1"]
    both = [
        subprocess.Popen(
            [*words, "--epochs", "1", "--task", f"{task}/2"],
            cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for task in (0, 1)
    ]  # fmt: skip
    said = [child.communicate(timeout=240)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert [path.name for path in (project / "runs").iterdir()] == ["study_s"]  # nothing left beside it
    assert "3 of 3 trainings finished" in succeeded(project, "evaluate", "--study", "study_s").stdout


def test_a_named_run_is_begun_and_gone_on_with(project: Path) -> None:
    words = ("train-head", "--as", "mine", "--load-splits", "splits/data_splits_01.npz")
    first = answer(project, *words)
    run = project / "runs" / "run_mine"
    assert Path(first["run"]) == run
    best = run / "checkpoints" / "best.safetensors"
    before = best.read_bytes()
    again = succeeded(project, *words).stdout
    assert f"going on with {run} after epoch 3" in again
    assert best.read_bytes() == before
    (run / "checkpoints" / "last.pth").unlink()  # killed before its first state: begun again
    assert {**answer(project, *words), "interrupted": 0} == {**first, "interrupted": 0}
    assert json.loads((run / "results.json").read_text())["train"]["epochs"] == 3
    # The newest run is the one that began last, and not the last by name.
    newer = Path(answer(project, *words[:1], *words[3:], "--epochs", 1)["run"])
    about = json.loads((run / "run.json").read_text())
    for year, newest in (("2020", newer), ("2099", run)):
        about["created"] = f"{year}-01-01T00:00:00+00:00"
        (run / "run.json").write_text(json.dumps(about))
        assert newest.name in succeeded(project, "evaluate").stdout


def test_a_run_is_compared_with_a_study_and_a_study_with_itself(whole: Path, tmp_path: Path) -> None:
    study = study_of(whole)
    run = study / "trainings" / "fold_1_seed_42"
    found = answer(whole, "compare", run, study, "--csv", tmp_path / "c.csv")
    assert (found["cases"], found["only_in_b"]) == (7, 13)
    probabilities = np.array(results(run)["test"]["prediction_probs"])
    loss = -np.log(probabilities[range(7), results(run)["test"]["true_labels"]]).mean()
    assert found["metrics"]["log_loss"]["a"] == pytest.approx(loss)
    table = pd.read_csv(tmp_path / "c.csv").set_index("metric")
    assert table.loc["log_loss", "difference"] == found["metrics"]["log_loss"]["difference"]["value"]
    same = answer(whole, "compare", study, study, "--ensemble")
    assert {row["difference"]["value"] for row in same["metrics"].values()} == {0.0}
