"""Segments of any size, end to end: softmax, sum and maximum over each.

A segment is ``values[offsets[g] : offsets[g + 1]]``. Everything is computed in float32 (float64
stays float64), with torch's own operations, and gives the same bits on every run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

# Rows at once: few enough for a core's cache and to be of few segments, enough for fast products.
RUN = 1024
# Up to so many members plain operations are done before the machinery for many has begun.
FEW = 256


# What was found out about offsets, for as long as they are held: a step asks ten times about the same.
_INDEX, _INSIDE = WeakIdKeyDictionary(), WeakIdKeyDictionary()


def segment_index(offsets: torch.Tensor, members: int) -> torch.Tensor:
    """(N,) int64: the segment of each of N members, from (G + 1,) offsets."""

    def find() -> torch.Tensor:
        if len(offsets) == 2:  # one segment, as a case by itself is: here and below in fewer steps
            return offsets.new_zeros(members)
        segments = torch.arange(len(offsets) - 1, device=offsets.device)
        # With the size told, a GPU need not be waited for.
        return torch.repeat_interleave(segments, offsets.diff(), output_size=members)

    return _known(_INDEX, offsets, find)


def _inside(offsets: torch.Tensor, members: int) -> torch.Tensor:
    """(G, N) bool: whether a member is of a segment."""

    def find() -> torch.Tensor:
        segments = torch.arange(len(offsets) - 1, device=offsets.device)
        return segments[:, None] == segment_index(offsets, members)

    return _known(_INSIDE, offsets, find)


def _known(
    memo: WeakIdKeyDictionary, offsets: torch.Tensor, find: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What was found about offsets that have not changed since, or is found now."""
    # What is made in inference mode is no use in training.
    if torch.is_inference_mode_enabled() or offsets.is_inference():
        return find()
    version, found = memo.get(offsets, (-1, None))  # type: ignore[no-untyped-call]
    if found is None or version != offsets._version:
        found = find()
        memo[offsets] = offsets._version, found
    return found  # type: ignore[no-any-return]


