"""CLAM's single branch: gated attention, which an instance loss on its extremes refines."""

from __future__ import annotations

import torch
from torch import nn

from featstore.bags import BagBatch
from heads.models.abmil import GatedABMIL
from heads.models.config import ClamConfig
from heads.models.head import register_head
from heads.models.outputs import Attention, HeadOutput
from heads.models.pooling import segment_index, segment_rank, segment_sum, wide
from heads.models.projection import scores_of


@register_head("clam_sb", ClamConfig)
class ClamSB(GatedABMIL):
    """`GatedABMIL` that in training takes what it attends to most and least for labelled patches.

    Each class c has a classifier of patches, of two logits; s_c = their difference, the log-odds that
    a patch is evidence for c. In a case of class y, the k patches of the highest attention are taken
    as evidence for y, the k of the lowest as none: ℓ = mean of log(1 + exp(∓s_y)) over the 2k. With
    ``subtyping``, the k most attended are no evidence for any other class either: ℓ = (ℓ + Σ_{c≠y}
    mean of log(1 + exp(s_c)) over the k) / C. k = ``k_sample``, or half of a smaller bag; a bag of one
    patch has no ℓ. Minimised is CE + (1 − w) / w · ℓ with w = ``bag_weight``: the paper's
    w · CE + (1 − w) · ℓ, divided by w so that penalties weigh what they do in other heads.

    Source: Lu et al. 2021 (Nature Biomedical Engineering 5, arXiv 2004.09666). Their ℓ is a smooth
    top-1 SVM loss; here it is the cross-entropy, ``--inst_loss ce`` in their code. Theirs fails on
    bags smaller than k. torchmil adds up the classes that the authors' code averages, and has two.

    Args:
        dim: D, the number of features.
        classes: C.
        config: Widths, dropouts and the instance loss.
    """

    scores_instances = True

    def __init__(self, dim: int, classes: int, config: ClamConfig) -> None:
        super().__init__(dim, classes, config)
        self.config = config
        self.instance_classifiers = nn.Linear(config.embed_dim, 2 * classes)

    def classify(self, members: torch.Tensor, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify embedded patches.

        Args:
            members: (ΣP, E).
            batch: B cases.
            schedule: Not used.

        Returns:
            Logits (B, C), attention ``patch`` over the patches of each case, instance scores (ΣP, C).
        """
        pooled, attention = self.pool(members, batch.case_patch_offsets)
        no, yes = scores_of(wide(members), self.instance_classifiers).chunk(2, dim=1)
        logits = self.classifier(self.classifier_dropout(pooled))
        return HeadOutput(logits, {"patch": attention}, instance_scores=yes - no)

    def auxiliary_loss(self, output: HeadOutput, labels: torch.Tensor) -> torch.Tensor | None:
        """(1 − w) / w · ℓ of every case."""
        assert output.instance_scores is not None
        loss = instance_loss(
            output.attention["patch"],
            output.instance_scores,
            labels,
            self.config.k_sample,
            self.config.subtyping,
        )
        return (1 - self.config.bag_weight) / self.config.bag_weight * loss


def instance_loss(
    attention: Attention, scores: torch.Tensor, labels: torch.Tensor, k_sample: int, subtyping: bool
) -> torch.Tensor:
    """ℓ of `ClamSB`.

    Args:
        attention: (N,) over B cases.
        scores: (N, C) log-odds.
        labels: (B,) int64.
        k_sample: The largest k.
        subtyping: Whether the other classes count.

    Returns:
        (B,), 0 for a bag of one.
    """
    offsets = attention.offsets
    sizes = offsets.diff()
    case = segment_index(offsets, len(scores))
    k = (sizes // 2).clamp_max(k_sample)
    rank = segment_rank(attention.logits.detach(), offsets)
    most, least = rank < k[case], rank >= (sizes - k)[case]

    def mean(losses: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Over the k members of each case that are chosen; 0 where k is 0."""
        kept = torch.where(chosen if losses.ndim == 1 else chosen[:, None], losses, 0.0)
        count = k.clamp_min(1)
        return segment_sum(kept, offsets) / (count if losses.ndim == 1 else count[:, None])

    for_it, against = nn.functional.softplus(-scores), nn.functional.softplus(scores)
    true = labels[case][:, None]
    loss = (mean(for_it.gather(1, true)[:, 0], most) + mean(against.gather(1, true)[:, 0], least)) / 2
    if not subtyping:
        return loss
    others = mean(against, most)
    rest = others.sum(1) - others.gather(1, labels[:, None])[:, 0]
    return (loss + rest) / scores.shape[1]
