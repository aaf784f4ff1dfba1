"""What a report shows, as plain data: no torch, no files, no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["run", "study", "comparison"]


@dataclass(frozen=True)
class Picture:
    """A JPEG.

    Attributes:
        jpeg: The file's bytes.
        alt: What it shows, for those who cannot see it.
        width: In its own pixels.
        height: In its own pixels.
        caption: Below it.
    """

    jpeg: bytes
    alt: str
    width: int
    height: int
    caption: str = ""


@dataclass(frozen=True)
class Tile:
    """A patch in a gallery.

    Attributes:
        picture: Of it, if there is one.
        file: Its file.
        where: Stain, slice and number, such as ``h&e · match_1 · patch 12``.
        values: Numbers by their names, shown in this order.
        note: Shown in place of the picture.
    """

    picture: Picture | None
    file: str
    where: str
    values: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Patches side by side; ``note`` is shown above them, or in their place."""

    title: str
    explanation: str
    tiles: tuple[Tile, ...]
    note: str = ""


@dataclass(frozen=True)
class Member:
    """A stain, or a slice of one, and how much it counts.

    Attributes:
        name: Of the stain or slice.
        patches: How many it has.
        attention: Its share; those of its brothers and its own sum to 1.
        uniform: What equal shares would be.
        effect: By class, what this adds to its probability: the case's own, less that without it.
        members: The slices of a stain.
    """

    name: str
    patches: int
    attention: float
    uniform: float
    effect: Mapping[str, float] | None
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Opinion:
    """What one of two models says of a case."""

    name: str
    predicted_class: str
    probabilities: Mapping[str, float]
    correct: bool


@dataclass(frozen=True)
class CasePage:
    """A case.

    Attributes:
        case_id: Its id.
        true_class: Its label.
        predicted_class: What it was called.
        probabilities: By class, in config order.
        correct: Whether it was called right.
        patches: How many it has; 0: not known.
        slices: How many it has; 0: not known.
        stains: Those it has.
        overlays: Its slices, with attention on them.
        galleries: Of its patches.
        attention: By stain.
        charts: SVG of our own making, each shown as it is.
        notes: Remarks.
        details: Further facts, such as the effective number of patches.
        opinions: Of a comparison, what A and B say; then the fields above are A's.
        columns: Further columns of the table of cases: the same names for every case.
    """

    case_id: str
    true_class: str
    predicted_class: str
    probabilities: Mapping[str, float]
    correct: bool
    patches: int = 0
    slices: int = 0
    stains: tuple[str, ...] = ()
    overlays: tuple[Picture, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    attention: tuple[Member, ...] = ()
    charts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    opinions: tuple[Opinion, ...] = ()
    columns: Mapping[str, float | int | str | None] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``right`` or ``wrong``; of two models, which of them is right."""
        if not self.opinions:
            return "right" if self.correct else "wrong"
        right = [each.name for each in self.opinions if each.correct]
        if len(right) == len(self.opinions):
            return "both right"
        return f"only {right[0]} right" if right else "both wrong"


@dataclass(frozen=True)
class CaseLink:
    """A cell of a table that leads to a case's page."""

    case_id: str


Cell = str | int | float | CaseLink | None


@dataclass(frozen=True)
class Table:
    """Rows of cells; floats are shown with three decimals, None as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    explanation: str = ""
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture in SVG of our own making, or a note why there is none.

    Attributes:
        title: Above it.
        svg: Shown as it is.
        explanation: One sentence below it.
        note: Why there is none.
        wide: Whether it needs the page's whole width.
    """

    title: str
    svg: str = ""
    explanation: str = ""
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Metric:
    """A number with its 95% interval; ``reason`` says why number or interval is missing."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the overview; ``anchor`` is its link, ``#anchor``."""

    anchor: str
    title: str
    explanation: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        title: Of the run or study.
        kind: What it is of.
        created: When the report was made.
        verdict: The result in words, a sentence each.
        provenance: What was trained on what.
        class_names: In config order.
        metrics: Of the test cases.
        sections: Of the overview, in order.
        cases: In natural order.
        notes: Remarks on the whole, shown at its top.
        warnings: What makes the numbers mean something else than the reader may think.
    """

    title: str
    kind: Kind
    created: str
    verdict: tuple[str, ...]
    provenance: Mapping[str, str]
    class_names: tuple[str, ...]
    metrics: tuple[Metric, ...] = ()
    sections: tuple[Section, ...] = ()
    cases: tuple[CasePage, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def with_cases(self, given: Sequence[CasePage]) -> Report:
        """The report with pages that show more of some of its cases.

        What a case was called, and how probable its classes are, stay as the run's files say; so the
        page of a case never contradicts the table. A case without such a page has a note instead.

        Args:
            given: Pages; their charts and notes are added to the report's own. Those of cases that it
                does not have, as where two runs have some cases in common, are passed over.

        Raises:
            ValueError: There are two pages of one case.
        """
        pages = {page.case_id: page for page in given}
        if len(pages) < len(given):
            raise ValueError("there are two pages of one case")
        return replace(self, cases=tuple(_laid_together(own, pages.get(own.case_id)) for own in self.cases))


NO_PICTURES = "Patches and attention of this case were not looked at: here is only what was predicted."


def _laid_together(own: CasePage, given: CasePage | None) -> CasePage:
    if given is None:
        return replace(own, notes=tuple(dict.fromkeys((*own.notes, NO_PICTURES))))
    return replace(
        given,
        true_class=own.true_class,
        predicted_class=own.predicted_class,
        probabilities=own.probabilities,
        correct=own.correct,
        charts=tuple(dict.fromkeys((*own.charts, *given.charts))),
        notes=tuple(dict.fromkeys((*(n for n in own.notes if n != NO_PICTURES), *given.notes))),
        details={**own.details, **given.details},
        opinions=own.opinions,
        columns={**own.columns, **given.columns},
    )