def segment_sum(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sum over each segment.

    Args:
        values: (N, …).
        offsets: (G + 1,) int64.

    Returns:
        (G, …) float32 or float64.
    """
    values = wide(values)
    if len(offsets) == 2:
        return values.sum(0, keepdim=True)
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
    if len(offsets) == 2:
        return values.amax(0, keepdim=True)
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


def softmax_lines(logits: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(G, N): `segment_softmax` of (N,), a line a segment, 0 for the members of the others.

    For few members: it takes a third of the operations.
    """
    if len(offsets) == 2:
        return torch.softmax(logits[None], 1)
    return torch.softmax(torch.where(_inside(offsets, len(logits)), logits, -torch.inf), 1)


def segment_log_softmax(logits: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Logarithm of `segment_softmax`, finite where the softmax itself underflows to 0."""
    logits = wide(logits)
    if len(offsets) == 2:
        return torch.log_softmax(logits, 0)
    index = segment_index(offsets, len(logits))
    shifted = logits - segment_max(logits.detach(), offsets)[index]
    return shifted - torch.log(segment_sum(torch.exp(shifted), offsets))[index]


def weighted_sum(weights: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Σ weights · values over each segment.

    Args:
        weights: (N,) or (N, K).
        values: (N, E).
        offsets: (G + 1,) int64.

    Returns:
        (G, E) or (G, K, E).
    """
    # On a GPU the number of segments in a run would have to be waited for.
    if values.device.type != "cpu" or len(values) <= FEW:
        rows = wide(values) if weights.ndim == 1 else wide(values)[:, None]
        return segment_sum(weights[..., None] * rows, offsets)
    weights = weights.double() if values.dtype == torch.float64 else wide(weights)
    total: torch.Tensor = _WeightedSum.apply(weights, values, offsets)
    return total


def segment_products(values: torch.Tensor, each: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The inner products of every row with K vectors of its segment, not in autocast's precision.

    Args:
        values: (N, E).
        each: (G, K, E).
        offsets: (G + 1,) int64.

    Returns:
        (N, K).
    """
    if len(offsets) == 2:
        with torch.autocast(values.device.type, enabled=False):
            return values @ each[0].t()
    index = segment_index(offsets, len(values))
    # Vector by vector: all at once would hold K times the values.
    return torch.stack([(values * vector[index]).sum(-1) for vector in each.unbind(1)], 1)


class _WeightedSum(torch.autograd.Function):
    """A product of matrices for every run of rows: their weights, a row a segment, times their values.

    Added up row by row it takes ten times as long, and needs an array of the values' size besides.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weights, values, offsets)
        total = weights.new_zeros((len(offsets) - 1, *weights.shape[1:], values.shape[1]))
        for run in segment_runs(offsets, len(values)):
            run.add(total, weights, values)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, values, offsets = ctx.saved_tensors
        to_weights, to_values = torch.empty_like(weights), torch.empty_like(values)
        low = grad.to(values.dtype)
        for run in segment_runs(offsets, len(values)):
            if ctx.needs_input_grad[0]:
                to_weights[run.rows] = run.products(grad, values)
            if ctx.needs_input_grad[1]:
                spread, each = run.spread(weights, low.dtype), low[run.segments].flatten(0, -2)
                torch.mm(spread.t(), each, out=to_values[run.rows])
        return to_weights, to_values, None


@dataclass(frozen=True)
class SegmentRun:
    """Some rows, one after the other, and the segments that they are of.

    Attributes:
        rows: The rows.
        segments: Their segments.
        own: (n,) int64, of every row its segment, counted from the first of these.
    """

    rows: slice
    segments: slice
    own: torch.Tensor

    def add(self, total: torch.Tensor, weights: torch.Tensor, values: torch.Tensor) -> None:
        """Add to (G, [K,] E) what these rows of (N[, K]) weights and (N, E) values come to."""
        mine = total[self.segments].flatten(0, -2)
        mine.addmm_(self.spread(weights), values[self.rows].to(weights.dtype))

    def spread(self, weights: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(segments[ · K], n): the weights of every row in its segment's lines, else 0; of (N[, K])."""
        mine = weights[self.rows].to(dtype or weights.dtype)
        columns = mine[None] if mine.ndim == 1 else mine.t()[None]
        if self._count == 1:
            return columns.flatten(0, -2)
        found = mine.new_zeros((self._count, *columns.shape[1:]))
        return found.scatter_(0, self._place(columns), columns).flatten(0, -2)

    def products(self, each: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(n[, K]): every row of (N, E) values times its segment's of (G, [K,] E), in their precision."""
        mine = each[self.segments]
        found = torch.mm(mine.flatten(0, -2), values[self.rows].to(each.dtype).t())
        found = found.view(*mine.shape[:-1], -1)
        if self._count == 1:
            return found[0].t()
        return found.gather(0, self._place(found[:1]))[0].t()

    @property
    def _count(self) -> int:
        return int(self.segments.stop - self.segments.start)

    def _place(self, like: torch.Tensor) -> torch.Tensor:
        """Each row's segment, in the shape of (1, [K,] n)."""
        return self.own.expand(like.shape)


def segment_runs(offsets: torch.Tensor, members: int) -> Iterator[SegmentRun]:
    """All rows, in runs of few segments each; on a GPU this would have to wait for it."""
    index = segment_index(offsets, members)
    if members <= RUN:
        yield SegmentRun(slice(0, members), slice(0, len(offsets) - 1), index)
        return
    for start in range(0, members, RUN):
        own = index[start : start + RUN]
        first, last = int(own[0]), int(own[-1])
        yield SegmentRun(slice(start, start + len(own)), slice(first, last + 1), own - first)


def wide(values: torch.Tensor) -> torch.Tensor:
    """The values as float32, or as float64 if that is what they are."""
    return values if values.dtype == torch.float64 else values.float()
