"""A case's page: its pictures, and what patches, slices and stains say.

No torch in this file: pages are drawn by processes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from featstore.slides import SlideImages
from heads.inspect.case_files import overlay_notes, overlays, patch_title
from heads.inspect.pictures import PatchImages, PictureError, jpeg
from heads.inspect.report.content import CasePage, Gallery, Member, Picture, Tile
from heads.inspect.tables import AttentionTables, neutral, ranked, records

OVERLAYS, OVERLAY_SIDE, TILE_SIDE = 6, 640, 112
_TILES = 5  # a gallery
# A hundred cases of six overlays and twenty patches shall stay below 25 MB, as base64; the pictures of
# fewer may be sharper.
_PAGE_BYTES, _MARKUP_BYTES, _TILE_BYTES, _TILES_A_CASE = 17_600_000, 14_000, 3_000, 20
_LEAST_OVERLAY, _MOST_OVERLAY = 17_000, 70_000
_NEUTRAL_PERCENT = 5.0


@dataclass(frozen=True)
class PageJob:
    """What a case's page is made of.

    Attributes:
        case: A row of the cases' table: ``case_id, true_label, predicted_label, prob_<class>…, correct``.
        class_names: In config order.
        patches: As `heads.inspect.probe_tables.ProbeTables.patches`, of this case.
        slices: Its slices with their effects.
        stains: Its stains with their effects.
        attention: Of this case, its slices with a column ``name``; None without attention.
        geometry: ``x0 … y3`` of its patches, by row; None where there is none.
        images: Of the patches; None where there are none to be had.
        slides: Of the slices; None where none are given.
        notes: Said on the page.
        overlay_bytes: Of an overlay, at most (`overlay_bytes`).
    """

    case: pd.Series
    class_names: tuple[str, ...]
    patches: pd.DataFrame
    slices: pd.DataFrame
    stains: pd.DataFrame
    attention: AttentionTables | None
    geometry: pd.DataFrame | None
    images: PatchImages | None
    slides: SlideImages | None
    notes: tuple[str, ...]
    overlay_bytes: int = _LEAST_OVERLAY


def overlay_bytes(cases: int) -> int:
    """How large an overlay may be in a report of so many cases."""
    of_case = _PAGE_BYTES / cases - _MARKUP_BYTES - _TILES_A_CASE * _TILE_BYTES
    return int(np.clip(of_case / OVERLAYS, _LEAST_OVERLAY, _MOST_OVERLAY))


def draw_page(job: PageJob) -> CasePage:
    """A case's page, pictures included."""
    case, notes = job.case, list(job.notes)
    shown: list[Picture] = []
    if job.attention is not None and job.images is not None:
        of_case = overlays(job.attention, job.geometry, job.images, job.slides, OVERLAYS, OVERLAY_SIDE)
        for row, drawn in of_case:
            what = f"Case {case['case_id']}, {row['stain']}, slice {row['slice_id']}"
            share = f"{100 * row['effective_attention']:.3g} % of the case's attention"
            where = "on the slice" if drawn.kind == "slide" else "patches side by side"
            alt = f"{what}: attention {where}; {row['patches']} patches, {share}"
            data = jpeg(drawn.shaded, job.overlay_bytes)
            width, height = drawn.shaded.size
            shown.append(Picture(data, alt, width, height, f"{row['stain']} · {row['slice_id']}: {share}"))
            notes += overlay_notes(f"{row['stain']} · {row['slice_id']}", drawn, job.slides)
    details: dict[str, str] = {}
    if job.attention is not None:
        effective = float(job.attention.cases["effective_patches"].iloc[0])
        details["Effective patches"] = f"{effective:.1f} of {len(job.patches):,}"
    return CasePage(
        case_id=str(case["case_id"]),
        true_class=str(case["true_label"]),
        predicted_class=str(case["predicted_label"]),
        probabilities={name: float(case[f"prob_{name}"]) for name in job.class_names},
        correct=bool(case["correct"]),
        patches=len(job.patches),
        slices=len(job.slices),
        stains=tuple(job.stains["stain"]),
        overlays=tuple(shown),
        galleries=tuple(_galleries(job)),
        attention=_members(job),
        notes=tuple(dict.fromkeys(notes)),
        details=details,
    )


