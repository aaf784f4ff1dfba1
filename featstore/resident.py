"""The bags of a cohort's cases, with their embeddings in memory where they fit."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from featstore.bags import Bag, BagBatch, collate
from featstore.errors import StoreError
from featstore.store import Store

_BLOCK = 2**16  # rows looked at at once
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class CaseBags:
    """Labelled bags of some cases, and batches of them with their embeddings filled in.

    Outlines (bags whose ``features`` are (P, 0)) are what is sampled, cut and shuffled; a batch
    then gets the embeddings of just its rows. If all embeddings fit, they are one tensor
    (N, D) on the device, in the store's dtype; else each batch reads its cases' parts again.

    Args:
        store: Where the embeddings are.
        labels: Class index of every case that is wanted.
        memory: Bytes that the embeddings may take.
        device: Where batches are wanted.

    Raises:
        StoreError: A case is not in the store, or has embeddings that are not finite.
    """

    def __init__(
        self, store: Store, labels: Mapping[str, int], memory: int, device: torch.device | None = None
    ) -> None:
        self.store, self.device = store, device or torch.device("cpu")
        self.outlines = {case: replace(store.outline(case), label=label) for case, label in labels.items()}
        self._by_row = case_of_row(self.outlines)
        rows = sum(len(bag) for bag in self.outlines.values())
        size = rows * store.spec.dim * np.dtype(store.spec.stored_dtype).itemsize
        self.resident: torch.Tensor | None = None
        if size <= memory:
            self._load(rows)
        else:
            for case in self.outlines:  # better told now than in the middle of an epoch
                self._read(case)

    def _load(self, rows: int) -> None:
        dtype = torch.from_numpy(np.empty(0, self.store.spec.stored_dtype)).dtype
        held = torch.empty((rows, self.store.spec.dim), dtype=dtype)
        self._start, start = {}, 0
        for case, outline in self.outlines.items():
            held[start : start + len(outline)] = self._read(case)
            self._start[case] = start
            start += len(outline)
        self.resident = held.to(self.device)

    def _read(self, case: str) -> torch.Tensor:
        features = torch.from_numpy(self.store.bag(case).features)
        for start in range(0, len(features), _BLOCK):
            finite = torch.isfinite(features[start : start + _BLOCK]).all(dim=1)
            if not finite.all():
                raise self._not_finite(case, start + int(finite.int().argmin()))
        return features

    def _not_finite(self, case: str, index: int) -> StoreError:
        patch = self.store.table(case).iloc[index]
        return StoreError(
            f"the embedding of {patch['path']} is not finite (NaN or infinite)",
            expected="finite numbers",
            where=f"{self.store.path}, case {case}, {patch['stain']}, {patch['slice_id']}",
            fix=f"leave the case out (exclude: [{case}]), or embed or import it again",
        )

    def features(self, case: str) -> torch.Tensor:
        """(P, D) embeddings of a case, in the store's dtype, in the outline's order."""
        if self.resident is None:
            return self._read(case)
        start = self._start[case]
        return self.resident[start : start + len(self.outlines[case])]

    def batch(self, bags: Sequence[Bag]) -> BagBatch:
        """Lay outlines, or parts of them, end to end and fill in their embeddings."""
        batch = collate(bags)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        blocks = [self._rows(bag) for bag in bags]
        features = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return replace(batch.to(self.device), features=features)

    def _rows(self, bag: Bag) -> torch.Tensor:
        # By row, not by name: a sub-case has a name of its own, which may be another case's.
        first, case = self._by_row[bisect.bisect_right(self._by_row, int(bag.rows[0]), key=_first) - 1]
        held = self.features(case)
        if len(bag) == len(held):
            return held.to(self.device, non_blocking=True)
        index = torch.from_numpy(bag.rows - first)
        if self.resident is None:
            return held[index].to(self.device, non_blocking=True)
        return held[index.to(self.device, non_blocking=True)]


def case_of_row(outlines: Mapping[str, Bag]) -> list[tuple[int, str]]:
    """The first row of every case and the case, ascending; a case's rows follow one another."""
    return sorted((int(bag.rows[0]), case) for case, bag in outlines.items())


def _first(entry: tuple[int, str]) -> int:
    return entry[0]


def memory_budget(gigabytes: float | str, device: torch.device) -> int:
    """Bytes for embeddings: what is asked for, or half of what the device has free now."""
    if not isinstance(gigabytes, str):
        return int(gigabytes * 1e9)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) // 2
    return _free_memory() // 2


def _free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its cgroup where there is one."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int((_CGROUP / "memory.max").read_text())
        free.append(limit - int((_CGROUP / "memory.current").read_text()))
    return max(0, min(free))
