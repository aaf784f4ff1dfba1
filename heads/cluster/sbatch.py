"""Calling `sbatch`: by words, no shell between, in an environment that does not override the scripts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from featstore.errors import ConfigError, FeatstoreError

_JOB = re.compile(r"(\d+)(;\S+)?")
# What a job around us said of itself must not reach those that it submits, nor what the environment
# says beside the scripts' own lines, which it would override.
_OWN_LINES = (
    *("ARRAY_INX", "GRES", "JOB_NAME", "MEM_PER_CPU", "MEM_PER_GPU", "MEM_PER_NODE", "NO_REQUEUE"),
    *("OPEN_MODE", "REQUEUE", "SIGNAL", "TIMELIMIT", "WAIT"),
)
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER")


class SubmitError(FeatstoreError):
    """`sbatch` did not take a job."""

    exit_code = 1


def sbatch(command: Sequence[str], before: Sequence[str]) -> str:
    """Submit one job.

    Args:
        command: The words, ``sbatch`` first.
        before: Numbers of the jobs that were submitted already, for the error.

    Returns:
        SLURM's number of it.

    Raises:
        SubmitError: SLURM does not take it.
    """
    environment = clean_environment(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    found = _JOB.fullmatch(lines[-1].strip()) if lines else None
    if done.returncode == 0 and found:
        return found[1]
    said = done.stderr.strip() or done.stdout.strip() or f"nothing, and ended with code {done.returncode}"
    fix = "change what it complains about; `featstore submit --help` lists the settings"
    if before:
        fix += f". Jobs {', '.join(before)} are in the queue already: scancel {' '.join(before)}"
    raise SubmitError(
        f"sbatch said: {said}", expected="the number of a job", where=shlex.join(command), fix=fix
    )


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for `sbatch`, without what would override the scripts' own lines.

    Args:
        environment: Of this process.
    """
    dropped = {f"SBATCH_{name}" for name in _OWN_LINES}
    in_a_job = "SLURM_JOB_ID" in environment
    return {
        name: value
        for name, value in environment.items()
        if name not in dropped and (name in _KEPT or not (in_a_job and name.startswith("SLURM_")))
    }


def check_sbatch() -> None:
    """Raises ConfigError if this machine cannot submit."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch on PATH: this machine cannot submit to SLURM",
            expected="a machine of the cluster from which jobs are submitted, often called login node",
            where="submit",
            fix="log in there and run the same command; to see what it would do: add --dry-run",
        )


def why_dry(folder: Path) -> str:
    """What a dry run says at its end.

    Args:
        folder: Where the scripts would lie.
    """
    if shutil.which("sbatch") is not None:
        return "nothing was submitted or written (--dry-run); without it these lines are run, in this order"
    return (
        "nothing was submitted or written: this is a dry run, and there is no sbatch on PATH.\n"
        "On a machine of the cluster the same command without --dry-run writes these scripts to\n"
        f"{folder}, and runs the lines above in this order, each with the numbers\n"
        "of the jobs that it waits for. To do without it: copy the scripts in slurm/ of featstore's\n"
        "source there; `sbatch` takes them as they are."
    )
