"""Attention in words: what `attention_summary.txt` and its like say."""

from __future__ import annotations

import numpy as np
import pandas as pd

from heads.inspect.tables import AttentionTables, records


def summary_text(tables: AttentionTables, equality: pd.DataFrame) -> str:
    """The most attended stain of every case, the stains' weights, and how the slices share them.

    Args:
        tables: Of all cases.
        equality: As `slice_equality` makes it.
    """
    lines = [
        f"Attention of {len(tables.cases)} cases, {len(tables.patches):,} patches.",
        "",
        "A patch's effective attention is how much of its case's embedding it makes up; over a case they "
        "sum to 1.",
    ]
    if not tables.levels:
        lines.append(
            "This head attends over all patches of a case at once: the attention of a slice or a stain is "
            "the sum over its patches, and equal shares are its share of the patches."
        )
    lines += ["", "Stains", *_stains(tables), "", "Slices", *_slices(equality), "", "Cases"]
    for each in tables.each():
        case, stains = each.cases.iloc[0], each.stains
        order = np.argsort(-stains["stain_attention"].to_numpy(), kind="stable")
        parts = [f"{stains['stain'].iloc[i]} {stains['stain_attention'].iloc[i]:.3f}" for i in order]
        top = each.slices.iloc[int(np.argmax(each.slices["effective_attention"].to_numpy()))]
        wrong = "" if case["correct"] else f", called {case['predicted_label']}: wrong"
        lines += [
            f"  case {case['case_id']} ({case['true_label']}{wrong})",
            f"    most attended stain: {stains['stain'].iloc[order[0]]}; stain weights: {', '.join(parts)}",
            f"    most attended slice: {top['stain']} {top['slice_id']}, {top['effective_attention']:.3f} "
            f"of the case; as of {case['effective_patches']:.1f} equal patches out of {case['patches']}",
        ]
    return "\n".join(lines) + "\n"


def _stains(tables: AttentionTables) -> list[str]:
    stains, lines = tables.stains, []
    first = stains.loc[stains.groupby("case_id", sort=False)["stain_attention"].idxmax()]
    for name, group in stains.groupby("stain", sort=False):
        a = group["stain_attention"]
        lines.append(
            f"  {name}: mean {a.mean():.3f}, from {a.min():.3f} to {a.max():.3f} (equal shares "
            f"{group['uniform'].mean():.3f}); the most attended stain of "
            f"{int((first['stain'] == name).sum())} of {len(group)} cases that have it"
        )
    return lines


def _slices(equality: pd.DataFrame) -> list[str]:
    lines = []
    for title, part in (("all cases", equality), ("misclassified", equality[equality["correct"] == 0])):
        several = part[part["slices"] > 1]
        if several.empty:
            what = "no case" if part.empty else "no stain of several slices"
            lines.append(f"  {title}: {what}")
            continue
        means = several[["normalized_entropy", "equal_shares", "effective_slices", "slices"]].mean()
        lines.append(
            f"  {title}: normalised entropy of a stain's slices {means['normalized_entropy']:.3f} on "
            f"average (1: all equal; with equal shares: {means['equal_shares']:.3f}), as of "
            f"{means['effective_slices']:.1f} equal slices out of {means['slices']:.1f}"
        )
    return lines


def top_text(tables: AttentionTables, top: pd.DataFrame, percent: float) -> str:
    """Which stains and slices the most attended patches are of.

    Args:
        tables: Of all cases.
        top: As `top_patches` makes it.
        percent: Of every case's patches.
    """
    lines = [f"The {percent:g} % most attended patches of every case", ""]
    stains, all_stains = (
        top["stain"].value_counts(sort=False),
        tables.patches["stain"].value_counts(sort=False),
    )
    lines.append(f"Stain distribution over {len(top):,} of {len(tables.patches):,} patches")
    for name in dict.fromkeys(tables.stains["stain"]):
        count = int(stains.get(name, 0))
        everywhere = all_stains[name] / len(tables.patches)
        lines.append(f"  {name}: {count} ({count / len(top):.1%}); of all patches {everywhere:.1%}")
    lines += ["", "Case by case"]
    of_case = dict(iter(top.groupby("case_id", sort=False)))
    for case in records(tables.cases):
        mine = of_case[case["case_id"]]
        covered = len(mine[["stain", "slice_id"]].drop_duplicates())
        by_stain = mine["stain"].value_counts(sort=False)
        lines.append(
            f"  case {case['case_id']}: {len(mine)} of {case['patches']} patches hold "
            f"{mine['effective_attention'].sum():.1%} of the attention; slices covered {covered} of "
            f"{case['slices']}; {', '.join(f'{name} {n}' for name, n in by_stain.items())}"
        )
    return "\n".join(lines) + "\n"
