"""Finding the PNG files below a folder."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from featstore.errors import CohortError

_LITTER_FOLDERS = {"__MACOSX", "@eaDir"}


@dataclass
class Found:
    """PNG files below a folder, POSIX paths relative to it, and what was passed over."""

    paths: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    links_skipped: list[str] = field(default_factory=list)


def walk(folder: Path) -> Found:
    """List all PNG files below a folder, without a look at the files themselves.

    Real folders come first, so that a link never hides a real path; each folder is
    listed once, so that links cannot loop. Hidden files, hidden folders and other
    systems' litter are counted and passed over.

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
    found = Found()
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
                elif entry.is_symlink() and not _is_file_link(entry):
                    if entry.is_dir():
                        links.append(f"{prefix}{name}/")
                    else:
                        found.links_skipped.append(f"{prefix}{name}")
                elif name.startswith("."):
                    found.ignored["hidden"] += 1
                elif name[-4:].lower() == ".png":
                    found.paths.append(prefix + name)
                else:
                    found.ignored[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    except OSError as error:
        raise _unreadable(folder / prefix, error) from error


def _is_file_link(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # broken, or a chain of links that never ends
        return False


def _unreadable(folder: Path, error: OSError) -> CohortError:
    return CohortError(
        f"{folder} cannot be read: {error.strerror or error}",
        expected="a folder that exists and that you may read, with all its sub-folders",
        where="patches.folder",
        fix="check the path (--patches-folder) and its permissions",
    )
