"""The cases that trials are judged on: never those that are tested on, and each validated on once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.cohort.splits import Split, make_splits
from featstore.errors import ConfigError
from heads.tuning.folds import check_folds, inner_folds

NAMES = ("benign", "malignant", "other")


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, str]]:
    """Cases of two or three classes, ten and more of each; some of one class in groups of two."""
    classes = draw(st.integers(2, 3))
    sizes = draw(st.lists(st.integers(10, 18), min_size=classes, max_size=classes))
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    order = draw(st.permutations(range(len(labels))))
    by_case = {f"{number}": labels[number] for number in order}
    paired = draw(st.integers(0, 4))
    groups = {str(number): f"patient {number // 2}" for number in range(paired * 2)}
    return by_case, groups


@settings(max_examples=40)
@given(cohorts(), st.integers(1, 4), st.integers(0, 1000))
def test_no_test_case_of_an_outer_fold_is_in_an_inner_one(
    cohort: tuple[dict[str, int], dict[str, str]], count: int, seed: int
) -> None:
    labels, groups = cohort
    for outer in make_splits(labels, groups, 3, seed):
        pool = {*outer.train, *outer.val}
        splits = inner_folds(outer, labels, groups, count, seed + 1, NAMES)
        assert len(splits) == count
        for split in splits:
            train, val = set(split.train), set(split.val)
            assert not (train | val) & set(outer.test)
            assert split.test == ()
            assert train | val == pool
            assert not train & val
            homes = [{groups[case] for case in part if case in groups} for part in (train, val)]
            assert not homes[0] & homes[1]
        if count > 1:
            assert sorted(case for split in splits for case in split.val) == sorted(pool)
            if not groups:
                per_fold = [
                    sum(labels[case] == label for case in split.val) for split in splits for label in (0,)
                ]
                assert max(per_fold) - min(per_fold) <= 1


def test_one_inner_fold_is_the_outer_split_itself() -> None:
    outer = Split(("1", "2", "3"), ("4", "5"), ("6",))
    labels = dict(zip("123456", (0, 1, 0, 1, 0, 1), strict=True))
    assert inner_folds(outer, labels, {}, 1, 0, NAMES) == [Split(outer.train, outer.val, ())]


def test_the_same_seed_gives_the_same_folds() -> None:
    labels = {str(number): number % 2 for number in range(30)}
    (outer, *_) = make_splits(labels, {}, 3, 0)
    first, again, other = (inner_folds(outer, labels, {}, 3, seed, NAMES) for seed in (1, 1, 2))
    assert first == again != other


def test_a_class_that_is_too_small_is_named_with_what_to_do() -> None:
    labels = {str(number): int(number in (0, 1, 20)) for number in range(25)}
    outer = Split(
        tuple(map(str, range(12))), tuple(map(str, range(12, 18))), tuple(map(str, range(18, 25)))
    )
    with pytest.raises(ConfigError) as raised:
        inner_folds(outer, labels, {}, 3, 0, NAMES)
    text = str(raised.value)
    assert "class malignant has 2 cases" in text
    assert "--inner-folds 2" in text
    together = {"0": "one patient", "1": "one patient"}
    with pytest.raises(ConfigError, match="has 1 cases"):
        inner_folds(outer, labels, together, 2, 0, NAMES)


def test_the_auc_of_one_class_is_refused_before_any_trial() -> None:
    labels = {"1": 0, "2": 1, "3": 0, "4": 0, "5": 1}
    one_class = [Split(("1", "2"), ("3", "4"), ())]
    check_folds(one_class, labels, "val_loss", NAMES)
    with pytest.raises(ConfigError, match="validation cases of inner fold 0 are of benign"):
        check_folds(one_class, labels, "val_auc", NAMES)
    with pytest.raises(ConfigError, match="training cases of inner fold 0 are of benign"):
        check_folds([Split(("1", "3"), ("2", "4"), ())], labels, "val_loss", NAMES)
