"""DSMIL: the most suspicious patch of each class, and attention by likeness to it."""

from __future__ import annotations

import math

import torch
from torch import nn

from featstore.bags import BagBatch
from heads.models.config import DsmilConfig
from heads.models.dropout import Dropout
from heads.models.head import Float32Linear, ProjectedHead, register_head
from heads.models.outputs import Attention, HeadOutput
from heads.models.pooling import segment_argmax, segment_products, segment_softmax, weighted_sum, wide
from heads.models.projection import layer_of, scores_of


@register_head("dsmil", DsmilConfig)
class DSMIL(ProjectedHead):
    """An instance stream finds a critical patch a class, a bag stream attends to what is like it.

    h = Dropout(ReLU(W x + b)). Stream 1: s = W₀ h (C scores a patch); the critical patch of class c
    is m_c = arg max s_c over the case. Stream 2: q = W_q h, v = W_v h; a_c = softmax(q · q_{m_c} / √d)
    over the case, z_c = Σ a_c v. Logits = W' Dropout(z_1 … z_C): each from the embeddings of all
    classes, as a convolution over classes with a kernel of their width gives it. Learned from both
    streams: CE(logits) + CE(max s), which is twice the paper's mean.

    Source: Li, Li and Eliceiri 2021 (arXiv 2011.08939); dividing by √d and
    predicting from stream 2 alone are from the authors' code, where the paper averages the two
    streams. Classes exclude one another here (cross-entropy), where theirs are independent.
    torchmil's DSMIL has one score, one class and v = h.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths and dropouts.
    """

    levels = ("patch",)
    scores_instances = True

    def __init__(self, dim: int, classes: int, config: DsmilConfig) -> None:
        super().__init__(dim, config)
        width = config.embed_dim
        self.score = nn.Linear(width, classes)
        self.query, self.value = nn.Linear(width, config.attention_dim), Float32Linear(width, width)
        self.classifier_dropout = Dropout(config.rate(config.classifier_dropout))
        self.classifier = Float32Linear(classes * width, classes)

    def classify(self, members: torch.Tensor, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify embedded patches.

        Args:
            members: (ΣP, E).
            batch: B cases.
            schedule: Not used.

        Returns:
            Logits (B, C), attention ``patch`` (ΣP, C), instance scores (ΣP, C) and, as ``aux_logits``,
            the critical patches' scores (B, C).
        """
        offsets = batch.case_patch_offsets
        full = wide(members)
        scores = scores_of(full, self.score)
        queries = wide(layer_of(members, self.query.weight, self.query.bias))
        critical = segment_argmax(scores, offsets)
        logits = segment_products(queries, queries[critical], offsets) / math.sqrt(queries.shape[1])
        weights = segment_softmax(logits, offsets)
        # Values are linear, and attention sums to 1: C sums of patches need be projected, not all patches.
        embeddings = self.value(weighted_sum(weights, full, offsets))
        return HeadOutput(
            logits=self.classifier(self.classifier_dropout(embeddings.flatten(1))),
            attention={"patch": Attention(weights, logits, offsets)},
            instance_scores=scores,
            aux_logits=scores.gather(0, critical),
        )
