"""What a submission refuses before anything is written: names, paths and times that cannot do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from featstore.errors import ConfigError
from heads.cluster.config import SMALL, SlurmConfig, Step
from heads.evaluation.named import named_folder

_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_NAME = re.compile(r"[\w+-][\w.+-]{0,63}", re.ASCII)
_KINDS: dict[Step, str] = {"tune": "tune", "study": "study", "finetune": "finetune", "vae": "vae"}


def check_name(name: str | None, steps: Sequence[Step], runs: Path) -> None:
    """Raises ConfigError if this is no name for jobs, or none for a folder that they make in runs."""
    if name is None:
        return
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--as is {name!r}",
            expected="letters, digits, and . _ + -, at most 64",
            where="--as",
            fix="--as first",
        )
    for step in steps:
        if step in _KINDS:
            named_folder(runs, _KINDS[step], name)


def check_text(word: str) -> None:
    """Raises ConfigError if a word cannot be written into a script, whose text is UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"a path is not UTF-8: {word!r}",
            expected="names that a script can hold",
            where="--project, --run, --resume, slurm",
            fix="rename that folder or file",
        ) from None


def check_option(word: str) -> None:
    """Raises ConfigError if a word cannot be handed to `sbatch`."""
    if _CONTROLS.search(word):
        raise ConfigError(
            f"an option of sbatch holds a line break or another control character: {word!r}",
            expected="text of one line",
            where="slurm, --project",
            fix="choose another value, or another path",
        )
    check_text(word)


def check_time(settings: SlurmConfig, step: Step) -> None:
    """Raises ConfigError if a job would be told to stop as soon as it has begun, again and again."""
    seconds = time_seconds(settings.time)
    if step in SMALL or seconds is None or seconds >= 2 * settings.signal_seconds:
        return
    raise ConfigError(
        f"the step {step} has a time of {settings.time} ({seconds} s), and is told to stop "
        f"{settings.signal_seconds} s before its end",
        expected="a time of at least twice slurm.signal_seconds: a job that is told to stop when it has "
        "hardly begun gets nowhere, however often it restarts",
        where=f"slurm.time, slurm.steps.{step}.time, slurm.signal_seconds",
        fix=f"slurm.time: {-(-2 * settings.signal_seconds // 60)} or more (minutes), or a smaller "
        "slurm.signal_seconds",
    )


def time_seconds(time: str) -> int | None:
    """Seconds of a time as SLURM takes it, which rounds up to minutes; None: no limit, as `0` means.

    Args:
        time: Minutes, MM:SS, HH:MM:SS, or D-HH[:MM[:SS]].
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-total // 60) * 60 or None


def check_logs(logs: Path) -> None:
    """Raises ConfigError if the folder of the logs, or one above it, is a file."""
    there = next((path for path in (logs, *logs.parents) if path.exists()), logs)
    if there.exists() and not there.is_dir():
        raise ConfigError(
            f"{there} is a file",
            expected="a folder of the logs, or nothing yet",
            where="slurm.logs",
            fix="slurm.logs: another folder; or move that file away",
        )
