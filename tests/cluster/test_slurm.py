"""What is submitted, on a real SLURM of two nodes; skips where there is none and none can be installed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.extraction.share_table import read_pages, table_folder
from featstore.store import Store
from tests import helpers
from tests.cluster.real_slurm import ENDED, Slurm, running
from tests.command_line import answer, featstore, make_project, succeeded, write_config
from tests.heads.planted import SMALL, make_planted_project

# Longer than all deadlines below together: what there is to see is told by them, not by a timeout.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
JOBS = {"cpus": 1, "memory": "1G", "signal_seconds": 20}
EXTRACTION: dict[str, Any] = {
    # 17 ms a patch on one core: long enough to be killed in the middle.
    "backbone": {"resize": 448},
    "extract": {"runtime": "torch", "workers": 1},
    "slurm": {**JOBS, "shards": 4},
}
TRAINING: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["0"], "malignant": ["1"]},
    "head": {**SMALL, "name": "abmil", "dropout": 0.2},
    "train": {"device": "cpu", "lr": 0.003, "epochs": 2, "amp": "off", "patience": None},
    "runs": {"resamples": 20},
    "slurm": JOBS,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with running() as made:
        yield made


@pytest.fixture
def slurm(cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """The cluster, for commands called in this process too."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    return cluster


def submitted(project: Path, *words: object) -> dict[str, str]:
    """Submit steps as typed; the numbers of their jobs."""
    return {job["step"]: job["job"] for job in answer(project, "submit", *words)["jobs"]}


def until(
    slurm: Slurm, project: Path, happened: Callable[[], object], what: str, seconds: float = 240
) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what}: not after {seconds:.0f} s\n{slurm.seen(project / 'logs')}"
        time.sleep(0.1)


def log(project: Path, name: str) -> str:
    file = project / "logs" / f"{name}.log"
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def done_of(project: Path, share: int) -> tuple[int, int]:
    """Slices of a share of four that are in the store, and all of them."""
    homes, _ = read_pages(table_folder(project / "reports" / "extract", 4), 4)
    mine = {key for key, home in homes.items() if home.share == share}
    try:
        store = Store.open(project / "store")
    except Exception:  # another task is about to make it
        return 0, len(mine)
    there = {(row.case_id, row.stain, row.slice_id) for row in store.table().itertuples()}
    return len(there & mine), len(mine)


def cut_short(slurm: Slurm, project: Path, slices: int) -> str | None:
    """The number of an array of extraction whose task 2 was cancelled in the middle.

    None where this machine was too slow in cancelling it: the task had done all of its work by then.
    """
    make_project(project, EXTRACTION, cases=8, stains=("h&e", "sox10"), slices=slices, patches=16)
    array = submitted(project, "extract")["extract"]
    until(slurm, project, lambda: done_of(project, 2)[0] > 0, "task 2 has committed something")
    slurm.run("scancel", f"{array}_2")
    until(slurm, project, lambda: slurm.states(f"{array}_2")[0] in ENDED, "task 2 has ended")
    done, all_ = done_of(project, 2)
    if done == all_:
        slurm.run("scancel", array)
        return None
    assert slurm.states(f"{array}_2") == ["CANCELLED"], slurm.seen(project / "logs")
    assert "told to stop: saving" in log(project, f"extract-{array}_2"), slurm.seen(project / "logs")
    assert 0 < done < all_
    return array


def test_an_array_of_extraction_one_task_killed_and_requeued_equals_a_single_run(
    slurm: Slurm, tmp_path: Path
) -> None:
    odd = tmp_path / "the lab's $(project)"
    for slices in (3, 6):  # where the first one was done too soon, more work
        project = odd / str(slices)
        project.mkdir(parents=True)
        if array := cut_short(slurm, project, slices):
            break
    else:
        pytest.fail("the task was never killed in the middle\n" + slurm.seen(project / "logs"))
    slurm.run("scontrol", "requeue", f"{array}_2")
    single = tmp_path / "single"
    single.mkdir()
    shutil.copytree(project / "patches", single / "patches")
    write_config(single, EXTRACTION)
    succeeded(single, "extract")
    slurm.wait([array], logs=project / "logs")
    assert "restart 1" in log(project, f"extract-{array}_2")
    ours, theirs = Store.open(project / "store"), Store.open(single / "store")
    assert ours.spec == theirs.spec
    assert ours.cases() == theirs.cases()
    pd.testing.assert_frame_equal(ours.table(), theirs.table())
    for case in ours.cases():
        np.testing.assert_array_equal(ours.bag(case).features, theirs.bag(case).features)
    assert answer(project, "verify")["damage"] == []


