"""What every head returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from featstore.bags import BagBatch


@dataclass(frozen=True)
class Attention:
    """One level's attention (N members in G segments).

    Attributes:
        weights: (N,) float, summing to 1 in every segment; (N, C) where a head attends per class.
        logits: Of the same shape: what the softmax was taken of.
        offsets: (G + 1,) int64.
    """

    weights: torch.Tensor
    logits: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True)
class HeadOutput:
    """What a head says of a batch of B cases.

    Attributes:
        logits: (B, C).
        attention: By level, out of ``patch, slice, stain, selection``.
        instance_scores: (ΣP,) unbounded, where the head has them; (ΣP, C) where it has them by class.
        aux_loss: A scalar that the head adds to the loss, or None.
        aux_logits: (B, C) of a second classifier, whose loss is added to that of the logits, or None.
    """

    logits: torch.Tensor
    attention: dict[str, Attention] = field(default_factory=dict)
    instance_scores: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    aux_logits: torch.Tensor | None = None


def effective_attention(output: HeadOutput, batch: BagBatch) -> torch.Tensor | None:
    """How much of each case's embedding every patch makes up.

    A patch's attention × its slice's × its stain's; with a head of one level, its attention; with one
    that attends per class, the mean over the classes, each of which has an embedding of its own.

    Returns:
        (ΣP,) float, summing to 1 in every case; None for a head without attention.
    """
    if "patch" not in output.attention:
        return None
    weights = output.attention["patch"].weights
    if weights.ndim == 2:
        weights = weights.mean(dim=1)
    for level, offsets in (("slice", batch.slice_offsets), ("stain", None)):
        if level not in output.attention:
            break
        inner = offsets if offsets is not None else batch.slice_offsets[batch.stain_offsets]
        above = output.attention[level].weights
        weights = weights * torch.repeat_interleave(above, inner.diff(), output_size=len(weights))
    return weights
