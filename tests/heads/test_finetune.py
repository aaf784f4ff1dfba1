"""Fine-tuning: what it draws, how it resumes, what it keeps, what it does when memory runs out."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore.backbones import build_backbone
from featstore.bags import Bag
from featstore.errors import ConfigError, FeatstoreError
from featstore.resident import CaseBags
from heads.config import FinetuneConfig
from heads.finetune_start import _precision
from heads.models.standardize import Standardize
from heads.training.blocks import set_mode
from heads.training.course import TrainingError
from heads.training.finetune import FineTuning
from heads.training.finetune_data import attention_of, draw
from heads.training.finetune_model import Following, OutOfMemory, rate_course
from tests.heads.finetuned import (
    BACKBONE,
    LABELS,
    SPLIT,
    Cached,
    make_cached,
    make_finetuning,
    make_head,
    numbers,
)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cached:
    return make_cached(tmp_path_factory.mktemp("cached"))


def saved(training: FineTuning) -> dict[str, Any]:
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(training.state(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stopping(after: int) -> tuple[list[int], Any]:
    """A list of signals that receives one after so many steps."""
    received: list[int] = []
    done = Counter[str]()

    def step(training: FineTuning) -> None:
        done["steps"] += 1
        if done["steps"] == after:
            received.append(15)

    return received, step


@pytest.mark.parametrize("after", [1, 3, 6, 8])
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "batch_norm": "train"}])
def test_interrupted_between_any_steps_it_goes_on_as_if_nothing_had_been(
    cached: Cached, after: int, options: dict[str, Any]
) -> None:
    settings = {"patches_per_case": 5, "head": {"dropout": 0.3}, **options}
    whole = make_finetuning(cached, **settings)
    whole.run()
    first = make_finetuning(cached, **settings)
    received, step = stopping(after)
    first.run(stop=received, after_step=step)
    assert not first.finished
    assert first.steps_done == after
    second = make_finetuning(cached, **settings)
    second.load_state(saved(first))
    second.run()
    assert np.array_equal(numbers(second.model.state_dict()), numbers(whole.model.state_dict()))
    assert np.array_equal(numbers(second.best), numbers(whole.best))
    for mine, theirs in zip(second.progress.history, whole.progress.history, strict=True):
        rows = ({k: v for k, v in row.items() if k != "seconds"} for row in (mine, theirs))
        np.testing.assert_equal(*rows)


def test_the_loss_falls_and_the_best_epoch_is_kept(cached: Cached) -> None:
    kept: list[dict[str, torch.Tensor]] = []
    training = make_finetuning(cached, epochs=6, backbone_lr=3e-4, patience=6)
    training.run(lambda t: kept.append({k: v.clone() for k, v in t.kept().items()}))
    history = training.progress.history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    best = int(np.argmin([row["val_cross_entropy"] for row in history]))
    assert training.progress.best_epoch == best + 1
    assert np.array_equal(numbers(training.best), numbers(kept[best]))


def test_the_moving_average_is_validated_and_kept(cached: Cached) -> None:
    training = make_finetuning(cached, ema_decay=0.5, epochs=1)
    states: list[np.ndarray] = []
    before = numbers(training.model.state_dict())
    training.run(after_step=lambda t: states.append(numbers(t.model.state_dict())))
    # torch's first update is a copy.
    expected = states[0]
    for state in states[1:]:
        expected = 0.5 * expected + 0.5 * state
    np.testing.assert_allclose(numbers(dict(training.kept())), expected, rtol=1e-4, atol=1e-6)
    assert not np.array_equal(before, expected)


def test_a_frozen_head_stays(cached: Cached) -> None:
    training = make_finetuning(cached, freeze_head=True, epochs=1)
    before = numbers(training.model.head.state_dict())
    training.run()
    assert np.array_equal(before, numbers(training.model.head.state_dict()))
    with pytest.raises(ConfigError, match="nothing is to learn"):
        make_finetuning(cached, freeze_head=True, unfreeze="none")


def test_each_epoch_sees_the_budget_and_draws_anew(cached: Cached) -> None:
    training = make_finetuning(cached, patches_per_case=3)
    seen = [training.data.epoch(i) for i in range(4)]
    assert {len(bag) for epoch in seen for bag in epoch} == {3}
    assert sorted(bag.case_id for bag in seen[0]) == sorted(SPLIT.train)
    rows = {tuple(np.sort(np.concatenate([bag.rows for bag in epoch]))) for epoch in seen}
    assert len(rows) == 4
    again = make_finetuning(cached, patches_per_case=3).data.epoch(2)
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(seen[2], again, strict=True))
    everything = make_finetuning(cached, patches_per_case=None).data.epoch(0)
    assert {len(bag) for bag in everything} == {8}


def test_attended_patches_are_drawn_by_the_heads_attention(cached: Cached) -> None:
    head, config = make_head("abmil")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(20)  # sharp
    bags = CaseBags(cached.store, LABELS)
    found = attention_of(head, bags, SPLIT.train, config.train)
    assert all(abs(weights.sum() - 1) < 1e-5 for weights in found.values())
    training = make_finetuning(cached, patches_per_case=1, attention=found)
    counts = Counter(int(b.rows[0]) for epoch in range(300) for b in training.data.epoch(epoch))
    for case in SPLIT.train:
        share = np.array([counts[int(row)] for row in bags.outlines[case].rows]) / 300
        assert np.abs(share - found[case]).max() < 0.12
    with pytest.raises(ConfigError, match="no attention"):
        attention_of(make_head("mean")[0], bags, SPLIT.train, config.train)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1), st.booleans())
def test_a_draw_is_without_replacement(size: int, count: int, seed: int, weighted: bool) -> None:
    rows = np.arange(size, dtype=np.int64) + 7
    one = np.ones(1, np.int64)
    bag = Bag("a", np.empty((size, 0)), rows, rows, ("s",), one * size, ("h&e",), one, one)
    rng = np.random.default_rng(seed)
    found = draw(bag, count, rng, rng.random(size) * (rng.random(size) < 0.5) if weighted else None)
    assert len(found) == min(size, count)
    assert len(set(found.rows.tolist())) == len(found)
    assert (np.diff(found.rows) > 0).all()


def test_the_rates_rise_and_fall_by_their_formula() -> None:
    rate = rate_course(FinetuneConfig(warmup=0.1), 100)
    assert [round(rate(s), 6) for s in (0, 4, 9)] == [round((s + 1) / 11, 6) for s in (0, 4, 9)]
    for step in (10, 40, 99):
        assert rate(step) == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 10) / 90)))
    assert rate(100) == pytest.approx(0)
    flat = rate_course(FinetuneConfig(warmup=5, scheduler="constant"), 100)
    assert [flat(s) for s in (5, 50, 99)] == [1, 1, 1]
    assert flat(4) == pytest.approx(5 / 6)


def test_backbone_and_head_have_rates_of_their_own(cached: Cached) -> None:
    training = make_finetuning(cached, backbone_lr=1e-5, head_lr=1e-2, scheduler="constant")
    assert [group["lr"] for group in training.optimizer.param_groups] == [1e-5, 1e-2]
    backbone = {id(p) for p in training.model.backbone.parameters()}
    assert all(id(p) in backbone for p in training.optimizer.param_groups[0]["params"])


def test_when_memory_runs_out_the_chunk_is_halved_to_the_same_effect(cached: Cached) -> None:
    plain = make_finetuning(cached, dtype=torch.float64, chunk=8, epochs=1)
    plain.run()
    short = make_finetuning(cached, dtype=torch.float64, chunk=8, epochs=1)
    handle = short.live.module.register_forward_pre_hook(refuse_more_than(2))
    short.run()
    handle.remove()
    assert short.live.chunk == 2
    np.testing.assert_allclose(
        numbers(short.model.state_dict()), numbers(plain.model.state_dict()), rtol=1e-6, atol=1e-9
    )
    assert len(short.take_steps()) == len(SPLIT.train)


def refuse_more_than(count: int) -> Any:
    """A hook that runs out of memory at more than so many patches."""

    def hook(module: Any, inputs: Any) -> None:
        if len(inputs[0]) > count:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    return hook


def test_too_little_memory_for_one_patch_is_told(cached: Cached) -> None:
    training = make_finetuning(cached, chunk=2)
    training.live.module.register_forward_pre_hook(refuse_more_than(0))
    with pytest.raises(FeatstoreError, match="too little memory for the gradient of one patch") as error:
        training.run()
    assert "--unfreeze last:1" in str(error.value)


def test_other_errors_are_not_taken_for_memory(cached: Cached) -> None:
    def hook(module: Any, inputs: Any) -> None:
        raise RuntimeError("something else")

    training = make_finetuning(cached)
    training.live.module.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="something else"):
        training.run()


def test_a_loss_that_is_no_number_ends_the_training(cached: Cached) -> None:
    training = make_finetuning(cached, backbone_lr=1e30, grad_clip=0)
    with pytest.raises(TrainingError, match="no longer a number in step") as error:
        training.run()
    assert "finetune.backbone_lr" in str(error.value)
    assert "--finish" in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_norm": "train"},
        {"standardization": "follow", "gradient_accumulation_steps": 3, "batch_size": 1},
    ],
)
def test_a_step_that_ran_out_of_memory_leaves_nothing_behind(
    cached: Cached, settings: dict[str, Any]
) -> None:
    """The second try, with the same chunk, gives what a first one gives."""
    found = []
    for fails in (False, True):
        training = make_finetuning(cached, chunk=100, **settings)
        training._begin_epoch()
        set_mode(training._network, training.settings.batch_norm)
        plan = training.plan(training.data.epoch(0)[:3])
        if fails:
            calls = Counter[str]()

            def hook(module: Any, inputs: Any, calls: Counter[str] = calls, last: int = len(plan)) -> None:
                calls["head"] += 1
                if calls["head"] == last:  # after everything before it was done
                    raise RuntimeError("not enough memory")

            handle = training.model.head.register_forward_pre_hook(hook)
            with pytest.raises(OutOfMemory):
                run_step(training, plan)
            handle.remove()
        loss = run_step(training, plan)
        training.update(loss)
        found.append((float(loss), numbers(training.model.state_dict())))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


def run_step(training: FineTuning, plan: Any) -> torch.Tensor:
    training.optimizer.zero_grad(set_to_none=True)
    asked = (chunk for _, sight in plan for chunk in sight.requests())
    with closing(training.bags.pixels.read(asked)) as pixels:
        return training.accumulate(plan, 3, pixels)[1]


@pytest.mark.parametrize("where", ["_validate", "update"])
def test_memory_that_runs_out_elsewhere_is_told(
    cached: Cached, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    training = make_finetuning(cached)
    monkeypatch.setattr(training, where, fail)
    with pytest.raises(FeatstoreError, match="too little memory") as error:
        training.run()
    assert "--resume" in str(error.value)


def test_batch_norm_has_two_patches_at_least(cached: Cached) -> None:
    training = make_finetuning(cached, batch_norm="train", chunk=3, epochs=1, patches_per_case=7)
    training.run()  # 7 patches would be 3, 3 and 1
    lone = make_finetuning(cached, batch_norm="train", epochs=1, patches_per_case=1)
    with pytest.raises(ConfigError, match="single number a channel"):
        lone.run()


def test_the_rate_that_is_logged_is_the_one_learned_with(cached: Cached) -> None:
    training = make_finetuning(cached, epochs=2, backbone_lr=1e-3)
    training.run()
    last = [lr for epoch, _, _, lr in training.take_steps() if epoch == 1][-1]
    assert training.progress.history[-1]["lr"] == last > 0
    solved = make_finetuning(cached, "linear", epochs=1)
    solved.run()
    assert "penalty" not in solved.progress.history[0]
    assert "lr" in solved.progress.to_text(1)


def test_a_patch_that_cannot_be_read_ends_the_training(cached: Cached, tmp_path: Any) -> None:
    own = make_cached(tmp_path)
    training = make_finetuning(own)
    gone = next((tmp_path / "patches").glob("case_1_*.png"))
    gone.unlink()
    with pytest.raises(FeatstoreError, match=gone.name):
        training.run()


def test_a_file_that_changed_since_is_noted(tmp_path: Any) -> None:
    own = make_cached(tmp_path)
    training = make_finetuning(own, epochs=1)
    sources = own.store.sources("1")
    digests = dict(zip(sources["path"], map(bytes, sources["sha256"]), strict=True))
    training.bags.pixels._digests = digests
    file = tmp_path / "patches" / sources["path"][0]
    file.write_bytes((tmp_path / "patches" / sources["path"][1]).read_bytes())
    training.run()
    assert training.bags.pixels.changed == {sources["path"][0]}


@pytest.mark.parametrize("steps", [1, 3])
def test_accumulated_batches_are_one_step(cached: Cached, steps: int) -> None:
    """A step of several batches is one of a larger batch: losses are divided by the step's cases."""
    one = make_finetuning(cached, dtype=torch.float64, batch_size=steps, epochs=1)
    many = make_finetuning(
        cached, dtype=torch.float64, gradient_accumulation_steps=steps, batch_size=1, epochs=1
    )
    one.run()
    many.run()
    np.testing.assert_allclose(
        numbers(one.model.state_dict()), numbers(many.model.state_dict()), rtol=1e-6, atol=1e-9
    )


