"""What a study's trainings found, read from their files alone, and laid together case by case."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from featstore.cohort.names import natural_sorted
from featstore.errors import first_line
from heads.config import RunsConfig
from heads.evaluation.metrics import Metrics, evaluate
from heads.evaluation.runs import RunError, RunFolder
from heads.evaluation.studies import Status, Study

PARTS = {"test": "best", "test_last": "last"}


@dataclass(frozen=True)
class TrainingResult:
    """One training of a study.

    Attributes:
        fold: From 0.
        seed: Of the training.
        status: How far it is.
        error: The first line of what went wrong, or of what is damaged.
        results: Its ``results.json``, if it is finished.
        metrics: Its ``metrics.json``, if it is finished.
        seconds: What its epochs took, if it is finished.
    """

    fold: int
    seed: int
    status: Status
    error: str = ""
    results: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    seconds: float | None = None


@dataclass(frozen=True, eq=False)
class CasePredictions:
    """Of N different cases and C classes.

    Attributes:
        case_ids: N case ids, in natural order.
        labels: (N,) true class indices.
        probabilities: (N, C).
        threshold: (N,) from each case's validation cases; None: the most probable class.
        count: (N,) how many predictions each case's probabilities are the mean of.
    """

    case_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    threshold: NDArray[np.float64] | None
    count: NDArray[np.int64]

    @property
    def called(self) -> NDArray[np.int64]:
        """(N,) predicted class indices."""
        return called(self.probabilities, self.threshold)

    def metrics(self, class_names: Sequence[str], resamples: int) -> Metrics:
        """Each with a bootstrap interval over the cases."""
        return evaluate(
            self.labels, self.probabilities, class_names, threshold=self.threshold, resamples=resamples
        )


def called(probabilities: NDArray[np.float64], threshold: NDArray[np.float64] | None) -> NDArray[np.int64]:
    """(N,) class indices: the most probable class, the first of equals, or by the threshold."""
    if threshold is None:
        return np.asarray(probabilities.argmax(axis=1), np.int64)
    return (probabilities[:, 1] >= threshold).astype(np.int64)


@dataclass(frozen=True)
class StudyResults:
    """What all trainings found.

    Attributes:
        class_names: In config order.
        trainings: In the order of their turn.
        table: One row a test case and finished training, of the best epoch: ``case_id``, ``true``,
            ``fold``, ``seed``, ``called``, ``threshold`` (NaN: none), ``p0`` … ``pC-1``.
    """

    class_names: tuple[str, ...]
    trainings: list[TrainingResult]
    table: pd.DataFrame

    @property
    def finished(self) -> list[TrainingResult]:
        """The trainings that are."""
        return [each for each in self.trainings if each.status == "finished"]

    @property
    def whole_seeds(self) -> list[int]:
        """The seeds whose every fold is finished: these alone are of the same cases."""
        lacking = {each.seed for each in self.trainings if each.status != "finished"}
        seeds = dict.fromkeys(each.seed for each in self.trainings)
        return [seed for seed in seeds if seed not in lacking]

    @property
    def probability_columns(self) -> list[str]:
        """Of `table`."""
        return [f"p{c}" for c in range(len(self.class_names))]

    def per_seed(self) -> dict[int, CasePredictions]:
        """The test cases of a seed's folds together; one that is in several folds counts once."""
        return {int(str(seed)): self.mean(rows) for seed, rows in self.table.groupby("seed", sort=True)}

    def mean(self, rows: pd.DataFrame) -> CasePredictions:
        """The mean probability of every case over these rows of `table`, and the mean threshold."""
        columns = [*self.probability_columns, "threshold"]
        grouped = rows.groupby("case_id", sort=False, observed=True)
        cases = natural_sorted(rows["case_id"])
        mean = grouped[columns].mean().loc[cases]
        threshold = mean["threshold"].to_numpy(np.float64)
        return CasePredictions(
            tuple(cases),
            np.asarray(grouped["true"].first().loc[cases], np.int64),
            mean[self.probability_columns].to_numpy(np.float64),
            None if np.isnan(threshold).all() else threshold,
            np.asarray(grouped.size().loc[cases], np.int64),
        )


def read_results(study: Study) -> StudyResults:
    """Read what the trainings of a study have written; one whose files are damaged is left out, and named.

    Raises:
        RunError: Trainings do not belong together.
    """
    names = tuple(study.about["class_names"])
    trainings = [_result(study, fold, seed) for fold, seed in study.trainings]
    rows = [_rows(each, names) for each in trainings if each.status == "finished"]
    columns = ["case_id", "true", "fold", "seed", "called", "threshold"]
    columns += [f"p{c}" for c in range(len(names))]
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)
    if strange := _strange(table):
        raise RunError(
            strange,
            expected="trainings of one study",
            where=str(study.folder.path),
            fix="train the strange ones again: remove their folders, then train-head --resume",
        )
    return StudyResults(names, trainings, table)


def checked_status(study: Study, fold: int, seed: int) -> Status:
    """How far a training is, by what its files say: one that cannot be read is damaged."""
    return _result(study, fold, seed).status


