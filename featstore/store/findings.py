"""What `verify` finds: the list, and how it is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featstore.cohort.tables import printable, write_csv

_SHOWN = 50
LEVELS = {
    "quick": "records and the sizes of all parts",
    "default": "records and every value of every live slice",
    "full": "records, every value of every live slice, and every byte of every part",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        case: Case id (the folder's name where the id cannot be known); empty for the store itself.
        file: Path inside the store.
        kind: A word for programs, such as ``part-missing``.
        found: What is there.
        expected: What should be there; empty where that is plain.
        damage: False for a note: litter and other things that harm no embedding.
    """

    case: str
    file: str
    kind: str
    found: str
    expected: str = ""
    damage: bool = True

    def to_text(self) -> str:
        """One line. Ids and names are others' text: nothing in it reaches the terminal raw."""
        text = f"{self.file}: {self.found}" + (f" (expected: {self.expected})" if self.expected else "")
        return one_line(text)


@dataclass
class VerifyReport:
    """What was looked at and what was found; counts are of live things."""

    path: str
    level: str
    subset: str | None = None
    cases: int = 0
    parts: int = 0
    patches: int = 0
    bytes: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def damage(self) -> list[Finding]:
        """The findings that mean lost or wrong embeddings."""
        return [finding for finding in self.findings if finding.damage]

    @property
    def notes(self) -> list[Finding]:
        """The findings that harm no embedding."""
        return [finding for finding in self.findings if not finding.damage]

    @property
    def exit_code(self) -> int:
        """1 if there is damage."""
        return 1 if self.damage else 0

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types, damage and notes apart."""
        body = {name: value for name, value in self.__dict__.items() if name != "findings"}
        lists = {name: [_plain(f) for f in getattr(self, name)] for name in ("damage", "notes")}
        return {**body, "ok": not lists["damage"], **lists}

    def to_text(self) -> str:
        """A few lines for a person; at most fifty findings of each sort."""
        share = f" (share {self.subset} of them)" if self.subset else ""
        lines = [
            f"{one_line(self.path)}: {self.cases:,} cases{share}, {self.parts:,} parts, "
            f"{self.patches:,} patches in {self.seconds:.1f} s",
            f"  looked at   {LEVELS[self.level]}",
        ]
        damage, notes = self.damage, self.notes
        if damage:
            cases = len({finding.case for finding in damage if finding.case})
            lines.append(f"  DAMAGE      {len(damage):,} findings in {cases:,} cases")
            lines += _listed(damage)
            lines.append(
                "  to do: featstore repair (shows what it would do), then featstore extract (or import)"
            )
        else:
            lines.append(
                "  no damage" + (", as far as a quick look tells" if self.level == "quick" else "")
            )
        if notes:
            kinds = Counter(finding.kind for finding in notes)
            told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
            lines.append(f"  notes       {told}")
            lines += _listed(notes)
        return "\n".join(lines)

    def write_csv(self, path: Path) -> None:
        """All findings as a table that a spreadsheet may open."""
        columns = ("damage", "case", "kind", "file", "found", "expected")
        rows = [[getattr(finding, name) for name in columns] for finding in self.findings]
        write_csv(path, columns, [[one_line(str(cell)) for cell in row] for row in rows])


def one_line(text: str) -> str:
    """The text with control characters, newlines and undecodable bytes spelt out."""
    return printable(text).replace("\n", "\\x0a")


def _plain(finding: Finding) -> dict[str, Any]:
    """As JSON types; a file name's undecodable bytes are spelt out, they are no Unicode."""
    return {
        name: printable(value) if isinstance(value, str) else value
        for name, value in asdict(finding).items()
    }


def _listed(findings: list[Finding]) -> list[str]:
    lines = [f"    {finding.to_text()}" for finding in findings[:_SHOWN]]
    more = len(findings) - _SHOWN
    return lines + ([f"    … and {more:,} more: --json or --csv FILE lists all"] if more > 0 else [])
