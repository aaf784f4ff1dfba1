"""What an epoch of training sees: which cases, in which order, which of their patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.bags import Bag, BagBatch
from featstore.errors import ConfigError
from featstore.resident import CaseBags
from featstore.sampling import cap_slices, limit_slices, sample_bag, sub_cases
from featstore.store import Store
from heads.config import TrainConfig
from heads.models.head import Head
from heads.models.standardize import Standardize, usable_deviation
from heads.training.optimizer import choose_amp


class Cohort(Protocol):
    """What epochs are drawn from: outlines of cases, and the store that knows their patches."""

    store: Store
    views: int

    @property
    def outlines(self) -> Mapping[str, Bag]:
        """By case."""


class Bags(Cohort, Protocol):
    """Cases whose embeddings can be had: from a cache, or from a backbone at work."""

    device: torch.device

    def batch(self, bags: Sequence[Bag]) -> BagBatch:
        """Bags laid end to end, with their embeddings."""


class TrainingBags:
    """The training cases' bags, sampled anew in every epoch.

    Slices above ``max_slices_per_stain`` and sub-cases are chosen once; which bags, their order, stains,
    caps and samples depend on the seed and the epoch alone, so that a resumed training sees what it would
    have seen.

    Args:
        bags: The cohort.
        cases: The training cases.
        config: Resolved (`heads.config.resolved`).
        class_names: In config order.

    Raises:
        ConfigError: Sub-cases are wanted of a class that there is not.
    """

    def __init__(
        self, bags: Cohort, cases: Sequence[str], config: TrainConfig, class_names: Sequence[str]
    ) -> None:
        self._config = config
        outlines = [bags.outlines[case] for case in cases]
        if config.max_slices_per_stain is not None:
            outlines = [limit_slices(bag, config.max_slices_per_stain, config.seed) for bag in outlines]
        if (sub := config.sub_cases) is not None:
            if strange := [name for name in sub.classes if name not in class_names]:
                raise ConfigError(
                    f"train.sub_cases names the class {strange[0]!r}",
                    expected=f"one of {', '.join(class_names)}",
                    where="train.sub_cases.classes",
                    fix="write the names of `classes:`",
                )
            wanted = {class_names.index(name) for name in sub.classes or class_names}
            split = [sub_cases(bag, sub.n, sub.by) if bag.label in wanted else [bag] for bag in outlines]
            outlines = [part for parts in split for part in parts]
        self.outlines = outlines
        self._views = bags.views if config.views else 1
        self._entropy: NDArray[np.float64] | None = None
        if config.sampling == "entropy":
            self._entropy = bags.store.table()["entropy"].to_numpy(np.float64)

    def epoch(self, epoch: int) -> list[Bag]:
        """The bags of an epoch (from 0), in the order in which they are learned from."""
        config = self._config
        rng = np.random.default_rng([config.seed, epoch])
        chosen = np.arange(len(self.outlines))
        if config.case_sampling == "balanced":
            chosen = balanced([bag.label or 0 for bag in self.outlines], rng)
        found = [self._sample(self.outlines[i], rng) for i in chosen[rng.permutation(len(chosen))]]
        if self._views == 1:
            return found
        return [replace(bag, view=rng.integers(self._views, size=len(bag))) for bag in found]

    def _sample(self, bag: Bag, rng: np.random.Generator) -> Bag:
        config = self._config
        if config.stain_dropout:
            bag = drop_stains(bag, config.stain_dropout, rng)
        if config.per_slice_cap is not None:
            bag = cap_slices(bag, config.per_slice_cap, rng)
        if config.sampling == "all" or config.sampling == "auto":
            return bag
        entropy = None if self._entropy is None else self._entropy[bag.rows]
        return sample_bag(bag, config.bag_size, config.sampling, rng, entropy)


def drop_stains(bag: Bag, probability: float, rng: np.random.Generator) -> Bag:
    """The bag without some of its stains: each is left out independently, but never all of them.

    Args:
        bag: A case, or part of one.
        probability: Of each stain, 0 to 1; if all would go, one stays, each as likely as the others.
        rng: A fresh draw a call.
    """
    kept = rng.random(len(bag.stains)) >= probability
    if not kept.any():
        kept[rng.integers(len(kept))] = True
    return bag if kept.all() else bag.take(np.repeat(np.repeat(kept, bag.stain_sizes), bag.slice_sizes))


def balanced(labels: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
    """As many members as there are, with the classes as equally often as whole numbers allow.

    Of N members of K classes each class gives N // K, and N mod K classes, drawn anew, one more. Within a
    class, all members come equally often, and those that are drawn anew once more than the others.

    Args:
        labels: (N,) class of every member; classes that do not occur have no share.
        rng: A fresh draw a call.

    Returns:
        (N,) indices of members, sorted; a rare class's come several times, a frequent one's not all.
    """
    label = np.asarray(labels)
    members = [np.flatnonzero(label == c) for c in np.unique(label)]
    shares = _evenly(len(label), len(members), rng)
    times = np.zeros(len(label), np.int64)
    for mine, share in zip(members, shares.tolist(), strict=True):
        times[mine] = _evenly(share, len(mine), rng)
    return np.repeat(np.arange(len(label)), times)


def _evenly(total: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(parts,) whole numbers that sum to ``total`` and differ by one at most; which are larger is drawn."""
    return total // parts + (rng.permutation(parts) < total % parts)


