"""Deletion and insertion curves: does a case change with the patches that are said to matter?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from featstore.bags import BagBatch
from heads.models.abmil import ABMIL, GatedABMIL
from heads.models.clam import ClamSB
from heads.models.dsmil import DSMIL
from heads.models.dual_stream import DualStream
from heads.models.head import Head, ProjectedHead
from heads.models.hierarchical import Hierarchical
from heads.models.pooling import segment_index
from heads.models.simple import Max, Mean
from heads.models.transmil import TransMIL

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Their `forward` is `classify` of what `embed` made; a class derived from them may do something else.
_EMBEDDED: tuple[type[Head], ...] = (
    Hierarchical,
    ABMIL,
    GatedABMIL,
    ClamSB,
    DSMIL,
    Mean,
    Max,
    TransMIL,
    DualStream,
)


def curves(
    head: Head,
    batch: BagBatch,
    orders: torch.Tensor,
    fractions: Sequence[float] = FRACTIONS,
    **schedule: float,
) -> torch.Tensor:
    """What a head says of a case as its patches are taken away, and as they come, the first ones first.

    The f of K fractions stands for k = f · P patches, rounded, half up. No bag is empty: what is deleted
    last leaves the last patch, what is inserted first is the first patch. featstore's own heads
    project each patch once, for all orders.

    Args:
        head: Trained; it is put in evaluation mode.
        batch: One case of P patches, on the head's device.
        orders: (P,) int64 positions of the patches, the most important first; or (R, P), several.
        fractions: K, each from 0 to 1.
        schedule: What `Head.schedule` says of the epoch.

    Returns:
        ([R,] 2, K, C) logits: of the case without the first k patches, k ≤ P − 1, and of the first k alone,
        k ≥ 1. Slices and stains that have no patches left are gone.

    Raises:
        ValueError: There is not one case, an order does not name each of its patches once, or a
            fraction is not from 0 to 1.
    """
    count = len(batch.features)
    orders = torch.as_tensor(orders, device=batch.features.device)
    if len(batch) != 1:
        raise ValueError(f"curves are of one case, and the batch has {len(batch)}")
    each = (
        torch.arange(count, device=orders.device).expand_as(orders) if orders.shape[-1] == count else None
    )
    if each is None or not torch.equal(orders.sort(-1).values, each):
        raise ValueError(f"the order must name each of the {count} patches once")
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must lie from 0 to 1: {list(fractions)}")
    head.eval()
    sizes = [int(fraction * count + 0.5) for fraction in fractions]
    deleted = [min(size, count - 1) for size in sizes]
    inserted = [max(size, 1) for size in sizes]
    ranks = torch.empty_like(orders).scatter_(-1, orders, each)
    with torch.no_grad(), torch.autocast(batch.features.device.type, enabled=False):
        embedded = type(head) in _EMBEDDED
        if embedded:
            # Laid in the features' place, so that they are taken as these are.
            batch = replace(batch, features=_own(head).embed(batch))

        def say(kept: torch.Tensor) -> torch.Tensor:
            left = taken(batch, kept)
            if embedded:
                return _own(head).classify(left.features, left, **schedule).logits
            return head(left, **schedule).logits

        whole, found = say(torch.ones(count, dtype=torch.bool, device=orders.device)), []
        for rank in ranks.reshape(-1, count):
            without = {k: say(rank >= k) if k else whole for k in dict.fromkeys(deleted)}
            alone = {k: say(rank < k) if k < count else whole for k in dict.fromkeys(inserted)}
            lines = [[without[k] for k in deleted], [alone[k] for k in inserted]]
            found.append(torch.stack([torch.cat(line) for line in lines]))
    return found[0] if orders.ndim == 1 else torch.stack(found)


def _own(head: Head) -> ProjectedHead | DualStream:
    assert isinstance(head, ProjectedHead | DualStream)
    return head


def taken(batch: BagBatch, kept: torch.Tensor) -> BagBatch:
    """`featstore.bags.Bag.take` of a batch: slices and stains of which nothing is left are gone.

    Args:
        batch: B cases.
        kept: (ΣP,) bool; at least one patch of every case.
    """
    patches = _counts(kept, batch.slice_offsets)
    slices = _counts(patches > 0, batch.stain_offsets)
    return replace(
        batch,
        features=batch.features[kept],
        rows=batch.rows[kept],
        slice_offsets=_offsets(patches[patches > 0]),
        stain_offsets=_offsets(slices[slices > 0]),
        case_offsets=_offsets(_counts(slices > 0, batch.case_offsets)),
        patch_to_case=batch.patch_to_case[kept],
        stain_ids=batch.stain_ids[slices > 0],
    )


def _counts(kept: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(G,) int64: how many members of each segment are kept."""
    return torch.bincount(segment_index(offsets, len(kept))[kept], minlength=len(offsets) - 1)


def _offsets(sizes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def area(fractions: ArrayLike, probability: ArrayLike) -> float:
    """Area under a curve by the trapezoid rule.

    Args:
        fractions: (K,) ascending.
        probability: (K,) of a class.
    """
    return float(np.trapezoid(np.asarray(probability, np.float64), np.asarray(fractions, np.float64)))
