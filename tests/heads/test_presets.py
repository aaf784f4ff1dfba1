"""The presets in configs/: their values, and that each trains as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import heads.evaluation.results
from featstore.errors import ConfigError
from featstore.settings import Layers
from featstore.strict_yaml import read_file
from heads.config import Config, HeadConfig, TrainConfig, resolved
from tests import helpers
from tests.command_line import succeeded, write_config
from tests.heads.planted import CASES, LABELS, make_bags, make_config, make_store, make_training

PRESETS = helpers.ROOT / "configs"
# Defaults of the documents that the heads were first described in, and the lab's present setting.
HIERARCHICAL = {
    "name": "hierarchical",
    "embed_dim": 512,
    "attention_hidden": 128,
    "attention_pool": "tanh",
    "dropout": 0.1,
    "optimizer": "adam",
    "lr": 3e-4,
    "weight_decay": 2e-4,
    "weight_decay_mode": "constant",
    "epochs": 30,
    "patience": 5,
    "min_delta": 0.001,
    "batch_size": 1,
    "label_smoothing": 0.0,
    "grad_clip": 0.0,
    "reg_weight_entropy": 0.0,
    "reg_weight_confidence": 0.0,
    "per_slice_cap": 800,
    "sampling": "all",
    "stain_dropout": 0.0,
    "case_sampling": "all",
    "use_class_weights": False,
    "standardize": "none",
    "seed": 42,
}
DUAL_STREAM = {
    "name": "dual_stream",
    "use_hidden_layer": True,
    "hidden_dim": 256,
    "attention_type": "gated",
    "fusion_method": "concat",
    "dropout": 0.1,
    "temperature_start": 10.0,
    "temperature_end": 1.0,
    "temperature_schedule": "linear",
    "optimizer": "adam",
    "lr": 3e-4,
    "weight_decay": 2e-4,
    "epochs": 30,
    "patience": 5,
    "batch_size": 4,
    "bag_size": 64,
    "sampling": "random",
    "label_smoothing": 0.1,
    "grad_clip": 0.5,
    "reg_weight_entropy": 0.01,
    "reg_entropy_form": "squared",
    "reg_entropy_mode": "max",
    "reg_weight_confidence": 0.01,
    "reg_confidence_target": 2.0,
    "standardize": "none",
    "seed": 42,
}
LAB = {
    "name": "hierarchical",
    "attention_pool": "gated",
    "dropout": 0.26,
    "optimizer": "adamw",
    "lr": 2.08e-4,
    "weight_decay": 3.05e-4,
    "scheduler": "plateau",
    "scheduler_patience": 4,
    "scheduler_factor": 0.21,
    "patience": 8,
    "min_epochs": 10,
    "use_class_weights": True,
    "class_weights": [2.53, 1.0],
    "reg_weight_entropy": {"patch": 0.001},
    "reg_entropy_form": "linear",
    "reg_entropy_mode": "max",
    "reg_entropy_normalize": True,
    "reg_weight_confidence": 0.0,
    "reg_level_decay": 1.0,
    "reg_epoch_decay": 1.0,
    "batch_size": 1,
    "standardize": "none",
}
TRAINED = {"hierarchical": HIERARCHICAL, "dual_stream": DUAL_STREAM, "lab": LAB}


def preset(name: str) -> Config:
    """A preset alone, resolved."""
    layers = Layers()
    layers.add(Config, read_file(PRESETS / f"{name}.yaml"), name)
    return resolved(layers.build(Config))


def value(config: Config, name: str) -> Any:
    return getattr(config.head if name in HeadConfig.model_fields else config.train, name)


@pytest.mark.parametrize("name", TRAINED)
def test_a_preset_is_what_its_documents_say(name: str) -> None:
    config = preset(name)
    assert {key: value(config, key) for key in TRAINED[name]} == TRAINED[name]


@pytest.mark.parametrize("name", ["hierarchical", "dual_stream"])
def test_first_descriptions_differ_from_the_defaults_in_one_thing(name: str) -> None:
    found, default = preset(name), resolved(Config(head=HeadConfig(name=name)))
    assert found.head == default.head
    changed = {key for key in TrainConfig.model_fields if value(found, key) != value(default, key)}
    assert changed == {"standardize"}
    assert found.runs == default.runs


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty cases with embeddings and the presets beside them."""
    folder = tmp_path_factory.mktemp("presets")
    sections = {"train": {"device": "cpu"}, "runs": {"resamples": 0}}
    classes = {"benign": ["0"], "malignant": ["1"]}
    write_config(folder, {"labels": {"file": "labels.csv"}, "classes": classes}, sections)
    helpers.write_labels(folder, LABELS)
    make_store(folder / "store")
    shutil.copytree(PRESETS, folder / "configs")
    return folder


@pytest.mark.parametrize("name", ["hierarchical", "dual_stream", "transmil", "mean", "abmil", "clam_sb"])
def test_the_rate_is_the_heads_own_unless_it_is_given(name: str) -> None:
    rate = 1e-4 if name in ("abmil", "clam_sb") else 3e-4
    assert resolved(Config(head=HeadConfig(name=name))).train.lr == rate
    assert resolved(Config(head=HeadConfig(name=name), train=TrainConfig(lr=0.01))).train.lr == 0.01


@pytest.mark.parametrize("name", TRAINED)
def test_a_preset_trains_as_it_is(project: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, plot, lambda *args: [])
    typed = ("train-head", "--config", f"configs/{name}.yaml", "--epochs", 2, "--suffix", name)
    assert "warning" not in succeeded(project, *typed).output
    (run,) = (project / "runs").glob(f"run_*_{name}")
    results = json.loads((run / "results.json").read_text())
    asked = {**results["args"]["head"], **results["args"]["train"]}
    assert {key: asked[key] for key in TRAINED[name]} == TRAINED[name] | (
        {"epochs": 2} if "epochs" in TRAINED[name] else {}
    )
    assert results["train"]["epochs"] == 2
    assert np.isfinite(results["test"]["prediction_probs"]).all()
    assert set(results["test"]["case_ids"]) < set(CASES)


@pytest.mark.parametrize(
    ("head", "train", "where"),
    [
        (
            {"name": "dual_stream", "temperature_start": 0.5, "temperature_end": 2.0},
            {},
            "temperature_start",
        ),
        ({"name": "mean"}, {"scheduler": "cosine", "min_lr": 1.0}, "train.min_lr"),
        ({"name": "mean"}, {"lr": 1e-8, "min_lr": 1e-7}, "train.min_lr"),
    ],
)
def test_a_schedule_that_goes_the_wrong_way_is_refused(
    head: dict[str, Any], train: dict[str, Any], where: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        make_training(make_bags(tmp_path / "store"), make_config(head["name"], head, **train))
    assert where in error.value.where
