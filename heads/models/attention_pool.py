"""Attention pooling of ragged segments."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from heads.models.dropout import Dropout
from heads.models.outputs import Attention
from heads.models.pooling import (
    FEW,
    RUN,
    segment_runs,
    segment_softmax,
    segment_sum,
    softmax_lines,
    weighted_sum,
    wide,
)

PoolKind = Literal["tanh", "gated"]


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
        if len(members) <= FEW:  # rounding them to lower precision takes longer than it saves
            with torch.autocast(members.device.type, enabled=False):
                return self.few(wide(members), offsets)
        if members.device.type == "cpu":
            return self.fused(members, offsets)
        return self.by_operation(members, offsets)

    def by_operation(self, members: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, Attention]:
        """`forward` as its formula reads."""
        logits = self._logits(members)
        weights = segment_softmax(logits, offsets)
        return weighted_sum(weights, members, offsets), Attention(weights, logits, offsets)

    def few(self, members: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, Attention]:
        """`forward` in few operations, for so few members that these are what takes the time."""
        logits = self._logits(members)
        lines = softmax_lines(logits, offsets)
        return lines @ members, Attention(lines.sum(0), logits, offsets)

    def weigh(self, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` takes the softmax of (N, 1), and what it then sums up (N, E)."""
        return self._logits(members)[:, None], members

    def finish(self, pooled: torch.Tensor) -> torch.Tensor:
        """(G, E) embeddings of such sums: they are so."""
        return pooled

    def _logits(self, members: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(wide(self.value(members)))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(wide(self.gate(members)))
        # No linear layer, which autocast would round to eight bits.
        logits: torch.Tensor = (self.dropout(hidden) * self.weight.weight[0]).sum(-1) + self.weight.bias
        return logits

    def fused(self, members: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, Attention]:
        """`forward` as one operation, for a CPU, where memory is what takes the time."""
        layers = [self.value] if self.gate is None else [self.value, self.gate]
        inner = wide(members[:0]).dtype
        pooled, weights, logits = _AttentionPooling.apply(
            members,
            _joined([layer.weight for layer in layers]).to(members.dtype),
            _joined([layer.bias for layer in layers]).to(inner),
            # What dropout multiplies by stands with the weights, which are fewer.
            self.dropout.scale * self.weight.weight[0].to(inner),
            self.weight.bias.to(inner),
            self.dropout.kept(
                (len(members), len(self.value.weight)), inner, members.device, not members.is_contiguous()
            ),
            offsets,
            self.gate is not None,
        )
        return pooled, Attention(weights, logits, offsets)


class _AttentionPooling(torch.autograd.Function):
    """z = Σ a h with a = softmax(w · f(V h)), whose one large gradient is one product.

    Operation by operation the gradient of h is two arrays of the size of h, and their sum. Here it
    is [∂(V h), A] [V; ∂z], with the attention A spread over a column a segment. Products of
    matrices have the precision of h, everything else is float32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any,
        members: torch.Tensor,
        value: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        kept: torch.Tensor | None,
        offsets: torch.Tensor,
        gated: bool,
    ) -> tuple[torch.Tensor, ...]:
        hidden = wide(_product(members, value.t())).add_(shift)
        if gated:
            inner, gate = hidden.chunk(2, dim=1)
            inner, gate = inner.tanh(), gate.sigmoid()
            activated = inner * gate
        else:
            inner = gate = activated = hidden.tanh_()
        dropped = activated if kept is None else activated * kept
        logits = torch.mv(dropped, weight).add_(bias)
        weights = segment_softmax(logits, offsets)
        pooled = weights.new_zeros((len(offsets) - 1, members.shape[1]))
        # Widened once where it is small, else twice by the run, which memory is slower than.
        values = wide(members) if len(members) <= RUN else members
        for run in segment_runs(offsets, len(members)):
            run.add(pooled, weights, values)
        ctx.gated = gated
        ctx.save_for_backward(members, values, value, weight, inner, gate, dropped, kept, weights, offsets)
        return pooled, weights, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_pooled: torch.Tensor, to_weights: torch.Tensor, to_logits: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        members, values, value, weight, inner, gate, dropped, kept, weights, offsets = ctx.saved_tensors
        runs = list(segment_runs(offsets, len(members)))
        products = _joined([run.products(to_pooled, values) for run in runs])
        # ∂softmax, and what was asked of attention and its logits themselves.
        slope = weights * (products + to_weights)
        sizes = offsets.diff()
        total = torch.repeat_interleave(segment_sum(slope, offsets), sizes, output_size=len(slope))
        slope = slope - weights * total + to_logits
        to_hidden = _outer(slope, weight, inner)
        if kept is not None:
            to_hidden.mul_(kept)
        if ctx.gated:
            to_inner = to_hidden * gate * (1 - inner.square())
            to_gate = to_hidden * inner * gate * (1 - gate)
            to_hidden = _beside(to_inner, to_gate)
        else:
            to_hidden = torch.ops.aten.tanh_backward(to_hidden, inner)
        low = to_hidden.to(members.dtype)
        to_members = None
        if ctx.needs_input_grad[0]:
            to_members = torch.empty_like(members)
            for run in runs:
                left = _beside(low[run.rows], run.spread(weights, low.dtype).t())
                right = torch.cat((value, to_pooled[run.segments].to(low.dtype)))
                _product(left, right, to_members[run.rows])
        return (
            to_members,
            torch.mm(low.t(), members),
            to_hidden.sum(dim=0),
            torch.mv(dropped.t(), slope),
            slope.sum(dim=0, keepdim=True),
            None,
            None,
            None,
        )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# `project` leaves members in memory by column where that is faster; what is made of them then is so too.


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The product a b, in memory as a is."""
    if a.is_contiguous():
        return torch.mm(a, b, out=out)
    return torch.mm(b.t(), a.t(), out=None if out is None else out.t()).t()


def _beside(*parts: torch.Tensor) -> torch.Tensor:
    """(N, …) next to one another, in memory as the first is."""
    if parts[0].is_contiguous():
        return torch.cat(parts, dim=1)
    return torch.cat([part.t() for part in parts]).t()


def _outer(a: torch.Tensor, b: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The outer product a bᵀ, in memory as another."""
    return a[:, None] * b if like.is_contiguous() else (b[:, None] * a).t()
