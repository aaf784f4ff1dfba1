"""Cosines of patches, summed up by stain, class and case."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.cohort.names import natural_sorted
from heads.evaluation.drift_pairs import Pairing

GROUPINGS = (("stain",), ("class",), ("case_id",), ("case_id", "stain"))
_QUANTILES = {"q05": 0.05, "median": 0.5, "q95": 0.95}


def summarized(
    pairing: Pairing, patches: Mapping[str, NDArray[np.float32]], labels: Mapping[str, str]
) -> pd.DataFrame:
    """Mean, median and quantiles of both cosines.

    Args:
        pairing: Which patches they are of.
        patches: (N,) ``cosine`` and ``cosine_centred``; NaN counts for nothing.
        labels: Class name of the cases that have one.

    Returns:
        A row a stain, class, case, and case and stain, in this and in natural order: ``case_id, stain,
        class`` (empty: all), ``patches``, and of both cosines ``…_mean, …_q05, …_median, …_q95``.
    """
    sizes = [len(case.in_a) for case in pairing.cases]
    names = {
        "case_id": [case.case_id for case in pairing.cases],
        "stain": pairing.stains,
        "class": natural_sorted(labels.values()),
    }
    classes = [names["class"].index(labels[case]) if case in labels else -1 for case in names["case_id"]]
    codes = {
        "case_id": np.repeat(np.arange(len(sizes)), sizes),
        "stain": np.concatenate([case.stains for case in pairing.cases]),
        "class": np.repeat(classes, sizes),
    }
    numbers = {name: patches[name] for name in ("cosine", "cosine_centred")}
    frame = pd.DataFrame({**codes, **numbers})
    tables = []
    for by in GROUPINGS:
        known = frame[frame["class"] >= 0] if by == ("class",) else frame
        grouped = known.groupby(list(by), sort=True)
        table = grouped.size().to_frame("patches")
        for name in numbers:
            table[f"{name}_mean"] = grouped[name].mean().astype(np.float64)
            for label, share in _QUANTILES.items():
                table[f"{name}_{label}"] = grouped[name].quantile(share).astype(np.float64)
        table = table.reset_index()
        for name, own in names.items():
            table[name] = [own[code] for code in table[name]] if name in by else ""
        tables.append(table)
    whole = pd.concat([table for table in tables if len(table)], ignore_index=True)
    first = [*names, "patches"]
    return whole[first + [name for name in whole if name not in first]]
