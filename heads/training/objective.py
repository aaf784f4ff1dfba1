"""What training minimises: the loss of every case, and the penalties on its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from featstore.bags import BagBatch
from featstore.errors import ConfigError
from heads.config import TrainConfig, weights_by_level
from heads.models.head import Head
from heads.models.outputs import HeadOutput
from heads.models.penalties import (
    confidence_penalty,
    elastic_net_penalty,
    entropy_penalty,
    segments_of_cases,
)
from heads.training.losses import class_weights, get_loss


@dataclass(frozen=True)
class Terms:
    """A batch's objective.

    Attributes:
        loss: (b,) class-weighted loss of every case, without penalties.
        penalties: By name, (b,), weighted: what is added to the loss.
        aux_loss: A scalar, the batch's mean of what the head adds (a second classifier's loss, a loss
            on instances), or None.
    """

    loss: torch.Tensor
    penalties: dict[str, torch.Tensor]
    aux_loss: torch.Tensor | None

    def total(self, cases: int) -> torch.Tensor:
        """The scalar to be minimised, as this batch's part of a step of ``cases`` cases."""
        each = self.loss
        for penalty in self.penalties.values():
            each = each + penalty
        total = each.sum() / cases
        return total if self.aux_loss is None else total + self.aux_loss * (len(self.loss) / cases)


