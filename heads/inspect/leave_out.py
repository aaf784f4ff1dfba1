"""What is left of a pool by attention when one member goes: exactly, for all members at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from featstore.bags import BagBatch
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_index, segment_max, segment_sum, weighted_sum, wide

NOTHING = -torch.inf  # the mass of no member at all


@dataclass(frozen=True)
class Probe:
    """What a head says of every single patch, slice and stain of B cases.

    All are logits; ΣP patches, ΣS slices, ΣT stains, C classes.

    Attributes:
        output: Of the one forward pass.
        alone: (ΣP, C), the patch as a bag of its own.
        in_place: (ΣP, C), the patch has all of its slice's attention, and slices and stains keep theirs.
        without_patch: (ΣP, C), the case without this patch; NaN where nothing is left.
        without_slice: (ΣS, C), likewise.
        without_stain: (ΣT, C), likewise.
        reason: Why something that was asked for is None, for the user; "" where nothing is.
    """

    output: HeadOutput
    alone: torch.Tensor
    in_place: torch.Tensor | None = None
    without_patch: torch.Tensor | None = None
    without_slice: torch.Tensor | None = None
    without_stain: torch.Tensor | None = None
    reason: str = ""


@dataclass(frozen=True)
class Rest:
    """What R pools come to, each with a change of its own (K heads, F values a head).

    Attributes:
        mass: (R, K) log Σ exp(logit); −∞ where no member is left.
        sums: (R, K, F) Σ a v, 0 where no member is left.
    """

    mass: torch.Tensor
    sums: torch.Tensor

    @property
    def gone(self) -> torch.Tensor:
        """(R,) bool: no member is left."""
        return self.mass[:, 0] == NOTHING

    @property
    def known(self) -> torch.Tensor:
        """``sums``, NaN where no member is left."""
        if not bool(self.gone.any()):
            return self.sums
        return self.sums.masked_fill(self.gone[:, None, None], torch.nan)


class Pooled:
    """A pool by softmax: a = softmax(logits) over each segment, sums Σ a v.

    Args:
        logits: (M, K) of M members; −∞: the member is not there.
        values: (M, K, F) v.
        offsets: (G + 1,) int64 of the G segments.

    Attributes:
        index: (M,) int64, each member's segment.
        weights: (M, K) a.
        mass: (G, K) log Σ exp(logit), −∞ for a segment of which no member is there.
        sums: (G, K, F).
    """

    def __init__(self, logits: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> None:
        self.logits, self.values, self.offsets = wide(logits), wide(values), offsets
        self.index = segment_index(offsets, len(logits))
        self.weights, self.mass, self.sums = self._pool(self.logits)

    def _pool(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        top = segment_max(logits, self.offsets)
        top = top.masked_fill(top == NOTHING, 0)
        exp = torch.exp(logits - top[self.index])
        total = segment_sum(exp, self.offsets)
        weights = exp / total.clamp_min(1)[self.index]  # below 1 is 0 alone: the largest adds exp(0)
        sums = [
            weighted_sum(a, v, self.offsets) for a, v in zip(weights.T, self.values.unbind(1), strict=True)
        ]
        return weights, torch.log(total) + top, torch.stack(sums, 1)

    @cached_property
    def rest(self) -> Rest:
        """Of every member, its segment without it: M pools.

        (Σ a v − a_j v_j) / (1 − a_j), the mass plus log(1 − a_j). Where a_j > 1/2 that would be a small
        difference of large numbers. A segment has one such member a head at most: all of these are
        taken out together, and their segments pooled once more.
        """
        a = self.weights
        mass = self.mass[self.index] + torch.log1p(-a)
        sums = self.sums[self.index]
        sums.addcmul_(a[:, :, None], self.values, value=-1).mul_((1 - a).reciprocal_()[:, :, None])
        ruling = a > 0.5
        if bool(ruling.any()):
            _, mass_left, sums_left = self._pool(self.logits.masked_fill(ruling, NOTHING))
            member, head = ruling.nonzero(as_tuple=True)
            segment = self.index[member]
            mass[member, head] = mass_left[segment, head]
            sums[member, head] = sums_left[segment, head]
        return Rest(mass, sums)

    def replaced(
        self, member: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, gone: torch.Tensor
    ) -> Rest:
        """R pools, in each of which one member has changed.

        The others, of mass m and sums z, and the one of logit e' and value v': b v' + (1 − b) z with
        b = sigmoid(e' − m). This is between the two whatever their sizes, so that nothing cancels.

        Args:
            member: (R,) int64 which one.
            logits: (R, K) e'.
            values: (R, K, F) v'.
            gone: (R,) bool: it is no longer there.
        """
        logits = wide(logits).masked_fill(gone[:, None], NOTHING)
        mass = self.rest.mass[member]
        share = torch.sigmoid(logits - mass).nan_to_num(0)  # ∞ − ∞ where nothing is left
        sums = self.rest.sums[member].lerp_(wide(values), share[:, :, None])
        return Rest(torch.logaddexp(logits, mass), sums)


@dataclass(frozen=True)
class FlatPool:
    """One pool over all patches of a case, seen slice by slice and stain by stain.

    A slice is to its case as a patch is: its logit is its patches' mass, its value what they pool to.

    Args:
        logits: (ΣP, K) of the patches.
        values: (ΣP, K, F).
        batch: B cases.
    """

    logits: torch.Tensor
    values: torch.Tensor
    batch: BagBatch

    @cached_property
    def patches(self) -> Pooled:
        """Of patches, in cases."""
        return Pooled(self.logits, self.values, self.batch.case_patch_offsets)

    @cached_property
    def slices(self) -> tuple[Pooled, Pooled]:
        """Of patches in slices, and of slices in cases."""
        return self._units(self.batch.slice_offsets, self.batch.stain_offsets[self.batch.case_offsets])

    @cached_property
    def stains(self) -> tuple[Pooled, Pooled]:
        """Of patches in stains, and of stains in cases."""
        return self._units(self.batch.slice_offsets[self.batch.stain_offsets], self.batch.case_offsets)

    def _units(self, inner: torch.Tensor, outer: torch.Tensor) -> tuple[Pooled, Pooled]:
        unit = Pooled(self.logits, self.values, inner)
        return unit, Pooled(unit.mass, unit.sums, outer)

    def in_place(self) -> torch.Tensor:
        """(ΣP, K, F): of every patch, its case's sums if its slice were nothing but it.

        z + share · (v_j − z_slice), where the share of the slice is the sum of its patches' attention.
        """
        inner, outer = self.slices
        slices, share = inner.index, outer.weights[:, :, None]
        base = outer.sums[outer.index] - share * inner.sums
        return torch.addcmul(base[slices], share[slices], self.values)

    def without(self) -> tuple[Rest, Rest, Rest]:
        """The cases without one patch, one slice, one stain."""
        return self.patches.rest, self.slices[1].rest, self.stains[1].rest
