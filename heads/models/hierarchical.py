"""Hierarchical attention MIL: patches → slice, slices → stain, stains → case."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from featstore.bags import BagBatch
from featstore.config import Section
from heads.models.outputs import Attention, HeadOutput
from heads.models.pooling import AttentionPool, Standardize


class HierarchicalConfig(Section):
    """The hierarchical head."""

    embed_dim: int = Field(512, ge=1, description="width of the projected embeddings")
    attention_hidden: int = Field(128, ge=1, description="width of the attention's hidden layer")
    attention_pool: Literal["tanh", "gated"] = Field("tanh", description="tanh | gated")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout wherever none is set apart")
    projector_dropout: float | None = Field(None, ge=0, lt=1, description="after the projector")
    attention_dropout: float | None = Field(None, ge=0, lt=1, description="inside the attention pools")
    classifier_dropout: float | None = Field(None, ge=0, lt=1, description="before the classifier")


class Hierarchical(nn.Module):
    """Three attention pools of one architecture, one above the other, and a linear classifier.

    h = Dropout(ReLU(W x + b)) of each patch x; then three times, over the members of every
    slice, stain and case: a = softmax(w · tanh(V h)), z = Σ a h. Logits = W' Dropout(z_case).

    Source: attention pooling of Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), stacked.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths and dropouts.
    """

    def __init__(self, dim: int, classes: int, config: HierarchicalConfig) -> None:
        super().__init__()

        def rate(own: float | None) -> float:
            return config.dropout if own is None else own

        def pool() -> AttentionPool:
            return AttentionPool(
                config.embed_dim,
                config.attention_hidden,
                rate(config.attention_dropout),
                config.attention_pool,
            )

        self.standardize = Standardize(dim)
        self.projector = nn.Linear(dim, config.embed_dim)
        self.projector_dropout = nn.Dropout(rate(config.projector_dropout))
        self.pools = nn.ModuleDict({level: pool() for level in ("patch", "slice", "stain")})
        self.classifier_dropout = nn.Dropout(rate(config.classifier_dropout))
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
