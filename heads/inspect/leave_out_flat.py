"""Probing of the heads that take a case as one bag."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from featstore.bags import BagBatch
from heads.inspect.leave_out import NOTHING, FlatPool, Pooled, Probe, Rest
from heads.models.abmil import ABMIL
from heads.models.dsmil import DSMIL
from heads.models.linear import Linear
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_argmax, segment_index, segment_max, segment_products, wide
from heads.models.projection import layer_of
from heads.models.simple import Max, Mean


def probe_attention(head: ABMIL, batch: BagBatch, leave_out: bool) -> Probe:
    """Heads of one pool and a linear classifier: logits = Σ a_i (W h_i) + b, only W h matters."""
    members = head.embed(batch)
    output = head.classify(members, batch)
    logits = output.attention["patch"].logits[:, None]
    return _linear(
        output, logits, wide(members) @ head.classifier.weight.T, head.classifier.bias, batch, leave_out
    )


def probe_mean(head: Mean, batch: BagBatch, leave_out: bool) -> Probe:
    """As attention that is the same everywhere."""
    members = head.embed(batch)
    output, values = head.classify(members, batch), wide(members) @ head.classifier.weight.T
    return _linear(output, torch.zeros_like(values[:, :1]), values, head.classifier.bias, batch, leave_out)


def probe_linear(head: Linear, batch: BagBatch, leave_out: bool) -> Probe:
    """As `probe_mean`, of standardised features; their mean is not taken once more for the output."""
    layer = head.classifier
    values = head.standardize.lower(batch.features, layer.weight.dtype) @ layer.weight.T
    return _linear(None, torch.zeros_like(values[:, :1]), values, layer.bias, batch, leave_out)


def _linear(
    output: HeadOutput | None,
    logits: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    batch: BagBatch,
    leave_out: bool,
) -> Probe:
    """Of (ΣP, 1) logits and (ΣP, C) values, which the attention sums up to the case's logits."""
    flat = FlatPool(logits, values[:, None], batch)
    output = output or HeadOutput(flat.slices[1].sums[:, 0] + bias)
    probe = Probe(output, values + bias, flat.in_place()[:, 0] + bias)
    if not leave_out:
        return probe
    return with_rests(probe, [rest.known[:, 0] + bias for rest in flat.without()])


def with_rests(probe: Probe, found: list[torch.Tensor]) -> Probe:
    """With the case's logits without each patch, each slice and each stain."""
    return replace(probe, without_patch=found[0], without_slice=found[1], without_stain=found[2])


def probe_max(head: Max, batch: BagBatch, leave_out: bool) -> Probe:
    """Removing a patch changes the features of which it alone holds the maximum, to the second largest."""
    members = head.embed(batch)
    probe = Probe(
        head.classify(members, batch),
        head.classifier(members),
        reason="in place: the maximum over patches gives slices no shares that could be kept",
    )
    if not leave_out:
        return probe
    slices, stains = batch.stain_offsets[batch.case_offsets], batch.case_offsets
    of_slices = segment_max(members, batch.slice_offsets)
    of_stains = segment_max(of_slices, batch.stain_offsets)
    levels = [(members, batch.case_patch_offsets), (of_slices, slices), (of_stains, stains)]
    weight, logits = head.classifier.weight, probe.output.logits
    return with_rests(probe, [_without_largest(*level, weight, logits) for level in levels])


def _without_largest(
    values: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """(M, C): W max + b of each segment without one of its (M, E) members, from its (G, C) logits.

    A feature has one holder a segment, if any: what the second largest is below it is added up by holder.
    """
    holder = segment_argmax(values, offsets)
    largest = values.gather(0, holder)
    second = segment_max(values.scatter(0, holder, NOTHING), offsets)
    lone = offsets.diff() == 1
    gap = (largest - second).masked_fill(lone[:, None], 0)
    index = segment_index(offsets, len(values))
    lost = (gap[:, :, None] * weight.T).flatten(0, 1)
    found = logits[index].index_add(0, holder.flatten(), lost, alpha=-1)
    return found.masked_fill(lone[index][:, None], torch.nan)


def probe_dsmil(head: DSMIL, batch: BagBatch, leave_out: bool) -> Probe:
    """A pool a class, each by likeness to the class's critical patch.

    Logits = Σ_c W'_c (V z_c) + b with z_c = Σ a_ic h_i: the C' numbers W'_c V h_i of every patch and class
    are all that matters.
    """
    members = head.embed(batch)
    output, full = head.classify(members, batch), wide(members)
    attention, classes = output.attention["patch"].logits, len(head.classifier.weight)
    kernel = head.classifier.weight.view(classes, attention.shape[1], -1).transpose(0, 1)
    values = full @ (kernel @ head.value.weight).flatten(0, 1).T
    values = values.view(len(full), -1, classes)
    bias = head.classifier.bias + (kernel @ head.value.bias).sum(0)
    flat = FlatPool(attention, values, batch)
    probe = Probe(output, values.sum(1) + bias, flat.in_place().sum(1) + bias)
    if not leave_out:
        return probe
    queries = wide(layer_of(members, head.query.weight, head.query.bias))
    assert output.instance_scores is not None
    patches = torch.arange(len(full), device=full.device)
    units = (patches, flat.slices[0].index, flat.stains[0].index)
    rests = [
        _other_critical(rest, unit, queries, output.instance_scores, values, batch.case_patch_offsets)
        for rest, unit in zip(flat.without(), units, strict=True)
    ]
    return with_rests(probe, [rest.known.sum(1) + bias for rest in rests])


def _other_critical(
    rest: Rest,
    unit: torch.Tensor,
    queries: torch.Tensor,
    scores: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
) -> Rest:
    """The cases without one unit, where that takes a critical patch with it.

    Each class has one such unit a case: the class's attention is done once more, for all cases and
    classes together, by the best patch outside of it and without its patches.

    Args:
        rest: Of U units, as if critical patches stayed what they are.
        unit: (ΣP,) int64 the unit of each patch: itself, its slice or its stain.
        queries: (ΣP, A).
        scores: (ΣP, C).
        values: (ΣP, C, C').
        offsets: (B + 1,) int64 the patches of each case.
    """
    case = segment_index(offsets, len(scores))
    holding = unit[segment_argmax(scores, offsets)]
    inside = unit[:, None] == holding[case]
    critical = segment_argmax(scores.masked_fill(inside, NOTHING), offsets)
    logits = segment_products(queries, queries[critical], offsets) / math.sqrt(queries.shape[1])
    again = Pooled(logits.masked_fill(inside, NOTHING), values, offsets)
    column = torch.arange(scores.shape[1], device=scores.device).expand_as(holding)
    mass, sums = rest.mass.clone(), rest.sums.clone()
    mass[holding, column], sums[holding, column] = again.mass, again.sums
    return Rest(mass, sums)
