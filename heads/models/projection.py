"""The layer that every patch goes through, where a head spends nearly all of its time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from heads.models.dropout import Dropout
from heads.models.standardize import Standardize


def project(
    features: torch.Tensor,
    standardize: Standardize,
    layer: nn.Linear,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """``Dropout(ReLU(layer((features − mean) / std)))``.

    Args:
        features: (ΣP, D).
        standardize: Mean and deviation.
        layer: D → E.
        dropout: Of the result; none where it is None, or not in training.

    Returns:
        (ΣP, E), in autocast's precision where there is one.
    """
    # ReLU(c·x) = c·ReLU(x): what dropout multiplies by goes into the weights, which are fewer.
    inputs, weight, bias = standardize.fold(features, layer, 1.0 if dropout is None else dropout.scale)
    shape = (len(features), len(weight))
    kept = None if dropout is None else dropout.kept(shape, weight.dtype, weight.device)
    projected: torch.Tensor = _Projection.apply(inputs, weight, bias, kept)
    return projected


class _Projection(torch.autograd.Function):
    """max(0, x Wᵀ + b) × kept, computed in place.

    As four operations this writes and keeps four arrays of the output's size. Here the output alone is
    kept: where it is 0, no gradient passes, be it for the ReLU or for dropout, and elsewhere all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        # Not addmm, which on a CPU takes a sixth longer than the bare product.
        out = torch.mm(x, weight.t()).add_(bias).clamp_min_(0)
        if kept is not None:
            out.mul_(kept)
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        to_x = torch.mm(grad, weight) if ctx.needs_input_grad[0] else None
        # A product too: faster than a sum over rows, and as wide inside.
        to_bias = torch.mm(grad.new_ones((1, len(grad))), grad)[0]
        return to_x, torch.mm(grad.t(), x), to_bias, None
