"""From a report to its one HTML file: nothing is fetched, nothing is sent, and text stays text."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from featstore.cohort.names import natural_key
from featstore.cohort.tables import printable
from featstore.files import replacing
from heads.inspect.report.content import CasePage, Picture, Report, Table

EARLY = ("curves", "metrics", "differences", "stability", "attention")  # sections above the table of cases
_ICONS = {"right": "✓", "both right": "✓", "wrong": "✗", "both wrong": "✗"}


@dataclass(frozen=True)
class Column:
    """Of the table of cases; numbers stand to the right, and what has an order of its own sorts by it."""

    name: str
    numeric: bool
    sort_numbers: bool


@dataclass(frozen=True)
class Row:
    """A case in the table, and its neighbours before anything is sorted."""

    page: CasePage
    class_index: int
    text: str
    cells: tuple[tuple[Any, Any], ...]
    before: str | None
    after: str | None


@dataclass(frozen=True)
class CaseTable:
    """The table of cases."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    verdicts: tuple[str, ...]


def render(report: Report) -> str:
    """The page, as text; the same report gives the same text.

    Args:
        report: With its cases.
    """
    environment = _environment()
    shared = _shared_pictures(report)
    style, script = Markup(_file("style.css")), Markup(_file("script.js"))
    template = environment.get_template("page.html.j2")
    return template.render(
        report=report,
        table=case_table(report),
        first=[each for each in report.sections if each.anchor in EARLY],
        rest=[each for each in report.sections if each.anchor not in EARLY],
        style=style,
        script=script,
        policy=_policy(style, script),
        shared=dict(shared.values()),
        shared_name=lambda picture: shared[picture.jpeg][1] if picture.jpeg in shared else "",
    )


def write_report(report: Report, path: Path) -> int:
    """Write the page aside and move it into place.

    Args:
        report: With its cases.
        path: The HTML file.

    Returns:
        Its size in bytes.
    """
    content = render(report).encode("utf-8")
    with replacing(path) as aside:
        aside.write_bytes(content)
    return len(content)


def anchor(case_id: str) -> str:
    """The fragment of a case's page, without ``#``: the same text as its element's id."""
    return f"case={quote(case_id, safe='')}"


def case_table(report: Report) -> CaseTable:
    """The rows of the table of cases, in natural order of the ids."""
    pages = sorted(report.cases, key=lambda page: natural_key(page.case_id))
    counted = any(page.patches for page in pages)
    extra = list(dict.fromkeys(name for page in pages for name in page.columns))
    names = list(report.class_names)
    two = len(names) == 2
    columns = [
        Column("case", False, True),
        Column("result", False, False),
        Column("true class", False, True),
    ]
    if report.kind == "comparison":
        columns += [Column("A calls", False, True), Column("B calls", False, True)]
    else:
        columns += [Column("called", False, True), Column("p(true class)", True, True)]
        columns.append(Column(f"p({names[1]})" if two else "p(called)", True, True))
    numeric = [not any(isinstance(page.columns.get(name), str) for page in pages) for name in extra]
    columns += [Column(name, number, number) for name, number in zip(extra, numeric, strict=True)]
    if counted:
        columns += [
            Column("patches", True, True),
            Column("slices", True, True),
            Column("stains", False, False),
        ]
    rows = []
    for i, page in enumerate(pages):
        cells = [*_called(page, report), *(_cell(page.columns.get(name)) for name in extra)]
        if counted:
            stains = ", ".join(page.stains)
            cells += [_cell(page.patches or None), _cell(page.slices or None), (stains, stains)]
        words = (page.case_id, page.true_class, page.predicted_class, *page.stains)
        before = pages[i - 1].case_id if i else None
        after = pages[i + 1].case_id if i + 1 < len(pages) else None
        place = names.index(page.true_class)
        rows.append(Row(page, place, " ".join(words).casefold(), tuple(cells), before, after))
    verdicts = dict.fromkeys(sorted(page.verdict for page in pages))
    return CaseTable(tuple(columns), tuple(rows), tuple(verdicts))


