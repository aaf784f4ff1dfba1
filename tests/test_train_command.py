"""split, train-head and evaluate as typed: what they say, what a run's folder holds, and resuming."""

from __future__ import annotations

import json
import os
import re
import shlex
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
import torch
from sklearn.metrics import roc_auc_score

import heads.cohort
import heads.evaluation.results
import heads.run
from featstore.bags import collate
from featstore.store import Store
from heads.evaluation.checkpoints import load_best
from heads.evaluation.metrics import youden_threshold
from heads.evaluation.predict import predict
from heads.evaluation.runs import RunFolder, read_about, read_config
from heads.models.outputs import effective_attention
from heads.training.loop import Training
from heads.training.optimizer import choose_amp
from tests import helpers
from tests.command_line import answer, featstore, listing, make_project, refused, succeeded

CASES = 15
NAMES = ["benign", "high_grade"]
SETTINGS: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["1"], "high_grade": ["3"]},
    "head": {"embed_dim": 16, "attention_hidden": 8, "hidden_dim": 16, "attention_dim": 8},
    "train": {"epochs": 4, "device": "cpu", "lr": 0.003},
    "runs": {"resamples": 20},
}
PICTURES = ("confusion_matrix", "deviation_plot", "model_loss", "model_accuracy", "learning_rate")
FILES = ("checkpoints/last.pth", "checkpoints/best.safetensors", *(f"{name}.png" for name in PICTURES))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extracted, split, and trained twice as typed; not to be changed."""
    stains = ("h&e", "sox10")
    folder = tmp_path_factory.mktemp("train")
    project = make_project(folder, SETTINGS, cases=CASES, stains=stains, slices=2, patches=3)
    helpers.write_labels(project, {str(i): "1133"[i % 4] for i in range(1, CASES + 1)})
    succeeded(project, "extract")
    assert "5 splits" in succeeded(project, "split", "--folds", "5").stdout
    said = succeeded(project, "train-head", "--suffix", "flat", "--model", "dual_stream").stdout
    for part in ("dual_stream on 9 train, 3 val, 3 test cases", "epoch   4/4", "AUC", "split: "):
        assert part in said
    succeeded(project, "train-head", "--suffix", "tree", "--analyze-attention", "--amp", "off")
    return project


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes far longer than these trainings."""
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, name, lambda *args: [])


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy without runs, to be worked in."""
    return Path(shutil.copytree(trained, tmp_path / "project", ignore=shutil.ignore_patterns("runs")))


def run_of(project: Path, suffix: str) -> Path:
    (path,) = (project / "runs").glob(f"run_*_{suffix}")
    return path


def read(run: Path, name: str = "results.json") -> dict[str, Any]:
    text = (run / name).read_text(encoding="utf-8")
    assert not {"NaN", "Infinity", "-Infinity"} & set(re.split(r"[^\w-]", text))  # strict JSON
    return dict(json.loads(text))


def train(project: Path, *args: object) -> Path:
    return Path(answer(project, "train-head", *args)["run"])


def history(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "history.csv").drop(columns="seconds")


def npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def cross_entropy(test: dict[str, Any], weights: tuple[float, ...] = (1, 1)) -> float:
    labels = np.array(test["true_labels"])
    of_truth = np.array(test["prediction_probs"])[range(len(labels)), labels]
    return float(np.mean(-np.log(of_truth) * np.array(weights)[labels]))


@pytest.mark.parametrize("suffix", ["flat", "tree"])
def test_the_run_folder_holds_what_it_should(trained: Path, suffix: str) -> None:
    run = run_of(trained, suffix)
    results, metrics = read(run), read(run, "metrics.json")
    assert {"train", "test", "test_last", "args"} == set(results)
    assert results["train"]["epochs"] == 4
    losses = history(run)["val_cross_entropy"]
    assert results["train"]["best_val_loss"] == pytest.approx(losses.min(), rel=1e-12)
    assert results["train"]["best_epoch"] == losses.argmin() + 1
    for part in ("test", "test_last"):
        test = results[part]
        truth, probs = np.array(test["true_labels"]), np.array(test["prediction_probs"])
        right = probs.argmax(axis=1) == truth
        assert test["num_samples"] == len(truth) == len(test["case_ids"]) == 3
        assert probs.sum(axis=1) == pytest.approx(1)
        assert test["predictions"] == probs.argmax(axis=1).tolist()
        assert test["test_accuracy"] == right.mean() == metrics[part]["accuracy"]["value"]
        assert metrics[part]["auc"]["value"] == pytest.approx(roc_auc_score(truth, probs[:, 1]))
        for label, name in enumerate(NAMES):
            assert test[f"recall_{name}"] == right[truth == label].mean()
        if suffix == "tree":  # no smoothing, no weights
            assert test["test_loss"] == pytest.approx(cross_entropy(test), rel=1e-5)
    table = pd.read_csv(run / "predictions.csv", dtype={"case_id": str})
    expected = ["case_id", "true_label", "predicted_label", "prob_benign", "prob_high_grade", "correct"]
    assert list(table.columns) == expected
    assert list(table["case_id"]) == results["test"]["case_ids"]
    assert [NAMES.index(name) for name in table["true_label"]] == results["test"]["true_labels"]
    assert [NAMES.index(name) for name in table["predicted_label"]] == results["test"]["predictions"]
    assert table[expected[3:5]].to_numpy() == pytest.approx(np.array(results["test"]["prediction_probs"]))
    assert table["correct"].mean() == results["test"]["test_accuracy"]
    labels = pd.read_csv(trained / "labels.csv", dtype=str).set_index("Case")["Class"]
    assert [{"1": 0, "3": 1}[labels[c]] for c in table["case_id"]] == results["test"]["true_labels"]
    text = (run / "results.txt").read_text()
    for shown in (f"{results['test']['test_loss']:.4f}", "samples: 3", "best.safetensors", "last.pth"):
        assert shown in text
    assert all((run / name).stat().st_size > 0 for name in FILES)
    split = npz(run / "data_splits.npz")
    assert split["test_cases"].dtype == np.int64
    assert split["test_cases"].tolist() == [int(case) for case in results["test"]["case_ids"]]
    config = read_config(RunFolder(run))
    assert results["args"] == json.loads(json.dumps(config.model_dump()))
    assert config.train.batch_size == {"flat": 4, "tree": 1}[suffix]


def test_every_row_of_the_attention_is_of_its_file(trained: Path) -> None:
    run = RunFolder(run_of(trained, "tree"))
    table = pd.read_csv(run.path / "attention_analysis" / "patch_attention.csv", dtype={"case_id": str})
    for row in table.itertuples():
        assert row.path == helpers.patch_name(row.case_id, row.slice_id, row.stain, row.patch)
        assert (trained / "patches" / row.path).is_file()
    levels = table[["patch_attention", "slice_attention", "stain_attention"]].to_numpy()
    assert table["effective_attention"].to_numpy() == pytest.approx(levels.prod(axis=1), rel=1e-4)
    assert table.groupby("case_id")["effective_attention"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    head = load_best(run, read_config(run), read_about(run)).eval()
    found: dict[str, float] = {}
    for case in read(run.path)["test"]["case_ids"]:  # by the bag's own names, not by row numbers
        bag = Store.open(trained / "store").bag(case)
        slices = np.repeat(bag.slices, bag.slice_sizes)
        stains = np.repeat(np.repeat(bag.stains, bag.stain_sizes), bag.slice_sizes)
        names = zip(slices, stains, bag.patches, strict=True)
        weights = effective_attention(head(collate([bag])), collate([bag])).tolist()
        found |= dict(zip((helpers.patch_name(case, *name) for name in names), weights, strict=True))
    assert len(set(found.values())) > 30
    listed = dict(zip(table["path"], table["effective_attention"], strict=True))
    assert listed == pytest.approx(found, rel=1e-4)


def test_the_precision_that_auto_stood_for_is_on_record(trained: Path) -> None:
    auto = read_config(RunFolder(run_of(trained, "flat"))).train.amp
    assert auto == choose_amp("auto", torch.device("cpu")) != "auto"
    assert read_config(RunFolder(run_of(trained, "tree"))).train.amp == "off"


def test_evaluate_gives_the_same_numbers_again(trained: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    for suffix in ("flat", "tree"):
        run = run_of(project, suffix)
        before = listing(run)
        assert answer(project, "evaluate", run.name)["best"]["loss"] == read(run)["test"]["test_loss"]
        after = listing(run)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert changed <= {"results.json"}  # whose `args` may say otherwise what is wanted of runs
        for part in ("train", "test", "test_last"):
            assert read(run)[part] == json.loads(before["results.json"] or b"")[part]
        loss = answer(project, "evaluate", run, "--part", "val")["best"]["loss"]
        assert loss == pytest.approx(read(run)["train"]["best_val_loss"], rel=1e-6)
        assert answer(project, "evaluate", run, "--part", "train")["best"]["n"] == 9
        assert listing(run) == after
    assert Path(answer(project, "evaluate")["run"]) == run_of(project, "tree")
    (run_of(project, "tree") / "results.json").unlink()
    assert Path(answer(project, "evaluate")["run"]) == run_of(project, "flat")
    refused(project, "evaluate", "--part", "tset", says=("'tset'", "test"), to_do=False)


def test_folds_and_files_of_splits(project: Path) -> None:
    for k in (0, 3):
        run = train(project, "--fold", k, "--epochs", 1)
        given, kept = (
            {name: cases.tolist() for name, cases in npz(path).items()}
            for path in (project / "splits" / f"data_splits_{k + 1:02d}.npz", run / "data_splits.npz")
        )
        assert given == kept
    np.savez(project / "my.npz", train_cases=["01", "3"], val_cases=["2", "4"], test_cases=["6", "5", "7"])
    done = succeeded(project, "train-head", "--load_splits", "my.npz", "--epochs", "1", "--suffix", "mine")
    assert "8 cases stand in no part of it" in done.stdout
    assert read(run_of(project, "mine"))["test"]["case_ids"] == ["5", "6", "7"]
    assert npz(run_of(project, "mine") / "data_splits.npz")["train_cases"].tolist() == [1, 3]


def test_the_same_seed_gives_the_same_run(project: Path) -> None:
    flags = ("--model", "dual_stream", "--bag-size", 4, "--train-seed")
    first, second, third = (train(project, *flags, seed) for seed in (1, 1, 2))
    assert read(first) == read(second)
    assert read(first, "metrics.json") == read(second, "metrics.json")
    best = [(run / "checkpoints" / "best.safetensors").read_bytes() for run in (first, second, third)]
    assert best[0] == best[1]
    assert best[0] != best[2]
    pd.testing.assert_frame_equal(history(first), history(second), check_exact=True)


_CHILD = """
import sys, time, pathlib, cli, heads.evaluation.results, heads.run
from heads.training.loop import Training
heads.run.SAVE_SECONDS, epoch = 0.0, Training._epoch
Training._epoch = lambda self: (epoch(self), time.sleep(0.05))
pathlib.Path(sys.argv[1]).touch()
while not pathlib.Path("go").exists(): time.sleep(0.001)
cli.app(sys.argv[2:])
"""


def epochs(run: Path) -> int:
    history = run / "history.csv"
    return history.read_text().count("\n") - 1 if history.exists() else 0


def test_stopped_or_killed_and_resumed_equals_a_run_that_was_not(project: Path) -> None:
    flags = ["--model", "dual_stream", "--bag-size", "4", "--ema-decay", "0.5", "--scheduler", "cosine"]
    flags += ["--epochs", "40", "--patience", "null", "--dropout", "0.3", "--threshold", "validation"]
    start: dict[str, Any] = {"cwd": project, "env": {**os.environ, "PYTHONPATH": str(helpers.ROOT)}}
    start |= {"stdout": subprocess.PIPE, "text": True}
    words = [[sys.executable, "-c", _CHILD, f"ready_{i}", "train-head", *flags] for i in range(2)]
    children = [subprocess.Popen(each, **start) for each in words]
    while len(list(project.glob("ready_*"))) < 2:
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
    (project / "go").touch()
    saved: list[Path] = []
    while len(saved) < 2 or any(epochs(run) < 4 for run in saved):
        assert all(child.poll() is None for child in children)
        time.sleep(0.01)
        saved = sorted(path.parent.parent for path in project.glob("runs/*/checkpoints/best.safetensors"))
    for child, number in zip(children, (signal.SIGTERM, signal.SIGKILL), strict=True):
        child.send_signal(number)
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [128 + signal.SIGTERM, -signal.SIGKILL]
    assert not any((run / "results.json").exists() for run in saved)
    refused(project, "evaluate", says=("no finished run", "2 unfinished", "--resume"))
    (command,) = (line for line in said[0].splitlines() if "train-head --resume" in line)
    stopped = Path(shlex.split(command.partition("featstore ")[2])[-1])
    killed = next(run for run in saved if run.name != stopped.name)
    assert "not finished, and nothing is written" in succeeded(project, "evaluate", stopped).stdout
    assert not (stopped / "results.json").exists()
    succeeded(project, *shlex.split(command.partition("featstore ")[2]))
    assert "going on with" in succeeded(project, "train-head", "--resume", killed.name).stdout
    whole = train(project, *flags)
    for run in (stopped, killed):
        assert read(run) == read(whole)
        pd.testing.assert_frame_equal(history(run), history(whole), check_exact=True)
        best = "checkpoints/best.safetensors"
        assert (run / best).read_bytes() == (whole / best).read_bytes()


def test_a_signal_in_the_last_epoch_leaves_the_evaluation_to_who_goes_on(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = Training._epoch

    def signalled(training: Training) -> None:
        epoch(training)
        if training.progress.epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    words = ("train-head", "--as", "mine", "--epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_epoch", signalled)
        done = featstore(project, *words)
    assert done.exit_code == 128 + signal.SIGTERM
    assert "interrupted after 2 epochs" in done.stdout
    assert not (project / "runs" / "run_mine" / "results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_epoch", lambda training: pytest.fail("trained again"))
        assert answer(project, *words)["epochs"] == 2


def test_the_threshold_comes_from_the_validation_cases(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(heads.evaluation.results, "plot_deviation", lambda *args: drawn.append(args[-1]))
    run = RunFolder(train(project, "--threshold", "validation", "--epochs", 2))
    config, about = read_config(run), read_about(run)
    bags = heads.cohort.load_bags(config, Store.open(project / "store"), about["labels"], print)
    val = [str(case) for case in npz(run.splits)["val_cases"]]
    seen = predict(load_best(run, config, about), bags, val, config.train)
    threshold = youden_threshold(seen.labels, seen.probabilities[:, 1])
    test = read(run.path)["test"]
    assert test["threshold"] == threshold
    assert drawn == [threshold]
    expected = (np.array(test["prediction_probs"])[:, 1] >= threshold).astype(int).tolist()
    assert test["predictions"] == expected
    table = pd.read_csv(run.path / "predictions.csv")
    assert [NAMES.index(name) for name in table["predicted_label"]] == expected


def test_class_weights_by_name_and_in_order(project: Path) -> None:
    weights = ("--use-class-weights", "--class-weights")
    by_name = read(train(project, *weights, "{high_grade: 2.5, benign: 0.5}"))
    in_order = read(train(project, *weights, "[0.5, 2.5]"))
    plain = read(train(project))
    test = by_name["test"]
    assert test == in_order["test"]
    assert test["test_loss"] == pytest.approx(cross_entropy(test, (0.5, 2.5)), rel=1e-5)
    assert test["prediction_probs"] != plain["test"]["prediction_probs"]


def test_json_is_all_of_the_answer_and_remarks_go_elsewhere(project: Path) -> None:
    done = succeeded(project, "train-head", "--json", "--temperature-start", "5", "--model", "hierarchical")
    found = json.loads(done.stdout)
    assert read(Path(found["run"]))["train"]["best_val_loss"] == found["best_val_loss"]
    assert (found["interrupted"], found["part"], found["epochs"]) == (None, "test", 4)
    assert "warning: head.temperature_start is set, but the head hierarchical does not" in done.stderr


def test_sub_cases_act_in_training_alone(project: Path) -> None:
    sub, plain = train(project, "--set", "train.sub_cases={n: 2, by: slice}"), train(project)
    assert history(sub)["train_loss"].tolist() != history(plain)["train_loss"].tolist()
    assert read(sub)["test"]["case_ids"] == read(plain)["test"]["case_ids"]


def test_curves_are_drawn_while_it_trains(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, set[str]]] = []
    draw = heads.run.plot_history

    def watch(table: pd.DataFrame, folder: Path) -> None:
        draw(table, folder)
        drawn.append((len(table), set(os.listdir(folder))))

    monkeypatch.setattr(heads.run, "plot_history", watch)
    train(project, "--plot-every", 2, "--epochs", 3)
    ((epochs, files),) = drawn
    assert (epochs, "model_loss.png" in files, "results.json" in files) == (2, True, False)


def test_best_weights_of_another_epoch_are_not_evaluated_and_resuming_mends_them(
    trained: Path, tmp_path: Path
) -> None:
    """As a training leaves them that is killed between its two checkpoints."""
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    run, other = RunFolder(run_of(project, "tree")), RunFolder(train(project, "--train-seed", 7))
    results, whole = read(run.path), run.best.read_bytes()
    shutil.copy(other.best, run.best)
    said = succeeded(project, "evaluate", run.path).stdout
    assert "best.safetensors is of another epoch than last.pth says" in said
    assert {k: v for k, v in read(run.path).items() if k != "args"} == {
        k: v for k, v in results.items() if k != "args"
    }
    succeeded(project, "train-head", "--resume", run.path)
    assert run.best.read_bytes() == whole
    assert "of another epoch" not in succeeded(project, "evaluate", run.path).stdout


def test_evaluating_again_replaces_every_file_and_writes_into_none(trained: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    run, kept = run_of(project, "tree"), tmp_path / "kept"
    shutil.copytree(run, kept, copy_function=os.link)
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.is_file()}
    succeeded(project, "evaluate", run)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    replaced = {path.name for path in before if not path.samefile(run / path.relative_to(kept))}
    tables = {"predictions.csv", "patch_attention.csv"}
    assert replaced == {*tables, "results.json", "results.txt", "metrics.json"}


def test_settings_of_results_that_a_resumed_run_does_not_use_are_told(project: Path) -> None:
    run = train(project, "--suffix", "one")
    flags = ("--calibration", "temperature", "--threshold", "validation", "--analyze-attention")
    said = succeeded(project, "train-head", "--resume", run, *flags, "--suffix", "two").stdout
    (line,) = (line for line in said.splitlines() if "given now, and not used" in line)
    assert set(re.findall(r"\w+\.\w+", line)) == {
        "runs.calibration",
        "runs.threshold",
        "runs.analyze_attention",
    }
    assert "not used" not in succeeded(project, "train-head", "--resume", run, "--suffix", "two").stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), None),
        (("--calibration", "temperature"), "the calibration is fitted to the validation cases"),
        (("--threshold", "validation"), "the threshold is fitted"),
        (("--calibration", "temperature", "--threshold", "validation"), "threshold and calibration are"),
    ],
)
def test_fitting_and_judging_on_the_same_cases_is_told(
    trained: Path, flags: tuple[str, ...], says: str | None
) -> None:
    """No file is written: none ever is of other cases than the test cases."""
    words = ("evaluate", run_of(trained, "tree"), *flags, "--part")
    said = {part: succeeded(trained, *words, part).stdout for part in ("val", "train")}
    assert "on the same cases" not in said["train"]
    assert ("on the same cases" in said["val"]) == (says is not None)
    assert (says or "") in said["val"]
