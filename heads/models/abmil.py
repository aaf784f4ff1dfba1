"""Attention-based MIL: one attention pool over all patches of a case."""

from __future__ import annotations

import torch

from featstore.bags import BagBatch
from heads.models.attention_pool import AttentionPool, PoolKind
from heads.models.config import AttentionConfig
from heads.models.dropout import Dropout
from heads.models.head import Float32Linear, ProjectedHead, register_head
from heads.models.outputs import HeadOutput


@register_head("abmil", AttentionConfig)
class ABMIL(ProjectedHead):
    """The pool of `hierarchical`, once over the case, which it takes as one bag.

    h = Dropout(ReLU(W x + b)); a = softmax(w · tanh(V h)) over the case; z = Σ a h.
    Logits = W' Dropout(z).

    Source: Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), equation 8. Their projector is
    a CNN, trained along; ours is a layer on frozen embeddings. V and w have biases here: that of w
    cancels out.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths and dropouts.
    """

    levels = ("patch",)
    kind: PoolKind = "tanh"

    def __init__(self, dim: int, classes: int, config: AttentionConfig) -> None:
        super().__init__(dim, config)
        dropout = config.rate(config.attention_dropout)
        self.pool = AttentionPool(config.embed_dim, config.attention_hidden, dropout, self.kind)
        self.classifier_dropout = Dropout(config.rate(config.classifier_dropout))
        self.classifier = Float32Linear(config.embed_dim, classes)

    def classify(self, members: torch.Tensor, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify embedded patches.

        Args:
            members: (ΣP, E).
            batch: B cases.
            schedule: Not used.

        Returns:
            Logits (B, C) and attention ``patch`` over the patches of each case.
        """
        pooled, attention = self.pool(members, batch.case_patch_offsets)
        return HeadOutput(self.classifier(self.classifier_dropout(pooled)), {"patch": attention})


@register_head("gated_abmil", AttentionConfig)
class GatedABMIL(ABMIL):
    """`ABMIL` with a = softmax(w · (tanh(V h) × sigmoid(U h))).

    Source: Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), equation 9.
    """

    kind = "gated"
