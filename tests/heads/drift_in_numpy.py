"""What drift measures, by its definitions: with Gram matrices, by search, group by group; without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def cka_of_grams(x: np.ndarray, y: np.ndarray) -> float:
    """By HSIC of the Gram matrices: Kornblith et al. 2019, equation 3."""
    h = np.eye(len(x)) - 1 / len(x)
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return float((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))


def debiased_of_grams(x: np.ndarray, y: np.ndarray) -> float:
    """By the U-centred matrices of Székely & Rizzo 2014, whose product is Song's estimate."""

    def u_centred(values: np.ndarray) -> np.ndarray:
        k, n = values @ values.T, len(values)
        np.fill_diagonal(k, 0)
        rows = k.sum(axis=0) / (n - 2)
        k = k - rows[:, None] - rows + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0)
        return k

    k, m = u_centred(x), u_centred(y)
    return float((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))


def by_brute_force(
    a: np.ndarray, b: np.ndarray, k: int, cases: Sequence[int] | None
) -> tuple[list[float], list[float], list[float]]:
    """Shares, Jaccard and chance of every patch that has k candidates."""
    shares, jaccard, chance = [], [], []
    for i in range(len(a)):
        allowed = [j for j in range(len(a)) if j != i and (cases is None or cases[j] != cases[i])]
        if len(allowed) < k:
            continue
        near = []
        for each in (a, b):
            cosine = {
                j: each[i] @ each[j] / np.linalg.norm(each[i]) / np.linalg.norm(each[j]) for j in allowed
            }
            near.append(set(sorted(allowed, key=lambda j: -cosine[j])[:k]))
        shares.append(len(near[0] & near[1]) / k)
        jaccard.append(len(near[0] & near[1]) / len(near[0] | near[1]))
        chance.append(k / len(allowed))
    return shares, jaccard, chance


def eta(values: np.ndarray, groups: np.ndarray) -> float:
    """Sum of squares between groups / of all."""
    mean = values.mean(axis=0)
    between = sum(
        (groups == g).sum() * ((values[groups == g].mean(axis=0) - mean) ** 2).sum()
        for g in np.unique(groups)
    )
    return float(between / ((values - mean) ** 2).sum())
