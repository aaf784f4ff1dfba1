"""`attention_analysis/` of a run: tables, texts and pictures of what its head attended to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featstore.cohort.tables import write_csv
from featstore.errors import FeatstoreError
from featstore.slides import SlideImages
from featstore.store.format import GEOMETRY_COLUMNS
from featstore.store.ids import component
from heads.config import Config
from heads.evaluation.plots import save
from heads.evaluation.runs import held, write_text
from heads.evaluation.studies import counted
from heads.inspect.attention import read_attention
from heads.inspect.attention_plots import stain_figure
from heads.inspect.attention_text import summary_text, top_text
from heads.inspect.case_files import FOLDERS, CaseJob, draw_case, slice_names
from heads.inspect.drawing import draw_all
from heads.inspect.opened import NEWEST, Opened, Wanted, open_run
from heads.inspect.pictures import PatchImages, images_of, with_digests
from heads.inspect.tables import AttentionTables, slice_equality, top_patches

FOLDER = "attention_analysis"
UNFINISHED = "NOT FINISHED: it was interrupted, or is being written; run the command again"
_OWN = (
    "notes.txt",
    "effective_attention.csv",
    "top_effective_patches_per_case_*",
    *(f"{name}/*case_*.*g" for name in FOLDERS),
)
Update = Callable[[int, int], None]


@dataclass(frozen=True)
class AttentionOptions:
    """How much of the attention is listed and drawn.

    Attributes:
        top_n: Patches a gallery.
        top_percent: Of a case's patches, listed as its most attended ones.
        overlays: Slices a case that get an overlay.
    """

    top_n: int = 5
    top_percent: float = 5.0
    overlays: int = 6


_USUAL = AttentionOptions()


@dataclass(frozen=True, eq=False)
class AttentionReport:
    """What `featstore attention` wrote.

    Attributes:
        run: The run's folder.
        folder: Where the files are; None where the head has no attention.
        tables: None where the head has no attention.
        notes: What could not be shown, and why.
    """

    run: Path
    folder: Path | None
    tables: AttentionTables | None
    notes: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """The stains' attention, and where the rest is."""
        if self.tables is None or self.folder is None:
            return "\n".join([f"{self.run}", *self.notes])
        stains = self.tables.stains.groupby("stain", sort=False)["stain_attention"]
        cases, patches = counted(len(self.tables.cases), "case"), f"{len(self.tables.patches):,} patches"
        lines = [f"{self.folder}: {cases}, {patches}"]
        for stain, mean in stains.mean().items():
            equal = self.tables.stains.loc[self.tables.stains["stain"] == stain, "uniform"].mean()
            lines.append(
                f"  {stain}: {mean:.3f} of a case's attention on average (equal shares: {equal:.3f})"
            )
        shown = self.notes[:10]
        lines += [f"  note: {note}" for note in shown]
        if len(self.notes) > len(shown):
            lines.append(f"  … and {len(self.notes) - len(shown)} further notes, in notes.txt")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        found: dict[str, Any] = {"run": str(self.run), "notes": self.notes}
        found["folder"] = None if self.folder is None else str(self.folder)
        if self.tables is not None:
            mean = self.tables.stains.groupby("stain", sort=False)["stain_attention"].mean()
            found |= {"cases": len(self.tables.cases), "patches": len(self.tables.patches)}
            found["stain_attention"] = {str(name): float(value) for name, value in mean.items()}
        return found


def attention_project(
    config: Config,
    project: Path,
    wanted: Wanted = NEWEST,
    options: AttentionOptions = _USUAL,
    tell: Callable[[str], None] = lambda text: None,
    update: Update = lambda done, total: None,
) -> AttentionReport:
    """Write a run's `attention_analysis/`.

    Args:
        config: The project's settings; of the run its own are used.
        project: The folder that relative paths start from.
        wanted: Which run, and which of its cases.
        options: How much is listed and drawn.
        tell: Called with remarks.
        update: Called with the number of cases drawn, and of all.

    Raises:
        FeatstoreError: Run, checkpoint or store cannot be used; there are no such cases.
    """
    opened = open_run(config, project, wanted, tell)
    tables = read_attention(opened)
    if tables is None:
        note = f"the head {opened.config.head.name} has no attention: there is nothing to show of it"
        return AttentionReport(opened.run.path, None, None, [note])
    folder, notes = opened.run.path / FOLDER, list(opened.remarks)
    images, why = patch_images(opened)
    if opened.config.images.slides is not None:
        SlideImages.of_project(opened.config, project)  # what is asked for here must be right
    slides, remark = slide_images(opened)
    notes += [text for text in (why, remark) if text]
    folder.mkdir(exist_ok=True)
    with held(folder, "writing this analysis"):
        remove_old(folder, _OWN)
        write_notes(folder, opened, [UNFINISHED])
        write_tables(tables, folder, options.top_percent)
        save(stain_figure(tables.stains, tables.cases), folder / "stain_attention_distribution.png")
        jobs = case_jobs(opened, tables, folder, images, slides, options)
        selected = []
        for drawn in draw_all(draw_case, jobs, len(tables.cases), update):
            selected.append(drawn.selected)
            notes += drawn.notes
        _write(folder / "plots" / "patch_attention_selected_slices.csv", pd.concat(selected))
        write_notes(folder, opened, notes)
    return AttentionReport(opened.run.path, folder, tables, notes)


