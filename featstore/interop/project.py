"""`import` and `export` in a project folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from featstore.cohort import read_groups, read_labels
from featstore.cohort.splits import Split, make_splits, read_split
from featstore.cohort.tables import write_csv
from featstore.config import FeatstoreConfig
from featstore.errors import ConfigError, FeatstoreError
from featstore.interop.clam_export import ExportReport, export_clam
from featstore.interop.importing import import_bags
from featstore.interop.placing import Placing
from featstore.interop.registry import open_source
from featstore.interop.report import ImportReport, Target
from featstore.interop.source import Options
from featstore.project import REPORTS, excluded
from featstore.project_file import document
from featstore.settings import PROJECT_FILE
from featstore.store import Store

_LABELS = "labels.csv"
Observer = Callable[[int, int], None]


def import_project(
    config: FeatstoreConfig,
    project: Path,
    source: Path,
    observe: Observer = lambda done, total: None,
) -> ImportReport:
    """Import features into the project's store, and make the folder a project if it is none.

    Args:
        config: The project's settings; ``imports`` says what the foreign files do not.
        project: The folder that relative paths of the config start from.
        source: The foreign folder or file.
        observe: Called after every bag with how many are done, and of how many.

    Raises:
        FeatstoreError: Whatever stands in the way.
    """
    given = config.imports
    target = Target(
        path=project / config.store.path,
        file_format=config.store.format,
        part_bytes=config.extract.part_mb << 20,
        precision=given.precision,
        encoder=given.encoder,
        skip_bad=given.on_bad == "skip",
        exclude=excluded(config),
    )
    table = None if given.map is None else project / given.map
    opened = open_source(source, given.source_format, Options(config, project, given.patch_size, given.mpp))
    report = import_bags(opened, Placing(config, given.default_stain, table), target, observe)
    _settle(config, project, report)
    folder = project / REPORTS / "import"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    write_csv(folder / "skipped.csv", ["path", "reason"], report.skipped)
    return report


def _settle(config: FeatstoreConfig, project: Path, report: ImportReport) -> None:
    """Write the labels that came with the features, and a project file where there is none."""
    values = config.model_dump()
    path, header = project / _LABELS, ["Case", "Class"]
    if report.labels and config.labels.file is not None:
        _compare_labels(config, project, report)
    elif report.labels and path.exists():
        report.notes.append(f"the labels that came along are not written: there is a {path} already")
    elif report.labels:
        write_csv(path, header, list(report.labels.items()))
        report.notes.append(f"the labels that came along are in {path}")
        values["labels"] = {"file": _LABELS, "case_column": header[0], "class_column": header[1]}
    target = project / PROJECT_FILE
    if not target.exists():
        target.write_text(document(type(config).model_validate(values)), encoding="utf-8")
        report.notes.append(f"wrote {target}; next: featstore train-head" + _labels_hint(values))
    elif values != config.model_dump():
        report.notes.append(f"to train on them: --labels {_LABELS}, or name them in {target}")


def _compare_labels(config: FeatstoreConfig, project: Path, report: ImportReport) -> None:
    """Tell where the project's table and the labels that came along differ; the table stays as it is."""
    try:
        found = read_labels(config.labels, {}, project, config.patches.normalize_cases)
    except FeatstoreError as error:  # the embeddings are in; whoever trains is told again
        report.notes.append(f"the labels that came along are not compared: {error.found}")
        return
    there = {case: found.class_names[index] for case, index in found.by_case.items()}
    missing = [case for case in report.labels if case not in there]
    other = [case for case, label in report.labels.items() if there.get(case, label) != label]
    for cases, what in ((missing, "lacks"), (other, "has another class for")):
        if cases:
            shown = ", ".join(cases[:5]) + (", …" if len(cases) > 5 else "")
            report.notes.append(
                f"{config.labels.file} {what} {len(cases):,} cases whose labels came along ({shown}); "
                "it is left as it is: mend it before you train"
            )


def _labels_hint(values: dict[str, dict[str, object]]) -> str:
    return "" if values["labels"]["file"] else " --labels labels.csv"


def export_project(
    config: FeatstoreConfig,
    project: Path,
    folder: Path,
    by: str = "slice",
    observe: Observer = lambda done, total: None,
) -> ExportReport:
    """Write the project's store, labels and splits in CLAM's layout.

    Args:
        config: The project's settings.
        project: The folder that relative paths of the config start from.
        folder: Where to; missing or empty.
        by: ``slice`` or ``case``: what a bag is.
        observe: Called after every case.

    Raises:
        FeatstoreError: Whatever stands in the way.
    """
    if by not in ("slice", "case"):
        raise ConfigError(f"--by is {by!r}", expected="slice or case", where="export")
    store = Store.open(project / config.store.path)
    labels: dict[str, int] = {}
    names: list[str] = []
    splits: list[Split] = []
    missing = "no labels are named (--labels FILE): dataset.csv and splits are empty"
    if config.labels.file is not None:
        found = read_labels(config.labels, config.classes, project, config.patches.normalize_cases)
        out, names = excluded(config), found.class_names
        there = set(store.cases()) - out
        labels = {case: index for case, index in found.by_case.items() if case in there}
        try:
            splits, missing = _splits(config, project, labels, names), ""
        except FeatstoreError as error:
            missing = f"no splits were written: {error.found}"
    by_name = {case: names[index] for case, index in labels.items()}
    report = export_clam(store, folder, by, by_name, splits, observe, excluded(config))
    if missing:
        report.notes.append(missing)
    return report


def _splits(
    config: FeatstoreConfig, project: Path, labels: dict[str, int], names: list[str]
) -> list[Split]:
    """The project's splits where there are files, else those that `featstore split` would make."""
    groups = read_groups(config.groups, project, config.patches.normalize_cases)
    given = project / config.split.path
    files = [given] if given.is_file() else sorted(given.glob("data_splits_*.npz"))
    if files:
        return [read_split(path, list(labels), groups, config.patches.normalize_cases)[0] for path in files]
    return make_splits(labels, groups, config.split.folds, config.split.seed, names)
