"""From a run's files to a report: what `results.json`, `metrics.json`, `history.csv` and the rest say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featstore.cohort.names import natural_key
from heads.evaluation.compare import read_contender
from heads.evaluation.runs import RunError, RunFolder, find_run, read_about, read_config, read_own_split
from heads.evaluation.studies import is_study, open_study
from heads.evaluation.study_results import called, read_run_results
from heads.inspect.report.case_charts import confusion_chart, deviation_chart
from heads.inspect.report.content import CasePage, Chart, Metric, Report, Section
from heads.inspect.report.curves import Scores, calibration_chart, precision_recall_charts, roc_charts
from heads.inspect.report.pair_reading import read_comparison
from heads.inspect.report.study_reading import read_study
from heads.inspect.report.training_charts import training_charts
from heads.inspect.report.words import cohort_section, metrics_of, provenance, verdict

ALL_CASES = (
    "The checkpoint was imported without splits: these are all labelled cases, and those it was trained on "
    "may be among them, which makes every number look better than it is."
)
NO_TRAINING = "The checkpoint was imported: nothing is known of its training."
NO_HISTORY = "The run has no history.csv: its training curves cannot be drawn."


def read_report(
    runs: Path,
    wanted: Path | None,
    other: Path | None = None,
    cases: Sequence[CasePage] = (),
    ensemble: bool = False,
    resamples: int = 2000,
) -> Report:
    """The report of a run, a study, or two of them.

    Args:
        runs: The folder of runs.
        wanted: Path or name of a run or study; None: the newest finished run.
        other: A second one, to compare it with.
        cases: Pages of its cases, with pictures.
        ensemble: Of compared studies, the mean probability over the seeds.
        resamples: Of the comparison's bootstrap intervals.

    Raises:
        FeatstoreError: One is none, is not finished, or a file of it is damaged.
    """
    if other is not None:
        first = wanted if wanted is not None else find_run(runs, None).path
        a, b = (read_contender(runs, each, ensemble) for each in (first, other))
        return read_comparison(a, b, cases, resamples)
    if wanted is not None and is_study(runs, wanted):
        return read_study(open_study(runs, wanted), cases)
    return read_run(find_run(runs, wanted, or_study=True), cases)


def read_run(run: RunFolder, cases: Sequence[CasePage] = ()) -> Report:
    """The report of a finished run, or of an imported checkpoint.

    Args:
        run: Its folder.
        cases: Pages of its test cases, with pictures; the others have what was predicted alone.

    Raises:
        FeatstoreError: It is not finished, or a file of it is damaged.
    """
    if not run.finished:
        raise RunError(
            "there is nothing to report yet: the run is not finished",
            expected="a finished run",
            where=str(run.path),
            fix=f"featstore {run.command} --resume {run.path}",
        )
    about, config, results = read_about(run), read_config(run), read_run_results(run)
    names, test = tuple(results["test"]["class_names"]), results["test"]
    scores = _scores(run, test, names)
    metrics, matrix = _metrics(run, len(scores.labels))
    right = int((scores.called == scores.labels).sum())
    threshold = test["threshold"]
    ids = [str(case) for case in test["case_ids"]]
    ece = next(each for each in metrics if each.name.startswith("Calibration"))
    result = Section(
        "curves",
        "How good, and how sure",
        charts=(
            confusion_chart(matrix, names),
            *roc_charts([scores], names),
            *precision_recall_charts([scores], names),
            calibration_chart([scores], {"": "" if ece.value is None else f": ECE {ece.value:.3f}"}),
            deviation_chart(ids, scores.labels, scores.probabilities, scores.called, names, threshold),
        ),
        notes=_result_notes(test, names),
    )
    labels = dict(about["labels"])
    parts = {name.removesuffix("_cases"): part for name, part in read_own_split(run, about).parts().items()}
    imported = about.get("imported")
    report = Report(
        title=run.path.name,
        kind="run",
        created=f"{datetime.now():%Y-%m-%d %H:%M}",
        verdict=verdict(metrics, scores.labels.tolist(), right, names),
        provenance=provenance(about, config),
        class_names=names,
        metrics=metrics,
        sections=(result, _training(run, results, imported), cohort_section(labels, parts, names)),
        cases=pages_of(ids, scores, names),
        warnings=(ALL_CASES,) if imported and imported.get("splits") is None else (),
    )
    return report.with_cases(cases)


def pages_of(ids: Sequence[str], scores: Scores, names: Sequence[str]) -> tuple[CasePage, ...]:
    """A page for every case, of what was predicted alone, in natural order of the ids."""
    pages = [
        CasePage(
            case,
            names[true],
            names[call],
            dict(zip(names, p, strict=True)),
            bool(true == call),
        )
        for case, true, call, p in zip(
            ids, scores.labels, scores.called, scores.probabilities.tolist(), strict=True
        )
    ]
    return tuple(sorted(pages, key=lambda page: natural_key(page.case_id)))


def _scores(run: RunFolder, test: Mapping[str, Any], names: Sequence[str]) -> Scores:
    try:
        p, labels = (
            np.asarray(test["prediction_probs"], np.float64),
            np.asarray(test["true_labels"], np.int64),
        )
        threshold = None if test["threshold"] is None else np.full(len(p), float(test["threshold"]))
        if not np.isfinite(p).all() or not np.isin(labels, range(len(names))).all():
            raise ValueError("a probability or a label is none")
        if len(set(map(str, test["case_ids"]))) < len(labels):
            raise ValueError("a case stands there twice")
        return Scores("", labels, p, called(p, threshold))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise _damaged(run.results, error) from error


def _metrics(run: RunFolder, cases: int) -> tuple[tuple[Metric, ...], list[list[int]]]:
    path = run.path / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["test"]
        matrix = np.asarray(found["confusion_matrix"], np.int64)
        if found["n"] != cases or matrix.shape != (len(found["class_names"]),) * 2:
            raise ValueError(f"it is of {found['n']} cases, and results.json of {cases}")
        return metrics_of(found), matrix.tolist()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path.name} cannot be read: {type(error).__name__}: {error}",
        expected="the file as the training wrote it",
        where=str(path),
        fix="have it written again: featstore evaluate RUN; or train again",
    )


def _result_notes(test: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """What was done to the predictions."""
    notes = []
    if test["threshold"] is not None:
        notes.append(
            f"A case is called {names[1]} from a probability of {test['threshold']:.3f} on, a threshold "
            f"chosen among the validation cases."
        )
    if found := test.get("calibration"):
        remark = f" ({found['remark']})" if found.get("remark") else ""
        notes.append(
            f"Probabilities are calibrated: temperature {found['temperature']:.3f}, from "
            f"{found['validation_cases']} validation cases{remark}."
        )
    return tuple(notes)


def _training(run: RunFolder, results: Mapping[str, Any], imported: Any) -> Section:
    section = Section("training", "Training")
    if imported is not None:
        return replace(section, notes=(NO_TRAINING,))
    train = results["train"]
    if not run.history.is_file():
        return replace(section, notes=(NO_HISTORY,))
    charts = training_charts(read_history(run.history), int(train["best_epoch"]))
    said = f"The best of {train['epochs']} epochs is the one with the least validation loss."
    return replace(section, explanation=said, charts=tuple[Chart, ...](charts))


def read_history(path: Path) -> pd.DataFrame:
    """One row an epoch.

    Raises:
        RunError: The file is no table of epochs.
    """
    try:
        history = pd.read_csv(path)
        if "epoch" not in history:
            raise ValueError("it has no column 'epoch'")
        return history
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
