"""Bags: one case's embeddings, slice by slice and stain by stain; batches of them without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


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
        view: (P,) int64, which cached view of each patch is meant, 0 the plain one; None: all plain.
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
    view: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def take(self, chosen: NDArray[np.bool_]) -> Bag:
        """The bag with some of its patches; slices and stains that have none left are gone.

        Args:
            chosen: (P,) True for the patches to keep; at least one.

        Raises:
            ValueError: No patch is chosen, or the mask has another length.
        """
        if chosen.shape != (len(self),) or not chosen.any():
            raise ValueError(
                f"a mask of {chosen.shape} with {int(chosen.sum())} True for {len(self)} patches"
            )
        slice_of_patch = np.repeat(np.arange(len(self.slices)), self.slice_sizes)
        sizes = np.bincount(slice_of_patch[chosen], minlength=len(self.slices))
        stain_of_slice = np.repeat(np.arange(len(self.stains)), self.stain_sizes)
        slices_left = np.bincount(stain_of_slice[sizes > 0], minlength=len(self.stains))
        return replace(
            self,
            features=self.features[chosen],
            rows=self.rows[chosen],
            patches=self.patches[chosen],
            view=None if self.view is None else self.view[chosen],
            slices=tuple(name for name, size in zip(self.slices, sizes, strict=True) if size),
            slice_sizes=sizes[sizes > 0],
            stains=tuple(name for name, size in zip(self.stains, slices_left, strict=True) if size),
            stain_sizes=slices_left[slices_left > 0],
            stain_ids=self.stain_ids[slices_left > 0],
        )


@dataclass(frozen=True)
class BagBatch:
    """Bags laid end to end, without padding (ΣP patches, ΣS slices, ΣT stains, B cases).

    Offsets start with 0 and end with the number of members, so that segment g has the
    members ``offsets[g]`` to ``offsets[g + 1]``; no segment is empty.

    Attributes:
        features: (ΣP, D) float16 or float32.
        rows: (ΣP,) int64 row numbers of `Store.table()`.
        slice_offsets: (ΣS + 1,) int64: the patches of each slice.
        stain_offsets: (ΣT + 1,) int64: the slices of each stain.
        case_offsets: (B + 1,) int64: the stains of each case.
        patch_to_case: (ΣP,) int64.
        stain_ids: (ΣT,) int64.
        labels: (B,) int64, or None.
        case_ids: B case ids.
        standardized: Whether ``features`` are standardised already, by a training, with the mean and
            deviation of its own head (`heads.models.head.Head.projects_all`).
    """

    features: torch.Tensor
    rows: torch.Tensor
    slice_offsets: torch.Tensor
    stain_offsets: torch.Tensor
    case_offsets: torch.Tensor
    patch_to_case: torch.Tensor
    stain_ids: torch.Tensor
    labels: torch.Tensor | None
    case_ids: tuple[str, ...]
    standardized: bool = False

    def __len__(self) -> int:
        return len(self.case_ids)

    @cached_property
    def case_patch_offsets(self) -> torch.Tensor:
        """(B + 1,) int64: the patches of each case, for heads that know one level only."""
        return self.slice_offsets[self.stain_offsets[self.case_offsets]]

    def to(self, device: torch.device | str) -> BagBatch:
        """The batch on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> BagBatch:
        """The batch in page-locked memory, from which a GPU copies without being waited for."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BagBatch:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: change(v) for name, v in held.items() if hasattr(v, "to")}
        return replace(self, **moved)


def collate(bags: Sequence[Bag]) -> BagBatch:
    """Lay bags end to end.

    Args:
        bags: B ≥ 1 bags; all with a label, or none.

    Raises:
        ValueError: There is no bag, a bag is empty, or only some have a label.
    """
    import torch

    if not bags or any(len(bag) == 0 for bag in bags):
        raise ValueError("a batch needs bags, and every bag a patch")
    labels = [bag.label for bag in bags if bag.label is not None]
    if labels and len(labels) != len(bags):
        raise ValueError(f"{len(labels)} of {len(bags)} bags have a label")

    def joined(arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays))

    def offsets(sizes: Sequence[Any]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(([0], np.cumsum(np.concatenate(sizes)))).astype(np.int64))

    return BagBatch(
        features=joined([bag.features for bag in bags]),
        rows=joined([bag.rows for bag in bags]),
        slice_offsets=offsets([bag.slice_sizes for bag in bags]),
        stain_offsets=offsets([bag.stain_sizes for bag in bags]),
        case_offsets=offsets([[len(bag.stains) for bag in bags]]),
        patch_to_case=joined([np.repeat(i, len(bag)) for i, bag in enumerate(bags)]),
        stain_ids=joined([bag.stain_ids for bag in bags]),
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
        case_ids=tuple(bag.case_id for bag in bags),
    )
