"""Writing so that a file is either absent or whole: the four moves the store is made of.

Every function returns only after the data, and the folder entry that names it,
are on the disk. A failed fsync is fatal: after one, the kernel may have dropped
the very pages it could not write, so nothing is retried and nothing is assumed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from featstore.errors import StoreError

TEMPORARY_SUFFIX = ".tmp"


def unique_name() -> str:
    """A name no other writer will ever choose, on this machine or another."""
    return uuid.uuid4().hex


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    with _named(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, each one durable in its parent."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with _named(new):
            with contextlib.suppress(FileExistsError):
                os.mkdir(new)
            if not new.is_dir():
                raise StoreError(f"{new} is not a folder", where=str(new), fix="move the file away")
        sync_folder(new.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file under a name that must not exist yet, and make it durable.

    Raises:
        StoreError: The file could not be written whole; nothing is left of it
            unless even its removal failed.
    """
    with _named(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                _write_all(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            sync_folder(path.parent)
        except BaseException:
            remove(path)
            raise


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.write(handle, view)
        if not written:  # some file systems in user space answer so, and would do so for ever
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[written:]


def publish(path: Path, data: bytes) -> bool:
    """Write a file whole and give it its name in one step, unless the name is taken.

    The content goes to a temporary file first; ``link(2)`` then makes the name
    appear, atomically and exclusively, on local and network file systems alike.

    Returns:
        True if the file is now there because of this call; False if the name
        was taken (another writer came first) and nothing has changed.
    """
    temporary = path.parent / f".{unique_name()}{TEMPORARY_SUFFIX}"
    write_new(temporary, data)
    try:
        with _named(path):
            try:
                os.link(temporary, path)
            except FileExistsError:
                # NFS may answer "exists" to the retransmission of a link that succeeded.
                if os.stat(path).st_ino != os.stat(temporary).st_ino:
                    return False
        sync_folder(path.parent)
    finally:
        remove(temporary)
    return True


def check_links(folder: Path) -> None:
    """Notice a file system without hard links before any work is done.

    Raises:
        StoreError: ``link(2)`` does not work in this folder, or it cannot be written to.
    """
    probe = folder / f".probe-{unique_name()}{TEMPORARY_SUFFIX}"
    try:
        publish(probe, b"")
    finally:
        remove(probe)


def remove(path: Path) -> None:
    """Remove a file that nothing names any more; a failure leaves litter, never damage."""
    with contextlib.suppress(OSError):
        os.unlink(path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn operating-system errors into messages that name the path and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK) and error.filename2:
            raise StoreError(
                f"the file system has no hard links ({error.strerror})",
                expected="a file system with link(2), such as ext4, xfs, NFS, Lustre or GPFS",
                where=str(path.parent),
                fix="put the store elsewhere: --store-path FOLDER",
            ) from error
        fixes = {
            errno.ENOSPC: "make space and run the same command again; what was committed is safe",
            errno.EDQUOT: "make space within your quota and run the same command again",
            errno.EFBIG: "raise the limit on file sizes, or lower --part-mb",
            errno.EACCES: "give yourself write permission, or choose another folder: --store-path FOLDER",
            errno.EROFS: "the file system is read-only; choose another folder: --store-path FOLDER",
        }
        raise StoreError(
            f"could not write: {error.strerror}",
            where=str(path),
            fix=fixes.get(
                error.errno or 0, "mend the disk or file system, then run the same command again"
            ),
        ) from error
