"""Small tunings: a planted project, settings that take moments, and workers as processes of their own."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from featstore.settings import Layers
from featstore.strict_yaml import read_file
from heads.config import Config
from heads.tuning.project import tune_project
from heads.tuning.report import TuneReport
from heads.tuning.trial import Trainings
from heads.tuning.workers import Worker
from tests.heads.planted import make_planted_project

SETTINGS: dict[str, dict[str, Any]] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["0"], "malignant": ["1"]},
    "head": {"embed_dim": 8, "attention_hidden": 6, "name": "abmil", "dropout": 0.2},
    "train": {"device": "cpu", "amp": "off", "epochs": 6, "patience": 2, "load_splits": "split.npz"},
    "runs": {"resamples": 20},
    "tune": {"trials": 7, "startup_trials": 3, "warmup_epochs": 2, "inner_folds": 2},
}


def make_project(folder: Path, **sections: Mapping[str, Any]) -> Path:
    """A planted project; ``sections`` are laid over `SETTINGS`."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {name: {**own, **sections.get(name, {})} for name, own in SETTINGS.items()}
    return make_planted_project(
        folder, merged, {k: dict(v) for k, v in sections.items() if k not in merged}
    )


def config_of(folder: Path, **sections: Mapping[str, Any]) -> Config:
    """The settings of a project, with others over them, as given by flags."""
    layers = Layers()
    layers.add(Config, read_file(folder / "featstore.yaml"), "featstore.yaml")
    layers.add(Config, sections, "flags")
    return layers.build(Config)


def tune(
    folder: Path,
    name: str = "a",
    tell: Callable[[str], None] = lambda text: None,
    **sections: Mapping[str, Any],
) -> TuneReport:
    """What `featstore tune --as NAME` does."""
    return tune_project(config_of(folder, **sections), folder, name, tell)


def without_pictures(put: Callable[[str, Any], object]) -> None:
    """Leave out what takes most of the time; ``put`` sets an attribute by its dotted name."""
    for name in ("results.plot_history", "results.plot_confusion", "results.plot_deviation"):
        put(f"heads.evaluation.{name}", lambda *args: [])
    put("heads.tuning.report.plot_trials", lambda *args: [])


def setattr_of(name: str, value: Any) -> None:
    """Set an attribute by its dotted name."""
    module, _, attribute = name.rpartition(".")
    setattr(importlib.import_module(module), attribute, value)


def trials_of(folder: Path, name: str = "a") -> pd.DataFrame:
    """All that does not depend on the clock or on how often a trial was gone on with."""
    frame = pd.read_csv(folder / "runs" / f"tune_{name}" / "trials.csv")
    return frame.drop(columns=["seconds", "adopted"])


def adopted(folder: Path, name: str = "a") -> int:
    return int((pd.read_csv(folder / "runs" / f"tune_{name}" / "trials.csv")["adopted"] > 0).sum())


def crowd(folder: Path, name: str, count: int, killed: bool) -> None:
    """Tune in ``count`` forked processes; the first is killed in its first trial, if so wanted."""
    without_pictures(setattr_of)
    tune(folder, "warm", tune={"trials": 4, "startup_trials": 2})  # what is loaded is loaded once
    # Its threads have ended their work, and no process uses any after the fork.
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    pids = []
    for index in range(count):
        if pid := os.fork():
            pids.append(pid)
            continue
        dies = killed and index == 0
        begun = [folder / f"begun_{each}" for each in range(count)]
        _wait_before_work(begun[index], begun if dies or not killed else [*begun, folder / "dying"])
        if dies:
            _die_in_first_trial(folder / "dying")
        said: list[str] = []
        report = tune(folder, name, said.append)
        (folder / f"worker_{index}.json").write_text(json.dumps([said, report.to_text()]))
        os._exit(report.exit_code)
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    expected = [signal.SIGKILL if killed and index == 0 else 0 for index in range(count)]
    assert ends == expected, (ends, expected)


def _wait_before_work(mine: Path, others: Sequence[Path]) -> None:
    """Let no worker take a trial before there are all of ``others``, however slowly they come."""
    work = Worker.work

    def waiting(self: Worker) -> None:
        mine.touch()
        for _ in range(10_000):  # at least 100 seconds: that one of them has failed is told as well
            if all(each.exists() for each in others):
                break
            time.sleep(0.01)
        work(self)

    Worker.work = waiting  # type: ignore[method-assign]


def _die_in_first_trial(dying: Path) -> None:
    """Before its second epoch, when the first has been saved."""
    advance = Trainings.advance
    setattr_of("heads.tuning.workers.SAVE_SECONDS", 0.0)

    def deadly(self: Trainings, epoch: int, received: Any) -> None:
        if epoch == 2:
            dying.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        advance(self, epoch, received)

    Trainings.advance = deadly  # type: ignore[method-assign]


if __name__ == "__main__":
    crowd(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "killed")
