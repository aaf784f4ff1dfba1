"""What an epoch of fine-tuning sees: the run's order of cases, and of each case a budget of patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.augmentation import Augmentation
from featstore.bags import Bag, BagBatch
from featstore.errors import ConfigError
from featstore.resident import CaseBags
from heads.config import TrainConfig
from heads.evaluation.predict import predict
from heads.models.head import Head
from heads.models.outputs import HeadOutput, effective_attention
from heads.training.data import Cohort, TrainingBags
from heads.training.finetune_config import FinetuneConfig


class DrawnBags:
    """The training cases' bags; every epoch sees at most ``finetune.patches_per_case`` patches of each.

    Args:
        bags: The cohort.
        cases: The training cases.
        train: Resolved; order of cases, sub-cases and lost stains are as in training a head.
        settings: How many patches, and how they are drawn.
        class_names: In config order.
        attention: (P,) of every training case's patches in the outline's order, if they are drawn by it.
    """

    def __init__(
        self,
        bags: Cohort,
        cases: Sequence[str],
        train: TrainConfig,
        settings: FinetuneConfig,
        class_names: Sequence[str],
        attention: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        self._bags = TrainingBags(bags, cases, train, class_names)
        self._patches, self._seed = settings.patches_per_case, settings.seed
        self._weights: NDArray[np.float64] | None = None
        if attention is not None:
            last = max(int(bags.outlines[case].rows[-1]) for case in cases)
            self._weights = np.zeros(last + 1)
            for case in cases:
                self._weights[bags.outlines[case].rows] = attention[case]

    @property
    def outlines(self) -> list[Bag]:
        """What is learned from, whole."""
        return self._bags.outlines

    def epoch(self, epoch: int) -> list[Bag]:
        """The bags of an epoch (from 0), in the order in which they are learned from."""
        rng = np.random.default_rng([self._seed, epoch, 1])
        whole = self._bags.epoch(epoch)
        if self._patches is None:
            return whole
        return [
            draw(bag, self._patches, rng, None if self._weights is None else self._weights[bag.rows])
            for bag in whole
        ]


def draw(bag: Bag, count: int, rng: np.random.Generator, weights: NDArray[np.float64] | None = None) -> Bag:
    """At most ``count`` patches of a case, without replacement.

    Args:
        bag: One case.
        count: At least 1.
        rng: A fresh draw a call.
        weights: (P,) ≥ 0: patches are drawn one after the other, each in proportion to its weight among
            those that are left; None: all alike.

    Source: Efraimidis and Spirakis 2006: the ``count`` smallest of E/w, E exponentially distributed.
    """
    if len(bag) <= count:
        return bag
    keys = rng.exponential(size=len(bag))
    if weights is not None:
        # What has no weight at all comes last, at random.
        keys = keys / np.maximum(weights, np.finfo(np.float32).tiny)
    chosen = np.zeros(len(bag), bool)
    chosen[np.argpartition(keys, count - 1)[:count]] = True
    return bag.take(chosen)


def attention_of(
    head: Head, bags: CaseBags, cases: Sequence[str], train: TrainConfig
) -> dict[str, NDArray[np.float64]]:
    """The attention of a head to the cached patches of cases, by case: what ``attended`` draws by.

    Args:
        head: As the run left it.
        bags: The cached embeddings.
        cases: Of which.
        train: The run's.

    Raises:
        ConfigError: The head attends to nothing.
    """
    found: dict[str, NDArray[np.float64]] = {}

    def observe(batch: BagBatch, output: HeadOutput) -> None:
        effective = effective_attention(output, batch)
        if effective is None:
            raise ConfigError(
                "finetune.sampling is attended, but the run's head has no attention",
                expected="random, or a run of a head with attention",
                where="finetune.sampling",
                fix="--sampling random",
            )
        parts = torch.split(effective.double().cpu(), batch.case_patch_offsets.diff().tolist())
        found.update({c: p.numpy() for c, p in zip(batch.case_ids, parts, strict=True)})

    predict(head, bags, cases, train, observe=observe)
    return found


def augmentation_of(settings: FinetuneConfig) -> Augmentation | None:
    """What is done to the patches in training; None: nothing."""
    if not settings.augment:
        return None
    return Augmentation(
        least_area=settings.augment_area,
        flip=settings.augment_flip,
        rotate=settings.augment_rotate,
        jitter=settings.augment_jitter,
    )
