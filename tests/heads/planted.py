"""A small store with a planted signal, and trainings on it: class 1 has some patches that stand out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from featstore.bags import BagBatch
from featstore.cohort.splits import Split, save_split
from featstore.resident import CaseBags
from featstore.store import Slice, Store, StoreWriter
from heads.config import Config, HeadConfig, TrainConfig, resolved
from heads.models.head import Head, build_head
from heads.training.loop import Training
from tests import helpers
from tests.command_line import write_config
from tests.store.builders import make_slice, make_spec

DIM = 12
STAINS = ("h&e", "melan", "sox10")
NAMES = ("benign", "malignant")
CASES = tuple(str(i) for i in range(1, 21))
LABELS = {case: i % 2 for i, case in enumerate(CASES)}
LONE = "3"  # a training case of a single patch
SPLIT = Split(train=CASES[:12], val=CASES[12:16], test=CASES[16:])
SMALL = {
    "embed_dim": 8,
    "attention_hidden": 6,
    "hidden_dim": 8,
    "attention_dim": 6,
    "k_sample": 3,
    "transmil_heads": 2,
    "transmil_landmarks": 5,
}
BOTH = ("hierarchical", "dual_stream")
FLAT = ("abmil", "gated_abmil", "dsmil", "clam_sb", "transmil", "mean", "max")
HEADS = (*BOTH, *FLAT)
PLAIN = ("mean", "max")  # without attention, so that no penalty can act on it
SOLVED = ("linear",)  # fitted by a solver, without optimiser steps and without attention
ORDERED = ("transmil",)  # the order of a case's patches matters
POOLS = ("tanh", "gated", "multi_head", "transformer")  # of hierarchical


def planted_slice(case: str, stain: str, slice_id: str, features: np.ndarray) -> Slice:
    """A slice with these features; every third patch has a grey-level entropy of 0, the others 5."""
    made = make_slice(case, stain, slice_id, list(range(len(features))))
    quality = made.columns["quality"].copy()
    quality[:, 5] = np.where(np.arange(len(features)) % 3 == 0, 0.0, 5.0)
    return Slice(stain, slice_id, {**made.columns, "features": features, "quality": quality})


def make_store(path: Path, dtype: str = "float16", offset: float = 0.0) -> Store:
    """Cases of 1 to 3 stains; 30 % of the patches of class 1 stand out in four of the features."""
    writer = StoreWriter(path, make_spec(dim=DIM, stored_dtype=dtype), {})
    for i, case in enumerate(CASES):
        rng = np.random.default_rng(i)
        stains = STAINS[:1] if case == LONE else STAINS[i % 2 :] if i % 3 else STAINS
        slices = []
        for stain in stains:
            for number in range(1 if case == LONE else int(rng.integers(1, 4))):
                count = 1 if case == LONE else int(rng.integers(4, 13))
                x = rng.normal(size=(count, DIM)) + offset
                x[:, -1] = offset + 1  # does not vary
                stand_out = rng.random(count) < 0.3 * LABELS[case]
                x[stand_out, :4] += 3.0
                slices.append(planted_slice(case, stain, f"match_{number}", x.astype(dtype)))
        writer.commit(case, slices)
    return Store.open(path)


def make_bags(path: Path, memory: int = 10**9, **store: object) -> CaseBags:
    """The cohort in a new store."""
    return CaseBags(make_store(path, **store), LABELS, memory)  # type: ignore[arg-type]


def make_config(name: str = "hierarchical", head: dict | None = None, **train: object) -> Config:
    """Small widths, no dropout, float32, unless told otherwise."""
    settings = HeadConfig(**{"name": name, "dropout": 0.0, **SMALL, **(head or {})})
    course = {"device": "cpu", "amp": "off", **train}
    return resolved(Config(head=settings, train=TrainConfig(**course)))  # type: ignore[arg-type]


def make_training(
    bags: CaseBags,
    config: Config,
    split: Split = SPLIT,
    change: Callable[[Head], object] = lambda head: None,
) -> Training:
    """A training that has not begun."""
    head = build_head(config.head, DIM, len(NAMES), config.train.seed)
    change(head)
    return Training(head, bags, split, config.train, NAMES)


def trained(
    bags: CaseBags, config: Config, change: Callable[[Head], object] = lambda head: None
) -> Training:
    """A training that has ended."""
    training = make_training(bags, config, change=change)
    training.run()
    return training


def gradient(head: Head) -> np.ndarray:
    """All gradients end to end."""
    return np.concatenate(
        [p.grad.double().numpy().ravel() for p in head.parameters() if p.grad is not None]
    )


def parameters(state: dict[str, torch.Tensor]) -> np.ndarray:
    """All of a state dict's numbers end to end."""
    return np.concatenate([value.double().numpy().ravel() for value in state.values()])


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Spy:
    """Notes every batch that is asked of a cohort, and whether it was for training."""

    def __init__(self, training: Training, monkeypatch: object) -> None:
        self.seen: list[tuple[bool, BagBatch]] = []
        ask = training.bags.batch

        def batch(bags: list) -> BagBatch:
            made = ask(bags)
            self.seen.append((training.head.training and torch.is_grad_enabled(), made))
            return made

        monkeypatch.setattr(training.bags, "batch", batch)  # type: ignore[attr-defined]

    def batches(self, training: bool) -> list[BagBatch]:
        """Those of training, or those of validation."""
        return [made for learned, made in self.seen if learned is training]


def make_planted_project(folder: Path, *settings: dict) -> Path:
    """A project folder with settings, labels, the store of `make_store` and `split.npz` of `SPLIT`."""
    write_config(folder, *settings)
    helpers.write_labels(folder, LABELS)
    make_store(folder / "store")
    save_split(folder / "split.npz", SPLIT)
    return folder
