"""The operations that are computed as products of matrices equal their formulas, gradients too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heads.models.attention_pool import AttentionPool, PoolKind
from heads.models.dropout import Dropout
from heads.models.outputs import Attention
from heads.models.pooling import segment_sum, weighted_sum
from heads.models.projection import project
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


def test_standardised_block_by_block_as_at_once() -> None:
    standardize, features = _standardize(), random(1000, D, dtype=torch.float32).detach()
    got = standardize.lower(features, torch.bfloat16, 2.0)
    torch.testing.assert_close(got, (2.0 * standardize(features)).to(torch.bfloat16), rtol=2**-7, atol=0)


def _flat(found: tuple[torch.Tensor, Attention]) -> torch.Tensor:
    """Everything that a pool says, in one array."""
    pooled, attention = found
    return torch.cat((pooled.flatten(), attention.weights, attention.logits))


def _standardize() -> Standardize:
    standardize = Standardize(D)
    standardize.mean.copy_(random(D, seed=5).detach())
    standardize.std.copy_(random(D, seed=6).detach().abs() + 0.5)
    return standardize
