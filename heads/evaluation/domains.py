"""Leave one environment out: what methods are worth on an environment that they have never seen.

Every environment is held out once. Intervals are percentiles of resampled images, drawn within each
environment, the same ones for both methods and all seeds; a metric of several seeds is the mean of theirs.
They say how sure the numbers are of these environments and these trainings. Other environments, and other
seeds, may differ by more: the differences seed by seed stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.cohort.tables import write_csv
from heads.evaluation.metrics import (
    BLOCK,
    LEVEL,
    Estimate,
    Floats,
    Ints,
    evaluate,
    interval_of,
    resample,
    weighted_statistics,
)

METHODS = ("vae", "erm")
METRICS = ("accuracy", "balanced_accuracy", "auc")
MEAN = "mean over environments"
_TITLES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auc": "AUC"}


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What the methods said of an environment that was held out.

    Attributes:
        environment: Its name.
        labels: (N,) class indices of its images.
        probabilities: By method, (N, C) of every seed.
    """

    environment: str
    labels: Ints
    probabilities: Mapping[str, Sequence[Floats]]


@dataclass(frozen=True)
class DomainRow:
    """One metric on one environment, or its mean over all.

    Attributes:
        environment: Its name, or `MEAN`.
        images: How many it has.
        metric: One of `METRICS`.
        values: By method.
        difference: VAE − ERM, paired.
        by_seed: The difference of each seed alone; NaN where undefined.
    """

    environment: str
    images: int
    metric: str
    values: dict[str, Estimate]
    difference: Estimate
    by_seed: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class DomainTable:
    """What `leave_one_out_table` found.

    Attributes:
        rows: Environment by environment, metric by metric; the means over environments last.
        class_names: In the order of the indices.
        seeds: How many trainings each number is the mean of.
        resamples: Of the bootstrap.
    """

    rows: list[DomainRow]
    class_names: tuple[str, ...]
    seeds: int
    resamples: int

    def to_text(self) -> str:
        """A table; a difference whose interval lies on one side of 0 is marked."""
        wide = max(len(row.environment) for row in self.rows) + 2
        head = f"{'held out':{wide}}{'metric':20}{'VAE':>25}{'ERM':>25}   VAE − ERM"
        lines = [head]
        for row in self.rows:
            values = "".join(f"{_shown(row.values[method]):>25}" for method in METHODS)
            found = row.difference
            apart = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
            shown = _shown(found, "+") + " *" * apart
            if self.seeds > 1:
                shown += f"  ({', '.join(f'{value:+.3f}' for value in row.by_seed)})"
            lines.append(f"{row.environment:{wide}}{_TITLES[row.metric]:20}{values}   {shown}")
        lines.append(f"{LEVEL:.0%} intervals over images; *: the interval excludes 0")
        if self.seeds > 1:
            lines.append(f"means of {self.seeds} seeds; in parentheses each seed's own difference")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        rows = [
            {
                "environment": row.environment,
                "images": row.images,
                "metric": row.metric,
                **{method: row.values[method].to_json() for method in METHODS},
                "difference": row.difference.to_json(),
                "difference_by_seed": [None if np.isnan(value) else value for value in row.by_seed],
            }
            for row in self.rows
        ]
        return {
            "table": rows,
            "class_names": list(self.class_names),
            "seeds": self.seeds,
            "resamples": self.resamples,
            "interval": f"{LEVEL:.0%} percentile bootstrap over the images of each environment, paired",
        }

    def write_csv(self, path: Path) -> None:
        """One row an environment and metric."""
        parts = (*METHODS, "difference")
        columns = ["environment", "images", "metric"]
        columns += [f"{part}{end}" for part in parts for end in ("", "_low", "_high")]
        rows: list[list[object]] = []
        for row in self.rows:
            found = [*(row.values[method] for method in METHODS), row.difference]
            numbers = [value for each in found for value in (each.value, each.low, each.high)]
            shown = ["" if number is None else number for number in numbers]
            rows.append([row.environment, row.images, row.metric, *shown])
        write_csv(path, columns, rows)


