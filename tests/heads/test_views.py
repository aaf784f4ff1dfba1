"""Training on a store with cached views: one of them a patch and epoch; evaluation sees plain ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore.errors import FingerprintMismatch, StoreDamaged, StoreError
from featstore.resident import CaseBags
from featstore.sampling import cap_slices, sub_cases
from featstore.store import Store, StoreWriter, hdf5, zarr_zip
from featstore.store.reading import read_features
from heads.cohort import describe, load_bags
from heads.evaluation.predict import predict
from heads.training.data import TrainingBags
from tests import helpers
from tests.command_line import answer, make_project, succeeded
from tests.heads.planted import (
    CASES,
    DIM,
    LABELS,
    LONE,
    NAMES,
    SPLIT,
    Spy,
    make_config,
    make_store,
    make_training,
    planted_slice,
    same_bits,
    trained,
)
from tests.store.builders import make_slice, make_spec
from tests.store.damage import flip, part_of
from tests.store.test_views_column import COUNT, FORMATS, SPEC, views_bytes, with_views

VIEWS = 3
STEP = 100.0  # between a patch's views: far more than between patches


def make_viewed(path: Path) -> Store:
    """The planted cohort with views: view v of a patch is the plain one plus v · STEP."""
    plain = make_store(path.with_name("plain"))
    writer = StoreWriter(path, make_spec(dim=DIM).with_views(VIEWS, 0, "test"), {})
    for case in plain.cases():
        table, x = plain.sources(case).reset_index(drop=True), plain.bag(case).features
        slices = []
        for (stain, slice_id), rows in table.groupby(["stain", "slice_id"], sort=False, observed=True):
            made = planted_slice(case, str(stain), str(slice_id), x[rows.index])
            views = np.stack([made.columns["features"] + v * STEP for v in range(1, VIEWS)], axis=1)
            slices.append(replace(made, columns={**made.columns, "views": views.astype(np.float16)}))
        writer.commit(case, slices)
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_viewed(tmp_path_factory.mktemp("views") / "store")


@pytest.fixture(scope="module")
def bags(store: Store) -> CaseBags:
    return CaseBags(store, LABELS, 10**9, views=True)


def data(bags: CaseBags, **train: object) -> TrainingBags:
    return TrainingBags(bags, SPLIT.train, make_config(**train).train, NAMES)


def seen_views(features: torch.Tensor) -> list[int]:
    """Which view each row is, by its last feature, which is 1 in all plain ones."""
    return ((features[:, -1].float() - 1) / STEP).round().long().tolist()


# What is drawn


def test_an_epoch_draws_a_view_for_each_patch_from_the_seed(bags: CaseBags) -> None:
    first, again, other = data(bags).epoch(0), data(bags).epoch(0), data(bags, seed=1).epoch(0)
    drawn = [np.concatenate([bag.view for bag in epoch]) for epoch in (first, again)]
    assert np.array_equal(*drawn)
    assert np.bincount(drawn[0]).min() > len(drawn[0]) / VIEWS / 2
    by_case = [{bag.case_id: bag.view.tolist() for bag in e} for e in (first, data(bags).epoch(1), other)]
    assert by_case[0] != by_case[1]
    assert by_case[0] != by_case[2]


def test_without_views_an_epoch_is_what_it_was(bags: CaseBags) -> None:
    with_views, without = data(bags).epoch(2), data(bags, views=False).epoch(2)
    assert all(bag.view is None for bag in without)
    assert [bag.rows.tolist() for bag in with_views] == [bag.rows.tolist() for bag in without]


# What a batch holds


def asked(bags: CaseBags, kind: str) -> list:
    rng = np.random.default_rng(0)
    some = [bags.outlines[case] for case in ("5", LONE, "20", "1")]
    if kind == "capped":
        some = [cap_slices(bag, 2, rng) for bag in some]
    elif kind == "sub-cases":
        some = [part for bag in some for part in reversed(sub_cases(bag, 3, "stride"))]
    elif kind == "one":
        some = some[:1]
    return [replace(bag, view=rng.integers(VIEWS, size=len(bag))) for bag in some]


KINDS = pytest.mark.parametrize("kind", ["whole", "capped", "sub-cases", "one"])
MEMORY = pytest.mark.parametrize("memory", ["all", "plain ones", "none"])


def room(store: Store, memory: str, cases: Sequence[str]) -> int:
    """Bytes in which all views of some cases are kept, or the plain ones alone, or none."""
    size = sum(len(store.outline(case)) for case in cases) * store.spec.dim * 2
    every = size * store.spec.views
    return {"all": every, "plain ones": every - 1, "none": size - 1}[memory]


@KINDS
@MEMORY
def test_a_batch_holds_the_views_that_were_drawn(store: Store, kind: str, memory: str) -> None:
    bags = CaseBags(store, LABELS, room(store, memory, CASES), views=True)
    assert (bags.resident is not None, bags._views is not None) == (memory != "none", memory == "all")
    wanted = asked(bags, kind)
    batch = bags.batch(wanted)
    view = np.concatenate([bag.view for bag in wanted])
    assert len(set(view.tolist())) > 1
    plain = bags.batch([replace(bag, view=None) for bag in wanted]).features.numpy()
    want = (plain + (view[:, None] * STEP).astype(np.float16)).astype(np.float16)
    assert np.array_equal(batch.features.numpy(), want)
    assert seen_views(batch.features) == view.tolist()


def tangled(path: Path, file_format: str) -> Store:
    """Two cases, one with slices in several parts, of which rows are superseded."""
    writer = StoreWriter(path, SPEC, {}, file_format)
    for version, patches in enumerate(([1, 4, 9], [2, 4], [3, 20])):
        made = [with_views(make_slice("1", s, "match_1", patches, version)) for s in ("a", "b")]
        writer.commit("1", made)
    writer.commit("2", [with_views(make_slice("2", "a", "match_1", list(range(40))))])
    return Store.open(path)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (hdf5, zarr_zip):
        monkeypatch.setattr(backend, "_CHUNK_BYTES", 200)  # four rows of views


@FORMATS
@pytest.mark.parametrize("way", ["mapped", "read"])
@pytest.mark.usefixtures("small_chunks")
def test_views_are_found_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, way: str
) -> None:
    store = tangled(tmp_path / "store", file_format)
    assert len(store.layout("1").pieces) == 6
    if way == "read":
        for backend in (hdf5, zarr_zip):
            monkeypatch.setattr(backend.Column, "chunks", lambda self: None)
    bags = CaseBags(store, memory=0, views=True)
    rng = np.random.default_rng(0)
    for case, outline in bags.outlines.items():
        every = np.concatenate((store.features(case)[:, None], store.views(case)), axis=1)
        for _ in range(5):
            view = rng.integers(COUNT, size=len(outline))
            found = bags.batch([replace(outline, view=view)]).features.numpy()
            assert np.array_equal(found, every[np.arange(len(view)), view])


def test_only_the_views_that_were_drawn_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bags = CaseBags(store, LABELS, 0, views=True)
    # A case whose views are all plain is read as one without views.
    kinds = [[bag for bag in asked(bags, kind) if bag.view.any()] for kind in ("whole", "capped", "one")]
    want = [bags.batch(wanted).features for wanted in kinds]

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a case was read")

    for place in ("featstore.store.store.read_features", "featstore.resident.read_features"):
        monkeypatch.setattr(place, never)
    monkeypatch.setattr("featstore.store.mapped.open_part", never)  # nor is any chunk checked twice
    found = [bags.batch(wanted).features for wanted in kinds]
    assert all(map(torch.equal, found, want))


@MEMORY
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_view_that_is_not_finite_is_refused_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, memory: str
) -> None:
    monkeypatch.setattr("featstore.resident._BLOCK", 4)
    writer = StoreWriter(tmp_path / "store", make_spec(dim=DIM).with_views(VIEWS, 0, "test"), {})
    for case in ("8", "9"):
        made = planted_slice(case, "h&e", "match_1", np.ones((9, DIM), np.float16))
        views = np.ones((9, VIEWS - 1, DIM), np.float16)
        if case == "9":
            views[7:, 1, 5] = value
        writer.commit(case, [replace(made, columns={**made.columns, "views": views})])
    store = Store.open(writer.path)
    with pytest.raises(StoreError) as error:
        CaseBags(store, {"8": 0, "9": 1}, room(store, memory, ["8", "9"]), views=True)
    assert f"augmented view 2 of {store.table('9').iloc[7]['path']} is not finite" in str(error.value)
    assert "case 9, h&e, match_1" in error.value.where
    assert "exclude: [9]" in error.value.fix
    for labels, views in (({"8": 0}, True), ({"9": 1}, False)):  # of the other nobody asks for views
        assert CaseBags(store, labels, room(store, memory, list(labels)), views=views).outlines


@FORMATS
@MEMORY
@pytest.mark.usefixtures("small_chunks")
def test_a_flipped_bit_in_views_is_never_in_a_batch(tmp_path: Path, file_format: str, memory: str) -> None:
    store = tangled(tmp_path / "store", file_format)
    file = part_of(store.path, "2")
    flip(file, views_bytes(file))
    with pytest.raises(StoreDamaged):
        CaseBags(store, {"2": 0}, room(store, memory, ["2"]), views=True)
    bags = CaseBags(store, {"2": 0}, room(store, memory, ["2"]))
    outline = bags.outlines["2"]
    with pytest.raises(StoreDamaged):
        bags.batch([replace(outline, view=np.ones(len(outline), np.int64))])
    # Other chunks are whole.
    view = np.where(np.arange(len(outline)) < 20, 0, 2)
    found = bags.batch([replace(outline, view=view)]).features.numpy()
    assert np.array_equal(found[20:], (store.features("2")[20:] / np.float16(3)))


@MEMORY
@pytest.mark.parametrize("number", [-1, VIEWS])
def test_a_view_that_there_is_not_is_refused(store: Store, memory: str, number: int) -> None:
    bags = CaseBags(store, LABELS, room(store, memory, CASES), views=True)
    outline = bags.outlines["5"]
    with pytest.raises(IndexError, match=f"of {VIEWS}"):
        bags.batch([replace(outline, view=np.full(len(outline), number))])


def test_bags_that_were_pickled_take_the_same_views(store: Store) -> None:
    bags = CaseBags(store, LABELS, 0, views=True)
    there = pickle.loads(pickle.dumps(bags))
    assert torch.equal(
        there.batch(asked(bags, "whole")).features, bags.batch(asked(bags, "whole")).features
    )


def test_views_are_loaded_straight_into_their_place(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as all of them is made but the one tensor that is kept."""
    places: list[int] = []
    real = read_features

    def reading(*args: Any) -> Any:
        places.append(args[4].ctypes.data)
        return real(*args)

    monkeypatch.setattr("featstore.resident.read_features", reading)
    bags = CaseBags(store, LABELS, 10**9, views=True)
    assert bags._views is not None
    row = (VIEWS - 1) * DIM * 2
    sizes = [len(bag) * row for bag in bags.outlines.values()]
    starts = np.cumsum([0, *sizes[:-1]]) + bags._views.data_ptr()
    assert places == starts.tolist()


