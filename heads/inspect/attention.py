"""Asking a trained head for its attention."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch

from featstore.bags import BagBatch
from heads.evaluation.predict import PatchAttention, predict
from heads.inspect.opened import Opened
from heads.inspect.tables import AttentionTables, attention_tables
from heads.models.outputs import HeadOutput


def read_attention(
    opened: Opened, update: Callable[[int, int], None] = lambda done, total: None
) -> AttentionTables | None:
    """Ask the head for its attention on every patch of the cases.

    Args:
        opened: A run.
        update: Called with the number of cases done, and of all.

    Returns:
        None for a head without attention.
    """
    collected = PatchAttention(opened.bags, opened.class_names)
    done, logits = 0, []

    def observe(batch: BagBatch, output: HeadOutput) -> None:
        nonlocal done
        collected(batch, output)
        logits.append(output.logits)
        done += len(batch)
        update(done, len(opened.cases))

    train = opened.config.train.model_copy(update={"amp": "off"})
    predict(opened.head, opened.bags, opened.cases, train, None, observe)
    if not collected.seen:
        return None
    return attention_tables(collected.table(), case_table(opened, torch.cat(logits)))


def case_table(opened: Opened, logits: torch.Tensor) -> pd.DataFrame:
    """``case_id, true_label, predicted_label, prob_<class>…, correct`` of (N, C) logits."""
    probabilities = opened.share(logits).cpu().numpy()
    names, true, called = opened.class_names, opened.labels, opened.called(probabilities)
    frame = pd.DataFrame({"case_id": opened.cases})
    frame["true_label"] = [names[label] for label in true]
    frame["predicted_label"] = [names[label] for label in called]
    for c, name in enumerate(names):
        frame[f"prob_{name}"] = probabilities[:, c]
    return frame.assign(correct=(true == called).astype(int))
