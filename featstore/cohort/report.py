"""The report on a cohort, as JSON, as text, and as files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.cohort.tables import printable, write_csv
from featstore.errors import escape_controls
from featstore.files import replacing

if TYPE_CHECKING:
    from PIL import Image

    from featstore.cohort.reading import Unparsed

_SHOWN = 8


def shorten(items: Collection[str], shown: int = _SHOWN) -> str:
    """`a, b, c … and 12 more`."""
    text = ", ".join(list(items)[:shown])
    return text if len(items) <= shown else f"{text} … and {len(items) - shown:,} more"


@dataclass(frozen=True)
class CohortReport:
    """Everything that `featstore check` says.

    Attributes:
        data: The figures, ready for JSON.
        warnings: One sentence each, for what a person should look at.
        unparsed: Files whose names could not be read.
        sheet: The contact sheet, or None where nothing could be decoded.
    """

    data: dict[str, Any]
    warnings: list[str]
    unparsed: list[Unparsed] = field(default_factory=list)
    sheet: Image.Image | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures and warnings as plain dicts, lists, strings and numbers."""
        return {**self.data, "warnings": self.warnings}

    def to_text(self) -> str:
        """The report for a terminal: compact, aligned, without colour codes."""
        data = self.data
        parts = [
            f"{data['folder']}: " + ", ".join(f"{data[k]:,} {k}" for k in ("patches", "slices", "cases")),
            _grid(_cohort_rows(data)),
            _grid(_spread_rows(data)),
            _titled("Left out", _left_out_lines(data)),
            _titled("Incomplete", _incomplete_lines(data)),
            _titled("Ids", _id_lines(data)),
            _titled("Sizes", _size_lines(data)),
            _titled("Colours (red and blue)", _color_lines(data)),
            _titled("Quality", _quality_lines(data)),
            _titled("Unused in training", _caps_lines(data)),
            _titled("Warnings", [f"! {text}" for text in self.warnings]) or "No warnings.",
        ]
        return escape_controls("\n\n".join(part for part in parts if part) + "\n")

    def save(self, folder: Path) -> None:
        """Write report.json, report.txt, contact_sheet.png and, if there are any, unparsed.csv.

        Each file appears whole or not at all, so that several processes may save at a time.

        Args:
            folder: Created if need be; an earlier report in it is replaced.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        for name, content in (("report.json", text + "\n"), ("report.txt", self.to_text())):
            with replacing(folder / name) as aside:
                aside.write_text(content, encoding="utf-8")
        unparsed, sheet = folder / "unparsed.csv", folder / "contact_sheet.png"
        if self.unparsed:
            rows = ((printable(item.path), item.reason) for item in self.unparsed)
            write_csv(unparsed, ("path", "reason"), rows)
        else:
            unparsed.unlink(missing_ok=True)
        if self.sheet is not None:
            with replacing(sheet) as aside:
                self.sheet.save(aside, format="PNG")
        else:
            sheet.unlink(missing_ok=True)


def _titled(title: str, lines: Iterable[str]) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"{title}\n{body}" if body else ""


def _grid(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _cohort_rows(data: dict[str, Any]) -> list[list[str]]:
    stains = list(data["stains"])
    rows = [["class", "cases", "slices", "patches", *(f"{stain} patches" for stain in stains)]]
    entries = {name: (data["classes"][name], data["class_by_stain"][name]) for name in data["classes"]}
    for name, (total, by_stain) in entries.items():
        counts = [
            total["cases"],
            total["slices"],
            total["patches"],
            *(by_stain[s]["patches"] for s in stains),
        ]
        rows.append([name, *(f"{n:,}" for n in counts)])
    if len(entries) > 1:
        sums = [sum(t[key] for t, _ in entries.values()) for key in ("cases", "slices", "patches")]
        rows.append(
            ["total", *(f"{n:,}" for n in [*sums, *(data["stains"][s]["patches"] for s in stains)])]
        )
    return rows


def _spread_rows(data: dict[str, Any]) -> list[list[str]]:
    rows = [["", "min", "median", "max"]]
    for key in ("slices_per_case", "patches_per_case", "patches_per_slice"):
        spread = data[key] or {}
        rows.append([key.replace("_", " "), *(f"{spread[k]:,.6g}" if spread else "-" for k in rows[0][1:])])
    return rows


def _left_out_lines(data: dict[str, Any]) -> Iterable[str]:
    left, unparsed = data["left_out"], data["unparsed"]
    if left["excluded"]:
        yield f"excluded: {shorten(left['excluded'])} ({left['excluded_patches']:,} patches)"
    named = (
        ("exclusions that match no case", left["unknown_exclusions"]),
        ("cases without a label", left["cases_without_label"]),
        ("labels without patches", left["labels_without_patches"]),
        ("class not mapped", [f"{case} ({raw})" for case, raw in left["unmapped"].items()]),
    )
    for title, items in named:
        if items:
            yield f"{title}: {len(items):,}: {shorten(items)}"
    if unparsed["count"]:
        yield f"names that could not be read: {unparsed['count']:,}"
        for reason, n in unparsed["by_reason"].items():
            yield f"  {n:>7,}  {reason}"
    if data["ignored"]:
        yield "files passed over: " + ", ".join(f"{n:,} {suffix}" for suffix, n in data["ignored"].items())
    if data["links_skipped"]:
        yield f"links not followed: {shorten(data['links_skipped'])}"


def _incomplete_lines(data: dict[str, Any]) -> Iterable[str]:
    lacking = [f"{case} ({', '.join(stains)})" for case, stains in data["missing_stains"].items()]
    if lacking:
        yield f"cases that lack a stain, and take part: {len(lacking):,}: {shorten(lacking)}"


def _id_lines(data: dict[str, Any]) -> Iterable[str]:
    for kind, ids in data["normalized"].items():
        if ids:
            yield f"{kind} normalised: {len(ids):,}: {shorten([f'{a} → {b}' for a, b in ids.items()])}"
    merged = data["merged"].get("case")
    if merged:
        yield f"one case, several spellings: {shorten([' = '.join(found) for found in merged.values()])}"


def _size_lines(data: dict[str, Any]) -> Iterable[str]:
    sizes = data["sizes"]
    if sizes:
        yield (
            f"sides {sizes['min_side']:,} to {sizes['max_side']:,} px, "
            f"median {sizes['median_side']:,.6g} px; {sizes['not_square']:.0%} not square; "
            f"{sizes['below_32']:,} below 32 px (of {sizes['patches']:,})"
        )
    sample = data["sample"]
    if sample["failed"]:
        yield f"{sample['failed']:,} sampled files cannot be decoded: {shorten(sample['failures'])}"


def _color_lines(data: dict[str, Any]) -> Iterable[str]:
    width = max((len(stain) for stain in data["colors"]), default=0)
    for stain, color in data["colors"].items():
        score = "" if color["score"] is None else f"score {color['score']:+.2f}, "
        yield f"{stain.ljust(width)}  {color['verdict']} ({score}{color['patches']} patches)"


def _quality_lines(data: dict[str, Any]) -> Iterable[str]:
    quality = data["quality"]
    if quality:
        yield (
            ", ".join(f"{quality[k]:,} {k}" for k in ("blank", "black", "blurred"))
            + f" of {quality['patches']:,}"
        )


def _caps_lines(data: dict[str, Any]) -> Iterable[str]:
    caps = data["caps"]
    if not caps:
        return
    cap, limit = caps["per_slice_cap"], caps["max_slices_per_stain"]
    for name, unused in caps["by_class"].items():
        if cap is not None:
            yield (
                f"{name}: {unused['patches_never_drawn']:,.0f} patches never drawn "
                f"in {caps['epochs']} epochs ({unused['slices_above_cap']:,} slices above {cap:,})"
            )
        if limit is not None:
            yield (
                f"{name}: {unused['pairs_above_max_slices']:,} case/stain pairs above {limit} slices: "
                f"{unused['slices_unused']:,} slices, "
                f"about {unused['patches_in_unused_slices']:,.0f} patches unused"
            )
