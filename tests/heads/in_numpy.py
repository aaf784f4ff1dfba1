"""The pieces that the heads' formulas are made of, in plain float64 NumPy."""

from __future__ import annotations

import numpy as np
from torch import nn

Weights = dict[str, np.ndarray]


def weights(module: nn.Module) -> Weights:
    """A module's parameters and buffers, by name."""
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """A layer of these weights."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def project(w: Weights, features: np.ndarray) -> np.ndarray:
    """What every head but dual_stream begins with."""
    x = (features.astype(np.float64) - w["standardize.mean"]) / w["standardize.std"]
    return np.maximum(linear(w, "projector", x), 0)


def softmax(z: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    e = np.exp(z - z.max(axis=0))
    return e / e.sum(axis=0)


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−z)."""
    return 1 / (1 + np.exp(-z))


def pool(w: Weights, name: str, members: np.ndarray, gated: bool) -> tuple[np.ndarray, np.ndarray]:
    """An attention pool over all members: their embedding and their attention."""
    hidden = np.tanh(linear(w, f"{name}.value", members))
    if gated:
        hidden = hidden * sigmoid(linear(w, f"{name}.gate", members))
    a = softmax(linear(w, f"{name}.weight", hidden)[:, 0])
    return a @ members, a


def cross_entropy(z: np.ndarray, label: int, smoothing: float = 0.0) -> float:
    """Of one case's logits."""
    log = np.log(softmax(z))
    return float((1 - smoothing) * -log[label] + smoothing * -log.mean())
