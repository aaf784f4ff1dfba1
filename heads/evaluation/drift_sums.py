"""Reading two stores side by side, twice: their means, then everything that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.cohort.names import natural_sorted
from featstore.errors import StoreError
from featstore.store import Store
from heads.evaluation.cka import Moments
from heads.evaluation.drift_pairs import CommonCase, Pairing
from heads.evaluation.variance import Spread

PER_PATCH = ("cosine", "cosine_centred", "norm_a", "norm_b", "relative_change")
_BLOCK = 4096  # rows that are held in float32 at a time
_PENDING = 16_384  # rows that wait until the products of their stain are added up
_MOMENTS_BYTES = 2**31  # of the sums for CKA by stain; the stains with fewest patches share what is left


@dataclass(frozen=True)
class Alignment:
    """CKA of the patches of a stain, or of all; NaN where undefined.

    Attributes:
        stain: Which; None: all.
        patches: How many.
        linear: `Moments.linear_cka`.
        debiased: `Moments.debiased_cka`.
    """

    stain: str | None
    patches: int
    linear: float
    debiased: float


def sample_of(total: int, count: int | None, seed: int) -> NDArray[np.int64]:
    """Ascending numbers of the patches that are sampled."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))


class _Reader:
    """Embeddings of a store as float32, block by block, in memory that is used again."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store = store
        self._held = torch.empty((_BLOCK, store.spec.dim), device=device)

    def blocks(self, case_id: str, index: NDArray[np.int64]) -> Iterator[torch.Tensor]:
        """(n, D) of some of a case's patches; each is overwritten by the next."""
        features = self._store.features(case_id)
        whole = len(index) == len(features)
        for start in range(0, len(index), _BLOCK):
            stop = min(start + _BLOCK, len(index))
            rows = torch.from_numpy(features[start:stop] if whole else features[index[start:stop]])
            if self._held.is_cuda:
                rows = rows.pin_memory()
            yield self._held[: len(rows)].copy_(rows, non_blocking=True)


def common_means(
    stores: tuple[Store, Store], pairing: Pairing, device: torch.device, observe: Callable[[int], None]
) -> list[torch.Tensor]:
    """Each store's mean (D,) over the common patches."""
    sums = [torch.zeros(store.spec.dim, dtype=torch.float64, device=device) for store in stores]
    readers = [_Reader(store, device) for store in stores]
    ones = torch.ones(_BLOCK, device=device)
    for number, case in enumerate(pairing.cases):
        for store, reader, total, index in zip(stores, readers, sums, (case.in_a, case.in_b), strict=True):
            for block in reader.blocks(case.case_id, index):
                total += ones[: len(block)] @ block
            if not bool(torch.isfinite(total).all()):
                raise StoreError(
                    f"case {case.case_id} has embeddings that are not finite (NaN or infinite)",
                    expected="finite numbers",
                    where=str(store.folder(case.case_id)),
                    fix="embed or import the case again",
                )
        observe(number + 1)
    return [(total / len(pairing)).float() for total in sums]


