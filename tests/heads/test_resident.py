"""Embeddings in memory or read again: the same batches, bit by bit."""

from __future__ import annotations

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from featstore.bags import Bag
from featstore.errors import StoreError
from featstore.resident import CaseBags, memory_budget
from featstore.sampling import cap_slices, sample_bag, sub_cases
from featstore.store import Store, StoreWriter
from tests.heads.planted import CASES, DIM, LABELS, LONE, make_store, planted_slice
from tests.store.builders import make_spec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("resident") / "store")


@pytest.fixture(scope="module")
def resident(store: Store) -> CaseBags:
    return CaseBags(store, LABELS, 10**9)


@pytest.fixture(scope="module")
def reading(store: Store) -> CaseBags:
    return CaseBags(store, LABELS, 0)


def parts(outlines: dict[str, Bag]) -> dict[str, list[Bag]]:
    """Outlines as an epoch may ask for them."""
    rng = np.random.default_rng(0)
    some = [outlines[case] for case in ("5", LONE, "20", "1")]
    return {
        "whole": some,
        "capped": [cap_slices(bag, 2, rng) for bag in some],
        "sampled": [sample_bag(bag, 3, "random", rng) for bag in some],
        "one": [sample_bag(outlines["9"], 1, "random", rng)],
        "sub-cases": [part for bag in some for part in reversed(sub_cases(bag, 3, "stride"))],
        "cut by slice": sub_cases(outlines["12"], 2, "slice"),
    }


KINDS = ("whole", "capped", "sampled", "one", "sub-cases", "cut by slice")


@pytest.mark.parametrize("kind", KINDS)
def test_memory_changes_no_bit_of_a_batch(resident: CaseBags, reading: CaseBags, kind: str) -> None:
    assert (resident.resident is None, reading.resident is None) == (False, True)
    a = resident.batch(parts(resident.outlines)[kind])
    b = reading.batch(parts(reading.outlines)[kind])
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert a.features.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["resident", "reading"])
def test_a_batch_holds_the_features_of_its_rows(
    request: pytest.FixtureRequest, store: Store, kind: str, memory: str
) -> None:
    bags: CaseBags = request.getfixturevalue(memory)
    asked = parts(bags.outlines)[kind]
    batch = bags.batch(asked)
    by_row = {
        row: x
        for case in CASES
        for row, x in zip(store.bag(case).rows.tolist(), store.bag(case).features, strict=True)
    }
    assert batch.rows.tolist() == [row for bag in asked for row in bag.rows.tolist()]
    want = np.stack([by_row[row] for row in batch.rows.tolist()])
    assert np.array_equal(batch.features.numpy(), want)
    assert batch.case_ids == tuple(bag.case_id for bag in asked)
    assert batch.labels is not None
    assert batch.labels.tolist() == [LABELS[bag.case_id.split("#")[0]] for bag in asked]


def test_batches_leave_the_kept_embeddings_alone(resident: CaseBags) -> None:
    assert resident.resident is not None
    before = resident.resident.clone()
    batch = resident.batch(list(resident.outlines.values()))
    batch.features.zero_()
    assert torch.equal(resident.resident, before)


def test_features_of_a_case_are_its_bag(resident: CaseBags, reading: CaseBags, store: Store) -> None:
    for case in CASES:
        for bags in (resident, reading):
            assert np.array_equal(bags.features(case).numpy(), store.bag(case).features)


def test_some_cases_of_a_store_in_any_order(store: Store) -> None:
    labels = {case: LABELS[case] for case in ("14", LONE, "2")}
    bags = CaseBags(store, labels, 10**9)
    assert bags.resident is not None
    assert len(bags.resident) == sum(len(store.outline(case)) for case in labels)
    batch = bags.batch([bags.outlines["2"], bags.outlines["14"]])
    assert np.array_equal(
        batch.features.numpy(), np.concatenate([store.bag(c).features for c in ("2", "14")])
    )
    with pytest.raises(StoreError, match="no case 'nobody'"):
        CaseBags(store, {"nobody": 0}, 10**9)


