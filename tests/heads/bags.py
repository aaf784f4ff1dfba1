"""Small bags, and a plain NumPy view of a batch: lists of lists, no offsets."""

from __future__ import annotations

import numpy as np

from featstore.bags import Bag


def make_bag(
    rng: np.random.Generator,
    case_id: str = "1",
    stains: tuple[int, ...] = (0, 2),
    dim: int = 6,
    label: int | None = 0,
    slices: tuple[int, int] = (1, 4),
    patches: tuple[int, int] = (1, 6),
) -> Bag:
    """A bag with random numbers of slices a stain and patches a slice (bounds inclusive)."""
    stain_sizes = rng.integers(slices[0], slices[1] + 1, len(stains))
    slice_sizes = rng.integers(patches[0], patches[1] + 1, stain_sizes.sum())
    count = int(slice_sizes.sum())
    return Bag(
        case_id=case_id,
        features=rng.normal(size=(count, dim)).astype(np.float32),
        rows=np.arange(count),
        patches=np.concatenate([np.arange(size) for size in slice_sizes]),
        slices=tuple(f"s{i}" for i in range(len(slice_sizes))),
        slice_sizes=slice_sizes,
        stains=tuple(f"stain{i}" for i in stains),
        stain_sizes=stain_sizes,
        stain_ids=np.array(stains, np.int64),
        label=label,
    )


def nested(bag: Bag) -> list[list[np.ndarray]]:
    """Features as stains of slices of (P, D) arrays."""
    slices = np.split(bag.features.astype(np.float64), np.cumsum(bag.slice_sizes)[:-1])
    ends = np.cumsum(bag.stain_sizes)
    return [slices[end - size : end] for size, end in zip(bag.stain_sizes, ends, strict=True)]
