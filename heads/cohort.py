"""What a training is made of: labelled bags from the store, and a split of their cases."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore import __version__
from featstore.cohort import read_groups, read_labels
from featstore.cohort.names import natural_sorted, normalize_case
from featstore.cohort.splits import Split
from featstore.errors import ConfigError, FingerprintMismatch
from featstore.extraction.forward import choose_device
from featstore.process import keep_freed_memory
from featstore.resident import CaseBags, memory_budget
from featstore.store import Store
from featstore.store.scratch import copy_to_scratch, scratch_folder
from heads.config import Config
from heads.splits import Cohort, choose_split, some_of


def read_cohort(
    config: Config, project: Path, store: Store, tell: Callable[[str], None]
) -> tuple[list[str], dict[str, int], Split]:
    """Class names, labels of the split's cases, and the split.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        store: Where the embeddings are; cases without any take no part.
        tell: Called with remarks.

    Raises:
        FeatstoreError: Labels or split cannot be used, or no labelled case has embeddings.
    """
    cohort = labelled_cases(config, project, store, tell)
    split = choose_split(config, project, cohort, tell)
    return cohort.class_names, labels_of(split, cohort.labels), split


def labelled_cases(config: Config, project: Path, store: Store, tell: Callable[[str], None]) -> Cohort:
    """The cases that have a label and embeddings; arguments and errors as `read_cohort`."""
    labels = read_labels(config.labels, config.classes, project, config.patches.normalize_cases)
    normalize = config.patches.normalize_cases
    out = {normalize_case(case) if normalize else case for case in config.exclude}
    there = set(store.cases()) - out
    known = {case: index for case, index in labels.by_case.items() if case in there}
    if not known:
        raise ConfigError(
            "no labelled case has embeddings",
            expected="the same case ids in the store and in the labels",
            where=f"{store.path} has {', '.join(store.cases()[:5]) or 'no case'}, …",
            fix="run `featstore extract`, or check labels.file and classes",
        )
    for found, what in (
        (set(labels.by_case) - there - out, "labelled cases have no embeddings"),
        (there - labels.known, "cases of the store have no label"),
    ):
        if found:
            tell(f"warning: {len(found)} {what} and take no part: {some_of(found)}")
    if unmapped := set(labels.unmapped) & there:
        count = f"{len(unmapped)} cases are of no named class"
        tell(f"warning: {count} and take no part: {some_of(unmapped)}")
    groups = read_groups(config.groups, project, config.patches.normalize_cases)
    return Cohort(labels.class_names, known, groups)


def labels_of(split: Split, labels: Mapping[str, int]) -> dict[str, int]:
    """Class index of every case of the split, in natural order: their place in memory depends on it."""
    return {case: labels[case] for case in natural_sorted(c for p in split.parts().values() for c in p)}


def load_bags(
    config: Config,
    store: Store,
    labels: dict[str, int],
    tell: Callable[[str], None],
    fingerprint: str | None = None,
) -> CaseBags:
    """The cases' bags, on the device and in memory as far as the settings let them.

    Where ``store.scratch`` says so, they are read from a copy on the node's own disk.

    Args:
        config: Of the project, or of a run.
        store: Where the embeddings are.
        labels: Class index of every case that is wanted.
        tell: Called with remarks.
        fingerprint: Of the embeddings that a run was trained on, if there is one.

    Raises:
        FeatstoreError: The store cannot be used, or holds embeddings of another make.
    """
    device = choose_device(config.train.device, "train.device")
    if device.type == "cpu":
        keep_freed_memory()
    check_fingerprint(store, fingerprint)
    if config.store.scratch is not None:
        store = copy_to_scratch(store, labels, scratch_folder(config.store.scratch), tell)
    memory = memory_budget(config.train.memory_gb, device)
    bags = CaseBags(store, labels, memory, device, config.train.views)
    if bags.resident is None:
        tell("warning: the embeddings do not fit into train.memory_gb; every epoch reads them again")
    return bags


def check_fingerprint(store: Store, fingerprint: str | None) -> None:
    """Raises FingerprintMismatch if a store's embeddings are of another make than a run was trained on."""
    if fingerprint not in (None, store.spec.fingerprint, store.spec.plain.fingerprint):
        raise FingerprintMismatch(
            f"the store has {store.spec.dim} features of {store.spec.backbone}, "
            f"fingerprint {store.spec.fingerprint}",
            expected=f"the embeddings that the run was trained on, fingerprint {fingerprint}",
            where=str(store.path),
            fix="name the run's store (run.json says which), or train anew",
        )


def describe(bags: CaseBags, names: Sequence[str], labels: dict[str, int], split: Split) -> dict[str, Any]:
    """`run.json`: what was trained on what, and by which versions."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dim": bags.store.spec.dim,
        "class_names": list(names),
        "labels": labels,
        "cases": {part: len(cases) for part, cases in split.parts().items()},
        "store": {
            "path": str(bags.store.path),
            "fingerprint": bags.store.spec.plain.fingerprint,
            "spec": asdict(bags.store.spec),
            "digest": bags.store.digest(natural_sorted(labels)),
        },
        "versions": {
            "featstore": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {"device": str(bags.device), "threads": torch.get_num_threads()},
    }


def check_unchanged(bags: CaseBags, about: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Tell if the store no longer holds what the run was trained on."""
    known = about["store"]["digest"]  # empty: of a run that was not trained on a store
    if known and bags.store.digest(natural_sorted(about["labels"])) != known:
        tell("warning: the store holds other embeddings of these cases now than when the run was trained")


def sizes(split: Split) -> str:
    """`26 train, 9 val, 9 test cases`."""
    return (
        ", ".join(f"{len(c)} {name.removesuffix('_cases')}" for name, c in split.parts().items()) + " cases"
    )
