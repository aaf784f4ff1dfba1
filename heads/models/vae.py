"""The β-VAE for domain generalisation: one code that gives back the image and tells its class.

Source: Chokuwa and Khan 2023 (arXiv 2309.11301), after Kingma and Welling 2014 (arXiv 1312.6114) and
Higgins et al. 2017 (β-VAE). What the paper does not say is ours: the widths of the decoder, and that its
logits are resized where it gives another size (the sigmoid then makes values in [0, 1] of them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from featstore.backbones.vae import VaeEncoder

_CELLS = 7  # side of the decoder's first map, as that of a ResNet's last one at 224 px
_WIDTH = 256  # its channels, halved with every doubling of the side
_LEAST = 16


@dataclass(frozen=True, eq=False)
class VaeOutput:
    """What the β-VAE gives.

    Attributes:
        reconstruction: (B, 3, H, W) logits; their sigmoid is the image in [0, 1].
        mean: (B, L) float32, of the code.
        logvar: (B, L) float32, logarithm of its variance.
        logits: (B, C) float32, of the classes.
    """

    reconstruction: torch.Tensor
    mean: torch.Tensor
    logvar: torch.Tensor
    logits: torch.Tensor

    @property
    def image(self) -> torch.Tensor:
        """(B, 3, H, W) float32 in [0, 1]."""
        return torch.sigmoid(self.reconstruction.float())


class Decoder(nn.Module):
    """A code to the logits of an image: fully connected, then transposed convolutions.

    Args:
        latent: Length of the code.
        hidden: Width of the fully connected layer.
        size: Side of the image in px. The side of the maps doubles from 7 until it comes nearest to this;
            logits of another size are resized (bilinear).
    """

    def __init__(self, latent: int, hidden: int, size: int) -> None:
        super().__init__()
        self.size = size
        doublings = max(1, round(math.log2(size / _CELLS)))
        widths = [max(_LEAST, _WIDTH >> i) for i in range(doublings)]
        self.start = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, widths[0] * _CELLS**2), nn.ReLU()
        )
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            # A bias would be taken away by the normalisation behind it.
            doubled = nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False)
            layers += [doubled, nn.BatchNorm2d(narrow), nn.ReLU()]
        self.maps = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 4, stride=2, padding=1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Logits (B, 3, size, size) of codes (B, latent)."""
        maps = self.start(z).unflatten(1, (-1, _CELLS, _CELLS))
        logits: torch.Tensor = self.maps(maps.contiguous(memory_format=torch.channels_last))
        if logits.shape[-1] != self.size:
            logits = nn.functional.interpolate(
                logits, (self.size, self.size), mode="bilinear", align_corners=False, antialias=False
            )
        return logits


class BetaVae(nn.Module):
    """Encoder, decoder, and a linear classifier on the code.

    Args:
        encoder: Images to mean and log-variance.
        classes: Number of classes.
        size: Side of the images in px.
        hidden: Width of the decoder's fully connected layer.
        latent: Length of the code, as the encoder's.
    """

    def __init__(self, encoder: VaeEncoder, classes: int, size: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(latent, hidden, size)
        self.classifier = nn.Linear(latent, classes)

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> VaeOutput:
        """Code, reconstruction and class of images.

        z = mean + exp(logvar / 2) · noise (Kingma and Welling 2014, eq. 10) in training. Without noise
        decoder and classifier see the mean, as they do in evaluation.

        Args:
            x: (B, 3, H, W) in [0, 1].
            noise: (B, L) standard normal, or None.
        """
        mean, logvar = self.encoder.both(x)
        z = mean if noise is None else mean + torch.exp(logvar / 2) * noise
        return VaeOutput(self.decoder(z), mean, logvar, self.classifier(z).float())

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) float32 by the mean of the code alone: plain empirical risk minimisation."""
        logits: torch.Tensor = self.classifier(self.encoder(x))
        return logits.float()
