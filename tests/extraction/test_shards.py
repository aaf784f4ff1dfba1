from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import ConfigError
from featstore.extraction.shards import Shard, in_shard, parse_shard


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 10**6)), min_size=1),
    st.integers(1, 6),
)
def test_every_slice_is_in_exactly_one_share(rows: list[tuple[int, int, int]], count: int) -> None:
    table = pd.DataFrame(
        {"case_id": [str(r[0]) for r in rows], "stain": "x", "slice_id": [str(r[1]) for r in rows]}
    )
    sizes = np.array([r[2] for r in rows], np.int64)
    shares = np.stack([in_shard(table, sizes, Shard(i, count)) for i in range(count)])
    assert (shares.sum(axis=0) == 1).all()
    slices = (table["case_id"] + "/" + table["slice_id"]).to_numpy()
    for name in set(slices):
        assert len({tuple(column) for column in shares[:, slices == name].T}) == 1
    # Greedy, largest first: no share is heavier than the mean and the largest slice together.
    load = shares @ sizes
    largest = max(sizes[slices == name].sum() for name in set(slices))
    assert load.max() <= sizes.sum() / count + largest


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
