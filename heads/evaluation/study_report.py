"""A study's tables, numbers and pictures, written from its trainings' files alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from featstore.cohort.names import natural_sorted
from featstore.cohort.tables import write_csv
from heads.evaluation.agreement import Agreement, attention_agreement
from heads.evaluation.metrics import Estimate, Metrics
from heads.evaluation.runs import write_json, write_text
from heads.evaluation.studies import Study, counted
from heads.evaluation.study_plots import plot_study
from heads.evaluation.study_results import StudyResults, read_results
from heads.evaluation.study_tables import (
    UNDEFINED,
    ensemble_table,
    out_of_fold,
    over_seeds,
    over_trainings,
    per_case,
    per_split,
    pooled_table,
    study_table,
)

_FEW = 20  # trainings still to do that are named one by one
SHOWN = {"auc": "AUC", "accuracy": "accuracy", "log_loss": "log loss"}


@dataclass(frozen=True, eq=False)
class StudyReport:
    """What a study found.

    Attributes:
        study: The study.
        results: What its trainings found.
        pooled: By seed, the metrics of all its finished folds' test cases together.
        ensemble: Those of the mean probability over the seeds that have the case's fold; None without
            a finished training.
        always_wrong: Cases that no training called right.
        agreement: Of the attention of different seeds, where it was written.
        interrupted: The signal that ended the command early; None if none did.
    """

    study: Study
    results: StudyResults
    pooled: dict[int, Metrics]
    ensemble: Metrics | None
    always_wrong: list[str]
    agreement: Agreement | None
    interrupted: int | None = None

    @property
    def whole(self) -> dict[int, Metrics]:
        """`pooled` of the seeds that have every fold, and so the same cases."""
        return {seed: self.pooled[seed] for seed in self.results.whole_seeds}

    @property
    def partial(self) -> list[int]:
        """The seeds of `pooled` that lack a fold."""
        whole = self.results.whole_seeds
        return [seed for seed in self.pooled if seed not in whole]

    @property
    def failed(self) -> list[str]:
        """The trainings that failed, and why, a line each."""
        return [
            f"fold {each.fold} seed {each.seed}: {each.error}"
            for each in self.results.trainings
            if each.status == "failed"
        ]

    @property
    def damaged(self) -> list[str]:
        """The trainings whose files cannot be read, and what is wrong, a line each."""
        return [
            f"fold {each.fold} seed {each.seed}: {each.error}"
            for each in self.results.trainings
            if each.status == "damaged"
        ]

    @property
    def exit_code(self) -> int:
        """1 unless every training is finished, and its files can be read."""
        return 1 if self.failed or self.damaged or self.open else 0

    @property
    def open(self) -> int:
        """How many trainings are interrupted or missing."""
        return len(self.to_do)

    @property
    def to_do(self) -> list[str]:
        """The trainings that are interrupted or missing, a line each."""
        return [
            f"fold {each.fold} seed {each.seed}: {each.status}"
            for each in self.results.trainings
            if each.status in ("interrupted", "missing")
        ]

    def to_text(self) -> str:
        """The numbers, what failed, and how to go on."""
        done, study = self.results.finished, self.study
        lines = [
            f"{study.folder.path}",
            f"  {study.config.head.name}, {study.size}: "
            f"{len(done)} of {len(study.trainings)} trainings finished",
        ]
        if done:
            lines.append(f"  {'test cases, best epoch':36}" + "".join(f"{v:>24}" for v in SHOWN.values()))
            for name, values in self._rows().items():
                lines.append(f"  {name:36}" + "".join(f"{values[metric]:>24}" for metric in SHOWN))
            if self.partial and len(study.seeds) > 1:
                one, seeds = len(self.partial) == 1, ", ".join(map(str, self.partial))
                lack = "lacks a fold, and is" if one else "lack a fold, and are"
                lines.append(f"  seed{'' if one else 's'} {seeds} {lack} in no mean over seeds")
            wrong = f": {', '.join(self.always_wrong[:10])}" if self.always_wrong else ""
            wrong += ", …" if len(self.always_wrong) > 10 else ""
            lines.append(f"  wrong in every training: {counted(len(self.always_wrong), 'case')}{wrong}")
        if self.agreement is not None:
            lines.append(f"  {self.agreement.to_text()}")
        if self.failed:
            count = counted(len(self.failed), "training")
            lines += [f"  {count} failed:", *(f"    {line}" for line in self.failed)]
        if self.damaged:
            count = counted(len(self.damaged), "training")
            lines += [f"  {count} with damaged files:", *(f"    {line}" for line in self.damaged)]
        if self.open:
            are = "is" if self.open == 1 else "are"
            few = [f"    {line}" for line in self.to_do] if self.open <= _FEW and done else []
            lines += [f"  {counted(self.open, 'training')} {are} still to do{':' if few else ''}", *few]
        if self.failed or self.damaged or self.open:
            path = shlex.quote(str(study.folder.path))
            lines.append(f"to go on: featstore train-head --resume {path}")
            lines.append(f"on a cluster: featstore submit study collect --resume {path}")
        return "\n".join(lines)

    def _rows(self) -> dict[str, dict[str, str]]:
        """What stands in the lines of the table of `to_text`, by their names."""
        done, folds = self.results.finished, len(self.study.folds)
        means = over_trainings(self.results)["best"]
        rows = {f"each training alone, mean ± sd of {len(done)}": {k: _spread(means[k]) for k in SHOWN}}
        for seed, metrics in self.pooled.items():
            mine = sum(each.seed == seed for each in done)
            name = f"folds of seed {seed} pooled" if folds > 1 else f"seed {seed}"
            if mine < folds:
                name = f"{mine} of {folds} folds of seed {seed}"
            rows[f"{name}, {metrics.n} cases"] = {k: _shown(getattr(metrics, k)) for k in SHOWN}
        if len(self.whole) > 1:
            over = over_seeds(self.whole)
            rows[f"mean ± sd of {len(self.whole)} seeds"] = {k: _spread(over[k]) for k in SHOWN}
        if self.ensemble is not None and len(self.pooled) > 1:
            name = "ensemble of the seeds"
            if self.partial:
                seeds = self.results.table.groupby("case_id")["seed"].nunique()
                least, most = int(seeds.min()), int(seeds.max())
                count = counted(most, "seed") if least == most else f"{least} to {most} seeds"
                name = f"ensemble of {count}, {self.ensemble.n} cases"
            rows[name] = {k: _shown(getattr(self.ensemble, k)) for k in SHOWN}
        return rows

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types: what `metrics.json` says, and where."""
        return {
            "study": str(self.study.folder.path),
            **self.numbers(),
            "interrupted": self.interrupted,
        }

    def numbers(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        count = dict.fromkeys(("finished", "failed", "damaged", "interrupted", "missing"), 0)
        for each in self.results.trainings:
            count[each.status] += 1
        return {
            "head": self.study.config.head.name,
            "class_names": list(self.results.class_names),
            "folds": self.study.folds,
            "seeds": self.study.seeds,
            "trainings": count,
            "failed": self.failed,
            "damaged": self.damaged,
            "to_do": self.to_do,
            "over_trainings": over_trainings(self.results),
            "pooled": {str(seed): metrics.to_json() for seed, metrics in self.pooled.items()},
            "whole_seeds": list(self.whole),
            "pooled_over_seeds": over_seeds(self.whole),
            "ensemble": None if self.ensemble is None else self.ensemble.to_json(),
            "always_wrong": self.always_wrong,
            "attention_agreement": None if self.agreement is None else self.agreement.to_json(),
        }


def write_report(study: Study, resamples: int, interrupted: int | None = None) -> StudyReport:
    """Lay a study's trainings together, and write what they say into its folder.

    Args:
        study: The study; trainings that are not finished are left out, and named.
        resamples: Of the bootstrap intervals.
        interrupted: The signal that ended the command early.

    Raises:
        RunError: Trainings do not belong together.
    """
    results = read_results(study)
    seeds = results.per_seed() if results.finished else {}
    whole = results.mean(results.table) if results.finished else None
    cases = per_case(results)
    agreement = attention_agreement(study, results)
    report = StudyReport(
        study,
        results,
        {seed: each.metrics(results.class_names, resamples) for seed, each in seeds.items()},
        None if whole is None else whole.metrics(results.class_names, resamples),
        natural_sorted(cases.loc[cases["right"] == 0, "case_id"]),
        agreement,
        interrupted,
    )
    folder = study.folder.path
    _write(folder / "study.csv", study_table(results))
    _write(folder / "per_split.csv", per_split(results))
    _write(folder / "out_of_fold.csv", out_of_fold(results))
    _write(folder / "per_case.csv", cases)
    _write(folder / "always_wrong.csv", cases[cases["right"] == 0])
    _write(folder / "pooled.csv", pooled_table(results, report.pooled, report.ensemble))
    combined = None if whole is None else ensemble_table(whole, results.class_names)
    _write(folder / "ensemble.csv", combined)
    _write(folder / "attention_agreement.csv", None if agreement is None else agreement.table)
    write_json(folder / "metrics.json", report.numbers())
    write_text(folder / "study.txt", report.to_text() + "\n")
    plot_study(folder, results, seeds, whole)
    return report


def _write(path: Path, table: pd.DataFrame | None) -> None:
    if table is None:
        path.unlink(missing_ok=True)  # an older one would be of trainings that are gone
        return
    rows = table.astype(object).where(table.notna(), "").to_numpy(object).tolist()
    write_csv(path, table.columns.tolist(), rows)


def _shown(estimate: Estimate) -> str:
    if estimate.value is None:
        return UNDEFINED
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{interval}"


def _spread(found: Mapping[str, Any]) -> str:
    if found["mean"] == UNDEFINED:
        return UNDEFINED
    return f"{found['mean']:.3f}" + ("" if found["sd"] is None else f" ± {found['sd']:.3f}")
