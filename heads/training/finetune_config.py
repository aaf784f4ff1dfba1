"""The settings of end-to-end fine-tuning (`featstore finetune`). No torch in this file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from featstore.config import Section


class FinetuneConfig(Section):
    """How a backbone and the head on it are trained together."""

    unfreeze: str = Field(
        "last:1",
        description="what learns of the backbone: last:N blocks | all | none | a regular expression that "
        "is searched in the names of its parameters",
    )
    batch_norm: Literal["frozen", "affine", "train"] = Field(
        "frozen",
        description="in what learns: frozen | affine: factors and shifts learn, statistics do not | train: "
        "statistics of each chunk of patches",
    )
    standardization: Literal["auto", "fixed", "follow"] = Field(
        "auto",
        description="the head's mean and deviation of features: fixed, the run's | follow: moving averages "
        "of the features of now | auto: follow with batch_norm train, else fixed",
    )
    freeze_head: bool = Field(False, description="train the backbone alone, under the run's head as it is")
    epochs: int = Field(10, ge=1, le=100_000, description="passes over the training cases")
    patches_per_case: int | None = Field(
        512,
        ge=1,
        description="so many in an epoch, drawn afresh in each; null: all",
    )
    sampling: Literal["random", "attended"] = Field(
        "random",
        description="how they are drawn: random | attended: with probabilities by the run's attention",
    )
    batch_size: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = Field(
        "auto", description="cases a batch, in each process; auto: as in the run"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, le=100_000, description="batches an optimiser step")
    chunk: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = Field(
        "auto",
        description="patches that go through the backbone at once, with what their gradient needs; halved "
        "when memory runs out; auto: by their size, on a GPU by its memory",
    )
    backbone_lr: float = Field(1e-5, gt=0, description="learning rate of the backbone")
    head_lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="learning rate of the head; auto: the run's"
    )
    warmup: float = Field(
        0.1,
        ge=0,
        description="steps over which both rates rise from 0: a share of all (below 1), or so many",
    )
    scheduler: Literal["cosine", "constant"] = Field(
        "cosine", description="after that: cosine, to 0 at the last step | constant"
    )
    weight_decay: float = Field(1e-4, ge=0, description="weight decay (AdamW)")
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0: any")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="moving average of parameters and buffers, of both; 0: off"
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the device is made for it, else off | off | bf16 | fp16 (GPU)"
    )
    patience: int | None = Field(
        3, ge=1, description="early stopping: epochs without a better validation loss; null: never stop"
    )
    min_delta: float = Field(0.0, ge=0, description="early stopping: what counts as better")
    min_epochs: int = Field(1, ge=1, description="early stopping: not before so many epochs")
    augment: bool = Field(True, description="augment the patches: crops, flips, right-angle turns, colours")
    augment_area: float = Field(0.7, gt=0, le=1, description="least share of a patch that a crop keeps")
    augment_flip: bool = Field(True, description="mirror half of the patches")
    augment_rotate: bool = Field(True, description="turn patches by right angles")
    augment_jitter: float = Field(
        0.1, ge=0, lt=1, description="brightness, contrast and each colour by up to this, up or down"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of order, sampling, augmentation and dropout")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$", description="auto | cpu | cuda[:N]"
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        "auto", description="decoding threads; auto: one a core"
    )
    pixel_mb: int = Field(
        512,
        ge=0,
        description="decoded patches of a batch kept for the second pass, in MB; others are decoded twice",
    )
    save_seconds: float = Field(
        600.0, ge=0, description="the state to resume from is saved so often, and after every epoch"
    )
