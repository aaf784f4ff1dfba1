"""The optimiser of a training, and what goes with its steps: learning rate, precision, clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from featstore.errors import ConfigError
from featstore.precision import has_fast_bf16
from heads.config import TrainConfig
from heads.models.head import Head

Amp = Literal["auto", "off", "bf16", "fp16"]

_EQUAL = 1e-6  # the least deviation of float32 gradients, as a share of their mean


def make_optimizer(head: Head, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a head's parameters, with constant or adaptive weight decay."""
    decoupled, lr = config.optimizer == "adamw", learning_rate(config)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    if config.weight_decay_mode == "constant" or not config.weight_decay:
        return kind(head.parameters(), lr=lr, weight_decay=config.weight_decay, fused=True)
    # A fused step decides by itself whether fp16 overflowed, too late for what comes before the step.
    optimizer = kind(head.parameters(), lr=lr, weight_decay=0.0, fused=config.amp != "fp16")
    decay = AdaptiveDecay(config.weight_decay, config.weight_decay_alpha, decoupled)
    optimizer.register_step_pre_hook(decay)
    return optimizer


def learning_rate(config: TrainConfig) -> float:
    """Of a resolved config (`heads.config.resolved`)."""
    if config.lr == "auto":
        raise ValueError("train.lr is auto: resolve the config first")
    return config.lr


class AdaptiveDecay:
    """Weight decay that is stronger where the gradient is larger: λ θ instead of λ, for every weight.

    θ = 2 / (1 + exp(−α g̃)), 0 < θ < 2, with g̃ = (|g| − μ) / σ, μ and σ the mean and the deviation of |g|
    over the weight's layer. θ = 1 is constant decay: in layers where all |g| are equal (a bias of one
    number is one) and everywhere if α = 0. Before every step of AdamW, w ← w − lr λ θ w; of Adam,
    g ← g + λ θ w, each as with constant decay. Clipping changes no θ: it scales all gradients alike.
    There is no state.

    Source: Nakamura and Hong 2019, "Adaptive Weight Decay for Deep Neural Networks" (AdaDecay, arXiv
    1907.08931): gradients normalised within each layer, and a sigmoid of them; its summary says so, and
    others' implementations have this θ and α = 4. Ours are Adam and AdamW (there it is plain gradient
    descent), and that a layer is one tensor of parameters: weights and bias apart.

    Args:
        weight_decay: λ.
        alpha: α.
        decoupled: As AdamW decays, not as Adam.
    """

    def __init__(self, weight_decay: float, alpha: float, decoupled: bool) -> None:
        self._weight_decay, self._alpha, self._decoupled = weight_decay, alpha, decoupled

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """Decay what an optimiser is about to step."""
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                decay = self._weight_decay * decay_factors(weight.grad, self._alpha)
                if self._decoupled:
                    weight.mul_(1 - group["lr"] * decay)
                else:
                    weight.grad.addcmul_(decay, weight)


def decay_factors(gradient: torch.Tensor, alpha: float) -> torch.Tensor:
    """θ of `AdaptiveDecay` for every weight of a layer, in the gradient's shape.

    Args:
        gradient: Of the layer's weights.
        alpha: α.
    """
    size = gradient.abs()
    deviation, mean = torch.std_mean(size, correction=0)
    # What rounding alone makes of equal gradients is no deviation.
    normalised = torch.where(deviation > _EQUAL * mean, (size - mean) / deviation, 0.0)
    return 2 * torch.sigmoid(alpha * normalised)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig
) -> torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau | None:
    """What changes the learning rate after every epoch, or None.

    Raises:
        ConfigError: The lowest rate is given, and above the first.
    """
    lr = learning_rate(config)
    if config.scheduler != "none" and config.min_lr > lr and "min_lr" in config.model_fields_set:
        raise ConfigError(
            f"train.min_lr is {config.min_lr:g}, above train.lr, {lr:g}",
            expected="a lowest rate that is not above the first",
            where="train.min_lr, train.lr",
            fix="lower min_lr, or --scheduler none",
        )
    kinds = torch.optim.lr_scheduler
    if config.scheduler == "plateau":
        return kinds.ReduceLROnPlateau(
            optimizer,
            factor=config.scheduler_factor,
            patience=config.scheduler_patience,
            min_lr=config.min_lr,
        )
    if config.scheduler == "cosine":
        return kinds.CosineAnnealingLR(optimizer, config.epochs, eta_min=min(config.min_lr, lr))
    return None


def make_scaler(device: torch.device, config: TrainConfig) -> torch.amp.GradScaler:
    """What keeps small gradients from vanishing in half precision; does nothing in any other.

    Raises:
        ConfigError: Half precision is asked for on a CPU.
    """
    if config.amp == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 without a GPU", expected="bf16 or off", where="train.amp", fix="--amp bf16")
    return torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")


def choose_amp(amp: Amp, device: torch.device) -> Amp:
    """The precision of matrix products; ``auto``: bf16 where the device has instructions for it."""
    if amp != "auto":
        return amp
    return "bf16" if has_fast_bf16(device) else "off"


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """The context of a forward pass; ``off``: float32."""
    kinds = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    chosen = choose_amp(amp, device)
    return torch.autocast(device.type, kinds[chosen], enabled=chosen != "off")


def clip_gradient(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.Tensor:
    """Clip the gradient as the config says; the gradient's norm, before that."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    if not gradients:
        return torch.zeros(())
    # What nn.utils.get_total_norm comes to, which takes longer to get there than this takes.
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if config.grad_clip != "auto" and config.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    return norm


def check_solvable(head: Head, config: TrainConfig) -> None:
    """Raises ConfigError if the head takes no optimiser steps, and what is asked for needs them."""
    wrong = "ema_decay" if config.ema_decay else "loss" if config.loss != "cross_entropy" else None
    if head.solved and wrong is not None:
        raise ConfigError(
            f"train.{wrong} is set, but this head is fitted by a solver, not step by step",
            expected="ema_decay 0 and the loss cross_entropy, or another head",
            where=f"train.{wrong}",
            fix=f"--set train.{wrong}={TrainConfig.model_fields[wrong].default}",
        )
