"""What is wrong with one case: its newest record, the parts that it names, and what lies beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreDamaged, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store.findings import Finding
from featstore.store.format import CASES, Record, record_name
from featstore.store.ids import component
from featstore.store.listing import Entry, Listing, Quarantined, is_folder, list_folder, read_plain
from featstore.store.partcheck import (
    UNREADABLE,
    Problem,
    check_bytes,
    check_file,
    check_values,
    os_problem,
)
from featstore.store.records import check_record

Doubles = dict[tuple[str, str], NDArray[np.int64]]
_ATTEMPTS = 5


@dataclass
class CaseCheck:
    """One case as it was found.

    Attributes:
        name: Its folder.
        case_id: Its id; None where nothing tells it.
        highest: The number of its newest record.
        record: The newest record, if it is good.
        bad_record: The newest record's file, if that is damaged (and not merely unreadable).
        lost: A number in quarantine; a newer record than that must have been there and is gone.
        bad_parts: Live parts that are damaged or missing.
        doubles: Patches that are live more than once, by stain and slice.
        bad_old: Files of older records that are damaged.
        findings: All of it, to be told.
    """

    name: str
    case_id: str | None = None
    highest: int | None = None
    record: Record | None = None
    bad_record: str | None = None
    lost: int | None = None
    bad_parts: set[str] = field(default_factory=set)
    doubles: Doubles = field(default_factory=dict)
    bad_old: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, file: str, problem: Problem, damage: bool = True) -> None:
        """Note a finding about a file of this case ('' for its folder)."""
        case = self.case_id if self.case_id is not None else self.name
        place = f"{CASES}/{self.name}" + (f"/{file}" if file else "")
        self.findings.append(Finding(case, place, *problem, damage))


class Inspector:
    """Checks cases of one store.

    Args:
        root: The store's folder.
        spec: Its spec; None where the description is lost.
        level: One of `findings.LEVELS`.
        quarantined: What `listing.quarantined_records` found.
    """

    def __init__(
        self, root: Path, spec: EmbeddingSpec | None, level: str, quarantined: dict[str, Quarantined]
    ) -> None:
        self._root, self._spec, self._level = root, spec, level
        self._quarantined = quarantined

    def check(self, name: str) -> CaseCheck | None:
        """Look at one entry of the folder of cases; None if it has gone meanwhile."""
        folder = self._root / CASES / name
        found = CaseCheck(name)
        if not is_folder(folder):
            if not os.path.lexists(folder):
                return None
            if folder.is_symlink():
                found.add("", ("link", f"a link to {os.readlink(folder)} stands here", "a case's folder"))
            else:
                found.add("", ("foreign", "no part of a store", ""), damage=False)
            return found
        for _ in range(_ATTEMPTS):
            try:
                listing = list_folder(folder)
                found = self._look(folder, listing)
                # A commit while we looked: what seemed amiss may only have been superseded.
                if (
                    not any(f.damage for f in found.findings)
                    or list_folder(folder).highest == found.highest
                ):
                    break
            except OSError as error:
                found.add("", os_problem(error, UNREADABLE))
                break
        return found

    def _look(self, folder: Path, listing: Listing) -> CaseCheck:
        found = CaseCheck(folder.name, plain_id(folder.name), listing.highest)
        if listing.highest is not None:
            self._check_newest(listing, found)
        if found.record is not None:
            found.case_id = found.record.case_id
            self._check_lost(found)
            self._check_parts(folder, found)
        if found.record is not None or listing.highest is None:
            self._list_unnamed(listing, found)
        if self._level != "quick":
            self._check_old(listing, found)
        for entry in listing.temporaries:
            found.add(entry.name, ("temporary", "a file that a writer has not finished", ""), damage=False)
        for entry in listing.others:
            kind = "link" if entry.is_symlink() else "foreign"
            found.add(entry.name, (kind, "no file of a store", ""), damage=False)
        if listing.highest is None:
            found.add("", ("no-record", "a case's folder without a record", ""), damage=False)
        return found

    def _check_newest(self, listing: Listing, found: CaseCheck) -> None:
        assert listing.highest is not None
        entry = listing.records[listing.highest]
        try:
            found.record = read_entry(entry, listing.highest, self._spec)
            if self._level != "quick":
                found.doubles = doubles(found.record)
        except StoreDamaged as error:
            found.record, found.bad_record = None, entry.name
            found.case_id = found.case_id or self._known_id(listing)
            kind = "link" if entry.is_symlink() else "record-damaged"
            found.add(entry.name, (kind, error.found, error.expected))
        except StoreError as error:
            found.add(entry.name, (UNREADABLE, error.found, error.expected))
        for (stain, slice_id), patches in found.doubles.items():
            numbers = ", ".join(map(str, patches[:10].tolist())) + (", …" if len(patches) > 10 else "")
            problem = ("live-twice", f"{stain}/{slice_id}: patches {numbers} are live in two parts", "")
            found.add(entry.name, problem)

    def _known_id(self, listing: Listing) -> str | None:
        """The case's id from any of its records; the folder's name is a hash of it, so it is sure."""
        for sequence in sorted(listing.records, reverse=True):
            path = Path(listing.records[sequence].path)
            try:
                case_id = json.loads(read_plain(path))["case_id"]
                if component(case_id) == path.parent.name:
                    return str(case_id)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StoreError):
                continue
        return None

    def _check_lost(self, found: CaseCheck) -> None:
        """Whether the newest record is one that `repair` had superseded: then a newer one was deleted."""
        last = self._quarantined.get(found.name)
        record = found.record
        if last is None or record is None or record.sequence > last.sequence:
            return
        if datetime.fromisoformat(record.created) < last.moved:
            found.lost = last.sequence
            told = f"the newest record, but number {last.sequence} lies in quarantine"
            found.add(record.name, ("record-missing", told, "a newer record, written by repair"))

    def _check_parts(self, folder: Path, found: CaseCheck) -> None:
        assert found.record is not None
        for part in found.record.parts:
            path = folder / part.name
            first = check_file(path, part)
            problems = [first] if first else []
            if not problems and self._level != "quick":
                problems = list(check_values(path, part, self._spec))
            if not first and self._level == "full":
                last = check_bytes(path, part)
                problems += [last] if last else []
            for problem in problems:
                found.add(part.name, problem)
                if problem[0] != UNREADABLE:
                    found.bad_parts.add(part.name)

    def _list_unnamed(self, listing: Listing, found: CaseCheck) -> None:
        named = {part.name for part in found.record.parts} if found.record else set()
        unnamed = [entry for name, entry in listing.parts.items() if name not in named]
        if not unnamed:
            return
        for sequence in sorted(listing.records, reverse=True)[1:]:
            try:
                old = read_entry(listing.records[sequence], sequence, self._spec)
                named |= {part.name for part in old.parts}
            except StoreError:
                continue
        for entry in unnamed:
            if entry.name not in named:
                try:
                    told = _why_unnamed(entry, listing)
                except OSError:
                    continue  # its writer has just taken it back, or a `gc` has
                found.add(entry.name, ("part-unnamed", told, ""), damage=False)

    def _check_old(self, listing: Listing, found: CaseCheck) -> None:
        for sequence in sorted(listing.records)[:-1]:
            entry = listing.records[sequence]
            try:
                read_entry(entry, sequence, self._spec)
            except StoreDamaged as error:
                if os.path.lexists(entry.path):  # else a `gc` has just removed it
                    found.bad_old.append(entry.name)
                    problem = ("old-record", f"an old record, needed no more: {error.found}", "")
                    found.add(entry.name, problem, damage=False)
            except StoreError:
                continue


def read_entry(entry: Entry, sequence: int, spec: EmbeddingSpec | None) -> Record:
    """Read and check the record behind an entry; a link is not followed.

    Raises:
        StoreError: It may not be read, or is of another major version of the format.
        StoreDamaged: It is not what was written.
    """
    path = Path(entry.path)
    if entry.name != record_name(sequence) or not entry.is_file(follow_symlinks=False):
        what = f"a link to {os.readlink(path)}" if entry.is_symlink() else "this"
        raise StoreDamaged(
            f"{what} stands in for a record", expected=f"a plain file {record_name(sequence)}"
        )
    try:
        data = read_plain(path)
    except OSError as error:
        kind, told, _ = os_problem(error, "record-damaged")
        raise (StoreError if kind == UNREADABLE else StoreDamaged)(told, where=str(path)) from error
    return check_record(data, path, sequence, spec)


def plain_id(name: str) -> str | None:
    """The id in a case folder's name, where that is invertible."""
    plain = unquote(name)
    try:
        return plain if component(plain) == name else None
    except StoreError:
        return None


