"""Attention pools of several heads, in the place of `AttentionPool`."""

from __future__ import annotations

import math

import torch
from torch import nn

from featstore.errors import ConfigError
from heads.models.dropout import Dropout
from heads.models.outputs import Attention
from heads.models.pooling import segment_log_softmax, segment_sum, wide

HEADS = 4


class MultiHeadPool(nn.Module):
    """Attention pooling by several heads, each of its own part of the embedding.

    A member is cut into H parts of E/H numbers. Each head attends by its own
    a = softmax(w · Dropout(tanh(V h + b))) of its part h and sums up its part, z = Σ a h; the z are put
    one after the other and mixed by a linear layer.

    Source: Keshvarikhojasteh, Pluim and Veta 2024 (MAD-MIL, arXiv 2404.05362), which is what goes by
    multi-head attention pooling in multiple instance learning. Theirs is gated (tanh × sigmoid) and
    without the linear layer; that one is of Vaswani et al. 2017 (arXiv 1706.03762).

    Args:
        embed_dim: E.
        hidden: Width of each head's hidden layer.
        dropout: Between the attention's two layers.
        heads: H, of which E is a multiple.

    Raises:
        ConfigError: E cannot be divided by H.
    """

    def __init__(self, embed_dim: int, hidden: int = 128, dropout: float = 0.0, heads: int = HEADS) -> None:
        super().__init__()
        _check_width(embed_dim, heads)
        self.heads = heads
        # Every head's layer has its own part's fan-in: one convolution, each group a head.
        self.value = nn.Conv1d(embed_dim, heads * hidden, 1, groups=heads)
        self.dropout = Dropout(dropout)
        self.weight = nn.Conv1d(heads * hidden, heads, 1, groups=heads)
        self.output = nn.Linear(embed_dim, embed_dim)

    def forward(self, members: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, Attention]:
        """Pool.

        Args:
            members: (N, E).
            offsets: (G + 1,) int64.

        Returns:
            (G, E) pooled embeddings, and the mean attention of the heads (`attention_of_heads`).
        """
        logits, values = self.weigh(members)
        weights, attention = attention_of_heads(logits, offsets)
        return self.finish(_weighted_parts(weights, values, offsets)), attention

    def weigh(self, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each head takes the softmax of (N, H), and what is then summed up in parts (N, E)."""
        hidden = self.dropout(torch.tanh(_grouped(self.value, members)))
        return wide(_grouped(self.weight, hidden)), members

    def finish(self, pooled: torch.Tensor) -> torch.Tensor:
        """(G, E) embeddings of such sums."""
        found: torch.Tensor = self.output(pooled)
        return found


class TransformerPool(nn.Module):
    """A learned query token that goes through one pre-norm transformer layer over each segment.

    With x = LayerNorm(members) and a token t: u = t + O · concat over heads of Σ a V x, where
    a = softmax(Q LayerNorm(t) · K x / √(E/H)); pooled = u + MLP(LayerNorm(u)), the MLP Linear, GELU,
    Dropout, Linear. Members are the only keys: all that is pooled comes from them, by a.

    Only the token is read after the layer, and a member could not pass on before the next what it
    has taken of others in this one: the members' own queries would change nothing. Without them
    the attention is exact, and its cost linear in the members, for segments of any size.

    Source: pooling by a learned query of Lee et al. 2019 (Set Transformer, arXiv 1810.00825), with the
    norms before the layers (Xiong et al. 2020, arXiv 2002.04745), as in the class attention of
    Touvron et al. 2021 (CaiT, arXiv 2103.17239).

    Args:
        embed_dim: E.
        hidden: Width of the MLP's hidden layer.
        dropout: In the MLP, and of what attention adds to the token.
        heads: H, of which E is a multiple.

    Raises:
        ConfigError: E cannot be divided by H.
    """

    def __init__(self, embed_dim: int, hidden: int = 128, dropout: float = 0.0, heads: int = HEADS) -> None:
        super().__init__()
        _check_width(embed_dim, heads)
        self.heads = heads
        self.token = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.member_norm, self.token_norm, self.pooled_norm = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.query = nn.Linear(embed_dim, embed_dim)
        # A key's bias would add the same to all logits of a query: softmax does not see it.
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        self.value, self.output = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.dropout = Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, embed_dim)
        )

    def forward(self, members: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, Attention]:
        """Pool.

        Args:
            members: (N, E).
            offsets: (G + 1,) int64.

        Returns:
            (G, E) pooled embeddings, and the mean attention of the heads (`attention_of_heads`).
        """
        logits, values = self.weigh(members)
        weights, attention = attention_of_heads(logits, offsets)
        return self.finish(_weighted_parts(weights, values, offsets)), attention

    def weigh(self, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each head takes the softmax of (N, H), and what is then summed up in parts (N, E)."""
        members = self.member_norm(members)
        query = self.query(self.token_norm(self.token)).view(self.heads, -1)
        # q · (K x) = (Kᵀ q) · x: one vector a head is projected, not every member.
        asked = (query[:, None] @ self.key.weight.view(self.heads, -1, len(self.token)))[:, 0]
        logits = wide(nn.functional.linear(members, asked)) * query.shape[1] ** -0.5
        return logits, self.value(members)

    def finish(self, pooled: torch.Tensor) -> torch.Tensor:
        """(G, E) embeddings of such sums."""
        answered = self.token + self.dropout(self.output(pooled))
        found: torch.Tensor = answered + self.mlp(self.pooled_norm(answered))
        return found


def attention_of_heads(logits: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, Attention]:
    """Each head's attention, and their mean as one attention.

    The mean's logits are log(mean over heads of a) + the mean over heads of log Σ exp(z): their
    softmax is the mean attention, and if the heads agree they are the heads' own z. Penalties act on
    this mean.

    Args:
        logits: (N, H) z of every head.
        offsets: (G + 1,) int64.

    Returns:
        (N, H) weights a; the mean, with weights and logits (N,).
    """
    logarithm = segment_log_softmax(logits, offsets)
    mean = torch.logsumexp(logarithm, 1) - math.log(logits.shape[1])
    return torch.exp(logarithm), Attention(torch.exp(mean), mean + (logits - logarithm).mean(1), offsets)


def _weighted_parts(weights: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(G, E): each of (N, H) weights sums up its own E/H of (N, E) values."""
    parts = wide(values).view(*weights.shape, -1)
    return segment_sum(weights[:, :, None] * parts, offsets).flatten(1)


def _grouped(layer: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """A convolution of width 1 in groups, of (N, E), as one matrix product a group."""
    parts = x.view(len(x), layer.groups, -1).transpose(0, 1)
    weight = layer.weight.view(layer.groups, -1, parts.shape[2])
    found: torch.Tensor = (parts @ weight.mT).transpose(0, 1).flatten(1)
    return found if layer.bias is None else found + layer.bias


def _check_width(embed_dim: int, heads: int) -> None:
    if embed_dim % heads:
        raise ConfigError(
            f"head.embed_dim is {embed_dim}, and this attention pool has {heads} heads",
            expected="a width that can be divided by the number of heads",
            where="head.embed_dim",
            fix=f"--set head.embed_dim={embed_dim + heads - embed_dim % heads}, or another attention_pool",
        )
