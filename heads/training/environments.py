"""Labelled images by environment: out of folders ROOT/ENVIRONMENT/CLASS, or of a project's patches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from featstore.cohort import read_groups, read_labels, scan
from featstore.cohort.geometry import DOMAIN
from featstore.cohort.labels import read_domains
from featstore.cohort.names import natural_key, natural_sorted
from featstore.errors import ConfigError, FeatstoreError
from heads.config import Config
from heads.splits import Cohort, test_cases
from heads.training.image_batches import ImageBatches
from heads.training.labelled_images import WHERE, LabelledImages, check_environments, split_each, subset

__all__ = [
    "ImageBatches",
    "LabelledImages",
    "check_environments",
    "project_environments",
    "read_environments",
    "split_each",
]

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LAYOUT = "images as ROOT/ENVIRONMENT/CLASS/*.png, *.jpg or *.jpeg"
_SHOWN = 10


def read_environments(
    root: Path, subset_size: int | None, seed: int, tell: Callable[[str], None] = lambda text: None
) -> LabelledImages:
    """The images of ``ROOT/ENVIRONMENT/CLASS/*.png|jpg|jpeg``, all in natural order.

    Args:
        root: The folder of environments.
        subset_size: Images of each environment, its classes in proportion; None: all.
        seed: Of that choice.
        tell: Called with remarks: what lies there besides, and takes no part.

    Raises:
        ConfigError: There is no such folder, it has another layout, or no image.
    """
    if not root.is_dir():
        raise ConfigError(
            f"{root} is {'no folder' if root.exists() else 'not there'}",
            expected=f"a folder of {_LAYOUT}",
            where=WHERE,
            fix="check the path given as --data-dir",
        )
    found = _Found(root)
    for environment in found.folders(root):
        for label in found.folders(environment):
            found.images_in(label, environment.name)
    if not found.images:
        raise found.no_images()
    for remark in found.remarks():
        tell(remark)
    environments = natural_sorted(environment for environment, _, _ in found.images)
    classes = natural_sorted(label for _, label, _ in found.images)
    images = LabelledImages(
        paths=tuple(path for _, _, path in found.images),
        environment=np.array([environments.index(name) for name, _, _ in found.images], np.int64),
        label=np.array([classes.index(name) for _, name, _ in found.images], np.int64),
        environments=tuple(environments),
        classes=tuple(classes),
    )
    return subset(images, subset_size, seed)


class _Found:
    """What lies below a root.

    Attributes:
        images: Environment, class and path.
        strays: Images that do not lie in a folder of a class, by the folder that they do lie in.
        others: Files that are no images, by suffix; and folders in those of classes.
        empty: Folders of environments or classes without an image.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[tuple[str, str, Path]] = []
        self.strays: Counter[Path] = Counter()
        self.others: Counter[str] = Counter()
        self.empty: list[Path] = []

    def _entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """A folder's folders and images; all else is counted."""
        folders, images = [], []
        try:
            entries = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
            for path in entries:
                if path.name.startswith("."):
                    self.others["hidden"] += 1
                elif path.is_dir():
                    folders.append(path)
                elif path.suffix.lower() in _SUFFIXES and path.is_file():
                    images.append(path)
                else:
                    self.others[path.suffix.lower() or "no suffix"] += 1
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be read: {error.strerror or error}",
                expected="a folder that you may read, with all its sub-folders",
                where=WHERE,
                fix="check its permissions",
            ) from error
        return folders, images

    def folders(self, folder: Path) -> list[Path]:
        """The folders in the root or in an environment, where no image should lie."""
        folders, images = self._entries(folder)
        if images:
            self.strays[folder] += len(images)
        if not folders and not images:
            self.empty.append(folder)
        return folders

    def images_in(self, folder: Path, environment: str) -> None:
        """Take the images of a class."""
        folders, images = self._entries(folder)
        self.others["folders in those of classes"] += len(folders)
        self.images += [(environment, folder.name, path) for path in images]
        if not images:
            self.empty.append(folder)

    def remarks(self) -> list[str]:
        """What takes no part."""
        said = []
        if self.strays:
            count = sum(self.strays.values())
            said.append(
                f"warning: {count} images take no part, as they do not lie in a folder of a class: in "
                + _some([str(folder) for folder in self.strays])
            )
        others = {name: count for name, count in self.others.items() if count}
        if others:
            listed = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
            said.append(f"warning: not PNG or JPEG, and takes no part: {listed}")
        if self.empty:
            said.append(f"warning: folders without images: {_some([str(folder) for folder in self.empty])}")
        return said

    def no_images(self) -> FeatstoreError:
        """The error that says what was found instead of images in folders of classes."""
        folders, _ = self._entries(self.root)
        if self.strays[self.root]:
            found = f"{self.strays[self.root]} images lie in {self.root} itself"
        elif self.strays:
            folder, count = next(iter(self.strays.items()))
            found = (
                f"{count} images lie in {folder}, and no folders of classes: is it ROOT/CLASS/*, without "
                "environments?"
            )
        elif self.others["folders in those of classes"]:
            found = (
                f"there are folders below {self.root}/ENVIRONMENT/CLASS, and no images in those of classes"
            )
        elif folders:
            listed = _some([folder.name for folder in folders])
            found = f"no images in the {len(folders)} folders of {self.root} ({listed})"
        else:
            found = f"{self.root} is empty"
        return ConfigError(
            found,
            expected=_LAYOUT,
            where=WHERE,
            fix="sort the images into a folder for each environment, and in it one for each class",
        )


def project_environments(
    config: Config,
    project: Path,
    subset_size: int | None,
    seed: int,
    tell: Callable[[str], None] = lambda text: None,
) -> LabelledImages:
    """A project's patches, with the labels of their cases.

    A patch's environment is its ``domain`` in the table of positions (`patches.geometry`), else that of
    its case in the table of labels. What belongs to one case, or one of `groups`, is one group.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        subset_size: Patches of each environment, its classes in proportion; None: all.
        seed: Of that choice.
        tell: Called with remarks: who takes no part.

    Raises:
        FeatstoreError: Patches, labels or groups cannot be used, or no patch has both label and domain.
    """
    normalize = config.patches.normalize_cases
    labels = read_labels(config.labels, config.classes, project, normalize)
    groups = read_groups(config.groups, project, normalize)
    patches = _with_domains(config, project)
    patches["label"] = patches["case"].map(labels.by_case)
    _tell_left_out(patches, tell)
    patches = patches[patches["label"].notna() & (patches["domain"] != "")]
    known = {case: labels.by_case[case] for case in natural_sorted(set(patches["case"]))}
    tested = _tested(config, project, Cohort(labels.class_names, known, groups), tell)
    patches = patches[~patches["case"].isin(tested)]
    if not len(patches):
        raise ConfigError(
            "no patch has both a label and a domain",
            expected="the same case ids in file names, labels and domains",
            where=f"labels.file, {config.patches.folder}",
            fix="check the columns of the table of labels",
        )
    together = [f"group {groups[case]}" if case in groups else f"case {case}" for case in patches["case"]]
    names = natural_sorted(patches["domain"])
    images = LabelledImages(
        paths=tuple(project / config.patches.folder / path for path in patches["path"]),
        environment=np.array([names.index(name) for name in patches["domain"]], np.int64),
        label=patches["label"].to_numpy(np.int64),
        environments=tuple(names),
        classes=tuple(labels.class_names),
        channel_order=config.images.channel_order,
        max_pixels=config.images.max_pixels,
        group=pd.factorize(np.array(together, object))[0].astype(np.int64),
    )
    return subset(images, subset_size, seed)


def _tested(config: Config, project: Path, cohort: Cohort, tell: Callable[[str], None]) -> tuple[str, ...]:
    """The cases that heads are to be tested on: an encoder that has seen their labels would spoil that."""
    given = config.train.load_splits is not None or any((project / config.split.path).glob("*.npz"))
    try:
        found = test_cases(config, project, cohort, tell) if cohort.labels else ()
    except FeatstoreError as error:
        if given:
            raise
        tell(f"warning: no split can be made ({error.found}): there are no test cases to keep out")
        return ()
    if found:
        tell(f"{len(found)} test cases of the split take no part: heads are to be tested on them")
    return found


def _with_domains(config: Config, project: Path) -> pd.DataFrame:
    """``case, path, domain`` of every patch; the domain is empty where none is known."""
    folder = project / config.patches.folder
    by_case = read_domains(config.labels, project, config.patches.normalize_cases)
    table = scan(folder, config.patches, config.stains, config.exclude, base=project).table
    if not by_case and DOMAIN not in table.columns:
        raise ConfigError(
            "nothing says from which environment a patch is",
            expected="a column domain in the table of labels, by case, or in patches.geometry, by patch",
            where="labels.file, patches.geometry",
            fix="add such a column; or give folders of images: --data-dir ROOT",
        )
    cases = table["case_id"].astype(str).tolist()
    own = table[DOMAIN].tolist() if DOMAIN in table.columns else [""] * len(cases)
    domains = [mine or by_case.get(case, "") for mine, case in zip(own, cases, strict=True)]
    return pd.DataFrame({"case": cases, "path": table["path"].tolist(), "domain": domains})


def _tell_left_out(patches: pd.DataFrame, tell: Callable[[str], None]) -> None:
    """Tell of cases without a label, and of patches of the others without a domain."""
    labelled = patches["label"].notna()
    if unlabelled := set(patches["case"][~labelled]):
        tell(f"warning: {len(unlabelled)} cases have no label and take no part: {_some(unlabelled)}")
    nowhere = patches["case"][labelled & (patches["domain"] == "")]
    if len(nowhere):
        some = _some(set(nowhere))
        tell(f"warning: {len(nowhere)} patches have no domain and take no part, of cases {some}")


def _some(names: Sequence[str] | set[str]) -> str:
    shown = natural_sorted(names)
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")
