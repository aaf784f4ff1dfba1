"""Adaptive weight decay against its formula in NumPy, in a training, and where gradients say nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featstore.resident import CaseBags
from heads.config import TrainConfig
from heads.models.head import Head
from heads.training.optimizer import choose_amp, decay_factors, make_optimizer
from tests.heads.planted import make_bags, make_config, make_training, parameters, same_bits, trained

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, of torch
LR, DECAY, ALPHA = 0.05, 0.3, 3.0
SHAPES = {"weight": (4, 3), "bias": (4,), "one": (1,), "equal": (2, 5), "unused": (3,)}


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("optimizer") / "store")


def layers(dtype: torch.dtype = torch.float64) -> nn.ParameterDict:
    """Layers as of a head: a matrix, a bias, one number, one with equal gradients, one without any."""
    rng = np.random.default_rng(1)
    made = {name: torch.tensor(rng.normal(size=shape), dtype=dtype) for name, shape in SHAPES.items()}
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in made.items()})


def gradients(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    made = [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(steps)]
    return [each | {"equal": 0.1 * np.sign(each["equal"])} for each in made]


def adaptive(optimizer: str, weights: nn.Module, **other: object) -> torch.optim.Optimizer:
    settings = {"weight_decay": DECAY, "weight_decay_mode": "adaptive", "weight_decay_alpha": ALPHA}
    config = TrainConfig(optimizer=optimizer, lr=LR, **{**settings, **other})  # type: ignore[arg-type]
    return make_optimizer(cast(Head, weights), config)


def in_numpy(
    name: str, optimizer: str, steps: list[dict[str, np.ndarray]], rates: list[float]
) -> np.ndarray:
    """The layer after these steps, by the formulas."""
    w = layers()[name].detach().numpy().copy()
    m = v = np.zeros_like(w)
    for t, (step, lr) in enumerate(zip(steps, rates, strict=True), start=1):
        g = step[name]
        size = np.abs(g)
        spread = size.std()
        normalised = (size - size.mean()) / spread if spread > 1e-9 else np.zeros_like(g)
        theta = 2 / (1 + np.exp(-ALPHA * normalised))
        if optimizer == "adamw":
            w = w - lr * DECAY * theta * w
        else:
            g = g + DECAY * theta * w
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        w = w - lr * (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPSILON)
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_every_step_is_that_of_the_formula(optimizer: str, dtype: torch.dtype) -> None:
    weights = layers(dtype)
    stepper, steps = adaptive(optimizer, weights), gradients(6)
    rates = [LR, LR, LR, LR / 7, LR / 7, LR / 7]  # a scheduler's
    for step, lr in zip(steps, rates, strict=True):
        stepper.param_groups[0]["lr"] = lr
        for name, weight in weights.items():
            weight.grad = None if name == "unused" else torch.tensor(step[name], dtype=dtype)
        stepper.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for name, weight in weights.items():
        want = layers()[name].detach() if name == "unused" else in_numpy(name, optimizer, steps, rates)
        np.testing.assert_allclose(weight.detach().numpy(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, -3.3, 1e20])
@pytest.mark.parametrize("shape", [(1,), (7,), (64, 33)])
def test_equal_gradients_decay_as_constant_decay_does(value: float, shape: tuple[int, ...]) -> None:
    gradient = torch.full(shape, value)
    gradient[..., ::2] *= -1
    assert (decay_factors(gradient, 4.0) == 1).all()
    gradient[..., ::3] *= 1 + 2**-23  # rounding is no difference
    assert (decay_factors(gradient, 4.0) == 1).all()


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30), st.floats(0, 8), st.floats(0.5, 4)
)
def test_a_larger_gradient_decays_more_whatever_clipping_does(
    values: list[float], alpha: float, scale: float
) -> None:
    gradient = torch.tensor(values, dtype=torch.float64)
    found = decay_factors(gradient, alpha)
    assert ((found >= 0) & (found <= 2)).all()
    order = gradient.abs().argsort()
    assert (found[order].diff() >= -1e-12).all()
    # A deviation at the very limit of what counts as one may be on either side of it when scaled.
    size = gradient.abs()
    if not 0.9e-6 * size.mean() < size.std(correction=0) < 1.1e-6 * size.mean():
        torch.testing.assert_close(decay_factors(scale * gradient, alpha), found)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize(
    "given",
    [{"weight_decay_alpha": 0.0, "weight_decay": 0.5}, {"weight_decay": 0.0}],
    ids=["alpha", "none"],
)
def test_without_alpha_or_decay_it_is_the_constant_one(bags: CaseBags, optimizer: str, given: dict) -> None:
    config = {"optimizer": optimizer, "lr": 0.01, "epochs": 2, **given}
    constant = trained(bags, make_config(**config), nn.Module.double)
    mine = trained(bags, make_config(weight_decay_mode="adaptive", **config), nn.Module.double)
    found, want = (parameters(each.head.state_dict()) for each in (mine, constant))
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_it_differs_from_constant_decay_and_survives_a_resume(bags: CaseBags, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.5, "epochs": 4, "patience": None}
    settings |= {"scheduler": "cosine", "grad_clip": 0.05}
    config = make_config(head={"dropout": 0.2}, weight_decay_mode="adaptive", **settings)
    whole, states = make_training(bags, config), list[dict]()
    whole.run(lambda training: states.append(copy.deepcopy(training.state())))
    resumed = make_training(bags, config)
    resumed.load_state(states[1])
    assert resumed.progress.epoch == 2
    resumed.run()
    assert same_bits(resumed.head.state_dict(), whole.head.state_dict())
    constant = trained(bags, make_config(head={"dropout": 0.2}, **settings))
    assert not same_bits(constant.head.state_dict(), whole.head.state_dict())


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_step_that_fp16_skips_decays_nothing(optimizer: str) -> None:
    weights = layers(torch.float32)
    before = copy.deepcopy(weights.state_dict())
    stepper = adaptive(optimizer, weights, amp="fp16")
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    for weight in weights.values():
        weight.grad = torch.full_like(weight, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.unscale_(stepper)
    scaler.step(stepper)
    assert same_bits(dict(weights.state_dict()), dict(before))


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "off")])
def test_auto_is_bf16_where_a_cpu_is_made_for_it(
    fast: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
    cpu = torch.device("cpu")
    assert choose_amp("auto", cpu) == chosen
    assert (choose_amp("off", cpu), choose_amp("bf16", cpu)) == ("off", "bf16")


def test_bf16_is_near_float32_and_keeps_its_weights_in_it(tmp_path: Path) -> None:
    bags, losses = make_bags(tmp_path / "store"), []
    for amp in ("off", "bf16"):
        training = make_training(bags, make_config(amp=amp, epochs=3, patience=None))
        training.run()
        assert {p.dtype for p in training.head.parameters()} == {torch.float32}
        losses.append([row["val_cross_entropy"] for row in training.progress.history])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
