"""What a trained head says of cases, with all their patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.bags import BagBatch
from heads.config import TrainConfig
from heads.models.head import Head
from heads.models.outputs import HeadOutput, effective_attention
from heads.training.data import Bags, Cohort, micro_batches
from heads.training.objective import Objective
from heads.training.optimizer import autocast


@dataclass(frozen=True)
class Predictions:
    """Of N cases and C classes.

    Attributes:
        case_ids: N case ids.
        labels: (N,) true class indices.
        probabilities: (N, C) float64.
        loss: Mean cross-entropy with training's class weights and smoothing, without penalties.
    """

    case_ids: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    loss: float


@torch.no_grad()
def predict(
    head: Head,
    bags: Bags,
    cases: Sequence[str],
    config: TrainConfig,
    weights: torch.Tensor | None = None,
    observe: Callable[[BagBatch, HeadOutput], None] = lambda batch, output: None,
) -> Predictions:
    """Classify cases with all their patches.

    Args:
        head: Trained.
        bags: The cohort.
        cases: N cases of it.
        config: Resolved (`heads.config.resolved`); says precision and patch budget.
        weights: (C,) class weights of the loss, or None.
        observe: Called with every batch and what the head said of it.
    """
    head = head.to(bags.device).eval()
    objective = Objective(config, head, None if weights is None else weights.to(bags.device))
    schedule = head.schedule(config.epochs - 1, config.epochs)
    logits, losses = [], []
    for micro in micro_batches([bags.outlines[case] for case in cases], config.patch_budget):
        batch = bags.batch(micro)
        with autocast(bags.device, config.amp):
            output = head(batch, **schedule)
        logits.append(output.logits.double())
        losses.append(objective(output, batch).loss)
        observe(batch, output)
    probabilities = torch.softmax(torch.cat(logits), dim=1).cpu().numpy()
    labels = np.array([bags.outlines[case].label for case in cases], np.int64)
    return Predictions(tuple(cases), labels, probabilities, float(torch.cat(losses).double().mean()))


class PatchAttention:
    """Collects the attention on every patch, to be written as a table.

    Args:
        bags: The cohort, whose store knows every row's file.
        class_names: For columns of what a head says by class; by default, the classes' numbers.
    """

    def __init__(self, bags: Cohort, class_names: Sequence[str] = ()) -> None:
        self._bags, self._classes = bags, class_names
        self._columns: dict[str, list[NDArray[Any]]] = {}
        self._cases: list[str] = []

    @property
    def seen(self) -> bool:
        """Whether the head had attention to note."""
        return bool(self._columns)

    def __call__(self, batch: BagBatch, output: HeadOutput) -> None:
        """Note a batch."""
        effective = effective_attention(output, batch)
        if effective is None:
            return
        sizes = {
            "patch": None,
            "selection": None,
            "slice": batch.slice_offsets,
            "stain": batch.slice_offsets[batch.stain_offsets],
        }
        self._cases.extend(batch.case_ids)
        found = {"row": batch.rows, "effective_attention": effective}
        for level, attention in output.attention.items():
            weights, offsets = attention.weights, sizes[level]
            if offsets is not None:
                weights = torch.repeat_interleave(weights, offsets.diff(), output_size=len(effective))
            found[f"{level}_attention"] = weights
        if output.instance_scores is not None:
            found["instance_score"] = output.instance_scores
        for name, value in found.items():
            for column, each in self._by_class(name, value):
                self._columns.setdefault(column, []).append(each.cpu().numpy())

    def _by_class(self, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """One column, or one a class where the head attends or scores by class."""
        if value.ndim == 1:
            yield name, value
            return
        for c, each in enumerate(value.unbind(1)):
            yield f"{name}_{self._classes[c] if self._classes else c}", each

    def table(self) -> Any:
        """A DataFrame, one row a patch: who it is, its file, its attention at every level.

        Its index is the patch's row in `Store.table`.
        """
        import pandas as pd

        arrays = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        rows = arrays.pop("row")
        # Case by case: of a large store, the tables of the other cases are not read.
        cases = dict.fromkeys(self._cases)
        whole = pd.concat([self._bags.store.table(case) for case in cases])
        known = whole.loc[rows, ["case_id", "stain", "slice_id", "patch", "path"]]
        return pd.concat((known, pd.DataFrame(arrays, index=known.index)), axis=1)
