"""What a training is made of: labelled bags from the store, and a split of their cases."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore import __version__
from featstore.cohort import read_groups, read_labels
from featstore.cohort.names import natural_sorted, normalize_case
from featstore.cohort.splits import Split, make_splits, read_split
from featstore.errors import ConfigError, FingerprintMismatch
from featstore.process import keep_freed_memory
from featstore.resident import CaseBags, memory_budget
from featstore.store import Store
from heads.config import Config


@dataclass(frozen=True)
class Cohort:
    """The labelled cases that have embeddings.

    Attributes:
        class_names: In config order.
        labels: Class index of every case.
        groups: Group of some cases.
    """

    class_names: list[str]
    labels: dict[str, int]
    groups: dict[str, str]


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
    split = _choose_split(config, project, cohort.labels, cohort.groups, cohort.class_names, tell)
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
            tell(f"warning: {len(found)} {what} and take no part: {_some(found)}")
    if unmapped := set(labels.unmapped) & there:
        count = f"{len(unmapped)} cases are of no named class"
        tell(f"warning: {count} and take no part: {_some(unmapped)}")
    groups = read_groups(config.groups, project, config.patches.normalize_cases)
    return Cohort(labels.class_names, known, groups)


def read_folds(
    config: Config, project: Path, cohort: Cohort, folds: int | None, tell: Callable[[str], None]
) -> dict[int, Split]:
    """The splits of a study, by fold: those given, else those of the project, else made now.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        cohort: The cases.
        folds: How many are asked for; None: as many as there are.
        tell: Called with remarks.

    Raises:
        FeatstoreError: The files cannot be used, or are not as many as asked for; a class is too small.
    """
    given = project / (config.train.load_splits or config.split.path)
    files = [given] if given.is_file() else sorted(given.glob("data_splits_*.npz"))
    if config.train.fold is not None:
        raise ConfigError(
            f"train.fold is {config.train.fold}, but a study trains every fold",
            expected="--fold for one training, --folds and --seeds for a study",
            where="train.fold, --folds, --seeds",
            fix="leave out --fold (or train.fold: null)",
        )
    if not files and config.train.load_splits:
        raise ConfigError(
            f"there are no splits in {given}",
            expected="a file of a split, or a folder of data_splits_01.npz, …",
            where="train.load_splits",
            fix="check the path, or make splits with `featstore split`",
        )
    if files and folds not in (None, len(files)):
        raise ConfigError(
            f"--folds is {folds}, but {given} holds {len(files)} split{'s' * (len(files) > 1)}",
            expected="as many folds as there are splits",
            where="--folds, train.load_splits, split.path",
            fix="leave out --folds, or have new splits made in another folder: --split-path FOLDER",
        )
    if not files:
        count, seed = folds or config.split.folds, config.split.seed
        made = make_splits(cohort.labels, cohort.groups, count, seed, cohort.class_names)
        tell(f"splits: {f'{count} folds' if count else '60/20/20'}, made now (seed {seed})")
        return dict(enumerate(made))
    found: dict[int, Split] = {}
    for fold, file in ({0: given} if given.is_file() else _by_fold(files)).items():
        split, out = read_split(file, list(cohort.labels), cohort.groups, config.patches.normalize_cases)
        if out:
            tell(f"warning: {file.name}: {len(out)} cases stand in no part of it: {_some(out)}")
        found[fold] = split
    tell(f"splits: {len(found)} of {given}")
    return found


def _by_fold(files: Sequence[Path]) -> dict[int, Path]:
    """``data_splits_01.npz`` … by fold, from 0; one without a number, or two of one, are refused."""
    found: dict[int, Path] = {}
    for file in files:
        number = file.stem.rpartition("_")[2]
        fold = int(number) - 1 if number.isascii() and number.isdecimal() else -1
        other = found.setdefault(fold, file)
        if fold < 0 or other != file:
            twice = f"{other.name} and {file.name} are both split number {fold + 1}"
            raise ConfigError(
                f"the name of {file.name} has no number from 1 on" if fold < 0 else twice,
                expected="data_splits_01.npz, data_splits_02.npz, …: a number of its own for every fold",
                where=str(file.parent),
                fix="give each file a number of its own, or move it out of the folder",
            )
    return dict(sorted(found.items()))


def labels_of(split: Split, labels: Mapping[str, int]) -> dict[str, int]:
    """Class index of every case of the split, in natural order: their place in memory depends on it."""
    return {case: labels[case] for case in natural_sorted(c for p in split.parts().values() for c in p)}


def _choose_split(
    config: Config,
    project: Path,
    labels: dict[str, int],
    groups: dict[str, str],
    class_names: Sequence[str],
    tell: Callable[[str], None],
) -> Split:
    """The split of `load_splits`, else of the project's split folder, else one made now."""
    train, fold = config.train, config.train.fold
    given = project / (train.load_splits or config.split.path)
    path: Path | None = given
    if not given.is_file():
        files = sorted(given.glob("data_splits_*.npz"))
        path = given / f"data_splits_{(fold or 0) + 1:02d}.npz"
        if train.load_splits and not given.exists():
            raise ConfigError(
                f"there is no file or folder {given}",
                expected="an npz file of a split, or a folder of them",
                where="train.load_splits",
                fix="check the path, or make splits with `featstore split`",
            )
        if path not in files and (files or train.load_splits):
            raise ConfigError(
                f"there is no {path.name} in {given}",
                expected=f"one of {', '.join(f.name for f in files) or 'data_splits_01.npz, …'}",
                where="train.load_splits, train.fold",
                fix="--fold K counts from 0; make splits with `featstore split --folds 5`",
            )
        path = path if files else None
    elif fold is not None:
        raise ConfigError(
            f"train.fold is {fold}, but train.load_splits is a single file",
            expected="a folder of splits",
            where="train.load_splits, train.fold",
            fix="leave out --fold, or name the folder",
        )
    if path is not None:
        split, left_out = read_split(path, list(labels), groups, config.patches.normalize_cases)
        tell(f"split: {path}")
        if left_out:
            tell(f"warning: {len(left_out)} cases stand in no part of it: {_some(left_out)}")
        return split
    folds = config.split.folds
    splits = make_splits(labels, groups, folds, config.split.seed, class_names)
    if fold is not None and (folds is None or fold >= folds):
        raise ConfigError(
            f"train.fold is {fold}, but the project has {folds or 'one split and no'} folds",
            expected="a fold from 0 on",
            where="train.fold, split.folds",
            fix="make folds: featstore split --folds 5",
        )
    kind = f"fold {fold or 0} of {folds}" if folds else "60/20/20"
    tell(f"split: {kind}, made now (seed {config.split.seed}); `featstore split` makes files to share")
    return splits[fold or 0]


def load_bags(
    config: Config,
    store: Store,
    labels: dict[str, int],
    tell: Callable[[str], None],
    fingerprint: str | None = None,
) -> CaseBags:
    """The cases' bags, on the device and in memory as far as the settings let them.

    Args:
        config: Of the project, or of a run.
        store: Where the embeddings are.
        labels: Class index of every case that is wanted.
        tell: Called with remarks.
        fingerprint: Of the embeddings that a run was trained on, if there is one.

    Raises:
        FeatstoreError: The store cannot be used, or holds embeddings of another make.
    """
    device = _device(config.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    check_fingerprint(store, fingerprint)
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


def _device(name: str) -> torch.device:
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda" if name == "auto" else name)
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    raise ConfigError(
        f"train.device is {name}, but PyTorch sees no GPU",
        expected="cpu or auto here",
        where="train.device",
        fix="--device cpu, or run where there is a GPU",
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


def _some(cases: set[str] | Sequence[str]) -> str:
    shown = natural_sorted(cases)
    return ", ".join(shown[:10]) + (", …" if len(shown) > 10 else "")