def test_what_is_resident_is_never_written_to(bags: CaseBags) -> None:
    assert bags.resident is not None
    assert bags._views is not None
    before = bags.resident.clone(), bags._views.clone()
    for kind in ("whole", "capped", "sub-cases", "one"):
        bags.batch(asked(bags, kind)).features.zero_()
    lone = bags.outlines["5"]  # a whole case alone, all plain by chance
    bags.batch([replace(lone, view=np.zeros(len(lone), np.int64))]).features.zero_()
    trained(bags, make_config(epochs=1))
    assert torch.equal(bags.resident, before[0])
    assert torch.equal(bags._views, before[1])


def test_views_are_loaded_only_where_they_are_asked_for(store: Store) -> None:
    assert CaseBags(store, LABELS, 10**9)._views is None


def test_cut_bags_keep_the_views_of_their_patches(bags: CaseBags) -> None:
    bag = replace(bags.outlines["5"], view=np.arange(len(bags.outlines["5"])))
    cut = cap_slices(bag, 2, np.random.default_rng(0))
    assert 0 < len(cut) < len(bag)
    assert np.array_equal(bag.rows[cut.view], cut.rows)


# Training and evaluation


def test_training_sees_all_views_and_validation_plain_ones(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(bags, make_config(epochs=2, per_slice_cap=4))
    spy = Spy(training, monkeypatch)
    training.run()
    learned = [view for batch in spy.batches(training=True) for view in seen_views(batch.features)]
    watched = [view for batch in spy.batches(training=False) for view in seen_views(batch.features)]
    assert set(learned) == set(range(VIEWS))
    assert set(watched) == {0}


def test_a_resumed_training_draws_the_same_views(bags: CaseBags) -> None:
    config = make_config(epochs=4, lr=0.1, per_slice_cap=4, patience=None)
    whole = trained(bags, config)
    first, stop = make_training(bags, config), list[int]()
    first.run(lambda training: stop.append(15) if training.progress.epoch == 2 else None, stop)
    assert first.progress.epoch == 2
    resumed = make_training(bags, config)
    resumed.load_state(copy.deepcopy(first.state()))
    resumed.run()
    assert same_bits(whole.head.state_dict(), resumed.head.state_dict())
    plain = trained(bags, make_config(epochs=4, lr=0.1, per_slice_cap=4, patience=None, views=False))
    assert not same_bits(whole.head.state_dict(), plain.head.state_dict())


def test_memory_changes_no_bit_of_a_training(store: Store, bags: CaseBags) -> None:
    config = make_config(epochs=2, per_slice_cap=4)
    reading = trained(CaseBags(store, LABELS, 0, views=True), config)
    assert same_bits(trained(bags, config).head.state_dict(), reading.head.state_dict())


def test_predictions_are_those_of_the_plain_views(bags: CaseBags, store: Store) -> None:
    config = make_config(epochs=2)
    head = trained(bags, config).head
    plain = CaseBags(Store.open(store.path.with_name("plain")), LABELS, 10**9)
    a, b = (predict(head, each, SPLIT.test, config.train) for each in (bags, plain))
    assert np.array_equal(a.probabilities, b.probabilities)


def test_runs_with_and_without_views_go_with_either_store(bags: CaseBags, store: Store) -> None:
    config, plain = make_config(), Store.open(store.path.with_name("plain"))
    about = describe(bags, NAMES, LABELS, SPLIT)
    fingerprint = about["store"]["fingerprint"]
    assert fingerprint == plain.spec.fingerprint != store.spec.fingerprint
    for either in (plain, store):
        load_bags(config, either, LABELS, lambda text: None, fingerprint)
    with pytest.raises(FingerprintMismatch):
        load_bags(config, store, LABELS, lambda text: None, "0" * 32)


@pytest.mark.slow
def test_a_run_trained_with_views_is_evaluated_on_a_store_without(tmp_path: Path) -> None:
    settings = {
        "labels": {"file": "labels.csv"},
        "classes": {"benign": ["1"], "malignant": ["3"]},
        "head": {"embed_dim": 8, "attention_hidden": 8, "hidden_dim": 8, "attention_dim": 8},
        "train": {"epochs": 1, "device": "cpu"},
        "runs": {"resamples": 5},
    }
    project = make_project(tmp_path, settings, cases=15, patches=2)
    helpers.write_labels(project, {str(i): "1133"[i % 4] for i in range(1, 16)})
    succeeded(project, "extract", "--views", 3)
    succeeded(project, "extract", "--store-path", "plain")
    succeeded(project, "train-head")
    results = [answer(project, "evaluate", *flags)["best"] for flags in ((), ("--store-path", "plain"))]
    assert results[0] == results[1]
