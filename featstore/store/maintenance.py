"""Keeping a store in order: `repair` mends, `gc` removes what nobody needs, `rm` takes embeddings out."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featstore.errors import ConfigError, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store.casecheck import plain_id, read_entry
from featstore.store.findings import one_line
from featstore.store.format import CASES, QUARANTINE
from featstore.store.listing import Entry, Listing, case_folders, is_folder, is_temporary, list_folder
from featstore.store.records import require_manifest
from featstore.store.removal import RmReport, rm
from featstore.store.repair import RepairReport, repair

__all__ = ["GcReport", "RepairReport", "RmReport", "gc", "repair", "rm"]

DAY = 86400.0
# Between a writer's part and the record that names it; also where no grace is given, since a part that
# is removed there would be missing from a commit that is acknowledged.
_WRITER = 3600.0
_KINDS = ("part", "old record", "unfinished file", "quarantined file")


@dataclass
class GcReport:
    """How many files were removed, or would be, by kind; ``passed_over`` cases and why."""

    path: str
    applied: bool
    grace_seconds: float
    files: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    bytes: int = 0
    passed_over: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dict(self.__dict__)

    def to_text(self) -> str:
        """A few lines for a person."""
        counts = [f"{n:,} {kind}{'' if n == 1 else 's'}" for kind, n in self.files.items() if n]
        hours = f"{self.grace_seconds / 3600:g} hours"
        if not counts:
            lines = [f"{one_line(self.path)}: nothing that was needed no more for {hours}"]
        else:
            verb = "removed" if self.applied else "would be removed (featstore gc --apply does it)"
            lines = [f"{one_line(self.path)}: {', '.join(counts)} {verb}, {self.bytes / 1e6:,.1f} MB"]
        lines += [f"  passed over: {one_line(text)}" for text in self.passed_over[:20]]
        if len(self.passed_over) > 20:
            lines.append(f"  … and {len(self.passed_over) - 20:,} more")
        return "\n".join(lines)


def gc(
    path: Path,
    grace_seconds: float = DAY,
    apply: bool = False,
    quarantine: bool = False,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> GcReport:
    """Remove files that no reader and no writer can need any more.

    Kept are the newest record of every case, every record that was the newest one within the grace
    period (a reader that opened the store then still follows it), all parts that these name, and every
    file younger than the grace period. Of at least an hour's age must be what no record has ever named:
    a writer may be about to commit it. A case whose records cannot all be read is passed over: they
    may name anything.

    Args:
        path: The store's folder.
        grace_seconds: The grace period; longer than any reader works.
        apply: Remove; otherwise only count.
        quarantine: Also what lies in quarantine for longer than that.
        observe: Told how many cases are done, and of how many.

    Raises:
        StoreError: There is no store at this path.
    """
    if grace_seconds < 0:
        raise ConfigError("the grace period is negative", expected="0 or more", where="--grace")
    spec, now = require_manifest(path), time.time()
    cutoff, unnamed = now - grace_seconds, now - max(grace_seconds, _WRITER)
    report = GcReport(str(path), apply, grace_seconds)
    for folder in (path, path / CASES):
        for name in os.listdir(folder) if is_folder(folder) else ():
            if is_temporary(name) and _is_old(folder / name, unnamed):
                _take(report, "unfinished file", folder / name)
    names = case_folders(path) if is_folder(path / CASES) else []
    for done, name in enumerate(names):
        observe(done, len(names))
        if is_folder(path / CASES / name):
            try:
                litter = list(_litter(path / CASES / name, spec, cutoff, unnamed))
            except StoreError as error:
                report.passed_over.append(f"case {plain_id(name) or name}: {error.found}")
                continue
            for kind, doomed in litter:
                _take(report, kind, doomed)
    observe(len(names), len(names))
    if quarantine and is_folder(path / QUARANTINE):
        _clear_quarantine(path / QUARANTINE, cutoff, report)
    return report


def _take(report: GcReport, kind: str, doomed: Path) -> None:
    try:
        size = doomed.lstat().st_size
        if report.applied:
            doomed.unlink()
    except FileNotFoundError:
        return  # another gc came first
    report.files[kind] += 1
    report.bytes += size


def _litter(folder: Path, spec: EmbeddingSpec, cutoff: float, unnamed: float) -> Iterator[tuple[str, Path]]:
    """Files of one case that can go: first records, then what they name.

    A record that is committed meanwhile changes nothing: it names parts of the newest record here, and
    new ones, which are young.

    Raises:
        StoreError: A record that must be kept cannot be read.
    """
    listing = list_folder(folder)
    kept = _kept(listing, cutoff)
    named, superseded = set[str](), set[str]()
    for number, entry in sorted(listing.records.items()):
        try:
            parts = {part.name for part in read_entry(entry, number, spec).parts}
        except StoreError:
            if number in kept:
                raise
            parts = set()
        (named if number in kept else superseded).update(parts)
    for number, entry in sorted(listing.records.items()):
        if number not in kept and _is_old(Path(entry.path), cutoff):
            yield "old record", Path(entry.path)
    for name, entry in listing.parts.items():
        old = cutoff if name in superseded else unnamed
        if name not in named and _is_old(Path(entry.path), old):
            yield "part", Path(entry.path)
    for entry in listing.temporaries:
        if _is_old(Path(entry.path), unnamed):
            yield "unfinished file", Path(entry.path)


def _kept(listing: Listing, cutoff: float) -> set[int]:
    """The newest record, and those that a younger one than ``cutoff`` has superseded."""
    numbers = sorted(listing.records)
    entries: list[Entry] = [listing.records[number] for number in numbers]
    recent = {
        n for n, after in zip(numbers, entries[1:], strict=False) if not _is_old(Path(after.path), cutoff)
    }
    return recent | set(numbers[-1:])


def _is_old(path: Path, cutoff: float) -> bool:
    """Whether a plain file is older than ``cutoff``; anything else, and what is gone, is not."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and _changed(found) < cutoff


def _changed(found: os.stat_result) -> float:
    """When a file came here: a copy keeps the time of its content, so that alone would make it look old."""
    return max(found.st_mtime, found.st_ctime)


def _clear_quarantine(top: Path, cutoff: float, report: GcReport) -> None:
    for place in sorted(top.iterdir()):
        if not is_folder(place):
            continue
        inside = [Path(folder) / name for folder, _, names in os.walk(place) for name in names]
        if any(not _is_old(path, cutoff) and not path.is_symlink() for path in inside):
            continue
        for path in inside:
            _take(report, "quarantined file", path)
        if not any(names for _, _, names in os.walk(place)):
            with suppress(OSError):
                shutil.rmtree(place)
