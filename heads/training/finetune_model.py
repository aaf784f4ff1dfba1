"""Backbone and head as one model, its optimiser and the course of its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from featstore.errors import ConfigError
from heads.config import TrainConfig
from heads.models.head import Head
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
