from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import ConfigError
from featstore.extraction.shards import Shard, in_shard, parse_shard


def table(slices: list[tuple[int, int]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "case_id": [str(case) for case, _ in slices],
            "stain": "x",
            "slice_id": [str(s) for _, s in slices],
        }
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1), st.integers(1, 6), st.data())
def test_a_slice_is_in_one_share_whatever_else_is_there(
    slices: list, count: int, data: st.DataObject
) -> None:
    shares = np.stack([in_shard(table(slices), Shard(i, count)) for i in range(count)])
    assert (shares.sum(axis=0) == 1).all()
    home = {key: int(shares[:, i].argmax()) for i, key in enumerate(slices)}
    assert all(home[key] == int(shares[:, i].argmax()) for i, key in enumerate(slices))
    # Files that come or go between the starts of two tasks move no other slice.
    kept = data.draw(st.permutations(slices))[: len(slices) // 2 + 1]
    again = np.stack([in_shard(table(kept), Shard(i, count)) for i in range(count)])
    assert [int(again[:, i].argmax()) for i in range(len(kept))] == [home[key] for key in kept]


def test_shares_of_many_slices_are_about_equal() -> None:
    slices = [(case, s) for case in range(100) for s in range(15)]
    sizes = [int(in_shard(table(slices), Shard(i, 8)).sum()) for i in range(8)]
    assert max(sizes) < 1.25 * 1500 / 8


def test_shares_are_written_as_index_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_shard(None) == Shard(0, 1)
    assert parse_shard("2/4") == Shard(2, 4)
    with pytest.raises(ConfigError, match="no share 4 of 4"):
        parse_shard("4/4")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(ConfigError, match="array"):
        parse_shard("auto/4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert parse_shard("auto/4") == Shard(3, 4)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    monkeypatch.setenv("SGE_TASK_ID", "undefined")  # SGE, outside an array
    monkeypatch.setenv("LSB_JOBINDEX", "0")  # LSF, outside an array
    with pytest.raises(ConfigError, match="array"):
        parse_shard("auto/4")
    monkeypatch.setenv("SGE_TASK_ID", "4")  # SGE counts from 1
    assert parse_shard("auto/4") == Shard(3, 4)
