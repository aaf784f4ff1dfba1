"""The cohort in numbers: by class and stain, and what training under caps leaves unused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from featstore.cohort.labels import Labels

Json = dict[str, Any]


@dataclass(frozen=True)
class Caps:
    """The limits on what training draws.

    Attributes:
        per_slice_cap: Patches drawn of a slice in an epoch, afresh each time.
        max_slices_per_stain: Slices of a case and stain, chosen once for the run.
        epochs: Length of the training.
    """

    per_slice_cap: int | None = None
    max_slices_per_stain: int | None = None
    epochs: int = 30


def classes_of(table: pd.DataFrame, labels: Labels | None) -> dict[str, str]:
    """Case → class name, for the cases that have patches and take part."""
    cases = [str(case) for case in table["case_id"].cat.categories]
    if labels is None:
        return dict.fromkeys(cases, "all")
    return {case: labels.class_names[labels.by_case[case]] for case in cases if case in labels.by_case}


def _slices(table: pd.DataFrame) -> pd.DataFrame:
    """Rows `case_id, stain, slice_id, patches`, one a slice."""
    keys = ["case_id", "stain", "slice_id"]
    return table.groupby(keys, observed=True, sort=True).size().rename("patches").reset_index()


def composition(table: pd.DataFrame, class_of: Mapping[str, str], labels: Labels | None) -> Json:
    """The cohort by class, stain, slice count and patches; stains that cases lack."""
    slices = _slices(table)
    taking_part = slices[slices["case_id"].isin(list(class_of))]
    stains = [str(stain) for stain in table["stain"].cat.categories]
    names = labels.class_names if labels is not None else ["all"]
    per_case: Json = {}
    columns = (slices[name].tolist() for name in ("case_id", "stain", "patches"))
    for case, stain, patches in zip(*columns, strict=True):
        entry = per_case.setdefault(case, {"class": class_of.get(case), "stains": {}})
        cell = entry["stains"].setdefault(stain, {"slices": 0, "patches": 0})
        cell["slices"] += 1
        cell["patches"] += patches
    by_class = taking_part["case_id"].map(class_of).astype(str)
    return {
        "patches": len(table),
        "cases": len(per_case),
        "slices": len(slices),
        "labelled": labels is not None,
        "classes": {name: _count(taking_part[by_class == name]) for name in names},
        "stains": {stain: _count(taking_part[taking_part["stain"] == stain]) for stain in stains},
        "class_by_stain": {
            name: {
                stain: _count(taking_part[(by_class == name) & (taking_part["stain"] == stain)])
                for stain in stains
            }
            for name in names
        },
        "slices_per_case": _spread(taking_part.groupby("case_id", observed=True).size()),
        "patches_per_case": _spread(taking_part.groupby("case_id", observed=True)["patches"].sum()),
        "patches_per_slice": _spread(taking_part["patches"]),
        "missing_stains": {
            case: [stain for stain in stains if stain not in entry["stains"]]
            for case, entry in per_case.items()
            if len(entry["stains"]) < len(stains) and entry["class"] is not None
        },
        "per_case": per_case,
    }


def _count(slices: pd.DataFrame) -> dict[str, int]:
    return {
        "cases": int(slices["case_id"].nunique()),
        "slices": len(slices),
        "patches": int(slices["patches"].sum()),
    }


def _spread(values: pd.Series[Any]) -> Json | None:
    if not len(values):
        return None
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def unused(table: pd.DataFrame, class_of: Mapping[str, str], caps: Caps) -> Json:
    """What training under caps leaves unused, by class (expected numbers)."""
    slices = _slices(table)
    slices = slices[slices["case_id"].isin(list(class_of))]
    name = slices["case_id"].map(class_of).astype(str)
    n = slices["patches"].to_numpy(dtype=float)
    never = np.zeros(len(n))
    if caps.per_slice_cap is not None:
        # Each epoch draws a fresh random subset, so a patch is missed every time with (1 − cap/N)^epochs.
        never = np.where(
            n > caps.per_slice_cap, n * np.maximum(1 - caps.per_slice_cap / n, 0) ** caps.epochs, 0
        )
    per_pair = (
        slices.groupby(["case_id", "stain"], observed=True)["slice_id"]
        .transform("size")
        .to_numpy(dtype=float)
    )
    limit = caps.max_slices_per_stain
    above = per_pair > limit if limit is not None else np.zeros(len(n), dtype=bool)
    unchosen = np.where(above, 1 - (limit or 0) / per_pair, 0)
    result: Json = {
        "per_slice_cap": caps.per_slice_cap,
        "max_slices_per_stain": limit,
        "epochs": caps.epochs,
        "by_class": {},
    }
    for label in dict.fromkeys(class_of.values()):
        here = (name == label).to_numpy()
        pairs = slices[here & above][["case_id", "stain"]].drop_duplicates()
        result["by_class"][label] = {
            "slices_above_cap": int((n[here] > (caps.per_slice_cap or np.inf)).sum()),
            "patches_never_drawn": round(float(never[here].sum()), 1),
            "pairs_above_max_slices": len(pairs),
            "slices_unused": round(float(unchosen[here].sum())),
            "patches_in_unused_slices": round(float((unchosen * n)[here].sum()), 1),
        }
    return result
