"""What lies in a store's folders, by kind and without following links."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from featstore.store.files import TEMPORARY_SUFFIX
from featstore.store.format import CASES, PART_NAME, QUARANTINE, record_sequence

Entry = os.DirEntry[str]
STAMP = "%Y%m%dT%H%M%S%f"


@dataclass
class Listing:
    """The entries of one folder.

    Attributes:
        records: By number; of a number with two names (``000001`` and ``0000001``) the longer one,
            which no reader takes for a record but every reader counts.
        parts: By name; files that are called like a part.
        temporaries: What a writer that was killed leaves behind, or one at work uses.
        others: Everything else.
    """

    records: dict[int, Entry] = field(default_factory=dict)
    parts: dict[str, Entry] = field(default_factory=dict)
    temporaries: list[Entry] = field(default_factory=list)
    others: list[Entry] = field(default_factory=list)

    @property
    def highest(self) -> int | None:
        """The number of the newest record; None where there is none."""
        return max(self.records, default=None)


def list_folder(folder: Path) -> Listing:
    """Sort the entries of a folder of the store by kind.

    Raises:
        OSError: The folder cannot be listed.
    """
    found = Listing()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: (len(entry.name), entry.name)):
            number = record_sequence(entry.name)
            if number is not None:
                found.records[number] = entry
            elif PART_NAME.fullmatch(entry.name):
                found.parts[entry.name] = entry
            elif is_temporary(entry.name):
                found.temporaries.append(entry)
            else:
                found.others.append(entry)
    return found


def is_temporary(name: str) -> bool:
    """Whether a file is called like one that `files` writes aside."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def case_folders(root: Path) -> list[str]:
    """The names in the folder of cases, whatever they are; none where there is no such folder."""
    try:
        return sorted(os.listdir(root / CASES))
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_folder(path: Path) -> bool:
    """Whether a folder is there itself, and not only a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def read_plain(path: Path) -> bytes:
    """The bytes of a plain file; a link is refused, also one that has just been put there.

    Raises:
        OSError: The file is missing, a link, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        return file.read()


@dataclass(frozen=True)
class Quarantined:
    """The highest record of a case that lies in quarantine, and when it came there."""

    sequence: int
    moved: datetime


def quarantined_records(root: Path) -> dict[str, Quarantined]:
    """By case folder; a case must have a newer record than this one, since `repair` wrote it."""
    found: dict[str, Quarantined] = {}
    for moved, relative in quarantined(root):
        number = record_sequence(relative.name)
        if number is None or relative.parts[0] != CASES or len(relative.parts) != 3:
            continue
        name = relative.parts[1]
        if name not in found or number > found[name].sequence:
            found[name] = Quarantined(number, moved)
    return found


def quarantined(root: Path) -> Iterator[tuple[datetime, Path]]:
    """Every file in quarantine: when it was moved, and its path in the store before that."""
    top = root / QUARANTINE
    for folder, _, names in os.walk(top) if is_folder(top) else ():
        relative = Path(folder).relative_to(top)
        try:
            moved = datetime.strptime(relative.parts[0].partition("-")[0], STAMP).replace(tzinfo=UTC)
        except (IndexError, ValueError):
            continue
        for name in names:
            yield moved, Path(*relative.parts[1:], name)
