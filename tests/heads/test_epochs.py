"""Which cases and stains an epoch of training sees: stain dropout and balanced classes."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.bags import Bag, collate
from featstore.errors import ConfigError
from featstore.resident import CaseBags
from heads.training.data import TrainingBags, balanced, drop_stains
from tests.heads.bags import make_bag, nested
from tests.heads.planted import LABELS, NAMES, SPLIT, Spy, make_bags, make_config, make_training, same_bits

seeds = st.integers(0, 2**32 - 1)
STAINS = (0, 2, 5)
RARE = SPLIT.train[1::2][:2]  # what is left of class 1 where it is to be rare
UNEQUAL = tuple(case for case in SPLIT.train if LABELS[case] == 0 or case in RARE)


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("epochs") / "store")


def epochs(bags: CaseBags, count: int = 3, cases: tuple[str, ...] = SPLIT.train, **given: object) -> list:
    """The bags of some epochs."""
    data = TrainingBags(bags, cases, make_config(**given).train, NAMES)
    return [data.epoch(number) for number in range(count)]


def drawn(found: list[list[Bag]]) -> list[list[tuple[str, list[int]]]]:
    return [[(bag.case_id, bag.rows.tolist()) for bag in epoch] for epoch in found]


def case_of(bag: Bag) -> str:
    return bag.case_id.split("#")[0]


# Stain dropout


@given(seeds, st.floats(0, 1), st.integers(1, 3))
def test_whole_stains_go_and_what_is_left_is_a_bag(seed: int, p: float, stains: int) -> None:
    rng = np.random.default_rng(seed)
    bag = make_bag(rng, stains=STAINS[:stains])
    left = drop_stains(bag, p, rng)
    assert 1 <= len(left.stains) <= stains
    whole = dict(zip(bag.stains, nested(bag), strict=True))
    for name, slices in zip(left.stains, nested(left), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(slices, whole[name], strict=True))
    ids = dict(zip(bag.stains, bag.stain_ids, strict=True))
    assert left.stain_ids.tolist() == [ids[name] for name in left.stains]
    assert len(left.slices) == left.stain_sizes.sum() == len(left.slice_sizes)
    assert np.array_equal(bag.features[np.searchsorted(bag.rows, left.rows)], left.features)
    batch = collate([left, bag])
    assert batch.case_patch_offsets.tolist() == [0, len(left), len(left) + len(bag)]
    assert (left.case_id, left.label) == (bag.case_id, bag.label)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.8, 1.0])
def test_stains_go_with_their_probability_and_each_is_as_likely_to_stay(p: float) -> None:
    rng = np.random.default_rng(0)
    bag, count = make_bag(rng, stains=STAINS), 4000
    kept = [frozenset(drop_stains(bag, p, rng).stains) for _ in range(count)]
    found, names = Counter(kept), bag.stains
    alone = p**2 * (1 - p) + p**3 / 3  # the others go, or all would and it is drawn
    want = {frozenset(names): (1 - p) ** 3, **{frozenset({name}): alone for name in names}}
    want |= {frozenset(names) - {name}: p * (1 - p) ** 2 for name in names}
    assert sum(want.values()) == pytest.approx(1)
    for stains, share in want.items():
        assert found[stains] / count == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / count))


@pytest.mark.parametrize(
    "other",
    [
        {"per_slice_cap": 2},
        {"sampling": "random", "bag_size": 5},
        {"sub_cases": {"n": 2, "by": "stride"}},
        {"sub_cases": {"n": 3, "by": "slice", "classes": ["malignant"]}},
        {"case_sampling": "balanced"},
    ],
    ids=str,
)
def test_stains_are_dropped_afresh_in_every_epoch_and_by_the_seed_alone(
    bags: CaseBags, other: dict
) -> None:
    found = epochs(bags, stain_dropout=0.5, **other)
    assert drawn(found) == drawn(epochs(bags, stain_dropout=0.5, **other))
    assert drawn(found) != drawn(epochs(bags, stain_dropout=0.5, seed=7, **other))
    assert len({str(sorted(epoch)) for epoch in drawn(found)}) == 3
    several = [bag for epoch in found for bag in epoch if len(bags.outlines[case_of(bag)].stains) > 1]
    some = [bag for bag in several if len(bag.stains) < len(bags.outlines[case_of(bag)].stains)]
    assert 0 < len(some) < len(several) or "sub_cases" in other
    for bag in (bag for epoch in found for bag in epoch):
        collate([bag])
        assert set(bag.rows) <= set(bags.outlines[case_of(bag)].rows)
        assert len(bag) == bag.slice_sizes.sum()


def slice_sizes(bag: Bag) -> dict[str, np.ndarray]:
    """Patches of every slice, by stain."""
    parts = np.split(bag.slice_sizes, np.cumsum(bag.stain_sizes)[:-1])
    return dict(zip(bag.stains, parts, strict=True))


def test_caps_and_samples_are_of_the_stains_that_stay(bags: CaseBags) -> None:
    (capped,) = epochs(bags, 1, stain_dropout=1.0, per_slice_cap=3)
    (sampled,) = epochs(bags, 1, stain_dropout=1.0, sampling="random", bag_size=6)
    for bag in capped:
        there = slice_sizes(bags.outlines[bag.case_id])[bag.stains[0]]
        assert bag.slice_sizes.tolist() == np.minimum(there, 3).tolist()
    for bag in sampled:
        assert len(bag) == min(6, slice_sizes(bags.outlines[bag.case_id])[bag.stains[0]].sum())
    assert {len(bag.stains) for bag in capped + sampled} == {1}


@pytest.mark.parametrize("given", [{"stain_dropout": 0.6}, {"case_sampling": "balanced"}], ids=str)
def test_they_act_in_training_alone_and_resume(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch, given: dict
) -> None:
    config = make_config(epochs=3, patch_budget=1, patience=None, **given)
    training, states = make_training(bags, config), list[dict]()
    with monkeypatch.context() as patch:
        spy = Spy(training, patch)
        training.run(lambda t: states.append(copy.deepcopy(t.state())))
    watched = spy.batches(training=False)
    assert [batch.case_ids[0] for batch in watched] == [*SPLIT.val] * 3
    for batch in watched:
        assert batch.rows.tolist() == bags.outlines[batch.case_ids[0]].rows.tolist()
    resumed = make_training(bags, config)
    resumed.load_state(states[0])
    resumed.run()
    assert same_bits(resumed.head.state_dict(), training.head.state_dict())


# Balanced classes


@given(seeds, st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_every_class_comes_as_often_as_every_other(seed: int, labels: list[int]) -> None:
    chosen = balanced(labels, np.random.default_rng(seed))
    assert len(chosen) == len(labels)
    times = np.bincount(chosen, minlength=len(labels))
    of_class = {c: [int(times[i]) for i, label in enumerate(labels) if label == c] for c in set(labels)}
    shares = [sum(each) for each in of_class.values()]
    assert max(shares) - min(shares) <= 1
    assert all(max(each) - min(each) <= 1 for each in of_class.values())


def test_what_cannot_be_equal_in_an_epoch_is_so_over_many() -> None:
    labels, rng = [0] * 7 + [1] * 3 + [3], np.random.default_rng(0)  # 11 cases: 4 + 4 + 3
    times = sum(np.bincount(balanced(labels, rng), minlength=11) for _ in range(3000)) / 3000
    want = np.repeat([11 / 3 / 7, 11 / 3 / 3, 11 / 3], (7, 3, 1))
    np.testing.assert_allclose(times, want, rtol=0.05)


def test_an_epoch_has_as_many_bags_as_cases_half_of_them_rare(bags: CaseBags) -> None:
    found = epochs(bags, 40, UNEQUAL, case_sampling="balanced", per_slice_cap=2)
    frequent: Counter[str] = Counter()
    for epoch in found:
        assert len(epoch) == len(UNEQUAL) == 8
        times = Counter(bag.case_id for bag in epoch)
        assert [times[case] for case in RARE] == [2, 2]
        frequent.update(case for case in times if case not in RARE)
        assert max(times[case] for case in times if case not in RARE) == 1
        twice = [bag.rows.tolist() for bag in epoch if bag.case_id == RARE[0]]
        assert len(twice) == 2
    assert len(frequent) == 6  # each has its turn
    assert any(  # a case that comes twice has a sample of its own each time
        len({tuple(bag.rows) for bag in epoch if bag.case_id == RARE[0]}) == 2 for epoch in found
    )
    assert len({tuple(bag.case_id for bag in epoch) for epoch in found}) > 30
    again = epochs(bags, 40, UNEQUAL, case_sampling="balanced", per_slice_cap=2)
    assert drawn(found) == drawn(again)


def test_sub_cases_are_what_is_balanced(bags: CaseBags) -> None:
    sub = {"n": 3, "by": "range", "classes": ["malignant"]}
    for epoch in epochs(bags, 3, UNEQUAL, case_sampling="balanced", sub_cases=sub):
        labels = Counter(bag.label for bag in epoch)
        assert set(labels.values()) == {6}  # 6 + 2 × 3 bags
        assert len({bag.case_id for bag in epoch if bag.label == 1}) == 6


def test_classes_are_not_balanced_twice(bags: CaseBags) -> None:
    config = make_config(case_sampling="balanced", use_class_weights=True)
    with pytest.raises(ConfigError, match="balanced twice") as error:
        make_training(bags, config)
    for part in ("expected: ", "where: train.class_weights", "--case-sampling all"):
        assert part in str(error.value)
    given = make_config(case_sampling="balanced", use_class_weights=True, class_weights=[1.0, 2.0])
    weights = make_training(bags, given).class_weights
    assert weights is not None
    assert weights.tolist() == [1.0, 2.0]


def test_views_are_drawn_for_every_coming_of_a_case(tmp_path: Path) -> None:
    data = TrainingBags(
        make_bags(tmp_path / "store"), UNEQUAL, make_config(case_sampling="balanced").train, NAMES
    )
    data._views = 3
    epoch = data.epoch(0)
    first, second = (bag.view for bag in epoch if bag.case_id == RARE[0])
    assert first is not None
    assert second is not None
    assert first.tolist() != second.tolist()
