from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from featstore.cohort.splits import Split, make_splits, read_split, write_splits
from featstore.errors import CohortError

CASES = {str(i): int(i % 3 == 0) for i in range(1, 78)}


@given(st.integers(0, 10**6), st.integers(3, 8))
def test_folds_are_disjoint_stratified_and_each_case_is_tested_once(seed: int, folds: int) -> None:
    splits = make_splits(CASES, {}, folds, seed)
    assert len(splits) == folds
    assert Counter(case for split in splits for case in split.test) == Counter(dict.fromkeys(CASES, 1))
    for k, split in enumerate(splits):
        assert sorted(split.train + split.val + split.test) == sorted(CASES)
        assert split.val == splits[(k + 1) % folds].test
        for label in (0, 1):
            total = sum(v == label for v in CASES.values())
            assert abs(sum(CASES[case] == label for case in split.test) - total / folds) <= 1


@given(st.integers(0, 10**6), st.lists(st.integers(0, 30), min_size=60, max_size=60))
def test_groups_never_part(seed: int, members: list[int]) -> None:
    labels = {str(i): i % 2 for i in range(60)}
    # Groups of both classes too: pseudo-cases of one patient need not agree.
    groups = {str(i): f"g{group}" for i, group in enumerate(members) if group < 20}
    try:
        splits = make_splits(labels, groups, 4, seed)
    except CohortError:  # too few groups of a class are left
        reject()
    for split in splits:
        homes: dict[str, set[str]] = {}
        for name, ids in split.parts().items():
            for case in ids:
                homes.setdefault(groups.get(case, case), set()).add(name)
        assert all(len(names) == 1 for names in homes.values())


def test_without_folds_it_is_60_20_20() -> None:
    (split,) = make_splits({str(i): i % 2 for i in range(100)}, {}, None, 0)
    assert [len(part) for part in split.parts().values()] == [60, 20, 20]


def test_the_same_seed_gives_the_same_splits_in_any_order_of_cases() -> None:
    turned = dict(reversed(list(CASES.items())))
    assert make_splits(CASES, {}, 5, 1) == make_splits(turned, {}, 5, 1)
    assert make_splits(CASES, {}, 5, 1) != make_splits(CASES, {}, 5, 2)


def test_more_folds_than_cases_of_a_class() -> None:
    with pytest.raises(CohortError, match="class 1 has 2 cases"):
        make_splits({"1": 0, "2": 0, "3": 0, "4": 1, "5": 1}, {}, 3, 0)
    with pytest.raises(CohortError, match="no cases"):
        make_splits({}, {}, 3, 0)


@pytest.mark.parametrize("prefix", ["", "case-"])
def test_files_come_back(tmp_path: Path, prefix: str) -> None:
    labels = {f"{prefix}{i}": i % 2 for i in range(1, 40)}
    splits = make_splits(labels, {}, 5, 0)
    paths = write_splits(splits, tmp_path)
    assert [path.name for path in paths] == [f"data_splits_{k:02d}.npz" for k in range(1, 6)]
    assert [read_split(path, list(labels), {})[0] for path in paths] == splits
    with np.load(paths[0], allow_pickle=False) as file:
        assert file["train_cases"].dtype.kind == ("U" if prefix else "i")
    with pytest.raises(CohortError, match="already"):
        write_splits(splits, tmp_path)


def save(path: Path, **changes: object) -> Path:
    arrays = {"train_cases": [1, 2], "val_cases": [3], "test_cases": [4]}
    np.savez(path, **{k: np.array(v) for k, v in {**arrays, **changes}.items() if v is not None})
    return path


COHORT = ["1", "2", "3", "4", "5"]


def test_a_good_file_and_the_cases_it_leaves_out(tmp_path: Path) -> None:
    split, missing = read_split(save(tmp_path / "a.npz", val_cases=["003"]), COHORT, {})
    assert split == Split(("1", "2"), ("3",), ("4",))
    assert missing == ["5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_cases": [2, 3]}, "in two parts, or twice: 2"),
        ({"test_cases": [4, 99]}, "not in the cohort: 99"),
        ({"val_cases": np.empty(0, np.int64)}, "val_cases is empty"),
        ({"val_cases": None}, "lack val_cases"),
        ({"val_cases": np.array([{"a": 1}], object)}, "Python objects"),
        ({"val_cases": [1.5]}, "float64"),
        ({"val_cases": [[3]]}, "shape"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    path = save(tmp_path / "bad.npz", **changes)
    with pytest.raises(CohortError, match=message) as error:
        read_split(path, COHORT, {})
    assert str(path) in str(error.value)


def test_a_parted_group_is_named(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="groups are parted: patient"):
        read_split(save(tmp_path / "a.npz"), COHORT, {"1": "patient", "3": "patient"})


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"hello", None])
def test_other_files_are_refused(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "x.npz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CohortError, match="cannot be read"):
        read_split(path, COHORT, {})
