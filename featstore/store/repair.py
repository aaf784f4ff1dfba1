"""Making a damaged store whole again: what is damaged goes to quarantine, `extract` computes it anew."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from featstore.spec import EmbeddingSpec
from featstore.store import files
from featstore.store.casecheck import CaseCheck, Inspector
from featstore.store.commit import publish_next
from featstore.store.description import Description
from featstore.store.findings import Finding, VerifyReport, one_line
from featstore.store.format import CASES, MANIFEST, QUARANTINE, Part, encode_manifest
from featstore.store.listing import STAMP, case_folders, is_folder, quarantined_records, read_plain
from featstore.store.partcheck import UNREADABLE
from featstore.store.ranges import encode_ranges
from featstore.store.records import require_own_folder
from featstore.store.verify import check_root, live_count

_SHOWN = 50


@dataclass(frozen=True)
class Repair:
    """What is done to one case.

    Attributes:
        case: Case id, or its folder's name where the id cannot be known.
        moved: Paths in the store that go to quarantine.
        dropped: Embeddings that are live no more; None where the damage hides how many there were.
        why: The findings behind it, one line each.
    """

    case: str
    moved: tuple[str, ...]
    dropped: int | None
    why: tuple[str, ...]


@dataclass(frozen=True)
class Rebuilt:
    """What is done to the store's description.

    Attributes:
        moved: Paths in the store that go to quarantine: the damaged file, if there is one.
        parts: How many parts hold what it is made anew from; 0 where the file itself still tells it.
        why: The finding behind it.
    """

    moved: tuple[str, ...]
    parts: int
    why: str


@dataclass
class RepairReport:
    """What was done, or would be; ``left`` is damage that only a person can mend."""

    path: str
    applied: bool
    quarantine: str | None = None
    description: Rebuilt | None = None
    repairs: list[Repair] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if damage is still there."""
        planned = self.repairs or self.description is not None
        return 1 if self.left or (planned and not self.applied) else 0

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            **self.__dict__,
            "description": None if self.description is None else asdict(self.description),
            "repairs": [asdict(repair) for repair in self.repairs],
            "left": [finding.to_text() for finding in self.left],
        }

    def to_text(self) -> str:
        """A few lines for a person; at most fifty cases."""
        lines = []
        if self.description is not None:
            verb = "was" if self.applied else "would be"
            source = f" from {self.description.parts:,} parts" if self.description.parts else ""
            lines.append(f"{one_line(self.path)}: {MANIFEST} {verb} made anew{source}")
            lines.append(f"    {self.description.why}")
            if not self.applied:
                lines.append("  to do: featstore repair --apply")
        elif not self.repairs:
            nothing = "there is nothing to repair" if not self.left else "nothing that repair can mend"
            lines.append(f"{one_line(self.path)}: {nothing}")
        if self.repairs:
            files_moved = sum(len(repair.moved) for repair in self.repairs)
            dropped = sum(repair.dropped or 0 for repair in self.repairs)
            verb = "repaired" if self.applied else "would be repaired (nothing is changed yet)"
            lines.append(f"{one_line(self.path)}: {len(self.repairs):,} cases {verb}")
            where = f" {one_line(self.quarantine)}" if self.quarantine else ""
            lines.append(f"  to quarantine{where}: {files_moved:,} files")
            more = " and those of lost records" if any(r.dropped is None for r in self.repairs) else ""
            lines.append(f"  embeddings no longer live: {dropped:,}{more}")
            for repair in self.repairs[:_SHOWN]:
                lines += [f"    {line}" for line in repair.why]
            if len(self.repairs) > _SHOWN:
                lines.append(f"    … and {len(self.repairs) - _SHOWN:,} more cases: --json lists all")
            lines.append(
                "  to do: featstore extract (or import)"
                if self.applied
                else "  to do: featstore repair --apply, then featstore extract (or import)"
            )
        if self.left:
            lines.append("  left to you, since no rule mends it safely:")
            lines += [f"    {finding.to_text()}" for finding in self.left[:_SHOWN]]
        return "\n".join(lines)


