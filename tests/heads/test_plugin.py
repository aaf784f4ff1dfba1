"""Heads and losses that a file of the user's own brings."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from featstore.errors import ConfigError
from featstore.resident import CaseBags
from heads.config import HeadConfig
from heads.evaluation.predict import PatchAttention, predict
from heads.models import head
from heads.models.head import build_head, load_plugin
from heads.training import losses
from tests import helpers
from tests.heads.planted import DIM, HEADS, SOLVED, SPLIT, make_bags, make_config, make_training, trained


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("plugin") / "store")


PLUGIN = """
from __future__ import annotations

import torch
from torch import nn

from featstore.bags import BagBatch
from featstore.config import Section
from heads.models.head import Head, register_head
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_sum
from heads.training.losses import register_loss


class MeanConfig(Section):
    width: int = 4
    kind: str = "relu"
    dropout: float = 0.0


@register_head("my_mean", MeanConfig)
class Mean(Head):
    def __init__(self, dim: int, classes: int, config: MeanConfig) -> None:
        super().__init__(dim)
        self.config = config
        self.hidden, self.classifier = nn.Linear(dim, config.width), nn.Linear(config.width, classes)

    def forward(self, batch: BagBatch, **schedule: float) -> HeadOutput:
        offsets = batch.case_patch_offsets
        h = torch.relu(self.standardize.project(batch.features, self.hidden))
        return HeadOutput(self.classifier(segment_sum(h, offsets) / offsets.diff()[:, None]))


@register_loss("my_focal")
def focal(logits, labels, smoothing):
    log = torch.log_softmax(logits.float(), 1).gather(1, labels[:, None])[:, 0]
    return -(1 - log.exp()) ** 2 * log
"""


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it; our own, which register once a process, are not."""
    head._know_our_own()
    monkeypatch.setattr(head, "_HEADS", dict(head._HEADS))
    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))


@pytest.mark.usefixtures("registries")
def test_a_plugin_brings_a_head_and_a_loss(bags: CaseBags, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    load_plugin(file)
    options = {"width": 6, "kind": "tanh"}
    config = make_config(
        "my_mean", {"options": options, "dropout": 0.25}, loss="my_focal", epochs=12, lr=0.02, patience=None
    )
    assert (config.train.batch_size, config.train.sampling) == (1, "all")
    training = trained(bags, config)
    assert training.head.hidden.out_features == 6
    assert training.head.config.model_dump() == {**options, "dropout": 0.25}
    losses_ = [row["train_cross_entropy"] for row in training.progress.history]
    assert losses_[-1] < 0.5 * losses_[0]
    assert np.log(2) / 4 * 0.3 < losses_[0] < np.log(2)  # focal: a quarter of log 2 where nothing is known
    with pytest.raises(ConfigError, match=r"head.options does not suit .*my_mean") as error:
        build_head(HeadConfig(name="my_mean", options={"widht": 3}), DIM, 2)
    assert "width" in str(error.value)
    assert "head.options.widht" in error.value.where
    assert error.value.fix == "write width"
    with pytest.raises(ConfigError, match=r"head.options is set, but 'abmil'") as error:
        build_head(HeadConfig(name="abmil", options={"embed_dims": 3}), DIM, 2)
    assert error.value.fix == "write head.embed_dim"
    with pytest.raises(ConfigError, match="has no attention"):
        make_training(bags, make_config("my_mean", reg_weight_entropy=0.1))


@pytest.mark.usefixtures("registries")
def test_the_head_in_the_documentation_works_as_it_stands_there(bags: CaseBags, tmp_path: Path) -> None:
    text = (helpers.ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("\n") < 40
    (name,) = re.findall(r"--plugin mine.py --model (\w+)`", text)
    file = tmp_path / "mine.py"
    file.write_text(code)
    load_plugin(file)
    config = make_config(
        name, {"options": {"width": 8}}, epochs=15, lr=0.02, patience=None, reg_weight_entropy=0.001
    )
    training = trained(bags, config)
    first, last = training.progress.history[0], training.progress.history[-1]
    assert last["train_cross_entropy"] < 0.5 * first["train_cross_entropy"]
    assert {"train_entropy_penalty", "train_attention_entropy_patch"} <= first.keys()
    table = PatchAttention(bags)
    predict(training.head, bags, SPLIT.test, config.train, observe=table)
    sums = table.table().groupby("case_id")["effective_attention"].sum()
    assert sums.to_numpy() == pytest.approx(np.ones(len(SPLIT.test)), rel=1e-5)


DATACLASS = """
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Memory:
    size: int = 3
"""


@pytest.mark.usefixtures("registries")
def test_a_plugin_may_hold_a_dataclass(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(DATACLASS)
    load_plugin(file)


@pytest.mark.usefixtures("registries")
def test_the_settings_of_a_plugin_may_be_of_any_type(tmp_path: Path) -> None:
    text = PLUGIN.replace("import torch\n", "from typing import Literal\n\nimport torch\n", 1)
    file = tmp_path / "mine.py"
    file.write_text(text.replace("kind: str", 'kind: Literal["relu", "tanh"]'))
    load_plugin(file)
    made = build_head(HeadConfig(name="my_mean", options={"kind": "tanh"}), DIM, 2)
    assert made.config.kind == "tanh"
    with pytest.raises(ConfigError, match=r"head\.options does not suit"):
        build_head(HeadConfig(name="my_mean", options={"kind": "sine"}), DIM, 2)


@pytest.mark.parametrize("name", ["hierarchcial", "dual-stream", "my_maen"])
def test_an_unknown_head_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no head '{name}'") as error:
        build_head(HeadConfig(name=name), DIM, 2)
    assert all(known in error.value.expected for known in (*HEADS, *SOLVED))
    nearest = {"hierarchcial": "write hierarchical", "dual-stream": "write dual_stream"}
    assert error.value.fix == nearest.get(name, "choose one, or register your own: head.plugin")


BROKEN = {
    "SyntaxError": "def",
    "ZeroDivisionError": "1 / 0",
    "ModuleNotFoundError": "import nothing_like_it",
}


@pytest.mark.parametrize("kind", [*BROKEN, "FileNotFoundError"])
def test_a_broken_plugin_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.py"
    if kind in BROKEN:
        file.write_text(BROKEN[kind])
    with pytest.raises(ConfigError, match=f"cannot be loaded: {kind}") as error:
        load_plugin(file)
    assert str(file) in error.value.where
    load_plugin(None)
