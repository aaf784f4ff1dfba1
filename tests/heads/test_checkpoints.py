"""Flipped bits in checkpoints; `test_runs.py` has the other ways in which they can be wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from heads.config import Config, HeadConfig, TrainConfig
from heads.evaluation.checkpoints import identity_of, load_best, load_state, save_state
from heads.evaluation.runs import RunError, RunFolder, create_run
from heads.models.head import build_head

CONFIG = Config(head=HeadConfig(embed_dim=4, attention_hidden=3), train=TrainConfig(epochs=2))
ABOUT = {"dim": 5, "class_names": ["a", "b"], "labels": {}, "store": {"fingerprint": "abc"}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = create_run(tmp_path, None)
    weights = build_head(CONFIG.head, 5, 2, seed=3).state_dict()
    save_state(run, {"head": weights, "best": weights}, identity_of(CONFIG, ABOUT))
    return run


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_flipped_bit_never_gives_other_weights(run: RunFolder, name: str) -> None:
    path: Path = getattr(run, name)
    whole, chance, found = path.read_bytes(), random.Random(0), 0
    weights = build_head(CONFIG.head, 5, 2, seed=3).state_dict()
    for _ in range(300):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            if name == "last":
                loaded = load_state(path, identity_of(CONFIG, ABOUT))["head"]
            else:
                loaded = load_best(run, CONFIG, ABOUT).state_dict()
        except RunError:
            found += 1
            continue
        # What is left unnoticed lies in padding or in names that nobody reads.
        assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert found > 50


def test_equal_states_have_equal_bytes(run: RunFolder) -> None:
    before = run.best.read_bytes()
    weights = build_head(CONFIG.head, 5, 2, seed=3).state_dict()
    for _ in range(5):
        save_state(run, {"head": weights, "best": weights}, identity_of(CONFIG, ABOUT))
        assert run.best.read_bytes() == before