def _galleries(job: PageJob) -> Iterator[Gallery]:
    patches, names = job.patches, job.class_names
    if "effective_attention" in patches:
        rows = ranked(patches).head(_TILES)
        yield _gallery(job, "Most attended", "The patches that count most in the model's decision.", rows)
    if f"alone_{names[0]}" not in patches:
        return
    called = str(job.case["predicted_label"])
    shown = names if len(names) == 2 else dict.fromkeys((called, str(job.case["true_label"])))
    for name in reversed(tuple(shown)):
        rows = ranked(patches, f"alone_{name}").head(_TILES)
        text = f"The patches that would by themselves make {name} most probable."
        yield _gallery(job, f"Most for {name}, alone", text, rows)
    if "effective_attention" in patches:
        count = math.ceil(round(len(patches) * _NEUTRAL_PERCENT / 100, 9))
        top = ranked(patches).head(max(count, _TILES))
        rows = neutral(top, [f"alone_{name}" for name in names]).head(_TILES)
        text = "Among the most attended patches, those that by themselves say little for any class."
        if len(rows):
            yield _gallery(job, "Attended, but neutral", text, rows)


def _gallery(job: PageJob, title: str, explanation: str, rows: pd.DataFrame) -> Gallery:
    note = "" if job.images is not None else "The patches' files are not at hand: there are no pictures."
    return Gallery(title, explanation, tuple(_tile(job, row) for row in records(rows)), note)


def _tile(job: PageJob, row: Mapping[str, Any]) -> Tile:
    picture, note, where = None, "", patch_title(row)
    if job.images is None:
        note = "no picture"
    else:
        try:
            image = job.images.thumbnail(str(row["path"]), TILE_SIDE)
            alt = f"Case {row['case_id']}, {where}"
            picture = Picture(jpeg(image, _TILE_BYTES), alt, *image.size)
        except PictureError as error:
            note = error.found
    return Tile(picture, str(row["path"]), where, tile_values(row, job.class_names), note)


def tile_values(row: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, float]:
    """What is told of a patch: its attention, and what it says alone (of two classes, for the second)."""
    values: dict[str, float] = {}
    if "effective_attention" in row:
        values["attention"] = float(row["effective_attention"])
    for name in class_names[1:] if len(class_names) == 2 else class_names:
        if f"alone_{name}" in row:
            values[f"alone p({name})"] = float(row[f"alone_{name}"])
        if f"effect_{name}" in row and np.isfinite(float(row[f"effect_{name}"])):
            values[f"adds to p({name})"] = float(row[f"effect_{name}"])
    return values


def _members(job: PageJob) -> tuple[Member, ...]:
    """The stains, each with its slices; empty without attention."""
    if job.attention is None:
        return ()
    found = []
    for stain, of_stain in zip(records(job.attention.stains), records(job.stains), strict=True):
        mine = (job.attention.slices["stain"] == stain["stain"]).to_numpy()
        slices = zip(
            records(job.attention.slices[mine]),
            records(job.slices[mine]),
            strict=True,
        )
        members = tuple(
            Member(
                str(row["slice_id"]),
                int(row["patches"]),
                float(row["slice_attention"]),
                float(row["uniform"]),
                _effect(effects, job.class_names),
            )
            for row, effects in slices
        )
        attention, uniform = float(stain["stain_attention"]), float(stain["uniform"])
        effect = _effect(of_stain, job.class_names)
        found.append(
            Member(str(stain["stain"]), int(stain["patches"]), attention, uniform, effect, members)
        )
    return tuple(found)


def _effect(row: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, float] | None:
    """What this adds to each class's probability; None where that is not known."""
    if any(f"effect_{name}" not in row for name in class_names):
        return None
    values = [row[f"effect_{name}"] for name in class_names]
    effects = {name: float(value) for name, value in zip(class_names, values, strict=True)}
    return effects if all(np.isfinite(list(effects.values()))) else None
