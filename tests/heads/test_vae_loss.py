"""The terms of the β-VAE's loss against NumPy, and the schedule of its KL term against its formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import ConfigError
from heads.models.vae import VaeOutput
from heads.training.vae_config import Annealing, VaeConfig, annealing_of
from heads.training.vae_loss import erm_terms, kl_divergence, reconstruction_loss, vae_terms


def drawn(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def bce(p: np.ndarray, x: np.ndarray) -> float:
    return float(-(x * np.log(p) + (1 - x) * np.log(1 - p)).mean())


def kl(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """(B, L), from the textbook's ln(σ₂/σ₁) + (σ₁² + μ²) / 2 − ½ with σ₂ = 1."""
    sigma = np.sqrt(np.exp(logvar))
    return np.log(1 / sigma) + (sigma**2 + mean**2) / 2 - 0.5


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(labels)), labels].mean())


@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 5.0]))
def test_reconstruction_is_the_mean_binary_cross_entropy_of_the_sigmoid(seed: int, scale: float) -> None:
    logits = drawn(seed, 3, 3, 4, 5, scale=scale)
    images = np.random.default_rng(seed + 1).random((3, 3, 4, 5))
    found = reconstruction_loss(as_tensor(logits), as_tensor(images))
    assert float(found) == pytest.approx(bce(1 / (1 + np.exp(-logits)), images), rel=1e-5)


def test_reconstruction_of_certain_pixels_is_finite_and_of_half_precision_in_float32() -> None:
    logits = torch.tensor([[[[60.0, -60.0]]]])
    assert float(reconstruction_loss(logits, torch.tensor([[[[1.0, 0.0]]]]))) == pytest.approx(0, abs=1e-9)
    assert float(reconstruction_loss(logits, torch.tensor([[[[0.0, 1.0]]]]))) == pytest.approx(60, rel=1e-6)
    half = torch.full((1, 3, 8, 8), 9.0, dtype=torch.bfloat16)  # whose sigmoid rounds to 1
    found = reconstruction_loss(half, torch.full((1, 3, 8, 8), 0.25))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(bce(np.array(1 / (1 + math.exp(-9))), np.array(0.25)), rel=1e-5)


@given(st.integers(0, 1000), st.sampled_from([0.05, 1.0, 3.0]))
def test_kl_is_the_closed_form(seed: int, scale: float) -> None:
    mean, logvar = drawn(seed, 5, 7, scale=scale), drawn(seed + 1, 5, 7, scale=scale)
    each = kl(mean, logvar)
    arguments = as_tensor(mean), as_tensor(logvar)
    assert float(kl_divergence(*arguments)) == pytest.approx(each.mean(), rel=1e-4, abs=1e-6)
    assert float(kl_divergence(*arguments, "sum")) == pytest.approx(
        each.sum(axis=1).mean(), rel=1e-4, abs=1e-5
    )


def test_kl_is_the_expected_logarithm_of_the_ratio_of_densities() -> None:
    mean, logvar = 0.7, -0.8
    z = mean + math.exp(logvar / 2) * np.random.default_rng(0).standard_normal(400_000)
    log_ratio = -0.5 * (logvar + (z - mean) ** 2 / math.exp(logvar)) + 0.5 * z**2
    found = kl_divergence(torch.tensor([[mean]]), torch.tensor([[logvar]]))
    assert float(found) == pytest.approx(log_ratio.mean(), abs=0.01)