def test_it_fits_to_the_byte(store: Store) -> None:
    size = sum(len(store.outline(case)) for case in CASES) * DIM * 2
    assert CaseBags(store, LABELS, size).resident is not None
    assert CaseBags(store, LABELS, size - 1).resident is None


def test_outlines_read_no_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a part was read")

    fresh = Store.open(store.path)
    monkeypatch.setattr("featstore.store.store.read_features", never)
    monkeypatch.setattr("featstore.store.store.read_columns", never)
    monkeypatch.setattr("featstore.store.hdf5.open_part", never)
    outlines = {case: fresh.outline(case) for case in LABELS}
    assert all(bag.features.shape == (len(bag.rows), 0) for bag in outlines.values())
    with pytest.raises(AssertionError, match="a part was read"):
        fresh.bag("1")


@pytest.mark.parametrize("memory", [10**9, 0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_embedding_that_is_not_finite_is_refused_by_its_file(
    tmp_path: Path, value: float, memory: int
) -> None:
    writer = StoreWriter(tmp_path / "store", make_spec(dim=DIM), {})
    good = np.ones((4, DIM), np.float16)
    bad = good.copy()
    bad[2, 5] = value
    writer.commit("8", [planted_slice("8", "h&e", "match_1", good)])
    writer.commit(
        "9", [planted_slice("9", "h&e", "match_1", good), planted_slice("9", "sox10", "u_2", bad)]
    )
    store = Store.open(writer.path)
    with pytest.raises(StoreError) as error:
        CaseBags(store, {"8": 0, "9": 1}, memory)
    assert "9_sox10_u_2_2_v0 is not finite" in str(error.value)
    assert "case 9, sox10, u_2" in error.value.where
    assert "exclude: [9]" in error.value.fix
    assert CaseBags(store, {"8": 0}, memory).batch([store.outline("8")]).features.isfinite().all()


@pytest.mark.parametrize("memory", [10**9, 0])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bad_row_is_named_beyond_the_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, memory: int
) -> None:
    monkeypatch.setattr("featstore.resident._BLOCK", 4)
    writer = StoreWriter(tmp_path / "store", make_spec(dim=DIM, stored_dtype=dtype), {})
    features = np.full((12, DIM), -np.finfo(dtype).max, dtype)
    features[9:, 0] = np.nan
    writer.commit("1", [planted_slice("1", "h&e", "match_1", features)])
    store = Store.open(writer.path)
    with pytest.raises(StoreError) as error:
        CaseBags(store, {"1": 0}, memory)
    assert f"{store.table('1').iloc[9]['path']} is not finite" in str(error.value)


@pytest.mark.parametrize("memory", [0, 10**9])
def test_a_case_whose_name_looks_like_a_sub_case_is_not_taken_for_one(tmp_path: Path, memory: int) -> None:
    writer = StoreWriter(tmp_path / "store", make_spec(dim=DIM), {})
    for i, case in enumerate(("5", "5#1", "6#x")):
        rows = np.arange(4 * DIM, dtype=np.float16).reshape(4, DIM) + 100 * i
        writer.commit(case, [planted_slice(case, "h&e", "match_1", rows)])
    store = Store.open(writer.path)
    bags = CaseBags(store, {"5": 0, "5#1": 1, "6#x": 1}, memory)
    for case in bags.outlines:
        for part in [bags.outlines[case], *sub_cases(bags.outlines[case], 2, "stride")]:
            want = store.bag(case).features[np.isin(store.bag(case).rows, part.rows)]
            assert np.array_equal(bags.batch([part]).features.numpy(), want), part.case_id


class Batches(Dataset[dict[str, Any]]):
    """What the workers of a DataLoader make of bags: item i is a batch of case i, and of a part of it."""

    def __init__(self, *bags: CaseBags) -> None:
        self.bags = bags

    def __len__(self) -> int:
        return len(CASES)

    def __getitem__(self, number: int) -> dict[str, Any]:
        found = []
        for bags in self.bags:
            outline = bags.outlines[CASES[number]]
            few = sample_bag(outline, 3, "random", np.random.default_rng(number))
            found += [bags.batch(asked).features for asked in ([outline], [few], [few, outline])]
        shared = [bags.resident is not None and bags.resident.is_shared() for bags in self.bags]
        return {"features": found, "pid": os.getpid(), "shared": shared}


def by_workers(batches: Batches, start: str) -> list[dict[str, Any]]:
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context=start)
    return list(loader)


