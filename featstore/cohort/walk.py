"""Finding the patches' files below a folder."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from featstore.errors import CohortError

_LITTER_FOLDERS = {"__MACOSX", "@eaDir"}
# Of a link: its target is missing (also below a file), or it ends in no target at all.
_LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


@dataclass
class Found:
    """Files of a kind below a folder, POSIX paths relative to it, and what was passed over.

    Attributes:
        suffix: Of their names.
        paths: Files, and links to files, of that name.
        not_files: Pipes, sockets and devices of that name, which no reader may open: it could hang.
        ignored: Suffix (or `hidden`, `litter folder`) → number of entries.
        links_skipped: Links to folders already listed, and broken links.
        broken_links: Those of them that lead nowhere.
    """

    suffix: str = ".png"
    paths: list[str] = field(default_factory=list)
    not_files: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    links_skipped: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)


def walk(folder: Path, suffix: str = ".png") -> Found:
    """List all files of a kind below a folder, without a look at the files themselves.

    Real folders come first, so that a link never hides a real path; each folder is
    listed once, so that links cannot loop. Hidden files, hidden folders and other
    systems' litter are counted and passed over.

    Args:
        folder: Searched at any depth.
        suffix: Of the names that are wanted, in lower case; theirs may be in any.

    Raises:
        CohortError: The folder, or any below it, cannot be read.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not stat.S_ISDIR(status.st_mode):
        raise CohortError(
            f"{folder} is not a folder",
            expected="a folder of patches",
            where="patches.folder",
            fix="give the folder of patches: featstore init FOLDER, or --patches-folder FOLDER",
        )
    found = Found(suffix)
    seen = {(status.st_dev, status.st_ino)}
    folders, links = [""], list[str]()
    while folders or links:
        if folders:
            prefix = folders.pop()
        else:
            links.sort(reverse=True)
            prefix = links.pop()
            status = os.stat(folder / prefix)
            if (status.st_dev, status.st_ino) in seen:
                found.links_skipped.append(prefix.rstrip("/"))
                continue
            seen.add((status.st_dev, status.st_ino))
        _list(folder, prefix, found, folders, links, seen)
    return found


def _list(
    folder: Path,
    prefix: str,
    found: Found,
    folders: list[str],
    links: list[str],
    seen: set[tuple[int, int]],
) -> None:
    try:
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    if name.startswith(".") or name in _LITTER_FOLDERS:
                        found.ignored["litter folder"] += 1
                        continue
                    status = entry.stat(follow_symlinks=False)
                    seen.add((status.st_dev, status.st_ino))
                    folders.append(f"{prefix}{name}/")
                    continue
                mode = _target(entry) if entry.is_symlink() else None
                if mode == 0:
                    found.links_skipped.append(prefix + name)
                    found.broken_links.append(prefix + name)
                elif mode is not None and stat.S_ISDIR(mode):
                    links.append(f"{prefix}{name}/")
                else:
                    _sort_in(entry, prefix, found)
    except OSError as error:
        raise _unreadable(folder / prefix, error) from error


def _sort_in(entry: os.DirEntry[str], prefix: str, found: Found) -> None:
    """Notes an entry that is neither a folder nor a link to one."""
    name = entry.name
    if name.startswith("."):
        found.ignored["hidden"] += 1
    elif not name.lower().endswith(found.suffix):
        found.ignored[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    elif entry.is_file():  # known from the listing itself; only links cost a look, already taken
        found.paths.append(prefix + name)
    else:
        found.not_files.append(prefix + name)


def _target(entry: os.DirEntry[str]) -> int:
    """The mode of what a link leads to, 0 if that is nothing.

    Raises:
        OSError: It cannot be told, e.g. for want of permission: patches may be behind it.
    """
    try:
        return entry.stat().st_mode
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return 0
        raise


def _unreadable(folder: Path, error: OSError) -> CohortError:
    return CohortError(
        f"{folder} cannot be read: {error.strerror or error}",
        expected="a folder that exists and that you may read, with all its sub-folders",
        where="patches.folder",
        fix="check the path (--patches-folder) and its permissions",
    )
