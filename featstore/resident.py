"""The bags of a cohort's cases, with their embeddings in memory where they fit."""

from __future__ import annotations

import bisect
import contextlib
import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.bags import Bag, BagBatch, collate
from featstore.errors import StoreError
from featstore.process import cgroup_memory, local_processes, scheduled_memory
from featstore.store import Store
from featstore.store.mapped import MappedRows
from featstore.store.reading import read_features

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
            well, where they fit beside the plain ones; else each batch takes those that it wants out
            of the store.

    Attributes:
        outlines: By case.
        resident: (N, D) embeddings of all cases, or None where they do not fit.
        device: Of the batches.
        memory: Bytes that the embeddings may take.
        views: Of every patch, the plain one included, in the store.

    Raises:
        StoreError: A case is not in the store, or has embeddings (or views, where they will be asked
            for) that are not finite.
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
        self.views = store.spec.views
        known: Mapping[str, int | None] = dict.fromkeys(store.cases()) if labels is None else labels
        self.outlines = {case: replace(store.outline(case), label=label) for case, label in known.items()}
        self._by_row = case_of_row(self.outlines)
        sizes = [len(bag) for bag in self.outlines.values()]
        size = sum(sizes) * store.spec.dim * np.dtype(store.spec.stored_dtype).itemsize
        self._none = torch.from_numpy(np.empty((0, store.spec.dim), store.spec.stored_dtype))
        self.resident: torch.Tensor | None = None
        if memory is None:
            memory = memory_budget("auto", self.device)
        self.memory = memory
        self._standardized = False
        self._views: torch.Tensor | None = None
        self._mapped_views = MappedRows(store.spec.stored_dtype, store.spec.dim, self._count)
        if size <= memory:
            self._start = dict(zip(self.outlines, np.cumsum([0, *sizes]).tolist(), strict=False))
            self.resident = self._load((store.spec.dim,), self._read)
        else:
            for case in self.outlines:  # better told now than in the middle of an epoch
                self._check(case, self._read(case))
        if views and self._count:
            if size * store.spec.views <= memory:
                self._views = self._load((self._count, store.spec.dim), self._read_views).flatten(0, 1)
            else:
                self._check_views()

    @property
    def bytes(self) -> int:
        """What the embeddings in memory take, views included."""
        held = [each for each in (self.resident, self._views) if each is not None]
        return sum(each.numel() * each.element_size() for each in held)

    def with_standardized(self, resident: torch.Tensor) -> CaseBags:
        """The same cases, with (N, D) standardised embeddings of their patches in memory."""
        found = copy.copy(self)
        found.resident, found._standardized = resident, True
        return found

    def _load(self, row: tuple[int, ...], read: Callable[[str, torch.Tensor], object]) -> torch.Tensor:
        """All cases' rows in one tensor on the device; of the others no more than one case is held."""
        held = self._none.new_empty((sum(map(len, self.outlines.values())), *row), device=self.device)
        for case, outline in self.outlines.items():
            place = held[self._start[case] : self._start[case] + len(outline)]
            found = place if place.device.type == "cpu" else torch.empty_like(place, device="cpu")
            read(case, found)
            self._check(case, found)
            if found is not place:
                place.copy_(found)
        return held

    def _check_views(self) -> None:
        """One view after the other, out of the maps: what is checked now need not be in an epoch."""
        for case, outline in self.outlines.items():
            for number in range(self._count):
                index = np.arange(len(outline))
                found = self._augmented(case, index, np.full_like(index, number))
                self._check(case, found, number + 1)

    def _read_views(self, case: str, into: torch.Tensor) -> None:
        store, row = self.store, (self._count, self.store.spec.dim)
        read_features(
            store.folder(case), store.layout(case), store.spec.stored_dtype, row, into.numpy(), "views"
        )

    def _read(self, case: str, into: torch.Tensor | None = None) -> torch.Tensor:
        return torch.from_numpy(self.store.features(case, None if into is None else into.numpy()))

    def _check(self, case: str, found: torch.Tensor, view: int = 0) -> None:
        """Refuse what is not finite: rows (P, D) of one view, or all augmented ones (P, V − 1, D)."""
        # On the bits: torch.isfinite takes longer for float16 than reading does.
        infinity = torch.tensor(float("inf"), dtype=found.dtype)
        numbers = torch.int16 if found.dtype == torch.float16 else torch.int32
        exponent = int(infinity.view(numbers))
        together, rows = math.prod(found.shape[1:-1]), found.flatten(0, -2)
        for start in range(0, len(rows), _BLOCK):
            largest = rows[start : start + _BLOCK].view(numbers).bitwise_and(exponent).amax(dim=1)
            if int(largest.max()) == exponent:
                index, number = divmod(start + int(largest.argmax()), together)
                raise self._not_finite(case, index, view if found.ndim == 2 else number + 1)

    def _not_finite(self, case: str, index: int, view: int) -> StoreError:
        patch = self.store.table(case).iloc[index]
        what = f"augmented view {view}" if view else "the embedding"
        return StoreError(
            f"{what} of {patch['path']} is not finite (NaN or infinite)",
            expected="finite numbers",
            where=f"{self.store.path}, case {case}, {patch['stain']}, {patch['slice_id']}",
            fix=f"leave the case out (exclude: [{case}]), or embed or import it again",
        )

    def features(self, case: str) -> torch.Tensor:
        """(P, D) embeddings of a case, as they are held, in the outline's order."""
        if self.resident is None:
            return self._read(case)
        start = self._start[case]
        return self.resident[start : start + len(self.outlines[case])]

    def batch(self, bags: Sequence[Bag]) -> BagBatch:
        """Lay outlines, or parts of them, end to end and fill in their embeddings.

        ``features`` are to be read only: those of a whole case may be the resident ones themselves.
        """
        batch = collate(bags)
        if self.device.type != "cpu":
            batch = batch.pin_memory().to(self.device)
        return replace(batch, features=self._embeddings(bags), standardized=self._standardized)

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
            if bag.view is None or not bag.view.any():
                self._fill(rows, case, bag)
            else:
                self._fill_views(rows, case, bag, bag.view)
        return found

    def _fill_views(self, rows: torch.Tensor, case: str, bag: Bag, view: NDArray[np.int64]) -> None:
        """Each patch's one view, plain or augmented; the others are not read.

        Raises:
            IndexError: There is no view of this number.
        """
        if view.min() < 0 or view.max() > self._count:
            raise IndexError(f"views {view.min()} to {view.max()} of {self._count + 1} ({case})")
        index = bag.rows - self.outlines[case].rows[0]
        plain, augmented = np.flatnonzero(view == 0), np.flatnonzero(view)
        for at, found in (
            (plain, self._plain(case, index[plain])),
            (augmented, self._augmented(case, index[augmented], view[augmented] - 1)),
        ):
            where = torch.from_numpy(at).to(self.device, non_blocking=True)
            rows.index_copy_(0, where, found.to(self.device, non_blocking=True))

    def _plain(self, case: str, index: NDArray[np.int64]) -> torch.Tensor:
        """(n, D) the embeddings of the patches at these positions."""
        if self.resident is None:
            return torch.from_numpy(self.store.take(case, index))
        return self._select(self.resident, index + self._start[case])

    def _augmented(self, case: str, index: NDArray[np.int64], number: NDArray[np.int64]) -> torch.Tensor:
        """(n, D) the augmented views of these numbers, from 0, of the patches at these positions."""
        if self._views is not None:
            return self._select(self._views, (index + self._start[case]) * self._count + number)
        store = self.store
        folder = store.folder(case)
        found = self._mapped_views.take(folder, case, lambda: store.layout(case), index, number)
        return torch.from_numpy(store.views(case)[index, number] if found is None else found)

    def _select(self, held: torch.Tensor, place: NDArray[np.int64]) -> torch.Tensor:
        return held.index_select(0, torch.from_numpy(place).to(self.device, non_blocking=True))

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
    """Bytes that this process may still take: of the machine, its cgroups, and what SLURM gave its job."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    # torchrun's processes see the same free memory, and each is to leave the others theirs.
    mine = min([*free, *cgroup_memory(_CGROUP)]) // local_processes()
    promised = scheduled_memory()
    return max(0, mine if promised is None else min(mine, promised))
