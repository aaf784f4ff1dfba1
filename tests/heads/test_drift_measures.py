"""The measures of drift, each against its definition in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads.evaluation import neighbours
from heads.evaluation.cka import Moments
from heads.evaluation.neighbours import directions, neighbour_overlap, pair_correlation, pair_cosines
from heads.evaluation.variance import Spread
from tests.heads.drift_in_numpy import by_brute_force, cka_of_grams, debiased_of_grams, eta


def moments_of(x: np.ndarray, y: np.ndarray, blocks: int = 1) -> Moments:
    found = Moments.zeros(x.shape[1], y.shape[1])
    for one, other in zip(np.array_split(x, blocks), np.array_split(y, blocks), strict=True):
        found.add(torch.from_numpy(one).float(), torch.from_numpy(other).float())
    return found


def related(seed: int, n: int, dims: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (n, dims[0]))
    y = x @ rng.normal(0, 1, dims) + rng.normal(0, 1, (n, dims[1]))
    return x + rng.normal(0, 2, dims[0]), y


SIZES = st.tuples(
    st.integers(0, 10**6), st.integers(8, 40), st.tuples(st.integers(1, 6), st.integers(1, 6))
)


@given(SIZES)
def test_cka_is_that_of_the_gram_matrices(size: tuple[int, int, tuple[int, int]]) -> None:
    x, y = related(*size)
    assert moments_of(x, y).linear_cka() == pytest.approx(cka_of_grams(x, y), abs=1e-5)
    assert moments_of(x, y).debiased_cka() == pytest.approx(debiased_of_grams(x, y), abs=1e-4)


@given(SIZES, st.floats(0.1, 10))
def test_cka_is_symmetric_and_blind_to_rotation_scale_and_shift(
    size: tuple[int, int, tuple[int, int]], scale: float
) -> None:
    x, y = related(*size)
    rng = np.random.default_rng(size[0] + 1)
    turn = np.linalg.qr(rng.normal(size=(y.shape[1],) * 2))[0]
    for measure in (Moments.linear_cka, Moments.debiased_cka):
        wanted = measure(moments_of(x, y))
        assert measure(moments_of(y, x)) == pytest.approx(wanted, abs=1e-5)
        assert measure(moments_of(x, scale * (y @ turn + 1))) == pytest.approx(wanted, abs=1e-4)
        assert measure(moments_of(x, 3 * x @ np.linalg.qr(rng.normal(size=(x.shape[1],) * 2))[0])) == (
            pytest.approx(1, abs=1e-4)
        )


def test_blocks_and_merging_change_nothing() -> None:
    x, y = related(3, 50, (5, 4))
    y[20:] += 30  # as if of another stain
    whole, parts = moments_of(x, y), moments_of(x[:20], y[:20], 4)
    parts.merge(moments_of(x[20:], y[20:], 7))
    assert parts.n == 50
    assert parts.linear_cka() == pytest.approx(whole.linear_cka(), abs=1e-6)
    assert parts.debiased_cka() == pytest.approx(whole.debiased_cka(), abs=1e-5)


def test_of_few_unrelated_patches_only_the_debiased_cka_is_near_0() -> None:
    rng = np.random.default_rng(0)
    moments = moments_of(rng.normal(size=(60, 200)), rng.normal(size=(60, 200)))
    assert moments.linear_cka() > 0.7
    assert abs(moments.debiased_cka()) < 0.1


def test_cka_of_what_does_not_vary_is_undefined() -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    for flat in (np.zeros((9, 3)), np.full((9, 3), 0.7)):
        for moments in (moments_of(x, flat), moments_of(flat, x)):
            assert math.isnan(moments.linear_cka())
            assert math.isnan(moments.debiased_cka())
    assert math.isnan(moments_of(x[:1], x[:1]).linear_cka())
    assert math.isnan(moments_of(x[:3], x[:3]).debiased_cka())


@pytest.mark.parametrize("cells", [40, 2**23])
@pytest.mark.parametrize("grouped", [False, True])
def test_neighbours_are_those_of_a_search_by_hand(
    grouped: bool, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_CELLS", cells)
    rng = np.random.default_rng(1)
    a = rng.normal(size=(30, 4))
    b = a + rng.normal(0, 0.5, a.shape)
    # Patches of the largest case have 8 others: with 9 neighbours they are left out.
    cases = [0] * 22 + [1] * 5 + [2] * 3 if grouped else None
    for k in (1, 4, 9):
        shares, jaccard, chance = by_brute_force(a, b, k, cases)
        ready = [directions(torch.from_numpy(each)) for each in (a, b)]
        found = neighbour_overlap(ready[0], ready[1], k, None if cases is None else torch.tensor(cases))
        assert found.queries == len(shares)
        assert (grouped and k == 9) == (found.queries < 30)
        assert found.overlap == pytest.approx(np.mean(shares))
        assert found.jaccard == pytest.approx(np.mean(jaccard))
        assert found.chance == pytest.approx(np.mean(chance))


def test_neighbours_of_too_few_patches() -> None:
    two = directions(torch.tensor([[1.0, 0], [0, 1]]))
    assert neighbour_overlap(two, two, 10).k == 1
    assert neighbour_overlap(two, two, 10).overlap == 1
    assert math.isnan(neighbour_overlap(two[:1], two[:1], 10).overlap)
    alone = neighbour_overlap(two, two, 1, torch.tensor([0, 0]))
    assert alone.queries == 0
    assert math.isnan(alone.overlap)


def test_unrelated_embeddings_share_as_many_neighbours_as_chance_says() -> None:
    rng = np.random.default_rng(0)
    a, b = (directions(torch.from_numpy(rng.normal(size=(400, 8)))) for _ in range(2))
    found = neighbour_overlap(a, b, 40)
    assert found.chance == pytest.approx(40 / 399)
    assert found.overlap == pytest.approx(found.chance, abs=0.02)


def test_pairs_are_of_different_patches_and_their_ranks_are_compared() -> None:
    rng = np.random.default_rng(0)
    a = directions(torch.from_numpy(rng.normal(size=(5, 3))))
    found = pair_cosines(a, a, 200, seed=3)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    cosines = (a @ a.T).numpy()
    others = cosines[~np.eye(5, dtype=bool)].astype(np.float32)
    assert np.isclose(found[:, :1], others, atol=1e-6).any(axis=1).all()
    assert pair_correlation(found) == pytest.approx(1)
    assert pair_correlation(np.stack([found[:, 0], -found[:, 0]], axis=1)) == pytest.approx(-1)


def test_shares_of_variance_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    case, stain = rng.integers(0, 5, 200), rng.integers(0, 3, 200)
    stain[case == 4] = 1  # lacks two stains
    values = rng.normal(size=(200, 4)) + 0.5 * case[:, None] + rng.normal(size=(3, 4))[stain] + 1
    label = {0: 0, 1: 1, 3: 1}
    spread = Spread(4, 3, 2)
    for c in range(5):
        mine = values[case == c]
        sums = np.stack([mine[stain[case == c] == s].sum(axis=0) for s in range(3)])
        sizes = np.bincount(stain[case == c], minlength=3).astype(float)
        spread.add_case(
            torch.from_numpy(sums), torch.from_numpy(sizes), float((mine**2).sum()), label.get(c)
        )
    found = spread.shares()
    assert found["cases"] == pytest.approx(eta(values, case))
    assert found["stains"] == pytest.approx(eta(values, stain))
    inside = values - np.stack([values[stain == s].mean(axis=0) for s in range(3)])[stain]
    assert found["cases_within_stains"] == pytest.approx(eta(inside, 3 * case + stain))
    known = np.isin(case, list(label))
    of_class = np.array([label.get(c, -1) for c in case.tolist()])
    assert found["classes"] == pytest.approx(eta(values[known], of_class[known]))


def test_shares_of_what_does_not_vary_or_is_one_group_are_undefined() -> None:
    spread = Spread(2, 1, 0)
    spread.add_case(torch.tensor([[4.0, 0]]).double(), torch.tensor([4.0]).double(), 4.0, None)
    assert all(map(math.isnan, spread.shares().values()))
