"""Heads of sharp attention and odd cases, and what heads say of bags of which something was taken."""

from __future__ import annotations

import re

import numpy as np
import torch

from featstore.bags import Bag, BagBatch, collate
from heads.models.head import Head, build_head
from tests.heads.bags import make_bag
from tests.heads.planted import make_config

DIM, CLASSES = 6, 3
Variant = tuple[str, dict[str, object]]

HIERARCHICAL: list[Variant] = [
    ("hierarchical", {"attention_pool": pool}) for pool in ("tanh", "gated", "multi_head", "transformer")
]
DUAL_STREAM: list[Variant] = [
    ("dual_stream", {"attention_type": kind, "fusion_method": fusion})
    for kind in ("gated", "cosine", "dsmil", "abmil")
    for fusion in ("concat", "weighted", "cross_attn")
] + [("dual_stream", {"attention_type": "cosine", "use_hidden_layer": False})]
POOLED: list[Variant] = [
    (name, {}) for name in ("abmil", "gated_abmil", "clam_sb", "dsmil", "mean", "linear")
]
LEFT_OUT: list[Variant] = [*HIERARCHICAL, *DUAL_STREAM, *POOLED, ("max", {})]
EVERY: list[Variant] = [*LEFT_OUT, ("transmil", {})]
# What logits of attention are made of.
_LOGITS = re.compile(r"(^|\.)(weight|query|score)\.")


def named(variant: Variant) -> str:
    """For the names of tests."""
    return "-".join([variant[0], *map(str, variant[1].values())])


def make_head(variant: Variant, sharpness: float = 3.0, dtype: torch.dtype = torch.float32) -> Head:
    """Random weights; the higher the sharpness, the more of the attention is on one patch."""
    name, settings = variant
    head = build_head(make_config(name, settings).head, DIM, CLASSES, seed=1)
    torch.manual_seed(2)
    for parameter_name, parameter in head.named_parameters():
        if name == "linear" or parameter_name.startswith("fusion.balance"):
            parameter.data.normal_()
        if ".token" in parameter_name or "norm" in parameter_name:  # at the start they do nothing
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        parameter.data.mul_(1.5 * (sharpness if _LOGITS.search(parameter_name) else 1.0))
    head.standardize.mean.copy_(torch.linspace(-1, 1, DIM))
    head.standardize.std.copy_(torch.linspace(0.5, 2, DIM))
    return head.to(dtype).eval()


def schedule_of(head: Head) -> dict[str, float]:
    """A sharp selection, where there is one."""
    return {"temperature": 0.5} if head.schedule(0, 2).get("temperature") else {}


def make_cases(count: int, seed: int = 0) -> list[Bag]:
    """Among them cases of one patch, of one slice, of slices of one patch, and of stains of one slice."""
    rng = np.random.default_rng(seed)
    one = {"stains": (0,), "slices": (1, 1)}
    kinds: list[dict] = [
        {**one, "patches": (1, 1)},
        {"patches": (1, 2)},
        {"patches": (1, 9)},
        {**one, "patches": (2, 9)},
        {"patches": (1, 1), "slices": (1, 2)},
        {"patches": (1, 25), "slices": (1, 3)},
    ]
    found = []
    for i in range(count):
        kind = {"stains": tuple(range(int(rng.integers(1, 4)))), **kinds[i % len(kinds)]}
        found.append(make_bag(rng, str(i), dim=DIM, **kind))
    return found


def units(bag: Bag) -> dict[str, np.ndarray]:
    """Of each patch: which patch, slice and stain it is of."""
    slices = np.repeat(np.arange(len(bag.slices)), bag.slice_sizes)
    stains = np.repeat(np.arange(len(bag.stains)), bag.stain_sizes)[slices]
    return {"patch": np.arange(len(bag)), "slice": slices, "stain": stains}


@torch.no_grad()
def say(head: Head, bag: Bag, kept: np.ndarray) -> torch.Tensor:
    """(C,) logits of what is kept of a bag; NaN where that is nothing."""
    if not kept.any():
        return torch.full((CLASSES,), torch.nan)
    dtype = next(head.parameters()).dtype
    batch = collate([bag.take(kept)])
    found: torch.Tensor = head(batch, **schedule_of(head)).logits[0].to(dtype)
    return found


def without_each(head: Head, bag: Bag, level: str) -> torch.Tensor:
    """(units, C): the bag without each of its patches, slices or stains."""
    unit = units(bag)[level]
    return torch.stack([say(head, bag, unit != u) for u in range(unit[-1] + 1)])


def bounds(batch: BagBatch) -> dict[str, list[int]]:
    """Where each case's patches, slices and stains begin in a batch, and the last ones end."""
    of = {
        "patch": batch.case_patch_offsets,
        "slice": batch.stain_offsets[batch.case_offsets],
        "stain": batch.case_offsets,
    }
    return {level: offsets.tolist() for level, offsets in of.items()}
