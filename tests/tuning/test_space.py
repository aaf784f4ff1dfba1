"""What is searched over: defaults by head, no dead dimensions, every value checked before any trial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from featstore.errors import ConfigError
from featstore.settings import Layers
from heads.config import Config
from heads.models.head import build_head, load_plugin
from heads.training.optimizer import make_optimizer, make_scheduler
from heads.tuning.config import Range
from heads.tuning.dimensions import make_dimension
from heads.tuning.space import Space, make_space
from heads.tuning.storage import quiet

NAMES = ("benign", "malignant")
LR = {"low": 1e-5, "high": 1e-2, "log": True}


def space_of(**sections: Any) -> Space:
    layers = Layers()
    layers.add(Config, sections, "featstore.yaml")
    return make_space(layers.build(Config), 12, NAMES)


def drawn(space: Space, count: int = 40) -> list[dict[str, Any]]:
    """The settings of some trials, the head included."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(count):
        trial = study.ask()
        space.suggest(trial)
        found.append(space.settings(trial.params))
        space.config(trial.params)  # whatever is drawn can be built
    return found


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize(
    ("head", "own"),
    [
        (
            "hierarchical",
            {"train.reg_weight_entropy", "train.reg_weight_l2"},
        ),
        (
            "dual_stream",
            {"train.reg_weight_entropy", "train.reg_weight_l2", "train.reg_weight_confidence"},
        ),
        ("mean", set()),
    ],
)
def test_a_head_is_tuned_by_what_it_reads(head: str, own: set[str]) -> None:
    common = {"train.lr", "train.weight_decay", "head.dropout", "train.use_class_weights"}
    assert set(space_of(head={"name": head}).paths) == common | own


def test_the_baseline_has_a_path_and_no_rate() -> None:
    assert set(space_of(head={"name": "linear"}).paths) == {
        "head.l1_ratio",
        "head.path_end",
        "train.use_class_weights",
    }


def test_the_ranges_asked_for() -> None:
    known = {each.path: each for each in space_of().dimensions}
    assert (known["train.lr"].low, known["train.lr"].high, known["train.lr"].log) == (1e-6, 1e-2, True)
    assert (known["head.dropout"].low, known["head.dropout"].high) == (0.1, 0.7)


def test_dropouts_set_apart_are_tuned_apart() -> None:
    paths = space_of(head={"projector_dropout": 0.2}).paths
    assert {"head.projector_dropout", "head.dropout"} <= set(paths)
    apart = dict.fromkeys(("projector_dropout", "classifier_dropout", "attention_dropout"), 0.2)
    paths = space_of(head=apart).paths  # nothing is left that the one for all would act on
    assert "head.dropout" not in paths
    assert "head.attention_dropout" in paths


def test_somebodys_own_weights_stay() -> None:
    paths = space_of(train={"reg_weight_entropy": {"patch": 0.001}, "case_sampling": "balanced"}).paths
    assert "train.reg_weight_entropy" not in paths
    assert "train.use_class_weights" not in paths  # they would be balanced twice


def test_several_heads_each_get_their_own() -> None:
    heads = ["hierarchical", "dual_stream", "mean", "linear"]
    space = space_of(tune={"heads": heads}, train={"label_smoothing": "auto"})
    found = drawn(space)
    assert {each["head.name"] for each in found} == set(heads)
    for each in found:
        read = {"head.name", *space.read[each["head.name"]]}
        assert set(each) == read
    assert "train.reg_weight_confidence" not in space.read["hierarchical"]
    assert "train.lr" not in space.read["linear"]
    smoothing = {name: space.config({"head.name": name}).train.label_smoothing for name in heads}
    assert smoothing["dual_stream"] == 0.1  # what a head sets apart for itself is its own
    assert smoothing["mean"] == 0.0