def test_kl_is_zero_of_the_standard_normal_and_positive_else() -> None:
    zeros = torch.zeros(4, 6)
    assert float(kl_divergence(zeros, zeros)) == 0
    assert float(kl_divergence(zeros + 0.1, zeros)) > 0
    assert float(kl_divergence(zeros, zeros - 0.1)) > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_total_is_the_weighted_sum_of_the_terms(reduction: Any) -> None:
    logits, mean, logvar = drawn(0, 4, 3, 6, 6), drawn(1, 4, 5), drawn(2, 4, 5)
    scores, labels = drawn(3, 4, 3), np.array([0, 2, 1, 1])
    images = np.random.default_rng(4).random((4, 3, 6, 6))
    output = VaeOutput(*map(as_tensor, (logits, mean, logvar, scores)))
    terms = vae_terms(output, as_tensor(images), torch.from_numpy(labels), 0.03, 0.1, reduction)
    divergence = kl(mean, logvar).mean() * (1 if reduction == "mean" else 5)
    expected = bce(1 / (1 + np.exp(-logits)), images) + 0.03 * divergence
    expected += 0.1 * cross_entropy(scores, labels)
    assert float(terms.total) == pytest.approx(expected, rel=1e-5)
    assert int(terms.right) == int((scores.argmax(axis=1) == labels).sum())
    stacked = terms.stacked().tolist()
    assert stacked[0] + 0.03 * stacked[1] + 0.1 * stacked[2] == pytest.approx(stacked[3], rel=1e-6)
    np.testing.assert_allclose(output.image.numpy(), 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_plain_training_has_the_cross_entropy_alone() -> None:
    scores, labels = drawn(3, 4, 3), np.array([0, 2, 1, 1])
    terms = erm_terms(as_tensor(scores), torch.from_numpy(labels))
    assert float(terms.total) == float(terms.cross_entropy)
    assert float(terms.total) == pytest.approx(cross_entropy(scores, labels), rel=1e-6)
    assert float(terms.reconstruction) == float(terms.kl) == 0


def test_defaults_are_those_of_the_specification() -> None:
    config = VaeConfig()
    assert (config.loss_multiplier_kl, config.loss_multiplier_y, config.kl_reduction) == (1e-4, 0.1, "mean")
    assert (config.kl_anneal_start, config.kl_anneal_end, config.kl_anneal_cyclical) == (0, 5000, False)
    assert (config.steps, config.latent, config.hidden, config.encoder) == (10_000, 256, 1024, "resnet50")
    w = annealing_of(config)
    assert [w(step) for step in (0, 2500, 5000, 9999)] == [0, 0.5, 1, 1]


def test_w_without_cycles_at_start_middle_and_end() -> None:
    w = annealing_of(VaeConfig(steps=1000, kl_anneal_start=100, kl_anneal_end="50%"))
    assert [w(step) for step in (0, 99, 100, 200, 300, 499, 500, 999)] == [
        0, 0, 0, 0.25, 0.5, 399 / 400, 1, 1,
    ]  # fmt: skip


def test_w_over_two_cycles() -> None:
    config = VaeConfig(
        steps=100, kl_anneal_start=10, kl_anneal_end="30%", kl_anneal_cyclical=True,
        kl_anneal_cycle_length=40,
    )  # fmt: skip
    w = annealing_of(config)
    first = [w(step) for step in range(10, 50)]
    assert [w(step) for step in range(10)] == [0] * 10
    assert first == [min(i / 20, 1) for i in range(40)]
    assert [w(step) for step in range(50, 90)] == first


@given(st.integers(0, 50), st.integers(1, 60), st.none() | st.integers(0, 40), st.integers(0, 400))
def test_w_is_its_formula(start: int, length: int, more: int | None, step: int) -> None:
    cycle = None if more is None else length + more
    since = step - start if cycle is None else (step - start) % cycle
    expected = np.clip(since / length, 0, 1) if step >= start else 0
    assert Annealing(start, start + length, cycle)(step) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given_settings", "says"),
    [
        ({"kl_anneal_start": 5000}, ("starts at 5000 and ends at 5000",)),
        ({"kl_anneal_start": "60%", "kl_anneal_end": "50%"}, ("60%", "50%")),
        ({"kl_anneal_end": "101%"}, ("vae.kl_anneal_end is 101%", "at most 100%")),
        ({"kl_anneal_cyclical": True}, ("kl_anneal_cycle_length is not given",)),
        ({"kl_anneal_cyclical": True, "kl_anneal_cycle_length": 4999}, ("shorter than the rise of w",)),
        ({"kl_anneal_cyclical": True, "kl_anneal_cycle_length": "200%"}, ("cycle_length is 200%",)),
    ],
)
def test_schedules_that_cannot_be(given_settings: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        annealing_of(VaeConfig(**given_settings))
    for part in (*says, "to do", "where"):
        assert part in str(caught.value)