def left(study: Study, among: Sequence[tuple[int, int]] | None = None) -> dict[tuple[int, int], Status]:
    """The trainings that are not finished, in the order of their turn, and how far they are.

    Args:
        study: The study.
        among: Folds and seeds that are looked at; all by default.
    """
    wanted = study.trainings if among is None else among
    found = {each: checked_status(study, *each) for each in wanted}
    return {each: status for each, status in found.items() if status != "finished"}


def _result(study: Study, fold: int, seed: int) -> TrainingResult:
    status = study.folder.status(fold, seed)
    if status != "finished":
        error = study.folder.error(fold, seed) if status == "failed" else ""
        return TrainingResult(fold, seed, status, error)
    try:
        return _finished(study.folder.training(fold, seed), fold, seed, tuple(study.about["class_names"]))
    except RunError as error:
        return TrainingResult(fold, seed, "damaged", first_line(error))


def _strange(table: pd.DataFrame) -> str:
    """Why these trainings cannot be of one study; empty if they can."""
    for case, labels in table.groupby("case_id")["true"]:
        if labels.nunique() > 1:
            return f"case {case} has different true labels in different trainings"
    for fold, rows in table.groupby("fold"):
        (first, expected), *others = rows.groupby("seed")["case_id"].agg(frozenset).items()
        for seed, cases in others:
            if differ := natural_sorted(cases ^ expected):
                return (
                    f"fold {fold}: seeds {first} and {seed} have different test cases, such as {differ[0]}"
                )
    lacking = table[table["threshold"].isna()]
    if 0 < len(lacking) < len(table):
        fold, seed = lacking.iloc[0][["fold", "seed"]]
        return f"fold {fold}, seed {seed} has no threshold, and others have one"
    return ""


def tell_not_used(
    given: RunsConfig,
    own: RunsConfig,
    path: Path,
    tell: Callable[[str], None],
    names: Sequence[str] = ("threshold", "calibration"),
) -> None:
    """Tell of settings that are given now, and that results which are only read cannot follow.

    Args:
        given: The settings given now.
        own: Those that the results were made with.
        path: The run or study, for the reader.
        tell: Called with remarks.
        names: The settings that are looked at.
    """
    for name in names:
        now, then = (json.dumps(getattr(each, name)).strip('"') for each in (given, own))
        if name in given.model_fields_set and now != then:
            tell(
                f"warning: runs.{name} is {now}, but the results of {path} were made with {then}: not used"
            )


def _finished(run: RunFolder, fold: int, seed: int, names: tuple[str, ...]) -> TrainingResult:
    path = run.results
    try:
        results = read_run_results(run, names)
        path = run.path / "metrics.json"
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(metrics[part]["auc"]["value"], float | int | str) for part in PARTS):
            raise ValueError("it lacks metrics")
        path = run.history
        seconds = float(pd.read_csv(path)["seconds"].sum())
        path = run.path / "predictions.csv"
        if pd.read_csv(path)["true_label"].size != len(results["test"]["case_ids"]):
            raise ValueError("it has other cases than results.json")
        path = run.best
        with safe_open(path, "np"):  # its header, and whether it is as long as that says
            pass
    except SafetensorError as error:
        raise _damaged(path, error) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error
    return TrainingResult(fold, seed, "finished", "", results, metrics, seconds)


def read_run_results(run: RunFolder, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What `results.json` of a finished run says.

    Raises:
        RunError: It is damaged, or of other classes than ``names``.
    """
    try:
        results = json.loads(run.results.read_text(encoding="utf-8"))
        for part in PARTS:
            test = results[part]
            p, n = np.asarray(test["prediction_probs"], np.float64), len(test["case_ids"])
            if p.shape != (n, len(test["class_names"])) or not n == len(test["true_labels"]) > 0:
                raise ValueError("its cases, labels and probabilities do not belong together")
            if names is not None and list(names) != test["class_names"]:
                raise ValueError(f"it is of the classes {', '.join(map(str, test['class_names']))}")
        if not isinstance(results["train"]["epochs"], int):
            raise ValueError("it does not say how many epochs there were")
        return dict(results)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(run.results, error) from error


def _damaged(path: Any, error: Exception) -> RunError:
    return RunError(
        f"{path.name} cannot be read: {type(error).__name__}: {error}",
        expected="the file as the training wrote it",
        where=str(path),
        fix="have it written again: featstore evaluate RUN; or train again",
    )


def _rows(training: TrainingResult, names: Sequence[str]) -> pd.DataFrame:
    test = (training.results or {})["test"]
    p = np.asarray(test["prediction_probs"], np.float64)
    threshold = np.nan if test["threshold"] is None else float(test["threshold"])
    whole = {
        "case_id": [str(case) for case in test["case_ids"]],
        "true": np.asarray(test["true_labels"], np.int64),
        "fold": training.fold,
        "seed": training.seed,
        "called": called(p, None if np.isnan(threshold) else np.full(len(p), threshold)),
        "threshold": threshold,
    }
    return pd.DataFrame(whole | {f"p{c}": p[:, c] for c in range(len(names))})