def test_what_needs_another_setting_is_drawn_beside_it_alone() -> None:
    given = {
        "train.scheduler_factor": {"low": 0.1, "high": 0.9},
        "train.scheduler": {"choices": ["plateau", "cosine"]},
    }
    found = drawn(space_of(tune={"space": given}))
    assert {each["train.scheduler"] for each in found} == {"plateau", "cosine"}
    for each in found:
        assert ("train.scheduler_factor" in each) == (each["train.scheduler"] == "plateau")


def test_whole_numbers_stay_whole_and_others_do_not_become_so() -> None:
    given = {
        "head.embed_dim": {"low": 16, "high": 64, "step": 16},
        "train.batch_size": {"low": 1, "high": 8, "log": True},
        "train.label_smoothing": {"low": 0, "high": 0.3, "step": 0.1},
        "train.stain_dropout": {"low": 0, "high": 1},
    }
    found = drawn(space_of(tune={"space": given}))
    assert {each["head.embed_dim"] for each in found} == {16, 32, 48, 64}
    assert all(type(each["train.batch_size"]) is int for each in found)
    assert len({each["train.stain_dropout"] for each in found}) > 10
    assert {round(each["train.label_smoothing"], 6) for each in found} == {0, 0.1, 0.2, 0.3}


def test_the_last_step_is_within_the_bounds() -> None:
    dimension = make_dimension("train.x", Range(low=0.1, high=0.75, step=0.2), whole=False)
    assert dimension.high == pytest.approx(0.7)


def test_choices_of_any_kind() -> None:
    choices: list[Any] = [{"patch": 0.1}, {"patch": 0.1, "stain": 1.0}, 0.5]
    sizes: list[Any] = [None, 3, 10]
    given = {
        "train.reg_weight_l1": {"choices": choices},
        "train.per_slice_cap": {"choices": sizes},
    }
    found = drawn(space_of(tune={"space": given}))
    assert all(each["train.reg_weight_l1"] in choices for each in found)
    assert {each["train.per_slice_cap"] for each in found} == set(sizes)


def test_what_nobody_gave_is_not_given_by_being_tuned_beside() -> None:
    space = space_of(tune={"space": {"train.lr": {"low": 1e-7, "high": 1e-3, "log": True}}})
    train = space.config({"train.lr": 1e-7}).train
    assert "min_lr" not in train.model_fields_set  # else it would be refused: it is above train.lr
    assert "lr" in train.model_fields_set
    head = build_head(space.config({}).head, 12, 2)
    assert make_scheduler(make_optimizer(head, train), train) is not None


RATES = {"low": 1e-7, "high": 1e-3, "log": True}


@pytest.mark.parametrize(
    ("given", "space", "says"),
    [
        ({"min_lr": 1e-5}, {"train.lr": RATES}, ("tune.space.train.lr",)),
        ({"lr": 1e-4}, {"train.min_lr": RATES}, ("tune.space.train.min_lr", "0.001")),
        ({}, {"train.lr": RATES, "train.min_lr": {"low": 0.0, "high": 1e-6}}, ("train.lr", "train.min_lr")),
        (
            {"min_lr": 1e-5, "scheduler": "none"},
            {"train.lr": RATES, "train.scheduler": {"choices": ["none", "cosine"]}},
            ("tune.space.train.lr",),
        ),
    ],
)
def test_rates_that_cannot_be_are_refused_before_any_trial(given: Any, space: Any, says: Any) -> None:
    with pytest.raises(ConfigError, match="above train") as raised:
        space_of(train=given, tune={"space": space})
    for part in says:
        assert part in str(raised.value)


