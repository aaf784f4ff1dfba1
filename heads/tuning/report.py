"""What a tuning has found, as text, JSON and tables."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featstore.cohort.tables import write_csv
from heads.evaluation.metrics import Metrics
from heads.evaluation.runs import write_json, write_text
from heads.evaluation.studies import counted
from heads.evaluation.study_results import StudyResults, TrainingResult, read_results
from heads.tuning.findings import OuterFindings, findings_of, shown_value
from heads.tuning.folder import Tuning
from heads.tuning.plots import plot_trials
from heads.tuning.tasks import Tasks
from heads.tuning.winner import BEST

_SHOWN = {"auc": "AUC", "accuracy": "accuracy", "log_loss": "log loss"}


@dataclass(frozen=True, eq=False)
class TuneReport:
    """What a tuning has found, as far as it is.

    Attributes:
        tuning: What was tuned.
        outer: What was found for every outer fold.
        results: Of the final trainings.
        pooled: Of the test cases of all outer folds, of each the mean probability over the seeds; None
            without a finished final training.
        left: Whether there is something to do, for others or for a later command.
        interrupted: The signal that ended the command early; None if none did.
        remarks: Of the pictures that could not be drawn.
    """

    tuning: Tuning
    outer: Sequence[OuterFindings]
    results: StudyResults
    pooled: Metrics | None
    left: bool
    interrupted: int | None = None
    remarks: Sequence[str] = ()

    @property
    def exit_code(self) -> int:
        """1 if nothing has won, or a final training failed."""
        nothing = not self.left and any(found.winner is None for found in self.outer)
        return int(nothing or bool(self.failed))

    @property
    def failed(self) -> list[TrainingResult]:
        """The final trainings that did."""
        return [each for each in self.results.trainings if each.status in ("failed", "damaged")]

    @property
    def looks(self) -> int:
        """How often the validation cases of an inner fold were looked at to choose the winners."""
        return sum(found.epochs for found in self.outer)

    def to_text(self) -> str:
        """Trials, winners, looks, and what the winners are worth on the test cases."""
        tune, path = self.tuning.config.tune, self.tuning.folder.path
        better = "less" if self.tuning.direction == "minimize" else "more"
        lines = [f"{path}: {tune.objective} ({better} is better)"]
        for found in self.outer:
            lines += _outer_lines(found, self.tuning)
        lines += self._look_lines()
        lines += [*self._test_lines(), *self.remarks]
        if self.left:
            at_work = sum(found.counts["at work"] for found in self.outer)
            if self.interrupted is None and not self.failed:
                lines.append(
                    "other workers are at the rest" + (f": {counted(at_work, 'trial')}" if at_work else "")
                )
            name = path.name.removeprefix("tune_")
            lines.append(f"to go on: featstore tune --as {name}")
        else:
            many = len(self.outer) > 1
            for fold in self.tuning.folds:
                path = self.tuning.folder.outer(fold) if many else self.tuning.folder.path
                whose = f"the winner of outer fold {fold}" if many else "the winner's settings"
                lines.append(f"{whose}: featstore train-head --config {shlex.quote(str(path / BEST))}")
        return "\n".join(lines)

    def _look_lines(self) -> list[str]:
        finals = len(self.results.finished)
        looks = "looks at validation cases to choose: "
        lines = [f"{looks}{self.looks:,} (epochs of all trials and inner folds)"]
        looked = f"looks at test cases: {finals}" + (", once a final training" if finals else "")
        lines.append(looked)
        if any(found.winner is not None for found in self.outer):
            lines.append(
                "the best validation value is that of the luckiest of many: expect less of new cases, and "
                "believe the test cases"
            )
        return lines

    def _test_lines(self) -> list[str]:
        lines = [f"fold {each.fold} seed {each.seed}: {each.status}: {each.error}" for each in self.failed]
        done = self.results.finished
        several = len(self.outer) > 1
        for each in done:
            where = f"fold {each.fold}, " if several else ""
            numbers = "  ".join(f"{title} {_value(each, name)}" for name, title in _SHOWN.items())
            lines.append(f"test, {where}seed {each.seed}: {numbers}")
        if len(done) > 1:
            means = "  ".join(f"{title} {_mean(done, name)}" for name, title in _SHOWN.items())
            lines.append(f"test, mean ± sd of {len(done)} trainings: {means}")
        if self.pooled is not None:
            auc, accuracy = self.pooled.auc, self.pooled.accuracy
            seeds = len(self.tuning.about["seeds"])
            what = "all outer folds together" if several else "all"
            mean = f", mean probability of {counted(seeds, 'seed')}" if seeds > 1 else ""
            lines.append(
                f"test, {what}: {self.pooled.n} cases{mean}  AUC {_interval(auc)}  "
                f"accuracy {_interval(accuracy)}"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        finals = [
            {
                "fold": each.fold,
                "seed": each.seed,
                "status": each.status,
                "error": each.error,
                "run": str(self.tuning.folder.training(each.fold, each.seed).path),
                "test": None if each.metrics is None else each.metrics["test"],
            }
            for each in self.results.trainings
        ]
        return {
            "tuning": str(self.tuning.folder.path),
            "objective": self.tuning.config.tune.objective,
            "trials": self.tuning.config.tune.trials,
            "inner_folds": self.tuning.config.tune.inner_folds,
            "outer": [found.to_json() for found in self.outer],
            "looks_at_validation_cases": self.looks,
            "looks_at_test_cases": len(self.results.finished),
            "final": finals,
            "pooled": None if self.pooled is None else self.pooled.to_json(),
            "finished": not self.left,
            "interrupted": self.interrupted,
            "remarks": list(self.remarks),
        }


def _outer_lines(found: OuterFindings, tuning: Tuning) -> list[str]:
    """Trials, epochs, and the best of them."""
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items())
    if found.adopted:
        counts += f"; {found.adopted} gone on with after their worker had ended"
    title = f"outer fold {found.fold}: " if len(tuning.folds) > 1 else ""
    lines = [f"{title}{counted(len(found.trials), 'trial')}: {counts or 'none yet'}"]
    saved = ""
    if found.saved:
        saved = (
            f"; pruning saved about {found.saved:,.0f} ({found.share_saved:.0%}), if the pruned had run as "
            "long as the mean finished trial"
        )
    lines.append(f"  epochs trained, of all inner folds: {found.epochs:,}{saved}")
    if found.winner is not None:
        lines.append(f"  best: trial {found.winner.number}, {shown_value(found.winner, tuning)}")
        lines += [f"    {name} {_shown(value)}" for name, value in found.winner.settings.items()]
    failed = [row for row in found.trials if row.state == "failed"]
    if failed:
        lines.append(f"  a failure, trial {failed[0].number}: {failed[0].error}")
    return lines


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(each: TrainingResult, name: str) -> str:
    found = (each.metrics or {})["test"][name]["value"]
    return found if isinstance(found, str) else f"{found:.3f}"


def _mean(done: Sequence[TrainingResult], name: str) -> str:
    values = [(each.metrics or {})["test"][name]["value"] for each in done]
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < 2:
        return "undefined"
    return f"{statistics.fmean(numbers):.3f} ± {statistics.stdev(numbers):.3f}"


def _interval(estimate: Any) -> str:
    if estimate.value is None:
        return f"undefined ({estimate.reason})"
    shown = f"{estimate.value:.3f}"
    return shown if estimate.low is None else f"{shown} [{estimate.low:.3f}, {estimate.high:.3f}]"


def make_report(tasks: Tasks, interrupted: int | None = None) -> TuneReport:
    """What a tuning has found by now; of one that is finished, with what was remarked then."""
    tuning = tasks.tuning
    results = read_results(tuning.study())
    pooled = None
    if results.finished:
        resamples = tuning.config.runs.resamples
        pooled = results.mean(results.table).metrics(results.class_names, resamples)
    outer = [findings_of(tasks, fold) for fold in tuning.folds]
    remarks = _remarks(tuning.folder.summary)
    return TuneReport(tuning, outer, results, pooled, tasks.left(), interrupted, remarks)


def _remarks(summary: Path) -> list[str]:
    try:
        found = json.loads(summary.read_text(encoding="utf-8")).get("remarks", [])
        return [str(each) for each in found]
    except (OSError, ValueError, TypeError, AttributeError):  # not written yet, or not by us
        return []


def best_head(found: OuterFindings, tuning: Tuning) -> str:
    """The lines above the winner's settings: where they come from."""
    winner = found.winner
    if winner is None:
        return ""
    outer = f", outer fold {found.fold}" if len(tuning.folds) > 1 else ""
    return (
        f"From {tuning.folder.path.name}{outer}: trial {winner.number}, the best of "
        f"{len(found.trials)} by {shown_value(winner, tuning)}.\n"
        "That value is the luckiest of many; what the test cases say stands in tuning.txt.\n"
        f"To train with them, over the settings of featstore.yaml: featstore train-head --config {BEST}\n"
        "Without load_splits and fold it is trained on the project's own split."
    )


