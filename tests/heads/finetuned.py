"""A small cohort of PNGs with a cache, and fine-tunings of it that have not begun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featstore.backbones import Backbone, build_backbone
from featstore.cohort.splits import Split
from featstore.config import BackboneConfig, FeatstoreConfig, ImagesConfig
from featstore.extraction import extract
from featstore.patch_pixels import PatchPixels
from featstore.store import Store
from heads.config import Config, FinetuneConfig, TrainConfig, resolved
from heads.models.head import Head, build_head
from heads.training.finetune import FineTuning
from heads.training.finetune_model import training_config
from heads.training.live import LiveBackbone
from heads.training.live_bags import LiveBags
from heads.training.ranks import Ranks
from tests import helpers
from tests.heads.planted import SMALL

NAMES = ("benign", "malignant")
CASES = tuple(str(i) for i in range(1, 11))
LABELS = {case: i % 2 for i, case in enumerate(CASES)}
SPLIT = Split(train=CASES[:6], val=CASES[6:8], test=CASES[8:])
BACKBONE = BackboneConfig(name="timm:test_resnet", weights="random:0", resize=32)


@dataclass(frozen=True)
class Cached:
    """PNGs and their embeddings."""

    folder: Path
    store: Store
    backbone: BackboneConfig = BACKBONE


def make_cached(folder: Path, backbone: BackboneConfig = BACKBONE, **cohort: Any) -> Cached:
    """Ten cases of two stains; patches of class 1 are darker in one corner."""
    helpers.make_cohort(
        folder / "patches",
        **{"cases": CASES, "stains": ("h&e", "sox10"), "slices": 1, "patches": 4, **cohort},
    )
    for case, label in LABELS.items():
        for file in (folder / "patches").glob(f"case_{case}_*.png") if label else ():
            pixels = np.array(Image.open(file))
            pixels[:16, :16] //= 3
            Image.fromarray(pixels).save(file)
    config = FeatstoreConfig(
        backbone=backbone,
        extract={"device": "cpu", "amp": "off", "runtime": "torch", "batch_size": 4, "workers": 1},
    )
    extract(config, folder)
    return Cached(folder, Store.open(folder / "store"), backbone)


def make_head(name: str = "hierarchical", dim: int = 96, **settings: Any) -> tuple[Head, Config]:
    """A head without dropout, and the settings of its run."""
    own = Config(
        head={"name": name, "dropout": 0.0, **SMALL, **settings},
        train=TrainConfig(device="cpu", amp="off"),
    )
    head = build_head(own.head, dim, len(NAMES), 3)
    head.standardize.std.fill_(0.2)  # as if fitted: embeddings of random weights are small
    if name == "linear":  # begins at 0, and would pass no gradient on
        with torch.no_grad():
            for i, parameter in enumerate(head.parameters()):
                generator = torch.Generator().manual_seed(i)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head, resolved(own)


def make_finetuning(
    cached: Cached,
    name: str = "hierarchical",
    dtype: torch.dtype = torch.float32,
    head: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    change: Any = lambda backbone, head: None,
    run: dict[str, Any] | None = None,
    attention: Any = None,
    labels: dict[str, int] = LABELS,
    split: Split = SPLIT,
    **finetune: Any,
) -> FineTuning:
    """A fine-tuning on the CPU in float32 (or float64), one thread decoding."""
    backbone = build_backbone(cached.backbone, cached.folder)
    made, config = make_head(name, backbone.dim, **(head or {}))
    change(backbone, made)
    backbone.module.to(dtype)
    defaults = {"device": "cpu", "amp": "off", "unfreeze": "all", "chunk": 3, "epochs": 2, "warmup": 0}
    settings = FinetuneConfig(**{**defaults, "backbone_lr": 1e-3, **finetune})
    train = training_config(config.train.model_copy(update=run or {}), settings)
    live = LiveBackbone(backbone, torch.device(settings.device), settings.amp, int(settings.chunk))
    bags = LiveBags(cached.store, labels, live, pixels_of(cached, backbone))
    return FineTuning(made, backbone, bags, split, train, settings, NAMES, ranks, attention)


def pixels_of(cached: Cached, backbone: Backbone) -> PatchPixels:
    """The patches' files."""
    folder = cached.folder / "patches"
    return PatchPixels(cached.store.table(), folder, ImagesConfig(), backbone.preprocessing, 1)


def numbers(state: dict[str, torch.Tensor]) -> np.ndarray:
    """All of a state dict's floating numbers end to end."""
    return np.concatenate([v.double().numpy().ravel() for v in state.values() if v.is_floating_point()])
