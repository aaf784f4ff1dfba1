"""Hierarchical attention MIL: patches → slice, slices → stain, stains → case."""

from __future__ import annotations

import torch
from torch import nn

from featstore.bags import BagBatch
from heads.config import HierarchicalConfig
from heads.models.dropout import Dropout
from heads.models.head import Head, register_head
from heads.models.outputs import Attention, HeadOutput
from heads.models.pooling import AttentionPool


@register_head("hierarchical", HierarchicalConfig)
class Hierarchical(Head):
    """Three attention pools of one architecture, one above the other, and a linear classifier.

    h = Dropout(ReLU(W x + b)) of each patch x; then three times, over the members of every
    slice, stain and case: a = softmax(w · tanh(V h)), z = Σ a h. Logits = W' Dropout(z_case).

    Source: attention pooling of Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), stacked.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths and dropouts.
    """

    levels = ("patch", "slice", "stain")

    def __init__(self, dim: int, classes: int, config: HierarchicalConfig) -> None:
        super().__init__(dim)

        def rate(own: float | None) -> float:
            return config.dropout if own is None else own

        def pool() -> AttentionPool:
            return AttentionPool(
                config.embed_dim,
                config.attention_hidden,
                rate(config.attention_dropout),
                config.attention_pool,
            )

        self.projector = nn.Linear(dim, config.embed_dim)
        self.projector_dropout = Dropout(rate(config.projector_dropout))
        self.pools = nn.ModuleDict({level: pool() for level in ("patch", "slice", "stain")})
        self.classifier_dropout = Dropout(rate(config.classifier_dropout))
        self.classifier = nn.Linear(config.embed_dim, classes)

    def forward(self, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify a batch.

        Args:
            batch: B cases.
            schedule: Not used.

        Returns:
            Logits (B, C) and attention of the levels ``patch``, ``slice`` and ``stain``.
        """
        members = torch.relu(self.standardize.project(batch.features, self.projector))
        members = self.projector_dropout(members)
        attention: dict[str, Attention] = {}
        offsets = {
            "patch": batch.slice_offsets,
            "slice": batch.stain_offsets,
            "stain": batch.case_offsets,
        }
        for level, pool in self.pools.items():
            members, attention[level] = pool(members, offsets[level])
        return HeadOutput(self.classifier(self.classifier_dropout(members)), attention)
