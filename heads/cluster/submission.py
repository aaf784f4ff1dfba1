"""What was submitted to SLURM, or would be: the jobs, their commands, and how to look after them."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heads.cluster.config import Step


@dataclass(frozen=True)
class Submitted:
    """A job, as it was or would be submitted.

    Attributes:
        step: Which one.
        command: The words of `sbatch`.
        script: Its text.
        tasks: Of an array; None: a single job.
        job: SLURM's number; None: not submitted.
        time: When, ISO 8601; None: not submitted.
    """

    step: Step
    command: tuple[str, ...]
    script: str
    tasks: str | None
    job: str | None = None
    time: str | None = None

    @property
    def line(self) -> str:
        """The command as one types it."""
        return shlex.join(self.command)


@dataclass(frozen=True)
class Submission:
    """What was submitted, or would be.

    Attributes:
        project: Its folder.
        folder: Where scripts, settings and job numbers are kept; after a dry run it is not there.
        logs: Where the jobs write.
        jobs: In order.
        dry: Why nothing was submitted; None: it was.
    """

    project: Path
    folder: Path | None
    logs: Path
    jobs: tuple[Submitted, ...]
    dry: str | None = None

    exit_code = 0

    def to_text(self) -> str:
        """The jobs and what to do with them; of a dry run the scripts too."""
        if not self.jobs:
            return self.dry or "nothing to submit"
        if self.dry is not None:
            shown = [f"{job.command[-1]}:\n\n{job.script}" for job in self.jobs]
            return "\n".join([*shown, *(job.line for job in self.jobs), "", self.dry])
        numbers = [job.job or "" for job in self.jobs]
        lines = [
            f"{each.step:<9} job {each.job}" + (f", tasks {each.tasks}" if each.tasks else "")
            for each in self.jobs
        ]
        return "\n".join(
            [
                *lines,
                f"to look: squeue --jobs={','.join(numbers)}; what they say: {self.logs}",
                f"to cancel: scancel {' '.join(numbers)}",
                f"scripts, settings and job numbers: {self.folder}",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {
            "project": str(self.project),
            "folder": None if self.folder is None else str(self.folder),
            "logs": str(self.logs),
            "dry_run": self.dry,
            "jobs": [asdict(job) | {"command": list(job.command)} for job in self.jobs],
        }
