"""Probing of `Hierarchical`: three pools, one above the other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from featstore.bags import BagBatch
from heads.inspect.leave_out import Pooled, Probe, Rest
from heads.models.attention_pool import AttentionPool
from heads.models.hierarchical import Hierarchical
from heads.models.outputs import Attention, HeadOutput
from heads.models.pooling import segment_products, segment_runs
from heads.models.transformer import TransformerPool, attention_of_heads

_BLOCK = 8192  # patches at once: of what the layers make of them nothing is kept


@dataclass(frozen=True)
class _Level:
    """One of the three: its layers, and what it made of the case."""

    pool: Any
    pooled: Pooled

    def attention(self) -> Attention:
        """As the pool itself reports it."""
        p = self.pooled
        if p.logits.shape[1] == 1:
            return Attention(p.weights[:, 0], p.logits[:, 0], p.offsets)
        return attention_of_heads(p.logits, p.offsets)[1]

    def finish(self, sums: torch.Tensor) -> torch.Tensor:
        """(R, E) embeddings of (R, K, F) sums, or (R, E)."""
        found: torch.Tensor = self.pool.finish(sums.flatten(1))
        return found

    def pulled(self, each: torch.Tensor) -> torch.Tensor:
        """(…, C, E), linear in the embeddings, as what it is of the sums; of `MultiHeadPool`."""
        found: torch.Tensor = each @ self.pool.output.weight
        return found

    def shared(self, each: torch.Tensor) -> torch.Tensor:
        """(G, C, E) of the sums as (M, C, E) of the members' values, each with its weight."""
        p = self.pooled
        heads = each.view(*each.shape[:2], p.weights.shape[1], -1)[p.index]
        return (heads * p.weights[:, None, :, None]).flatten(2)


def _weigh(pool: Any, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, K) and values (R, K, F) of any (R, E) members."""
    logits, values = pool.weigh(members)
    return logits, values.view(*logits.shape, -1)


def probe_hierarchical(head: Hierarchical, batch: BagBatch, leave_out: bool) -> Probe:
    """`heads.inspect.probing.probe`.

    The forward pass is done here, pool by pool, for what lies between its layers: the patches go
    through the projector and the pool's hidden layer once.
    """
    members = head.embed(batch)
    offsets = (batch.slice_offsets, batch.stain_offsets, batch.case_offsets)
    levels: list[_Level] = []
    attention: dict[str, Attention] = {}
    for (name, pool), own in zip(head.pools.items(), offsets, strict=True):
        level = _Level(pool, Pooled(*_weigh(pool, members), own))
        levels.append(level)
        attention[name] = level.attention()
        members = level.finish(level.pooled.sums)
    output = HeadOutput(head.classifier(members), attention)
    of_patches = _nonlinear if isinstance(levels[0].pool, TransformerPool) else _linear
    alone, in_place = of_patches(head.classifier, output.logits, levels)
    probe = Probe(output, alone, in_place)
    if not leave_out:
        return probe
    patch, a_slice, stain = (_without(head.classifier, levels[i:]) for i in range(3))
    return replace(probe, without_patch=patch, without_slice=a_slice, without_stain=stain)


def _without(classifier: nn.Module, levels: list[_Level]) -> torch.Tensor:
    """(M, C): the case without each of the M members of the first of these levels.

    A slice without one patch has another embedding, and therefore another logit in its stain; that
    has another embedding and logit in its case. All others are what they were. A slice that had
    this patch alone is gone, and so may its stain be.
    """
    first, found = levels[0].pooled, []
    for rows in torch.split(torch.arange(len(first.index)), _BLOCK):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        rest, member = Rest(first.rest.mass[block], first.rest.sums[block]), first.index[block]
        for below, level in itertools.pairwise(levels):
            logits, values = _weigh(level.pool, below.finish(rest.sums))
            rest = level.pooled.replaced(member, logits, values, rest.gone)
            member = level.pooled.index[member]
        said = classifier(levels[-1].finish(rest.sums))
        found.append(said.masked_fill_(rest.gone[:, None], torch.nan))
    return torch.cat(found)


def _linear(
    classifier: nn.Linear, logits: torch.Tensor, levels: list[_Level]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`alone` and `in_place` with pools that are linear in what they sum up, at fixed weights.

    The logits are then linear in h: instead of all patches through the layers above, the classifier is
    pulled down through these, for ``alone`` once, for ``in_place`` once a slice: with G_s (C, E) the
    logits are those of the case plus G_s (h_j − Σ a h). With `AttentionPool`, which has no layers behind
    it, G_s is the classifier times the weights of slice and stain.
    """
    patches = levels[0].pooled
    h = patches.values.flatten(1)
    case = levels[2].pooled.index[levels[1].pooled.index]
    if isinstance(levels[0].pool, AttentionPool):
        said = h @ classifier.weight.T
        share = levels[2].pooled.weights[levels[1].pooled.index] * levels[1].pooled.weights
        base = logits[case] - share * (patches.sums[:, 0] @ classifier.weight.T)
        return said + classifier.bias, torch.addcmul(base[patches.index], share[patches.index], said)
    one, each = classifier.weight[None], classifier.weight.expand(len(logits), -1, -1)
    zero = torch.zeros_like(h[:1])
    for level in reversed(levels):
        one, each = level.pulled(one), level.pulled(each)
        if level is not levels[0]:
            each = level.shared(each)
    for level in levels:
        zero = level.finish(zero)
    base = logits[case] - (each @ patches.sums.flatten(1)[:, :, None])[:, :, 0]
    alone = torch.addmm(classifier(zero), h, one[0].T)
    return alone, _products(h, each, patches.offsets).add_(base[patches.index])


def _products(values: torch.Tensor, each: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(N, C): every row of (N, E) times its segment's of (G, C, E)."""
    if values.device.type != "cpu":
        return segment_products(values, each, offsets)
    return torch.cat([run.products(each, values) for run in segment_runs(offsets, len(values))])


def _nonlinear(
    classifier: nn.Module, logits: torch.Tensor, levels: list[_Level]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`alone` and `in_place` with transformer pools: every patch through the layers of all levels.

    Norms and MLPs are not linear: with leaving out, eight maps of embeddings to embeddings a patch.
    """
    patches, said = levels[0].pooled, []
    for values, member in zip(
        torch.split(patches.values, _BLOCK), torch.split(patches.index, _BLOCK), strict=True
    ):
        alone = in_place = levels[0].finish(values)
        for level in levels[1:]:
            p = level.pooled
            _, changed = _weigh(level.pool, in_place)
            single = changed if in_place is alone else _weigh(level.pool, alone)[1]
            alone = level.finish(single)
            changed = changed - p.values[member]
            sums = p.sums[p.index[member]].addcmul_(p.weights[member][:, :, None], changed)
            in_place, member = level.finish(sums), p.index[member]
        said.append((classifier(alone), classifier(in_place)))
    alone, in_place = (torch.cat(each) for each in zip(*said, strict=True))
    return alone, in_place
