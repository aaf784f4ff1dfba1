"""Dual-stream MIL with soft critical selection: what stands out, and its context."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from featstore.bags import BagBatch
from featstore.errors import ConfigError
from heads.models.config import DualStreamConfig
from heads.models.dropout import Dropout
from heads.models.head import Float32Linear, Head, register_head
from heads.models.outputs import Attention, HeadOutput
from heads.models.pooling import segment_index, segment_softmax, weighted_sum, wide
from heads.models.projection import project


@register_head("dual_stream", DualStreamConfig)
class DualStream(Head):
    """Stream 1 selects softly what is critical, stream 2 gathers its context.

    h = Dropout(ReLU(W x + b)), or x. Stream 1: an unbounded score s per instance (an MLP without
    a sigmoid: a bounded score could never reach the confidence target), selection
    σ = softmax(s / T), critical feature c = Σ σ h. Stream 2: a = softmax(e), context Σ a h, with e by
    ``attention_type``: ``gated`` (Wq c · Wk h / √d) × sigmoid(w · Wk h); ``cosine`` cos(c, h);
    ``dsmil`` Wq c · Wk h / √d; ``abmil`` w · (tanh(V h) × sigmoid(U h)).

    Source: Li, Li and Eliceiri 2021 (DSMIL, arXiv 2011.08939), with their arg max replaced by a
    softmax of falling temperature; Ilse et al. 2018 for ``abmil``.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths, kinds and dropout.
    """

    levels = ("patch",)
    scores_instances = True

    def __init__(self, dim: int, classes: int, config: DualStreamConfig) -> None:
        super().__init__(dim)
        if config.temperature_start < config.temperature_end:
            raise ConfigError(
                f"head.temperature_start is {config.temperature_start:g}, below temperature_end, "
                f"{config.temperature_end:g}",
                expected="a selection that gets sharper: a start at the end or above it",
                where="head.temperature_start, head.temperature_end",
                fix=f"--temperature-start {10 * config.temperature_end:g}",
            )
        self.config = config
        width, inner = (config.hidden_dim if config.use_hidden_layer else dim), config.attention_dim
        self.kind = config.attention_type
        self.hidden = nn.Linear(dim, width) if config.use_hidden_layer else None
        self.projects_all = self.hidden is not None
        self.dropout = Dropout(config.dropout)
        self.score = nn.Sequential(
            nn.Linear(width, inner), nn.ReLU(), Dropout(config.dropout), Float32Linear(inner, 1)
        )
        if self.kind in ("gated", "dsmil"):
            self.query, self.key = nn.Linear(width, inner), nn.Linear(width, inner)
        if self.kind == "gated":
            self.gate: nn.Linear = Float32Linear(inner, 1)
        if self.kind == "abmil":
            self.value, self.gate = nn.Linear(width, inner), nn.Linear(width, inner)
            self.weight = Float32Linear(inner, 1)
        self.fusion = _FUSIONS[config.fusion_method](width)
        self.classifier = Float32Linear(2 * width if config.fusion_method == "concat" else width, classes)

    def embed(self, batch: BagBatch) -> torch.Tensor:
        """(ΣP, hidden_dim, or D) h of every patch."""
        if self.hidden is None:
            found: torch.Tensor = self.dropout(self.standardize(batch.features))
            return found
        standardize, given = self.standardize, batch.standardized
        return project(batch.features, standardize, self.hidden, self.dropout, given)

    def forward(self, batch: BagBatch, temperature: float = 1.0, **schedule: float) -> HeadOutput:
        """`classify` of a batch's patches, embedded."""
        return self.classify(self.embed(batch), batch, temperature, **schedule)

    def classify(
        self, instances: torch.Tensor, batch: BagBatch, temperature: float = 1.0, **schedule: float
    ) -> HeadOutput:
        """Classify embedded patches.

        Args:
            instances: (ΣP, hidden_dim, or D).
            batch: B cases; its features are not read.
            temperature: T > 0 of the selection; the lower, the sharper.
            schedule: Not used.

        Returns:
            Logits (B, C); attention ``selection`` (stream 1) and ``patch`` (stream 2) over the patches
            of each case; instance scores (ΣP,).
        """
        offsets = batch.case_patch_offsets
        scores = self.score(instances).squeeze(-1)
        selection = segment_softmax(scores / temperature, offsets)
        critical = weighted_sum(selection, instances, offsets)
        logits = self._attention_logits(instances, critical, offsets)
        weights = segment_softmax(logits, offsets)
        context = weighted_sum(weights, instances, offsets)
        return HeadOutput(
            logits=self.classifier(self.dropout(self.fusion(critical, context))),
            attention={
                "selection": Attention(selection, scores / temperature, offsets),
                "patch": Attention(weights, logits, offsets),
            },
            instance_scores=scores,
        )

    def schedule(self, epoch: int, epochs: int) -> dict[str, float]:
        """The selection's temperature in an epoch (from 0) of a training."""
        c = self.config
        kind = c.temperature_schedule
        return {"temperature": temperature_at(epoch, epochs, c.temperature_start, c.temperature_end, kind)}

    def _attention_logits(
        self, instances: torch.Tensor, critical: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """(ΣP,) logits of stream 2."""
        if self.kind == "abmil":
            hidden = torch.tanh(self.value(instances)) * torch.sigmoid(self.gate(instances))
            logits: torch.Tensor = self.weight(hidden).squeeze(-1)
            return logits
        case = segment_index(offsets, len(instances))
        if self.kind == "cosine":
            return nn.functional.cosine_similarity(wide(instances), wide(critical)[case], dim=-1)
        keys = wide(self.key(instances))
        product: torch.Tensor = (keys * wide(self.query(critical))[case]).sum(-1)
        product = product / math.sqrt(keys.shape[-1])
        if self.kind == "dsmil":
            return product
        return product * torch.sigmoid(self.gate(keys).squeeze(-1))


class _Concat(nn.Module):
    """Both features, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, critical: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return torch.cat((critical, context), dim=-1)


class _Weighted(nn.Module):
    """α · critical + (1 − α) · context with one learned α = sigmoid(θ), 0.5 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.balance = nn.Parameter(torch.zeros(()))

    def forward(self, critical: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        alpha = torch.sigmoid(self.balance)
        mixed: torch.Tensor = alpha * critical + (1 - alpha) * context
        return mixed


class _CrossAttention(nn.Module):
    """The critical feature asks, critical feature and context answer; the answer is added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, critical: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        streams = torch.stack((critical, context), dim=1)
        answer, _ = self.attention(critical[:, None], streams, streams, need_weights=False)
        added: torch.Tensor = critical + answer[:, 0]
        return added


_FUSIONS: dict[str, Callable[[int], nn.Module]] = {
    "concat": _Concat,
    "weighted": _Weighted,
    "cross_attn": _CrossAttention,
}


def temperature_at(epoch: int, epochs: int, start: float, end: float, kind: str = "linear") -> float:
    """The selection's temperature in an epoch (from 0) of a training of ``epochs``.

    With t = epoch / (epochs − 1): ``linear`` start + (end − start)·t; ``cosine``
    end + (start − end)·(1 + cos πt)/2; ``exponential`` start·(end/start)^t. Never below the end;
    with one epoch it is the end.
    """
    if epochs <= 1 or epoch >= epochs - 1:
        return end
    t = epoch / (epochs - 1)
    values: dict[str, float] = {
        "linear": start + (end - start) * t,
        "cosine": end + (start - end) * (1 + math.cos(math.pi * t)) / 2,
        "exponential": start * (end / start) ** t,
    }
    return max(values[kind], end)
