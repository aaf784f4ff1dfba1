"""The same head trained on two stores: does what has changed matter for the question at hand?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.cohort.names import natural_sorted
from featstore.cohort.splits import Split
from featstore.errors import ConfigError
from featstore.store import Store
from featstore.store.ids import component
from featstore.store.records import newest_records
from heads.cohort import load_bags, read_cohort
from heads.config import Config, resolved
from heads.evaluation.compare import Comparison, Contender, Row, compare
from heads.evaluation.predict import predict
from heads.evaluation.study_results import CasePredictions
from heads.models.head import build_head, load_plugin
from heads.project import plugin_of, tell_unused
from heads.run import prepare, settled

_SEEDS = 2**32


@dataclass(frozen=True, eq=False)
class Downstream:
    """The head's results on A and on B, with the same settings, split and seeds.

    Attributes:
        head: Its name.
        seeds: Of the trainings.
        cases: How many are for training, validation and test.
        aucs: Test AUC of every seed, on A and on B; None where a class is missing.
        val_losses: The best validation loss of every seed, on A and on B.
        comparison: Of the test cases, the metrics of B against those of A (`compare`, with B as its
            first): means over the seeds, and their difference B − A.
    """

    head: str
    seeds: tuple[int, ...]
    cases: tuple[int, int, int]
    aucs: tuple[list[float | None], list[float | None]]
    val_losses: tuple[list[float], list[float]]
    comparison: Comparison

    def row(self, metric: str) -> Row:
        """One metric: its ``a`` is B's value, its ``b`` A's, its difference B − A."""
        return next(row for row in self.comparison.rows if row.metric == metric)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types, A first."""
        sides = {
            name: {"test_auc": aucs, "val_loss": losses, "mean_val_loss": float(np.mean(losses))}
            for name, aucs, losses in zip("ab", self.aucs, self.val_losses, strict=True)
        }
        metrics = {
            row.metric: {"a": row.b, "b": row.a, "difference": row.difference.to_json()}
            for row in self.comparison.rows
        }
        return {
            "head": self.head,
            "seeds": list(self.seeds),
            "cases": dict(zip(("train", "val", "test"), self.cases, strict=True)),
            **sides,
            "metrics": metrics,
            "interval": "95% percentile bootstrap of B − A, paired over test cases and seeds",
            "resamples": self.comparison.resamples,
        }


def checked(config: Config, project: Path, seeds: int) -> Config:
    """The config that heads are trained with; what no training can do is refused before the long work.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        seeds: How many trainings there will be.

    Raises:
        ConfigError: There is no such head, its settings do not suit it, or a number is out of range.
    """
    if not 1 <= seeds <= _SEEDS - config.train.seed:
        raise ConfigError(
            f"--seeds is {seeds}",
            expected="how many trainings on each store, 1 or more; seeds lie below 2**32",
            where="--seeds, train.seed",
            fix="--seeds 5",
        )
    config = resolved(config)
    load_plugin(plugin_of(config, project))
    build_head(config.head, 8, 2)
    return config


def restricted(store: Store, cases: Sequence[str]) -> Store:
    """The store as if it had these cases alone."""
    kept = {component(case) for case in cases}
    newest = {name: number for name, number in newest_records(store.path).items() if name in kept}
    return Store(store.path, store.spec, newest)


def train_both(
    config: Config,
    project: Path,
    stores: tuple[Store, Store],
    seeds: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Downstream:
    """Train the head of the config on both stores, in memory; nothing is written.

    Args:
        config: Of `checked`; ``train.seed`` is the first seed, the others follow it.
        project: The folder that relative paths start from.
        stores: A and B; cases that only one of them has take no part.
        seeds: How many trainings on each.
        tell: Called with remarks and after every training.

    Raises:
        FeatstoreError: Labels or split cannot be used; TrainingError if a training fails.
    """
    shared = natural_sorted(set(stores[0].cases()) & set(stores[1].cases()))
    both = (restricted(stores[0], shared), restricted(stores[1], shared))
    names, labels, split = read_cohort(config, project, both[0], tell)
    tell_unused(config, tell)
    aucs: tuple[list[float | None], list[float | None]] = ([], [])
    losses: tuple[list[float], list[float]] = ([], [])
    contenders = []
    for store, letter, auc, loss in zip(both, "AB", aucs, losses, strict=True):
        found = _train(config, store, letter, names, labels, split, seeds, tell)
        for predictions, best in found:
            value = predictions.metrics(names, 0).auc.value
            auc.append(value)
            loss.append(best)
        seen = [predictions for predictions, _ in found]
        contenders.append(Contender(store.path, "a store", tuple(names), seen))
    first = config.train.seed
    return Downstream(
        config.head.name,
        tuple(range(first, first + seeds)),
        (len(split.train), len(split.val), len(split.test)),
        aucs,
        losses,
        compare(contenders[1], contenders[0], config.runs.resamples),
    )


def _train(
    config: Config,
    store: Store,
    letter: str,
    names: Sequence[str],
    labels: dict[str, int],
    split: Split,
    seeds: int,
    tell: Callable[[str], None],
) -> list[tuple[CasePredictions, float]]:
    """Of every seed: the test cases by the epoch with the lowest validation loss, and that loss."""
    bags = load_bags(config, store, labels, tell)
    found = []
    for seed in range(config.train.seed, config.train.seed + seeds):
        mine = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        mine = settled(mine, bags.device)
        training = prepare(mine, {"dim": store.spec.dim, "class_names": list(names)}, bags, split)
        training.run()
        head = build_head(mine.head, store.spec.dim, len(names))
        head.load_state_dict(training.best)
        seen = predict(head, bags, split.test, mine.train, training.class_weights)
        once = np.ones(len(seen.case_ids), np.int64)
        progress = training.progress
        kept = CasePredictions(seen.case_ids, seen.labels, seen.probabilities, None, once)
        found.append((kept, progress.best_val_loss))
        epochs = f"best epoch {progress.best_epoch} of {progress.epoch}"
        loss = f"validation loss {progress.best_val_loss:.4f}"
        tell(f"{letter}, seed {seed}: {mine.head.name}, {epochs}, {loss}")
    return found
