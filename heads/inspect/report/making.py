"""From a run, a study or two of them to one HTML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from featstore.errors import ConfigError, FeatstoreError
from featstore.store.format import GEOMETRY_COLUMNS
from heads.config import Config
from heads.evaluation.runs import find_run
from heads.evaluation.studies import counted, is_study, open_study
from heads.evaluation.study_results import read_results
from heads.inspect.attention import read_attention
from heads.inspect.attention_files import patch_images, slide_images
from heads.inspect.case_files import slice_names
from heads.inspect.drawing import draw_all
from heads.inspect.opened import Opened, Wanted, open_run
from heads.inspect.pictures import with_digests
from heads.inspect.probe_tables import ProbeTables, read_probes
from heads.inspect.report.cases import PageJob, draw_page, overlay_bytes
from heads.inspect.report.content import CasePage, Section, Table
from heads.inspect.report.page import write_report
from heads.inspect.report.reading import read_report
from heads.inspect.tables import AttentionTables, case_bounds

Update = Callable[[int, int], None]


@dataclass(frozen=True)
class WrittenReport:
    """What `featstore report` wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        cases: How many cases have a page.
        notes: What could not be shown, and why.
    """

    path: Path
    bytes: int
    cases: int
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """Where it is, and how large."""
        lines = [
            f"{self.path}: {counted(self.cases, 'case')}, {self.bytes / 1e6:.1f} MB; open it in any browser"
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {**vars(self), "path": str(self.path), "notes": list(self.notes)}


def report_project(
    config: Config,
    project: Path,
    wanted: Path | None = None,
    other: Path | None = None,
    out: Path | None = None,
    pictures: bool = True,
    tell: Callable[[str], None] = lambda text: None,
    update: Update = lambda done, total: None,
) -> WrittenReport:
    """Write the report of a run, a study, or two of them.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        wanted: Path or name of a run or study; the newest finished run by default.
        other: A second one, to compare the first with.
        out: The file; by default ``report.html`` in the folder of the first, of two
            ``report_against_OTHER.html``.
        pictures: Whether patches and attention are looked at; else the report has numbers and curves alone.
        tell: Called with remarks.
        update: Called with the number of cases drawn, and of all.

    Raises:
        FeatstoreError: One is none, is not finished, or a file of it is damaged.
    """
    runs = project / config.runs.path
    folder = _folder(runs, wanted)
    name = "report.html" if other is None else f"report_against_{_folder(runs, other).name}.html"
    path = folder / name if out is None else out
    _check_target(path)
    report = read_report(runs, folder, other)
    looked = Looked()
    if pictures:
        looked = look(config, project, folder, tell, update)
        if other is not None:
            mine = f"Attention, patches and what they add are those of A, {folder.name}."
            of_a = tuple(replace(each, title=f"{each.title}, by A") for each in looked.sections)
            pages = tuple(_said(page, mine) for page in looked.pages)
            looked = replace(looked, pages=pages, sections=of_a)
    report = report.with_cases(looked.pages)
    report = replace(
        report,
        sections=(*report.sections, *looked.sections),
        notes=(*report.notes, *looked.notes),
        warnings=(*report.warnings, *looked.warnings),
    )
    write_report(report, path)
    notes = (*report.warnings, *report.notes)
    return WrittenReport(path, path.stat().st_size, len(report.cases), notes)


def _folder(runs: Path, wanted: Path | None) -> Path:
    """Of the run or study that is named, else of the newest finished run."""
    if wanted is not None and is_study(runs, wanted):
        return open_study(runs, wanted).folder.path
    return find_run(runs, wanted, or_study=True).path


def _check_target(path: Path) -> None:
    """Raises ConfigError unless the file can be written: better now than after the work."""
    found = None
    if path.is_dir():
        found = f"{path} is a folder"
    elif not path.absolute().parent.is_dir():
        found = f"there is no folder {path.absolute().parent}"
    elif not os.access(path.absolute().parent, os.W_OK):
        found = f"{path.absolute().parent} may not be written to"
    if found is not None:
        raise ConfigError(
            found, expected="a file in a folder that is there", where="--out", fix="--out FILE.html"
        )


def _said(page: CasePage, note: str) -> CasePage:
    return replace(page, notes=(*page.notes, note))


@dataclass(frozen=True)
class Looked:
    """What was seen of the cases: a page each, sections over all of them, notes, and warnings."""

    pages: tuple[CasePage, ...] = ()
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def look(
    config: Config, project: Path, wanted: Path, tell: Callable[[str], None], update: Update
) -> Looked:
    """Look into a run's test cases; of a study, into those of the trainings of one of its seeds.

    What cannot be looked at is a warning: a report without pictures is better than none.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        wanted: Path or name of a run or study.
        tell: Called with remarks.
        update: Called with the number of cases drawn, and of all.
    """
    runs = project / config.runs.path
    if not is_study(runs, wanted):
        opened, warnings = _opened(config, project, {wanted: ""}, tell)
        return _look_at(opened, warnings, update)
    study = open_study(runs, wanted)
    finished = read_results(study).finished
    seeds = [each.seed for each in finished]
    seed = max(dict.fromkeys(seeds), key=seeds.count)
    whose = {
        study.folder.training(each.fold, seed).path: f"of seed {seed}, fold {each.fold}"
        for each in finished
        if each.seed == seed
    }
    opened, warnings = _opened(config, project, whose, tell)
    found = _look_at(opened, warnings, update)
    if not found.pages:
        return found
    said = f"Attention and probing are those of the trainings of seed {seed}, each on its own test cases."
    return replace(found, notes=(said, *found.notes))


def _opened(
    config: Config, project: Path, wanted: Mapping[Path, str], tell: Callable[[str], None]
) -> tuple[list[tuple[Opened, str]], list[str]]:
    """The runs, each with whose they are; and what stands in the way of others."""
    opened, warnings = [], []
    for path, whose in wanted.items():
        try:
            opened.append((open_run(config, project, Wanted(path), tell), whose))
        except FeatstoreError as error:
            what = f"Patches and attention {whose} ".rstrip()
            warnings.append(f"{what} could not be looked at: {error.found}")
    return opened, warnings


def _look_at(runs: list[tuple[Opened, str]], warnings: list[str], update: Update) -> Looked:
    """Pages of the runs' cases, a case once: a split may hold it in several folds' tests."""
    total, before = sum(len(opened.cases) for opened, _ in runs), 0
    pages: dict[str, CasePage] = {}
    notes: list[str] = []
    stains: list[pd.DataFrame] = []
    for opened, whose in runs:
        tables, probes = read_attention(opened), read_probes(opened)
        if tables is None:
            notes.append(f"The head {opened.config.head.name} has no attention: it is not shown.")
        else:
            new = tables.cases[~tables.cases["case_id"].isin(list(pages))]
            stains.append(tables.stains.merge(new[["case_id", "true_label"]], on="case_id"))
        notes += [text for text in (patch_images(opened)[1], slide_images(opened)[1]) if text]
        notes += [f"Probing: {probes.reason}"] if probes.reason else []
        warnings = [*warnings, *opened.remarks]
        jobs = _jobs(opened, tables, probes, overlay_bytes(total), whose)

        def count(done: int, mine: int, before: int = before) -> None:
            update(before + done, total)

        for page in draw_all(draw_page, jobs, len(opened.cases), count):
            pages.setdefault(page.case_id, page)
        before += len(opened.cases)
    sections = (_stains(pd.concat(stains), runs[0][0].class_names),) if stains else ()
    unique = [tuple(dict.fromkeys(texts)) for texts in (notes, warnings)]
    return Looked(tuple(pages.values()), sections, *unique)


def _jobs(
    opened: Opened, tables: AttentionTables | None, probes: ProbeTables, most: int, whose: str
) -> Iterator[PageJob]:
    """What the page of each case is made of; ``most`` bytes an overlay, by the training ``whose`` it is."""
    place = [name for name in GEOMETRY_COLUMNS if name in opened.table]
    images, slides = patch_images(opened)[0], slide_images(opened)[0]
    said = (f"Attention, patches and what they add are those {whose}.",) if whose else ()
    frames = (probes.patches, probes.slices, probes.stains)
    bounds = [case_bounds(frame) for frame in frames]
    each: Iterator[AttentionTables | None] = iter([None] * len(probes.cases))
    if tables is not None:
        named = replace(tables, slices=tables.slices.assign(name=slice_names(tables.slices)))
        each = named.each()
    for i, attention in enumerate(each):
        patches, slices, stains = (f.iloc[b[i] : b[i + 1]] for f, b in zip(frames, bounds, strict=True))
        geometry = opened.table.loc[patches.index, place] if place else None
        case = probes.cases.iloc[i]
        shown = None if images is None else with_digests(images, opened.bags.store, [case["case_id"]])
        yield PageJob(
            case,
            opened.class_names,
            patches,
            slices,
            stains,
            attention,
            geometry,
            shown,
            slides,
            said,
            most,
        )


def _stains(known: pd.DataFrame, class_names: Sequence[str]) -> Section:
    """How much each stain counts, over all cases and by true class."""
    classes = [name for name in class_names if name in set(known["true_label"])]
    rows = []
    for stain, group in known.groupby("stain", sort=False):
        of_class = group.groupby("true_label")["stain_attention"].mean()
        means = tuple(float(of_class[name]) if name in of_class else None for name in classes)
        mean, uniform = float(group["stain_attention"].mean()), float(group["uniform"].mean())
        rows.append((str(stain), len(group), mean, *means, uniform))
    columns = ("stain", "cases", "attention", *(f"attention, {name}" for name in classes), "equal shares")
    text = "Mean over the cases that have the stain of its share of the case's attention."
    return Section("attention", "Attention by stain", text, tables=(Table("", columns, tuple(rows)),))
