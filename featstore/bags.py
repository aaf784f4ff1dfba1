"""Bags: one case's embeddings, slice by slice and stain by stain, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bag:
    """One case (P patches of S slices of T stains; D features).

    Patches are in the patch table's order: by stain, slice and patch number,
    each naturally. Stains that the case lacks do not appear.

    Attributes:
        case_id: Which case.
        features: (P, D) float16 or float32.
        rows: (P,) int64 row numbers of `Store.table()`: which file is row i?
        patches: (P,) int64 patch numbers.
        slices: S slice ids, in order.
        slice_sizes: (S,) int64 patches a slice; sums to P.
        stains: T stain names, in order.
        stain_sizes: (T,) int64 slices a stain; sums to S.
        stain_ids: (T,) int64 index of each stain in `Store.stains()`.
        label: Class index, or None.
    """

    case_id: str
    features: NDArray[Any]
    rows: NDArray[np.int64]
    patches: NDArray[np.int64]
    slices: tuple[str, ...]
    slice_sizes: NDArray[np.int64]
    stains: tuple[str, ...]
    stain_sizes: NDArray[np.int64]
    stain_ids: NDArray[np.int64]
    label: int | None = None

    def __len__(self) -> int:
        return len(self.features)
