"""What training sees of a bag: caps, samples of a fixed size, sub-cases. Evaluation sees everything."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featstore.bags import Bag

Sampling = Literal["random", "even", "entropy", "all"]
Partition = Literal["range", "stride", "slice"]


def cap_slices(bag: Bag, cap: int, rng: np.random.Generator) -> Bag:
    """At most ``cap`` patches of every slice, drawn without replacement.

    Args:
        bag: One case.
        cap: ``per_slice_cap``, at least 1.
        rng: A fresh draw a call: another subset in every epoch.
    """
    if (bag.slice_sizes <= cap).all():
        return bag
    return bag.take(_ranks(rng.random(len(bag)), bag) < cap)


def limit_slices(bag: Bag, limit: int, seed: int) -> Bag:
    """At most ``limit`` slices of every stain; the same choice whenever seed and case are the same.

    Args:
        bag: One case.
        limit: ``max_slices_per_stain``, at least 1.
        seed: Of the run.
    """
    if (bag.stain_sizes <= limit).all():
        return bag
    # Keyed by the case's name: adding a case to the cohort changes no other case's choice.
    rng = np.random.default_rng([seed, zlib.crc32(bag.case_id.encode())])
    ends = np.cumsum(bag.stain_sizes)
    kept = np.zeros(len(bag.slices), bool)
    for size, end in zip(bag.stain_sizes.tolist(), ends.tolist(), strict=True):
        kept[end - size + rng.permutation(size)[:limit]] = True
    return bag.take(np.repeat(kept, bag.slice_sizes))


def sample_bag(
    bag: Bag,
    size: int,
    sampling: Sampling,
    rng: np.random.Generator,
    entropy: NDArray[np.floating] | None = None,
) -> Bag:
    """At most ``size`` patches of a case, without replacement.

    Args:
        bag: One case.
        size: ``bag_size``, at least 1.
        sampling: ``random``: every patch alike. ``even``: as many from each slice as from every
            other, as far as it has them. ``entropy``: with probability in proportion to the patches'
            grey-level entropy. ``all``: the whole bag.
        rng: A fresh draw a call.
        entropy: (P,) of the patches, for ``entropy``; zeros and unknown values are drawn last.
    """
    if sampling == "all" or len(bag) <= size:
        return bag
    draw = rng.random(len(bag))
    if sampling == "even":
        # Every slice gives its first, then every slice its second, …; ties in random order.
        order = np.lexsort((draw, _ranks(draw, bag)))
    elif sampling == "entropy":
        if entropy is None or len(entropy) != len(bag):
            raise ValueError("sampling by entropy needs the entropy of every patch")
        weight = np.nan_to_num(np.asarray(entropy, np.float64), nan=0.0).clip(min=0)
        # Exponential clocks: the first to ring are a weighted draw (Efraimidis and Spirakis 2006).
        with np.errstate(divide="ignore"):
            order = np.lexsort((draw, rng.exponential(size=len(bag)) / weight))
    else:
        order = np.argsort(draw)
    chosen = np.zeros(len(bag), bool)
    chosen[order[:size]] = True
    return bag.take(chosen)


def sub_cases(bag: Bag, n: int, by: Partition) -> list[Bag]:
    """Split a case into at most ``n`` sub-bags that partition its patches.

    Args:
        bag: One case.
        n: How many; fewer where there are not as many patches (or slices).
        by: ``range``: runs of neighbours; ``stride``: every n-th; ``slice``: whole slices, the
            largest first to the sub-bag that has the fewest patches.

    Returns:
        Sub-bags with ids ``case#1`` …; the bag itself for n = 1.
    """
    if n <= 1:
        return [bag]
    patches = np.arange(len(bag))
    if by == "range":
        part = patches * min(n, len(bag)) // len(bag)
    elif by == "stride":
        part = patches % n
    else:
        load = np.zeros(min(n, len(bag.slices)), np.int64)
        home = np.empty(len(bag.slices), np.int64)
        for number in np.argsort(-bag.slice_sizes, kind="stable").tolist():
            home[number] = load.argmin()
            load[home[number]] += bag.slice_sizes[number]
        part = np.repeat(home, bag.slice_sizes)
    parts = [bag.take(part == k) for k in np.unique(part)]
    return [replace(each, case_id=f"{bag.case_id}#{k}") for k, each in enumerate(parts, 1)]


def _ranks(draw: NDArray[np.float64], bag: Bag) -> NDArray[np.int64]:
    """(P,) place of every patch within its slice when the slice is put in order of ``draw``."""
    slice_of_patch = np.repeat(np.arange(len(bag.slices)), bag.slice_sizes)
    order = np.lexsort((draw, slice_of_patch))
    starts = np.repeat(np.cumsum(bag.slice_sizes) - bag.slice_sizes, bag.slice_sizes)
    ranks = np.empty(len(bag), np.int64)
    ranks[order] = np.arange(len(bag)) - starts
    return ranks
