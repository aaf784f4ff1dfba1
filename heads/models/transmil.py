"""TransMIL: two layers of Nyström attention over a case's patches, and a position code between them."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from featstore.bags import BagBatch
from featstore.errors import ConfigError
from heads.models.config import TransMILConfig
from heads.models.dropout import Dropout
from heads.models.head import Float32Linear, ProjectedHead, register_head
from heads.models.outputs import Attention, HeadOutput
from heads.models.pooling import wide

# As Xiong et al. recommend: too few to invert what is small in the matrix, which they damp.
_ITERATIONS = 6
_KERNEL = 33
# Up to so many tokens exact attention takes less time than its approximation (two cores, 512 wide).
_EXACT = 2500
# The least that is reported of a patch, as a share of what it had if all were equal.
_LEAST = 1e-6


@register_head("transmil", TransMILConfig)
class TransMIL(ProjectedHead):
    """A transformer over the patches of a case, at a cost linear in their number.

    h = Dropout(ReLU(W x + b)), filled up to the next square number with its own first patches, a
    learned class token c before them: t = (c, h). t₁ = t + A₁(LayerNorm(t)); t₂ = t₁ with the
    `PositionCode` of the square added to all but c; c₃ = c₂ + A₂(LayerNorm(t₂))'s first row.
    Logits = W' Dropout(LayerNorm(c₃)). A is `NystromAttention`.

    The attention ``patch`` is what A₂ takes of each patch for the class token: the first row of its
    matrix (`NystromAttention.first_token`), the mean over heads; a patch that stands in the square
    twice has both its shares. The token's own share is left out, an entry below 10⁻⁶ of an equal share
    (the approximation's may be negative) counts as that much, and the rest is divided by its sum. The
    convolution over the values is not in it, nor what patches took of one another in A₁. Its
    logits are log(weight × patches).

    At the default widths a training step keeps 42 kB a patch, features included, and 52 MB: 0.9 GB at
    20,000 patches; ``exact`` 33 kB a patch. ``auto`` is exact up to 2,500 tokens, where it takes less time
    (a third of it at 700), and ``nystrom`` beyond.

    Source: Shao et al. 2021 (TransMIL, arXiv 2106.00908), with the dropout and ReLU of the authors'
    code; `NystromAttention` says where it differs. Cases come one after another, unpadded.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths, landmarks and dropouts.

    Raises:
        ConfigError: ``embed_dim`` cannot be divided by the heads.
    """

    levels = ("patch",)

    def __init__(self, dim: int, classes: int, config: TransMILConfig) -> None:
        super().__init__(dim, config)
        width, heads = config.embed_dim, config.transmil_heads
        if over := width % heads:
            raise ConfigError(
                f"head.embed_dim is {width}, head.transmil_heads {heads}",
                expected="a width that can be divided by the number of heads",
                where="head.embed_dim",
                fix=f"--set head.embed_dim={width + heads - over}, or other transmil_heads",
            )
        landmarks = config.transmil_landmarks or max(1, width // 2)
        exact = {"nystrom": 0, "auto": _EXACT, "exact": sys.maxsize}[config.transmil_attention]
        attention = (width, heads, landmarks, exact)
        self.token = nn.Parameter(torch.randn(1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.first = NystromAttention(*attention, config.dropout)
        self.position = PositionCode(width)
        self.second = NystromAttention(*attention, config.dropout)
        self.norm = nn.LayerNorm(width)
        self.classifier_dropout = Dropout(config.rate(config.classifier_dropout))
        self.classifier = Float32Linear(width, classes)

    def classify(self, members: torch.Tensor, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify embedded patches.

        Args:
            members: (ΣP, E).
            batch: B cases.
            schedule: Not used.

        Returns:
            Logits (B, C) and attention ``patch`` over the patches of each case.
        """
        offsets = batch.case_patch_offsets
        cases = [self._case(members[a:b]) for a, b in itertools.pairwise(offsets.tolist())]
        token, weights, logits = (torch.cat(each) for each in zip(*cases, strict=True))
        return HeadOutput(
            self.classifier(self.classifier_dropout(self.norm(token))),
            {"patch": Attention(weights, logits, offsets)},
        )

    def _case(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The class token (1, E) of (N, E) patches, its attention's weights and logits (N,)."""
        count = len(patches)
        side = math.isqrt(count - 1) + 1
        again = side * side - count
        tokens = torch.cat((self.token.to(patches.dtype), patches, patches[:again]))
        tokens = tokens + self.first(self.norms[0](tokens))
        tokens = torch.cat((tokens[:1], self.position(tokens[1:], side)))
        found, rows = self.second.first_token(self.norms[1](tokens))
        share = rows.mean(0)[1:]
        share = share[:count] + functional.pad(share[count:], (0, count - again))
        logits = torch.log((share * count).clamp_min(_LEAST))
        logits = torch.log_softmax(logits, 0)
        return tokens[:1] + found, torch.exp(logits), logits + math.log(count)


class NystromAttention(nn.Module):
    """Self-attention of n tokens by way of m landmarks, and a convolution over the values.

    A head has queries Q, keys K and values V (n, d). Landmarks q̃, k̃ are the means of every l = ⌈n/m⌉
    tokens in turn, the first of the n mod l left over. With s(X, Y) = softmax(X Yᵀ / √d) by row:
    s(Q, k̃) · s(q̃, k̃)⁺ · s(q̃, K) · V, where ⁺ is the Moore-Penrose inverse by six iterations
    (`inverse_times`). With n ≤ m every token is its own landmark, and what the formula approximates,
    s(Q, K) · V, is computed itself; so it is up to ``exact`` tokens, which may be more. A convolution
    of V along the tokens is added (33 wide, one kernel a head); then a linear layer over all heads,
    and Dropout.

    Source: Xiong et al. 2021 (Nyströmformer, arXiv 2102.03902), where m divides n.
    The code that TransMIL's authors use (and torchmil) puts zeros before the tokens until it does;
    they stand among keys and landmarks, and with few tokens are most of them. Here are none; where n > m
    and that code needs none, the two agree. It scales Z₀ by the largest sums over all heads and cases;
    here, as in the paper, by each matrix' own, so that no case depends on its batch. torchmil leaves
    out the convolution and the linear layer, which the authors' code has.

    Args:
        width: E.
        heads: H, of which E is a multiple.
        landmarks: m.
        exact: The largest n for which attention is exact, at a cost that grows as n².
        dropout: Of what comes out.
    """

    def __init__(
        self, width: int, heads: int, landmarks: int, exact: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.exact = heads, landmarks, max(exact, landmarks)
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.convolution = nn.Conv2d(
            heads, heads, (_KERNEL, 1), padding=(_KERNEL // 2, 0), groups=heads, bias=False
        )
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, E) → (n, E)."""
        query, key, value = self._by_head(self.qkv(tokens))
        attend = functional.scaled_dot_product_attention
        if len(tokens) <= self.exact:
            found = attend(query[None], key[None], value[None])[0]
        else:
            near_query, near_key = self._landmarks(tokens)
            gathered = attend(near_query[None], key[None], value[None])[0]
            answers = inverse_times(self._softmax(near_query, near_key), wide(gathered))
            found = attend(query[None], near_key[None], answers.to(value.dtype)[None])[0]
        return self._out(found + self.convolution(value))

    def first_token(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the first token alone, and what it takes of every token.

        Args:
            tokens: (n, E).

        Returns:
            (1, E); and (H, n), the first row of each head's approximate attention matrix,
            s(Q₁, k̃) · s(q̃, k̃)⁺ · s(q̃, K): it sums to about 1 and may be negative in places.
        """
        to_query, to_key, to_value = self.qkv.weight.chunk(3)
        (query,) = self._by_head(functional.linear(tokens[:1], to_query))
        (key,) = self._by_head(functional.linear(tokens, to_key))
        if len(tokens) <= self.exact:
            row = self._softmax(query, key)
        else:
            near_query, near_key = self._landmarks(tokens)
            inner = self._softmax(near_query, near_key)
            # r A⁺ = (Aᵀ⁺ rᵀ)ᵀ, and the iterations keep to that.
            by_landmark = inverse_times(inner.mT, self._softmax(query, near_key).mT).mT
            row = by_landmark @ self._softmax(near_query, key)
        # Values are linear in the tokens, so that H sums of tokens need be projected, not n tokens.
        found = (row @ tokens) @ to_value.view(self.heads, -1, tokens.shape[1]).mT
        reach = _KERNEL // 2
        (value,) = self._by_head(functional.linear(tokens[: reach + 1], to_value))
        kernel = self.convolution.weight[:, 0, reach:, 0][:, None, : len(tokens)]
        return self._out(found + kernel @ value), wide(row[:, 0])

    def _landmarks(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries and keys (H, ⌈n/l⌉, d) of the landmarks."""
        length = -(-len(tokens) // self.landmarks)
        left = len(tokens) % length
        means = tokens[left:].view(-1, length, tokens.shape[1]).mean(1)
        if left:
            means = torch.cat((tokens[:left].mean(0, keepdim=True), means))
        # There is no bias: the query of a mean is the mean of the queries.
        return self._by_head(functional.linear(means, self.qkv.weight[: 2 * tokens.shape[1]]))

    def _by_head(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(n, k·E) as k views of (H, n, d)."""
        width = self.qkv.in_features // self.heads
        return tuple(x.view(len(x), -1, self.heads, width).permute(1, 2, 0, 3))

    def _out(self, found: torch.Tensor) -> torch.Tensor:
        """Of (H, n, d), the (n, E) that leaves the layer."""
        return torch.as_tensor(self.dropout(self.output(found.transpose(0, 1).flatten(1))))

    def _softmax(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """softmax(Q Kᵀ / √d) of each head, in float32."""
        return torch.softmax(wide((query * self.scale) @ key.mT), -1)


class PositionCode(nn.Module):
    """The position code of TransMIL (PPEG): x + K₇ * x + K₅ * x + K₃ * x + b over a square of tokens.

    K are depth-wise convolutions of these widths, with zeros beyond the edge. They are added up
    first, to be one convolution; theirs have a bias each, which is the same as one.

    Source: Shao et al. 2021 (arXiv 2106.00908).

    Args:
        width: E.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seven, self.five, self.three = (
            nn.Conv2d(width, width, size, groups=width, bias=size == 7) for size in (7, 5, 3)
        )

    def forward(self, tokens: torch.Tensor, side: int) -> torch.Tensor:
        """(side², E), row by row, → (side², E)."""
        five, three = functional.pad(self.five.weight, [1] * 4), functional.pad(self.three.weight, [2] * 4)
        weight = self.seven.weight + five + three
        square = tokens.view(side, side, -1).permute(2, 0, 1)[None]
        coded = functional.conv2d(square, weight, self.seven.bias, padding=3, groups=len(weight))
        return tokens + coded[0].permute(1, 2, 0).reshape(tokens.shape)


def inverse_times(matrix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """A⁺ B, with the Moore-Penrose inverse A⁺ by six iterations.

    From Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞), six times Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z))); then Z B.
    Source: Xiong et al. 2021 (arXiv 2102.03902).

    Here by W = Z A, which is symmetric at first and thus always, being a polynomial of W₀:
    W ← ¼ (13 W − 15 W² + 7 W³ − W⁴), and Z₆ = Π ¼ (13 I − 15 W + 7 W² − W³) · Z₀. That takes two
    products of m × m matrices an iteration in place of four, backwards three in place of eight, and
    Z is never made, only Z B. In float32 it is right to 10⁻⁴ of the largest number.

    Args:
        matrix: (H, m, m) without negative entries, float32 or float64.
        block: (H, m, k).

    Returns:
        (H, m, k).
    """
    with torch.autocast(matrix.device.type, enabled=False):
        bound = matrix.sum(-2).amax(-1) * matrix.sum(-1).amax(-1)
        start = matrix.mT / bound[:, None, None]
        product: torch.Tensor = _Iterations.apply(start @ matrix, start @ block)
        return product


class _Iterations(torch.autograd.Function):
    """Π ¼ (13 I − 15 W + 7 W² − W³) · B over the iterates of a W that is, and stays, symmetric."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        saved = []
        for i in range(_ITERATIONS):
            square = w @ w
            saved += [w, square, block]
            once = w @ block
            block = torch.baddbmm(13 * block - 15 * once, square, 7 * block - once, beta=0.25, alpha=0.25)
            if i < _ITERATIONS - 1:
                w = torch.baddbmm(w, square, torch.sub(square, w, alpha=7), beta=3.25, alpha=-0.25)
                w.sub_(square, alpha=3.75)
        ctx.save_for_backward(*saved)
        return block

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (of_block,) = gradients
        twice = torch.zeros(0)  # of W's gradient: M + Mᵀ takes one pass less than its half
        with torch.autocast(of_block.device.type, enabled=False):
            for i in reversed(range(_ITERATIONS)):
                w, square, block = ctx.saved_tensors[3 * i : 3 * i + 3]
                once = w @ block
                of_square = (of_block / 4) @ (7 * block - once).mT
                inner = square @ of_block / 4
                of_once = -3.75 * of_block - inner
                of_w = of_once @ block.mT
                of_block = torch.baddbmm(3.25 * of_block + 7 * inner, w, of_once)
                if i < _ITERATIONS - 1:
                    outer = square @ twice
                    of_square.baddbmm_(twice, torch.sub(square, w, alpha=7), alpha=-0.125)
                    of_square.sub_(twice, alpha=1.875).sub_(outer, alpha=0.125)
                    of_w.add_(twice, alpha=1.625).add_(outer, alpha=0.875)
                of_w.baddbmm_(of_square + of_square.mT, w)
                twice = of_w + of_w.mT
        return twice / 2, of_block
