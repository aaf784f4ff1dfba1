"""From a study's files to a report: how much depends on the split and on chance, case by case."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

import pandas as pd

from featstore.cohort.names import natural_key
from heads.evaluation.agreement import attention_agreement
from heads.evaluation.metrics import Metrics
from heads.evaluation.runs import RunError
from heads.evaluation.studies import Study, counted
from heads.evaluation.study_results import CasePredictions, StudyResults, read_results
from heads.evaluation.study_tables import (
    UNDEFINED,
    over_trainings,
    own_probability,
    per_split,
    pooled_table,
    study_table,
)
from heads.inspect.report.case_charts import confusion_chart
from heads.inspect.report.content import CaseLink, CasePage, Cell, Chart, Report, Section, Table
from heads.inspect.report.curves import Scores, calibration_chart, precision_recall_charts, roc_charts
from heads.inspect.report.spread_charts import CaseSpread, case_strip, stability_chart
from heads.inspect.report.training_charts import split_chart, validation_chart
from heads.inspect.report.words import MEANINGS, cohort_section, metrics_of, provenance, verdict

SHOWN = ("auc", "accuracy", "balanced_accuracy", "log_loss")
ENSEMBLE = (
    "Where nothing else is said, numbers and case pages are of the ensemble: each case's mean probability "
    "over the trainings that had it among their test cases, and so never learned from it."
)


def read_study(study: Study, cases: Sequence[CasePage] = ()) -> Report:
    """The report of a study; trainings that are not finished are left out, and named.

    Args:
        study: The study.
        cases: Pages of its test cases, with pictures; the others have what was predicted alone.

    Raises:
        FeatstoreError: No training is finished, or a file of one is damaged.
    """
    results = read_results(study)
    if not results.finished:
        raise RunError(
            "there is nothing to report yet: no training of the study is finished",
            expected="a study with a finished training",
            where=str(study.folder.path),
            fix=f"featstore train-head --resume {study.folder.path}",
        )
    names, resamples = results.class_names, study.config.runs.resamples
    seeds, whole = results.per_seed(), results.mean(results.table)
    pooled = {seed: each.metrics(names, resamples) for seed, each in seeds.items()}
    ensemble = whole.metrics(names, resamples)
    metrics = metrics_of(ensemble.to_json())
    right = int((whole.called == whole.labels).sum())
    spreads = case_spreads(results)
    said = verdict(metrics, whole.labels.tolist(), right, names)
    report = Report(
        title=study.folder.path.name,
        kind="study",
        created=f"{datetime.now():%Y-%m-%d %H:%M}",
        verdict=(*said, _single(results)),
        provenance=provenance(study.about, study.config) | {"trainings": study.size},
        class_names=names,
        metrics=metrics,
        sections=(
            _stability(study, results, spreads),
            _curves(seeds, whole, ensemble, names),
            _trainings(study, results, pooled, ensemble),
            _cohort(study, names),
        ),
        cases=_pages(whole, spreads, names),
        notes=(ENSEMBLE,),
        warnings=_unfinished(results),
    )
    return report.with_cases(cases)


def scores_of(each: CasePredictions, name: str) -> Scores:
    """Predictions as the charts take them."""
    return Scores(name, each.labels, each.probabilities, each.called)


def case_spreads(results: StudyResults) -> dict[str, CaseSpread]:
    """Every case's probability of its true class over its trainings, by case id."""
    table, own = results.table, own_probability(results)
    found = {}
    for case, rows in table.groupby("case_id", sort=False):
        right = int((rows["called"] == rows["true"]).sum())
        values = tuple(own.loc[rows.index].tolist())
        found[str(case)] = CaseSpread(str(case), int(rows["true"].iloc[0]), values, right)
    return found


def _single(results: StudyResults) -> str:
    """What to expect of one training alone."""
    found = over_trainings(results)["best"]
    said = []
    for name in ("auc", "accuracy"):
        mean, sd = found[name]["mean"], found[name]["sd"]
        spread = "" if sd is None else f" ± {sd:.3f}"
        word = "AUC" if name == "auc" else name
        said.append(f"{word} {mean}" if mean == UNDEFINED else f"{word} {mean:.3f}{spread}")
    return f"A single training, mean ± standard deviation of {len(results.finished)}: {', '.join(said)}."


def _unfinished(results: StudyResults) -> tuple[str, ...]:
    lacking = [each for each in results.trainings if each.status != "finished"]
    if not lacking:
        return ()
    named = ", ".join(f"fold {each.fold} seed {each.seed} ({each.status})" for each in lacking[:12])
    more = ", …" if len(lacking) > 12 else ""
    return (f"{counted(len(lacking), 'training')} of {len(results.trainings)} left out: {named}{more}.",)


