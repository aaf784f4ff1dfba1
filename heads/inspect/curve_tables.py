"""Does attention agree with effect? Deletion and insertion curves of cases, and rank agreement."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from heads.evaluation.agreement import spearman
from heads.inspect.curves import FRACTIONS, area, curves
from heads.inspect.opened import Opened
from heads.inspect.probe_tables import ProbeTables
from heads.inspect.tables import case_bounds

Floats = NDArray[np.float64]
_RESAMPLES, _SHUFFLES = 2000, 10


def read_curves(
    opened: Opened,
    probes: ProbeTables,
    fractions: tuple[float, ...] = FRACTIONS,
    update: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """How the probability of the called class falls as patches are taken away, and rises as they come.

    Args:
        opened: A run.
        probes: Of the same cases.
        fractions: Of a case's patches.
        update: Called with the number of cases done, and of all.

    Returns:
        One row a case, order, kind and fraction: ``case_id, order`` (most important first by
        ``attention``, ``effect`` of leaving one out, what it says ``alone``, or at ``random``: the mean of
        ten such orders), ``kind``
        (``deletion``: the case without them; ``insertion``: these alone), ``fraction, probability``.
    """
    called = {row["case_id"]: row["predicted_label"] for row in probes.cases.to_dict("records")}
    bounds = case_bounds(probes.patches)
    found = []
    for i, (case, batch) in enumerate(zip(opened.cases, opened.batches(1), strict=True)):
        mine = probes.patches.iloc[bounds[i] : bounds[i + 1]]
        c = opened.class_names.index(called[case])
        orders = _orders(mine, called[case])
        rng = np.random.default_rng(i)
        at_random = [rng.permutation(len(mine)) for _ in range(_SHUFFLES)]
        together = torch.from_numpy(np.stack([*orders.values(), *at_random]))
        logits = curves(opened.head, batch, together, fractions, **opened.schedule)
        shares = opened.share(logits.flatten(0, -2)).view(logits.shape)[..., c].cpu().numpy()
        lines = [*shares[: len(orders)], shares[len(orders) :].mean(axis=0)]
        for name, share in zip((*orders, "random"), lines, strict=True):
            for kind, line in zip(("deletion", "insertion"), share, strict=True):
                columns = {"case_id": case, "order": name, "kind": kind}
                found.append(pd.DataFrame({**columns, "fraction": fractions, "probability": line}))
        update(i + 1, len(opened.cases))
    return pd.concat(found, ignore_index=True)


def _orders(patches: pd.DataFrame, called: str) -> dict[str, NDArray[np.int64]]:
    """Positions of a case's patches, the most important first."""
    columns = {"attention": "effective_attention", "effect": f"effect_{called}", "alone": f"alone_{called}"}
    return {
        name: np.argsort(-patches[column].to_numpy(np.float64), kind="stable")
        for name, column in columns.items()
        if column in patches
    }


def curve_areas(table: pd.DataFrame) -> pd.DataFrame:
    """The areas under `read_curves`' curves: ``case_id, order, deletion, insertion``.

    An order that knows what matters has a small area under deletion and a large one under insertion.
    """
    rows = []
    for (case, order), group in table.groupby(["case_id", "order"], sort=False):
        areas = {
            kind: area(part["fraction"].to_numpy(), part["probability"].to_numpy())
            for kind, part in group.groupby("kind", sort=False)
        }
        rows.append({"case_id": case, "order": order, **areas})
    return pd.DataFrame(rows)


def area_summary(areas: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Mean areas over the cases, and how they differ from a random order's, with 95% bootstrap intervals.

    Returns:
        One row an order and kind: ``order, kind, area, against_random, low, high``; the last three NaN for
        the random order itself.
    """
    rng, rows = np.random.default_rng(seed), []
    for kind in ("deletion", "insertion"):
        wide = areas.pivot(index="case_id", columns="order", values=kind)
        drawn = rng.integers(len(wide), size=(_RESAMPLES, len(wide)))
        for order in dict.fromkeys(areas["order"]):
            row = {"order": order, "kind": kind, "area": float(wide[order].mean())}
            if order == "random":
                rows.append(row | dict.fromkeys(("against_random", "low", "high"), np.nan))
                continue
            difference = (wide[order] - wide["random"]).to_numpy()
            low, high = np.percentile(difference[drawn].mean(axis=1), [2.5, 97.5])
            rows.append(row | {"against_random": float(difference.mean()), "low": low, "high": high})
    return pd.DataFrame(rows)


def effect_agreement(probes: ProbeTables) -> pd.DataFrame:
    """How a case's attention ranks its patches, against the effect of leaving each of them out.

    Returns:
        ``case_id, patches``, and the rank correlation of effective attention with the effect on the called
        class: ``size`` of its absolute value (do attended patches matter?), ``signed`` of the effect itself
        (do they speak for the call?); NaN where all are equal.
    """
    bounds, rows = case_bounds(probes.patches), []
    for i, case in enumerate(probes.cases.to_dict("records")):
        mine = probes.patches.iloc[bounds[i] : bounds[i + 1]]
        effect = mine[f"effect_{case['predicted_label']}"].to_numpy(np.float64)
        attention = mine["effective_attention"].to_numpy(np.float64)
        fine = len(mine) > 1 and np.isfinite(effect).all() and np.ptp(effect) > 0 and np.ptp(attention) > 0
        found = [spearman(attention, each) if fine else np.nan for each in (np.abs(effect), effect)]
        rows.append((case["case_id"], len(mine), *found))
    return pd.DataFrame(rows, columns=["case_id", "patches", "size", "signed"])
