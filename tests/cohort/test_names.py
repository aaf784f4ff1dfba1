from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.cohort.names import (
    check_id,
    integral,
    natural_key,
    natural_sorted,
    normalize_case,
    normalize_slice,
    stain_lookup,
)
from featstore.errors import CohortError, ConfigError

ANY = st.text(alphabet=st.characters(), max_size=12) | st.from_regex(r"[a0-9_²٣]{0,8}", fullmatch=True)


@given(ANY, ANY, ANY)
def test_natural_key_is_a_total_order(a: str, b: str, c: str) -> None:
    keys = [natural_key(text) for text in (a, b, c)]
    assert (keys[0] == keys[1]) == (a == b)
    assert (keys[0] < keys[1]) + (keys[1] < keys[0]) + (a == b) == 1
    low, mid, high = sorted(keys)
    assert low <= mid <= high
    assert low <= high


def test_natural_order() -> None:
    texts = ["patch10", "patch2", "02", "2", "x", "10", "", "patch2b", "9" * 5000]
    expected = ["", "02", "2", "10", "9" * 5000, "patch2", "patch2b", "patch10", "x"]
    assert natural_sorted(texts) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " a",
        "a\t",
        "a/b",
        "a\\b",
        "..",
        ".",
        "a..b",
        "a\0b",
        "a\nb",
        "\udc80",
        "x" * 201,
        "a\x85b",
        "a\u2028b",
    ],
)
def test_unsafe_ids_are_refused(text: str) -> None:
    with pytest.raises(CohortError, match="case id") as caught:
        check_id(text, "case", "labels.csv, line 3")
    assert caught.value.where == "labels.csv, line 3"
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("text", ["38", "a b", "é", "x" * 200, "a.b", "-1", "=1", "病例"])
def test_ordinary_ids_pass(text: str) -> None:
    check_id(text, "case", "here")


@pytest.mark.parametrize(
    ("text", "used"), [("038", "38"), ("000", "0"), ("38", "38"), ("0a", "0a"), ("٠٣", "٠٣")]
)
def test_normalize_case(text: str, used: str) -> None:
    assert normalize_case(text) == used


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("unmatched2", "unmatched_2"),
        ("match_01", "match_1"),
        ("match_0", "match_0"),
        ("s1", "s1"),
        ("match", "match"),
    ],
)
def test_normalize_slice(text: str, used: str) -> None:
    assert normalize_slice(text) == used


def test_integral() -> None:
    assert [integral(t) for t in ("1.0", "1", "1.5", "1.", "-2.00", "x.0")] == [
        "1",
        "1",
        "1.5",
        "1.",
        "-2",
        "x.0",
    ]


def test_stains() -> None:
    lookup = stain_lookup({"CD31": ["pecam"], "melan": ["mel"]})
    assert lookup["cd31"] == lookup["pecam"] == "CD31"
    assert lookup["mel"] == lookup["mart1"] == "melan"
    with pytest.raises(ConfigError, match="two stains, 'melan' and 'mart'"):
        stain_lookup({"mart": ["MART1"]})
    with pytest.raises(ConfigError, match="slash"):
        stain_lookup({"a/b": []})