def same(found: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    for a, b in zip(found, want, strict=True):
        assert len(a["features"]) == len(b["features"]) > 0
        assert all(map(torch.equal, a["features"], b["features"]))


@pytest.fixture
def own(store: Store, tmp_path: Path) -> Store:
    """The store at a place of its own, where it may be removed."""
    shutil.copytree(store.path, tmp_path / "own")
    return Store.open(tmp_path / "own")


def test_forked_workers_get_the_same_and_read_no_resident_case_again(own: Store) -> None:
    resident, reading = CaseBags(own, LABELS, 10**9), CaseBags(own, LABELS, 0)
    both = Batches(resident, reading)
    same(by_workers(both, "fork"), [both[i] for i in range(len(CASES))])
    want = [Batches(resident)[i] for i in range(len(CASES))]
    own.path.rename(own.path.with_name("gone"))
    found = by_workers(Batches(resident), "fork")
    same(found, want)
    assert len({os.getpid(), *(each["pid"] for each in found)}) == 3


def test_spawned_workers_get_the_same_and_share_the_resident_embeddings(own: Store) -> None:
    both = Batches(CaseBags(own, LABELS, 10**9), CaseBags(own, LABELS, 0))
    want = [both[i] for i in range(len(CASES))]
    found = by_workers(both, "spawn")
    same(found, want)
    assert all(each["shared"] == [True, False] for each in found)
    assert len({os.getpid(), *(each["pid"] for each in found)}) == 3


@pytest.mark.parametrize("memory", [10**9, 0], ids=["resident", "reading"])
def test_bags_that_were_pickled_and_bags_in_threads(own: Store, memory: int) -> None:
    bags = CaseBags(own, LABELS, memory)
    want = [Batches(bags)[i] for i in range(len(CASES))]
    data = pickle.dumps(bags)
    if memory:
        own.path.rename(own.path.with_name("gone"))
    there = Batches(pickle.loads(data))
    same([there[i] for i in range(len(CASES))], want)
    with ThreadPoolExecutor(4) as pool:
        same(list(pool.map(there.__getitem__, list(range(len(CASES))) * 3)), want * 3)


def test_some_rows_read_no_whole_case(reading: CaseBags, monkeypatch: pytest.MonkeyPatch) -> None:
    outlines = reading.outlines
    few = [sample_bag(outlines[case], 2, "random", np.random.default_rng(0)) for case in ("5", "12")]
    want = reading.batch(few).features

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a case was read")

    monkeypatch.setattr("featstore.store.store.read_features", never)
    assert torch.equal(reading.batch(few).features, want)
    with pytest.raises(AssertionError, match="a case was read"):
        reading.batch([outlines["5"]])


def test_the_memory_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert memory_budget(0, cpu) == 0
    assert memory_budget(1.5, cpu) == 1_500_000_000
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr("featstore.resident._MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("featstore.resident._CGROUP", tmp_path)
    assert memory_budget("auto", cpu) == physical // 2  # neither file is there
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert memory_budget("auto", cpu) == 2 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_budget("auto", cpu) == 2 << 20
    (tmp_path / "memory.max").write_text("3000\n")
    assert memory_budget("auto", cpu) == 1000


def test_in_one_line_all_cases_are_there_without_labels(own: Store, resident: CaseBags) -> None:
    every = CaseBags(own)
    assert list(every.outlines) == own.cases()
    assert every.resident is not None
    batch = every.batch(list(every.outlines.values()))
    assert batch.labels is None
    assert batch.case_ids == tuple(own.cases())
    for case in CASES:
        assert torch.equal(every.features(case), resident.features(case))
