import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import StoreError
from featstore.store.ids import component

HOSTILE = [
    "..",
    ".",
    "../x",
    "/abs",
    "a\nb",
    "CON",
    "con",
    "nul.txt",
    "=cmd",
    "ü" * 200,
    "a" * 255,
    "~",
]


@given(st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_a_component_is_safe_and_short(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        with pytest.raises(StoreError):
            component(text)
        return
    name = component(text)
    assert re.fullmatch(r"[A-Za-z0-9%&~_.-]{1,97}", name)
    assert not name.startswith(".")
    assert not name.endswith(".")


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120),
        min_size=2,
        max_size=8,
        unique=True,
    )
)
def test_different_ids_never_share_a_component_even_if_case_is_ignored(ids: list[str]) -> None:
    assert len({component(text).lower() for text in ids}) == len(ids)


@given(st.text("abcxyz019-_&+ é", min_size=1, max_size=10))
def test_lower_case_ids_can_be_read_back_from_the_component(text: str) -> None:
    if "~" not in component(text):
        assert unquote(component(text)) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_ids_stay_inside(text: str, tmp_path) -> None:
    path = tmp_path / component(text)
    assert path.resolve().parent == tmp_path.resolve()
    path.mkdir()


def test_ordinary_ids_stay_readable() -> None:
    assert component("38") == "38"
    assert component("unmatched_1") == "unmatched_1"
    assert component("h&e") == "h&e"
    assert component("TCGA-AA").startswith("TCGA-AA~")


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(StoreError, match="empty"):
        component("")
