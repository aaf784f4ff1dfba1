"""Whether two embeddings of the same patches have the same patches near each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from heads.evaluation.agreement import spearman

_CELLS = 2**23  # similarities held at once


@dataclass(frozen=True)
class Overlap:
    """How many of the k nearest patches are the same in both embeddings.

    Attributes:
        k: How many neighbours.
        sampled: Patches among which they were looked for.
        queries: Patches whose neighbours were compared: those that have k candidates.
        overlap: Mean share of the k that both have; NaN without queries.
        jaccard: Mean of those that both have / those that either has.
        chance: The overlap that two unrelated embeddings would have on average.
    """

    k: int
    sampled: int
    queries: int
    overlap: float
    jaccard: float
    chance: float


def directions(features: torch.Tensor) -> torch.Tensor:
    """(n, D) rows of length 1; what lies at the mean has no direction, and is like nothing."""
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return torch.where(lengths > 0, features / lengths, torch.zeros_like(features))


def neighbour_overlap(
    a: torch.Tensor, b: torch.Tensor, k: int, cases: torch.Tensor | None = None
) -> Overlap:
    """Compare the k nearest by cosine of every patch, in blocks of rows.

    Args:
        a: (n, D) directions of the patches in one embedding, centred (`directions`).
        b: (n, E) of the same patches in the other.
        k: How many neighbours, at least 1.
        cases: (n,) each patch's case as a number: only patches of other cases are neighbours.
            None: all other patches are.

    Returns:
        Where there are fewer than k + 1 patches, k is one less than their number.
    """
    n = len(a)
    k = min(k, n - 1)
    if k < 1:
        return Overlap(0, n, 0, math.nan, math.nan, math.nan)
    candidates = torch.full((n,), n - 1, device=a.device)
    if cases is not None:
        candidates = n - torch.bincount(cases)[cases]
    shared = []
    rows = max(1, _CELLS // n)
    for start in range(0, n, rows):
        query = torch.arange(start, min(start + rows, n), device=a.device)
        if cases is None:
            own = query[:, None] == torch.arange(n, device=a.device)
        else:
            own = cases[query][:, None] == cases
        nearest = [
            (each[start : start + rows] @ each.T).masked_fill_(own, -2.0).topk(k).indices for each in (a, b)
        ]
        chosen = torch.zeros_like(own).scatter_(1, nearest[0], True)
        shared.append(chosen.gather(1, nearest[1]).sum(dim=1))
    able = candidates >= k
    if not bool(able.any()):
        return Overlap(k, n, 0, math.nan, math.nan, math.nan)
    both = torch.cat(shared)[able].double()
    return Overlap(
        k,
        n,
        int(able.sum()),
        float((both / k).mean()),
        float((both / (2 * k - both)).mean()),
        float((k / candidates[able].double()).mean()),
    )


def pair_cosines(a: torch.Tensor, b: torch.Tensor, count: int, seed: int) -> NDArray[np.float32]:
    """The cosines of randomly chosen pairs of different patches, in both embeddings.

    Args:
        a: (n, D) directions in one embedding, n ≥ 2.
        b: (n, E) in the other.
        count: M, how many pairs.
        seed: Of the choice.

    Returns:
        (M, 2): in a, in b.
    """
    rng = np.random.default_rng(seed)
    first = rng.integers(len(a), size=count)
    second = (first + rng.integers(1, len(a), size=count)) % len(a)
    found = np.empty((count, 2), np.float32)
    size = max(1, _CELLS // max(a.shape[1], b.shape[1]))
    for start in range(0, count, size):
        stop = min(start + size, count)
        i, j = (torch.from_numpy(each[start:stop]).to(a.device) for each in (first, second))
        for column, each in enumerate((a, b)):
            found[start:stop, column] = ((each[i] * each[j]) @ torch.ones_like(each[0])).cpu().numpy()
    return found


def pair_correlation(pairs: NDArray[np.float32]) -> float:
    """Spearman's rank correlation of the (M, 2) cosines; NaN where either has one value only."""
    wide = pairs.astype(np.float64)
    return spearman(wide[:, 0], wide[:, 1])
