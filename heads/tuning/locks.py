"""Locks among the workers of a tuning: the kernel's, which end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from optuna.storages.journal import JournalFileOpenLock

from heads.evaluation.runs import RunError


def _locked(path: Path) -> IO[bytes]:
    """The file, opened and locked, for the caller to close; waits until nobody else holds it."""
    file = open(path, "ab+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        file.close()
        raise RunError(
            f"the file system cannot lock files ({error.strerror})",
            expected="a folder whose locks all workers see: a local one, NFS 4, Lustre mounted with flock",
            where=str(path.parent),
            fix="keep the runs on another file system: --runs-path FOLDER",
        ) from error
    return file


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for a lock, and hold it for the block.

    Args:
        path: The file that is locked; made where missing, and never removed.

    Raises:
        RunError: The file system has no locks.
    """
    with _locked(path):
        yield


class JournalLock(JournalFileOpenLock):
    """Who may append to a journal: one at a time.

    Optuna's own two locks are files that exist while they are held. One that a killed process leaves
    behind stops all others for 30 seconds and is then broken by force, and so is that of a process which
    was only suspended. The kernel's lock is gone with its holder, at once, and never broken.

    A line that a killed writer left unfinished is cut off: it was never acknowledged, and with the next
    one appended to it the journal could not be read any more.

    Args:
        journal: The file that is appended to.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._path = journal.with_name(f".{journal.name}.lock")
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._file = _locked(self._path)
        self._mend()
        return True

    def release(self) -> None:
        """Let go of it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _mend(self) -> None:
        with open(self._journal, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
