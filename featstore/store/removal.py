"""Taking embeddings out of a store by name: `rm`."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featstore.errors import ConfigError, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store.casecheck import plain_id
from featstore.store.commit import publish_next
from featstore.store.findings import one_line
from featstore.store.format import CASES, Group, Part, Record
from featstore.store.ids import component
from featstore.store.records import (
    highest_record,
    newest_records,
    read_record,
    require_manifest,
    require_own_folder,
)
from featstore.store.verify import live_count


@dataclass
class RmReport:
    """What was made invisible, or would be."""

    path: str
    applied: bool
    cases: int = 0
    slices: int = 0
    patches: int = 0
    stains: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dict(self.__dict__)

    def to_text(self) -> str:
        """A few lines for a person."""
        if not self.patches:
            return f"{one_line(self.path)}: no embedding is chosen by all of these at once"
        verb = "removed" if self.applied else "would be removed (the same with --apply does it)"
        lines = [
            f"{one_line(self.path)}: {self.patches:,} patches in {self.slices:,} slices of "
            f"{self.cases:,} cases {verb}"
        ]
        lines += [f"  {one_line(stain)}  {count:,} patches" for stain, count in self.stains.items()]
        if self.applied:
            lines.append(
                "  Their bytes stay until `featstore gc`; `featstore extract` (or `import`) brings back "
                "what is still in its folder."
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Choice:
    """Rows that are of one of the cases, and of one of the stains, and of one of the slices."""

    cases: frozenset[str]
    stains: frozenset[str]
    slices: frozenset[str]

    def takes(self, group: Group) -> bool:
        stain = not self.stains or group.stain in self.stains
        return stain and (not self.slices or group.slice_id in self.slices)


def rm(
    path: Path,
    cases: Iterable[str] = (),
    stains: Iterable[str] = (),
    slices: Iterable[str] = (),
    apply: bool = False,
) -> RmReport:
    """Make embeddings invisible by next records; their bytes stay until `gc`.

    What several kinds of names are given for must fit all of them: ``cases=["3"], stains=["h&e"]`` is
    the stain h&e of case 3.

    Args:
        path: The store's folder.
        cases: Ids of cases; all by default.
        stains: Names of stains; all by default.
        slices: Ids of slices; all by default.
        apply: Do it; otherwise only count.

    Raises:
        ConfigError: Nothing is chosen.
        StoreError: A name is unknown, or there is no store at this path.
        StoreDamaged: A record is damaged; nothing was changed.
    """
    choice = _Choice(frozenset(cases), frozenset(stains), frozenset(slices))
    if not (choice.cases or choice.stains or choice.slices):
        raise ConfigError("nothing is chosen", expected="--case ID, --stain NAME or --slice ID", where="rm")
    spec = require_manifest(path)
    newest = newest_records(path)
    names = _folders(path, spec, newest, choice)
    report, known = RmReport(str(path), apply), (set[str](), set[str]())
    doomed = []
    for name in names:  # all are read before any is changed: a wrong name must change nothing
        require_own_folder(path / CASES / name)
        record = read_record(path, name, newest[name], spec)
        groups = [group for part in record.parts for group in part.groups]
        known[0].update(group.stain for group in groups)
        known[1].update(group.slice_id for group in groups)
        if any(choice.takes(group) for group in groups):
            doomed.append(name)
            if not apply:
                _count(report, record, choice)
    here = " in these cases" if choice.cases else ""
    _refuse_unknown("stain" + here, choice.stains, known[0], path)
    _refuse_unknown("slice" + here, choice.slices, known[1], path)
    for name in doomed if apply else ():
        _drop(path, name, spec, choice, report)
    report.stains = dict(sorted(report.stains.items()))
    return report


def _folders(path: Path, spec: EmbeddingSpec, newest: dict[str, int], choice: _Choice) -> list[str]:
    if not choice.cases:
        return sorted(newest)
    wanted = {component(case): case for case in choice.cases}
    missing = [case for name, case in wanted.items() if name not in newest]
    if missing:
        ids = {plain_id(n) or read_record(path, n, newest[n], spec).case_id for n in newest}
        _refuse_unknown("case", missing, ids, path)
    return sorted(wanted)


def _refuse_unknown(kind: str, names: Iterable[str], known: set[str], path: Path) -> None:
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
        some = ", ".join(sorted(known)[:10]) + (", …" if len(known) > 10 else "")
        raise StoreError(
            f"there is no {kind}: {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            expected=f"one of {some}" if known else "",
            where=str(path),
            fix="nothing was changed; name it as `featstore info` and the patch table do",
        )


def _drop(path: Path, name: str, spec: EmbeddingSpec, choice: _Choice, report: RmReport) -> None:
    folder = path / CASES / name
    while (number := highest_record(folder)) is not None:
        record = read_record(path, name, number, spec)
        kept = _without(record.parts, choice)
        if kept == record.parts:
            return
        if publish_next(folder, record.case_id, spec.fingerprint, number, kept):
            _count(report, record, choice)
            return


def _without(parts: Sequence[Part], choice: _Choice) -> tuple[Part, ...]:
    rest = [replace(p, groups=tuple(g for g in p.groups if not choice.takes(g))) for p in parts]
    return tuple(part for part in rest if part.groups)


def _count(report: RmReport, record: Record, choice: _Choice) -> None:
    found: Counter[str] = Counter()
    taken = [group for part in record.parts for group in part.groups if choice.takes(group)]
    for group in taken:
        found[group.stain] += live_count(group.live)
    report.cases += 1
    report.slices += len({(group.stain, group.slice_id) for group in taken})
    report.patches += sum(found.values())
    for stain, count in found.items():
        report.stains[stain] = report.stains.get(stain, 0) + count
