"""DenseNet121 and ResNet50 of torchvision, without their classifiers.

``weights: imagenet`` is IMAGENET1K_V1: the weights that the field's papers mean by
"ImageNet-pretrained". ``imagenet:v2`` is IMAGENET1K_V2 where torchvision has it (ResNet50).

Source: Huang et al. 2017 (arXiv 1608.06993); He et al. 2016 (arXiv 1512.03385).
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from featstore.config import BackboneConfig
from featstore.errors import BackboneError
from featstore.images import Preprocessing

from .downloads import fetch_url
from .registry import Backbone, assemble, register_backbone
from .shapes import GridPooling
from .weights import load_into


class ConvFeatures(nn.Module):
    """A convolutional body, then average pooling over a grid.

    Args:
        body: (B, 3, H, W) to the feature map (B, C, h, w); its names are torchvision's.
        pool: Cells a side.
        relu: Apply a ReLU before pooling.
    """

    def __init__(self, body: nn.Module, pool: int, relu: bool) -> None:
        super().__init__()
        self.body = body
        self.relu = relu
        self.grid = GridPooling(pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C · pool²) float32 of normalised images (B, 3, H, W)."""
        maps = self.body(x)
        if self.relu:
            maps = nn.functional.relu(maps)
        features: torch.Tensor = self.grid(maps)
        return features


@register_backbone("densenet121")
def densenet121(config: BackboneConfig, base: Path) -> Backbone:
    """DenseNet121: 1024 features a cell. With ``final_relu`` exactly torchvision's features."""
    network = torchvision.models.densenet121(weights=None)
    body = nn.Sequential(OrderedDict(features=network.features))
    return _build(config, base, body, torchvision.models.DenseNet121_Weights, config.final_relu)


@register_backbone("resnet50")
def resnet50(config: BackboneConfig, base: Path) -> Backbone:
    """ResNet50: 2048 features a cell; its last block ends in a ReLU of its own."""
    network = torchvision.models.resnet50(weights=None)
    body = nn.Sequential(
        OrderedDict((key, child) for key, child in network.named_children() if key not in ("avgpool", "fc"))
    )
    return _build(config, base, body, torchvision.models.ResNet50_Weights, None)


def _build(
    config: BackboneConfig, base: Path, body: nn.Module, published: Any, final_relu: bool | None
) -> Backbone:
    weights = published.IMAGENET1K_V1
    if config.weights.startswith("imagenet:"):
        tag = config.weights.removeprefix("imagenet:").upper()
        known = {w.name.removeprefix("IMAGENET1K_"): w for w in published}
        if tag not in known:
            raise BackboneError(
                f"{config.name} has no weights {config.weights!r}",
                expected=" | ".join(f"imagenet:{k.lower()}" for k in known),
                where="backbone.weights",
                fix="set backbone.weights: imagenet",
            )
        weights = known[tag]
    weights_ignored = load_into(
        body, config.weights, base, config.name, lambda: fetch_url(weights.url, config.name)
    )
    module = ConvFeatures(body, config.pool, bool(final_relu))
    preprocessing = _preprocessing(config.resize, weights.transforms())
    return assemble(
        config, body, module, preprocessing, final_relu=final_relu, weights_ignored=weights_ignored
    )


def _preprocessing(resize: int | str, transforms: Any) -> Preprocessing:
    """From the weights' own transforms, of which all but ``model`` keeps all but the sizes."""
    whole = resize != "model"
    return Preprocessing(
        resize=resize if whole else transforms.resize_size[0],
        crop=None if whole else transforms.crop_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
