"""Splits by case and group: made stratified, written as the lab's npz files, read with suspicion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import natural_key, natural_sorted, normalize_case
from featstore.errors import CohortError

PARTS = ("train_cases", "val_cases", "test_cases")
# 60/20/20 is the first of five folds: one for the test, one for validation, three for training.
_DEFAULT_FOLDS = 5


@dataclass(frozen=True)
class Split:
    """Case ids of the three parts, each in natural order."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The parts by their names in the files."""
        return dict(zip(PARTS, (self.train, self.val, self.test), strict=True))


def make_splits(
    labels: Mapping[str, int],
    groups: Mapping[str, str],
    folds: int | None,
    seed: int,
    class_names: Sequence[str] = (),
) -> list[Split]:
    """Stratified splits in which no group is parted.

    Args:
        labels: Class index of every case.
        groups: Group of some cases; each other case is a group of its own.
        folds: K ≥ 3 splits, k from 0: test = fold k, validation = fold k + 1 mod K, training the
            rest. None: one split of 60/20/20.
        class_names: For messages.
        seed: Of the shuffling; the same cases and seed give the same splits.

    Raises:
        CohortError: A class has fewer cases (or groups) than there are folds.
    """
    count = folds or _DEFAULT_FOLDS
    cases = natural_sorted(labels)
    classes = np.array([labels[case] for case in cases])
    group_of_case = np.array([groups.get(case, f"\0{case}") for case in cases])
    _check_sizes(classes, group_of_case, folds, class_names)
    fold_of_case = _folds(classes, group_of_case, count, seed)
    splits = []
    for k in range(count if folds else 1):
        val = (k + 1) % count
        test_mask, val_mask = fold_of_case == k, fold_of_case == val
        splits.append(
            Split(
                train=_chosen(cases, ~test_mask & ~val_mask),
                val=_chosen(cases, val_mask),
                test=_chosen(cases, test_mask),
            )
        )
    return splits


def _folds(
    classes: NDArray[np.int64], groups: NDArray[np.str_], count: int, seed: int
) -> NDArray[np.int64]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    grouped = len(set(groups.tolist())) < len(groups)
    # Without groups the plain one is exact: every fold has its share of every class, give or take one.
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    splitter = kind(n_splits=count, shuffle=True, random_state=seed)
    found = splitter.split(np.zeros(len(classes)), classes, groups if grouped else None)
    fold = np.empty(len(classes), np.int64)
    for k, (_, test) in enumerate(found):
        fold[test] = k
    return fold


def _check_sizes(
    classes: NDArray[np.int64], groups: NDArray[np.str_], folds: int | None, class_names: Sequence[str]
) -> None:
    members = {c: set(groups[classes == c].tolist()) for c in sorted(set(classes.tolist()))}
    if not members:
        raise CohortError(
            "there are no cases with a label and patches", fix="check labels.file and classes"
        )
    smallest = min(members, key=lambda c: len(members[c]))
    least = folds or _DEFAULT_FOLDS
    if len(members[smallest]) < least:
        name = class_names[smallest] if class_names else smallest
        own = "write a split of your own and name it: --load-splits FILE"
        raise CohortError(
            f"class {name} has {len(members[smallest])} cases (groups of cases counted as one)",
            expected=f"at least one for each of the {folds} folds"
            if folds
            else f"at least {least} to split",
            where="split.folds, classes",
            fix=f"use fewer folds, merge classes, or {own}" if folds else f"merge classes, or {own}",
        )