def repair(
    path: Path,
    apply: bool = False,
    level: str = "full",
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> RepairReport:
    """Take damage out of a store, so that `extract` computes just what is missing.

    * A damaged or missing part: the case's next record goes without its rows, then the file is
      moved to quarantine.
    * A patch that is live twice: the next record goes without either row, since nothing says which
      one is right.
    * A damaged newest record: what it listed is unknown, and the record before it may list rows that
      were superseded or dropped since. So an older state never takes its place: the case's next
      record, with a number above the damaged one, lists nothing, and `extract` fills the whole case.
      The parts stay until `gc`. Where nothing tells the case's id, its whole folder is moved.
    * A newest record that is older than one in quarantine (someone has deleted what `repair` wrote):
      the same.
    * Damaged older records are moved; no reader needs them.
    * A description (`featstore.json`) that is missing or damaged is made anew, exactly when all newest
      records agree in one fingerprint and a part holds the spec of this fingerprint; see `description`.
      Otherwise nothing is changed at all, since nothing else can be judged without it.

    The next record comes before the move: killed in between, the store is whole, and the damaged file
    is litter for the next repair (a record) or `gc` (a part). Commits are made as every writer makes
    them; where one comes first, the case is looked at again. Nothing is edited or deleted.

    Args:
        path: The store's folder.
        apply: Do it; otherwise only say what would be done.
        level: How closely to look; see `verify.verify`.
        observe: Told how many cases are done, and of how many.

    Raises:
        StoreError: There is no store at this path, or its description may not be read.
        StoreDamaged: A link stands in for the quarantine folder.
    """
    looked = VerifyReport(str(path), level)
    description = check_root(path, looked)
    report = RepairReport(str(path), apply, left=looked.damage)
    if description.spec is None:
        return report
    # Milliseconds, as in the records, whose times are compared with it.
    stamp = datetime.now(UTC).strftime(STAMP)[:-3]
    quarantine = path / QUARANTINE / f"{stamp}-{uuid.uuid4().hex[:12]}"
    mender = _Mender(path, description.spec, level, apply, quarantine)
    if description.kind:
        mender.rebuild(description, report)
    names = case_folders(path) if is_folder(path / CASES) else []
    for done, name in enumerate(names):
        observe(done, len(names))
        mender.mend(name, report)
    observe(len(names), len(names))
    if mender.quarantine.is_dir():
        report.quarantine = str(mender.quarantine)
    return report


@dataclass(frozen=True)
class _Plan:
    """``parts``: what is live next; None if no record is needed. ``moves``: paths below the store."""

    parts: tuple[Part, ...] | None
    moves: tuple[str, ...]
    dropped: int | None


class _Mender:
    def __init__(self, root: Path, spec: EmbeddingSpec, level: str, apply: bool, quarantine: Path) -> None:
        self._root, self._spec, self._apply = root, spec, apply
        self._inspector = Inspector(root, spec, level, quarantined_records(root))
        self.quarantine = quarantine

    def mend(self, name: str, report: RepairReport) -> None:
        """Look at one case and repair it; again, as long as writers come first."""
        while (found := self._inspector.check(name)) is not None:
            plan = _plan(found)
            if self._apply and plan.parts is not None:
                assert found.case_id is not None
                assert found.highest is not None
                folder = self._root / CASES / name
                if not publish_next(
                    folder, found.case_id, self._spec.fingerprint, found.highest, plan.parts
                ):
                    continue
            moved = tuple(move for move in plan.moves if not self._apply or self._move(move))
            left = [finding for finding in found.findings if finding.damage and _is_left(finding, name)]
            if plan.parts is not None or moved:
                why = tuple(
                    finding.to_text()
                    for finding in found.findings
                    if (finding.damage or finding.kind == "old-record") and finding not in left
                )
                report.repairs.append(Repair(found.case_id or name, moved, plan.dropped, why))
            report.left += left
            return

    def rebuild(self, description: Description, report: RepairReport) -> None:
        """Make the store's description anew; what stands in its place goes to quarantine."""
        (finding,) = [found for found in report.left if found.file == MANIFEST]
        report.left.remove(finding)
        file, data = self._root / MANIFEST, encode_manifest(self._spec)
        with suppress(OSError):
            if read_plain(file) == data:
                return  # another repair has come first
        moved = (MANIFEST,) if os.path.lexists(file) and (not self._apply or self._move(MANIFEST)) else ()
        if self._apply:
            files.publish(file, data)  # if the name is taken now, then with the same bytes
        report.description = Rebuilt(moved, description.parts, finding.to_text())

    def _move(self, relative: str) -> bool:
        source, target = self._root / relative, self.quarantine / relative
        if not os.path.lexists(source):
            return False
        require_own_folder(self.quarantine)
        files.make_folder(target.parent)
        try:
            os.rename(source, target)
        except FileNotFoundError:
            return False  # another repair, or a gc, has come first
        files.sync_folder(target.parent)
        files.sync_folder(source.parent)
        return True


def _is_left(finding: Finding, name: str) -> bool:
    """Damage that is not repaired: what may only be unreadable to us, and links to whole folders."""
    return finding.kind == UNREADABLE or finding.file == f"{CASES}/{name}"


def _plan(found: CaseCheck) -> _Plan:
    inside = f"{CASES}/{found.name}"
    old = tuple(f"{inside}/{name}" for name in found.bad_old)
    if found.bad_record is not None:
        if found.case_id is None:
            return _Plan(None, (inside,), None)
        return _Plan((), (f"{inside}/{found.bad_record}", *old), None)
    if found.record is None:
        return _Plan(None, old, 0)
    if found.lost is not None:
        return _Plan((), old, _rows(found.record.parts))
    if not found.bad_parts and not found.doubles:
        return _Plan(None, old, 0)
    kept = _without_doubles([p for p in found.record.parts if p.name not in found.bad_parts], found)
    moves = tuple(f"{inside}/{part}" for part in sorted(found.bad_parts))
    return _Plan(kept, moves + old, _rows(found.record.parts) - _rows(kept))


def _without_doubles(parts: Sequence[Part], found: CaseCheck) -> tuple[Part, ...]:
    kept = []
    for part in parts:
        groups = []
        for group in part.groups:
            twice = found.doubles.get((group.stain, group.slice_id))
            if twice is not None:
                rest = np.setdiff1d(group.patches(part.name), twice, assume_unique=True)
                group = replace(group, live=encode_ranges(rest))
            if group.live:
                groups.append(group)
        if groups:
            kept.append(replace(part, groups=tuple(groups)))
    return tuple(kept)


def _rows(parts: Sequence[Part]) -> int:
    return sum(live_count(group.live) for part in parts for group in part.groups)
