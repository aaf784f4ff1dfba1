"""Frozen networks: name → module, preprocessing, number of features, digest of the weights."""

from . import exported as _exported  # noqa: F401  (these register their backbones)
from . import timm_models as _timm_models  # noqa: F401
from . import torchvision_models as _torchvision_models  # noqa: F401
from . import vae as _vae  # noqa: F401
from .registry import (
    Backbone,
    backbone_names,
    build_backbone,
    normalize,
    register_backbone,
)
from .weights import state_sha256

__all__ = [
    "Backbone",
    "backbone_names",
    "build_backbone",
    "normalize",
    "register_backbone",
    "state_sha256",
]
