"""A study's tables and numbers, out of its trainings' results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from featstore.cohort.names import natural_key
from heads.evaluation.metrics import Estimate, Metrics
from heads.evaluation.study_results import PARTS, CasePredictions, StudyResults

METRICS = ("auc", "average_precision", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity",
           "brier", "ece", "log_loss")  # fmt: skip
UNDEFINED = "undefined"


def study_table(results: StudyResults) -> pd.DataFrame:
    """One row a training: epochs, losses, and every metric of the best and the last epoch on test."""
    recalls = [f"recall_{name}" for name in results.class_names]
    names = [f"{kind}_{name}" for kind in PARTS.values() for name in ("loss", *METRICS, *recalls)]
    columns = [
        "fold",
        "seed",
        "status",
        "epochs",
        "best_epoch",
        "best_val_loss",
        "seconds",
        *names,
        "error",
    ]
    rows = []
    for each in results.trainings:
        row: dict[str, Any] = {"fold": each.fold, "seed": each.seed, "status": each.status}
        row["error"] = each.error
        if each.results is not None and each.metrics is not None:
            train = each.results["train"]
            row |= {name: train[name] for name in ("epochs", "best_epoch", "best_val_loss")}
            row["seconds"] = round(each.seconds or 0.0, 3)
            for part, kind in PARTS.items():
                row[f"{kind}_loss"] = each.results[part]["test_loss"]
                found = each.metrics[part]
                row |= {f"{kind}_{name}": found[name]["value"] for name in METRICS}
                row |= {f"{kind}_recall_{name}": e["value"] for name, e in found["recall"].items()}
        rows.append(row)
    return pd.DataFrame(rows, columns=columns, dtype=object)


def over_trainings(results: StudyResults) -> dict[str, dict[str, Any]]:
    """Mean and spread of every metric over the finished trainings, of the best and of the last epoch."""
    table = study_table(results)
    table = table[table["status"] == "finished"]
    kinds = PARTS.values()
    return {
        kind: {
            name.removeprefix(f"{kind}_"): _mean_and_sd(table[name].tolist())
            for name in table.columns
            if name.startswith(f"{kind}_") and name not in ("best_epoch", "best_val_loss")
        }
        for kind in kinds
    }


def over_seeds(pooled: Mapping[int, Metrics]) -> dict[str, Any]:
    """Mean and spread over the seeds of their pooled metrics."""
    found = {n: _mean_and_sd([getattr(metrics, n).value for metrics in pooled.values()]) for n in METRICS}
    return found if pooled else {}


def _mean_and_sd(values: Sequence[Any]) -> dict[str, Any]:
    """Mean, sample standard deviation, and of how many; where undefined, a value is left out."""
    numbers = [float(value) for value in values if value is not None and value != UNDEFINED]
    if not numbers:
        return {"mean": UNDEFINED, "sd": None, "n": 0}
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)), "sd": sd, "n": len(numbers)}


def per_split(results: StudyResults) -> pd.DataFrame:
    """Least, median and largest test AUC, accuracy and loss of every fold, each with its seed.

    The median is the lower of the two middle ones, so that it, too, is one training's.
    """
    table = study_table(results)
    rows = []
    for fold in dict.fromkeys(table["fold"]):
        mine = table[(table["fold"] == fold) & (table["status"] == "finished")]
        for metric in ("auc", "accuracy", "loss"):
            pairs = zip(mine[f"best_{metric}"], mine["seed"], strict=True)
            found = sorted((float(value), seed) for value, seed in pairs if value != UNDEFINED)
            row: dict[str, Any] = {"fold": fold, "metric": metric, "n": len(found)}
            for name, at in (("min", 0), ("median", (len(found) - 1) // 2), ("max", len(found) - 1)):
                row[name], row[f"{name}_seed"] = found[at] if found else (UNDEFINED, None)
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def out_of_fold(results: StudyResults) -> pd.DataFrame:
    """Every test prediction of every training's best epoch."""
    table = results.table
    order = sorted(range(len(table)), key=lambda i: (table["seed"][i], natural_key(table["case_id"][i])))
    table = table.iloc[order]
    names, probabilities = results.class_names, results.probability_columns
    found = {"case_id": table["case_id"], "true_label": [names[c] for c in table["true"]]}
    found |= {"fold": table["fold"], "seed": table["seed"]}
    found |= {f"prob_{names[c]}": table[p] for c, p in enumerate(probabilities)}
    found |= {"predicted_label": [names[c] for c in table["called"]]}
    found |= {"correct": (table["called"] == table["true"]).astype(int)}
    return pd.DataFrame(found)


def per_case(results: StudyResults) -> pd.DataFrame:
    """How often each case was called right, and how probable its true class was, the least likely first."""
    columns = ["case_id", "true_label", "right", "of", "min", "q1", "median", "q3", "max", "mean"]
    table = results.table
    own = own_probability(results)
    rows = []
    for case, mine in table.groupby("case_id", sort=False):
        p = own.loc[mine.index].to_numpy()
        right = int((mine["called"] == mine["true"]).sum())
        name = results.class_names[int(mine["true"].iloc[0])]
        quartiles = np.quantile(p, [0, 0.25, 0.5, 0.75, 1]).tolist()
        rows.append([str(case), name, right, len(mine), *quartiles, float(p.mean())])
    rows.sort(key=lambda row: (results.class_names.index(row[1]), row[-1], natural_key(row[0])))
    return pd.DataFrame(rows, columns=columns)


def own_probability(results: StudyResults) -> pd.Series:
    """The probability of the true class, row by row of the results' table."""
    p, true = results.table[results.probability_columns], results.table["true"]
    values = p.to_numpy(np.float64)[np.arange(len(p)), true.to_numpy(np.int64)]
    return pd.Series(values, index=p.index)


def ensemble_table(whole: CasePredictions, names: Sequence[str]) -> pd.DataFrame:
    """The mean probability over the seeds, case by case."""
    found: dict[str, Any] = {"case_id": whole.case_ids, "true_label": [names[c] for c in whole.labels]}
    found |= {"predictions": whole.count}
    found |= {f"prob_{name}": whole.probabilities[:, c] for c, name in enumerate(names)}
    found |= {"predicted_label": [names[c] for c in whole.called]}
    return pd.DataFrame(found | {"correct": (whole.called == whole.labels).astype(int)})


def pooled_table(
    results: StudyResults, pooled: Mapping[int, Metrics], ensemble: Metrics | None
) -> pd.DataFrame:
    """The pooled metrics of every seed and of their ensemble, with 95% intervals.

    ``trainings`` says how many of them each row is made of: of a seed that lacks a fold, fewer.
    """
    of = Counter(str(each.seed) for each in results.finished)
    of["ensemble"] = len(results.finished)
    columns = ["seed", "trainings", "cases"]
    columns += [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
    rows: list[dict[str, Any]] = []
    for seed, metrics in [*pooled.items(), ("ensemble", ensemble)]:
        if metrics is None:
            continue
        row: dict[str, Any] = {"seed": seed, "trainings": of[str(seed)], "cases": metrics.n}
        for name in METRICS:
            found: Estimate = getattr(metrics, name)
            row |= {name: UNDEFINED if found.value is None else found.value}
            row |= {f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows, columns=columns, dtype=object)