def test_the_callers_chance_is_left_alone(cached: Cached) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_finetuning(cached, epochs=1, head={"dropout": 0.2}).run()
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("anew", [True, False])
def test_the_heads_standardisation_follows_the_features(cached: Cached, anew: bool) -> None:
    """Moving averages of x and x², against NumPy; anew: all of it new at the first step."""
    rng = np.random.default_rng(0)
    standardize = Standardize(3)
    standardize.mean.fill_(0.5)
    standardize.std.fill_(2.0)
    following = Following(standardize, anew)
    mean, square = np.full(3, 0.5), np.full(3, 4.25)
    for step in range(25):
        parts = [rng.normal(step, 1 + step, size=(n, 3)) for n in (4, 7)]
        following.add(torch.full((2, 3), 99.0))
        following.forget()  # of a step that failed
        for part in parts:
            following.add(torch.tensor(part, dtype=torch.float32))
        following.update(following.sums(), step)
        x, momentum = np.concatenate(parts), max(0.1, 1 / (step + 1)) if anew else 0.1
        mean += momentum * (x.mean(0) - mean)
        square += momentum * (np.square(x).mean(0) - square)
        np.testing.assert_allclose(standardize.mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(standardize.std.numpy(), np.sqrt(square - mean**2), rtol=1e-4)
    assert not following.sums().any()


@pytest.mark.parametrize(
    ("settings", "moves"),
    [({}, False), ({"batch_norm": "train"}, True),
     ({"batch_norm": "train", "standardization": "fixed"}, False),
     ({"standardization": "follow"}, True), ({"standardization": "follow", "unfreeze": "none"}, False)],
)  # fmt: skip
def test_it_follows_where_batch_norm_learns_or_when_asked(
    cached: Cached, settings: dict[str, Any], moves: bool
) -> None:
    training = make_finetuning(cached, epochs=1, **settings)
    before = training.model.head.standardize.mean.clone()
    training.run()
    assert torch.equal(before, training.model.head.standardize.mean) is not moves


def test_chunks_are_of_all_cases(cached: Cached) -> None:
    training = make_finetuning(cached, batch_size=3, chunk=6)
    ((bags, sight),) = training.plan(training.data.epoch(0)[:3])
    of_case = np.repeat(np.arange(3), [len(bag) for bag in bags])
    assert len(sight.pieces) == 4
    assert all(set(of_case[piece]) == {0, 1, 2} for piece in sight.pieces)


def test_where_gradients_in_bf16_are_wrong_float32_is_taken() -> None:
    backbone = build_backbone(BACKBONE, Path())
    small = replace(backbone, preprocessing=replace(backbone.preprocessing, resize=16))
    cpu = torch.device("cpu")
    assert _precision(FinetuneConfig(), small, cpu) == "off"
    with pytest.raises(ConfigError, match="patches of 16 px"):
        _precision(FinetuneConfig(amp="bf16"), small, cpu)
    assert _precision(FinetuneConfig(amp="bf16"), backbone, cpu) == "bf16"
