"""Slices, stains and cases out of a table of patches, whatever their numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.inspect.tables import (
    AttentionTables,
    attention_tables,
    case_bounds,
    neutral,
    slice_equality,
    top_patches,
)

# Of every case its stains, of every stain the sizes of its slices. Ids sort otherwise as text than as
# numbers.
COHORTS = st.lists(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


def made(cohort: list[list[list[int]]], levels: bool, seed: int = 0) -> AttentionTables:
    rng, rows = np.random.default_rng(seed), []
    for c, stains in enumerate(cohort):
        of_stains = rng.dirichlet(np.ones(len(stains)))
        flat = iter(rng.dirichlet(np.ones(sum(map(sum, stains)))))
        for t, slices in enumerate(stains):
            of_slices = rng.dirichlet(np.ones(len(slices)))
            for s, size in enumerate(slices):
                own = rng.dirichlet(np.ones(size))
                for p in range(size):
                    row = {
                        "case_id": str(9 + c),
                        "stain": f"stain{t}",
                        "slice_id": f"match_{s + 9}",
                        "patch": p + 9,
                    }
                    row["path"] = f"{c}/{t}/{s}/{p}.png"
                    if levels:
                        row |= {"slice_attention": of_slices[s], "stain_attention": of_stains[t]}
                    row["effective_attention"] = (
                        own[p] * of_slices[s] * of_stains[t] if levels else next(flat)
                    )
                    rows.append(row)
    cases = pd.DataFrame({"case_id": [str(9 + c) for c in range(len(cohort))]})
    cases = cases.assign(true_label="a", predicted_label="b", correct=0)
    return attention_tables(pd.DataFrame(rows), cases)


@settings(max_examples=30, deadline=None)
@given(COHORTS, st.booleans(), st.integers(0, 99))
def test_shares_are_those_of_their_members_and_sum_to_one(cohort: list, levels: bool, seed: int) -> None:
    tables = made(cohort, levels, seed)
    np.testing.assert_allclose(tables.sums, 1)
    by = tables.patches.groupby(["case_id", "stain", "slice_id"], sort=False)["effective_attention"]
    np.testing.assert_allclose(tables.slices["effective_attention"], by.sum().to_numpy())
    np.testing.assert_array_equal(tables.slices["patches"], by.size().to_numpy())
    for frame, column, within in (
        (tables.slices, "slice_attention", ["case_id", "stain"]),
        (tables.slices, "uniform", ["case_id", "stain"]),
        (tables.stains, "stain_attention", ["case_id"]),
        (tables.stains, "uniform", ["case_id"]),
    ):
        np.testing.assert_allclose(frame.groupby(within, sort=False)[column].sum(), 1)
    product = tables.slices.merge(tables.stains, on=["case_id", "stain"])
    np.testing.assert_allclose(
        product["slice_attention"] * product["stain_attention"], tables.slices["effective_attention"]
    )


@settings(max_examples=20, deadline=None)
@given(COHORTS, st.booleans())
def test_equal_shares_are_of_members_or_of_patches(cohort: list, levels: bool) -> None:
    tables = made(cohort, levels)
    slices, stains = iter(tables.slices["uniform"]), iter(tables.stains["uniform"])
    for of_case in cohort:
        total = sum(map(sum, of_case))
        for sizes in of_case:
            assert next(stains) == pytest.approx(1 / len(of_case) if levels else sum(sizes) / total)
            for size in sizes:
                assert next(slices) == pytest.approx(1 / len(sizes) if levels else size / sum(sizes))


@settings(max_examples=20, deadline=None)
@given(COHORTS, st.booleans())
def test_cases_apart_are_the_whole_again(cohort: list, levels: bool) -> None:
    tables = made(cohort, levels)
    each = list(tables.each())
    for name in ("cases", "patches", "slices", "stains"):
        pd.testing.assert_frame_equal(
            pd.concat([getattr(one, name) for one in each]), getattr(tables, name)
        )
    assert [len(one.patches) for one in each] == [sum(map(sum, of_case)) for of_case in cohort]
    assert tables.cases["patches"].tolist() == np.diff(case_bounds(tables.patches)).tolist()
    assert tables.cases["slices"].tolist() == [sum(map(len, of_case)) for of_case in cohort]
    assert tables.cases["stains"].tolist() == [len(of_case) for of_case in cohort]
    for one in each:
        a = one.patches["effective_attention"].to_numpy()
        expected = np.exp(-(a[a > 0] * np.log(a[a > 0])).sum())
        assert one.cases["effective_patches"].item() == pytest.approx(expected)


def test_attention_that_is_all_zero_in_a_slice_gives_no_nan() -> None:
    patches = pd.DataFrame(
        {"case_id": "1", "stain": ["a", "a", "b"], "slice_id": ["x", "y", "x"], "patch": 1}
    )
    patches = patches.assign(path="p", effective_attention=[0.0, 0.0, 1.0])
    cases = pd.DataFrame({"case_id": ["1"], "true_label": "a", "predicted_label": "a", "correct": 1})
    tables = attention_tables(patches, cases)
    assert tables.slices["slice_attention"].tolist() == [0, 0, 1]
    assert tables.cases["effective_patches"].item() == 1
    equality = slice_equality(tables).set_index("stain")
    assert equality.loc["a", "effective_slices"] == 1
    assert np.isnan(equality.loc["b", "normalized_entropy"])


@pytest.mark.parametrize(("percent", "count"), [(5, 1), (20, 4), (100, 20), (0.01, 1), (25.1, 6)])
def test_so_many_percent_of_a_case_are_rounded_up(percent: float, count: int) -> None:
    top = top_patches(made([[[4, 4, 4], [4, 4]]], True), percent)
    assert len(top) == count
    assert top["effective_attention"].is_monotonic_decreasing


def test_neutral_is_what_is_near_equal_probabilities() -> None:
    table = pd.DataFrame({"alone_a": [0.9, 0.35, 0.5, 0.69], "alone_b": [0.1, 0.65, 0.5, 0.31]})
    assert neutral(table, ["alone_a", "alone_b"]).index.tolist() == [2, 1, 3]
