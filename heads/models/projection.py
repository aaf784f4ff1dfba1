"""The layer that every patch goes through, where a head spends nearly all of its time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from heads.models.dropout import Dropout
from heads.models.standardize import Standardize, working_precision


def project(
    features: torch.Tensor,
    standardize: Standardize,
    layer: nn.Linear,
    dropout: Dropout | None = None,
    standardized: bool = False,
) -> torch.Tensor:
    """``Dropout(ReLU(layer((features − mean) / std)))``.

    Args:
        features: (ΣP, D).
        standardize: Mean and deviation.
        layer: D → E.
        dropout: Of the result; none where it is None, or not in training.
        standardized: Whether the features are so already.

    Returns:
        (ΣP, E), in autocast's precision where there is one; in memory by column where that is faster.
    """
    low, weight = working_precision(layer), layer.weight
    inputs = features.to(low) if standardized else standardize.lower(features, low)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    # By column, so that the gradient of the weights takes half the time in bf16; a GPU wants rows.
    on_cpu, learned = inputs.device.type == "cpu", torch.is_grad_enabled()
    by_column = low == torch.bfloat16 and learned and on_cpu
    kept, scale = None, 1.0
    if dropout is not None:
        scale = dropout.scale
        kept = dropout.kept((len(inputs), len(weight)), inputs.dtype, inputs.device, by_column)
    projected: torch.Tensor = _Projection.apply(inputs, weight, bias, scale, kept, by_column)
    return projected


def scores_of(members: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """`layer_of` in float32, of (N, E) float32: of scores in eight bits, many would be the largest."""
    with torch.autocast(members.device.type, enabled=False):
        return layer_of(members, layer.weight, layer.bias)


def layer_of(members: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``members @ weightᵀ + bias``, (N, E) → (N, E'); its gradient is in memory as members are."""
    return (weight @ members.t()).t() + bias


class _Projection(torch.autograd.Function):
    """max(0, x Wᵀ + b) × scale × kept, computed in place, in the precision of x.

    As four operations this writes and keeps four arrays of the output's size. Here the output alone is
    kept: where it is 0, no gradient passes, be it for the ReLU or for dropout, and elsewhere all of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
        kept: torch.Tensor | None,
        by_column: bool,
    ) -> torch.Tensor:
        low = weight.to(x.dtype)
        # Not addmm, which on a CPU takes a sixth longer than the bare product.
        shape = (len(x), len(low))
        if by_column:
            out = torch.empty_strided(shape, (1, len(x)), dtype=x.dtype, device=x.device)
            torch.mm(low, x.t(), out=out.t())
        else:
            out = torch.mm(x, low.t())
        # c·ReLU(x) = ReLU(c·x), and with the sum the factor costs nothing.
        torch.add((scale * bias).to(x.dtype), out, alpha=scale, out=out).clamp_min_(0)
        if kept is not None:
            out.mul_(kept)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.mm(grad, weight.to(grad.dtype)).mul_(ctx.scale)
        to_weight = torch.mm(grad.t(), x).to(weight.dtype).mul_(ctx.scale)
        # A product too: faster than a sum over rows, and as wide inside.
        to_bias = torch.mm(grad.new_ones((1, len(grad))), grad)[0].to(weight.dtype).mul_(ctx.scale)
        return to_x, to_weight, to_bias, None, None, None