def _stability(study: Study, results: StudyResults, spreads: dict[str, CaseSpread]) -> Section:
    """What depends on the split, and what on chance."""
    names = results.class_names
    table = study_table(results)
    done = table[table["status"] == "finished"]
    charts: list[Chart] = [stability_chart([*spreads.values()], names)]
    for name in ("auc", "accuracy"):
        values = {
            fold: [float(v) for v in done.loc[done["fold"] == fold, f"best_{name}"] if v != UNDEFINED]
            for fold in study.folds
        }
        charts.append(split_chart(values, MEANINGS[name][0]))
    never = sorted(
        (each for each in spreads.values() if not each.right), key=lambda e: natural_key(e.case_id)
    )
    rows: list[tuple[Cell, ...]] = [
        (CaseLink(e.case_id), names[e.label], len(e.values), min(e.values), max(e.values)) for e in never
    ]
    wrong = Table(
        "Wrong in every training",
        ("case", "true class", "trainings", "least p(true class)", "largest p(true class)"),
        tuple(rows),
        "Cases that no training called right: is the label right, is the case typical?",
        "" if rows else "There is no such case.",
    )
    agreement = attention_agreement(study, results)
    notes = () if agreement is None else (f"Agreement on the patches that matter: {agreement.to_text()}.",)
    said = "How far results depend on which cases were learned from, and on chance in training."
    return Section("stability", "Stability", said, tuple(charts), (_splits(results), wrong), notes)


def _splits(results: StudyResults) -> Table:
    columns = ("fold", "metric", "trainings", "least", "median", "largest", "seed of the median")
    rows = []
    for row in per_split(results).to_dict("records"):
        numbers = [
            None if row[name] == UNDEFINED else float(row[name]) for name in ("min", "median", "max")
        ]
        seed = None if row["median_seed"] is None else int(row["median_seed"])
        label = MEANINGS[row["metric"]][0] if row["metric"] in MEANINGS else str(row["metric"])
        rows.append((str(row["fold"]), label, int(row["n"]), *numbers, seed))
    return Table(
        "Test results by split", columns, tuple(rows), "Over the seeds of each split, the best epoch."
    )


def _curves(
    seeds: dict[int, CasePredictions], whole: CasePredictions, ensemble: Metrics, names: Sequence[str]
) -> Section:
    every = [scores_of(each, f"seed {seed}") for seed, each in seeds.items()]
    mean = replace(scores_of(whole, "ensemble"), bold=True)
    every = [*every, mean] if len(every) > 1 else [replace(mean, name="all folds")]
    alone = replace(mean, name="")
    ece = "" if ensemble.ece.value is None else f": ECE {ensemble.ece.value:.3f}"
    return Section(
        "curves",
        "How good, and how sure",
        charts=(
            confusion_chart(ensemble.confusion_matrix.tolist(), names),
            *roc_charts(every, names),
            *precision_recall_charts(every, names),
            calibration_chart([alone], {"": ece}),
        ),
    )


def _trainings(
    study: Study, results: StudyResults, pooled: dict[int, Metrics], ensemble: Metrics
) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for row in pooled_table(results, pooled, ensemble).to_dict("records"):
        name = "ensemble" if row["seed"] == "ensemble" else f"seed {row['seed']}"
        numbers = [None if row[m] == UNDEFINED else float(row[m]) for m in SHOWN]
        rows.append((name, int(row["trainings"]), int(row["cases"]), *numbers))
    columns = ("", "trainings", "cases", *(MEANINGS[name][0] for name in SHOWN))
    table = Table("All folds of a seed together", columns, tuple(rows))
    histories = {}
    for each in results.finished:
        path = study.folder.training(each.fold, each.seed).history
        histories[f"fold {each.fold} seed {each.seed}"] = pd.read_csv(path)  # read_results has read it
    single = study_table(results)
    singles = Table(
        "Every training",
        ("fold", "seed", "status", "epochs", "best epoch", *(MEANINGS[name][0] for name in SHOWN)),
        tuple(_training_row(row) for row in single.to_dict("records")),
        "Test results of the best epoch.",
    )
    return Section("training", "Trainings", "", (validation_chart(histories),), (table, singles))


def _training_row(row: Mapping[Hashable, object]) -> tuple[Cell, ...]:
    def cell(name: str) -> Cell:
        value = row[name]
        if not isinstance(value, int | float) or pd.isna(value):
            return None
        return value

    first: tuple[Cell, ...] = (str(row["fold"]), str(row["seed"]), str(row["status"]))
    return (*first, cell("epochs"), cell("best_epoch"), *(cell(f"best_{name}") for name in SHOWN))


def _cohort(study: Study, names: Sequence[str]) -> Section:
    parts = {f"test, fold {fold}": study.split_of(fold).test for fold in study.folds}
    return cohort_section(dict(study.about["labels"]), parts, names)


def _pages(
    whole: CasePredictions, spreads: dict[str, CaseSpread], names: Sequence[str]
) -> tuple[CasePage, ...]:
    pages = []
    for i, case in enumerate(whole.case_ids):
        true, call, p = int(whole.labels[i]), int(whole.called[i]), whole.probabilities[i]
        spread = spreads[case]
        low, high, of = min(spread.values), max(spread.values), len(spread.values)
        pages.append(
            CasePage(
                case,
                names[true],
                names[call],
                dict(zip(names, p.tolist(), strict=True)),
                true == call,
                charts=(case_strip(spread, float(p[true])),) if of > 1 else (),
                details={"called right": f"in {spread.right} of {counted(of, 'training')}"},
                columns={"share right": spread.right / of, "spread of p": high - low},
            )
        )
    return tuple(pages)
