"""What single patches say, alone and in place, against bags of one patch and plain formulas."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from featstore.bags import BagBatch, collate
from heads.inspect import leave_out_hierarchical, probing
from heads.inspect.probing import Probe, probe
from heads.models import dual_stream
from heads.models import head as head_module
from heads.models.abmil import ABMIL
from heads.models.config import AttentionConfig
from heads.models.head import Head
from heads.models.hierarchical import Hierarchical
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_softmax
from tests.heads.bags import nested
from tests.heads.in_numpy import linear, pool, project, weights
from tests.inspect.brute_force import (
    CLASSES,
    DIM,
    DUAL_STREAM,
    EVERY,
    HIERARCHICAL,
    LEFT_OUT,
    POOLED,
    Variant,
    bounds,
    make_cases,
    make_head,
    named,
    say,
    schedule_of,
    units,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def numbers(found: Probe) -> Iterator[tuple[str, torch.Tensor]]:
    """What a probe holds of patches, slices and stains."""
    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value


def level_of(name: str) -> str:
    return name.removeprefix("without_") if name.startswith("without_") else "patch"


def double(variant: Variant) -> Head:
    return make_head(variant, dtype=torch.float64)


def make_batch() -> BagBatch:
    batch = collate(make_cases(6))
    return replace(batch, features=batch.features.double())


@pytest.mark.parametrize("variant", EVERY, ids=named)
def test_alone_a_patch_is_a_bag_of_its_own(variant: Variant) -> None:
    head, bags = make_head(variant), make_cases(6)
    found = probe(head, collate(bags), leave_out=False, **schedule_of(head)).alone
    want = [say(head, bag, np.arange(len(bag)) == j) for bag in bags for j in range(len(bag))]
    torch.testing.assert_close(
        torch.softmax(found, 1), torch.softmax(torch.stack(want), 1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("variant", EVERY, ids=named)
def test_the_output_is_that_of_the_head(variant: Variant) -> None:
    head, batch = double(variant), make_batch()
    found, want = probe(head, batch, **schedule_of(head)).output, head(batch, **schedule_of(head))
    torch.testing.assert_close(found.logits, want.logits, **CLOSE)
    assert found.attention.keys() == want.attention.keys()
    for level, attention in want.attention.items():
        torch.testing.assert_close(found.attention[level].weights, attention.weights, **CLOSE)
        torch.testing.assert_close(found.attention[level].logits, attention.logits, **CLOSE)
        assert torch.equal(found.attention[level].offsets, attention.offsets)
    assert (found.instance_scores is None) == (want.instance_scores is None)


# In place


@pytest.mark.parametrize("variant", HIERARCHICAL[:2], ids=named)
def test_in_place_of_hierarchical_equals_numpy(variant: Variant) -> None:
    head, bags = double(variant), make_cases(6)
    w, gated = weights(head), variant[1]["attention_pool"] == "gated"
    want = []
    for bag in bags:
        of_stains = [[project(w, x) for x in stain] for stain in nested(bag)]
        slices = [np.stack([pool(w, "pools.patch", h, gated)[0] for h in stain]) for stain in of_stains]
        stains, shares = zip(*[pool(w, "pools.slice", z, gated) for z in slices], strict=True)
        case, of_case = pool(w, "pools.stain", np.stack(stains), gated)
        for t, stain in enumerate(of_stains):
            for s, h in enumerate(stain):
                changed = case + of_case[t] * shares[t][s] * (h - slices[t][s])
                want.append(linear(w, "classifier", changed))
    found = probe(head, make_batch()).in_place
    assert_allclose(found, np.concatenate(want), **CLOSE)


@pytest.mark.parametrize("variant", HIERARCHICAL, ids=named)
@torch.no_grad()
def test_in_place_keeps_the_weights_that_each_head_of_a_pool_gave(variant: Variant) -> None:
    head, batch = double(variant), make_batch()
    assert isinstance(head, Hierarchical)
    offsets = (batch.slice_offsets, batch.stain_offsets, batch.case_offsets)
    given, members = [], [head.embed(batch)]
    for of_level, own in zip(head.pools.values(), offsets, strict=True):
        given.append(segment_softmax(of_level.weigh(members[-1])[0], own))  # type: ignore[operator]
        members.append(of_level(members[-1], own)[0])
    want = []
    for j in range(len(batch.features)):
        changed, member = members[0][j : j + 1], j
        for level, (of_level, own) in enumerate(zip(head.pools.values(), offsets, strict=True)):
            segment = int(torch.searchsorted(own, member, right=True)) - 1
            start, end = own[segment : segment + 2].tolist()
            others = members[level][start:end].clone()
            a = given[level][start:end]
            others[member - start] = changed[0]
            if level == 0:
                a = torch.zeros_like(a)
                a[member - start] = 1
            values = of_level.weigh(others)[1].view(*a.shape, -1)  # type: ignore[operator]
            changed, member = of_level.finish((a[:, :, None] * values).sum(0).flatten()[None]), segment  # type: ignore[operator]
        want.append(head.classifier(changed)[0])
    torch.testing.assert_close(probe(head, batch).in_place, torch.stack(want), **CLOSE)


@pytest.mark.parametrize("variant", [*POOLED, *DUAL_STREAM], ids=named)
@torch.no_grad()
def test_in_place_a_patch_has_all_the_attention_of_its_slice(variant: Variant) -> None:
    head, bags = double(variant), make_cases(6)
    want = []
    for bag in bags:
        batch = collate([bag])
        output = head(batch, **schedule_of(head))
        h = head.standardize(batch.features) if variant[0] == "linear" else head.embed(batch)  # type: ignore[operator]
        a = torch.full((len(bag), 1), 1 / len(bag), dtype=torch.float64)
        if output.attention:
            a = output.attention["patch"].weights.view(len(bag), -1)
        for j, own in enumerate(units(bag)["slice"]):
            mine = torch.from_numpy(units(bag)["slice"] == own)
            changed = a.masked_fill(mine[:, None], 0)
            changed[j] = a[mine].sum(0)
            pooled = changed.T @ h
            if variant[0] == "dual_stream":
                pooled = head.fusion(output.attention["selection"].weights[None] @ h, pooled)  # type: ignore[operator]
            if variant[0] == "dsmil":
                pooled = head.value(pooled).flatten()[None]  # type: ignore[operator]
            want.append(head.classifier(pooled)[0])  # type: ignore[operator]
    found = probe(head, make_batch(), **schedule_of(head)).in_place
    torch.testing.assert_close(found, torch.stack(want), **CLOSE)


# What must not matter


@pytest.mark.parametrize("variant", LEFT_OUT, ids=named)
def test_a_case_of_one_patch_is_what_the_patch_says(variant: Variant) -> None:
    head, batch = double(variant), collate(make_cases(1))
    found = probe(head, batch, **schedule_of(head))
    torch.testing.assert_close(found.alone, found.output.logits, **CLOSE)
    if found.in_place is not None:
        torch.testing.assert_close(found.in_place, found.output.logits, **CLOSE)


@pytest.mark.parametrize("variant", EVERY, ids=named)
def test_cases_of_a_batch_do_not_know_of_one_another(variant: Variant) -> None:
    head, bags, batch = double(variant), make_cases(6), make_batch()
    together, starts = dict(numbers(probe(head, batch, **schedule_of(head)))), bounds(batch)
    for i, bag in enumerate(bags):
        for name, value in numbers(probe(head, collate([bag]), **schedule_of(head))):
            start, end = starts[level_of(name)][i : i + 2]
            torch.testing.assert_close(together[name][start:end], value, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("variant", LEFT_OUT, ids=named)
def test_patches_may_come_in_any_order_within_their_slice(variant: Variant) -> None:
    head, batch = double(variant), make_batch()
    torch.manual_seed(0)
    pairs = itertools.pairwise(batch.slice_offsets.tolist())
    order = torch.cat([start + torch.randperm(end - start) for start, end in pairs])
    before = probe(head, batch, **schedule_of(head))
    after = dict(numbers(probe(head, replace(batch, features=batch.features[order]), **schedule_of(head))))
    for name, value in numbers(before):
        want = value[order] if level_of(name) == "patch" else value
        torch.testing.assert_close(after[name], want, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("variant", LEFT_OUT, ids=named)
def test_what_a_patch_says_does_not_depend_on_what_else_is_asked(variant: Variant) -> None:
    head, batch = make_head(variant), collate(make_cases(6))
    more, less = probe(head, batch), probe(head, batch, leave_out=False)
    assert torch.equal(more.alone, less.alone)
    assert more.in_place is less.in_place is None or torch.equal(more.in_place, less.in_place)  # type: ignore[arg-type]
    assert less.without_patch is less.without_slice is less.without_stain is None


@pytest.mark.parametrize("variant", [*HIERARCHICAL, ("transmil", {})], ids=named)
def test_blocks_of_patches_change_nothing(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    head, batch = double(variant), make_batch()
    want = dict(numbers(probe(head, batch)))
    for module in (probing, leave_out_hierarchical):
        monkeypatch.setattr(module, "_BLOCK", 7)
    for name, value in numbers(probe(head, batch)):
        torch.testing.assert_close(value, want[name], equal_nan=True, **CLOSE)


@pytest.mark.parametrize("variant", [("hierarchical", {}), ("dual_stream", {}), ("mean", {})], ids=named)
def test_dropout_and_lower_precision_are_off(variant: Variant) -> None:
    head, batch = make_head((variant[0], {"dropout": 0.5})), collate(make_cases(6))
    want = dict(numbers(probe(head, batch)))
    head.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = probe(head, batch)
    for name, value in numbers(found):
        assert value.dtype == torch.float32
        assert not value.requires_grad
        torch.testing.assert_close(value, want[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", [v for v in LEFT_OUT if v[0] not in ("linear",)], ids=named)
def test_a_patch_goes_through_the_projector_once(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    head, batch = make_head(variant), collate(make_cases(6))
    rows: list[int] = []
    for module in (head_module, dual_stream):
        given = module.project
        monkeypatch.setattr(
            module, "project", lambda x, *rest, given=given: (rows.append(len(x)), given(x, *rest))[1]
        )
    probe(head, batch)
    assert rows == ([len(batch.features)] if variant[1].get("use_hidden_layer", True) else [])


# What cannot be asked


class Mine(ABMIL):
    """A head of someone else, derived from one of ours, that also reads the first stain and file."""

    def forward(self, batch: BagBatch, **schedule: float) -> HeadOutput:
        output = super().forward(batch, **schedule)
        first = batch.stain_ids[batch.case_offsets[:-1]] + 0.1 * batch.rows[batch.case_patch_offsets[:-1]]
        return replace(output, logits=output.logits.square() + first[:, None])


def test_a_head_derived_from_ours_is_asked_itself() -> None:
    torch.manual_seed(0)
    head, bags = Mine(DIM, CLASSES, AttentionConfig(embed_dim=8, attention_hidden=6)), make_cases(6)
    found = probe(head, collate(bags))
    want = [say(head, bag, np.arange(len(bag)) == j) for bag in bags for j in range(len(bag))]
    torch.testing.assert_close(found.alone, torch.stack(want))
    assert [name for name, _ in numbers(found)] == ["alone"]
    assert "Mine" in found.reason
    assert "forward pass" in found.reason


@pytest.mark.parametrize(
    ("name", "missing", "reason"),
    [
        ("transmil", {"in_place", "without_patch", "without_slice", "without_stain"}, "every patch"),
        ("max", {"in_place"}, "maximum"),
        ("mean", set(), "^$"),
    ],
)
def test_what_a_head_cannot_say_has_a_reason(name: str, missing: set[str], reason: str) -> None:
    found = probe(make_head((name, {})), collate(make_cases(3)))
    said = {name for name, _ in numbers(found)}
    assert {field.name for field in fields(found)} - said - {"output", "reason"} == missing
    assert re.search(reason, found.reason)
