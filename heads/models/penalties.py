"""Penalties on attention: entropy, selection confidence, elastic net on the logits.

Each is computed per segment and averaged over a case's segments, so that neither many slices nor
large ones weigh more; a batch's penalty is the mean over its cases. A segment of one member
contributes 0. Where a head attends or scores per class, a segment's penalty is the mean over classes.
"""

from __future__ import annotations

from typing import Literal

import torch

from heads.models.outputs import Attention
from heads.models.pooling import segment_log_softmax, segment_max, segment_sum


def entropy(attention: Attention) -> torch.Tensor:
    """H = −Σ a·log a of every segment, in nats: (G,), or (G, C) of attention per class."""
    # From the logits: where a weight underflows to 0, the derivative of a·log a does not exist.
    logarithm = segment_log_softmax(attention.logits, attention.offsets)
    return -segment_sum(torch.exp(logarithm) * logarithm, attention.offsets)


def entropy_penalty(
    attention: Attention,
    case_offsets: torch.Tensor,
    form: Literal["linear", "squared"] = "squared",
    mode: Literal["max", "min"] = "max",
    normalize: bool = False,
) -> torch.Tensor:
    """What is to be minimised so that attention spreads (``max``) or concentrates (``min``).

    Args:
        attention: Of one level.
        case_offsets: (B + 1,) int64: the segments of each case (`segments_of_cases`).
        form: ``linear``: −H (min: +H); ``squared``: (log N − H)² (min: H²), N the segment's size.
        mode: Whether high or low entropy is wanted.
        normalize: Divide H by log N first (then log N is 1).

    Returns:
        (B,), a value a case.
    """
    h = entropy(attention)
    # A segment of one contributes nothing; counted as two, it has no infinite derivative either.
    largest = torch.log(attention.offsets.diff().clamp_min(2).to(h.dtype))
    largest = largest if h.ndim == 1 else largest[:, None]
    if normalize:
        h, largest = h / largest, torch.ones_like(largest)
    if form == "linear":
        each = -h if mode == "max" else h
    else:
        each = (largest - h).square() if mode == "max" else h.square()
    return _mean_by_case(each, attention.offsets, case_offsets)


def confidence_penalty(
    scores: torch.Tensor, offsets: torch.Tensor, case_offsets: torch.Tensor, target: float | None = 2.0
) -> torch.Tensor:
    """What is to be minimised so that the selection's scores spread.

    Args:
        scores: (N,) or (N, C) unbounded instance scores.
        offsets: (G + 1,) int64.
        case_offsets: (B + 1,) int64: the segments of each case.
        target: (max − min − target)²; with None, linear: −(max − min).

    Returns:
        (B,), a value a case.
    """
    spread = segment_max(scores, offsets) + segment_max(-scores, offsets)
    each = -spread if target is None else (spread - target).square()
    return _mean_by_case(each, offsets, case_offsets)


def elastic_net_penalty(
    attention: Attention, case_offsets: torch.Tensor, l1: float = 0.0, l2: float = 0.0
) -> torch.Tensor:
    """λ1·‖z‖₁ + λ2·‖z‖₂² of every segment's attention logits z: (B,), a value a case."""
    z = attention.logits
    each = segment_sum(l1 * z.abs() + l2 * z.square(), attention.offsets)
    return _mean_by_case(each, attention.offsets, case_offsets)


def segments_of_cases(*offsets: torch.Tensor) -> torch.Tensor:
    """The segments of a level, by case.

    Args:
        offsets: The offsets of the levels above, from the level's own parent up to the cases: for
            slices ``(stain_offsets, case_offsets)``, for stains ``(case_offsets,)``.

    Returns:
        (B + 1,) int64 offsets.
    """
    boundaries = offsets[-1]
    for inner in reversed(offsets[:-1]):
        boundaries = inner[boundaries]
    return boundaries


def _mean_by_case(values: torch.Tensor, offsets: torch.Tensor, case_offsets: torch.Tensor) -> torch.Tensor:
    """(B,) means of (G,) or (G, C) values over each case's segments; those of one member count as 0."""
    if values.ndim == 2:
        values = values.mean(dim=1)
    return segment_sum(torch.where(offsets.diff() > 1, values, 0.0), case_offsets) / case_offsets.diff()
