"""The settings of training and runs, and the whole config of a project.

Those of the heads stand in `heads.models.config`, and are known here too. What a head sets apart for
itself (batch size, label smoothing, …) is ``auto`` here; `resolved` puts the head's own values in its
place. No torch in this file: `featstore --help` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from featstore.config import PATH, FeatstoreConfig, Section, Texts
from featstore.errors import ConfigError
from heads.cluster.config import SlurmConfig as SlurmConfig
from heads.models.config import AttentionConfig as AttentionConfig
from heads.models.config import ClamConfig as ClamConfig
from heads.models.config import DsmilConfig as DsmilConfig
from heads.models.config import DualStreamConfig as DualStreamConfig
from heads.models.config import HeadConfig as HeadConfig
from heads.models.config import HierarchicalConfig as HierarchicalConfig
from heads.models.config import LinearConfig as LinearConfig
from heads.models.config import ProjectorConfig as ProjectorConfig
from heads.models.config import TransMILConfig as TransMILConfig
from heads.training.finetune_config import FinetuneConfig as FinetuneConfig
from heads.training.vae_config import VaeConfig as VaeConfig
from heads.tuning.config import TuneConfig as TuneConfig

Level = Literal["patch", "slice", "stain"]
Weight = Annotated[float, Field(ge=0)]
PerLevel = Weight | dict[Level, Weight]
Auto = Literal["auto"]


class SubCases(Section):
    """Cases that are split into sub-bags, in training alone."""

    n: int = Field(ge=2, description="sub-bags a case")
    by: Literal["range", "stride", "slice"] = "stride"
    classes: Texts = Field([], description="only cases of these classes; all by default")


class TrainConfig(Section):
    """How a head is trained."""

    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training cases")
    batch_size: Annotated[int, Field(ge=1, le=100_000)] | Auto = Field(
        "auto", description="cases a batch; auto: dual_stream 4, any other head 1"
    )
    gradient_accumulation_steps: int = Field(1, ge=1, le=100_000, description="batches an optimiser step")
    patch_budget: int = Field(
        65536,
        ge=1,
        le=2**40,
        description="patches computed at once; a larger batch is split, to the same effect",
    )
    optimizer: Literal["adam", "adamw"] = Field("adam", description="adam | adamw")
    lr: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto",
        description="learning rate; auto: abmil, gated_abmil, clam_sb, dsmil 1e-4, any other head 3e-4",
    )
    weight_decay: float = Field(2e-4, ge=0, description="weight decay")
    weight_decay_mode: Literal["constant", "adaptive"] = Field(
        "constant", description="constant | adaptive: stronger where a layer's gradient is larger"
    )
    weight_decay_alpha: float = Field(
        4.0, ge=0, le=1000, description="adaptive: how much stronger; 0: as constant"
    )
    scheduler: Literal["plateau", "cosine", "none"] = Field(
        "plateau", description="plateau | cosine | none"
    )
    scheduler_patience: int = Field(3, ge=0, description="plateau: epochs without a better validation loss")
    scheduler_factor: float = Field(0.5, gt=0, lt=1, description="plateau: what the rate is multiplied by")
    min_lr: float = Field(1e-6, ge=0, description="plateau, cosine: the lowest rate")
    patience: int | None = Field(
        5, ge=1, description="early stopping: epochs without a better validation loss; null: never stop"
    )
    min_delta: float = Field(0.001, ge=0, description="early stopping: what counts as better")
    min_epochs: int = Field(1, ge=1, description="early stopping: not before so many epochs")
    grad_clip: Weight | Auto = Field(
        "auto", description="largest norm of the gradient; 0: any; auto: dual_stream 0.5, any other head 0"
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the device is made for it, else off | off | bf16 | fp16 (GPU)"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="moving average of parameters and buffers, from the first step on; 0: off",
    )
    loss: str = Field("cross_entropy", description="cross_entropy, or one that head.plugin registers")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="label smoothing; auto: dual_stream 0.1, any other head 0"
    )
    use_class_weights: bool = Field(False, description="weight the loss by class")
    class_weights: Literal["balanced"] | list[Weight] | dict[str, Weight] = Field(
        "balanced", description="balanced | [w, …] in the order of classes | {class: w}"
    )
    standardize: Literal["train", "none"] = Field(
        "train", description="train: per feature, by mean and deviation over the training cases | none"
    )
    reg_weight_entropy: PerLevel | Auto = Field(
        "auto",
        description="penalty on attention's entropy, one weight or {level: weight}; auto: dual_stream 0.01",
    )
    reg_entropy_form: Literal["squared", "linear"] = Field("squared", description="squared | linear")
    reg_entropy_mode: Literal["max", "min"] = Field("max", description="wanted: high (max) or low (min)")
    reg_entropy_normalize: bool = Field(False, description="divide the entropy by log N")
    reg_weight_confidence: Weight | Auto = Field(
        "auto", description="penalty on the spread of selection scores; auto: dual_stream 0.01"
    )
    reg_confidence_target: float | None = Field(
        2.0, ge=0, description="the spread that is wanted; null: linear, the more the better"
    )
    reg_weight_l1: PerLevel = Field(0.0, description="L1 on attention logits: weight or {level: weight}")
    reg_weight_l2: PerLevel = Field(0.0, description="L2 on attention logits: weight or {level: weight}")
    reg_level_decay: float = Field(
        1.0, gt=0, le=1, description="penalties: × this for each level above the patches"
    )
    reg_epoch_decay: float = Field(1.0, gt=0, le=1, description="penalties: × this for each epoch")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of weights, order, sampling and dropout")
    per_slice_cap: int | None = Field(
        800, ge=1, description="patches of a slice used in an epoch of training, drawn afresh in each"
    )
    views: bool = Field(
        True, description="draw one of each patch's cached views in every epoch, where the store has any"
    )
    max_slices_per_stain: int | None = Field(
        None, ge=1, description="slices of a stain used in training; a choice fixed for the run"
    )
    sampling: Literal["random", "even", "entropy", "all", "auto"] = Field(
        "auto",
        description="patches of a bag in training: random | even | entropy | all; "
        "auto: dual_stream random, any other head all",
    )
    bag_size: int = Field(64, ge=1, description="patches a bag in training, unless sampling is all")
    stain_dropout: float = Field(
        0.0, ge=0, le=1, description="in training, a case loses each stain with this probability, never all"
    )
    case_sampling: Literal["all", "balanced"] = Field(
        "all", description="cases of an epoch: each once (all), or as many of every class (balanced)"
    )
    sub_cases: SubCases | None = Field(
        None, description="{n, by: range|stride|slice, classes}: split training cases into n sub-bags"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$", description="auto | cpu | cuda[:N]"
    )
    memory_gb: Annotated[float, Field(ge=0, le=1e6)] | Auto = Field(
        "auto", description="embeddings kept in memory; more are read in every epoch; auto: half of it"
    )
    processes: Annotated[int, Field(ge=1, le=256)] | Auto = Field(
        "auto", description="trainings of a study at once, which share the threads; auto: by their size"
    )
    load_splits: str | None = Field(
        None, description="npz file of a split, or a folder of them", json_schema_extra=PATH
    )
    fold: int | None = Field(None, ge=0, lt=100, description="which split, from 0: file fold + 1")
    plot_every: int = Field(0, ge=0, description="draw the curves every so many epochs; 0: at the end")


class RunsConfig(Section):
    """Where runs are kept and what is written of them."""

    path: str = Field("runs", description="folder of the run folders", json_schema_extra=PATH)
    suffix: str | None = Field(None, pattern=r"^[\w.+-]{1,64}$", description="run_YYYYMMDD_HHMMSS_SUFFIX")
    threshold: Literal["argmax", "validation"] = Field(
        "argmax",
        description="argmax: the more probable class | validation: by Youden's index on those cases",
    )
    calibration: Literal["none", "temperature"] = Field(
        "none",
        description="of test probabilities: none | temperature: logits divided by one number, "
        "fitted on the validation cases",
    )
    analyze_attention: bool = Field(
        False, description="write the test cases' attention, patch by patch, to attention_analysis/"
    )
    resamples: int = Field(2000, ge=0, description="bootstrap resamples of the intervals")


class Config(FeatstoreConfig):
    """Everything that `featstore.yaml` may say."""

    head: HeadConfig = HeadConfig()
    train: TrainConfig = TrainConfig()
    runs: RunsConfig = RunsConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    vae: VaeConfig = VaeConfig()
    tune: TuneConfig = TuneConfig()
    slurm: SlurmConfig = SlurmConfig()


# What `auto` stands for, by the seed documents. Any other head has the first's, but for `_SLOWER`.
HEAD_DEFAULTS: dict[str, Mapping[str, Any]] = {
    "hierarchical": {
        "lr": 3e-4,
        "batch_size": 1,
        "grad_clip": 0.0,
        "label_smoothing": 0.0,
        "reg_weight_entropy": 0.0,
        "reg_weight_confidence": 0.0,
        "sampling": "all",
    },
    "dual_stream": {
        "lr": 3e-4,
        "batch_size": 4,
        "grad_clip": 0.5,
        "label_smoothing": 0.1,
        "reg_weight_entropy": 0.01,
        "reg_weight_confidence": 0.01,
        "sampling": "random",
    },
}
# One attention over a whole case, learned a case a step: at 3e-4 their validation loss jumps from epoch
# to epoch and early stopping ends them after a few. CLAM's own rate.
_SLOWER = {"abmil": 1e-4, "gated_abmil": 1e-4, "clam_sb": 1e-4, "dsmil": 1e-4}
_CONFIGS: dict[str, type[Section]] = {
    "hierarchical": HierarchicalConfig,
    "dual_stream": DualStreamConfig,
    "abmil": AttentionConfig,
    "gated_abmil": AttentionConfig,
    "dsmil": DsmilConfig,
    "clam_sb": ClamConfig,
    "transmil": TransMILConfig,
    "mean": ProjectorConfig,
    "max": ProjectorConfig,
    "linear": LinearConfig,
}


# What has a meaning where a head learns step by step: all but linear.
_STEPS = (
    "gradient_accumulation_steps",
    "optimizer",
    "lr",
    "weight_decay",
    "weight_decay_mode",
    "weight_decay_alpha",
    "scheduler",
    "scheduler_patience",
    "scheduler_factor",
    "min_lr",
    "grad_clip",
)


def resolved(config: Config) -> Config:
    """The config with the head's own values in place of every ``auto`` of a training's course."""
    name = config.head.name
    first = HEAD_DEFAULTS["hierarchical"]
    defaults = HEAD_DEFAULTS.get(name, {**first, "lr": _SLOWER.get(name, first["lr"])})
    chosen = {name: value for name, value in defaults.items() if getattr(config.train, name) == "auto"}
    return config.model_copy(update={"train": config.train.model_copy(update=chosen)})


def own_settings(head: HeadConfig) -> dict[str, Any]:
    """The settings that this head reads; those of other heads, today's and later ones', are no part."""
    own = _CONFIGS.get(head.name)
    if own is None:
        return {"options": head.options}
    return {name: getattr(head, name) for name in own.model_fields}


def unused_settings(head: HeadConfig, train: TrainConfig | None = None) -> list[str]:
    """Settings that were given, but that this head does not read; of the training's, if resolved."""
    own = _CONFIGS.get(head.name)
    if own is None:
        return []
    read = {*own.model_fields, "name", "plugin", "options"}
    defaults = HeadConfig()
    given = {name for name in head.model_fields_set if getattr(head, name) != getattr(defaults, name)}
    unread = sorted(f"head.{name}" for name in given - read)
    if train is None or head.name != "linear":
        return unread
    standard = resolved(Config(head=head)).train
    steps = (name for name in _STEPS if getattr(train, name) != getattr(standard, name))
    return unread + sorted(f"train.{name}" for name in steps)


def weights_by_level(value: PerLevel, levels: tuple[str, ...], name: str, decay: float) -> dict[str, float]:
    """A penalty's weight for every attention level of a head.

    Args:
        value: One weight for all levels, or by level.
        levels: The head's levels, patches first.
        name: The setting, for messages.
        decay: What each level above the patches is multiplied by once more.

    Raises:
        ConfigError: A level is named that the head has not.
    """
    by_level = value.items() if isinstance(value, dict) else dict.fromkeys(levels, value).items()
    given: dict[str, float] = {str(level): weight for level, weight in by_level}
    if strange := [level for level in given if level not in levels]:
        raise ConfigError(
            f"{name} names the level {strange[0]!r}",
            expected=f"one of {', '.join(levels)}" if levels else "no level: this head has no attention",
            where=name,
            fix="leave it out, or choose another head",
        )
    return {level: given.get(level, 0.0) * decay**i for i, level in enumerate(levels)}
