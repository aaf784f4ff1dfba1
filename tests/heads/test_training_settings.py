"""Standardisation, what an epoch samples, and settings that cannot be used."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from featstore.bags import BagBatch
from featstore.errors import ConfigError
from featstore.resident import CaseBags
from heads.config import HeadConfig, TrainConfig, unused_settings
from heads.models.standardize import Standardize
from heads.training.data import fit_standardize
from tests.heads.planted import (
    CASES,
    DIM,
    LABELS,
    LONE,
    SPLIT,
    Spy,
    make_bags,
    make_config,
    make_training,
    trained,
)


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("settings") / "store")


# Standardisation


@pytest.mark.parametrize(("dtype", "offset"), [("float16", 0.0), ("float32", 1e3), ("float32", -1e5)])
@pytest.mark.parametrize("memory", [0, 10**9])
def test_mean_and_deviation_are_those_of_all_training_patches(
    tmp_path: Path, dtype: str, offset: float, memory: int
) -> None:
    cohort = make_bags(tmp_path / "store", memory, dtype=dtype, offset=offset)
    settings = {"per_slice_cap": 1, "max_slices_per_stain": 1, "sampling": "random", "bag_size": 2}
    training = make_training(cohort, make_config(**settings))
    x = np.concatenate([cohort.store.bag(case).features for case in SPLIT.train]).astype(np.float64)
    everything = np.concatenate([cohort.store.bag(case).features for case in CASES]).astype(np.float64)
    found, want = training.head.standardize, x.std(axis=0)
    assert want[-1] < 1e-9
    want[-1] = 1.0
    assert found.mean.dtype == found.std.dtype == torch.float32
    np.testing.assert_allclose(found.mean.numpy(), x.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.std.numpy(), want, rtol=1e-6)
    assert np.abs(everything.std(axis=0) - x.std(axis=0)).max() > 1e-3
    assert np.abs(everything.mean(axis=0) - x.mean(axis=0)).max() > 1e-3


def test_standardised_features_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    cohort = make_bags(tmp_path / "store", dtype="float32", offset=1e3)
    standardize = Standardize(DIM)
    fit_standardize(standardize, cohort, SPLIT.train)
    x = torch.cat([cohort.features(case) for case in SPLIT.train])
    for z in (standardize(x), standardize.project(x, _identity())):
        assert z.mean(0).abs().max() < 1e-3
        np.testing.assert_allclose(z[:, :-1].std(0, correction=0).detach(), 1, rtol=1e-3)


def _identity() -> torch.nn.Linear:
    layer = torch.nn.Linear(DIM, DIM)
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def test_standardize_none_leaves_features_as_they_are(bags: CaseBags) -> None:
    training = trained(bags, make_config(standardize="none", epochs=1))
    assert training.head.standardize.mean.tolist() == [0.0] * DIM
    assert training.head.standardize.std.tolist() == [1.0] * DIM
    assert {"standardize.mean", "standardize.std"} <= set(training.best)


# What an epoch sees


def seen(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch, **given: object
) -> tuple[list[list[BagBatch]], list[BagBatch]]:
    """The batches of three epochs of training, by epoch, and those of validation."""
    config = make_config(**{"epochs": 3, "patch_budget": 1, "patience": None, **given})
    training = make_training(bags, config)
    with monkeypatch.context() as patch:
        spy = Spy(training, patch)
        ends = [0]
        training.run(lambda t: ends.append(len(spy.batches(training=True))))
        learned = spy.batches(training=True)
        epochs = [learned[a:b] for a, b in pairwise(ends)]
        return epochs, spy.batches(training=False)


def rows(batches: list[BagBatch]) -> dict[str, list[int]]:
    return {batch.case_ids[0]: batch.rows.tolist() for batch in batches}


def whole(bags: CaseBags, cases: tuple[str, ...]) -> dict[str, list[int]]:
    return {case: bags.outlines[case].rows.tolist() for case in cases}


SAMPLINGS = [
    {"per_slice_cap": 2},
    *({"sampling": how, "bag_size": 5, "per_slice_cap": None} for how in ("random", "even", "entropy")),
]


@pytest.mark.parametrize("given", SAMPLINGS)
def test_samples_are_for_training_alone_and_fresh_in_every_epoch(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch, given: dict
) -> None:
    epochs, watched = seen(bags, monkeypatch, **given)
    again, _ = seen(bags, monkeypatch, **given)
    other, _ = seen(bags, monkeypatch, seed=7, **given)
    all_of = whole(bags, SPLIT.train)
    assert len(watched) == 3 * len(SPLIT.val)
    assert rows(watched) == whole(bags, SPLIT.val)
    for epoch in epochs:
        found = rows(epoch)
        assert len(epoch) == len(found) == len(SPLIT.train)
        assert all(set(found[case]) <= set(all_of[case]) for case in found)
        if "bag_size" in given:
            assert {case: len(r) for case, r in found.items()} == {
                case: min(5, len(r)) for case, r in all_of.items()
            }
        else:
            sizes = {case: np.minimum(bags.outlines[case].slice_sizes, 2).tolist() for case in SPLIT.train}
            assert {b.case_ids[0]: b.slice_offsets.diff().tolist() for b in epoch} == sizes
    drawn = [list(rows(epoch).items()) for epoch in epochs]
    assert drawn == [list(rows(epoch).items()) for epoch in again]
    assert drawn != [list(rows(epoch).items()) for epoch in other]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert [case for case, _ in drawn[a]] != [case for case, _ in drawn[b]]  # the order
        same = [case for case in SPLIT.train if dict(drawn[a])[case] == dict(drawn[b])[case]]
        assert LONE in same
        assert len(same) < len(SPLIT.train) / 2


def test_sampling_by_entropy_reads_the_quality_of_its_own_rows(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, _ = seen(bags, monkeypatch, sampling="entropy", bag_size=4)
    entropy = bags.store.table()["entropy"].to_numpy()
    for batch in (batch for epoch in epochs for batch in epoch if batch.case_ids[0] != LONE):
        assert (entropy[batch.rows.numpy()] == 5.0).all(), batch.case_ids


def test_the_slices_of_a_stain_are_chosen_once(bags: CaseBags, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs, watched = seen(bags, monkeypatch, max_slices_per_stain=1)
    again, _ = seen(bags, monkeypatch, max_slices_per_stain=1)
    other, _ = seen(bags, monkeypatch, max_slices_per_stain=1, seed=8)
    assert rows(epochs[0]) == rows(epochs[1]) == rows(epochs[2]) == rows(again[0])
    assert rows(epochs[0]) != rows(other[0])
    assert rows(watched) == whole(bags, SPLIT.val)
    for batch in epochs[0]:
        assert batch.stain_offsets.diff().tolist() == [1] * len(batch.stain_ids)
        assert batch.stain_ids.tolist() == bags.outlines[batch.case_ids[0]].stain_ids.tolist()


@pytest.mark.parametrize("by", ["range", "stride", "slice"])
@pytest.mark.parametrize("classes", [[], ["malignant"]])
def test_sub_cases_of_the_named_classes_partition_them(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch, by: str, classes: list[str]
) -> None:
    epochs, watched = seen(bags, monkeypatch, sub_cases={"n": 3, "by": by, "classes": classes})
    assert rows(watched) == whole(bags, SPLIT.val)
    for epoch in epochs:
        of_case: dict[str, list[list[int]]] = {}
        for batch in epoch:
            case = batch.case_ids[0].split("#")[0]
            of_case.setdefault(case, []).append(batch.rows.tolist())
            assert batch.labels is not None
            assert batch.labels.tolist() == [LABELS[case]]
        assert {case: sorted(sum(parts, [])) for case, parts in of_case.items()} == whole(bags, SPLIT.train)  # noqa: RUF017
        for case, parts in of_case.items():
            split_up = not classes or LABELS[case] == 1
            there = len(bags.outlines[case].slices if by == "slice" else bags.outlines[case].rows)
            assert len(parts) == (min(3, there) if split_up else 1), case


# Penalties that fade


def test_penalties_fade_over_the_epochs_and_along_the_levels(bags: CaseBags) -> None:
    """With weights that stand still, all that changes from epoch to epoch is the decay."""
    levels = ("patch", "slice", "stain")

    def penalties(names: tuple[str, ...], **decay: float) -> list[dict[str, float]]:
        given = {"lr": 1e-30, "epochs": 3, "patience": None, "reg_entropy_form": "linear", **decay}
        config = make_config(reg_weight_entropy=dict.fromkeys(names, 0.3), **given)
        return trained(bags, config).progress.history

    whole = [penalties((name,))[0] for name in levels]
    fading = penalties(levels, reg_epoch_decay=0.7, reg_level_decay=0.25)
    for part in ("train_entropy_penalty", "val_entropy_penalty"):
        assert all(row[part] < -0.01 for row in whole)  # −H, not 0 at any level
        first = sum(0.25**i * row[part] for i, row in enumerate(whole))
        for epoch, row in enumerate(fading):
            assert row[part] == pytest.approx(first * 0.7**epoch, rel=1e-5)


# Settings that cannot be used


def test_training_cases_of_one_class_are_an_error(bags: CaseBags) -> None:
    split = dataclasses.replace(SPLIT, train=tuple(case for case in SPLIT.train if LABELS[case] == 1))
    with pytest.raises(ConfigError, match="all 6 training cases are of class malignant") as error:
        make_training(bags, make_config(), split)
    assert error.value.exit_code == 2


def test_sub_cases_of_a_class_that_there_is_not_are_an_error(bags: CaseBags) -> None:
    with pytest.raises(ConfigError, match="malign"):
        make_training(bags, make_config(sub_cases={"n": 2, "classes": ["malign"]}))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("stain_dropout", -0.1),
        ("stain_dropout", 1.1),
        ("case_sampling", "even"),
        ("weight_decay_mode", "ada"),
        ("weight_decay_alpha", -1.0),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(ValidationError, match=name):
        TrainConfig(**{name: wrong})  # type: ignore[arg-type]


def test_the_solved_head_tells_of_what_it_does_not_read() -> None:
    given = {"weight_decay_mode": "adaptive", "weight_decay_alpha": 2.0, "stain_dropout": 0.5}
    config = make_config("linear", case_sampling="balanced", **given)
    unread = [name for name in unused_settings(config.head, config.train) if name.startswith("train.")]
    assert unread == ["train.weight_decay_alpha", "train.weight_decay_mode"]
    assert not unused_settings(HeadConfig(name="mean"), config.train)


def test_fp16_needs_a_gpu(bags: CaseBags) -> None:
    with pytest.raises(ConfigError, match="fp16 without a GPU"):
        make_training(bags, make_config(amp="fp16"))
