"""Images with a class and an environment (a scanner, a hospital, a camera) each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ConfigError

Ints = NDArray[np.int64]
WHERE = "vae.data_dir"


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Files of images, each of one class and one environment.

    Attributes:
        paths: N files, PNG or JPEG.
        environment: (N,) index into ``environments``.
        label: (N,) index into ``classes``.
        environments: Names.
        classes: Names.
        channel_order: ``rgb``, or ``bgr`` if the files hold red and blue swapped.
        max_pixels: Larger images are refused.
        group: (N,) number of what must never be parted (a case); None: every image is on its own.
    """

    paths: tuple[Path, ...]
    environment: Ints
    label: Ints
    environments: tuple[str, ...]
    classes: tuple[str, ...]
    channel_order: str = "rgb"
    max_pixels: int = 100_000_000
    group: Ints | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> LabelledImages:
        """Some of the images; the names of environments and classes stay, and so do their indices.

        Args:
            chosen: Indices, or (N,) whether each is wanted.
        """
        index = np.arange(len(self))[chosen]
        return replace(
            self,
            paths=tuple(self.paths[i] for i in index.tolist()),
            environment=self.environment[index],
            label=self.label[index],
            group=None if self.group is None else self.group[index],
        )


def check_environments(images: LabelledImages, classes_needed: int = 2) -> None:
    """Whether every environment that has images has all classes.

    Else a classifier could tell classes by what tells environments: that is what is to be unlearned.

    Args:
        images: Of one environment or more.
        classes_needed: Fewer in an environment are an error.

    Raises:
        ConfigError: An environment has too few classes, or not those of the others; or there is no image.
    """
    if not len(images):
        raise ConfigError(
            "there are no images",
            expected="images of two classes or more in every environment",
            where=WHERE,
            fix="name the folder of environments: --data-dir ROOT",
        )
    present = {
        images.environments[each]: [
            images.classes[label] for label in np.unique(images.label[images.environment == each]).tolist()
        ]
        for each in np.unique(images.environment).tolist()
    }
    listed = "; ".join(f"{name}: {', '.join(classes)}" for name, classes in present.items())
    poor = [name for name, classes in present.items() if len(classes) < classes_needed]
    if poor:
        raise ConfigError(
            f"environment {poor[0]} has images of {len(present[poor[0]])} "
            f"class{'es' * (len(present[poor[0]]) != 1)} only ({', '.join(present[poor[0]])})",
            expected=f"{classes_needed} classes or more in every environment; found {listed}",
            where=WHERE,
            fix="add images of the other classes, or leave that environment out",
        )
    if len({tuple(classes) for classes in present.values()}) > 1:
        raise ConfigError(
            "the environments do not have the same classes",
            expected=f"the same names of classes in each; found {listed}",
            where=WHERE,
            fix="rename the folders of classes, or leave out the classes that not all have",
        )


def split_each(images: LabelledImages, share: float, seed: int) -> tuple[Ints, Ints]:
    """Keeps a share of every class of every environment for validation.

    What belongs together (``group``) goes to one side; a group counts where most of its images are.

    Args:
        images: All of them.
        share: Of the images, or of the groups, in (0, 1): rounded, but at least one and not all where
            there are two or more; one alone is trained on.
        seed: Of the choice.

    Returns:
        The indices to train on and those for validation, both ascending.
    """
    group = np.arange(len(images)) if images.group is None else images.group
    _, group = np.unique(group, return_inverse=True)
    kind = images.environment * max(1, len(images.classes)) + images.label
    kind_of = _commonest(group, kind)
    rng = np.random.default_rng(seed)
    kept = np.zeros(len(kind_of), bool)
    for each in np.unique(kind_of).tolist():
        members = rng.permutation(np.flatnonzero(kind_of == each))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        kept[members[:count]] = True
    return np.flatnonzero(~kept[group]), np.flatnonzero(kept[group])


def _commonest(group: Ints, kind: Ints) -> Ints:
    """Of each group the kind that most of its members have; the lowest of several."""
    pairs, counts = np.unique(np.column_stack([group, kind]), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    _, first = np.unique(pairs[order, 0], return_index=True)
    return np.asarray(pairs[order[first], 1], np.int64)


def subset(images: LabelledImages, size: int | None, seed: int) -> LabelledImages:
    """So many images of every environment, its classes in proportion, drawn with a seed.

    Args:
        images: All of them.
        size: Images an environment, of a smaller one all; None: all of all.
        seed: Of the choice.

    Returns:
        The images in their order. Every class that an environment has is kept where ``size`` allows.
    """
    if size is None:
        return images
    chosen = []
    for each in np.unique(images.environment).tolist():
        rng = np.random.default_rng([seed, each])
        inside = np.flatnonzero(images.environment == each)
        labels, counts = np.unique(images.label[inside], return_counts=True)
        quotas = _quotas(counts, size)
        for label, quota in zip(labels.tolist(), quotas.tolist(), strict=True):
            chosen.append(rng.permutation(inside[images.label[inside] == label])[:quota])
    return images.take(np.sort(np.concatenate(chosen))) if chosen else images


def _quotas(counts: Ints, size: int) -> Ints:
    """Whole numbers in proportion to counts, of the sum ``size``, by the largest remainders; 1 at least."""
    if size >= counts.sum():
        return counts
    least = np.ones_like(counts) if size >= len(counts) else np.zeros_like(counts)
    exact = least + (counts - least) * (size - least.sum()) / (counts - least).sum()
    quotas = np.floor(exact).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: size - quotas.sum()]] += 1
    return np.asarray(quotas, np.int64)