class Objective:
    """The loss with class weights and smoothing, and the penalties with their weights.

    Args:
        train: Resolved (`heads.config.resolved`).
        head: Whose levels the penalties may act on, and whose own loss is added in training.
        weights: (C,) class weights, or None.

    Raises:
        ConfigError: A penalty does not suit the head, or there is no such loss.
    """

    def __init__(self, train: TrainConfig, head: Head, weights: torch.Tensor | None) -> None:
        self._train, self._head, self._weights = train, head, weights
        self._loss = get_loss(train.loss)
        self._smoothing = 0.0 if train.label_smoothing == "auto" else train.label_smoothing

        def by_level(name: str) -> dict[str, float]:
            value = getattr(train, name)
            value = 0.0 if value == "auto" else value
            if isinstance(value, float) and value > 0 and not head.levels:
                raise _unsuited(f"train.{name}", "attention")
            return weights_by_level(value, head.levels, f"train.{name}", train.reg_level_decay)

        self._entropy = by_level("reg_weight_entropy")
        self._l1, self._l2 = by_level("reg_weight_l1"), by_level("reg_weight_l2")
        confidence = train.reg_weight_confidence
        self._confidence = 0.0 if confidence == "auto" else confidence
        if self._confidence and not head.scores_instances:
            raise _unsuited("train.reg_weight_confidence", "instance scores")

    def __call__(self, output: HeadOutput, batch: BagBatch, epoch: int = 0) -> Terms:
        """The objective of a batch.

        Args:
            output: What the head said.
            batch: What it was asked, with labels.
            epoch: From 0, for weights that decay.
        """
        if batch.labels is None:
            raise ValueError("a batch without labels has no loss")
        loss = self._case_loss(output.logits, batch.labels)
        decay = self._train.reg_epoch_decay**epoch
        penalties = {name: value * decay for name, value in self._penalties(output, batch).items() if decay}
        return Terms(loss, penalties, self._aux_loss(output, batch.labels))

    def _case_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(b,) class-weighted loss of (b, C) logits."""
        loss = self._loss(logits, labels, self._smoothing)
        if loss.shape != labels.shape:
            raise ConfigError(
                f"the loss {self._train.loss!r} gives a tensor of shape {tuple(loss.shape)}",
                expected=f"one value a case: {tuple(labels.shape)}",
                where="train.loss",
                fix="return the loss of every case, not their mean",
            )
        return self._by_class(loss, labels)

    def _by_class(self, loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss if self._weights is None else loss * self._weights[labels]

    def _aux_loss(self, output: HeadOutput, labels: torch.Tensor) -> torch.Tensor | None:
        parts = [] if output.aux_loss is None else [output.aux_loss]
        if output.aux_logits is not None:
            parts.append(self._case_loss(output.aux_logits, labels).mean())
        # Without a gradient nothing is learned, and a head that is evaluated gets no labels.
        if output.logits.requires_grad:
            own = self._head.auxiliary_loss(output, labels)
            if own is not None:
                parts.append(self._by_class(own, labels).mean())
        return sum(parts[1:], start=parts[0]) if parts else None

    def _penalties(self, output: HeadOutput, batch: BagBatch) -> dict[str, torch.Tensor]:
        train, found = self._train, dict[str, torch.Tensor]()

        def add(name: str, value: torch.Tensor) -> None:
            found[name] = found[name] + value if name in found else value

        for level, attention in output.attention.items():
            if level not in self._entropy:
                continue
            cases = _case_offsets(level, batch, flat="slice" not in output.attention)
            if weight := self._entropy[level]:
                value = entropy_penalty(
                    attention,
                    cases,
                    train.reg_entropy_form,
                    train.reg_entropy_mode,
                    train.reg_entropy_normalize,
                )
                add("entropy_penalty", weight * value)
            if self._l1[level] or self._l2[level]:
                add(
                    "elastic_net_penalty",
                    elastic_net_penalty(attention, cases, self._l1[level], self._l2[level]),
                )
        if self._confidence and output.instance_scores is not None:
            one_each = torch.arange(len(batch) + 1, device=output.logits.device)
            value = confidence_penalty(
                output.instance_scores, batch.case_patch_offsets, one_each, train.reg_confidence_target
            )
            add("confidence_penalty", self._confidence * value)
        return found


def make_class_weights(
    train: TrainConfig, labels: Sequence[int], class_names: Sequence[str]
) -> torch.Tensor | None:
    """(C,) weights of the loss, or None where none are used.

    Args:
        train: ``use_class_weights`` and ``class_weights``.
        labels: Of the training cases.
        class_names: In config order.

    Raises:
        ConfigError: Not one weight a class, or fewer than two of them count; or a class to be balanced
            has no training case, or is balanced by ``case_sampling`` already.
    """
    if not train.use_class_weights:
        return None
    given = train.class_weights
    if isinstance(given, str):
        if train.case_sampling == "balanced":
            raise ConfigError(
                "the classes are balanced twice: by train.case_sampling and by train.class_weights",
                expected="one of them, or weights of your own beside balanced sampling",
                where="train.class_weights, train.case_sampling",
                fix="leave out --use-class-weights, or --case-sampling all",
            )
        return class_weights(labels, class_names)
    if isinstance(given, Mapping):
        known = set(given) == set(class_names)
        given = [given[name] for name in class_names] if known else []
    if len(given) != len(class_names):
        raise ConfigError(
            f"train.class_weights is {train.class_weights}",
            expected=f"balanced, or a weight for each of {', '.join(class_names)}",
            where="train.class_weights",
            fix="give one weight a class, in the order of `classes`, or by name",
        )
    counted = {class_names[label] for label in labels if given[label] > 0}
    if len(counted) < 2:
        only = f"{counted.pop()} alone" if counted else "no class"
        raise ConfigError(
            f"by train.class_weights {only} counts in training",
            expected="a weight above 0 for two classes or more that have training cases",
            where="train.class_weights",
            fix="--class-weights balanced, or leave out --use-class-weights",
        )
    return torch.tensor(given)


def _case_offsets(level: str, batch: BagBatch, flat: bool) -> torch.Tensor:
    """(B + 1,) offsets of a case's segments in a level."""
    if flat:  # one segment a case
        return torch.arange(len(batch) + 1, device=batch.case_offsets.device)
    if level == "patch":
        return segments_of_cases(batch.stain_offsets, batch.case_offsets)
    if level == "slice":
        return segments_of_cases(batch.case_offsets)
    return torch.arange(len(batch) + 1, device=batch.case_offsets.device)


def _unsuited(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"{name} is set, but this head has no {what}",
        expected="0, or another head",
        where=name,
        fix=f"--set {name}=0",
    )
