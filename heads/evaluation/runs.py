"""A run's folder: its paths in one place, made exclusively; its description and settings."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featstore.cohort.names import natural_key, natural_sorted
from featstore.cohort.splits import Split, read_split
from featstore.errors import FeatstoreError
from featstore.files import replacing
from featstore.settings import Layers
from featstore.strict_yaml import read_file
from heads.config import Config
from heads.evaluation.config_file import write_config as write_config

STUDY = "study.json"  # what makes a folder a study
_LOCK = ".lock"


class RunError(FeatstoreError):
    """A run folder or a checkpoint that cannot be used."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole config, resolved."""
        return self.path / "config.yaml"

    @property
    def about(self) -> Path:
        """What was trained on what: classes, labels, store, versions."""
        return self.path / "run.json"

    @property
    def splits(self) -> Path:
        """Which case was for what."""
        return self.path / "data_splits.npz"

    @property
    def last(self) -> Path:
        """The state to resume from."""
        return self.path / "checkpoints" / "last.pth"

    @property
    def best(self) -> Path:
        """The weights of the best epoch."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def history(self) -> Path:
        """One row an epoch."""
        return self.path / "history.csv"

    @property
    def results(self) -> Path:
        """Written last: with it the run is finished."""
        return self.path / "results.json"

    @property
    def locked(self) -> Path:
        """The folder that a training in this one holds: that of its study, if it is of one."""
        study = self.path.absolute().parent.parent
        return study if (study / STUDY).is_file() else self.path

    @property
    def command(self) -> str:
        """What goes on with it."""
        return "finetune" if self.path.name.startswith("finetune_") else "train-head"

    @property
    def finished(self) -> bool:
        """Whether the run was trained and evaluated to the end."""
        return self.results.is_file()


def create_run(runs: Path, suffix: str | None, now: datetime | None = None) -> RunFolder:
    """Make ``run_YYYYMMDD_HHMMSS[_suffix]``; a second one in the same second gets ``-2``, and so on.

    Args:
        runs: The folder of runs.
        suffix: The name's end.
        now: The time; the present one by default.
    """
    return make_run(RunFolder(new_folder(runs, "run", suffix, now)))


def make_run(run: RunFolder) -> RunFolder:
    """The folders of a run, as far as they are not there."""
    (run.path / "checkpoints").mkdir(parents=True, exist_ok=True)
    return run


def new_folder(runs: Path, kind: str, suffix: str | None, now: datetime | None = None) -> Path:
    """Make ``KIND_YYYYMMDD_HHMMSS[_suffix]``, which no other process has; arguments as `create_run`."""
    runs.mkdir(parents=True, exist_ok=True)
    name = f"{kind}_{now or datetime.now():%Y%m%d_%H%M%S}" + (f"_{suffix}" if suffix else "")
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()  # fails if another process was faster
        except FileExistsError:
            number += 1
            continue
        return path


def find_run(runs: Path, wanted: Path | None, finished: bool = True, or_study: bool = False) -> RunFolder:
    """The run that is named, else the newest.

    Args:
        runs: The folder of runs.
        wanted: A path, or the name of a folder in ``runs``.
        finished: Only finished ones, where none is named.
        or_study: Whether a study would have done too, for the reader of the error.

    Raises:
        RunError: There is none.
    """
    if wanted is not None:
        for path in (wanted, runs / wanted):
            if (path / "run.json").is_file():
                return RunFolder(path)
            if (path / STUDY).is_file():
                raise RunError(
                    f"{wanted} is a study of several trainings",
                    expected="a run",
                    where=str(path),
                    fix=f"featstore evaluate --study {wanted}, or name one of {path / 'trainings'}",
                )
        raise RunError(
            f"{wanted} is no run{' and no study' if or_study else ''}",
            expected=f"a folder that holds run.json{' or study.json' if or_study else ''}",
            where=str(wanted),
            fix=f"choose one of the folders in {runs}",
        )
    found = [RunFolder(path) for path in runs.glob("run_*") if (path / "run.json").is_file()]
    chosen = [run for run in found if run.finished or not finished]
    if not chosen:
        raise RunError(
            f"there is no {'finished ' if finished else ''}run in {runs}"
            + (f", but {len(found)} unfinished" if found else ""),
            expected="a run folder",
            where=str(runs),
            fix="train one: featstore train-head; or go on with one: featstore train-head --resume RUN",
        )
    return max(chosen, key=_age)


def _age(run: RunFolder) -> tuple[str, Any]:
    """By which the newest run is found: the time in its name, or the one at which it says it began."""
    name = run.path.name
    if stamped := re.match(r"run_(\d{8}_\d{6})", name):
        return stamped[1], natural_key(name)
    with suppress(FeatstoreError, KeyError, ValueError, TypeError):  # a damaged one is no newest one
        began = datetime.fromisoformat(read_about(run)["created"]).astimezone()
        return f"{began:%Y%m%d_%H%M%S}", natural_key(name)
    return "", natural_key(name)


@contextmanager
def held(
    folder: Path, doing: str = "training here", shared: bool = False, name: str = _LOCK
) -> Iterator[None]:
    """Keep other processes from doing the same in this folder, for as long as this one lives.

    Args:
        folder: Of a run or a study, or in one.
        doing: What is done.
        shared: With others that share it as well: the tasks of one study.
        name: Of the file that is locked, where a folder has several.

    Raises:
        RunError: Another process holds it.
    """
    # The kernel lets go of the lock with the process, however that ends; on NFS with the machine's lease,
    # if that ends with it. Where there are no locks, nobody is kept out. Open for reading too: on NFS that
    # is what a shared lock asks for.
    with open(folder / name, "a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process is {doing}",
                expected="one at a time",
                where=str(folder),
                fix="wait until it has ended, or stop it; a lock of a process that is gone does not stay",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


def write_text(path: Path, text: str) -> None:
    """Write text aside and move it into place."""
    with replacing(path) as aside:
        aside.write_bytes(text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON aside and move it into place; a number that is none (NaN, infinite) becomes null."""
    text = json.dumps(_strict(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def history_frame(rows: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """One row an epoch, with the columns in a fixed order; what an epoch lacks is NaN."""
    frame = pd.DataFrame(list(rows))
    first = [name for name in ("epoch", "seconds", "lr", "temperature", "grad_norm") if name in frame]
    frame = frame[first + [name for name in frame if name not in first]]
    return frame.astype({"epoch": np.int64})


def write_history(run: RunFolder, history: pd.DataFrame) -> None:
    """Write ``history.csv`` aside and move it into place: a reader never sees half of it."""
    write_text(run.history, history.to_csv(index=False))


def read_config(run: RunFolder) -> Config:
    """The run's own config.

    Raises:
        RunError, ConfigError: It is missing or damaged.
    """
    if not run.config.is_file():
        raise RunError(
            "the run has no config.yaml",
            expected="the config that it was trained with",
            where=str(run.path),
            fix="bring the file back, or train again",
        )
    layers = Layers()
    layers.add(Config, read_file(run.config), str(run.config))
    return layers.build(Config)


def read_about(run: RunFolder) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        RunError: It is damaged.
    """
    return read_description(run.about)


def read_own_split(run: RunFolder, about: Mapping[str, Any]) -> Split:
    """The split of a run, as it was trained; of a checkpoint imported without one, all are test cases.

    Args:
        run: The folder.
        about: What `read_about` gave.

    Raises:
        CohortError: The file is missing or damaged.
    """
    if about.get("imported", {}).get("splits", "") is None:
        return Split((), (), tuple(natural_sorted(about["labels"])))
    return read_split(run.splits, list(about["labels"]), {}, normalize_cases=False)[0]


def read_description(path: Path) -> dict[str, Any]:
    """What the description of a run or a study says; errors as `read_about`."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        names, labels = about["class_names"], about["labels"]
        if (
            isinstance(about["dim"], int)
            and isinstance(names, list)
            and isinstance(about["store"]["fingerprint"], str)
            and isinstance(about["store"]["digest"], str)
            and all(label in range(len(names)) for label in labels.values())
        ):
            return dict(about)
        found = "it lacks what a run's description holds"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise RunError(
        f"the description cannot be read: {found}",
        expected="a file as `featstore train-head` wrote it",
        where=str(path),
        fix="train again, or bring the file back",
    )
