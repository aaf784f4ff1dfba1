"""From a run, a study or two of them to one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from featstore.errors import FeatstoreError
from featstore.store.format import GEOMETRY_COLUMNS
from heads.config import Config
from heads.evaluation.runs import find_run
from heads.evaluation.studies import is_study, open_study
from heads.evaluation.study_results import read_results
from heads.inspect.attention import read_attention
from heads.inspect.attention_files import patch_images, slide_images
from heads.inspect.case_files import slice_names
from heads.inspect.drawing import draw_all
from heads.inspect.opened import Opened, open_run
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
        lines = [f"{self.path}: {self.cases} cases, {self.bytes / 1e6:.1f} MB; open it in any browser"]
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
    if wanted is None:
        wanted = find_run(runs, None).path
    looked = Looked((), (), ())
    read_report(
        runs, wanted, other, resamples=0 if other is not None else 2000
    )  # refuses at once what is none
    if pictures:
        try:
            looked = look(config, project, wanted, tell, update)
        except FeatstoreError as error:
            looked = Looked((), (), (f"Patches and attention could not be looked at: {error.found}",))
    report = read_report(runs, wanted, other, looked.pages)
    report = replace(
        report, sections=(*report.sections, *looked.sections), notes=(*report.notes, *looked.notes)
    )
    folder = wanted if wanted.is_dir() else runs / wanted
    name = "report.html" if other is None else f"report_against_{other.resolve().name}.html"
    path = folder / name if out is None else out
    write_report(report, path)
    return WrittenReport(path, path.stat().st_size, len(report.cases), report.notes)


@dataclass(frozen=True)
class Looked:
    """What was seen of the cases: a page each, sections over all of them, notes."""

    pages: tuple[CasePage, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]


def look(
    config: Config, project: Path, wanted: Path, tell: Callable[[str], None], update: Update
) -> Looked:
    """Look into a run's test cases; of a study, into those of its first whole seed's trainings.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        wanted: Path or name of a run or study.
        tell: Called with remarks.
        update: Called with the number of cases drawn, and of all.

    Raises:
        FeatstoreError: Checkpoint or store cannot be used.
    """
    runs = project / config.runs.path
    if not is_study(runs, wanted):
        return _look_at([open_run(config, project, wanted, tell=tell)], update)
    study = open_study(runs, wanted)
    results = read_results(study)
    whole = results.whole_seeds
    seed = whole[0] if whole else study.seeds[0]
    finished = [each for each in results.finished if each.seed == seed]
    opened = [
        open_run(config, project, study.folder.training(each.fold, seed).path, tell=tell)
        for each in finished
    ]
    found = _look_at(opened, update)
    said = f"Attention and probing are those of the trainings of seed {seed}, each on its own test cases."
    return replace(found, notes=(said, *found.notes))


def _look_at(runs: list[Opened], update: Update) -> Looked:
    """Pages of the runs' cases, a case once: a split may hold it in several folds' tests."""
    total, before = sum(len(opened.cases) for opened in runs), 0
    pages: dict[str, CasePage] = {}
    notes: list[str] = []
    attention: list[AttentionTables] = []
    for opened in runs:
        tables, probes = read_attention(opened), read_probes(opened)
        if tables is None:
            notes.append(f"The head {opened.config.head.name} has no attention: it is not shown.")
        else:
            attention.append(tables)
        _, why = patch_images(opened)
        notes += [why] if why else []
        notes += [f"Probing: {probes.reason}"] if probes.reason else []
        jobs = _jobs(opened, tables, probes, overlay_bytes(total))

        def count(done: int, mine: int, before: int = before) -> None:
            update(before + done, total)

        for page in draw_all(draw_page, jobs, len(opened.cases), count):
            pages.setdefault(page.case_id, page)
        before += len(opened.cases)
    sections = (_stains(attention),) if attention else ()
    return Looked(tuple(pages.values()), sections, tuple(dict.fromkeys(notes)))


def _jobs(
    opened: Opened, tables: AttentionTables | None, probes: ProbeTables, most: int
) -> Iterator[PageJob]:
    """What the page of each case is made of; ``most`` bytes an overlay."""
    place = [name for name in GEOMETRY_COLUMNS if name in opened.table]
    images, slides = patch_images(opened)[0], slide_images(opened)
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
        yield PageJob(
            case, opened.class_names, patches, slices, stains, attention, geometry, images, slides, (), most
        )


def _stains(tables: list[AttentionTables]) -> Section:
    """How much each stain counts, over all cases and by true class."""
    stains = pd.concat([each.stains for each in tables])
    cases = pd.concat([each.cases for each in tables])
    known = stains.merge(cases[["case_id", "true_label"]], on="case_id")
    classes = tuple(dict.fromkeys(cases["true_label"]))
    rows = []
    for stain, group in known.groupby("stain", sort=False):
        of_class = group.groupby("true_label")["stain_attention"].mean()
        means = tuple(float(of_class[name]) if name in of_class else None for name in classes)
        mean, uniform = float(group["stain_attention"].mean()), float(group["uniform"].mean())
        rows.append((str(stain), len(group), mean, *means, uniform))
    columns = ("stain", "cases", "attention", *(f"attention, {name}" for name in classes), "equal shares")
    text = "Mean over the cases that have the stain of its share of the case's attention."
    return Section("attention", "Attention by stain", text, tables=(Table("", columns, tuple(rows)),))
