"""The column `views`: what a store with augmented views holds, and that others are as they were."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from featstore.errors import StoreDamaged, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store import Slice, Store, StoreWriter
from featstore.store.parts import encode
from featstore.store.repair import repair
from featstore.store.verify import verify
from tests.store.builders import DIM, make_slice, make_spec
from tests.store.damage import flip, part_of, payload, rewrite

GOLDEN = Path(__file__).parent / "golden"
FORMATS = pytest.mark.parametrize("file_format", ["hdf5", "zarr"])
COUNT = 4
SPEC = make_spec().with_views(COUNT, 3, "test")


def with_views(item: Slice) -> Slice:
    """A slice whose views follow from its features."""
    factors = np.arange(2, COUNT + 1, dtype=np.float16)[None, :, None]
    return replace(item, columns={**item.columns, "views": item.columns["features"][:, None] / factors})


def fill(path: Path, file_format: str = "hdf5") -> Path:
    writer = StoreWriter(path, SPEC, {}, file_format)
    for case in ("1", "2"):
        writer.commit(case, [with_views(make_slice(case, s, "match_1", [1, 4, 9])) for s in ("a", "b")])
    return path


def kinds(path: Path) -> set[str]:
    return {finding.kind for finding in verify(path, "full").damage}


@FORMATS
def test_views_come_back_in_the_order_of_the_bag(tmp_path: Path, file_format: str) -> None:
    store = Store.open(fill(tmp_path / "store", file_format))
    for case in store.cases():
        views = store.views(case)
        assert (views.shape, views.dtype) == ((6, COUNT - 1, DIM), np.float16)
        for number in range(COUNT - 1):
            assert np.array_equal(
                views[:, number], store.bag(case).features / np.float16(number + 2), equal_nan=True
            )


@FORMATS
def test_rows_of_several_parts_and_dead_ones_leave_views_in_order(tmp_path: Path, file_format: str) -> None:
    path = fill(tmp_path / "store", file_format)
    writer = StoreWriter(path, SPEC, {}, file_format)
    writer.commit("1", [with_views(make_slice("1", "a", "match_1", [2, 4], version=1))])
    store = Store.open(path)
    assert store.outline("1").patches.tolist() == [1, 2, 4, 9, 1, 4, 9]
    factors = np.arange(2, COUNT + 1, dtype=np.float16)[None, :, None]
    assert np.array_equal(store.views("1"), store.bag("1").features[:, None] / factors, equal_nan=True)


@pytest.mark.parametrize(
    "views",
    [
        None,
        np.zeros((3, COUNT, DIM), np.float16),
        np.zeros((2, COUNT - 1, DIM), np.float16),
        np.zeros((3, COUNT - 1, DIM), np.float32),
    ],
    ids=["none", "too many", "a row too few", "another dtype"],
)
def test_views_that_are_not_what_the_store_says_are_not_written(
    tmp_path: Path, views: np.ndarray | None
) -> None:
    item = make_slice("1", "a", "match_1", [1, 2, 3])
    if views is not None:
        item = replace(item, columns={**item.columns, "views": views})
    writer = StoreWriter(tmp_path / "store", SPEC, {})
    with pytest.raises(StoreError, match="views of the shape"):
        writer.commit("1", [item])
    assert Store.open(tmp_path / "store").cases() == []


@FORMATS
def test_verify_finds_a_missing_column(tmp_path: Path, file_format: str) -> None:
    path = fill(tmp_path / "store", file_format)
    record = Store.open(path).record("1")
    file = part_of(path, "1")
    plain = [make_slice("1", s, "match_1", [1, 4, 9]) for s in ("a", "b")]
    attributes = {"case_id": "1", "fingerprint": SPEC.fingerprint, "format": "featstore 1.3"}
    attributes |= {
        "spec": json.dumps(SPEC.to_json()),
        "provenance": "{}",
        "created": "2026-01-01T00:00:00Z",
    }
    data, _ = encode(file_format, plain, attributes)
    file.write_bytes(data)
    part = replace(record.parts[0], size=len(data), sha256=hashlib.sha256(data).hexdigest())
    rewrite(path, "1", (part,))
    report = verify(path, "full")
    assert "column-missing" in {finding.kind for finding in report.damage}
    assert any("has no column views" in str(finding) for finding in report.damage)
    with pytest.raises(StoreDamaged):
        Store.open(path).views("1")
    assert len(Store.open(path).bag("1")) == 6  # the plain ones are there


def views_bytes(part: Path) -> int:
    """A byte of the views' values."""
    if part.suffix == ".h5":
        with h5py.File(part, "r") as file:
            return int(file["a/match_1/views"].id.get_chunk_info(0).byte_offset)
    with zipfile.ZipFile(part) as archive:
        found = next(i for i in archive.infolist() if "a/match_1/views/c/" in i.filename)
        return found.header_offset + 30 + len(found.filename)


