"""Hierarchical attention MIL: patches → slice, slices → stain, stains → case."""

from __future__ import annotations

import torch
from torch import nn

from featstore.bags import BagBatch
from heads.models.attention_pool import AttentionPool
from heads.models.config import HierarchicalConfig
from heads.models.dropout import Dropout
from heads.models.head import Float32Linear, ProjectedHead, register_head
from heads.models.outputs import Attention, HeadOutput
from heads.models.transformer import MultiHeadPool, TransformerPool


@register_head("hierarchical", HierarchicalConfig)
class Hierarchical(ProjectedHead):
    """Three attention pools of one architecture, one above the other, and a linear classifier.

    h = Dropout(ReLU(W x + b)) of each patch x; then three times, over the members of every
    slice, stain and case: a = softmax(w · tanh(V h)), z = Σ a h, or what `AttentionPool`,
    `MultiHeadPool` or `TransformerPool` say. Logits = W' Dropout(z_case).

    Source: attention pooling of Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), stacked.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths and dropouts.

    Raises:
        ConfigError: ``embed_dim`` cannot be divided by the heads of a pool that has several.
    """

    levels = ("patch", "slice", "stain")

    def __init__(self, dim: int, classes: int, config: HierarchicalConfig) -> None:
        super().__init__(dim, config)
        self.pools = nn.ModuleDict({level: make_pool(config) for level in ("patch", "slice", "stain")})
        self.classifier_dropout = Dropout(config.rate(config.classifier_dropout))
        self.classifier = Float32Linear(config.embed_dim, classes)

    def classify(self, members: torch.Tensor, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify embedded patches.

        Args:
            members: (ΣP, E).
            batch: B cases.
            schedule: Not used.

        Returns:
            Logits (B, C) and attention of the levels ``patch``, ``slice`` and ``stain``.
        """
        attention: dict[str, Attention] = {}
        offsets = {
            "patch": batch.slice_offsets,
            "slice": batch.stain_offsets,
            "stain": batch.case_offsets,
        }
        for level, pool in self.pools.items():
            members, attention[level] = pool(members, offsets[level])
        return HeadOutput(self.classifier(self.classifier_dropout(members)), attention)


def make_pool(config: HierarchicalConfig) -> nn.Module:
    """One attention pool of the kind that is chosen: (N, E), (G + 1,) offsets → (G, E), attention."""
    widths = (config.embed_dim, config.attention_hidden, config.rate(config.attention_dropout))
    if config.attention_pool == "multi_head":
        return MultiHeadPool(*widths)
    if config.attention_pool == "transformer":
        return TransformerPool(*widths)
    return AttentionPool(*widths, config.attention_pool)