def planted(folder: Path, *settings: dict[str, Any]) -> Path:
    folder.mkdir()
    return make_planted_project(folder, TRAINING, *settings)


def same_training(a: Path, b: Path) -> None:
    """Equal to the last bit."""
    for name in ("predictions.csv", "checkpoints/best.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = (json.loads((run / "results.json").read_text()) for run in (a, b))
    assert first["test"] == second["test"]
    assert first["train"] == second["train"]


@pytest.mark.slow
def test_fifty_trainings_two_lost_and_one_damaged_are_named_submitted_again_and_complete(
    slurm: Slurm, tmp_path: Path
) -> None:
    project = planted(tmp_path / "array", {"slurm": {"trainings_per_task": 10}})
    jobs = submitted(project, "study", "collect", "--folds", 5, "--seeds", 10, "--as", "lab")
    slurm.wait(list(jobs.values()), seconds=900, logs=project / "logs")
    study = project / "runs" / "study_lab"
    assert "50 of 50 trainings finished" in log(project, f"collect-{jobs['collect']}")
    single = planted(tmp_path / "single")
    succeeded(single, "train-head", "--folds", 5, "--seeds", 10, "--as", "lab")
    other = single / "runs" / "study_lab"
    trainings = sorted(path.name for path in (study / "trainings").iterdir())
    assert len(trainings) == 50
    for name in trainings:
        same_training(study / "trainings" / name, other / "trainings" / name)
    tables = [path.name for path in study.glob("*.csv")]
    assert tables
    for name in tables:
        first, second = (pd.read_csv(each / name) for each in (study, other))
        differ = ["seconds"] if "seconds" in first else []
        pd.testing.assert_frame_equal(first.drop(columns=differ), second.drop(columns=differ))

    shutil.rmtree(study / "trainings" / "fold_1_seed_43")
    shutil.rmtree(study / "trainings" / "fold_4_seed_51")
    results = study / "trainings" / "fold_0_seed_45" / "results.json"
    results.write_bytes(results.read_bytes()[:-100])
    collected = featstore(project, "evaluate", "--study", "study_lab")
    assert collected.exit_code == 1
    for name in ("fold 1 seed 43", "fold 4 seed 51", "fold 0 seed 45"):
        assert name in collected.output
    said = featstore(project, "submit", "study", "collect", "--resume", "study_lab", "--set",
                     "slurm.trainings_per_task=1")  # fmt: skip
    assert said.exit_code == 0, said.output
    for line in ("fold 1 seed 43: missing", "fold 0 seed 45: damaged", "fold 4 seed 51: missing"):
        assert line in said.stdout
    assert "tasks 6,15,49" in said.stdout
    again = [line.split()[2].strip(",") for line in said.stdout.splitlines() if " job " in line]
    slurm.wait(again, seconds=600, logs=project / "logs")
    assert "50 of 50 trainings finished" in log(project, f"collect-{again[1]}")
    for name in trainings:
        same_training(study / "trainings" / name, other / "trainings" / name)
    nothing = featstore(project, "submit", "study", "--resume", "study_lab")
    assert "nothing to submit" in nothing.stdout


@pytest.mark.slow
def test_a_time_limit_shorter_than_the_work_saves_requeues_and_finishes(
    slurm: Slurm, tmp_path: Path
) -> None:
    long = {"train": {"epochs": 1500}}
    project = planted(tmp_path / "limited", long, {"slurm": {"time": "1"}})
    jobs = submitted(project, "study", "--as", "long")
    slurm.wait(list(jobs.values()), seconds=900, logs=project / "logs")
    (file,) = (project / "logs").glob("study-*.log")
    said = file.read_text()
    assert "the time is nearly up: saving" in said
    assert "interrupted after" in said
    assert "restart 1" in said
    whole = planted(tmp_path / "whole", long)
    succeeded(whole, "train-head", "--seeds", 1, "--as", "long")
    name = "runs/study_long/trainings/fold_0_seed_42"
    same_training(project / name, whole / name)


# In place of featstore: `check` stops when it is told to; anything else does not, but ends once restarted.
HARD_OF_HEARING = """
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then echo "went on"; exit 0; fi
if [ "$1" = check ]; then trap 'exit 143' TERM; else trap '' TERM; fi
while :; do sleep 0.5; done
"""


@pytest.mark.slow
def test_when_the_time_is_up_a_job_that_goes_on_is_put_back_though_it_never_stopped_and_another_told(
    slurm: Slurm, tmp_path: Path
) -> None:
    (tmp_path / "deaf.sh").write_text(HARD_OF_HEARING)
    command = {"command": f"bash {tmp_path / 'deaf.sh'}", "time": "1"}
    project = planted(tmp_path / "deaf", {"slurm": command})
    (check,) = submitted(project, "check").values()
    (vae,) = submitted(project, "vae").values()
    slurm.wait([vae], logs=project / "logs")
    said = log(project, f"vae-{vae}")
    for part in ("not stopped in time (what was saved last counts), and back", "restart 1", "went on"):
        assert part in said
    until(slurm, project, lambda: slurm.states(check)[0] in ENDED, "the check has ended")
    assert slurm.states(check) == ["TIMEOUT"]
    assert "the time was too short, and check would begin anew" in log(project, f"check-{check}")


@pytest.mark.slow
def test_a_preempted_task_saves_and_is_put_back_by_slurm(slurm: Slurm, tmp_path: Path) -> None:
    long = {"train": {"epochs": 1000}}
    project = planted(tmp_path / "preempted", long)
    array = submitted(project, "study", "--as", "long")["study"]
    name = "runs/study_long/trainings/fold_0_seed_42"
    until(slurm, project, (project / name / "checkpoints" / "last.pth").exists, "the training is under way")
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    urgent = slurm.run("sbatch", "--parsable", *words)
    slurm.wait([urgent], logs=project / "logs")
    slurm.wait([array], logs=project / "logs")
    said = log(project, f"study-{array}_0")
    assert "told to stop: saving" in said
    assert "interrupted after" in said
    assert "back in the queue" not in said  # not by itself
    assert "restart 1" in said
    whole = planted(tmp_path / "whole", long)
    succeeded(whole, "train-head", "--seeds", 1, "--as", "long")
    same_training(project / name, whole / name)


@pytest.mark.slow
def test_fine_tuning_over_two_nodes_has_the_losses_of_one_process(slurm: Slurm, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "labels": {"file": "labels.csv"},
        "classes": {"benign": ["1"], "high_grade": ["3"]},
        "head": {"embed_dim": 16, "attention_hidden": 8, "name": "abmil", "dropout": 0.0},
        "train": {"epochs": 2, "device": "cpu", "amp": "off"},
        "finetune": {
            "epochs": 2, "device": "cpu", "amp": "off", "augment": False, "patches_per_case": None,
            "unfreeze": "last:1", "backbone_lr": 1e-3, "batch_size": 1, "patience": None, "workers": 1,
        },
        "runs": {"resamples": 20},
        "extract": {"runtime": "torch"},
        "slurm": {**JOBS, "nodes": 2},
    }  # fmt: skip
    project = make_project(tmp_path, settings, cases=20, stains=("h&e",), slices=1, patches=4)
    helpers.write_labels(project, {str(i): "1133"[i % 4] for i in range(1, 21)})
    succeeded(project, "extract")
    succeeded(project, "train-head", "--as", "first")
    job = submitted(project, "finetune", "--as", "two", "--run", "run_first")["finetune"]
    slurm.wait([job], seconds=400, logs=project / "logs")
    succeeded(project, "finetune", "run_first", "--as", "one", "--finetune-batch-size", 2)
    two, one = (pd.read_csv(project / "runs" / f"finetune_{name}" / "steps.csv") for name in ("two", "one"))
    assert len(two) == len(one) >= 10
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
    assert "2 processes" in log(project, f"finetune-{job}")