class SecondPass:
    """The second reading: everything that needs the means."""

    def __init__(
        self,
        stores: tuple[Store, Store],
        pairing: Pairing,
        means: Sequence[torch.Tensor],
        labels: Mapping[str, str],
        sample: NDArray[np.int64],
        device: torch.device,
    ) -> None:
        self._stores, self._pairing, self._means, self._device = stores, pairing, means, device
        self._dims = (stores[0].spec.dim, stores[1].spec.dim)
        self._classes = {name: i for i, name in enumerate(natural_sorted(labels.values()))}
        self._labels, self._sample = labels, sample
        self.patches = {name: np.full(len(pairing), np.nan, np.float32) for name in PER_PATCH}
        sizes = (len(pairing.stains), len(self._classes))
        self.spreads = [Spread(dim, *sizes) for dim in self._dims]
        self._counts = np.bincount(np.concatenate([case.stains for case in pairing.cases]))
        each = 8 * (self._dims[0] ** 2 + self._dims[1] ** 2 + self._dims[0] * self._dims[1])
        most = max(1, _MOMENTS_BYTES // each - 2)  # the others together, and all
        self._own = set(np.argsort(-self._counts, kind="stable")[:most].tolist())
        self._moments: dict[int, Moments] = {}
        self._pending: dict[int, list[slice]] = {}
        self._waiting = 0
        self.sampled: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        # Memory that is new to the process costs more than the sums: all of it is taken once.
        self._readers = [_Reader(store, device) for store in stores]
        self._centred = [torch.empty((_PENDING + _BLOCK, dim), device=device) for dim in self._dims]
        self._gathered = [torch.empty_like(held) for held in self._centred]
        self._products = torch.empty((_BLOCK, max(self._dims)), device=device)
        self._ones = torch.ones(max(_BLOCK, *self._dims), device=device)

    def add(self, case: CommonCase) -> None:
        """Read a case's common patches."""
        stains = len(self._pairing.stains)
        sums = [torch.zeros((stains, dim), dtype=torch.float64, device=self._device) for dim in self._dims]
        squares = [torch.zeros((), dtype=torch.float64, device=self._device) for _ in self._dims]
        indices = zip(self._readers, (case.in_a, case.in_b), strict=True)
        start = 0
        for raw in zip(*(reader.blocks(case.case_id, index) for reader, index in indices), strict=True):
            place = slice(self._waiting, self._waiting + len(raw[0]))
            centred = [
                torch.sub(block, mean, out=held[place])
                for block, mean, held in zip(raw, self._means, self._centred, strict=True)
            ]
            lengths = [self._dot(block, block) for block in centred]
            for square, length in zip(squares, lengths, strict=True):
                square += length.sum(dtype=torch.float64)
            self._note(raw, centred, lengths, case.start + start)
            codes = case.stains[start : start + len(raw[0])]
            bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
            for first, end in pairwise(bounds):
                code = int(codes[first])
                for total, block in zip(sums, centred, strict=True):
                    total[code] += self._ones[: end - first] @ block[first:end]
                kept = slice(self._waiting + first, self._waiting + end)
                self._pending.setdefault(code if code in self._own else -1, []).append(kept)
            start += len(codes)
            self._waiting += len(codes)
            if self._waiting >= _PENDING:
                self.flush()
        sizes = torch.from_numpy(np.bincount(case.stains, minlength=stains)).double()
        name = self._labels.get(case.case_id)
        label = None if name is None else self._classes[name]
        for spread, total, square in zip(self.spreads, sums, squares, strict=True):
            spread.add_case(total.cpu(), sizes, float(square), label)

    def flush(self) -> None:
        """Add up the products of what waits: many rows at a time, as a case may have few of a stain."""
        for code, places in self._pending.items():
            if code not in self._moments:
                self._moments[code] = Moments.zeros(*self._dims, self._device)
            size = sum(place.stop - place.start for place in places)
            x, y = (
                torch.cat([held[place] for place in places], out=room[:size])
                for held, room in zip(self._centred, self._gathered, strict=True)
            )
            self._moments[code].add(x, y)
        self._pending, self._waiting = {}, 0

    def _dot(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(n,) of the rows of (n, D) and (n, D); as a product with ones, many times faster than a sum."""
        n, dim = one.shape
        room = self._products.flatten()[: n * dim].view(n, dim)
        return torch.mul(one, other, out=room) @ self._ones[:dim]

    def _note(
        self,
        raw: Sequence[torch.Tensor],
        centred: Sequence[torch.Tensor],
        lengths: Sequence[torch.Tensor],
        start: int,
    ) -> None:
        """What is kept of every patch of a block, and the sampled ones' embeddings."""
        norms = [self._dot(block, block).sqrt() for block in raw]
        found = {"norm_a": norms[0], "norm_b": norms[1]}
        if self._dims[0] == self._dims[1]:  # 0 / 0 is NaN: undefined
            found["cosine"] = self._dot(*raw) / (norms[0] * norms[1])
            found["cosine_centred"] = self._dot(*centred) / (lengths[0].sqrt() * lengths[1].sqrt())
            # In place, as nothing reads B's embeddings after it.
            moved = raw[1].sub_(raw[0])
            change = self._dot(moved, moved).sqrt() / norms[0]
            found["relative_change"] = torch.where(norms[0] > 0, change, torch.nan)
        end = start + len(raw[0])
        for name, values in found.items():
            kept = values.clamp(-1, 1) if name.startswith("cosine") else values
            self.patches[name][start:end] = kept.cpu().numpy()
        low, high = np.searchsorted(self._sample, (start, end))
        if low < high:
            chosen = torch.from_numpy(self._sample[low:high] - start).to(self._device)
            for rows, block in zip(self.sampled, centred, strict=True):
                rows.append(block[chosen])

    def sampled_cases(self) -> NDArray[np.int64]:
        """(n,) the number of each sampled patch's case."""
        starts = np.array([case.start for case in self._pairing.cases])
        return np.searchsorted(starts, self._sample, side="right") - 1

    def alignment(self) -> list[Alignment]:
        """CKA of all patches, then of every stain whose sums are kept apart."""
        whole = Moments.zeros(*self._dims, self._device)
        found = []
        for code in sorted(self._moments):
            whole.merge(self._moments[code])
            if code >= 0:
                name = self._pairing.stains[code]
                found.append(_aligned(name, self._moments[code]))
        return [_aligned(None, whole), *found]


def _aligned(stain: str | None, moments: Moments) -> Alignment:
    return Alignment(stain, moments.n, moments.linear_cka(), moments.debiased_cka())
