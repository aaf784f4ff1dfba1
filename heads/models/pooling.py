"""Segments of any size, end to end: softmax, sum and maximum over each; and pools made of them.

A segment is ``values[offsets[g] : offsets[g + 1]]``. Everything is computed in float32 (float64
stays float64), with torch's own operations, and gives the same bits on every run on a CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from heads.models.dropout import Dropout
from heads.models.outputs import Attention

PoolKind = Literal["tanh", "gated"]

# Below this a feature counts as constant; below this share of the median one, as nearly constant.
_LEAST_DEVIATION, _LEAST_SHARE = 1e-6, 0.01


def segment_index(offsets: torch.Tensor, members: int) -> torch.Tensor:
    """(N,) int64: the segment of each of N members, from (G + 1,) offsets."""
    segments = torch.arange(len(offsets) - 1, device=offsets.device)
    # With the size told, a GPU need not be waited for.
    return torch.repeat_interleave(segments, offsets.diff(), output_size=members)


def segment_sum(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sum over each segment.

    Args:
        values: (N, …).
        offsets: (G + 1,) int64.

    Returns:
        (G, …) float32 or float64.
    """
    values = wide(values)
    total = values.new_zeros((len(offsets) - 1, *values.shape[1:]))
    return total.index_add(0, segment_index(offsets, len(values)), values)


def segment_max(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Maximum over each segment; the gradient is shared equally by equal members.

    Args:
        values: (N,) or (N, K).
        offsets: (G + 1,) int64; no segment is empty.

    Returns:
        (G,) or (G, K).
    """
    values = wide(values)
    index = segment_index(offsets, len(values))
    if values.ndim == 2:
        index = index[:, None].expand_as(values)
    start = values.new_full((len(offsets) - 1, *values.shape[1:]), -torch.inf)
    return start.scatter_reduce(0, index, values, "amax")


def segment_argmax(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The first largest member of each segment.

    Args:
        values: (N,) or (N, K); with K columns, each on its own.
        offsets: (G + 1,) int64; no segment is empty.

    Returns:
        (G,) or (G, K) int64 positions among the N; where a segment has NaN, one of its members.
    """
    values = wide(values.detach())
    index = segment_index(offsets, len(values))
    position, last = torch.arange(len(values), device=values.device), offsets[1:] - 1
    largest = segment_max(values, offsets)[index]
    if values.ndim == 2:
        index, position = index[:, None].expand_as(values), position[:, None]
        last = last[:, None].expand(-1, values.shape[1])
    candidates = torch.where(values == largest, position, len(values))
    return last.scatter_reduce(0, index, candidates, "amin")


def segment_rank(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The place of each member in its segment, from 0, the largest; of equal ones, the first.

    Args:
        values: (N,).
        offsets: (G + 1,) int64.

    Returns:
        (N,) int64.
    """
    index = segment_index(offsets, len(values))
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(index[order], stable=True)]
    places = torch.arange(len(values), device=values.device) - offsets[index]
    return torch.empty_like(places).scatter(0, order, places)


def segment_softmax(logits: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Softmax over the members of each segment.

    Args:
        logits: (N,) or (N, K); with K columns, each on its own.
        offsets: (G + 1,) int64; no segment is empty.

    Returns:
        Of the same shape, summing to 1 in every segment.
    """
    return torch.exp(segment_log_softmax(logits, offsets))


def segment_log_softmax(logits: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Logarithm of `segment_softmax`, finite where the softmax itself underflows to 0."""
    logits = wide(logits)
    index = segment_index(offsets, len(logits))
    shifted = logits - segment_max(logits.detach(), offsets)[index]
    return shifted - torch.log(segment_sum(torch.exp(shifted), offsets))[index]


def weighted_sum(weights: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Σ weights · values over each segment.

    Args:
        weights: (N,).
        values: (N, E).
        offsets: (G + 1,) int64.

    Returns:
        (G, E).
    """
    return segment_sum(weights[:, None] * wide(values), offsets)


class AttentionPool(nn.Module):
    """Attention pooling of ragged segments.

    ``tanh``: Linear(E → hidden), Tanh, Dropout, Linear(hidden → 1). ``gated``: tanh(V h) × sigmoid(U h)
    in place of the tanh.

    Source: Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), equations 8 and 9.

    Args:
        embed_dim: E.
        hidden: Width of the attention's hidden layer.
        dropout: Between the two layers.
        kind: ``tanh`` or ``gated``.
    """

    def __init__(
        self, embed_dim: int, hidden: int = 128, dropout: float = 0.0, kind: PoolKind = "tanh"
    ) -> None:
        super().__init__()
        self.value = nn.Linear(embed_dim, hidden)
        self.gate = nn.Linear(embed_dim, hidden) if kind == "gated" else None
        self.dropout = Dropout(dropout)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, members: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, Attention]:
        """Pool.

        Args:
            members: (N, E).
            offsets: (G + 1,) int64.

        Returns:
            (G, E) pooled embeddings, and the attention.
        """
        hidden = torch.tanh(self.value(members))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(members))
        logits = wide(self.weight(self.dropout(hidden)).squeeze(-1))
        weights = segment_softmax(logits, offsets)
        return weighted_sum(weights, members, offsets), Attention(weights, logits, offsets)


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

        In float32 the standardisation is folded into the layer, which touches E·D numbers
        instead of ΣP·D. In lower precision it must come first: features that differ in their
        third digit alone would all round to the same bf16.

        Args:
            features: (ΣP, D).
            layer: D → E.

        Returns:
            (ΣP, E).
        """
        if torch.is_autocast_enabled(features.device.type):
            projected: torch.Tensor = layer(self(features))
            return projected
        weight = layer.weight * self.std.reciprocal()
        shift = weight @ self.mean
        bias = -shift if layer.bias is None else layer.bias - shift
        return nn.functional.linear(features.to(weight.dtype), weight, bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(ΣP, D) standardised features."""
        # One multiplication and addition a number: a division takes ten times as long on a CPU.
        scale = self.std.reciprocal()
        return torch.addcmul(-self.mean * scale, features.to(self.mean.dtype), scale)


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
    if varies.any():
        std = std.clamp_min(_LEAST_SHARE * float(std[varies].median()))
    return torch.where(varies, std, 1.0)


def wide(values: torch.Tensor) -> torch.Tensor:
    """The values as float32, or as float64 if that is what they are."""
    return values if values.dtype == torch.float64 else values.float()