def chunks(bags: Sequence[Bag], size: int) -> Iterator[Sequence[Bag]]:
    """Runs of ``size`` bags; the last may be shorter."""
    for start in range(0, len(bags), size):
        yield bags[start : start + size]


def micro_batches(bags: Sequence[Bag], budget: int) -> Iterator[list[Bag]]:
    """Runs of bags with at most ``budget`` patches; a larger bag comes alone."""
    run: list[Bag] = []
    patches = 0
    for bag in bags:
        if run and patches + len(bag) > budget:
            yield run
            run, patches = [], 0
        run.append(bag)
        patches += len(bag)
    if run:
        yield run


def standardized_once(bags: CaseBags, head: Head, config: TrainConfig) -> CaseBags:
    """The cohort standardised, and rounded in bf16, as it would be in every step of a training.

    Where that is done on a CPU, by a head of our own, and what comes of it fits in memory beside the
    embeddings; elsewhere the cohort itself. Every step computes the same numbers either way.

    Args:
        bags: The cohort.
        head: Whose mean and deviation are set.
        config: Resolved (`heads.config.resolved`).
    """
    held, mean = bags.resident, head.standardize.mean
    if held is None or bags.device.type != "cpu":
        return bags
    low = torch.bfloat16 if choose_amp(config.amp, bags.device) == "bf16" else mean.dtype
    # What is derived from a head of ours may read the features themselves, and wants them as they are.
    if not head.projects_all or not type(head).__module__.startswith("heads.models."):
        return bags
    viewed = config.views and bags.views > 1
    if viewed or bags.bytes + held.numel() * low.itemsize > bags.memory:
        return bags
    return bags.with_standardized(head.standardize.lower(held, low))


def fit_standardize(standardize: Standardize, bags: CaseBags, cases: Sequence[str]) -> None:
    """Set mean and deviation, per feature, to those of all patches of the training cases.

    `usable_deviation` says what becomes of features that hardly vary.

    Args:
        standardize: Whose buffers are set.
        bags: The cohort.
        cases: The training cases.
    """
    count, total = 0, torch.zeros(len(standardize.mean), dtype=torch.float64)
    square = torch.zeros_like(total)
    shift = bags.features(cases[0])[0].double().cpu()  # against cancellation in the sum of squares
    for case in cases:
        features = bags.features(case).double().cpu() - shift
        count += len(features)
        total += features.sum(dim=0)
        square += features.square().sum(dim=0)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    standardize.mean.copy_(mean + shift)
    standardize.std.copy_(usable_deviation(std))
