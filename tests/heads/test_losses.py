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
    each = cross_entropy(torch.from_numpy(z), torch.from_numpy(y), smoothing)
    got = (each * torch.from_numpy(w)[y]).sum() / 7
    assert got.item() == pytest.approx(want)


def test_balanced_weights() -> None:
    assert class_weights([0, 0, 0, 1], "ab").tolist() == pytest.approx([4 / 6, 2.0])
    with pytest.raises(ConfigError, match="of class malignant"):
        class_weights([0, 1, 1], ["benign", "unsure", "malignant"])
