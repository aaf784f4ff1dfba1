"""The training loop: epochs of steps, validation, early stopping, and a state to resume from."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featstore.bags import Bag
from featstore.cohort.splits import Split
from featstore.errors import ConfigError
from featstore.resident import CaseBags
from heads.config import TrainConfig
from heads.models.head import Fit, Head
from heads.training.course import Course, Progress, seeded
from heads.training.data import TrainingBags, chunks, fit_standardize, micro_batches, standardized_once
from heads.training.diagnostics import EpochLog, mean_norm
from heads.training.objective import Objective, make_class_weights
from heads.training.optimizer import (
    autocast,
    check_solvable,
    clip_gradient,
    make_optimizer,
    make_scaler,
    make_scheduler,
)


class Training(Course):
    """Trains a head on the training cases and watches the validation cases.

    Whatever an epoch draws (order, samples, dropout) depends on the seed and its number alone, so
    that a training that was interrupted and resumed equals one that was not.

    Args:
        head: As drawn from the seed; trained in place.
        bags: The cohort.
        split: Which cases are for what; the test cases are never looked at.
        config: Resolved (`heads.config.resolved`).
        class_names: In config order.

    Raises:
        ConfigError: The settings do not suit the head, the cases or the device.
    """

    def __init__(
        self, head: Head, bags: CaseBags, split: Split, config: TrainConfig, class_names: Sequence[str]
    ) -> None:
        super().__init__(config)
        self.split = split
        self.head = head.to(bags.device)
        labels = [bags.outlines[case].label or 0 for case in split.train]
        if len(set(labels)) < 2:
            raise ConfigError(
                f"all {len(labels)} training cases are of class {class_names[labels[0]]}",
                expected="training cases of two classes or more",
                where="the split, labels.file, classes",
                fix="split again, or check `classes:` and the labels",
            )
        self.data = TrainingBags(bags, split.train, config, class_names)
        # Balanced are the bags that are learned from, sub-cases too.
        seen = [bag.label or 0 for bag in self.data.outlines]
        weights = make_class_weights(config, seen, class_names)
        self.class_weights = None if weights is None else weights.to(bags.device)
        self.objective = Objective(config, head, self.class_weights)
        if config.standardize == "train":
            fit_standardize(self.head.standardize, bags, split.train)
        self.bags = standardized_once(bags, self.head, config)
        check_solvable(self.head, config)
        self.optimizer = make_optimizer(self.head, config)
        self._parameters = list(self.head.parameters())
        self.scheduler = None if self.head.solved else make_scheduler(self.optimizer, config)
        self.ema: AveragedModel | None = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.ema = AveragedModel(self.head, multi_avg_fn=average, use_buffers=True)
        self.scaler = make_scaler(bags.device, config)
        self.good: dict[str, Any] = {}
        self._stop: Sequence[int] = ()

    @property
    def model(self) -> Head:
        """What is validated and kept: the moving average where there is one, else the head."""
        return self.head if self.ema is None else self.ema.module  # type: ignore[return-value]

    def kept(self) -> Mapping[str, torch.Tensor]:
        """The weights that are validated."""
        return self.model.state_dict()

    def run(
        self,
        after_epoch: Callable[[Training], None] = lambda training: None,
        stop: Sequence[int] = (),
    ) -> None:
        """Train until finished, or until ``stop`` is no longer empty.

        Args:
            after_epoch: Called after every epoch: to save, to show.
            stop: Signals received so far; looked at between steps. An epoch that is not whole is given up,
                and the training is where it was before.

        Raises:
            TrainingError: The loss is no longer a number.
        """
        self._stop = stop
        if not self.good:
            self.good = self._copied_state()
        while not self.finished and not stop:
            before = self.progress.epoch
            self._epoch()
            if self.progress.epoch == before:
                self.load_state(self.good)
                return
            after_epoch(self)

    def _epoch(self) -> None:
        progress, start = self.progress, time.perf_counter()
        lr = math.nan if self.head.solved else float(self.optimizer.param_groups[0]["lr"])
        schedule = self.head.schedule(progress.epoch, self.config.epochs)
        row = {"epoch": progress.epoch + 1, "lr": lr, **schedule}
        # A seed of its own for every epoch, and the caller's chance left as it was.
        with seeded(self.bags.device, self.config.seed * 1_000_003 + progress.epoch):
            log, norms = self.learn(self.data.epoch(progress.epoch), schedule)
        if self._stop:
            return
        size = int(self.config.batch_size)
        row["grad_norm"] = mean_norm(norms)
        row |= {f"train_{name}": value for name, value in log.summary(size).items()}
        row |= {f"val_{name}": value for name, value in self.validate(self.split.val).summary(size).items()}
        row["seconds"] = time.perf_counter() - start
        self.conclude(row)
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(row["val_cross_entropy"])
        elif self.scheduler is not None:
            self.scheduler.step()
        self.good = self._copied_state()  # should the next epoch diverge, this one can still be saved

    def _copied_state(self) -> dict[str, Any]:
        state = self.state()
        best = state.pop("best")  # which is replaced, never changed
        return {**copy.deepcopy(state), "best": best}

    def learn(
        self, epoch: Sequence[Bag], schedule: Mapping[str, float]
    ) -> tuple[EpochLog, list[torch.Tensor]]:
        """The optimiser steps of an epoch: what it gave, and the gradient norms before clipping."""
        if self.head.solved:
            return self._solve(epoch, schedule), []
        config, log, norms = self.config, EpochLog(), list[torch.Tensor]()
        self.head.train()
        batch_size = int(config.batch_size)
        for step in chunks(epoch, batch_size * config.gradient_accumulation_steps):
            if self._stop:
                break
            self.optimizer.zero_grad(set_to_none=True)
            batches = chunks(step, batch_size)
            for bags in (micro for batch in batches for micro in micro_batches(batch, config.patch_budget)):
                batch = self.bags.batch(bags)
                with autocast(self.bags.device, config.amp):
                    output = self.head(batch, **schedule)
                terms = self.objective(output, batch, self.progress.epoch)
                torch.autograd.backward(self.scaler.scale(terms.total(len(step))))
                log.add(output, batch, terms)
            self.scaler.unscale_(self.optimizer)
            norms.append(clip_gradient(self._parameters, config))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update_parameters(self.head)
        return log, norms

    def _solve(self, epoch: Sequence[Bag], schedule: Mapping[str, float]) -> EpochLog:
        """An epoch of a head that finds its weights by itself: what it then says of the training cases."""
        config = self.config
        smoothing = 0.0 if config.label_smoothing == "auto" else config.label_smoothing
        fit = Fit(self.class_weights, smoothing, config.standardize == "train", config.seed)
        parts = micro_batches(epoch, config.patch_budget)
        self.head.solve((self.bags.batch(part) for part in parts), fit, **schedule)
        return self._watch(epoch, schedule)

    def validate(self, cases: Iterable[str]) -> EpochLog:
        """Losses and attention of cases with all their patches, by the model that is kept."""
        schedule = self.model.schedule(self.config.epochs - 1, self.config.epochs)
        return self._watch([self.bags.outlines[case] for case in cases], schedule)

    @torch.no_grad()
    def _watch(self, bags: Sequence[Bag], schedule: Mapping[str, float]) -> EpochLog:
        log, model = EpochLog(), self.model
        model.eval()
        for micro in micro_batches(bags, self.config.patch_budget):
            batch = self.bags.batch(micro)
            with autocast(self.bags.device, self.config.amp):
                output = model(batch, **schedule)
            log.add(output, batch, self.objective(output, batch, self.progress.epoch))
        return log

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs, of types that ``torch.load(weights_only=True)`` reads."""
        return {
            "head": self.head.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": copy.deepcopy(vars(self.progress)),
            "best": self.best,
            "class_weights": self.class_weights,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.head.load_state_dict(state["head"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.best = dict(state["best"])
        self.good = copy.deepcopy(dict(state))  # the optimiser goes on in the tensors that it was given
