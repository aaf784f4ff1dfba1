"""How a study becomes an array: its folds and seeds, how many trainings a task, which are still to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import ConfigError
from tests.cluster.machine import Machine, make_machine
from tests.cluster.test_submit import submit, words_of
from tests.command_line import answer, featstore, listing, succeeded
from tests.heads.planted import SMALL, make_planted_project
from tests.test_study_command import without_pictures

SETTINGS: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["0"], "malignant": ["1"]},
    "head": {**SMALL, "name": "abmil"},
    "train": {"device": "cpu", "epochs": 2, "processes": 1},
    "runs": {"resamples": 20},
    "slurm": {"trainings_per_task": 1, "command": "featstore"},
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = make_machine(tmp_path / "machine")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", made.environment["PATH"])
    return made


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "my project"
    folder.mkdir()
    return folder


def splits(project: Path, *numbers: int) -> None:
    (project / "splits").mkdir()
    for number in numbers:
        (project / "splits" / f"data_splits_{number:02d}.npz").touch()


@pytest.mark.parametrize(
    ("files", "config", "options", "words", "array"),
    [
        ((), {}, {}, ["--seeds", "1", "--task", "auto/1"], "0-0"),
        ((), {"split": {"folds": 4}}, {"seeds": 5},
         ["--folds", "4", "--seeds", "5", "--task", "auto/4"], "0-3"),
        ((1, 2, 3), {}, {"seeds": 2}, ["--folds", "3", "--seeds", "2", "--task", "auto/2"], "0-1"),
        ((), {"slurm": {"trainings_per_task": 1}}, {"folds": 5, "seeds": 10},
         ["--folds", "5", "--seeds", "10", "--task", "auto/50"], "0-49"),
        ((), {"slurm": {"trainings_per_task": 4, "at_once": 3}}, {"folds": 5, "seeds": 10},
         ["--folds", "5", "--seeds", "10", "--task", "auto/13"], "0-12%3"),
        ((), {"slurm": {"trainings_per_task": 1000}}, {"folds": 5},
         ["--folds", "5", "--seeds", "1", "--task", "auto/1"], "0-0"),
    ],
)  # fmt: skip
def test_the_size_of_a_study(
    machine: Machine, project: Path, files: tuple[int, ...], config: dict[str, Any],
    options: dict[str, Any], words: list[str], array: str,
) -> None:  # fmt: skip
    if files:
        splits(project, *files)
    given = {**config, "slurm": {"command": "featstore", **config.get("slurm", {})}}
    done = submit(project, "study", config=given, **options)
    assert done.jobs[0].tasks == array
    assert words_of(machine, done, "study")[8:] == words


def test_other_folds_than_there_are_splits_are_refused(machine: Machine, project: Path) -> None:
    splits(project, 1, 2, 3)
    with pytest.raises(ConfigError, match="holds 3 splits"):
        submit(project, "study", folds=5)


@pytest.mark.parametrize(
    ("train", "files", "says"),
    [
        ({"fold": 0}, (), "train.fold is 0, but a study trains every fold"),
        ({"load_splits": "nowhere"}, (), "there are no splits in"),
        ({"load_splits": "splits"}, ("data_splits_1", "data_splits_01"), "are both split number 1"),
        ({}, ("data_splits_1", "data_splits_01"), "are both split number 1"),
        ({}, ("data_splits_0",), "has no number from 1 on"),
    ],
)  # fmt: skip
def test_splits_that_no_task_could_use_are_refused(
    machine: Machine, project: Path, train: dict[str, Any], files: tuple[str, ...], says: str
) -> None:
    (project / "splits").mkdir()
    for name in files:
        (project / "splits" / f"{name}.npz").touch()
    before = listing(project)
    with pytest.raises(ConfigError, match=says):
        submit(project, "study", config={"train": train})
    assert listing(project) == before


def test_with_a_store_the_tasks_are_cut_by_how_long_a_training_takes(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "planted"
    project.mkdir()
    make_planted_project(project, SETTINGS)
    told: list[str] = []
    done = submit(project, "study", seeds=1000, tell=told.append)
    assert done.jobs[0].tasks == "0-6"  # 4 s at least, so 150 a task
    assert "at about 4 s a training" in told[0]
    # As if a core did 2,000 numbers a second: twice the epochs, twice the tasks.
    monkeypatch.setattr("heads.cluster.study_size._NUMBERS_PER_CORE_SECOND", 2e3)
    counts = []
    for epochs in (30, 60):
        config = {"train": {"epochs": epochs}, "slurm": {"cpus": 1}}
        done = submit(project, "study", seeds=1000, tell=told.append, config=config)
        counts.append(int((done.jobs[0].tasks or "").partition("-")[2]) + 1)
    assert counts[0] > 7
    assert counts[1] == pytest.approx(2 * counts[0], rel=0.05)


def test_only_tasks_with_something_to_do_are_submitted_again(
    machine: Machine, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    make_planted_project(project, SETTINGS)
    succeeded(project, "train-head", "--folds", 3, "--seeds", 2, "--as", "lab")
    study = project / "runs" / "study_lab"
    before = {run.name: (run / "predictions.csv").read_bytes() for run in (study / "trainings").iterdir()}
    shutil.rmtree(study / "trainings" / "fold_2_seed_42")
    damaged = study / "trainings" / "fold_1_seed_43" / "results.json"
    damaged.write_bytes(damaged.read_bytes()[:-100])

    told = featstore(project, "submit", "study", "collect", "--resume", "study_lab")
    assert told.exit_code == 0, told.output
    for line in (
        "fold 2 seed 42: missing",
        "fold 1 seed 43: damaged",
        "2 of 6 trainings to do",
        "tasks 2,4",
    ):
        assert line in told.stdout
    by_name = answer(project, "submit", "study", "--as", "lab")["jobs"]
    assert by_name[0]["tasks"] == "2,4"
    words = words_of(machine, submit(project, "study", resume=Path("study_lab"), config=SETTINGS), "study")
    assert words[6:] == ["--resume", str(study), "--task", "auto/6"]
    assert "begun with 2" in featstore(project, "submit", "study", "--as", "lab", "--seeds", 3).stderr

    for task in ("2", "4"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        succeeded(project, "train-head", *words[6:])
    assert {r.name: (r / "predictions.csv").read_bytes() for r in (study / "trainings").iterdir()} == before
    machine.forget()
    for flags in (("--resume", "study_lab"), ("--as", "lab"), ("--as", "study_lab")):
        nothing = featstore(project, "submit", "study", *flags)
        assert nothing.exit_code == 0
        assert "nothing to submit: all trainings" in nothing.stdout
        assert answer(project, "submit", "study", *flags)["jobs"] == []
    assert machine.calls("sbatch") == []
    # What else is asked for is submitted, and waits for what there is of it.
    steps = ("extract", "tune", "study", "collect", "finetune")
    for flags in (("--resume", "study_lab"), ("--as", "study_lab")):
        machine.forget()
        rest = featstore(project, "submit", *steps, *flags)
        assert rest.exit_code == 0, rest.output
        assert "study: nothing to submit: all trainings" in rest.stdout
        called = [(Path(call[-1]).stem, [w for w in call if "dependency" in w]) for call in
                  machine.calls("sbatch")]  # fmt: skip
        assert called == [
            ("extract", []),
            ("tune", ["--dependency=afterok:101"]),
            ("collect", ["--dependency=afterok:101"]),
            ("finetune", ["--dependency=afterok:103"]),
        ]
        assert f"finetune: from {study / 'trainings' / 'fold_0_seed_42'}" in rest.stdout
