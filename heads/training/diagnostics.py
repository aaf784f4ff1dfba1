"""What an epoch was like: losses by term, accuracy, AUC, and how sharp the attention was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from featstore.bags import BagBatch
from heads.evaluation.metrics import rank_auc
from heads.models.outputs import Attention, HeadOutput
from heads.models.penalties import entropy
from heads.models.pooling import segment_max
from heads.training.objective import Terms


@dataclass
class EpochLog:
    """Collects what the batches of an epoch gave, without any computation graph.

    Nothing is read from the device before `summary`, so that no batch waits for it.
    """

    _losses: list[torch.Tensor] = field(default_factory=list)
    _penalties: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _logits: list[torch.Tensor] = field(default_factory=list)
    _labels: list[torch.Tensor] = field(default_factory=list)
    _attention: dict[str, list[Attention]] = field(default_factory=dict)

    def add(self, output: HeadOutput, batch: BagBatch, terms: Terms) -> None:
        """Note a batch."""
        self._losses.append(terms.loss.detach())
        for name, value in terms.penalties.items():
            self._penalties.setdefault(name, []).append(value.detach())
        if terms.aux_loss is not None:
            aux = terms.aux_loss.detach().expand(len(terms.loss))
            self._penalties.setdefault("aux_loss", []).append(aux)
        self._logits.append(output.logits.detach().float())
        if batch.labels is not None:
            self._labels.append(batch.labels)
        for level, attention in output.attention.items():
            parts = (attention.weights, attention.logits, attention.offsets)
            self._attention.setdefault(level, []).append(Attention(*(p.detach() for p in parts)))

    def extend(self, other: EpochLog) -> None:
        """Note what another log has noted."""
        self._losses += other._losses
        self._logits += other._logits
        self._labels += other._labels
        for name, values in other._penalties.items():
            self._penalties.setdefault(name, []).extend(values)
        for level, parts in other._attention.items():
            self._attention.setdefault(level, []).extend(parts)

    def state(self) -> dict[str, Any]:
        """What is noted, on the CPU, of types that ``torch.load(weights_only=True)`` reads."""

        def held(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [each.cpu() for each in tensors]

        return {
            "losses": held(self._losses),
            "logits": held(self._logits),
            "labels": held(self._labels),
            "penalties": {name: held(values) for name, values in self._penalties.items()},
            "attention": {
                level: [held([part.weights, part.logits, part.offsets]) for part in parts]
                for level, parts in self._attention.items()
            },
        }

    @staticmethod
    def of(states: Sequence[Mapping[str, Any]]) -> EpochLog:
        """A log of all that some have noted, out of what `state` gave."""
        log = EpochLog()
        for state in states:
            attention = {
                level: [Attention(*part) for part in parts] for level, parts in state["attention"].items()
            }
            lists = (list(state[name]) for name in ("losses", "logits", "labels"))
            losses, logits, labels = lists
            log.extend(EpochLog(losses, dict(state["penalties"]), logits, labels, attention))
        return log

    def summary(self, batch_size: int) -> dict[str, float]:
        """One number a measure; undefined ones (the AUC of one class) are NaN.

        Args:
            batch_size: Cases a batch, for the variance of the batches' losses.
        """
        losses = torch.cat(self._losses).double().cpu()
        penalties = {name: float(torch.cat(v).double().mean()) for name, v in self._penalties.items()}
        logits, classes = torch.cat(self._logits).double().cpu(), torch.cat(self._labels).cpu()
        probabilities, labels = torch.softmax(logits, dim=1).numpy(), classes.numpy()
        means = torch.stack([part.mean() for part in torch.split(losses, batch_size)])
        found = {
            "loss": float(losses.mean()) + sum(penalties.values()),
            "cross_entropy": float(losses.mean()),
            **penalties,
            # Without class weights and smoothing: what trainings of different settings are compared by.
            "log_loss": float(torch.nn.functional.cross_entropy(logits, classes)),
            "accuracy": float((probabilities.argmax(1) == labels).mean()),
            "auc": rank_auc(labels, probabilities),
            "batch_loss_variance": float(means.var(correction=0)),
        }
        for level, parts in self._attention.items():
            found.update(_sharpness(level, parts))
        return found


def _sharpness(level: str, parts: list[Attention]) -> dict[str, float]:
    """Means over a level's segments, and classes: entropy in nats, effective instances, largest weight."""
    sizes = torch.cat([part.offsets.diff() for part in parts])
    whole = Attention(
        torch.cat([part.weights for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat((sizes.new_zeros(1), sizes.cumsum(0))),
    )
    h, top = entropy(whole), segment_max(whole.weights, whole.offsets)
    values = torch.stack((h.mean(), h.exp().mean(), top.mean())).tolist()
    names = ("attention_entropy", "effective_instances", "top1_attention")
    return {f"{name}_{level}": value for name, value in zip(names, values, strict=True)}


def mean_norm(norms: list[torch.Tensor]) -> float:
    """The mean gradient norm of an epoch's steps; NaN without any."""
    return float(torch.stack(norms).mean()) if norms else float(np.nan)
