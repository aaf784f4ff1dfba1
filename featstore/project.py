"""A project folder: making one, checking its cohort, filling its store."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featstore.cohort import (
    Caps,
    CohortReport,
    Labels,
    Scan,
    check_cohort,
    read_groups,
    read_labels,
    scan,
)
from featstore.cohort.names import natural_sorted, normalize_case
from featstore.cohort.splits import Split, make_splits, write_splits
from featstore.config import FeatstoreConfig
from featstore.errors import CohortError, ConfigError
from featstore.extraction import ExtractionReport, Plan, Progress, extract
from featstore.extraction.report_files import save_report, withdraw_report
from featstore.extraction.shards import parse_shard
from featstore.project_file import document
from featstore.settings import PROJECT_FILE
from featstore.store import Store
from featstore.store.records import read_manifest

REPORTS = "reports"


@dataclass(frozen=True)
class NewProject:
    """A project folder that has just been made, and what its patches look like."""

    path: Path
    report: CohortReport
    classes: dict[str, list[str]]

    def to_text(self) -> str:
        """What was found, and what to do next."""
        guessed = (
            f"\nNo classes were given: every raw code became a class; edit `classes:` in {self.path}."
            if self.classes
            else ""
        )
        return f"{self.report.to_text()}\n\nwrote {self.path}{guessed}\nnext: featstore extract"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {"config": str(self.path), "report": self.report.to_json()}


def init_project(config: FeatstoreConfig, project: Path, patches: Path, force: bool = False) -> NewProject:
    """Look at a folder of patches and write a commented `featstore.yaml`.

    Args:
        config: Settings given as flags; written into the file.
        project: The folder that becomes the project.
        patches: The folder of patches.
        force: Replace an existing `featstore.yaml`.

    Raises:
        FeatstoreError: The patches or labels cannot be used, or there is a project already.
    """
    target = project / PROJECT_FILE
    if target.exists() and not force:
        raise ConfigError(
            f"there is a {PROJECT_FILE} already",
            where=str(target),
            fix="edit it, or replace it with --force",
        )
    if project.resolve().is_relative_to(patches.resolve()):
        raise ConfigError(
            "the project folder lies in the folder of patches: its pictures would be taken for patches",
            where=str(project),
            fix=f"make it elsewhere and run there: featstore init {os.path.abspath(patches)}",
        )
    folder = (
        os.path.relpath(patches, project) if patches.resolve().is_relative_to(project.resolve()) else None
    )
    values = config.model_dump()
    values["patches"]["folder"] = folder or os.path.abspath(patches)
    if values["labels"]["file"] is not None and not (project / values["labels"]["file"]).is_file():
        values["labels"]["file"] = os.path.abspath(values["labels"]["file"])
    config = type(config).model_validate(values)
    labels = _labels(config, project)
    classes = {} if config.classes or labels is None else {_class_name(n): [n] for n in labels.class_names}
    named = config.model_copy(update={"classes": classes}) if classes else config
    report = check_project(named, project, None)
    there = next(folder for folder in (project, *project.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK):
        raise ConfigError(
            "no permission to write here", where=str(project), fix="choose another folder: --project DIR"
        )
    project.mkdir(parents=True, exist_ok=True)
    target.write_text(document(config, classes), encoding="utf-8")
    report.save(project / REPORTS / "check")
    return NewProject(target, report, classes)


def check_project(
    config: FeatstoreConfig, project: Path, caps: Caps | None, sample: int = 64, found: Scan | None = None
) -> CohortReport:
    """The cohort's report, with the stored quality columns where there is a store.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        caps: Limits of training whose effect is told; None for none.
        sample: Patches that are decoded, spread over the stains.
        found: The patch table, if it has been read already.

    Raises:
        FeatstoreError: The patches or labels cannot be used.
    """
    path = project / config.store.path
    existing = read_manifest(path)
    if existing is not None and existing.is_imported and not (project / config.patches.folder).is_dir():
        raise CohortError(
            f"there are no patches to check: the embeddings were imported ({existing.backbone})",
            where=f"patches.folder ({config.patches.folder})",
            fix="`featstore info` and `featstore verify` look at the store; `featstore split` at its cases",
        )
    found = found or _scan(config, project)
    labels = _labels(config, project)
    groups = read_groups(config.groups, project, config.patches.normalize_cases)
    if labels is not None and not set(found.table["case_id"].cat.categories) & labels.known:
        raise _strangers_to_each_other(found, labels)
    quality = None if existing is None else Store.open(path).table()
    return check_cohort(found, labels, groups, config.images, caps=caps, quality=quality, sample=sample)


def extract_project(
    config: FeatstoreConfig,
    project: Path,
    caps: Caps | None = None,
    observe: Callable[[Progress], None] = lambda progress: None,
    announce: Callable[[Scan, Plan, CohortReport | None], None] = lambda scan, plan, report: None,
) -> ExtractionReport:
    """Check the cohort, fill the store, and save a report of both.

    The last share of an array to end also saves, and returns, the report of all shares.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        caps: For the cohort's report.
        observe: Called after every batch.
        announce: Called before the work; the report is None where there is nothing to do.

    Raises:
        FeatstoreError: Whatever stands in the way.
    """
    # Labels are not needed to embed, but a mistake in them is better told now than in two hours.
    _labels(config, project)
    read_groups(config.groups, project, config.patches.normalize_cases)

    def checked(found: Scan, plan: Plan) -> None:
        report = check_project(config, project, caps, 16, found) if len(plan.pending) else None
        if report is not None:
            report.save(project / REPORTS / "check")
        announce(found, plan, report)
        withdraw_report(parse_shard(config.extract.shard), project / REPORTS / "extract")

    report = extract(config, project, observe, checked)
    return replace(report, merged=save_report(report, project / REPORTS / "extract"))


@dataclass(frozen=True)
class WrittenSplits:
    """Splits that have just been written.

    Attributes:
        paths: One file a split.
        splits: Their case ids.
        class_names: In the config's order.
        labels: Class index of every case.
    """

    paths: list[Path]
    splits: list[Split]
    class_names: list[str]
    labels: dict[str, int]

    def to_text(self) -> str:
        """One line a split: cases by part and class."""
        lines = [f"{len(self.paths)} split{'s' * (len(self.paths) > 1)} in {self.paths[0].parent}"]
        for path, split in zip(self.paths, self.splits, strict=True):
            parts = []
            for name, cases in split.parts().items():
                count = Counter(self.class_names[self.labels[case]] for case in cases)
                detail = ", ".join(f"{count[c]} {c}" for c in self.class_names)
                parts.append(f"{name.removesuffix('_cases')} {len(cases)} ({detail})")
            lines.append(f"  {path.name}  {'  '.join(parts)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {
            "splits": [
                {"path": str(path), **{name: list(ids) for name, ids in split.parts().items()}}
                for path, split in zip(self.paths, self.splits, strict=True)
            ]
        }


def split_project(config: FeatstoreConfig, project: Path) -> WrittenSplits:
    """Split the cases that have a label and patches, and write the files.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.

    Raises:
        FeatstoreError: The patches or labels cannot be used, a class is too small, or there are
            splits already.
    """
    labels = _labels(config, project)
    if labels is None:
        raise ConfigError(
            "there are no labels to split by",
            expected="a CSV of cases and classes",
            where="labels.file",
            fix="name it: --labels labels.csv",
        )
    groups = read_groups(config.groups, project, config.patches.normalize_cases)
    cases = _cases(config, project)
    known = {case: index for case, index in labels.by_case.items() if case in cases}
    splits = make_splits(known, groups, config.split.folds, config.split.seed, labels.class_names)
    paths = write_splits(splits, project / config.split.path)
    return WrittenSplits(paths, splits, labels.class_names, known)


def _strangers_to_each_other(found: Scan, labels: Labels) -> CohortError:
    patches, table = (
        ", ".join(list(ids)[:5])
        for ids in (found.table["case_id"].cat.categories, natural_sorted(labels.known))
    )
    return CohortError(
        "no case has both patches and a label",
        expected="the same case ids in file names and labels",
        where=f"file names have {patches}, …; labels.file has {table}, …",
        fix="check labels.case_column, patches.pattern and whether this is the right table",
    )


def _cases(config: FeatstoreConfig, project: Path) -> set[str]:
    """The cases that have patches: in the folder, or, where features were imported, in the store."""
    store = project / config.store.path
    if (project / config.patches.folder).is_dir() or read_manifest(store) is None:
        return set(_scan(config, project).table["case_id"].cat.categories)
    return set(Store.open(store).cases()) - excluded(config)


def excluded(config: FeatstoreConfig) -> frozenset[str]:
    """The cases that are left out, as they are spelt in a store."""
    normalize = config.patches.normalize_cases
    return frozenset(normalize_case(case) if normalize else case for case in config.exclude)


def _scan(config: FeatstoreConfig, project: Path) -> Scan:
    folder = project / config.patches.folder
    return scan(folder, config.patches, config.stains, config.exclude, base=project)


def _labels(config: FeatstoreConfig, project: Path) -> Labels | None:
    if config.labels.file is None:
        return None
    return read_labels(config.labels, config.classes, project, config.patches.normalize_cases)


def _class_name(raw: str) -> str:
    return raw if raw and not raw[0].isdigit() else f"class_{raw}"
