from __future__ import annotations

import numpy as np
import pytest
import torch

from featstore.errors import ConfigError
from heads.training.losses import class_weights, cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_equals_its_formula(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    z, y, w = rng.normal(size=(7, 3)), rng.integers(0, 3, 7), np.array([0.5, 1.0, 2.5])
    log = z - np.log(np.exp(z).sum(1, keepdims=True))
    target = np.full((7, 3), smoothing / 3)
    target[np.arange(7), y] += 1 - smoothing
    want = (w[y] * -(target * log).sum(1)).sum() / 7
    got = cross_entropy(torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(w), smoothing)
    assert got.item() == pytest.approx(want)


def test_class_weights_act_at_a_batch_of_one_and_add_up_to_one_batch() -> None:
    torch.manual_seed(0)
    x, y, w = torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([2.53, 1.0])
    layer = torch.nn.Linear(4, 2)

    def gradient(parts: list[slice], weights: torch.Tensor | None) -> torch.Tensor:
        layer.zero_grad()
        for part in parts:
            cross_entropy(layer(x[part]), y[part], weights, 0.1, cases=6).backward()
        return layer.weight.grad.clone()

    whole, singly = [slice(0, 6)], [slice(i, i + 1) for i in range(6)]
    assert torch.allclose(gradient(singly, w), gradient(whole, w), atol=1e-7)
    assert not torch.allclose(gradient(singly, w), gradient(singly, None), atol=1e-3)
    one = [slice(0, 1)]
    assert torch.allclose(gradient(one, w), 2.53 * gradient(one, None), atol=1e-7)


def test_balanced_weights() -> None:
    assert class_weights([0, 0, 0, 1], 2).tolist() == pytest.approx([4 / 6, 2.0])
    with pytest.raises(ConfigError, match="class 2"):
        class_weights([0, 1, 1], 3)