def write_findings(tasks: Tasks, report: TuneReport) -> TuneReport:
    """Write ``trials.csv``, the pictures, ``tuning.txt``, and last ``tuning.json``.

    Returns:
        The report with remarks on the pictures.
    """
    folder, tuning = tasks.tuning.folder, tasks.tuning
    write_trials(tasks, report)
    remarks = list[str]()
    for found in report.outer:
        pictures = folder.path if len(report.outer) == 1 else folder.outer(found.fold)
        objective = tuning.config.tune.objective
        undrawn = plot_trials(pictures, found, tasks.studies[found.fold], tasks.space, objective)
        fold = f"outer fold {found.fold}: " if len(report.outer) > 1 else ""
        remarks += [fold + each for each in undrawn]
    report = replace(report, remarks=remarks)
    write_text(folder.path / "tuning.txt", report.to_text() + "\n")
    write_json(folder.summary, report.to_json())
    return report


def write_trials(tasks: Tasks, report: TuneReport) -> None:
    """Write ``trials.csv``: one row a trial, with every setting that it had."""
    paths = list(dict.fromkeys(["head.name", *tasks.space.paths]))
    own = ["outer", "number", "state", "value", "sd", "epochs", "inner_epochs", "seconds", "adopted"]
    rows = [
        [
            *(row.outer, row.number, row.state, _cell(row.value), _cell(row.sd)),
            *(max(row.epochs, default=0), sum(row.epochs), f"{row.seconds:.3f}", row.adopted),
            *(_cell(row.settings.get(path)) for path in paths),
            row.error,
        ]
        for found in report.outer
        for row in found.trials
    ]
    write_csv(tasks.tuning.folder.path / "trials.csv", [*own, *paths, "error"], rows)


def _cell(value: Any) -> Any:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
