"""Backbone and head as one model, its optimiser and the course of its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.forward import is_out_of_memory
from heads.config import TrainConfig
from heads.models.head import Head
from heads.models.standardize import Standardize, usable_deviation
from heads.training.finetune_config import FinetuneConfig
from heads.training.optimizer import learning_rate

# Settings of fine-tuning that are those of a training too, by the same names.
_SAME = (
    "epochs",
    "patience",
    "min_delta",
    "min_epochs",
    "grad_clip",
    "amp",
    "ema_decay",
    "device",
    "weight_decay",
    "seed",
    "gradient_accumulation_steps",
)


class Model(nn.Module):
    """Backbone and head, so that one state holds both.

    Args:
        backbone: Normalised patches to features.
        head: On these features.
    """

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head


def training_config(train: TrainConfig, settings: FinetuneConfig) -> TrainConfig:
    """A run's settings of training with those of fine-tuning in their place.

    Loss, class weights, penalties, sub-cases and balanced sampling stay the run's.

    Args:
        train: The run's, resolved.
        settings: The section ``finetune``.
    """
    changes = {name: getattr(settings, name) for name in _SAME}
    if settings.head_lr != "auto":
        changes["lr"] = settings.head_lr
    if settings.batch_size != "auto":
        changes["batch_size"] = settings.batch_size
    # Patches are drawn by finetune.patches_per_case, out of all; the mean and deviation are the run's.
    changes |= {"sampling": "all", "per_slice_cap": None, "views": False, "standardize": "none"}
    changes |= {"optimizer": "adamw", "weight_decay_mode": "constant", "scheduler": "none"}
    return train.model_copy(update=changes)


def make_optimizer(model: Model, train: TrainConfig, settings: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW with a rate of its own for what learns of the backbone and of the head.

    Raises:
        ConfigError: Nothing learns.
    """
    rates = ((model.backbone, settings.backbone_lr), (model.head, learning_rate(train)))
    found = [([p for p in part.parameters() if p.requires_grad], lr) for part, lr in rates]
    groups = [{"params": params, "lr": lr} for params, lr in found if params]
    if not groups:
        raise ConfigError(
            "nothing is to learn: the backbone is frozen, and the head too",
            expected="blocks that are unfrozen, or a head that learns",
            where="finetune.unfreeze, finetune.freeze_head",
            fix="--unfreeze last:1, or leave out --freeze-head",
        )
    return torch.optim.AdamW(groups, weight_decay=train.weight_decay, fused=True)


class Following:
    """Keeps a head's standardisation with its backbone: moving averages of the features' moments.

    After step n (from 0), with the step's features x, E[x] ← (1 − m) E[x] + m mean(x), likewise
    E[x²], m = 0.1; the deviation is √(E[x²] − E[x]²), so that what lies between cases of different
    steps counts. What is learned from is standardised by the averages, as in evaluation, and no
    gradient passes.

    Args:
        standardize: The head's; its buffers are changed.
        anew: Begin with the features of the first steps, m = max(0.1, 1 / (n + 1)), and not with the
            run's: where BatchNorm learns, they may have nothing in common.
    """

    def __init__(self, standardize: Standardize, anew: bool) -> None:
        self._standardize, self._anew = standardize, anew
        self.forget()

    def forget(self) -> None:
        """Take back what was noted since the last step."""
        mean = self._standardize.mean
        self._sums = torch.zeros(1 + 2 * len(mean), dtype=torch.float64, device=mean.device)

    def add(self, features: torch.Tensor) -> None:
        """Note (P, D) features of the step."""
        # About the mean of now, so that float32 loses nothing in the squares.
        x = features.detach() - self._standardize.mean
        count = x.new_full((1,), len(x))
        self._sums += torch.cat((count, x.sum(0), x.square_().sum(0)))

    def sums(self) -> torch.Tensor:
        """(1 + 2 D,) number, sum and sum of squares of what was noted; to be summed over processes."""
        found = self._sums
        self.forget()
        return found

    @torch.no_grad()
    def update(self, sums: torch.Tensor, step: int) -> None:
        """Move the averages by what `sums` gave.

        Args:
            sums: Of all processes.
            step: Of the whole training, from 0.
        """
        held, momentum = self._standardize, max(0.1, 1 / (step + 1)) if self._anew else 0.1
        shift, square = (sums[1:] / sums[0]).view(2, -1)
        about = torch.lerp(held.std.double().square(), square, momentum)
        moved = (about - (momentum * shift).square()).clamp_min(0).sqrt()
        held.mean += (momentum * shift).to(held.mean.dtype)
        held.std.copy_(usable_deviation(moved))


def follows(settings: FinetuneConfig) -> bool:
    """Whether the head's standardisation follows its backbone."""
    auto = settings.standardization == "auto" and settings.batch_norm == "train"
    return auto or settings.standardization == "follow"


def rate_course(settings: FinetuneConfig, total: int) -> Callable[[int], float]:
    """What both rates are multiplied by in each step, from 0, of ``total``.

    It rises linearly over the warm-up, to 1; then it stays, or falls as a half cosine to 0.
    """
    rising = settings.warmup * total if settings.warmup < 1 else settings.warmup

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if settings.scheduler == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, total - rising))))

    return rate


class OutOfMemory(Exception):
    """Memory ran out where less can be done at once."""


@contextmanager
def halving() -> Iterator[None]:
    """Raises `OutOfMemory` for any of the errors that say so."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory from error
        raise


@contextmanager
def memory_for(what: str, device: torch.device) -> Iterator[None]:
    """Where nothing smaller can be tried: the libraries' errors about memory, in words.

    Args:
        what: Was being done.
        device: Where.
    """
    try:
        with halving():
            yield
    except OutOfMemory as error:
        raise FeatstoreError(
            f"{device} has too little memory {what}",
            expected="memory for the model, its optimiser, and one case's features",
            where="finetune.chunk, train.patch_budget, finetune.unfreeze",
            fix="a smaller --chunk, --unfreeze last:1, another --device, or free the memory; then go on: "
            "featstore finetune --resume RUN",
        ) from error


def no_memory(device: torch.device) -> FeatstoreError:
    """The error where not even one patch can be learned from."""
    return FeatstoreError(
        f"{device} has too little memory for the gradient of one patch",
        expected="memory for a forward and a backward pass of one patch",
        where="finetune.chunk, finetune.unfreeze, backbone.resize",
        fix="unfreeze less (--unfreeze last:1), use smaller patches, another --device, or free the memory",
    )
