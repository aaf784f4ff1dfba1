"""The gradient of one step of fine-tuning: patches seen, embedded, judged, and what they are to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _BatchNorm

from featstore.bags import Bag
from featstore.errors import ConfigError
from heads.config import TrainConfig
from heads.training.course import seeded
from heads.training.data import chunks, micro_batches
from heads.training.diagnostics import EpochLog
from heads.training.finetune_config import FinetuneConfig
from heads.training.finetune_data import augmentation_of
from heads.training.finetune_model import Following, Model, follows, halving
from heads.training.live import Sight, TwoPass, sight_of
from heads.training.live_bags import LiveBags, batch_of
from heads.training.objective import Objective
from heads.training.optimizer import autocast
from heads.training.ranks import Ranks

Plan = list[tuple[list[Bag], Sight]]


class Step:
    """Accumulates the gradient of a process's share of a step.

    Args:
        model: Backbone and head.
        bags: The cohort, live.
        objective: What is minimised.
        scaler: Of the loss.
        train: Of `heads.training.finetune_model.training_config`.
        settings: The section ``finetune``.
        ranks: The processes that train together.
        learns: Whether anything of the backbone does.
    """

    def __init__(
        self,
        model: Model,
        bags: LiveBags,
        objective: Objective,
        scaler: torch.amp.GradScaler,
        train: TrainConfig,
        settings: FinetuneConfig,
        ranks: Ranks,
        learns: bool,
    ) -> None:
        self._model, self._bags, self._objective, self._scaler = model, bags, objective, scaler
        self._train, self._settings, self._ranks, self._learns = train, settings, ranks, learns
        self._live = bags.live
        self._augmentation = augmentation_of(settings)
        moves, anew = learns and follows(settings), settings.batch_norm == "train"
        self.following = Following(model.head.standardize, anew) if moves else None

    @property
    def norms(self) -> list[_BatchNorm]:
        """BatchNorm layers that use and update statistics of the batch."""
        return [m for m in self._model.backbone.modules() if isinstance(m, _BatchNorm) and m.training]

    def plan(self, step: Sequence[Bag], epoch: int) -> Plan:
        """This process's share of a step: batches of the head, and what is looked at of them."""
        settings, seed = self._settings, (self._settings.seed, epoch)
        batches = chunks(self._ranks.share(step), int(self._train.batch_size))
        held, pixels = settings.pixel_mb << 20, self._bags.pixels
        plan = []
        for bags in (
            micro for batch in batches for micro in micro_batches(batch, self._train.patch_budget)
        ):
            sight = sight_of(self._live, pixels, bags, held, self._augmentation, seed, self._learns)
            plan.append((bags, sight))
        return plan

    def accumulate(
        self, plan: Plan, cases: int, pixels: Iterator[NDArray[np.uint8]], epoch: int, number: int
    ) -> tuple[EpochLog, torch.Tensor]:
        """The gradient of the plan, what was seen, and the loss; that is divided by the step's cases.

        Args:
            plan: What `plan` gave.
            cases: Of the whole step, in all processes.
            pixels: What the plan's sights ask for.
            epoch: From 0.
            number: Of the step in its epoch, from 0.

        Raises:
            OutOfMemory: Memory ran out; all is as it was before.
            ConfigError: BatchNorm has no statistics of a single number.
        """
        device, log = self._bags.device, EpochLog()
        schedule = self._model.head.schedule(epoch, self._train.epochs)
        summed = torch.zeros((), dtype=self._live.dtype, device=device)
        self._scaler.scale(summed)  # a process without a case must know its scale, too
        with self._undone(), halving():
            for micro, (bags, sight) in enumerate(plan):
                seed = self.seed(epoch, number, micro)
                passes = TwoPass(self._live, sight, pixels, seed) if self._learns else None
                features = self._live.embed(sight, pixels) if passes is None else passes.features
                if self.following is not None:
                    self.following.add(features)
                batch = batch_of(bags, features)
                with seeded(device, seed), autocast(device, self._train.amp):
                    output = self._model.head(batch, **schedule)
                terms = self._objective(output, batch, epoch)
                total = terms.total(cases)
                torch.autograd.backward(self._scaler.scale(total))
                if passes is not None:
                    passes.backward()
                summed += total.detach()
                log.add(output, batch, terms)
        return log, summed

    def seed(self, epoch: int, step: int, micro: int) -> int:
        """Of all that a micro-batch draws."""
        where = [self._settings.seed, epoch, step, self._ranks.rank, micro]
        return int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0] >> 1)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Should it fail, what is not a gradient is as it was: the step can be done again."""
        held = [{name: b.clone() for name, b in norm.named_buffers()} for norm in self.norms]
        try:
            yield
        except BaseException as error:
            for norm, buffers in zip(self.norms, held, strict=True):
                norm.load_state_dict(buffers, strict=False)
            if self.following is not None:
                self.following.forget()
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                raise ConfigError(
                    "BatchNorm has a single number a channel to take statistics of: one patch, one cell",
                    expected="two patches of a size at least, or larger ones",
                    where="finetune.batch_norm, finetune.chunk, backbone.resize",
                    fix="--batch-norm affine, or a larger --chunk",
                ) from error
            raise
