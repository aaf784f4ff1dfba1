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
from numpy.typing import NDArray

from featstore.bags import Bag, BagBatch, collate
from featstore.errors import StoreError
from featstore.store import Store

_BLOCK = 256  # rows looked at at once: what fits in a core's cache
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class CaseBags:
    """Labelled bags of some cases, and batches of them with their embeddings filled in.

    Outlines (bags whose ``features`` are (P, 0)) are what is sampled, cut and shuffled; a batch
    then gets the embeddings of just its rows. If all embeddings fit, they are one tensor
    (N, D) on the device, in the store's dtype; else each batch takes its rows out of the store.

    Safe in the workers of a DataLoader: forked ones share the embeddings in memory, spawned ones
    get them through torch's shared memory, and neither reads the store again.

    Args:
        store: Where the embeddings are.
        labels: Class index of every case that is wanted; None: all cases, without labels.
        memory: Bytes that the embeddings may take; None: half of what the device has free.
        device: Where batches are wanted; None: the CPU.
        views: Whether augmented views will be asked for (`Bag.view`): they are kept in memory as
            well, where they fit beside the plain ones.

    Raises:
        StoreError: A case is not in the store, or has embeddings that are not finite.
    """

    def __init__(
        self,
        store: Store,
        labels: Mapping[str, int] | None = None,
        memory: int | None = None,
        device: torch.device | None = None,
        views: bool = False,
    ) -> None:
        self.store, self.device = store, device or torch.device("cpu")
        known: Mapping[str, int | None] = dict.fromkeys(store.cases()) if labels is None else labels
        self.outlines = {case: replace(store.outline(case), label=label) for case, label in known.items()}
        self._by_row = case_of_row(self.outlines)
        rows = sum(len(bag) for bag in self.outlines.values())
        size = rows * store.spec.dim * np.dtype(store.spec.stored_dtype).itemsize
        self._none = torch.from_numpy(np.empty((0, store.spec.dim), store.spec.stored_dtype))
        self.resident: torch.Tensor | None = None
        if memory is None:
            memory = memory_budget("auto", self.device)
        self._views: torch.Tensor | None = None
        if size <= memory:
            self._load(rows)
            if views and size * store.spec.views <= memory:
                self._load_views()
        else:
            for case in self.outlines:  # better told now than in the middle of an epoch
                self._check(case, self._read(case))

    def _load(self, rows: int) -> None:
        held = self._none.new_empty((rows, self.store.spec.dim))
        self._start, start = {}, 0
        for case, outline in self.outlines.items():
            self._check(case, self._read(case, held[start : start + len(outline)]))
            self._start[case] = start
            start += len(outline)
        self.resident = held.to(self.device)

    def _load_views(self) -> None:
        if self.store.spec.views > 1:
            found = [torch.from_numpy(self.store.views(case)).flatten(0, 1) for case in self.outlines]
            self._views = torch.cat(found).to(self.device)

    def _read(self, case: str, into: torch.Tensor | None = None) -> torch.Tensor:
        return torch.from_numpy(self.store.features(case, None if into is None else into.numpy()))

    def _check(self, case: str, features: torch.Tensor) -> None:
        # On the bits: torch.isfinite takes longer for float16 than reading does.
        infinity = torch.tensor(float("inf"), dtype=features.dtype)
        numbers = torch.int16 if features.dtype == torch.float16 else torch.int32
        exponent = int(infinity.view(numbers))
        for start in range(0, len(features), _BLOCK):
            largest = features[start : start + _BLOCK].view(numbers).bitwise_and(exponent).amax(dim=1)
            if int(largest.max()) == exponent:
                raise self._not_finite(case, start + int(largest.argmax()))

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
        """Lay outlines, or parts of them, end to end and fill in their embeddings.

        ``features`` are to be read only: those of a whole case may be the resident ones themselves.
        """
        batch = collate(bags)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return replace(batch.to(self.device), features=self._embeddings(bags))

    def _embeddings(self, bags: Sequence[Bag]) -> torch.Tensor:
        cases = [self._case(bag) for bag in bags]
        if len(bags) == 1 and len(bags[0]) == len(self.outlines[cases[0]]) and bags[0].view is None:
            return self.features(cases[0]).to(self.device, non_blocking=True)
        like = self._none if self.resident is None else self.resident
        # Each row is copied once: bag by bag and then all together would be twice.
        found = like.new_empty((sum(map(len, bags)), like.shape[1]), device=self.device)
        for case, bag, rows in zip(
            cases, bags, torch.split(found, [len(bag) for bag in bags]), strict=True
        ):
            self._fill(rows, case, bag)
            if bag.view is not None and bag.view.any():
                self._fill_views(rows, case, bag, bag.view)
        return found

    def _fill_views(self, rows: torch.Tensor, case: str, bag: Bag, view: NDArray[np.int64]) -> None:
        """Put augmented views in the place of plain ones."""
        at = np.flatnonzero(view)
        index, number, count = (bag.rows - self.outlines[case].rows[0])[at], view[at] - 1, self._count
        if self._views is None:
            found = torch.from_numpy(self.store.views(case)[index, number]).to(self.device)
        else:
            place = torch.from_numpy((index + self._start[case]) * count + number)
            found = self._views.index_select(0, place.to(self.device, non_blocking=True))
        rows[torch.from_numpy(at).to(self.device, non_blocking=True)] = found

    @property
    def _count(self) -> int:
        return self.store.spec.views - 1

    def _case(self, bag: Bag) -> str:
        # By row, not by name: a sub-case has a name of its own, which may be another case's.
        return self._by_row[bisect.bisect_right(self._by_row, int(bag.rows[0]), key=_first) - 1][1]

    def _fill(self, rows: torch.Tensor, case: str, bag: Bag) -> None:
        outline = self.outlines[case]
        index = bag.rows - outline.rows[0]
        if self.resident is not None:
            if len(bag) == len(outline):
                rows.copy_(self.features(case))
            else:  # not by indexing, which on a CPU takes three times as long
                where = torch.from_numpy(index + self._start[case]).to(self.device, non_blocking=True)
                torch.index_select(self.resident, 0, where, out=rows)
        elif len(bag) < len(outline):
            rows.copy_(torch.from_numpy(self.store.take(case, index)), non_blocking=True)
        elif self.device.type == "cpu":
            self._read(case, rows)
        else:
            rows.copy_(self._read(case), non_blocking=True)


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
    return free_memory() // 2


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its cgroup where there is one."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int((_CGROUP / "memory.max").read_text())
        free.append(limit - int((_CGROUP / "memory.current").read_text()))
    return max(0, min(free))
