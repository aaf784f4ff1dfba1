"""The settings of the β-VAE (`featstore train-vae`), and the schedule of its KL term. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from featstore.config import PATH, PERHAPS_PATH, Section
from featstore.errors import ConfigError

# So many steps, or such a share of all of them.
Steps = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\d{1,5}(\.\d{1,6})?%$")]
_SECTION = "vae"


class VaeConfig(Section):
    """How the β-VAE for domain generalisation is trained."""

    data_dir: str | None = Field(
        None,
        description="ROOT/ENVIRONMENT/CLASS/*.png|jpg; null: the project's patches, by their `domain`",
        json_schema_extra=PATH,
    )
    subset_size: int | None = Field(
        None, ge=2, description="images an environment, drawn by class with the seed; null: all"
    )
    experiment: str | None = Field(
        None, pattern=r"^[\w.+-]{1,64}$", description="name of the experiment: vae_YYYYMMDD_HHMMSS_NAME"
    )
    steps: int = Field(10_000, ge=1, le=100_000_000, description="optimiser steps")
    encoder: str = Field("resnet50", description="encoder: resnet50 | densenet121 | timm:NAME")
    encoder_weights: str = Field(
        "imagenet",
        description="weights it begins with: imagenet | path of a .safetensors or .pth file | random:SEED",
        json_schema_extra=PERHAPS_PATH,
    )
    # Below 32 px maps shrink to one cell before their last stride, where the bf16 gradients of oneDNN's
    # 3 × 3 convolutions hold whatever was in memory.
    size: int = Field(224, ge=32, le=1024, description="side in px that images are resized to")
    hidden: int = Field(1024, ge=1, le=65536, description="width of the fully connected layers")
    latent: int = Field(256, ge=1, le=65536, description="length of the code z: the features of the export")
    loss_multiplier_kl: float = Field(1e-4, ge=0, description="weight of the KL term, times w(step)")
    loss_multiplier_y: float = Field(0.1, ge=0, description="weight of the classifier's cross-entropy")
    kl_reduction: Literal["mean", "sum"] = Field(
        "mean", description="KL over the latents: mean | sum; over the batch it is the mean either way"
    )
    kl_anneal_start: Steps = Field(
        0, description="w(step) is 0 before this step; a percentage of the steps is accepted: 10%"
    )
    kl_anneal_end: Steps = Field(5000, description="w(step) is 1 from this step on; or a percentage: 50%")
    kl_anneal_cyclical: bool = Field(False, description="w(step) rises anew in every cycle")
    kl_anneal_cycle_length: Steps | None = Field(
        None, description="steps a cycle, or a percentage; needed where w is cyclical"
    )
    batch_size: int = Field(32, ge=2, le=65536, description="images a step, environments equally often")
    lr: float = Field(1e-4, gt=0, description="learning rate (AdamW)")
    weight_decay: float = Field(0.0, ge=0, description="weight decay (AdamW)")
    flip: bool = Field(True, description="mirror images at random, left to right and top to bottom")
    val_share: float = Field(
        0.2, gt=0, lt=1, description="share of every environment's classes that is kept for validation"
    )
    val_every: int = Field(250, ge=1, description="validate every so many steps")
    log_every: int = Field(50, ge=1, description="a line of log.txt every so many steps")
    picture_every: int = Field(
        1000, ge=0, description="pictures of reconstructions every so many steps; 0: at the end alone"
    )
    save_seconds: float = Field(300.0, ge=0, description="the state to resume from is saved so often")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of weights, validation split, order and noise")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$", description="auto | cpu | cuda[:N]"
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the device is made for it, else off | off | bf16 | fp16 (GPU)"
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        "auto", description="decoding threads; auto: one a core"
    )
    memory_gb: Annotated[float, Field(ge=0, le=1e6)] | Literal["auto"] = Field(
        "auto", description="decoded images kept in memory; more are read in every pass; auto: half of it"
    )


@dataclass(frozen=True)
class Annealing:
    """The schedule of the KL term's weight.

    Attributes:
        start: Steps with weight 0.
        end: The step from which on it is 1.
        cycle: Steps after which it begins anew at ``start``; None: never.
    """

    start: float
    end: float
    cycle: float | None = None

    def __call__(self, step: int) -> float:
        """The weight w of a step, counted from 0.

        0 before ``start``, then linear to 1 at ``end``, then 1. With a cycle of L steps,
        w = clip(((step − start) mod L) / (end − start), 0, 1) from ``start`` on, and 0 before.

        Source: Bowman et al. 2016 (arXiv 1511.06349); cyclical: Fu et al. 2019 (arXiv 1903.10145).
        """
        if step < self.start:
            return 0.0
        since = step - self.start
        if self.cycle is not None:
            since %= self.cycle
        return min(since / (self.end - self.start), 1.0)


def annealing_of(config: VaeConfig) -> Annealing:
    """The schedule that the settings mean, percentages as steps.

    Raises:
        ConfigError: It ends before it starts, a percentage is above 100, or the cycle is missing or too
            short.
    """
    start = _steps(config, "kl_anneal_start")
    end = _steps(config, "kl_anneal_end")
    if end <= start:
        raise ConfigError(
            f"KL annealing starts at {config.kl_anneal_start} and ends at {config.kl_anneal_end}",
            expected="an end after the start; 1 step after it for no annealing",
            where=f"vae.kl_anneal_start, vae.kl_anneal_end, {config.steps} steps",
            fix="--kl-anneal-end 50%",
        )
    if not config.kl_anneal_cyclical:
        return Annealing(start, end)
    if config.kl_anneal_cycle_length is None:
        raise ConfigError(
            "vae.kl_anneal_cyclical is on, but kl_anneal_cycle_length is not given",
            expected="the number of steps a cycle, or a percentage of all steps",
            where="vae.kl_anneal_cycle_length",
            fix="--kl-anneal-cycle-length 25%, or --no-kl-anneal-cyclical",
        )
    cycle = _steps(config, "kl_anneal_cycle_length")
    if cycle < end - start:
        raise ConfigError(
            f"a cycle of {cycle:g} steps is shorter than the rise of w, {end - start:g} steps",
            expected="kl_anneal_cycle_length ≥ kl_anneal_end − kl_anneal_start, so that w comes to 1",
            where="vae.kl_anneal_cycle_length",
            fix=f"--kl-anneal-cycle-length {end - start:.0f}",
        )
    return Annealing(start, end, cycle)


def _steps(config: VaeConfig, key: str) -> float:
    """A number of steps, or what a percentage of all steps comes to."""
    value = getattr(config, key)
    if not isinstance(value, str):
        return float(value)
    percent = float(value.removesuffix("%"))
    if percent > 100:
        raise ConfigError(
            f"{_SECTION}.{key} is {value}",
            expected="at most 100% of the steps",
            where=f"{_SECTION}.{key}",
            fix=f"--{key.replace('_', '-')} 100%, or a number of steps",
        )
    return percent / 100 * config.steps
