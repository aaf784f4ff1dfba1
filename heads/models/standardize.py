"""Features by mean and deviation of the training cases, which is where every head begins."""

from __future__ import annotations

import torch
from torch import nn

# Below this a feature counts as constant; below this share of the median one, as nearly constant.
_LEAST_DEVIATION, _LEAST_SHARE = 1e-6, 0.01
_BLOCK = 256  # rows at once: what fits in a core's cache


class Standardize(nn.Module):
    """Per-feature standardisation, with mean and deviation of the training cases as buffers.

    Args:
        dim: D.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def project(self, features: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """``layer((features − mean) / std)``.

        Args:
            features: (ΣP, D).
            layer: D → E.

        Returns:
            (ΣP, E).
        """
        return nn.functional.linear(
            self.lower(features, working_precision(layer)), layer.weight, layer.bias
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(ΣP, D) standardised features."""
        # One multiplication and addition a number: a division takes ten times as long on a CPU.
        factor = self.std.reciprocal()
        return torch.addcmul(-self.mean * factor, features.to(self.mean.dtype), factor)

    def lower(self, features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(ΣP, D) standardised features, then rounded to a precision.

        Not folded into the layer behind: in lower precision features that differ in their third digit
        alone would all round to the same, and in float32 it is a layer of E·D numbers, and its gradient,
        that would change in every step.
        """
        if features.requires_grad or features.device.type != "cpu":
            return self.forward(features).to(dtype)
        factor = self.std.reciprocal()
        shift = -self.mean * factor
        # By blocks: what lies between is as large as a core's cache.
        found = torch.empty_like(features, dtype=dtype)
        wide = shift.new_empty((min(_BLOCK, len(features)), len(shift)))
        for rows, into in zip(torch.split(features, _BLOCK), torch.split(found, _BLOCK), strict=True):
            between = into if dtype == shift.dtype else wide[: len(rows)]
            torch.addcmul(shift, between.copy_(rows), factor, out=between)
            if between is not into:
                into.copy_(between)
        return found


def working_precision(layer: nn.Linear) -> torch.dtype:
    """That in which a layer's products are computed: autocast's, where there is one."""
    kind = layer.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype


def usable_deviation(std: torch.Tensor) -> torch.Tensor:
    """Deviations to divide by.

    A feature that does not vary gets 1. One that hardly varies (a unit that fires in one patch of six
    thousand) is divided by 1% of the median deviation at least: by its own, that one patch would lie
    thousands of deviations away and outvote all other features.

    Args:
        std: (D,).

    Returns:
        (D,), none of them 0.
    """
    varies = std > _LEAST_DEVIATION
    # No number is asked of a GPU. Where none varies the median is NaN, and taken nowhere.
    median = torch.where(varies, std, torch.nan).nanmedian()
    return torch.where(varies, torch.maximum(std, _LEAST_SHARE * median), 1.0)