def remove_old(folder: Path, own: Iterable[str]) -> None:
    """Remove what an earlier analysis wrote, so that no folder mixes two; other files stay."""
    for pattern in own:
        for old in folder.glob(pattern):
            old.unlink(missing_ok=True)


def write_notes(folder: Path, opened: Opened, notes: Iterable[str]) -> None:
    """``notes.txt``: which cases were looked at, and what could not be shown; written last."""
    lines = [f"{counted(len(opened.cases), 'case')} ({opened.part}): {', '.join(opened.cases)}", *notes]
    write_text(folder / "notes.txt", "".join(f"{line}\n" for line in lines))


def write_tables(tables: AttentionTables, folder: Path, percent: float) -> None:
    """Write what is numbers and words."""
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    # Not `patch_attention.csv`, which training writes of all test cases, in its own precision.
    _write(folder / "effective_attention.csv", tables.patches)
    _write(folder / "slice_attention.csv", tables.slices)
    _write(folder / "stain_attention.csv", tables.stains)
    _write(folder / "case_attention.csv", tables.cases)
    equality = slice_equality(tables)
    _write(folder / "slice_attention_equality.csv", equality)
    _write(folder / "slice_attention_equality_misclassified.csv", equality[equality["correct"] == 0])
    top, shown = top_patches(tables, percent), f"{float(percent)}pct"
    _write(folder / f"top_effective_patches_per_case_{shown}.csv", top)
    text = top_text(tables, top, percent)
    write_text(folder / f"top_effective_patches_per_case_summary_{shown}.txt", text)
    write_text(folder / "attention_summary.txt", summary_text(tables, equality))


def _write(path: Path, table: pd.DataFrame) -> None:
    write_csv(path, table.columns.tolist(), table.to_numpy(object).tolist())


def patch_images(opened: Opened) -> tuple[PatchImages | None, str]:
    """The patches' files, or why there are none."""
    return images_of(opened.config, opened.project, opened.bags.store)


def slide_images(opened: Opened) -> tuple[SlideImages | None, str]:
    """The pictures of the slices, where the settings name any; and what is to be said of them."""
    if opened.config.images.slides is None:
        return None, ""
    try:
        slides = SlideImages.of_project(opened.config, opened.project)
    except FeatstoreError as error:
        return None, f"no images of slices: {error.found}"
    store = opened.bags.store
    outlines = map(store.outline, store.cases())
    known = {
        (bag.case_id, stain, name)
        for bag in outlines
        for name, stain in zip(bag.slices, np.repeat(bag.stains, bag.stain_sizes).tolist(), strict=True)
    }
    return slides, slides.remark(known) or ""


def case_jobs(
    opened: Opened,
    tables: AttentionTables,
    folder: Path,
    images: PatchImages | None,
    slides: SlideImages | None,
    options: AttentionOptions = _USUAL,
) -> Iterator[CaseJob]:
    """What is to be drawn, case by case."""
    named = AttentionTables(
        tables.cases,
        tables.patches,
        tables.slices.assign(name=slice_names(tables.slices)),
        tables.stains,
        tables.levels,
    )
    place = [name for name in GEOMETRY_COLUMNS if name in opened.table]
    for each in named.each():
        case = str(each.cases["case_id"].iloc[0])
        geometry = opened.table.loc[each.patches.index, place] if place else None
        name = f"case_{component(case)}"
        shown = None if images is None else with_digests(images, opened.bags.store, [case])
        yield CaseJob(each, name, folder, geometry, shown, slides, options.top_n, options.overlays)
