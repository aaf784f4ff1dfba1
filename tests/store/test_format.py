import dataclasses
import functools
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import StoreDamaged, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store.format import (
    Group,
    Part,
    Record,
    decode_manifest,
    decode_record,
    encode_manifest,
    encode_record,
    record_name,
    record_sequence,
)
from tests.store.builders import make_spec

ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
records = st.builds(
    Record,
    ids,
    st.integers(1, 10**8),
    st.just("f" * 32),
    st.just("2026-01-01T00:00:00+00:00"),
    ids,
    st.lists(
        st.builds(
            Part,
            st.just("0" * 32 + ".h5"),
            st.integers(0, 2**40),
            st.just("0" * 64),
            st.lists(st.builds(Group, ids, ids, st.integers(1, 99), st.just("1-9")), max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
)


@given(records)
def test_a_record_comes_back(record: Record) -> None:
    assert decode_record(encode_record(record), "here") == record


@given(records, st.data())
def test_any_changed_byte_is_noticed(record: Record, data: st.DataObject) -> None:
    raw = bytearray(encode_record(record))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StoreError):
        decode_record(bytes(raw), "here")


@given(records, st.data())
def test_any_truncation_is_noticed(record: Record, data: st.DataObject) -> None:
    raw = encode_record(record)
    with pytest.raises(StoreDamaged):
        decode_record(raw[: data.draw(st.integers(0, len(raw) - 1))], "here")


@given(st.integers(0, 10**9))
def test_record_names(number: int) -> None:
    assert record_sequence(record_name(number)) == number


@pytest.mark.parametrize(
    "name", ["1.json", "000001.json.tmp", ".000001.json", "abc.json", "000001", "٠٠٠٠٠١.json"]
)
def test_other_files_are_no_records(name: str) -> None:
    assert record_sequence(name) is None


def test_a_later_minor_version_may_add_fields() -> None:
    record = Record(
        "a", 1, "f" * 32, "now", "me", (Part("a" * 32 + ".h5", 1, "0" * 64, (Group("x", "s", 3, "1-3"),)),)
    )
    body = json.loads(encode_record(record))
    del body["sha256"]
    body["format"] = ["featstore", 1, 9]
    body["views"] = 4
    body["parts"][0]["codec"] = "none"
    body["parts"][0]["groups"][0]["views"] = 4
    assert decode_record(_signed(body), "here") == record
    body["format"] = ["featstore", 2, 0]
    with pytest.raises(StoreError, match=r"featstore 1\.x"):
        decode_record(_signed(body), "here")


def _signed(body: dict) -> bytes:
    canonical = functools.partial(json.dumps, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(canonical(body).encode()).hexdigest()
    return canonical({**body, "sha256": digest}).encode() + b"\n"


def test_the_manifest_comes_back() -> None:
    spec = make_spec(final_relu=True)
    assert decode_manifest(encode_manifest(spec), "here") == spec


def test_a_changed_manifest_is_noticed() -> None:
    raw = encode_manifest(make_spec()).replace(b'"pool": 1', b'"pool": 2')
    with pytest.raises(StoreDamaged, match="fingerprint"):
        decode_manifest(raw, "here")


@pytest.mark.parametrize(
    ("version", "accepted"), [([1, 0], True), ([1, 7], True), ([2, 0], False), ([0, 9], False)]
)
def test_minor_versions_are_read_and_major_ones_refused(version: list[int], accepted: bool) -> None:
    body = json.loads(encode_manifest(make_spec()))
    body["format"] = ["featstore", *version]
    raw = json.dumps(body).encode()
    if accepted:
        assert decode_manifest(raw, "here") == make_spec()
    else:
        with pytest.raises(StoreError, match=r"featstore 1\.x"):
            decode_manifest(raw, "here")


@pytest.mark.parametrize(
    "change", [{"name": "../../x.h5"}, {"name": "/etc/passwd"}, {"size": -1}, {"size": "1"}]
)
def test_a_record_that_signs_itself_cannot_name_what_it_likes(change: dict) -> None:
    part = {"name": "a" * 32 + ".h5", "size": 1, "sha256": "0" * 64, "groups": [], **change}
    body = {
        "format": ["featstore", 1, 0],
        "case_id": "a",
        "sequence": 1,
        "fingerprint": "f",
        "created": "now",
        "writer": "me",
        "parts": [part],
    }
    with pytest.raises(StoreDamaged):
        decode_record(_signed(body), "here")


def test_a_later_version_may_say_more_of_embeddings_unless_it_matters() -> None:
    body = json.loads(encode_manifest(make_spec()))
    body["spec"]["stain_normalization"] = None
    assert decode_manifest(json.dumps(body).encode(), "here") == make_spec()
    body["spec"]["stain_normalization"] = "macenko"
    with pytest.raises(StoreError, match="stain_normalization"):
        decode_manifest(json.dumps(body).encode(), "here")


def test_a_field_added_later_leaves_older_fingerprints_alone() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(EmbeddingSpec):
        mosaic: str = "none"

    old = make_spec()
    later = Later(**dataclasses.asdict(old))
    assert later.fingerprint == old.fingerprint
    assert Later.from_json(old.to_json(), "here") == later
    assert dataclasses.replace(later, mosaic="hex").fingerprint != old.fingerprint
