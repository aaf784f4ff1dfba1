"""Two runs or studies on the cases that both have: differences with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import natural_sorted
from featstore.cohort.tables import write_csv
from heads.config import RunsConfig
from heads.evaluation.metrics import BLOCK, Estimate, evaluate, interval_of, resample, weighted_statistics
from heads.evaluation.runs import RunError, find_run, read_about, read_config
from heads.evaluation.studies import counted, is_study, open_study
from heads.evaluation.study_results import (
    CasePredictions,
    StudyResults,
    called,
    read_results,
    read_run_results,
    tell_not_used,
)

COMPARED = ("auc", "average_precision", "accuracy", "balanced_accuracy", "brier", "log_loss")
LESS_IS_BETTER = ("brier", "log_loss")


@dataclass(frozen=True, eq=False)
class Contender:
    """A run, or a study: the test cases' predictions of the best epochs.

    Attributes:
        path: The folder.
        kind: What its numbers are of, for the reader.
        class_names: In config order.
        seeds: One prediction of all its cases for every seed; a run, or an ensemble, has one.
        left_out: Seeds that lack a fold.
    """

    path: Path
    kind: str
    class_names: tuple[str, ...]
    seeds: list[CasePredictions]
    left_out: tuple[int, ...] = ()

    @property
    def labels(self) -> dict[str, int]:
        """True class index of every case."""
        return dict(zip(self.seeds[0].case_ids, self.seeds[0].labels.tolist(), strict=True))


@dataclass(frozen=True)
class Row:
    """One metric: of A, of B, and A − B with its interval."""

    metric: str
    a: float | None
    b: float | None
    difference: Estimate


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        a: The first.
        b: The second.
        cases: How many cases both have.
        only: How many cases A alone, and B alone has.
        rows: One a metric.
        resamples: Of the bootstrap.
    """

    a: Contender
    b: Contender
    cases: int
    only: tuple[int, int]
    rows: list[Row]
    resamples: int

    def to_text(self) -> str:
        """A table; an interval on one side of 0 is marked."""
        lines = []
        for letter, each in (("A", self.a), ("B", self.b)):
            lines.append(f"{letter}  {each.path}: {each.kind}")
            if each.left_out:
                one, seeds = len(each.left_out) == 1, ", ".join(map(str, each.left_out))
                lines.append(f"   without seed{'' if one else 's'} {seeds}, which lack{'s' * one} a fold")
        alone = [f"{n} only in {letter}" for letter, n in zip("AB", self.only, strict=True) if n]
        lines.append(
            f"{counted(self.cases, 'case')} of both" + (f" ({', '.join(alone)}: left out)" if alone else "")
        )
        lines.append(f"{'':27}{'A':>10}{'B':>10}{'A − B':>10}   95% interval")
        for row in self.rows:
            numbers = [_shown(value) for value in (row.a, row.b)]
            found = row.difference
            if found.low is None or found.high is None:
                interval = found.reason
            else:
                apart = found.low > 0 or found.high < 0
                interval = f"[{found.low:+.4f}, {found.high:+.4f}]{' *' if apart else ''}"
            shown = "undefined" if found.value is None else f"{found.value:+.4f}"
            less = " (less is better)" if row.metric in LESS_IS_BETTER else ""
            name = row.metric.replace("_", " ") + less
            lines.append(f"{name:27}{numbers[0]:>10}{numbers[1]:>10}{shown:>10}   {interval}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        whole: dict[str, Any] = {}
        for letter, each in (("a", self.a), ("b", self.b)):
            whole[letter] = {"path": str(each.path), "kind": each.kind, "left_out": list(each.left_out)}
        whole |= {"cases": self.cases, "only_in_a": self.only[0], "only_in_b": self.only[1]}
        whole["metrics"] = {
            row.metric: {"a": row.a, "b": row.b, "difference": row.difference.to_json()}
            for row in self.rows
        }
        return whole | {
            "interval": "95% percentile bootstrap of A − B, paired over cases",
            "resamples": self.resamples,
        }

    def write_csv(self, path: Path) -> None:
        """One row a metric: both values, the difference and its interval."""
        columns = ["metric", "a", "b", "difference", "low", "high", "cases"]
        rows = []
        for row in self.rows:
            found = row.difference
            numbers = [row.a, row.b, found.value, found.low, found.high]
            rows.append([row.metric, *("" if n is None else n for n in numbers), self.cases])
        write_csv(path, columns, rows)


def read_contender(
    runs: Path,
    wanted: Path,
    ensemble: bool = False,
    given: RunsConfig | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Contender:
    """A run or a study by its path, or its name in the folder of runs.

    Args:
        runs: The folder of runs.
        wanted: Path or name.
        ensemble: Of a study, the mean probability over the seeds in place of the mean of their metrics.
        given: The settings given now; what the results cannot follow is told.
        tell: Called with remarks.

    Raises:
        RunError: It is neither, is not finished, or a file of it is damaged; no seed of the study has
            every fold.
    """
    if not is_study(runs, wanted):
        run = find_run(runs, wanted, or_study=True)
        if not run.finished:
            raise _nothing(run.path, f"featstore train-head --resume {run.path}")
        results = read_run_results(run)
        if given is not None:
            tell_not_used(given, read_config(run).runs, run.path, tell)
        names = tuple(results["test"]["class_names"])
        imported, kind = read_about(run).get("imported"), "a run"
        if imported is not None:
            kind = "an imported checkpoint"
            if imported["splits"] is None:
                kind += " on all labelled cases, those it was trained on perhaps among them"
        return Contender(run.path, kind, names, [_of_run(results["test"])])
    study = open_study(runs, wanted)
    found = read_results(study)
    path, whole = study.folder.path, found.whole_seeds
    if not found.finished:
        raise _nothing(path, f"featstore train-head --resume {path}")
    if not whole:
        raise _no_whole_seed(path, found)
    if given is not None:
        tell_not_used(given, study.config.runs, path, tell)
    out = tuple(seed for seed in study.seeds if seed not in whole)
    if ensemble:
        rows = found.table[found.table["seed"].isin(whole)]
        kind = f"a study, mean probability of {counted(len(whole), 'seed')}"
        return Contender(path, kind, found.class_names, [found.mean(rows)], out)
    kind = f"a study, folds pooled, mean of the metrics of {counted(len(whole), 'seed')}"
    seeds = found.per_seed()
    return Contender(path, kind, found.class_names, [seeds[seed] for seed in whole], out)


def _of_run(test: dict[str, Any]) -> CasePredictions:
    p = np.asarray(test["prediction_probs"], np.float64)
    threshold = None if test["threshold"] is None else np.full(len(p), float(test["threshold"]))
    cases = tuple(str(case) for case in test["case_ids"])
    labels = np.asarray(test["true_labels"], np.int64)
    return CasePredictions(cases, labels, p, threshold, np.ones(len(p), np.int64))


def compare(a: Contender, b: Contender, resamples: int = 2000, seed: int = 0) -> Comparison:
    """The difference of every metric on the cases that both have.

    Every resample draws cases, the same ones for both and for all their seeds; a metric of several
    seeds is the mean of theirs. Resamples in which a metric is undefined are left out.

    Args:
        a: The first.
        b: The second.
        resamples: How many bootstrap resamples; 0 for no intervals.
        seed: Of the resamples.

    Raises:
        RunError: The two have no case, other classes, or other true labels.
        EvaluationError: Probabilities that are none.
    """
    shared = _shared(a, b)
    labels = np.array([a.labels[case] for case in shared], np.int64)
    chosen = [[_select(each, shared) for each in side.seeds] for side in (a, b)]
    for p, _ in (each for side in chosen for each in side):
        evaluate(labels, p, a.class_names, resamples=0)  # refuses what are no probabilities
    point = [_means(np.ones((1, len(shared))), labels, side) for side in chosen]
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in COMPARED}
    generator, size = np.random.default_rng(seed), max(1, BLOCK // len(shared))
    for start in range(0, resamples, size):
        weights = resample(generator, min(size, resamples - start), len(shared))
        first, second = (_means(weights, labels, side) for side in chosen)
        for name in COMPARED:
            drawn[name].append(first[name] - second[name])
    absent = [name for c, name in enumerate(a.class_names) if c not in labels]
    rows = []
    for name in COMPARED:
        values = [float(side[name][0]) for side in point]
        found = interval_of(values[0] - values[1], drawn[name], absent)
        first_value, second_value = (None if np.isnan(value) else value for value in values)
        rows.append(Row(name, first_value, second_value, found))
    only = (len(a.labels) - len(shared), len(b.labels) - len(shared))
    return Comparison(a, b, len(shared), only, rows, resamples)


def _shared(a: Contender, b: Contender) -> list[str]:
    """The cases that both have, in natural order."""
    if a.class_names != b.class_names:
        raise RunError(
            f"the classes are {', '.join(a.class_names)} and {', '.join(b.class_names)}",
            expected="the same classes, in the same order",
            where=f"{a.path}, {b.path}",
            fix="compare what was trained with the same `classes:`",
        )
    first, second = a.labels, b.labels
    shared = natural_sorted(first.keys() & second.keys())
    if not shared:
        raise RunError(
            "the two have no test case in common",
            expected="test cases that both have: the same splits",
            where=f"{a.path}, {b.path}",
            fix="train both with the same --load-splits and --fold, or compare whole studies",
        )
    if strange := [case for case in shared if first[case] != second[case]]:
        case = strange[0]
        raise RunError(
            f"{counted(len(strange), 'case')} {'has' if len(strange) == 1 else 'have'} different true "
            f"labels, such as {case}: "
            f"{a.class_names[first[case]]} and {a.class_names[second[case]]}",
            expected="the same labels",
            where=f"{a.path}, {b.path}",
            fix="were the labels mended in between? train the older one again",
        )
    return shared


def _select(each: CasePredictions, cases: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(N, C) probabilities and (N,) predicted classes of these cases."""
    place = {case: i for i, case in enumerate(each.case_ids)}
    index = [place[case] for case in cases]
    p = each.probabilities[index]
    return p, called(p, None if each.threshold is None else each.threshold[index])


def _means(
    weights: NDArray[np.float64],
    labels: NDArray[np.int64],
    seeds: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]],
) -> dict[str, NDArray[np.float64]]:
    """(R,) per metric: the mean over the seeds under every weighting (R, N) of the cases."""
    found = [weighted_statistics(weights, labels, p, predicted) for p, predicted in seeds]
    return {name: np.mean([each[name] for each in found], axis=0) for name in COMPARED}


def _nothing(path: Path, fix: str) -> RunError:
    return RunError(
        "there is nothing to compare yet: no training is finished",
        expected="a finished run or study",
        where=str(path),
        fix=fix,
    )


def _no_whole_seed(path: Path, found: StudyResults) -> RunError:
    lacking = [each for each in found.trainings if each.status != "finished"]
    named = ", ".join(f"fold {each.fold} seed {each.seed} ({each.status})" for each in lacking[:12])
    return RunError(
        f"no seed of the study has every fold finished: {named}{', …' if len(lacking) > 12 else ''}",
        expected="a seed with every fold: the seeds are compared on the same cases",
        where=str(path),
        fix=f"featstore train-head --resume {path}",
    )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
