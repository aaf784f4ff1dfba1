"""What a trained head says of every single patch, and of a case without it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from featstore.bags import BagBatch
from heads.inspect.leave_out import Probe
from heads.inspect.leave_out_dual_stream import probe_dual_stream
from heads.inspect.leave_out_flat import (
    probe_attention,
    probe_dsmil,
    probe_linear,
    probe_max,
    probe_mean,
)
from heads.inspect.leave_out_hierarchical import probe_hierarchical
from heads.models.abmil import ABMIL, GatedABMIL
from heads.models.clam import ClamSB
from heads.models.dsmil import DSMIL
from heads.models.dual_stream import DualStream
from heads.models.head import Head
from heads.models.hierarchical import Hierarchical
from heads.models.linear import Linear
from heads.models.simple import Max, Mean

__all__ = ["Probe", "probe"]

# By the class itself: one that is derived from it may do something else.
_OF_HEAD: dict[type[Head], Callable[..., Probe]] = {
    Hierarchical: probe_hierarchical,
    ABMIL: probe_attention,
    GatedABMIL: probe_attention,
    ClamSB: probe_attention,
    DSMIL: probe_dsmil,
    Mean: probe_mean,
    Max: probe_max,
    Linear: probe_linear,
    DualStream: probe_dual_stream,
}
_BLOCK = 4096  # patches at once, each a case of its own
_PER_PATCH = (
    "in place and left out: the head {name!r} would need a forward pass of the whole case for every patch"
)


def probe(head: Head, batch: BagBatch, leave_out: bool = True, **schedule: float) -> Probe:
    """Ask a head about every single patch of a batch: in one pass, without a loop over patches.

    ``alone`` and ``in_place`` are what the patch itself says, ``without_…`` what the case would be without
    it: exactly what the head would say of the bag that is left, to rounding. In float32, or in float64
    where head and features are that.

    Args:
        head: Trained; it is put in evaluation mode.
        batch: B cases, on the head's device.
        leave_out: Whether to leave patches, slices and stains out. It costs one to two further forward
            passes (three with ``cross_attn``; transformer pools seven in all, of which this is half).
        schedule: What `Head.schedule` says of the epoch.

    Returns:
        Logits. A head that is not featstore's own, and transmil, are asked patch by patch as bags, and
        say nothing else.
    """
    head.eval()
    of_head = _OF_HEAD.get(type(head), _any_head)
    kept = schedule if of_head in (probe_dual_stream, _any_head) else {}
    with torch.no_grad(), torch.autocast(batch.features.device.type, enabled=False):
        return of_head(head, batch, leave_out, **kept)


def _any_head(head: Head, batch: BagBatch, leave_out: bool, **schedule: float) -> Probe:
    """Every patch a case of its own."""
    stain = torch.repeat_interleave(batch.stain_ids, batch.slice_offsets[batch.stain_offsets].diff())
    alone = []
    for start in range(0, len(batch.features), _BLOCK):
        block = slice(start, start + _BLOCK)
        features = batch.features[block]
        each = torch.arange(len(features) + 1, device=features.device)
        one = BagBatch(
            features=features,
            rows=batch.rows[block],
            slice_offsets=each,
            stain_offsets=each,
            case_offsets=each,
            patch_to_case=each[:-1],
            stain_ids=stain[block],
            labels=None,
            case_ids=tuple(batch.case_ids[i] for i in batch.patch_to_case[block].tolist()),
            standardized=batch.standardized,
        )
        alone.append(head(one, **schedule).logits)
    return Probe(
        head(batch, **schedule), torch.cat(alone), reason=_PER_PATCH.format(name=type(head).__name__)
    )
