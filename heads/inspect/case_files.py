"""One case's pictures in `attention_analysis/`: galleries, plots, overlays.

No torch in this file: it is run by processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featstore.slides import SlideImages
from featstore.store.ids import component
from heads.evaluation.plots import save
from heads.inspect.attention_plots import patch_figure, slice_figure
from heads.inspect.overlays import AttentionScale, Overlay, overlay
from heads.inspect.pictures import GalleryTile, PatchImages, gallery, save_jpeg
from heads.inspect.tables import AttentionTables, ranked, records

_NO_SLIDES = "no images of slices are named (images.slides)"
FOLDERS = ("patch_attention", "case_effective_patches", "plots", "slice_attention", "overlays")
ENDS = ("top", "bottom")


@dataclass(frozen=True)
class CaseJob:
    """What is drawn of one case.

    Attributes:
        tables: Of this case alone; its slices with a column ``name``, of their files.
        name: Of the case's files.
        folder: ``attention_analysis``.
        geometry: ``x0 … y3`` of its patches, by row; None where there is none.
        images: Of the patches; None where there are none to be had.
        slides: Of the slices; None where none are given.
        top_n: Patches a gallery.
        overlays: Slices that get an overlay: the most attended ones.
    """

    tables: AttentionTables
    name: str
    folder: Path
    geometry: pd.DataFrame | None
    images: PatchImages | None
    slides: SlideImages | None
    top_n: int
    overlays: int


@dataclass(frozen=True)
class Drawn:
    """What was drawn of a case.

    Attributes:
        selected: The patches of the galleries of the most and the least attended slice.
        notes: What could not be shown, and why.
    """

    selected: pd.DataFrame
    notes: tuple[str, ...]


def slice_names(slices: pd.DataFrame) -> list[str]:
    """A file name for every slice: ``case_<case>_<stain>_slice<slice>``, no two the same.

    Args:
        slices: ``case_id, stain, slice_id``.
    """
    seen: dict[str, int] = {}
    found = []
    for case, stain, slice_id in slices[["case_id", "stain", "slice_id"]].itertuples(index=False):
        name = f"case_{component(case)}_{component(stain)}_slice{component(slice_id)}"
        # Ids may hold what stands between them: two slices could meet in one name.
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}~{seen[name]}")
    return found


def draw_case(job: CaseJob) -> Drawn:
    """Write one case's pictures."""
    tables = job.tables
    case_id = str(tables.cases["case_id"].iloc[0])
    plots = job.folder / "plots"
    save(patch_figure(case_id, tables.patches), plots / f"effective_patch_attn_distro_{job.name}.png")
    bars = job.folder / "slice_attention" / f"slice_attn_rankplot_{job.name}.png"
    save(slice_figure(case_id, tables.slices, tables.stains), bars)
    selected = selected_patches(tables, job.top_n)
    if job.images is None:
        return Drawn(selected, ())
    notes = _galleries(job, case_id, selected, job.images)
    for row, shown in overlays(tables, job.geometry, job.images, job.slides, job.overlays):
        name = str(row["name"])
        for kind, image in (("attention", shown.shaded), ("plain", shown.plain)):
            save_jpeg(image, job.folder / "overlays" / f"{name}_{kind}.jpg")
        notes += overlay_notes(name, shown, job.slides)
    return Drawn(selected, tuple(dict.fromkeys(notes)))


def selected_patches(tables: AttentionTables, top_n: int) -> pd.DataFrame:
    """The top and bottom patches of a case's most and least attended slice (of one slice: of that).

    Returns:
        ``name`` (of the slice), ``slice`` (most | least), ``end`` (top | bottom), ``rank`` (from 1),
        and the columns of `AttentionTables.patches`.
    """
    slices = tables.slices
    order = np.argsort(-slices["effective_attention"].to_numpy(), kind="stable")
    chosen = {"most": order[0], "least": order[-1]} if len(order) > 1 else {"most": order[0]}
    found = []
    for which, position in chosen.items():
        row = slices.iloc[position]
        of_slice = ranked(slice_patches(tables, row))
        for end in ENDS:
            part = (of_slice if end == "top" else of_slice.iloc[::-1]).head(top_n)
            identity = {"name": row["name"], "slice": which, "end": end, "rank": range(1, len(part) + 1)}
            found.append(part.assign(**identity))
    first = ["name", "slice", "end", "rank"]
    return pd.concat(found)[[*first, *tables.patches.columns]]


