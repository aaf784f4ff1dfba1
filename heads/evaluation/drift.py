"""How two embeddings of the same patches differ, such as before and after a backbone was tuned.

Both stores are read twice, case by case; what is kept of every patch are five numbers and its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from featstore.errors import ConfigError
from featstore.store import Store
from heads.evaluation.drift_groups import summarized
from heads.evaluation.drift_pairs import Pairing, pair_patches
from heads.evaluation.drift_sums import Alignment, SecondPass, common_means, sample_of
from heads.evaluation.neighbours import (
    Overlap,
    directions,
    neighbour_overlap,
    pair_correlation,
    pair_cosines,
)

PAIRS = 200_000  # of sampled patches, whose cosines are compared
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Drift:
    """What `compare_stores` found (N common patches).

    Attributes:
        a: The first store, such as before.
        b: The second.
        pairing: Which patches are common, and which are left out.
        patches: By the names in `PER_PATCH`, (N,) float32 in the order of `pairing`; NaN where undefined.
            Of stores of different dims ``cosine``, ``cosine_centred`` and ``relative_change`` are all NaN.
        groups: Of `GROUPINGS`: ``case_id, stain, class`` (empty: all), ``patches``, and of both cosines
            mean, median, 5 % and 95 % quantile.
        alignment: CKA of all patches, and by stain.
        neighbours: Overlap among all sampled patches, and with those of other cases only (``all``,
            ``other_cases``).
        pairs: (M, 2) cosines of pairs of sampled patches, in A and in B.
        variance: Shares of variance (`Spread.shares`), in A and in B.
        labels: Class name of the labelled cases.
        seed: Of the sample.
    """

    a: Store
    b: Store
    pairing: Pairing
    patches: dict[str, Floats]
    groups: pd.DataFrame
    alignment: list[Alignment]
    neighbours: dict[str, Overlap]
    pairs: Floats
    variance: tuple[dict[str, float], dict[str, float]]
    labels: dict[str, str]
    seed: int

    @property
    def same_store(self) -> bool:
        """Whether A and B are one folder."""
        return self.a.path.resolve() == self.b.path.resolve()

    @property
    def has_cosine(self) -> bool:
        """Whether A and B have one number of features."""
        return self.a.spec.dim == self.b.spec.dim

    @property
    def pair_correlation(self) -> float:
        """Rank correlation of the pairs' cosines in A with those in B."""
        return pair_correlation(self.pairs)

    @property
    def undefined(self) -> int:
        """Patches whose centred or raw cosine is undefined: an embedding at the mean, or at 0."""
        return int((np.isnan(self.patches["cosine"]) | np.isnan(self.patches["cosine_centred"])).sum())

    def median(self, name: str) -> float:
        """Over all patches, of one of `PER_PATCH`; NaN where none has one."""
        values = self.patches[name]
        known = values[~np.isnan(values)]
        return float(np.median(known)) if len(known) else math.nan

    def tables(self) -> Iterator[pd.DataFrame]:
        """Every case's common patches: ``case_id, stain, slice_id, patch, path`` (A's), `PER_PATCH`."""
        for case in self.pairing.cases:
            identity = self.a.sources(case.case_id)[["case_id", "stain", "slice_id", "patch", "path"]]
            place = slice(case.start, case.start + len(case.in_a))
            numbers = {name: values[place] for name, values in self.patches.items()}
            yield identity.iloc[case.in_a].reset_index(drop=True).assign(**numbers)


def compare_stores(
    a: Store,
    b: Store,
    neighbours: int = 10,
    sample: int | None = 5000,
    seed: int = 0,
    labels: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> Drift:
    """Compare the embeddings of the patches that two stores have in common.

    Centred is an embedding less the mean of its store over the common patches: without that any two
    patches look alike.

    Args:
        a: The first store.
        b: The second; its number of features may be another.
        neighbours: How many nearest patches are compared.
        sample: Among how many patches, drawn from all common ones; None: all, which takes time with the
            square of their number and holds them in memory.
        seed: Of the sample.
        labels: Class name of cases; those that it lacks are of no class.
        device: Where the sums are computed; None: the CPU.
        observe: Called with how many cases are read, of how many in both passes.

    Raises:
        StoreError: The stores have no common patch, or an embedding is not finite.
        StoreDamaged: A part is missing or is not what was written.
        ConfigError: A number below 1 (of the sample: below 2).
    """
    for name, number, least in (("neighbours", neighbours, 1), ("sample", sample, 2)):
        if number is not None and number < least:
            fix = f"--{name} {10 if name == 'neighbours' else 5000}"
            raise ConfigError(f"{name} is {number}", expected=f"{least} or more", where=name, fix=fix)
    pairing, where = pair_patches(a, b), device or torch.device("cpu")
    given = labels or {}
    known = {case.case_id: given[case.case_id] for case in pairing.cases if case.case_id in given}
    total = 2 * len(pairing.cases)
    means = common_means((a, b), pairing, where, lambda done: observe(done, total))
    second = SecondPass((a, b), pairing, means, known, sample_of(len(pairing), sample, seed), where)
    for number, case in enumerate(pairing.cases):
        second.add(case)
        observe(total // 2 + number + 1, total)
    second.flush()
    one, other = (directions(torch.cat(rows)) for rows in second.sampled)
    of_case = torch.from_numpy(second.sampled_cases()).to(where)
    overlaps = {
        "all": neighbour_overlap(one, other, neighbours),
        "other_cases": neighbour_overlap(one, other, neighbours, of_case),
    }
    pairs = np.empty((0, 2), np.float32)
    if len(one) > 1:
        pairs = pair_cosines(one, other, min(PAIRS, len(one) * (len(one) - 1)), seed)
    groups = summarized(pairing, second.patches, known)
    shares = (second.spreads[0].shares(), second.spreads[1].shares())
    return Drift(
        a, b, pairing, second.patches, groups, second.alignment(), overlaps, pairs, shares, known, seed
    )
