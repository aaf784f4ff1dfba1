"""Cases without a patch, slice or stain, all at once, against the head on what is left of the bag."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from featstore.bags import Bag, collate
from heads.inspect import leave_out_conditioned
from heads.inspect.leave_out import FlatPool, Pooled
from heads.inspect.leave_out_conditioned import conditioned_sums
from heads.inspect.probing import Probe, probe
from tests.heads.bags import make_bag
from tests.inspect.brute_force import (
    CLASSES,
    DIM,
    LEFT_OUT,
    Variant,
    bounds,
    make_cases,
    make_head,
    named,
    schedule_of,
    without_each,
)


def left_out(probe: Probe) -> dict[str, torch.Tensor]:
    found = {"patch": probe.without_patch, "slice": probe.without_slice, "stain": probe.without_stain}
    assert all(each is not None for each in found.values())
    return found  # type: ignore[return-value]


def check(variant: Variant, bags: list[Bag], sharpness: float) -> None:
    head, batch = make_head(variant, sharpness), collate(bags)
    found = left_out(probe(head, batch, **schedule_of(head)))
    for level, starts in bounds(batch).items():
        for bag, (start, end) in zip(bags, itertools.pairwise(starts), strict=True):
            want = torch.softmax(without_each(head, bag, level), 1)
            got = torch.softmax(found[level][start:end], 1)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", LEFT_OUT, ids=named)
def test_leaving_out_equals_the_head_on_what_is_left(variant: Variant) -> None:
    check(variant, make_cases(8), sharpness=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("variant", LEFT_OUT, ids=named)
def test_leaving_out_equals_the_head_on_what_is_left_of_50_cases(
    variant: Variant, sharpness: float
) -> None:
    check(variant, make_cases(50, seed=1), sharpness)


@pytest.mark.parametrize("variant", LEFT_OUT, ids=named)
def test_nothing_is_left_of_a_case_of_one_patch(variant: Variant) -> None:
    for each in left_out(probe(make_head(variant), collate(make_cases(1)))).values():
        assert torch.isnan(each).all()
        assert each.shape == (1, CLASSES)


def test_with_attention_on_one_patch_the_others_are_what_is_left() -> None:
    logits = torch.tensor([0.0, 30.0, 1.0, 2.0, 50.0])  # 1 − a is 1e-13, which float32 does not know
    values = torch.tensor([1.0, 1e6, 2.0, 3.0, -1e6])
    rest = Pooled(logits[:, None], values[:, None, None], torch.tensor([0, 3, 5])).rest
    others = (1 + 2 * np.e) / (1 + np.e)
    torch.testing.assert_close(rest.sums[[1, 4], 0, 0], torch.tensor([others, 3.0]), rtol=1e-6, atol=0)
    mass = torch.tensor([np.log(1 + np.e), 2.0], dtype=torch.float32)
    torch.testing.assert_close(rest.mass[[1, 4], 0], mass, rtol=1e-6, atol=0)


def test_what_heads_of_a_pool_lose_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, 1, 6, 40])
    logits, values = 9 * torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 3, 2, dtype=torch.float64)
    rest = Pooled(logits, values, offsets).rest
    for j in range(1, 40):
        start, end = (1, 6) if j < 6 else (6, 40)
        others = [i for i in range(start, end) if i != j]
        a = torch.softmax(logits[others], 0)
        torch.testing.assert_close(rest.sums[j], (a[:, :, None] * values[others]).sum(0))
        torch.testing.assert_close(rest.mass[j], torch.logsumexp(logits[others], 0))
    assert rest.gone.nonzero()[:, 0].tolist() == [0]
    assert torch.isnan(rest.known[0]).all()


def test_a_slice_is_to_its_case_what_its_patches_are_together() -> None:
    batch = collate(make_cases(6))
    torch.manual_seed(0)
    logits, values = torch.randn(len(batch.features), 1), torch.randn(len(batch.features), 1, 2)
    flat = FlatPool(logits, values, batch)
    for _, outer in (flat.slices, flat.stains):
        torch.testing.assert_close(outer.sums, flat.patches.sums)
        torch.testing.assert_close(outer.mass, flat.patches.mass)


# Attention that what is left out has asked


def make_asked(sharpness: float = 0.2) -> dict:
    """A case of 600 patches in 6 slices, of which each patch changes the query a little, ten a lot."""
    torch.manual_seed(0)
    keys = torch.randn(600, 8, dtype=torch.float64) * torch.tensor([1, 1] + 6 * [0.2])
    keys = keys + 3  # which is the same to a softmax
    values = (keys[:, :1] - 3).square() * torch.tensor([1.0, 2.0])  # what the second order has to find
    own = sharpness * torch.randn(1, 8, dtype=torch.float64)
    change = torch.randn(600, 8, dtype=torch.float64) * torch.tensor([1] + 7 * [0.2])
    attention = torch.softmax(keys @ own[0], 0)
    # Their bounds are 0.009, just below where the series ends.
    largest = (keys - attention @ keys).norm(dim=1).max()
    change *= 0.009 / largest / change.norm(dim=1, keepdim=True)
    change[::60] *= 100
    return {
        "queries": own + change,
        "starts": torch.arange(601),
        "units": torch.tensor([0, 600]),
        "attention": attention,
        "asked": own,
        "keys": keys,
        "values": values,
        "offsets": torch.tensor([0, 600]),
        "fine": 1,
    }


@pytest.mark.parametrize(("sharpness", "ruling"), [(0.2, 0), (10.0, 1)])
def test_small_changes_of_the_query_are_a_series_and_large_ones_exact(
    sharpness: float, ruling: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows, exactly = make_asked(sharpness), [], leave_out_conditioned._exactly

    def spy(queries: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        rows.append(len(queries))
        return exactly(queries, *rest)

    monkeypatch.setattr(leave_out_conditioned, "_exactly", spy)
    found = conditioned_sums(**asked)
    assert (asked["attention"] > 0.5).sum() == ruling  # what is left without it is small: exact too
    assert sum(rows) == 10 + ruling
    logits = asked["queries"] @ asked["keys"].T
    want = torch.softmax(logits.fill_diagonal_(-torch.inf), 1) @ asked["values"]
    error = (found - want).abs() / asked["values"].abs().amax(0)
    assert error[::60].max() < 1e-12
    assert error[:, 0].max() < 2e-7
    assert error[:, 1].max() < 5e-5


def test_numbers_that_need_be_fine_have_the_second_order() -> None:
    first, second = (conditioned_sums(**{**make_asked(), "fine": fine}) for fine in (1, 2))
    assert torch.equal(first[:, 0], second[:, 0])
    assert 1e-6 < (first[:, 1] - second[:, 1]).abs().max() < 1e-4


def test_slices_that_ask_are_left_out_exactly() -> None:
    asked = make_asked()
    own = {
        "queries": asked["queries"][:6],
        "starts": torch.arange(0, 601, 100),
        "units": torch.tensor([0, 6]),
    }
    found = conditioned_sums(**{**asked, **own})
    for u in range(6):
        kept = torch.arange(600) // 100 != u
        a = torch.softmax(asked["keys"][kept] @ own["queries"][u], 0)
        torch.testing.assert_close(found[u], a @ asked["values"][kept])


@pytest.mark.parametrize("fusion", ["concat", "cross_attn"])
@pytest.mark.parametrize("kind", ["gated", "dsmil", "cosine"])
def test_a_case_of_many_patches_is_left_out_as_one_of_few(kind: str, fusion: str) -> None:
    rng = np.random.default_rng(0)
    bags = [make_bag(rng, "many", dim=DIM, slices=(2, 3), patches=(60, 90)), *make_cases(3)]
    check(("dual_stream", {"attention_type": kind, "fusion_method": fusion}), bags, sharpness=1.0)