def slice_patches(tables: AttentionTables, row: pd.Series) -> pd.DataFrame:
    """The patches of one slice, in the patch table's order."""
    patches = tables.patches
    same = (patches["stain"] == row["stain"]) & (patches["slice_id"] == row["slice_id"])
    mine: pd.DataFrame = patches[same & (patches["case_id"] == row["case_id"])]
    return mine


def _galleries(job: CaseJob, case_id: str, selected: pd.DataFrame, images: PatchImages) -> list[str]:
    notes: list[str] = []
    size = len(job.tables.patches)
    for (name, which, end), rows in selected.groupby(["name", "slice", "end"], sort=False):
        first = rows.iloc[0]
        title = (
            f"Case {case_id}, {first['stain']}, {first['slice_id']} ({which} attended slice): {end} patches"
        )
        drawn = gallery(title, attention_tiles(rows, size), images)
        drawn.save(job.folder / "patch_attention" / f"{name}_{end}_patches.png")
        notes += drawn.notes
    order = ranked(job.tables.patches)
    for end, rows in (("top", order), ("bottom", order.iloc[::-1])):
        title = f"Case {case_id}: {end} patches by effective attention"
        drawn = gallery(title, attention_tiles(rows.head(job.top_n), size), images)
        drawn.save(job.folder / "case_effective_patches" / f"{job.name}_{end}_patches.png")
        notes += drawn.notes
    return notes


def attention_tiles(rows: pd.DataFrame, size: int) -> list[GalleryTile]:
    """A tile a patch, with its effective attention.

    Args:
        rows: Of `AttentionTables.patches`.
        size: Patches of the case.
    """
    tiles = []
    for row in records(rows):
        effective = float(row["effective_attention"])
        values = {"attention": effective, "× equal share": effective * size}
        tiles.append(GalleryTile(str(row["path"]), patch_title(row), values))
    return tiles


def patch_title(row: Mapping[str, Any]) -> str:
    """``h&e · match_1 · patch 12``."""
    return f"{row['stain']} · {row['slice_id']} · patch {row['patch']}"


def overlays(
    tables: AttentionTables,
    geometry: pd.DataFrame | None,
    images: PatchImages,
    slides: SlideImages | None,
    most: int,
    side: int = 1000,
) -> Iterator[tuple[pd.Series, Overlay]]:
    """The overlays of a case's most attended slices, each with its row of the slices' table.

    Args:
        tables: Of one case; its slices with a column ``name``.
        geometry: ``x0 … y3`` by row, or None.
        images: Of the patches.
        slides: Of the slices, or None.
        most: How many slices.
        side: Pixels of the longer side.
    """
    patches = tables.patches if geometry is None else tables.patches.join(geometry)
    scale = AttentionScale.of_case(patches["effective_attention"].to_numpy())
    order = np.argsort(-tables.slices["effective_attention"].to_numpy(), kind="stable")[:most]
    whole = AttentionTables(tables.cases, patches, tables.slices, tables.stains, tables.levels)
    for position in order:
        row = tables.slices.iloc[position]
        slide, why = None, _NO_SLIDES
        if slides is not None:
            ids = (str(row["case_id"]), str(row["stain"]), str(row["slice_id"]))
            slide, why = slides.read_or_why(*ids, side)
        yield row, overlay(slice_patches(whole, row), scale, slide, why, images, side)


def overlay_notes(name: str, shown: Overlay, slides: SlideImages | None) -> list[str]:
    """What an overlay could not show; not, slice by slice, that no images of slices are named at all."""
    parts = [part for part in shown.note.split("; ") if part]
    if slides is None:
        parts = [part for part in parts if _NO_SLIDES not in part]
    return [f"{name}: {'; '.join(parts)}"] if parts else []
