"""What every single patch says, and what its absence changes: probing a run's cases, as tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from featstore.bags import BagBatch
from heads.inspect.attention import case_table
from heads.inspect.opened import Opened
from heads.inspect.probing import Probe, probe
from heads.inspect.tables import IDENTITY, neutral
from heads.models.outputs import effective_attention

Floats = NDArray[np.float64]
MODES = ("alone", "in_place")
# Patches a batch: enough for fast products, few enough that what lies between stays small.
_BUDGET = 16_384


@dataclass(frozen=True, eq=False)
class ProbeTables:
    """What a head says of single patches (N cases, ΣP patches, ΣS slices, ΣT stains).

    For every class c: ``alone_c`` is the probability of the patch as a bag of its own, ``in_place_c`` that
    of its case if the patch had all the attention of its slice and slices and stains kept theirs,
    ``without_c`` that of the case without the patch (slice, stain), and ``effect_c`` the case's own
    less that: what the patch adds to the probability of c. Columns of what a head cannot be asked are
    absent; what has no value (a case of nothing) is NaN.

    Attributes:
        cases: ``case_id, true_label, predicted_label, prob_<class>…, correct, patches``.
        patches: `IDENTITY`, ``effective_attention`` where the head has attention, and the above; the index
            is the row in `Store.table`.
        slices: ``case_id, stain, slice_id, patches``, ``without_<class>…, effect_<class>…``.
        stains: ``case_id, stain, slices, patches``, and the same.
        reason: Why some columns are absent; empty if none is.
    """

    cases: pd.DataFrame
    patches: pd.DataFrame
    slices: pd.DataFrame
    stains: pd.DataFrame
    reason: str


def read_probes(
    opened: Opened,
    leave_out: bool = True,
    update: Callable[[int, int], None] = lambda done, total: None,
) -> ProbeTables:
    """Probe all patches of the cases, in vectorised passes over their embeddings.

    Args:
        opened: A run.
        leave_out: Whether the effects of leaving patches, slices and stains out are wanted.
        update: Called with the number of cases done, and of all.
    """
    collected = _Collected(opened)
    done = 0
    for batch in opened.batches(min(_BUDGET, opened.config.train.patch_budget)):
        collected.add(batch, probe(opened.head, batch, leave_out, **opened.schedule))
        done += len(batch)
        update(done, len(opened.cases))
    return collected.tables(opened)


class _Collected:
    """What batches said, as columns of float32: the one thing that grows with the number of patches."""

    def __init__(self, opened: Opened) -> None:
        self._names, self._share = opened.class_names, opened.share
        self._logits: list[torch.Tensor] = []
        self._columns: dict[str, dict[str, list[NDArray[Any]]]] = {"patch": {}, "slice": {}, "stain": {}}
        self._rows: list[NDArray[np.int64]] = []
        self.reason = ""

    def add(self, batch: BagBatch, found: Probe) -> None:
        """Note a batch."""
        self._logits.append(found.output.logits.double().cpu())
        self._rows.append(batch.rows.cpu().numpy())
        self.reason = self.reason or found.reason
        whole = self._share(found.output.logits)
        effective = effective_attention(found.output, batch)
        if effective is not None:
            self._put("patch", "effective_attention", effective)
        self._put_classes("patch", "alone", self._share(found.alone))
        if found.in_place is not None:
            self._put_classes("patch", "in_place", self._share(found.in_place))
        slices = batch.stain_offsets[batch.case_offsets]
        for level, logits, offsets in (
            ("patch", found.without_patch, batch.case_patch_offsets),
            ("slice", found.without_slice, slices),
            ("stain", found.without_stain, batch.case_offsets),
        ):
            if logits is not None:
                without = self._share(logits)
                own = torch.repeat_interleave(whole, offsets.diff(), dim=0)
                self._put_classes(level, "without", without)
                self._put_classes(level, "effect", own - without)

    def _put_classes(self, level: str, what: str, share: torch.Tensor) -> None:
        for c, name in enumerate(self._names):
            self._put(level, f"{what}_{name}", share[:, c])

    def _put(self, level: str, name: str, values: torch.Tensor) -> None:
        # Effects of one patch in thousands are differences of nearly equal numbers: not of float32 ones.
        kept = values.double() if name.startswith(("effect_", "without_")) else values.float()
        self._columns[level].setdefault(name, []).append(kept.cpu().numpy())

    def tables(self, opened: Opened) -> ProbeTables:
        """All of it."""
        cases = case_table(opened, torch.cat(self._logits))
        outlines = [opened.bags.outlines[case] for case in opened.cases]
        cases["patches"] = [len(bag) for bag in outlines]
        known = opened.table.loc[np.concatenate(self._rows), IDENTITY]
        patches = pd.concat([known, self._frame("patch", known.index)], axis=1)
        slices, stains = [], []
        for bag in outlines:
            of_slice = np.repeat(np.arange(len(bag.stains)), bag.stain_sizes)
            counts = np.add.reduceat(bag.slice_sizes, np.cumsum([0, *bag.stain_sizes[:-1]]))
            for name, stain, n in zip(bag.slices, of_slice, bag.slice_sizes.tolist(), strict=True):
                slices.append((bag.case_id, bag.stains[stain], name, n))
            sizes = zip(bag.stains, bag.stain_sizes.tolist(), counts.tolist(), strict=True)
            stains += [(bag.case_id, *each) for each in sizes]
        of_slices = pd.DataFrame(slices, columns=["case_id", "stain", "slice_id", "patches"])
        of_stains = pd.DataFrame(stains, columns=["case_id", "stain", "slices", "patches"])
        return ProbeTables(
            cases,
            patches,
            pd.concat([of_slices, self._frame("slice", of_slices.index)], axis=1),
            pd.concat([of_stains, self._frame("stain", of_stains.index)], axis=1),
            self.reason,
        )

    def _frame(self, level: str, index: pd.Index) -> pd.DataFrame:
        arrays = {name: np.concatenate(parts) for name, parts in self._columns[level].items()}
        return pd.DataFrame(arrays, index=index)


def most_for(
    tables: ProbeTables, name: str, mode: str = "alone", n: int = 10, each: int = 2
) -> pd.DataFrame:
    """The patches that say most for a class, at most so many of a case.

    Args:
        tables: Of a run.
        name: The class.
        mode: ``alone`` or ``in_place``.
        n: How many.
        each: How many of a case: else one case could fill the gallery.
    """
    order = tables.patches.sort_values(f"{mode}_{name}", ascending=False, kind="stable")
    return order[order.groupby("case_id", sort=False).cumcount() < each].head(n)


def attended_but_neutral(
    tables: ProbeTables, mode: str = "alone", n: int = 10, each: int = 2, percent: float = 5.0
) -> pd.DataFrame:
    """Patches that are among their case's most attended ones, and say nothing for any class.

    Args:
        tables: Of a run whose head has attention.
        mode: ``alone`` or ``in_place``.
        n: How many.
        each: How many of a case.
        percent: Of a case's patches, the most attended ones.

    Returns:
        Those whose probabilities are less than 0.2 from equal ones, the nearest first.
    """
    patches = tables.patches
    names = [column for column in map(str, patches) if column.startswith(f"{mode}_")]
    of_case = patches.groupby("case_id", sort=False)["effective_attention"]
    rank = of_case.rank(ascending=False, method="first")
    attended = patches[rank <= np.ceil((of_case.transform("size") * percent / 100).round(9))]
    order = neutral(attended, names)
    return order[order.groupby("case_id", sort=False).cumcount() < each].head(n)