def test_rates_that_go_together_only_without_a_schedule() -> None:
    space_of(train={"min_lr": 1e-5, "scheduler": "none"}, tune={"space": {"train.lr": RATES}})
    space_of(train={"min_lr": 1e-7}, tune={"space": {"train.lr": RATES}})


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        (
            {"space": {"train.reg_weight_l1": {"choices": [0.1, {"slice": 0.1}]}}, "heads": ["abmil"]},
            ("slice", "tune.space.train.reg_weight_l1"),
        ),
        ({"space": {"train.lrr": LR}}, ("no setting 'train.lrr'", "train.lr", "tune.space.train.lrr")),
        ({"space": {"lr": LR}}, ("no setting 'lr'", "train.lr")),
        ({"space": {"train": LR}}, ("is a section",)),
        ({"space": {"train.lr": {"low": 1, "high": 0.1}}}, ("above high", "tune.space.train.lr")),
        ({"space": {"train.lr": {"low": 0, "high": 0.1, "log": True}}}, ("tune.space.train.lr", "greater")),
        ({"space": {"train.weight_decay": {"low": 0, "high": 0.1, "log": True}}}, ("low is 0", "above 0")),
        ({"space": {"train.lr": {"low": 0.1, "high": 0.2, "step": 0}}}, ("step",)),
        ({"space": {"train.lr": {**LR, "step": 0.1}}}, ("log and step",)),
        ({"space": {"head.dropout": {"low": 0.5, "high": 1.5}}}, ("head.dropout is 1.5", "less than 1")),
        ({"space": {"train.optimizer": {"low": 1, "high": 2}}}, ("train.optimizer is 1", "adam")),
        ({"space": {"train.optimizer": {"choices": ["adam", "sgd"]}}}, ("'sgd'", "tune.space.train.optim")),
        ({"space": {"train.bag_size": {"low": 1.5, "high": 8}}}, ("train.bag_size is 1.5", "integer")),
        ({"space": {"train.lr": {"choices": [0.1, 0.1]}}}, ("twice",)),
        ({"space": {"train.seed": {"low": 1, "high": 9}}}, ("train.seed is not for tuning",)),
        ({"space": {"train.load_splits": {"choices": ["a", "b"]}}}, ("not for tuning",)),
        ({"space": {"train.device": {"choices": ["cpu"]}}}, ("not for tuning",)),
        ({"space": {"runs.threshold": {"choices": ["argmax"]}}}, ("not for tuning",)),
        ({"space": {"split.seed": {"low": 1, "high": 3}}}, ("not for tuning",)),
        ({"space": {"store.path": {"choices": ["x"]}}}, ("not for tuning",)),
        ({"space": {"head.name": {"choices": ["mean"]}}}, ("tune.heads",)),
        ({"space": {"head.l1_ratio": {"low": 0.1, "high": 0.9}}}, ("in vain", "no head of hierarchical")),
        ({"space": {"train.reg_weight_confidence": {"low": 0.1, "high": 0.9}}}, ("in vain",)),
        ({"space": {"train.weight_decay_alpha": {"low": 1.0, "high": 9.0}}}, ("in vain", "no effect")),
        ({"space": {"train.lr": LR}, "heads": ["linear"]}, ("in vain",)),
        ({"space": {}}, ("nothing to search",)),
        ({"heads": ["mean", "mean"]}, ("twice",)),
        ({"heads": ["mean", "abml"]}, ("there is no head 'abml'", "abmil", "tune.heads")),
        (
            {"heads": ["transmil"], "space": {"head.transmil_heads": {"choices": [7, 8]}}},
            ("transmil_heads",),
        ),
    ],
)
def test_what_is_refused(tuned: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        space_of(tune=tuned)
    for part in says:
        assert part in str(raised.value)
    assert "tune." in str(raised.value)


def test_a_head_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own_head_for_tuning.py"
    file.write_text(
        "from heads.models.config import AttentionConfig\n"
        "from heads.models.abmil import ABMIL\n"
        "from heads.models.head import register_head\n"
        "@register_head('tuned_own', AttentionConfig)\n"
        "class Own(ABMIL):\n"
        "    pass\n"
    )
    load_plugin(file)
    space = space_of(head={"name": "tuned_own"})
    assert {"train.lr", "train.reg_weight_entropy"} <= set(space.paths)
    assert all(each["head.name"] == "tuned_own" for each in drawn(space, 3))
