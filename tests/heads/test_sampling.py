from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.sampling import cap_slices, limit_slices, sample_bag, sub_cases
from tests.heads.bags import make_bag

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 7))
def test_a_cap_limits_every_slice_and_loses_no_slice(seed: int, cap: int) -> None:
    rng = np.random.default_rng(seed)
    bag = make_bag(rng)
    capped = cap_slices(bag, cap, rng)
    assert capped.slices == bag.slices
    assert capped.slice_sizes.tolist() == np.minimum(bag.slice_sizes, cap).tolist()
    assert set(capped.rows) <= set(bag.rows)


def test_every_epoch_draws_afresh_and_every_patch_has_its_turn() -> None:
    rng = np.random.default_rng(0)
    bag = make_bag(rng, stains=(0,), slices=(1, 1), patches=(20, 20))
    draws = [tuple(cap_slices(bag, 5, rng).rows) for _ in range(60)]
    assert len(set(draws)) > 50
    count = np.bincount(np.concatenate(draws), minlength=20)
    assert count.min() > 5  # 15 expected of each


@given(seeds, st.integers(1, 3))
def test_a_limit_of_slices_is_fixed_for_the_run(seed: int, limit: int) -> None:
    bag = make_bag(np.random.default_rng(seed))
    limited = limit_slices(bag, limit, seed=7)
    assert limited.stain_sizes.tolist() == np.minimum(bag.stain_sizes, limit).tolist()
    assert limited.slices == limit_slices(bag, limit, seed=7).slices
    sizes = dict(zip(bag.slices, bag.slice_sizes, strict=True))
    assert limited.slice_sizes.tolist() == [sizes[name] for name in limited.slices]


@given(seeds, st.integers(1, 40), st.sampled_from(["random", "even", "entropy", "all"]))
def test_a_sample_has_its_size_and_no_patch_twice(seed: int, size: int, how: str) -> None:
    rng = np.random.default_rng(seed)
    bag = make_bag(rng)
    sample = sample_bag(bag, size, how, rng, rng.random(len(bag)))  # type: ignore[arg-type]
    assert len(sample) == (len(bag) if how == "all" else min(size, len(bag)))
    assert len(set(sample.rows)) == len(sample)
    assert sorted(sample.rows) == list(sample.rows)


@given(seeds, st.integers(1, 40))
def test_an_even_sample_takes_as_many_of_each_slice(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    bag = make_bag(rng)
    sample = sample_bag(bag, size, "even", rng)
    taken = dict.fromkeys(bag.slices, 0) | dict(zip(sample.slices, sample.slice_sizes, strict=True))
    # A slice that gave less than another by two or more has given all it has.
    for name, had in zip(bag.slices, bag.slice_sizes, strict=True):
        assert taken[name] >= max(taken.values()) - 1 or taken[name] == had


def test_entropy_draws_what_has_more_of_it_more_often_and_blanks_last() -> None:
    rng = np.random.default_rng(0)
    bag = make_bag(rng, stains=(0,), slices=(1, 1), patches=(10, 10))
    entropy = np.array([0, np.nan, 1, 1, 1, 1, 4, 4, 4, 4])
    count = np.zeros(10)
    for _ in range(400):
        count[sample_bag(bag, 4, "entropy", rng, entropy).rows] += 1
    assert count[:2].sum() == 0
    assert count[6:].min() > 1.5 * count[2:6].max()
    assert set(sample_bag(bag, 9, "entropy", rng, entropy).rows) >= set(range(2, 10))
    with pytest.raises(ValueError, match="needs the entropy"):
        sample_bag(bag, 4, "entropy", rng)


@given(seeds, st.integers(1, 6), st.sampled_from(["range", "stride", "slice"]))
def test_sub_cases_partition_the_patches(seed: int, n: int, by: str) -> None:
    bag = make_bag(np.random.default_rng(seed), label=1)
    parts = sub_cases(bag, n, by)  # type: ignore[arg-type]
    assert sorted(row for part in parts for row in part.rows) == list(bag.rows)
    assert 1 <= len(parts) <= n
    assert all(part.label == 1 for part in parts)
    if n == 1:
        assert parts == [bag]
    elif by == "slice":
        assert sorted(name for part in parts for name in part.slices) == sorted(bag.slices)
    else:
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert len({part.case_id for part in parts}) == len(parts)
