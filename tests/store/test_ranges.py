import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import StoreDamaged
from featstore.store.ranges import decode_ranges, encode_ranges


@given(st.sets(st.integers(0, 60) | st.integers(0, 2**63 - 1), max_size=40))
def test_round_trip(numbers: set[int]) -> None:
    array = np.array(sorted(numbers), np.int64)
    text = encode_ranges(array)
    assert np.array_equal(decode_ranges(text, len(array), "here"), array)


def test_runs_are_short() -> None:
    assert encode_ranges(np.array([1, 2, 3, 7, 9, 10])) == "1-3,7,9-10"


@pytest.mark.parametrize("text", ["1-", "3-1", "1,1", "5,2", "x", "1-3,2", "-4", "1 ", "0-99999999999999"])
def test_malformed_or_huge_ranges_are_refused(text: str) -> None:
    with pytest.raises(StoreDamaged, match="patch numbers"):
        decode_ranges(text, 100, "record")