def doubles(record: Record) -> Doubles:
    """Patches that a record lists as live more than once, ascending, by stain and slice.

    Raises:
        StoreDamaged: A list of live patches is malformed.
    """
    groups: dict[tuple[str, str], list[NDArray[np.int64]]] = {}
    for part in record.parts:
        for group in part.groups:
            groups.setdefault((group.stain, group.slice_id), []).append(group.patches(record.name))
    found = {}
    for key, lists in groups.items():
        if len(lists) > 1:
            numbers, counts = np.unique(np.concatenate(lists), return_counts=True)
            if (counts > 1).any():
                found[key] = numbers[counts > 1]
    return found


def _why_unnamed(entry: Entry, listing: Listing) -> str:
    """What a part that no record names may mean."""
    if listing.highest is None:
        return (
            "named by no record, for there is none: a writer is at work or was stopped before its "
            "commit, or the record was deleted"
        )
    newest = listing.records[listing.highest]
    if entry.stat(follow_symlinks=False).st_mtime_ns > newest.stat(follow_symlinks=False).st_mtime_ns:
        return (
            f"named by no record, and younger than the newest one ({newest.name}): a writer is at work or "
            "was stopped before its commit, or a newer record was deleted"
        )
    return "named by no record: a writer was stopped before its commit"
