"""End-to-end fine-tuning: backbone and head learn together from pixels, in memory that does not grow."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featstore.backbones import Backbone
from featstore.bags import Bag
from featstore.cohort.splits import Split
from heads.config import TrainConfig
from heads.models.head import Head
from heads.training.blocks import set_mode, unfreeze
from heads.training.course import Course, Progress, TrainingError
from heads.training.data import chunks, micro_batches
from heads.training.diagnostics import EpochLog, mean_norm
from heads.training.finetune_config import FinetuneConfig
from heads.training.finetune_data import DrawnBags
from heads.training.finetune_model import (
    Model,
    OutOfMemory,
    make_optimizer,
    memory_for,
    no_memory,
    rate_course,
)
from heads.training.finetune_step import Plan, Step
from heads.training.live import LiveBackbone
from heads.training.live_bags import LiveBags
from heads.training.objective import Objective, make_class_weights
from heads.training.optimizer import autocast, clip_gradient, make_scaler
from heads.training.ranks import Ranks


class FineTuning(Course):
    """Trains a backbone and the head on it, from pixels.

    Whatever an epoch draws (order, patches, augmentation, dropout) depends on the seed and on where in
    the training it is drawn, so that a training that was interrupted between any two steps and resumed
    equals one that was not.

    Args:
        head: As the run left it; trained in place.
        backbone: The run's; trained in place.
        bags: The cohort, live: its pixels go through ``backbone``.
        split: Which cases are for what; the test cases are never looked at.
        train: Of `heads.training.finetune_model.training_config`.
        settings: The section ``finetune``.
        class_names: In config order.
        ranks: The processes that train together.
        attention: Of the cached patches, by training case, if patches are drawn by it.

    Attributes:
        names: The backbone's parameters that learn.
        step: Steps done in this epoch.
        steps_an_epoch: As many are in one.
    """

    remedy = "lower finetune.backbone_lr and finetune.head_lr, or clip the gradient (finetune.grad_clip)"

    def __init__(
        self,
        head: Head,
        backbone: Backbone,
        bags: LiveBags,
        split: Split,
        train: TrainConfig,
        settings: FinetuneConfig,
        class_names: Sequence[str],
        ranks: Ranks | None = None,
        attention: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        super().__init__(train)
        self.settings, self.split, self.bags, self.ranks = settings, split, bags, ranks or Ranks()
        self.live: LiveBackbone = bags.live
        self._network = backbone.network
        self.names = unfreeze(backbone.network, settings.unfreeze, settings.batch_norm)
        self.model = Model(self.live.module, head.to(bags.device, self.live.dtype))
        head.requires_grad_(not settings.freeze_head)
        self.data = DrawnBags(bags, split.train, train, settings, class_names, attention)
        weights = make_class_weights(train, [bag.label or 0 for bag in self.data.outlines], class_names)
        self.class_weights = None if weights is None else weights.to(bags.device)
        self.objective = Objective(train, head, self.class_weights)
        self._own = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, train, settings)
        self._take_steps_of(int(train.batch_size) * train.gradient_accumulation_steps * self.ranks.count)
        self.scaler = make_scaler(bags.device, train)
        self._step = Step(
            self.model, bags, self.objective, self.scaler, train, settings, self.ranks, bool(self.names)
        )
        self.ema: AveragedModel | None = None
        if train.ema_decay:
            average = get_ema_multi_avg_fn(train.ema_decay)  # type: ignore[no-untyped-call]
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self._steps_taken: list[tuple[int, int, torch.Tensor, float]] = []
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._begin_epoch()

    def _take_steps_of(self, cases: int) -> None:
        """So many cases, of all processes, make a step."""
        self._size, self.steps_an_epoch = cases, math.ceil(len(self.data.outlines) / cases)
        course = rate_course(self.settings, self.config.epochs * self.steps_an_epoch)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, course)

    def _begin_epoch(self) -> None:
        self.step, self._seconds = 0, 0.0
        self._log, self._norms = EpochLog(), list[torch.Tensor]()

    @property
    def steps_done(self) -> int:
        """Of the whole training."""
        return self.progress.epoch * self.steps_an_epoch + self.step

    def take_steps(self) -> list[tuple[int, int, torch.Tensor, float]]:
        """Epoch, step (both from 0), loss and rate of the backbone, of the steps since the last call."""
        taken, self._steps_taken = self._steps_taken, []
        return taken

    @property
    def kept_model(self) -> Model:
        """What is validated and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module  # type: ignore[return-value]

    def kept(self) -> Mapping[str, torch.Tensor]:
        """The weights that are validated."""
        return self.kept_model.state_dict()

    def run(
        self,
        after_epoch: Callable[[FineTuning], None] = lambda training: None,
        stop: Sequence[int] = (),
        after_step: Callable[[FineTuning], None] = lambda training: None,
    ) -> None:
        """Train until finished, or until ``stop`` of any process is no longer empty.

        Args:
            after_epoch: Called after every epoch, in every process.
            stop: Signals received so far; looked at between steps.
            after_step: Called after every step, in every process.

        Raises:
            TrainingError: The loss is no longer a number, or another process has ended.
            FeatstoreError: A patch cannot be read, or memory does not suffice for one.
        """
        while not self.finished and not self.ranks.any(bool(stop))[0]:
            if self._epoch(stop, after_step):
                after_epoch(self)

    def _epoch(self, stop: Sequence[int], after_step: Callable[[FineTuning], None]) -> bool:
        """The rest of an epoch; whether it came to its end."""
        epoch, began = self.progress.epoch, time.perf_counter() - self._seconds
        set_mode(self._network, self.settings.batch_norm)
        self.model.head.train(not self.settings.freeze_head)
        whole = list(chunks(self.data.epoch(epoch), self._size))
        while self.step < len(whole):
            try:
                for _ in self._steps(whole):
                    self._seconds = time.perf_counter() - began
                    after_step(self)
                    if self.ranks.any(bool(stop))[0]:
                        return False
            except OutOfMemory as error:
                if self.live.chunk == 1:
                    raise no_memory(self.bags.device) from error
            else:
                break
            self.live.chunk //= 2  # not in the handler: the failed step's tensors are free again
            if self.bags.device.type == "cuda":
                torch.cuda.empty_cache()
        self.check_finite()
        row: dict[str, float] = {"epoch": epoch + 1, "lr": self._rates[0], "lr_head": self._rates[-1]}
        if not self.model.head.solved:  # of those it is the penalty of their solver
            row |= self.model.head.schedule(epoch, self.config.epochs)
        row["grad_norm"] = mean_norm(self._norms)
        row |= {f"train_{name}": value for name, value in self._summary(self._log).items()}
        with memory_for("to validate", self.bags.device):
            log = self._validate()
        row |= {f"val_{name}": value for name, value in self._summary(log).items()}
        row["seconds"] = time.perf_counter() - began
        self._begin_epoch()
        self.conclude(row)
        return True

    def before(self) -> float:
        """The validation loss of the model as it is: before the first step, what is to be bettered."""
        with memory_for("to validate", self.bags.device):
            return self._summary(self._validate())["cross_entropy"]

    def check_finite(self) -> None:
        """Raises TrainingError if the loss of a step since `take_steps` was no number."""
        for epoch, step, loss, lr in self._steps_taken:
            if not math.isfinite(float(loss)):
                raise TrainingError(
                    f"the loss is no longer a number in step {step + 1} of epoch {epoch + 1}",
                    expected="finite losses",
                    where=f"rate of the backbone {lr:g}, finetune.amp {self.config.amp}",
                    fix=f"{self.remedy}; to keep the best epoch so far: "
                    "featstore finetune --resume RUN --finish",
                )

    def _summary(self, log: EpochLog) -> dict[str, float]:
        """What a log of all processes comes to, the same in each of them."""
        states, size = self.ranks.to_first(log.state()), self._size
        size = max(1, size // self.config.gradient_accumulation_steps)
        return self.ranks.from_first(EpochLog.of(states).summary(size) if self.ranks.first else {})

    def _steps(self, whole: Sequence[Sequence[Bag]]) -> Iterator[None]:
        """The steps that are left of an epoch, with pixels decoded ahead of them."""
        todo = range(self.step, len(whole))
        asked = (c for i in todo for _, sight in self.plan(whole[i]) for c in sight.requests())
        with closing(self.bags.pixels.read(asked)) as pixels:
            for i in todo:
                self.optimizer.zero_grad(set_to_none=True)
                log, loss = self.accumulate(self.plan(whole[i]), len(whole[i]), pixels)
                with memory_for("for the optimiser's step", self.bags.device):
                    self.update(loss)
                self._log.extend(log)
                self.step += 1
                yield

    def plan(self, step: Sequence[Bag]) -> Plan:
        """This process's share of a step; see `Step.plan`."""
        return self._step.plan(step, self.progress.epoch)

    def accumulate(
        self, plan: Plan, cases: int, pixels: Iterator[NDArray[np.uint8]]
    ) -> tuple[EpochLog, torch.Tensor]:
        """The gradient of a step's share; see `Step.accumulate`."""
        return self._step.accumulate(plan, cases, pixels, self.progress.epoch, self.step)

    def update(self, loss: torch.Tensor) -> None:
        """The optimiser's step, by the gradients of all processes.

        Args:
            loss: Of this process's share; becomes that of the step.
        """
        for parameter in self._own:
            if parameter.grad is None:  # no case here had a use for it; others may have
                parameter.grad = torch.zeros_like(parameter)
        following = self._step.following
        moments = [] if following is None else [following.sums()]
        statistics = [b for norm in self._step.norms for b in norm.buffers() if b.is_floating_point()]
        self.ranks.sum([*(p.grad for p in self._own if p.grad is not None), loss, *moments])
        self.ranks.mean(statistics)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._steps_taken.append((self.progress.epoch, self.step, loss, self._rates[0]))
        self.scaler.unscale_(self.optimizer)
        self._norms.append(clip_gradient(self._own, self.config))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if following is not None:
            following.update(moments[0], self.steps_done)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    @torch.no_grad()
    def _validate(self) -> EpochLog:
        """This process's share of the validation cases, with all their patches, as they are."""
        cases: Iterable[str] = self.ranks.share(self.split.val)
        model, config, log = self.kept_model, self.config, EpochLog()
        model.eval()
        bags = self.bags.by(model.backbone)
        schedule = model.head.schedule(config.epochs - 1, config.epochs)
        for micro in micro_batches([bags.outlines[case] for case in cases], config.patch_budget):
            batch = bags.batch(micro)
            with autocast(bags.device, config.amp):
                output = model.head(batch, **schedule)
            log.add(output, batch, self.objective(output, batch, self.progress.epoch))
        return log

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs, of types that ``torch.load(weights_only=True)`` reads.

        With several processes, to be called in all of them at once.
        """
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": copy.deepcopy(vars(self.progress)),
            "best": self.best,
            "class_weights": self.class_weights,
            "step": self.step,
            "seconds": self._seconds,
            "cases_a_step": self._size,
            "rates": self._rates,
            "log": EpochLog.of(self.ranks.to_first(self._log.state())).state(),
            "norms": [norm.cpu() for norm in self._norms],
            "chunk": self.live.chunk,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._take_steps_of(int(state["cases_a_step"]))  # whatever the number of processes now
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.best = dict(state["best"])
        self.step, self._seconds = int(state["step"]), float(state["seconds"])
        # The others have begun theirs anew: what they noted is in the first one's.
        self._log = EpochLog.of([state["log"]] if self.ranks.first else [])
        self._norms = [norm.to(self.bags.device) for norm in state["norms"]]
        self._rates = list(state["rates"])
        self.live.chunk = min(self.live.chunk, int(state["chunk"]))
