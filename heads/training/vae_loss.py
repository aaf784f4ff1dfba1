"""The terms of the β-VAE's loss.

L = reconstruction + loss_multiplier_kl · w(step) · KL + loss_multiplier_y · cross-entropy

Source: Chokuwa and Khan 2023 (arXiv 2309.11301); the KL of two Gaussians: Kingma and Welling 2014 (arXiv
1312.6114), appendix B. All three are means, so that the weights mean the same at any size of image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from heads.models.vae import VaeOutput


@dataclass(frozen=True, eq=False)
class VaeTerms:
    """The terms of a batch, each a scalar.

    Attributes:
        reconstruction: Binary cross-entropy a pixel and channel.
        kl: Of the codes to the standard normal distribution.
        cross_entropy: Of the classes.
        total: What is minimised.
        right: How many images have the more probable class right.
    """

    reconstruction: torch.Tensor
    kl: torch.Tensor
    cross_entropy: torch.Tensor
    total: torch.Tensor
    right: torch.Tensor

    def stacked(self) -> torch.Tensor:
        """(5,) float32, detached, in the order of the attributes."""
        terms = (self.reconstruction, self.kl, self.cross_entropy, self.total, self.right)
        return torch.stack([term.detach().float() for term in terms])


def reconstruction_loss(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """−(x ln p + (1 − x) ln(1 − p)), p = sigmoid(logits): the mean over images, channels and pixels.

    From the logits and in float32: of a p that half precision rounds to 1 there is no logarithm of 1 − p.

    Args:
        logits: (B, 3, H, W).
        images: (B, 3, H, W) in [0, 1], not normalised.
    """
    return functional.binary_cross_entropy_with_logits(logits.float(), images.float())


def kl_divergence(
    mean: torch.Tensor, logvar: torch.Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> torch.Tensor:
    """½ (mean² + exp(logvar) − 1 − logvar), the mean or the sum over latents, the mean over the batch.

    Args:
        mean: (B, L).
        logvar: (B, L).
        reduction: Over the latents.
    """
    mean, logvar = mean.float(), logvar.float()
    each = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return each.mean() if reduction == "mean" else each.sum(dim=1).mean()


def vae_terms(
    output: VaeOutput,
    images: torch.Tensor,
    labels: torch.Tensor,
    kl_weight: float,
    y_weight: float,
    reduction: Literal["mean", "sum"],
) -> VaeTerms:
    """The loss of a batch and its terms.

    Args:
        output: Of the model.
        images: (B, 3, H, W) in [0, 1].
        labels: (B,) class indices.
        kl_weight: loss_multiplier_kl · w(step).
        y_weight: loss_multiplier_y.
        reduction: Of the KL over the latents.
    """
    reconstruction = reconstruction_loss(output.reconstruction, images)
    kl = kl_divergence(output.mean, output.logvar, reduction)
    cross_entropy = functional.cross_entropy(output.logits, labels)
    total = reconstruction + kl_weight * kl + y_weight * cross_entropy
    return VaeTerms(reconstruction, kl, cross_entropy, total, _right(output.logits, labels))


def erm_terms(logits: torch.Tensor, labels: torch.Tensor) -> VaeTerms:
    """Plain empirical risk minimisation: the cross-entropy alone; arguments as `vae_terms`."""
    cross_entropy = functional.cross_entropy(logits, labels)
    none = torch.zeros_like(cross_entropy)
    return VaeTerms(none, none, cross_entropy, cross_entropy, _right(logits, labels))


def _right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(dim=1) == labels).sum()
