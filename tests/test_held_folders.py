"""Studies that fail in the middle, and folders that two trainings want at once."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import Result

from featstore.cohort.splits import read_split
from heads.evaluation.runs import RunError, RunFolder, held
from heads.training.loop import Training
from tests import helpers
from tests.command_line import answer, featstore, refused, succeeded
from tests.heads.planted import CASES, make_planted_project
from tests.test_study_command import SETTINGS, study_of, without_pictures

TRAINING_HERE = ("another process is training here", "one at a time", "does not stay")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted_project(tmp_path_factory.mktemp("held"), SETTINGS)


@pytest.fixture
def project(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to train in."""
    without_pictures(monkeypatch)
    return Path(shutil.copytree(cohort, tmp_path / "project"))


_FRAGILE = """
import torch
from featstore.config import Section
from heads.models.head import Head, register_head
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_sum

class Nothing(Section):
    pass

@register_head("fragile", Nothing)
class Fragile(Head):
    def __init__(self, dim, classes, config):
        super().__init__(dim)
        self.classifier = torch.nn.Linear(dim, classes)
        self.met = 0

    def forward(self, batch, **schedule):
        self.met += self.training and "{case}" in batch.case_ids
        if self.met == 2:
            raise RuntimeError("this head does not like case {case}")
        total = segment_sum(batch.features.float(), batch.case_patch_offsets)
        return HeadOutput(self.classifier(total / 100))
"""


def test_a_head_that_fails_in_one_fold_is_named_and_the_others_go_on(project: Path) -> None:
    (project / "mine.py").write_text(_FRAGILE.format(case="none"))
    flags = ("--plugin", "mine.py", "--model", "fragile", "--folds", 3)
    first = Path(answer(project, "train-head", *flags, "--suffix", "first")["study"])
    split = read_split(first / "splits" / "data_splits_02.npz", CASES, {})[0]
    (project / "mine.py").write_text(_FRAGILE.format(case=split.train[0]))
    done = featstore(project, "train-head", *flags, "--suffix", "second")
    assert done.exit_code == 1
    said = f"RuntimeError: this head does not like case {split.train[0]}"
    assert f"fold 1 seed 42: failed: {said}" in done.stdout
    (study,) = (project / "runs").glob("study_*_second")
    table = pd.read_csv(study / "study.csv").set_index("fold")
    assert table["status"].to_dict() == {0: "finished", 1: "failed", 2: "finished"}
    assert table.loc[1, "error"] == said
    assert len(pd.read_csv(study / "trainings" / "fold_1_seed_42" / "history.csv")) == 1
    cases = pd.read_csv(study / "out_of_fold.csv", dtype={"case_id": str})
    assert set(cases["fold"]) == {0, 2}
    assert not set(cases["case_id"]) & set(split.test)
    (project / "mine.py").write_text(_FRAGILE.format(case="none"))
    assert "1 of 3 trainings to do" in succeeded(project, "train-head", "--resume", study).stdout
    for name in ("out_of_fold", "per_case", "ensemble", "pooled"):
        whole, mended = (pd.read_csv(each / f"{name}.csv") for each in (first, study))
        pd.testing.assert_frame_equal(whole, mended, check_exact=True)


def second(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """While anything trains, somebody else wants to go on with the same folder: how that ends."""
    epoch, found = Training._epoch, list[Result]()
    trying: list[bool] = []

    def tried(training: Training) -> None:
        if not trying:
            trying.append(True)
            (folder,) = (project / "runs").iterdir()
            found.append(featstore(project, "train-head", "--resume", folder))
            trying.clear()
        epoch(training)

    monkeypatch.setattr(Training, "_epoch", tried)
    return found


def are_refused(found: list[Result]) -> None:
    assert found
    for result in found:
        assert result.exit_code == 2
        assert all(part in result.stderr for part in TRAINING_HERE)


@pytest.mark.parametrize("flags", [("--seeds", 1), ()], ids=["study", "run"])
def test_who_comes_second_is_refused_while_the_first_trains_and_when_it_goes_on(
    project: Path, flags: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        found = second(project, patch)
        stopped = [False, False, True]  # looked at before every epoch
        ended = "heads.training.course.is_finished"
        patch.setattr(ended, lambda *args: stopped.pop(0) if stopped else True)
        featstore(project, "train-head", *flags, "--epochs", 3)
        are_refused(found)
    (folder,) = (project / "runs").iterdir()
    if flags:
        shutil.rmtree(folder / "trainings" / "fold_0_seed_42")
    else:
        (folder / "results.json").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        found = second(project, patch)
        succeeded(project, "train-head", "--resume", folder)
        are_refused(found)
    succeeded(project, "train-head", "--resume", folder)  # nobody holds it now


def test_a_training_of_a_study_cannot_be_resumed_beside_the_study(project: Path) -> None:
    succeeded(project, "train-head", "--seeds", 1, "--epochs", 1)
    study = study_of(project)
    training = study / "trainings" / "fold_0_seed_42"
    assert RunFolder(training).locked == study
    with held(study):
        for folder in (study, training):
            refused(project, "train-head", "--resume", folder, says=(*TRAINING_HERE, str(study)))
    succeeded(project, "train-head", "--resume", training)


_HOLD = (
    "import sys, pathlib; from heads.evaluation.runs import held\nwith held(pathlib.Path(sys.argv[1])):\n"
)


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    words = [sys.executable, "-c", f"{_HOLD}    print('held', flush=True); sys.stdin.read()", str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(helpers.ROOT)}, stdin=pipe, stdout=pipe
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is training here") as error, held(tmp_path):
            pass
        assert error.value.where == str(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
        with held(tmp_path):
            pass


_SLEEPS = """
import os, pathlib, time
from heads.training.losses import register_loss

@register_loss("sleeps")
def sleeps(logits, labels, smoothing):
    pathlib.Path(f"at_{os.getpid()}").touch()
    time.sleep(600)
"""


def is_running(number: int) -> bool:
    """Not only a zombie that nobody has waited for."""
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


@pytest.mark.slow
def test_the_processes_of_a_killed_study_do_not_train_on(project: Path) -> None:
    """In the middle of an epoch: whoever resumes the study is alone."""
    (project / "sleeps.py").write_text(_SLEEPS)
    words = [sys.executable, "-m", "cli", "train-head", "--seeds", "2", "--folds", "3", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(
        [*words, "--plugin", "sleeps.py", "--loss", "sleeps"], cwd=project, env=environment, **silent
    )
    try:
        while len(list(project.glob("at_*"))) < 2:
            assert child.poll() is None
            time.sleep(0.02)
        workers = [int(path.name.removeprefix("at_")) for path in project.glob("at_*")]
        assert all(map(is_running, workers))
        refused(project, "train-head", "--resume", study_of(project), says=TRAINING_HERE)
    finally:
        child.kill()
        child.wait()
    left = 500
    while any(map(is_running, workers)) and left:
        time.sleep(0.02)
        left -= 1
    assert left, "the processes train on without the study"
    with held(study_of(project)):
        pass


def test_whoever_fails_inside_lets_go_and_a_second_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(KeyError), held(tmp_path), held(tmp_path / "other"):
        raise KeyError
    with held(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_hindrance(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    with held(tmp_path):
        pass