@FORMATS
def test_a_flipped_bit_in_views_is_found_and_never_read(tmp_path: Path, file_format: str) -> None:
    path = fill(tmp_path / "store", file_format)
    file = part_of(path, "2")
    at = views_bytes(file)
    assert any(at in span for span in payload(file))
    flip(file, at)
    assert kinds(path)
    with pytest.raises(StoreDamaged):
        Store.open(path).views("2")
    assert Store.open(path).views("1").shape == (6, COUNT - 1, DIM)


def test_views_that_are_not_finite_are_found(tmp_path: Path) -> None:
    path = fill(tmp_path / "store")
    item = with_views(make_slice("3", "a", "match_1", [1]))
    item.columns["features"][:] = 1.0
    item.columns["views"][:] = 1.0
    item.columns["views"][0, 1, 2] = np.inf
    StoreWriter(path, SPEC, {}).commit("3", [item])
    assert any(f.kind == "not-finite" and "3" in str(f) for f in verify(path, "full").damage)


@FORMATS
def test_repair_makes_the_description_anew_with_its_views(tmp_path: Path, file_format: str) -> None:
    path = fill(tmp_path / "store", file_format)
    before = Store.open(path).views("1").tobytes()
    (path / "featstore.json").unlink()
    repair(path, apply=True)
    store = Store.open(path)
    assert store.spec == SPEC
    assert store.views("1").tobytes() == before


# Stores without views are as they were


def test_the_fingerprint_of_a_store_without_views_is_that_of_before() -> None:
    told = json.loads((GOLDEN / "1.0" / "featstore.json").read_text())
    assert told["fingerprint"] == "5d170a44e9b6ff50334d111017b429f1"
    assert make_spec().fingerprint == told["fingerprint"]
    assert EmbeddingSpec.from_json(told["spec"], "here").fingerprint == told["fingerprint"]
    assert make_spec().to_json() == told["spec"]


def test_old_stores_have_plain_views_only() -> None:
    store = Store.open(GOLDEN / "1.0")
    assert (store.spec.views, store.spec.plain) == (1, store.spec)
    case = store.cases()[0]
    assert store.views(case).shape == (len(store.bag(case)), 0, store.spec.dim)


def test_a_store_without_views_says_nothing_of_them(tmp_path: Path) -> None:
    spec = make_spec().with_views(1, 9, "test")
    assert spec == make_spec()
    StoreWriter(tmp_path / "store", spec, {}).commit("1", [make_slice("1", "a", "match_1", [1])])
    assert "view" not in (tmp_path / "store" / "featstore.json").read_text()
    assert b"view" not in part_of(tmp_path / "store", "1").read_bytes()


def test_number_seed_and_policy_are_part_of_the_fingerprint() -> None:
    others = [
        SPEC.plain,
        *(make_spec().with_views(*v) for v in ((5, 3, "test"), (4, 2, "test"), (4, 3, ""))),
    ]
    assert len({spec.fingerprint for spec in [SPEC, *others]}) == 5
    assert SPEC.plain.fingerprint == make_spec().fingerprint
    assert EmbeddingSpec.from_json(SPEC.to_json(), "here") == SPEC
    assert SPEC.rows() == {"features": (DIM,), "views": (COUNT - 1, DIM)}
    assert make_spec().rows() == {"features": (DIM,)}


def test_a_seed_of_zero_comes_back() -> None:
    spec = make_spec().with_views(2, 0, "test")
    assert "view_seed" not in spec.to_json()
    assert EmbeddingSpec.from_json(json.loads(json.dumps(spec.to_json())), "here") == spec
