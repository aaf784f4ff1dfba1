"""The encoder of a β-VAE as a backbone: the mean of the code of an image is its features.

`heads.training.vae` trains it; here it is built, and read from its exported folder.

Source: Chokuwa and Khan 2023 (arXiv 2309.11301): ResNet50, fully connected layers, mean and log-variance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from featstore.config import BackboneConfig
from featstore.images import Preprocessing

from .exported import ExportSpec, damaged, register_export
from .registry import Backbone, assemble, build_by_name
from .weights import match_into, read_state

KIND = "vae"
# Inputs stay in [0, 1], as the decoder gives them back; the encoder normalises them by itself.
ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class VaeEncoder(nn.Module):
    """Images in [0, 1] to the mean and the log-variance of their codes.

    normalised image → features → hidden → ReLU → hidden → ReLU → mean and log-variance.

    Args:
        features: Float (B, 3, H, W), normalised, to (B, dim).
        dim: Number of its features.
        mean: That it was trained with, per channel on a 0 to 1 scale (ImageNet's).
        std: Per channel.
        hidden: Width of the two fully connected layers.
        latent: Length of the code.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    aside = ("logvar",)  # has no part in the features

    def __init__(
        self,
        features: nn.Module,
        dim: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        hidden: int = 1024,
        latent: int = 256,
    ) -> None:
        super().__init__()
        # Part of the weights, so that an export is whole.
        self.register_buffer("shift", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(std).view(1, 3, 1, 1))
        self.features = features
        self.hidden = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.mean = nn.Linear(hidden, latent)
        self.logvar = nn.Linear(hidden, latent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean (B, latent) float32 of images (B, 3, H, W) in [0, 1]: the backbone's features."""
        mean: torch.Tensor = self.mean(self._hidden(x))
        return mean.float()

    def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, (B, latent) float32 each, of images (B, 3, H, W) in [0, 1]."""
        hidden = self._hidden(x)
        return self.mean(hidden).float(), self.logvar(hidden).float()

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        features = self.features((x - self.shift) / self.scale)
        hidden: torch.Tensor = self.hidden(features)
        return hidden


def build_encoder(
    name: str, weights: str, size: int, base: Path, hidden: int = 1024, latent: int = 256
) -> VaeEncoder:
    """A VAE encoder on a backbone of the libraries; the layers on top are drawn from torch's chance.

    Args:
        name: ``resnet50``, ``densenet121`` or ``timm:NAME``.
        weights: Of the backbone: ``imagenet``, a path, or ``random:SEED``.
        size: Side of the images in px.
        base: Folder that a relative path starts from.
        hidden: Width of the fully connected layers.
        latent: Length of the code.

    Returns:
        In train mode, with everything to be learned.

    Raises:
        BackboneError: As `registry.build_backbone`.
    """
    body = build_by_name(BackboneConfig(name=name, weights=weights, resize=size), base)
    # Its own normalisation: ImageNet's for torchvision's models and for nearly all of timm's.
    means, stds = body.preprocessing.mean, body.preprocessing.std
    encoder = VaeEncoder(body.module, body.dim, means, stds, hidden, latent)
    return encoder.requires_grad_(True).train()


def description_of(name: str, size: int, hidden: int, latent: int) -> dict[str, Any]:
    """What an exported folder must say so that its encoder can be built again; as `build_encoder`."""
    return {"encoder": name, "size": size, "hidden": hidden, "latent": latent}


def preprocessing_of(size: int) -> Preprocessing:
    """What images go through before the encoder: resized, and kept in [0, 1].

    Args:
        size: Side in px.
    """
    return Preprocessing(resize=size, crop=None, interpolation="bilinear", mean=ZEROS, std=ONES)


@register_export(KIND)
def _exported(spec: ExportSpec, config: BackboneConfig) -> Backbone:
    try:
        name = str(spec.description["encoder"])
        size, hidden, latent = (int(spec.description[key]) for key in ("size", "hidden", "latent"))
        built = BackboneConfig(name=name, weights=str(spec.weights.absolute()), resize=size)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(spec.path, f"its description is not complete ({error})") from error
    encoder = build_encoder(name, "random:0", size, spec.path.parent, hidden, latent)
    called = f"{KIND}:{name}"
    match_into(encoder, read_state(spec.weights), str(spec.weights), called)
    return assemble(built.model_copy(update={"name": called}), encoder, encoder, preprocessing_of(size))
