"""On which cases trials are judged: folds of what is not tested on, made once and written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featstore.cohort.names import natural_sorted
from featstore.cohort.splits import Split, make_splits
from featstore.errors import ConfigError


def inner_folds(
    outer: Split,
    labels: Mapping[str, int],
    groups: Mapping[str, str],
    count: int,
    seed: int,
    class_names: Sequence[str],
) -> list[Split]:
    """Splits of an outer split's training and validation cases; its test cases stand in none.

    Args:
        outer: Whose test cases stay unseen.
        labels: Class index of every case.
        groups: Group of some cases; none is parted.
        count: K folds, stratified: each in turn is validated on. 1: as the outer split has it.
        seed: Of the shuffling.
        class_names: In config order.

    Raises:
        ConfigError: A class has fewer cases (or groups) than there are folds.
    """
    if count == 1:
        return [Split(outer.train, outer.val, ())]
    pool = natural_sorted([*outer.train, *outer.val])
    mine = {case: labels[case] for case in pool}
    _check_sizes(mine, groups, count, class_names)
    # Of K folds each in turn is the test of `make_splits`: here it is the validation.
    made = make_splits(mine, groups, count, seed, class_names)
    return [Split(tuple(natural_sorted([*each.train, *each.val])), each.test, ()) for each in made]


def _check_sizes(
    labels: Mapping[str, int], groups: Mapping[str, str], count: int, class_names: Sequence[str]
) -> None:
    members: dict[int, set[str]] = {}
    for case, label in labels.items():
        members.setdefault(label, set()).add(groups.get(case, f"\0{case}"))
    smallest = min(members, key=lambda label: len(members[label]))
    least = len(members[smallest])
    if least < count:
        raise ConfigError(
            f"class {class_names[smallest]} has {least} cases to tune with (groups counted as one)",
            expected=f"at least one for each of the {count} inner folds, besides the test cases",
            where="tune.inner_folds",
            fix=f"--inner-folds {least}" if least > 1 else "--inner-folds 1, or merge classes",
        )


def check_folds(
    folds: Sequence[Split], labels: Mapping[str, int], objective: str, class_names: Sequence[str]
) -> None:
    """Whether every fold can be learned from, and judged by the objective.

    Args:
        folds: Inner ones.
        labels: Class index of every case.
        objective: ``val_loss`` or ``val_auc``.
        class_names: In config order.

    Raises:
        ConfigError: The training cases of a fold are all of one class; or its validation cases, where
            the AUC is asked for.
    """
    parts = [("training", [split.train for split in folds], "two classes to learn from")]
    if objective == "val_auc":
        parts.append(("validation", [split.val for split in folds], "two classes: the AUC of one is none"))
    for part, all_cases, expected in parts:
        for number, cases in enumerate(all_cases):
            found = {labels[case] for case in cases}
            if len(found) < 2:
                only = class_names[found.pop()] if found else "no class"
                raise ConfigError(
                    f"all {len(cases)} {part} cases of inner fold {number} are of {only}",
                    expected=expected,
                    where="tune.inner_folds, tune.objective",
                    fix="fewer inner folds, or --objective val_loss"
                    if part == "validation"
                    else "fewer inner folds, or split again",
                )