def _called(page: CasePage, report: Report) -> list[tuple[Any, Any]]:
    """True class, called class and probabilities, each with what it is sorted by."""
    names = list(report.class_names)
    cells: list[tuple[Any, Any]] = [(page.true_class, names.index(page.true_class))]
    if report.kind == "comparison":
        called = [each.predicted_class for each in page.opinions]
        return cells + [(name, names.index(name)) for name in called]
    cells.append((page.predicted_class, names.index(page.predicted_class)))
    other = names[1] if len(names) == 2 else page.predicted_class
    return cells + [_cell(page.probabilities.get(name)) for name in (page.true_class, other)]


def _cell(value: Any) -> tuple[Any, Any]:
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    return value, "" if value is None else value


def _shared_pictures(report: Report) -> dict[bytes, tuple[Picture, str]]:
    """Pictures that are shown more than once, by their bytes; each is in the file once."""
    pictures = list(_pictures(report.cases))
    count = Counter(picture.jpeg for picture in pictures)
    first = {picture.jpeg: picture for picture in reversed(pictures) if count[picture.jpeg] > 1}
    ordered = [jpeg for jpeg in count if jpeg in first]
    return {jpeg: (first[jpeg], f"picture-{place}") for place, jpeg in enumerate(ordered)}


def _pictures(cases: Sequence[CasePage]) -> Any:
    for page in cases:
        yield from page.overlays
        for gallery in page.galleries:
            yield from (tile.picture for tile in gallery.tiles if tile.picture is not None)


def _policy(style: str, script: str) -> str:
    """The content security policy: this one style and script, pictures inside the file, and no network."""
    digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; "
        f"script-src 'sha256-{digests[1]}'; base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    made.filters |= {
        "anchor": anchor,
        "digits": digits,
        "fine": fine,
        "signed": signed,
        "uri": _uri,
        "drawn": _drawn,
        "percent": _percent,
    }
    made.globals |= {
        "number_columns": _number_columns,
        "effects": _effects,
        "verdict_class": _verdict_class,
        "verdict_icon": _verdict_icon,
    }
    return made


def _clean(value: Any) -> Any:
    """Text without control characters and halves of characters, which names of files can hold."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def digits(value: float) -> str:
    """Whole numbers as they are, others with three decimals."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "–"
    if 0 < abs(value) < 0.0005:
        return "<0.001" if value > 0 else ">-0.001"
    return f"{value:.3f}"


def fine(value: float) -> str:
    """As `digits`, with one more where a patch among hundreds has a small share."""
    small = math.isfinite(value) and 0 < abs(value) < 0.0995
    if not small or isinstance(value, int):
        return digits(value)
    if abs(value) < 0.00005:
        return "<0.0001" if value > 0 else ">-0.0001"
    return f"{value:.4f}"


def signed(value: float) -> str:
    """A change: three decimals and its sign, none where it rounds to nothing."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000"


def _uri(jpeg: bytes) -> Markup:
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}")


def _percent(share: float) -> str:
    """Of the width of a bar, whose ends it stays within."""
    return f"{100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0:.2f}"


def _drawn(svg: str) -> Markup:
    """SVG of our own making, the only text that is not escaped."""
    if not svg.lstrip().startswith("<svg"):
        raise ValueError(f"a chart must be SVG, and begins with {svg[:40]!r}")
    return Markup(svg)


def _effects(page: CasePage) -> list[str]:
    """The classes of which it is known what leaving something out does; of two, the second."""
    members = [each for stain in page.attention for each in (stain, *stain.members)]
    names = list(dict.fromkeys(name for each in members for name in each.effect or ()))
    return names[-1:] if len(names) == 2 else names


def _number_columns(table: Table) -> set[int]:
    """The columns whose headings stand to the right, above their numbers."""
    numbers = [{i for i, cell in enumerate(row) if isinstance(cell, int | float)} for row in table.rows]
    return set().union(*numbers)


def _verdict_class(word: str) -> str:
    return {"✓": "right", "✗": "wrong"}.get(_verdict_icon(word), "mixed")


def _verdict_icon(word: str) -> str:
    return _ICONS.get(word, "◐")
