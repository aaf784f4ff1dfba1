"""Looking for damage: everything that the newest records promise is held against what is there."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

from featstore.errors import ConfigError
from featstore.store.casecheck import CaseCheck, Inspector
from featstore.store.description import Description, look_at_description
from featstore.store.findings import LEVELS, Finding, VerifyReport
from featstore.store.format import CASES, MANIFEST, QUARANTINE
from featstore.store.listing import (
    case_folders,
    is_folder,
    is_temporary,
    quarantined,
    quarantined_records,
)


def verify(
    path: Path,
    level: str = "default",
    subset: str | None = None,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Look for damage in a store; changes nothing, and may run beside writers.

    Damage is listed, never raised, and the search goes on after it. One case at a time is held in
    memory, so that a store of any size can be checked.

    Args:
        path: The store's folder.
        level: ``quick``: every newest record is readable, and its parts are there in their size.
            ``default``: also every column of every live slice is read. ``full``: also every byte of
            every part is hashed.
        subset: ``n/t``, n from 0: every t-th case by a hash of its id; t jobs cover the store in turns.
        observe: Told how many cases are done, and of how many.

    Raises:
        StoreError: There is no store at this path.
        ConfigError: The level or the subset is none.
    """
    if level not in LEVELS:
        raise ConfigError(f"there is no level {level!r}", expected=" | ".join(LEVELS), where="verify")
    share = parse_subset(subset)
    report, started = VerifyReport(str(path), level, subset), time.monotonic()
    description = check_root(path, report)
    inspector = Inspector(path, description.spec, level, quarantined_records(path))
    names = [name for name in case_folders(path) if in_subset(name, share)] if _cases_are_here(path) else []
    for done, name in enumerate(names):
        observe(done, len(names))
        found = inspector.check(name)
        if found is not None:
            report.findings += found.findings
            _count(report, found)
    observe(len(names), len(names))
    report.seconds = time.monotonic() - started
    return report


def parse_subset(text: str | None) -> tuple[int, int]:
    """``n/t`` as numbers.

    Raises:
        ConfigError: It is not two numbers, the first one below the second.
    """
    if text is None:
        return 0, 1
    form = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if form is None or int(form[1]) >= int(form[2]):
        raise ConfigError(
            f"there is no share {text!r}", expected="n/t, n from 0 to t − 1, such as 0/7", where="--subset"
        )
    return int(form[1]), int(form[2])


def in_subset(name: str, share: tuple[int, int]) -> bool:
    """Whether a case's folder belongs to a share; folders stand for ids one to one."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % share[1] == share[0]


def _cases_are_here(path: Path) -> bool:
    return is_folder(path / CASES)


def check_root(path: Path, report: VerifyReport) -> Description:
    """The store's description, and what lies in its top folder.

    Raises:
        StoreError: As `description.look_at_description`.
    """

    def add(file: str, kind: str, found: str, expected: str = "", damage: bool = True) -> None:
        report.findings.append(Finding("", file, kind, found, expected, damage))

    description = look_at_description(path)
    if description.kind:
        source = f" from {description.parts:,} parts" if description.parts else ""
        expected = f"`featstore repair --apply` makes it anew{source}"
        if description.obstacle:
            expected = f"the file from a backup; it cannot be made anew, since {description.obstacle}"
        add(MANIFEST, description.kind, description.found, expected)
    if not is_folder(path / CASES):
        add(
            CASES, "link" if (path / CASES).is_symlink() else "cases-missing", "no folder of its own", "one"
        )
    for entry in sorted(path.iterdir()):
        if entry.name in (MANIFEST, CASES) or (entry.name == QUARANTINE and is_folder(entry)):
            continue
        kind = "temporary" if is_temporary(entry.name) else "foreign"
        add(entry.name, "link" if entry.is_symlink() else kind, "no file of a store", damage=False)
    kept = sum(1 for _ in quarantined(path))
    if kept:
        add(
            QUARANTINE,
            "quarantine",
            f"{kept:,} damaged files lie here; when nobody needs them: gc --quarantine --apply",
            damage=False,
        )
    return description


def _count(report: VerifyReport, found: CaseCheck) -> None:
    report.cases += found.highest is not None
    if found.record is not None:
        report.parts += len(found.record.parts)
        report.bytes += sum(part.size for part in found.record.parts)
        report.patches += sum(
            live_count(group.live) for part in found.record.parts for group in part.groups
        )


def live_count(ranges: str) -> int:
    """How many numbers a list such as ``1-50,52`` stands for; 0 if it is malformed."""
    try:
        spans = [span.partition("-") for span in ranges.split(",") if span]
        return sum(int(last or first) - int(first) + 1 for first, _, last in spans)
    except ValueError:
        return 0