def _shown(each: Estimate, sign: str = "") -> str:
    if each.value is None:
        return "undefined"
    if each.low is None:
        return f"{each.value:{sign}.3f}"
    return f"{each.value:{sign}.3f} [{each.low:{sign}.3f}, {each.high:{sign}.3f}]"


@dataclass(frozen=True, eq=False)
class _Drawn:
    """A metric of all images: of each seed (K,), and the seeds' mean of every resample (R,)."""

    seeds: Floats
    resampled: Floats

    def less(self, other: _Drawn) -> _Drawn:
        return _Drawn(self.seeds - other.seeds, self.resampled - other.resampled)

    def estimate(self, absent: list[str]) -> Estimate:
        return interval_of(
            float(self.seeds.mean()), [self.resampled] if len(self.resampled) else [], absent
        )


def leave_one_out_table(
    held_out: Sequence[HeldOut], class_names: Sequence[str], resamples: int = 2000, seed: int = 0
) -> DomainTable:
    """Both methods on every environment, their difference, and the means over environments.

    Args:
        held_out: One an environment, with as many seeds for each method.
        class_names: Of two, the last is the positive class.
        resamples: Bootstrap resamples; 0 for no intervals.
        seed: Of the resamples.

    Raises:
        EvaluationError: Probabilities that are none.
    """
    generator = np.random.default_rng(seed)
    drawn = [_draw(each, class_names, resamples, generator) for each in held_out]
    rows, missing = [], list[str]()
    for each, found in zip(held_out, drawn, strict=True):
        absent = [name for c, name in enumerate(class_names) if c not in each.labels]
        missing += [f"{name} in {each.environment}" for name in absent]
        rows += _rows(each.environment, len(each.labels), found, absent)
    means = {key: _mean([found[key] for found in drawn]) for key in drawn[0]}
    rows += _rows(MEAN, sum(len(each.labels) for each in held_out), means, missing)
    seeds = len(next(iter(held_out[0].probabilities.values())))
    return DomainTable(rows, tuple(class_names), seeds, resamples)


def _draw(
    each: HeldOut, class_names: Sequence[str], resamples: int, generator: np.random.Generator
) -> dict[tuple[str, str], _Drawn]:
    """Every metric by method and name, on one environment."""
    n, size = len(each.labels), max(1, BLOCK // len(each.labels))
    for p in (p for seeds in each.probabilities.values() for p in seeds):
        evaluate(each.labels, p, class_names, resamples=0)  # refuses what are no probabilities

    def by_seed(weights: Floats) -> dict[tuple[str, str], Floats]:
        """(K, R) under every weighting of the images."""
        values = {
            method: [weighted_statistics(weights, each.labels, p, p.argmax(axis=1)) for p in seeds]
            for method, seeds in each.probabilities.items()
        }
        return {
            (method, name): np.stack([one[name] for one in several])
            for method, several in values.items()
            for name in METRICS
        }

    point = by_seed(np.ones((1, n)))
    resampled: dict[tuple[str, str], list[Floats]] = {key: [np.empty(0)] for key in point}
    for start in range(0, resamples, size):
        for key, found in by_seed(resample(generator, min(size, resamples - start), n)).items():
            resampled[key].append(found.mean(axis=0))
    return {key: _Drawn(point[key][:, 0], np.concatenate(resampled[key])) for key in point}


def _rows(
    environment: str, images: int, found: Mapping[tuple[str, str], _Drawn], absent: list[str]
) -> list[DomainRow]:
    rows = []
    for metric in METRICS:
        values = {method: found[method, metric].estimate(absent) for method in METHODS}
        less = found["vae", metric].less(found["erm", metric])
        difference, seeds = less.estimate(absent), tuple(less.seeds.tolist())
        rows.append(DomainRow(environment, images, metric, values, difference, seeds))
    return rows


def _mean(several: Sequence[_Drawn]) -> _Drawn:
    """The mean over environments, each drawn by itself; undefined where one is."""
    seeds: Floats = np.mean([each.seeds for each in several], axis=0)
    return _Drawn(seeds, np.mean([each.resampled for each in several], axis=0))
