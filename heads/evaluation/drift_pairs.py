"""Which patches two stores have in common: by case, stain, slice and patch number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featstore.bags import Bag
from featstore.cohort.names import natural_sorted
from featstore.errors import StoreError
from featstore.store import Store
from featstore.store.reading import read_columns

EXAMPLES = 5  # patches that are named of those without a partner
Ints = NDArray[np.int64]


@dataclass
class LeftOut:
    """Patches that are not compared, and why is the name of the field that holds this.

    Attributes:
        cases: How many of every case.
        examples: The first few, by their names.
    """

    cases: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def patches(self) -> int:
        """How many."""
        return sum(self.cases.values())

    def add(self, bag: Bag, index: Iterable[int]) -> None:
        """Note patches of a case by their positions in its outline."""
        positions = list(index)
        if not positions:
            return
        self.cases[bag.case_id] = len(positions)
        for position in positions[: max(0, EXAMPLES - len(self.examples))]:
            self.examples.append(name_of(bag, position))

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {"patches": self.patches, "cases": self.cases, "examples": self.examples}


class CommonCase(NamedTuple):
    """A case's patches that both stores have, in natural order.

    Attributes:
        case_id: The case.
        in_a: (n,) their positions in A's bag.
        in_b: (n,) in B's.
        stains: (n,) each one's stain, as a number of `Pairing.stains`.
        start: The number of the first among all common patches.
    """

    case_id: str
    in_a: Ints
    in_b: Ints
    stains: Ints
    start: int


@dataclass
class Pairing:
    """The patches of two stores, matched.

    Attributes:
        cases: Those with a common patch, in natural order.
        stains: The common patches' stains, in natural order.
        hashed: Whether the files that the patches were read from could be compared.
        only_a: Patches that B lacks.
        only_b: Patches that A lacks.
        changed: Patches of both whose files were not the same bytes.
    """

    cases: list[CommonCase] = field(default_factory=list)
    stains: list[str] = field(default_factory=list)
    hashed: bool = True
    only_a: LeftOut = field(default_factory=LeftOut)
    only_b: LeftOut = field(default_factory=LeftOut)
    changed: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return sum(len(case.in_a) for case in self.cases)


def name_of(bag: Bag, position: int) -> str:
    """`case 3, h&e, match_1, patch 7`."""
    at = int(np.searchsorted(np.cumsum(bag.slice_sizes), position, side="right"))
    stain = bag.stains[int(np.searchsorted(np.cumsum(bag.stain_sizes), at, side="right"))]
    return f"case {bag.case_id}, {stain}, {bag.slices[at]}, patch {bag.patches[position]}"


def pair_patches(a: Store, b: Store) -> Pairing:
    """Match the patches of two stores.

    A patch is the same if case, stain, slice and number are; its path may have changed. If the file that
    it was read from had other bytes, it is left out: that is a change of the image, not of the backbone.
    Of imported embeddings only the file of features is known, which says nothing about the image: their
    files are not compared.

    Raises:
        StoreError: There is no common patch, or all of them have changed.
        StoreDamaged: A part or a record is not what was written.
    """
    found = Pairing(hashed=not (a.spec.is_imported or b.spec.is_imported))
    in_a, in_b = set(a.cases()), set(b.cases())
    shared_stains = [stain for stain in a.stains() if stain in set(b.stains())]
    found.stains = natural_sorted(shared_stains)
    numbers = {stain: i for i, stain in enumerate(found.stains)}
    same_store = a.path.resolve() == b.path.resolve()
    start = 0
    for case in natural_sorted(in_a | in_b):
        one = a.outline(case) if case in in_a else None
        other = b.outline(case) if case in in_b else None
        if one is None or other is None:
            for bag, out in ((one, found.only_a), (other, found.only_b)):
                if bag is not None:
                    out.add(bag, range(len(bag)))
            continue
        mine, theirs, stains = _common(one, other, numbers)
        found.only_a.add(one, np.setdiff1d(np.arange(len(one)), mine).tolist())
        found.only_b.add(other, np.setdiff1d(np.arange(len(other)), theirs).tolist())
        if found.hashed and len(mine) and not same_store:
            same = (_hashes(a, case)[mine] == _hashes(b, case)[theirs]).all(axis=1)
            found.changed.add(one, mine[~same].tolist())
            mine, theirs, stains = mine[same], theirs[same], stains[same]
        if len(mine):
            found.cases.append(CommonCase(case, mine, theirs, stains, start))
            start += len(mine)
    if not found.cases:
        raise _nothing(a, b, found)
    used = np.unique(np.concatenate([np.unique(case.stains) for case in found.cases]))
    place = np.full(len(found.stains), -1, np.int64)
    place[used] = np.arange(len(used))
    found.cases = [case._replace(stains=place[case.stains]) for case in found.cases]
    found.stains = [found.stains[i] for i in used]
    return found


def _common(a: Bag, b: Bag, numbers: dict[str, int]) -> tuple[Ints, Ints, Ints]:
    """Positions in both bags of the patches that both have, and their stains' numbers."""
    slices = _slices(b)
    mine, theirs, stains = [], [], []
    for key, (start, patches) in _slices(a).items():
        if key not in slices:
            continue
        other_start, others = slices[key]
        _, here, there = np.intersect1d(patches, others, assume_unique=True, return_indices=True)
        mine.append(start + here)
        theirs.append(other_start + there)
        stains.append(np.full(len(here), numbers[key[0]], np.int64))
    if not mine:
        return (np.empty(0, np.int64),) * 3
    return np.concatenate(mine), np.concatenate(theirs), np.concatenate(stains)


def _slices(bag: Bag) -> dict[tuple[str, str], tuple[int, Ints]]:
    """First position and patch numbers of every slice, by stain and slice id, in the bag's order."""
    stains = np.repeat(np.array(bag.stains, object), bag.stain_sizes)
    ends = np.cumsum(bag.slice_sizes)
    return {
        (str(stain), name): (int(end - size), bag.patches[end - size : end])
        for stain, name, end, size in zip(stains, bag.slices, ends, bag.slice_sizes, strict=True)
    }


def _hashes(store: Store, case: str) -> NDArray[np.uint8]:
    """(P, 32) digests of the files that a case's patches were read from."""
    columns = read_columns(store.folder(case), store.layout(case), ["source_sha256"])
    found: NDArray[np.uint8] = columns["source_sha256"]
    return found


def _nothing(a: Store, b: Store, found: Pairing) -> StoreError:
    where = f"{a.path}, {b.path}"
    if changed := found.changed.patches:
        return StoreError(
            f"all {changed:,} patches that both stores have were read from files of other bytes",
            expected="embeddings of the same images",
            where=f"{where}; {found.changed.examples[0]}",
            fix="extract both stores from the same folder of patches",
        )
    named = [out.examples[0] if out.examples else "nothing" for out in (found.only_a, found.only_b)]
    return StoreError(
        "the two stores have no patch in common",
        expected="patches of the same case, stain, slice and number",
        where=f"{where}; A has {named[0]}, B has {named[1]}",
        fix="compare two stores of the same patches (imported ones: with the same --map)",
    )
