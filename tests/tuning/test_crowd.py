"""Eight workers on one journal, one of them killed in the middle of its first trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from tests import helpers
from tests.tuning.projects import make_project

TRIALS, WORKERS = 32, 8


def test_eight_workers_and_a_killed_one_do_every_trial_once(tmp_path: Path) -> None:
    folder = make_project(
        tmp_path / "project",
        head={"name": "mean"},
        train={"epochs": 3},
        tune={
            "trials": TRIALS,
            "startup_trials": 8,
            "warmup_epochs": 1,
            "space": {"train.lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        },
    )
    command = [sys.executable, "-W", "error", "-m", "tests.tuning.projects"]
    done = subprocess.run(
        [*command, str(folder), "crowd", str(WORKERS), "killed"],
        cwd=helpers.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path = folder / "runs" / "tune_crowd"
    trials = pd.read_csv(path / "trials.csv")
    assert list(trials["number"]) == list(range(TRIALS))  # none lost, none twice
    assert set(trials["state"]) <= {"finished", "pruned"}
    assert trials["value"].notna().all()
    assert trials["train.lr"].nunique() == TRIALS
    assert list(trials["adopted"]) == [1] + [0] * (TRIALS - 1)  # the killed one's, the first of all

    said = [json.loads(file.read_text())[0] for file in sorted(folder.glob("worker_*.json"))]
    assert len(said) == WORKERS - 1
    assert sum("was left by another worker" in line for lines in said for line in lines) == 1
    worked = [sum("] trial" in line for line in lines) for lines in said]
    assert sum(count > 0 for count in worked) > 1  # how large a share is, is the scheduler's
    assert sum(worked) == TRIALS
    assert not any("begins anew" in line for lines in said for line in lines)
    assert sum("the winner" in line for lines in said for line in lines) == 1
    # Its losses are on record whole: every trial ended has a value for each of its folds and epochs.
    assert (trials["inner_epochs"] > 0).all()
    assert json.loads((path / "tuning.json").read_text())["finished"] is True
    begun = [path.name for path in (folder / "runs").iterdir() if "crowd" in path.name]
    assert begun == ["tune_crowd"]  # what the slower ones had begun aside is gone
