"""The simplest heads: the mean or the maximum over the patches of a case."""

from __future__ import annotations

import torch

from featstore.bags import BagBatch
from heads.models.config import ProjectorConfig
from heads.models.dropout import Dropout
from heads.models.head import Float32Linear, ProjectedHead, register_head
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_max, weighted_sum


@register_head("mean", ProjectorConfig)
class Mean(ProjectedHead):
    """Logits = W' Dropout(Σ h / N) over the N patches of a case, h = Dropout(ReLU(W x + b)).

    It has no attention: every patch has the same share, and a table of equal shares would rank
    patches that cannot be ranked.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Width and dropouts.
    """

    def __init__(self, dim: int, classes: int, config: ProjectorConfig) -> None:
        super().__init__(dim, config)
        self.classifier_dropout = Dropout(config.rate(config.classifier_dropout))
        self.classifier = Float32Linear(config.embed_dim, classes)

    def classify(self, members: torch.Tensor, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify embedded patches.

        Args:
            members: (ΣP, E).
            batch: B cases.
            schedule: Not used.

        Returns:
            Logits (B, C), no attention.
        """
        pooled = self.pool(members, batch.case_patch_offsets)
        return HeadOutput(self.classifier(self.classifier_dropout(pooled)))

    def pool(self, members: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """(B, E) embeddings of the cases, from (ΣP, E) of their patches."""
        total = weighted_sum(members.new_ones(len(members)), members, offsets)
        return total / offsets.diff()[:, None]


@register_head("max", ProjectorConfig)
class Max(Mean):
    """`Mean` with the maximum of every feature of h, each over all patches of the case.

    One patch rarely gives them all, so that there is no attention either.
    """

    def pool(self, members: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """(B, E) embeddings of the cases, from (ΣP, E) of their patches."""
        return segment_max(members, offsets)
