"""What is shown on a terminal while something long runs; nothing where no one looks."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.cohort import CohortReport, Scan
    from featstore.extraction import Plan, Progress
    from featstore.flags import Call


def _hidden() -> bool:
    return not sys.stderr.isatty() and not os.environ.get("FORCE_COLOR")


class CaseBar:
    """A bar over cases, or what else is counted, with the time left."""

    def __init__(self, what: str = "cases") -> None:
        self._what = what
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> CaseBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show how many are done."""
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn(self._what),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                disable=_hidden(),
            )
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)


class ExtractionBar:
    """A bar with patches/s, the time left and what the run is bound by; plain lines where no one looks."""

    def __init__(self, call: Call[Any]) -> None:
        self._call = call
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ExtractionBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def announce(self, scan: Scan, plan: Plan, report: CohortReport | None) -> None:
        """Say what is about to be done."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._call.tell(plan.to_text(len(scan.table)))
        for warning in report.warnings if report is not None else ():
            self._call.tell(f"warning: {warning}")
        if not len(plan.pending):
            return
        alone = not {"OMP_NUM_THREADS", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"} & set(
            os.environ
        )
        if self._call.config.extract.shard is not None and alone:
            self._call.tell(
                "warning: shares that run on one machine slow each other down many times over, unless each "
                "has its own cores: OMP_NUM_THREADS=1 featstore extract --shard … --workers 1"
            )
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("bound by {task.fields[bound]}"),
            console=Console(stderr=True),
            disable=_hidden(),
        )
        self._task = self._bar.add_task("", total=len(plan.pending), rate="", bound="…")
        self._bar.start()

    def update(self, progress: Progress) -> None:
        """Show how far it is."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=progress.done + len(progress.skipped),
                rate=f"{progress.rate:,.0f} patches/s",
                bound=progress.bound_by,
            )
