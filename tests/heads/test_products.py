"""The operations that are computed as products of matrices equal their formulas, gradients too."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heads.models.attention_pool import AttentionPool, PoolKind
from heads.models.dropout import Dropout
from heads.models.outputs import Attention
from heads.models.pooling import (
    segment_index,
    segment_products,
    segment_sum,
    softmax_lines,
    weighted_sum,
)
from heads.models.projection import project, scores_of
from heads.models.standardize import Standardize

E, HIDDEN, D = 6, 4, 5
# Across the runs of 1,024 rows: segments that end in one, span several, and many in one.
SIZES = [[1], [5, 1, 3], [1024, 1], [1023, 2, 1024], [2500, 7], [1] * 40 + [30] * 50]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def offsets_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def assert_alike(got: torch.Tensor, want: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Value and gradients, weighted by random numbers, so that no error can cancel."""
    torch.testing.assert_close(got, want)
    weight = random(*want.shape, seed=9).detach()
    gradients = [
        torch.autograd.grad((each * weight).sum(), leaves, retain_graph=True) for each in (got, want)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_weighted_sum_is_a_sum_of_weighted_rows(sizes: list[int]) -> None:
    weights, values = random(sum(sizes)), random(sum(sizes), E, seed=1)
    offsets = offsets_of(sizes)
    want = segment_sum(weights[:, None] * values, offsets)
    assert_alike(weighted_sum(weights, values, offsets), want, [weights, values])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_several_weighted_sums_at_once(sizes: list[int]) -> None:
    weights, values = random(sum(sizes), 3), random(sum(sizes), E, seed=1)
    offsets = offsets_of(sizes)
    want = torch.stack([weighted_sum(each, values, offsets) for each in weights.unbind(1)], 1)
    assert_alike(weighted_sum(weights, values, offsets), want, [weights, values])


@pytest.mark.parametrize("kind", ["tanh", "gated"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_pool_is_what_its_formula_says(kind: PoolKind, sizes: list[int]) -> None:
    pool, members = AttentionPool(E, HIDDEN, kind=kind).double(), random(sum(sizes), E)
    got, want = (_flat(way(members, offsets_of(sizes))) for way in (pool.fused, pool.by_operation))
    assert_alike(got, want, [members, *pool.parameters()])


@pytest.mark.parametrize("kind", ["tanh", "gated"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_members_in_memory_by_column_are_pooled_alike(kind: PoolKind, sizes: list[int]) -> None:
    pool, offsets = AttentionPool(E, HIDDEN, dropout=0.0, kind=kind).double(), offsets_of(sizes)
    columns = random(E, sum(sizes))
    got, want = (_flat(pool.fused(members, offsets)) for members in (columns.t(), columns.t().contiguous()))
    assert_alike(got, want, [columns, *pool.parameters()])


@pytest.mark.parametrize("kind", ["tanh", "gated"])
@pytest.mark.parametrize("sizes", [[1], [7], [5, 1, 3], [1] * 40, [100, 156]], ids=str)
def test_few_members_are_pooled_as_the_formula_says(kind: PoolKind, sizes: list[int]) -> None:
    pool, members = AttentionPool(E, HIDDEN, kind=kind).double(), random(sum(sizes), E)
    got, want = (_flat(way(members, offsets_of(sizes))) for way in (pool.few, pool.by_operation))
    assert_alike(got, want, [members, *pool.parameters()])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_products_with_the_vectors_of_a_segment(sizes: list[int], k: int) -> None:
    values, each = random(sum(sizes), E), random(len(sizes), k, E, seed=1)
    want = torch.cat([part @ own.t() for part, own in zip(values.split(sizes), each, strict=True)])
    assert_alike(segment_products(values, each, offsets_of(sizes)), want, [values, each])


def test_offsets_of_equal_length_have_segments_of_their_own() -> None:
    for sizes in ([1, 4], [2, 3], [4, 1]) * 20:  # made and gone, one often where another was in memory
        want = [number for number, size in enumerate(sizes) for _ in range(size)]
        offsets = offsets_of(sizes)
        assert segment_index(offsets, 5).tolist() == want == segment_index(offsets, 5).tolist()
        lines = softmax_lines(torch.zeros(5), offsets)
        assert [int(line.count_nonzero()) for line in lines] == sizes


def test_segments_are_those_of_the_offsets_as_they_are_now() -> None:
    offsets = offsets_of([1, 4])
    assert segment_index(offsets, 5).tolist() == [0, 1, 1, 1, 1]
    offsets[1] = 3
    assert segment_index(offsets, 5).tolist() == [0, 0, 0, 1, 1]


def test_what_is_found_in_inference_mode_does_not_stop_a_training() -> None:
    pool, offsets, members = AttentionPool(E, HIDDEN), offsets_of([3, 2]), random(5, E, dtype=torch.float32)
    with torch.inference_mode():
        want, _ = pool(members, offsets)
    pooled, _ = pool(members, offsets)
    pooled.sum().backward()
    torch.testing.assert_close(pooled, want)


def test_a_pool_drops_what_the_formula_drops() -> None:
    pool, members = AttentionPool(E, HIDDEN, dropout=0.5).double(), random(40, E)
    found = []
    for way in (pool.fused, pool.by_operation):
        torch.manual_seed(3)
        found.append(_flat(way(members, offsets_of([15, 25]))))
    assert_alike(*found, [members, *pool.parameters()])
    assert not torch.equal(found[0], _flat(pool.eval()(members, offsets_of([15, 25]))))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=5), st.sampled_from(["tanh", "gated"]))
def test_a_pool_of_any_segments(sizes: list[int], kind: PoolKind) -> None:
    pool, members = AttentionPool(E, HIDDEN, kind=kind).double(), random(sum(sizes), E)
    pooled, attention = pool(members, offsets_of(sizes))
    for number, (part, mine) in enumerate(
        zip(members.split(sizes), attention.logits.split(sizes), strict=True)
    ):
        weights = torch.softmax(mine, 0)
        torch.testing.assert_close(pooled[number], weights @ part)


@pytest.mark.parametrize("grown", [False, True], ids=["features are given", "features are trained too"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_projection_is_dropout_of_relu_of_a_layer(p: float, grown: bool) -> None:
    standardize, layer, dropout = _standardize().double(), nn.Linear(D, E).double(), Dropout(p)
    features = random(30, D).detach().requires_grad_(grown)
    torch.manual_seed(4)
    got = project(features, standardize, layer, dropout)
    torch.manual_seed(4)
    want = dropout(torch.relu(layer((features - standardize.mean) / standardize.std)))
    assert (want == 0).any()
    assert (want > 0).any()
    assert_alike(got, want, [*([features] if grown else []), *layer.parameters()])


def test_a_projection_without_a_bias() -> None:
    standardize, layer = _standardize().double(), nn.Linear(D, E, bias=False).double()
    features = random(9, D).detach()
    want = torch.relu(layer(standardize(features)))
    assert_alike(project(features, standardize, layer), want, [layer.weight])


@pytest.mark.parametrize("shift", [0.0, 100.0], ids=["centred", "features differ in their third digit"])
def test_bf16_rounds_after_standardising(shift: float) -> None:
    standardize, layer = _standardize(), nn.Linear(D, E)
    standardize.mean += shift
    features = (random(700, D, dtype=torch.float32) + shift).detach()
    want = torch.relu(layer(standardize(features)))
    with torch.autocast("cpu", torch.bfloat16):
        got = project(features, standardize, layer)
    assert got.dtype == torch.bfloat16
    np.testing.assert_allclose(got.float().detach(), want.detach(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("sizes", [[200], [600]], ids=["few patches", "many patches"])
def test_bf16_leaves_attention_logits_in_float32(sizes: list[int]) -> None:
    pool, members = AttentionPool(64, 16), random(sum(sizes), 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, attention = pool(members.detach().to(torch.bfloat16), offsets_of(sizes))
    rounded = attention.logits.to(torch.bfloat16).float()
    assert (attention.logits != rounded).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["tanh", "gated"])
def test_bf16_attention_is_near_that_of_float32(kind: PoolKind) -> None:
    pool, members = AttentionPool(64, 16, kind=kind), random(1500, 64, dtype=torch.float32)
    offsets, found = offsets_of([1000, 500]), []
    for dtype in (torch.float32, torch.bfloat16):
        given = members.detach().to(dtype).requires_grad_()
        pooled, attention = pool(given, offsets)
        assert {pooled.dtype, attention.weights.dtype} == {torch.float32}
        loss = pooled.square().sum() + attention.weights.square().sum()
        found.append([pooled, *torch.autograd.grad(loss, [given, *pool.parameters()])])
    for full, low in zip(*found, strict=True):
        error = float((low.float() - full).detach().norm())
        assert error <= 0.03 * float(full.detach().norm()) + 1e-6


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_gradient_of_a_bf16_projection_is_near_that_of_float32(p: float) -> None:
    standardize, layer, dropout = Standardize(64), nn.Linear(64, 32), Dropout(p)
    features, found = random(700, 64, dtype=torch.float32).detach(), []
    kept = dropout.kept((700, 32), torch.float32, torch.device("cpu"))
    for low in (False, True):
        given = mock.patch.object(dropout, "kept", functools.partial(_as, kept))
        with torch.autocast("cpu", torch.bfloat16, enabled=low), given:
            out = project(features, standardize, layer, dropout)
        assert out.is_contiguous() != low
        # A gradient by row and one by column are the same to it.
        weight = random(700, 32, seed=8, dtype=torch.float32).detach().to(out.dtype)
        for each in (weight, weight.t().contiguous().t()):
            found.append(torch.autograd.grad((out * each).sum(), layer.parameters(), retain_graph=True))
    for full, low_row, low_column in zip(found[0], found[2], found[3], strict=True):
        torch.testing.assert_close(low_row, low_column, rtol=0.01, atol=1e-2)
        assert float((low_row - full).norm()) <= 0.06 * float(
            full.norm()
        )  # of ReLU, some are on the other side


def test_bf16_leaves_instance_scores_in_float32() -> None:
    members, layer = random(500, 64, dtype=torch.float32).detach(), nn.Linear(64, 2)
    with torch.autocast("cpu", torch.bfloat16):
        scores = scores_of(members, layer)
    torch.testing.assert_close(scores, layer(members))


def test_standardised_features_are_not_standardised_again() -> None:
    standardize, layer = _standardize(), nn.Linear(D, E)
    features = random(300, D, dtype=torch.float32).detach()
    once = standardize.lower(features, torch.bfloat16)
    got = project(once, standardize, layer, standardized=True)
    torch.testing.assert_close(got, torch.relu(layer(once.float())))
    with torch.autocast("cpu", torch.bfloat16):
        got = project(once, standardize, layer, standardized=True)
        assert torch.equal(got, project(features, standardize, layer))
        # That they are is said, not guessed from their precision.
        again = project(once, standardize, layer)
        assert torch.equal(again, project(once.float(), standardize, layer))
        assert not torch.equal(again, got)


def test_what_is_projected_can_be_used_as_any_other_tensor() -> None:
    standardize, layer = Standardize(D), nn.Linear(D, E)
    with torch.autocast("cpu", torch.bfloat16):
        got = project(random(300, D, dtype=torch.float32).detach(), standardize, layer)
    assert not got._is_view()
    assert torch.equal(got.reshape(-1).view(300, E), got)


def test_standardised_block_by_block_as_at_once() -> None:
    standardize, features = _standardize(), random(1000, D, dtype=torch.float32).detach()
    got = standardize.lower(features, torch.bfloat16)
    torch.testing.assert_close(got, standardize(features).to(torch.bfloat16), rtol=2**-7, atol=0)


def _as(
    kept: torch.Tensor | None, shape: object, dtype: torch.dtype, device: object, by_column: bool
) -> torch.Tensor | None:
    """The same elements kept, in another precision and order in memory: in place of `Dropout.kept`."""
    if kept is None:
        return None
    return kept.to(dtype).t().contiguous().t() if by_column else kept.to(dtype)


def _flat(found: tuple[torch.Tensor, Attention]) -> torch.Tensor:
    """Everything that a pool says, in one array."""
    pooled, attention = found
    return torch.cat((pooled.flatten(), attention.weights, attention.logits))


def _standardize() -> Standardize:
    standardize = Standardize(D)
    standardize.mean.copy_(random(D, seed=5).detach())
    standardize.std.copy_(random(D, seed=6).detach().abs() + 0.5)
    return standardize
