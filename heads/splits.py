"""Which case is for what: the splits of a training or a study, given, of the project, or made now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from featstore.cohort.names import natural_sorted
from featstore.cohort.splits import Split, make_splits, read_split
from featstore.config import SplitConfig
from featstore.errors import ConfigError
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
    files = study_files(config, project, folds)
    if not files:
        count, seed = folds or config.split.folds, config.split.seed
        made = make_splits(cohort.labels, cohort.groups, count, seed, cohort.class_names)
        tell(f"splits: {f'{count} folds' if count else '60/20/20'}, made now (seed {seed})")
        return dict(enumerate(made))
    found: dict[int, Split] = {}
    for fold, file in files.items():
        split, out = read_split(file, list(cohort.labels), cohort.groups, config.patches.normalize_cases)
        if out:
            tell(f"warning: {file.name}: {len(out)} cases stand in no part of it: {some_of(out)}")
        found[fold] = split
    tell(f"splits: {len(found)} of {project / (config.train.load_splits or config.split.path)}")
    return found


def study_files(config: Config, project: Path, folds: int | None) -> dict[int, Path]:
    """The files of a study's splits, by fold; none where splits are to be made.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        folds: How many are asked for; None: as many as there are.

    Raises:
        ConfigError: The settings name one fold, or files that are not there; the files are not as many as
            asked for, or not one a fold.
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
    if given.is_file():
        return {0: given}
    return _by_fold(files)


def with_folds(config: Config, folds: int | None) -> Config:
    """The config of a study of so many folds.

    Raises:
        ConfigError: There cannot be so many.
    """
    if folds is None:
        return config
    try:
        SplitConfig(folds=folds)
    except ValidationError as error:  # of split.folds, a name that nobody typed
        raise ConfigError(
            f"--folds is {folds}",
            expected=error.errors()[0]["msg"].removeprefix("Input should be "),
            where="--folds",
            fix="--folds 5; or one split and many seeds: leave out --folds, --seeds 10",
        ) from error
    return config.model_copy(update={"split": config.split.model_copy(update={"folds": folds})})


def test_cases(
    config: Config, project: Path, cohort: Cohort, tell: Callable[[str], None]
) -> tuple[str, ...]:
    """The cases that a head trained in this project is tested on: what else learns must not see them.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        cohort: The labelled cases.
        tell: Called with remarks.

    Raises:
        FeatstoreError: The splits cannot be used.
    """
    return choose_split(config, project, cohort, tell).test


def choose_split(config: Config, project: Path, cohort: Cohort, tell: Callable[[str], None]) -> Split:
    """The split of `load_splits`, else of the project's split folder, else one made now.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        cohort: The cases.
        tell: Called with remarks.

    Raises:
        FeatstoreError: The files cannot be used, or there is no such fold.
    """
    labels, groups, class_names = cohort.labels, cohort.groups, cohort.class_names
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
            tell(f"warning: {len(left_out)} cases stand in no part of it: {some_of(left_out)}")
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


def some_of(cases: set[str] | Sequence[str]) -> str:
    """The first ten, in natural order."""
    shown = natural_sorted(cases)
    return ", ".join(shown[:10]) + (", …" if len(shown) > 10 else "")
