"""Flipped bits in checkpoints, and kills between two writes; `test_runs.py` has what else can be wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from heads.config import Config, HeadConfig, HierarchicalConfig, TrainConfig
from heads.evaluation.checkpoints import identity_of, load_best, load_best_of, load_state, save_state
from heads.evaluation.runs import RunError, RunFolder, create_run
from heads.models.head import build_head
from heads.training.course import Progress

CONFIG = Config(head=HeadConfig(embed_dim=4, attention_hidden=3), train=TrainConfig(epochs=2))
ABOUT = {"dim": 5, "class_names": ["a", "b"], "labels": {}, "store": {"fingerprint": "abc"}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = create_run(tmp_path, None)
    weights = build_head(CONFIG.head, 5, 2, seed=3).state_dict()
    save_state(run, state_of(weights), identity_of(CONFIG, ABOUT))
    return run


def state_of(weights: dict[str, torch.Tensor], epoch: int = 0) -> dict[str, Any]:
    rest: dict[str, Any] = {"ema": None, "scheduler": None, "class_weights": None}
    rest |= {"optimizer": {}, "scaler": {}, "progress": vars(Progress(epoch=epoch))}
    return {"head": weights, "best": weights, **rest}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ema", ...),
        ("head", 3),
        ("head", {"x": 3}),
        ("optimizer", None),
        ("progress", {**vars(Progress()), "further": 1}),
        ("progress", {**vars(Progress()), "history": [3]}),
        ("best", 3),
    ],
)
def test_a_state_with_a_part_of_another_kind(run: RunFolder, key: str, value: object) -> None:
    state = state_of(build_head(CONFIG.head, 5, 2, seed=3).state_dict())
    if value is ...:
        del state[key]
    else:
        state[key] = value
    torch.save({"identity": identity_of(CONFIG, ABOUT), **state}, run.last)
    with pytest.raises(RunError, match="the checkpoint cannot be read"):
        load_state(run.last, identity_of(CONFIG, ABOUT))


def test_a_checkpoint_older_than_a_setting_has_its_default(run: RunFolder) -> None:
    identity = identity_of(CONFIG, ABOUT)
    assert set(identity["settings"]) == set(HierarchicalConfig.model_fields)
    del identity["settings"]["attention_pool"]
    weights = build_head(CONFIG.head, 5, 2, seed=3).state_dict()
    save_state(run, state_of(weights), identity)
    load_best(run, CONFIG, ABOUT)
    gated = CONFIG.model_copy(update={"head": CONFIG.head.model_copy(update={"attention_pool": "gated"})})
    with pytest.raises(RunError, match="attention_pool is 'tanh'"):
        load_best(run, gated, ABOUT)


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
        save_state(run, state_of(weights), identity_of(CONFIG, ABOUT))
        assert run.best.read_bytes() == before


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_while_saving_never_gives_an_epoch_the_weights_of_another(
    run: RunFolder, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many files are moved into place: neither, one, both."""
    weights = [build_head(CONFIG.head, 5, 2, seed=seed).state_dict() for seed in (3, 4)]
    left, replace = [True] * moved, os.replace

    def killed(*paths: Path) -> None:
        if not left:
            raise Killed
        left.pop()
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        try:
            save_state(run, state_of(weights[1], epoch=1), identity_of(CONFIG, ABOUT))
        except Killed:
            assert moved < 2
    state, told = load_state(run.last, identity_of(CONFIG, ABOUT)), list[str]()
    # The state moves last: what it says is done has been written.
    assert state["progress"]["epoch"] == (moved == 2)
    found = load_best_of(run, CONFIG, ABOUT, state, told.append).state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights[moved == 2].items())
    assert len(told) == (moved == 1)
    assert all(run.best.name in text and f"--resume {run.path}" in text for text in told)


def test_the_last_states_best_weights_are_used_where_an_older_file_lies_beside_it(run: RunFolder) -> None:
    """As the runs of earlier versions can be: the state was written first."""
    older, told = run.best.read_bytes(), list[str]()
    weights = build_head(CONFIG.head, 5, 2, seed=4).state_dict()
    save_state(run, state_of(weights, epoch=1), identity_of(CONFIG, ABOUT))
    run.best.write_bytes(older)
    state = load_state(run.last, identity_of(CONFIG, ABOUT))
    found = load_best_of(run, CONFIG, ABOUT, state, told.append).state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert len(told) == 1


def test_a_file_of_best_weights_beside_a_state_that_knows_of_none(run: RunFolder) -> None:
    state = {**load_state(run.last, identity_of(CONFIG, ABOUT)), "best": {}}
    with pytest.raises(RunError, match=r"last\.pth knows of no best epoch"):
        load_best_of(run, CONFIG, ABOUT, state, pytest.fail)
