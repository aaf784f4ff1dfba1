"""Probing of `DualStream`: what stands out, and a context that is asked by it."""

from __future__ import annotations

import math

import torch
from torch import nn

from featstore.bags import BagBatch
from heads.inspect.leave_out import FlatPool, Probe
from heads.inspect.leave_out_conditioned import conditioned_sums
from heads.inspect.leave_out_flat import with_rests
from heads.models.dual_stream import DualStream
from heads.models.pooling import segment_index, segment_products, wide

_EPS = 1e-8  # of torch's cosine similarity


class _LinearFusion:
    """``concat`` and ``weighted``: logits = W₁ c + W₂ x + b of the critical feature c and the context x.

    C numbers a patch are all that a stream has to pool.
    """

    def __init__(self, head: DualStream) -> None:
        weight = head.classifier.weight
        if head.config.fusion_method == "concat":
            critical, context = weight.chunk(2, dim=1)
        else:
            alpha = torch.sigmoid(dict(head.fusion.named_parameters())["balance"])
            critical, context = alpha * weight, (1 - alpha) * weight
        self._critical, self._context = critical.T, context.T
        self._bias: torch.Tensor = head.classifier.bias

    def critical(self, h: torch.Tensor) -> torch.Tensor:
        """(ΣP, F₁) what stream 1 has to pool, of (ΣP, E)."""
        return h @ self._critical

    def context(self, h: torch.Tensor, pooled: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """(ΣP, F₂) what stream 2 has to pool where stream 1 is (B, F₁) ``pooled``."""
        return h @ self._context

    def more(self, h: torch.Tensor) -> torch.Tensor:
        """(ΣP, F₃) what it has to pool besides where stream 1 changes, though not as closely."""
        return h[:, :0]

    def alone(self, h: torch.Tensor) -> torch.Tensor:
        """(ΣP, C) logits where each is both c and x."""
        return torch.addmm(self._bias, h, self._critical + self._context)

    def kept(self, pooled: torch.Tensor, context: torch.Tensor, case: torch.Tensor) -> torch.Tensor:
        """(R, C) logits of (R, F₂) contexts beside what stream 1 pooled of each one's case."""
        return pooled[case] + context + self._bias

    def changed(
        self, critical: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor, case: torch.Tensor
    ) -> torch.Tensor:
        """(R, C) logits of (R, F₁) and (R, F₂ + F₃) sums that have both changed."""
        return critical + context + self._bias


class _CrossFusion(_LinearFusion):
    """``cross_attn``: logits = W (c + O (p V c + (1 − p) V x)) + b, p = sigmoid(q(c) · K (c − x) / √E).

    A softmax over two is a sigmoid; K's bias adds the same to both of its logits. With
    r(c) = Kᵀ q(c) / √E, all that is wanted of x is W O V x and r(c) · x. Where c becomes c', the latter is
    r(c) · x' + (r(c') − r(c)) · x', in which the second is small: for it, x' itself is pooled.
    """

    def __init__(self, head: DualStream) -> None:
        of, weight = dict(head.fusion.named_parameters()), head.classifier.weight
        query, key, value = of["attention.in_proj_weight"].chunk(3)
        query_bias, _, value_bias = of["attention.in_proj_bias"].chunk(3)
        scale = len(key) ** -0.5
        self._asking, self._asking_bias = scale * query.T @ key, scale * query_bias @ key
        self._weight, through = weight.T, weight @ of["attention.out_proj.weight"]
        self._answer = (through @ value).T
        self._bias = head.classifier.bias + weight @ of["attention.out_proj.bias"] + through @ value_bias

    def critical(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def context(self, h: torch.Tensor, pooled: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        asked = segment_products(h, self._asked(pooled)[:, None], offsets)
        return torch.cat((h @ self._answer, asked), 1)

    def more(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def alone(self, h: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self._bias, h, self._weight + self._answer)

    def kept(self, pooled: torch.Tensor, context: torch.Tensor, case: torch.Tensor) -> torch.Tensor:
        own = (self._asked(pooled) * pooled).sum(1)
        said = torch.addmm(self._bias, pooled, self._weight)
        return self._said(said[case], (pooled @ self._answer)[case], own[case], context)

    def changed(
        self, critical: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor, case: torch.Tensor
    ) -> torch.Tensor:
        classes = self._answer.shape[1]
        asked = self._asked(critical)
        own = (asked * critical).sum(1)
        asked.sub_(self._asked(pooled)[case])
        more = (asked * context[:, classes + 1 :]).sum(1, keepdim=True)
        context = torch.cat((context[:, :classes], context[:, classes : classes + 1] + more), 1)
        said = torch.addmm(self._bias, critical, self._weight)
        return self._said(said, critical @ self._answer, own, context)

    def _asked(self, critical: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self._asking_bias, critical, self._asking)

    def _said(
        self, said: torch.Tensor, answer: torch.Tensor, own: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        p = torch.sigmoid(own - context[:, -1])[:, None]
        return said + p * answer + (1 - p) * context[:, :-1]


def probe_dual_stream(head: DualStream, batch: BagBatch, leave_out: bool, **schedule: float) -> Probe:
    """Stream 1 keeps its critical feature `in_place`; both streams lose what is left out."""
    members, patches = head.embed(batch), batch.case_patch_offsets
    output, h = head.classify(members, batch, **schedule), wide(members)
    fusion = (_CrossFusion if head.config.fusion_method == "cross_attn" else _LinearFusion)(head)
    selection, attention = (output.attention[name].logits[:, None] for name in ("selection", "patch"))
    conditioned = head.kind != "abmil"
    critical = fusion.critical(h)
    width = critical.shape[1]
    asked = _asked(head, h) if conditioned and leave_out else h[:, :0]
    first = FlatPool(selection, torch.cat((critical, asked), 1)[:, None], batch)
    pooled = first.patches.sums[:, 0]
    context = fusion.context(h, pooled[:, :width], patches)
    second = FlatPool(attention, context[:, None], batch)
    in_place = fusion.kept(pooled[:, :width], second.in_place()[:, 0], second.patches.index)
    probe = Probe(output, fusion.alone(h), in_place)
    if not leave_out:
        return probe
    values = torch.cat((context, fusion.more(h)), 1)
    rests = [rest.known[:, 0] for rest in first.without()]
    units = (patches, batch.stain_offsets[batch.case_offsets], batch.case_offsets)
    if not conditioned:
        found = [rest.known[:, 0] for rest in FlatPool(attention, values[:, None], batch).without()]
    else:
        each = torch.arange(len(h) + 1, device=h.device)
        starts = (each, batch.slice_offsets, batch.slice_offsets[batch.stain_offsets])
        own = (
            second.patches.weights[:, 0],
            _query(head, pooled[:, width:]),
            _keys(head, h),
            values,
            patches,
        )
        found = [
            conditioned_sums(_query(head, rest[:, width:]), start, unit, *own, fine=context.shape[1])
            for rest, start, unit in zip(rests, starts, units, strict=True)
        ]
    return with_rests(
        probe,
        [
            fusion.changed(rest[:, :width], sums, pooled[:, :width], segment_index(unit, len(rest)))
            for rest, sums, unit in zip(rests, found, units, strict=True)
        ],
    )


def _asked(head: DualStream, h: torch.Tensor) -> torch.Tensor:
    """(ΣP, A) what of each patch makes up the query, linearly."""
    if head.kind == "cosine":
        return h
    asked: torch.Tensor = wide(head.query(h))
    return asked


def _query(head: DualStream, asked: torch.Tensor) -> torch.Tensor:
    """(R, A) the queries, to be multiplied with `_keys` as they are, of pooled `_asked`."""
    if head.kind == "cosine":
        return nn.functional.normalize(asked, eps=_EPS)
    return asked / math.sqrt(asked.shape[1])


def _keys(head: DualStream, h: torch.Tensor) -> torch.Tensor:
    """(ΣP, A) the keys, times their gates, by which stream 2 attends."""
    if head.kind == "cosine":
        return nn.functional.normalize(h, eps=_EPS)
    keys: torch.Tensor = wide(head.key(h))
    return keys * torch.sigmoid(head.gate(keys)) if head.kind == "gated" else keys