def _chosen(cases: Sequence[str], mask: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(case for case, take in zip(cases, mask.tolist(), strict=True) if take)


def write_splits(splits: Sequence[Split], folder: Path) -> list[Path]:
    """Write ``data_splits_01.npz`` … (fold k in file k + 1).

    Each holds ``train_cases``, ``val_cases`` and ``test_cases`` (`save_split`).

    Raises:
        CohortError: There are such files already.
    """
    if old := sorted(folder.glob("data_splits_*.npz")):
        raise CohortError(
            f"there are splits already ({old[0].name}, …)",
            where=str(folder),
            fix="move them away, or write elsewhere with --split-path FOLDER",
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"data_splits_{k + 1:02d}.npz" for k in range(len(splits))]
    for path, split in zip(paths, splits, strict=True):
        save_split(path, split)
    return paths


def save_split(path: Path, split: Split) -> None:
    """Write one split: ids as int64 where all of them are numbers, else as text. No pickle."""
    cases = [case for part in split.parts().values() for case in part]
    numeric = all(case.isascii() and case.isdigit() and case == str(int(case[:18])) for case in cases)
    dtype = np.int64 if numeric else np.str_
    arrays = {name: np.array(ids, dtype) for name, ids in split.parts().items()}
    np.savez(path, allow_pickle=False, **arrays)


def read_split(
    path: Path, cases: Sequence[str], groups: Mapping[str, str], normalize_cases: bool = True
) -> tuple[Split, list[str]]:
    """Read a split and hold it against the cohort.

    Args:
        path: An npz file with ``train_cases``, ``val_cases`` and ``test_cases``.
        cases: The cohort.
        groups: Group of some cases.
        normalize_cases: Whether ``038`` means ``38``.

    Returns:
        The split, and the cases of the cohort that it leaves out.

    Raises:
        CohortError: The file is no such file, a case stands in two parts or is not in the cohort,
            a part is empty, or a group is parted.
    """
    parts = {name: _ids(array, path, name, normalize_cases) for name, array in _arrays(path).items()}
    problems = []
    count = Counter(case for ids in parts.values() for case in ids)
    for title, found in (
        ("in two parts, or twice", [case for case, n in count.items() if n > 1]),
        ("not in the cohort", set(count) - set(cases)),
    ):
        if found:
            shown = natural_sorted(found)
            problems.append(f"{len(shown)} cases are {title}: {', '.join(shown[:10])}")
    problems += [f"{name} is empty" for name, ids in parts.items() if not ids]
    homes: dict[str, set[str]] = {}
    for name, ids in parts.items():
        for case in ids:
            if case in groups:
                homes.setdefault(groups[case], set()).add(name)
    parted = natural_sorted(group for group, names in homes.items() if len(names) > 1)
    if parted:
        problems.append(f"{len(parted)} groups are parted: {', '.join(parted[:10])}")
    if problems:
        raise CohortError(
            "the splits cannot be used: " + "; ".join(problems),
            expected="every case of the cohort in at most one part, groups together",
            where=str(path),
            fix="make new ones with `featstore split`, or mend labels, groups or exclusions",
        )
    ordered = [tuple(sorted(parts[name], key=natural_key)) for name in PARTS]
    return Split(*ordered), natural_sorted(set(cases) - set(count))


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            missing = [name for name in PARTS if name not in file]
            arrays = {} if missing else {name: file[name] for name in PARTS}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("its members are no arrays")
    except Exception as error:  # what numpy raises depends on where the bytes stop making sense
        objects = "Object arrays" in str(error)
        hint = "it holds Python objects, which can run code" if objects else f"it is no npz file ({error})"
        raise CohortError(
            f"the splits cannot be read: {hint}",
            expected=f"an npz file with {', '.join(PARTS)}, of numbers or text",
            where=str(path),
            fix="make new ones with `featstore split`, or save plain arrays: np.savez(path, train_cases=…)",
        ) from error
    if missing:
        raise CohortError(
            f"the splits lack {', '.join(missing)}", expected=", ".join(PARTS), where=str(path)
        )
    return arrays


def _ids(array: NDArray[np.generic], path: Path, name: str, normalize_cases: bool) -> list[str]:
    if array.dtype.kind not in "iuUS" or array.ndim != 1:
        if array.size == 0:
            return []
        raise CohortError(
            f"{name} holds {array.dtype} of shape {array.shape}",
            expected="one row of whole numbers or of text",
            where=str(path),
        )
    try:
        texts = array.astype(np.str_).tolist()
    except UnicodeDecodeError as error:
        raise CohortError(
            f"{name} holds bytes that are no text", expected="ids as text or numbers", where=str(path)
        ) from error
    return [normalize_case(text) if normalize_cases else text for text in texts]
