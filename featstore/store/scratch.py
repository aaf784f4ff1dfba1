"""A copy of some of a store's cases on the node's own disk, for trainings that read them again and again.

::

    SCRATCH/featstore-UID/<name>/          the copy, a whole store of its own; named by what it holds
                          <name>.lock      held while it is made
                          <name>.*.tmp/    one that is being made, or that a killed process left behind

A copy appears by one rename when all of it is there, so that every process on the node may use it,
and while one makes it the others wait. It is a luxury: where it cannot be made, a warning says so
and the store itself is read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

from featstore.cohort.names import natural_sorted
from featstore.errors import ConfigError
from featstore.store.copied import CopiedStore
from featstore.store.damage import damaged
from featstore.store.files import TEMPORARY_SUFFIX, unique_name
from featstore.store.format import CASES, MANIFEST, record_name
from featstore.store.ids import component
from featstore.store.records import check_record
from featstore.store.store import Store

_BLOCK = 4 << 20
# Files that are read at once: a network file system answers several as fast as one.
_THREADS = 4
# What a file takes of a disk besides its bytes, and what is left to others.
_FILE_BYTES, _SPARE_BYTES = 4096, 64 << 20


def scratch_folder(text: str) -> Path:
    """The folder that ``store.scratch`` means on this machine.

    Args:
        text: An absolute path, in which ``$NAME`` and ``${NAME}`` stand for environment variables.

    Raises:
        ConfigError: A variable is not set, or the path is not absolute.
    """
    for name in (found.strip("{}") for found in re.findall(r"\$(\w+|\{[^}]*\})", text)):
        if not os.environ.get(name):
            raise ConfigError(
                f"store.scratch is {text!r}, and the environment variable {name} is not set here",
                expected="a variable that the scheduler or the node sets, such as TMPDIR",
                where="store.scratch",
                fix="set it, name a folder of the node's own disk, or have none: --set store.scratch=null",
            )
    path = Path(os.path.expandvars(text))
    if not path.is_absolute():
        raise ConfigError(
            f"store.scratch is {text!r}",
            expected="an absolute path on the node's own disk, or a variable that holds one ($TMPDIR)",
            where="store.scratch",
            fix="write it in full, e.g. --set store.scratch=/local/scratch",
        )
    return path


def copy_to_scratch(
    store: Store, cases: Collection[str], scratch: Path, tell: Callable[[str], None] = lambda text: None
) -> Store:
    """Copy what a training reads to the node's own disk, unless it is there already.

    Every part is held against its record's size and sha256 on the way. A copy that is there is
    looked at for missing and shortened files only: what else may happen to it, reading finds.

    Args:
        store: As it was opened.
        cases: Those that will be read.
        scratch: A folder of the node's own disk; made where missing.
        tell: Called with remarks.

    Returns:
        The store with these cases read from the copy (`CopiedStore`); the store itself where there
        can be no copy, which a warning tells.

    Raises:
        StoreError: The store lacks a case.
        StoreDamaged: A record or part is not what was written.
    """
    source = store.original if isinstance(store, CopiedStore) else store
    name, wanted = _look_at(source, natural_sorted(set(cases)))
    try:
        home = _home(scratch)
        copy = home / name
        with _locked(copy, tell) as locked:
            if not _is_whole(copy, wanted, tell):
                _remove_leftovers(home, name if locked else None)
                _make(source, wanted, copy, tell)
    except OSError as error:
        reason = error.strerror or str(error)
        tell(f"warning: no copy in store.scratch ({reason}: {scratch}); {store.path} itself is read")
        return source
    return CopiedStore(source, copy, cases)


class _Wanted(NamedTuple):
    """What is copied of a case; records whole would be too much of 100,000 cases.

    Attributes:
        folder: Its name.
        sequence: Of its record.
        parts: Their names, sizes and sha256.
    """

    folder: str
    sequence: int
    parts: tuple[tuple[str, int, str], ...]


def _look_at(store: Store, cases: Sequence[str]) -> tuple[str, list[_Wanted]]:
    """The copy's name, which is another one as soon as any of these cases changes, and what it holds."""
    digest, wanted = hashlib.sha256(store.spec.fingerprint.encode()), []
    for case in cases:
        record = store.record(case)
        live = [[part.sha256, [[*astuple(group)] for group in part.groups]] for part in record.parts]
        digest.update(json.dumps([case, record.sequence, live]).encode())
        parts = tuple((part.name, part.size, part.sha256) for part in record.parts)
        wanted.append(_Wanted(component(case), record.sequence, parts))
    return digest.hexdigest()[:32], wanted


def _home(scratch: Path) -> Path:
    """The folder of this user's copies: others, who may write beside it, must not write into it.

    Raises:
        OSError: It cannot be made, or is not this user's own.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    home = scratch / f"featstore-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, f"{home.name} is there, and is not this user's alone")
    return home


@contextmanager
def _locked(copy: Path, tell: Callable[[str], None]) -> Iterator[bool]:
    """Hold a copy's lock, which ends with the process; False where the file system knows no locks."""
    with open(_lock_of(copy), "a") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"waiting for another process that is copying the store to {copy}")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _lock_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.lock")


def _is_whole(copy: Path, wanted: Sequence[_Wanted], tell: Callable[[str], None]) -> bool:
    """Whether the copy is there with every file in its size; one that has lost some is put aside."""
    if not copy.is_dir():
        return False
    try:
        (copy / MANIFEST).stat()
        for case in wanted:
            folder = copy / CASES / case.folder
            (folder / record_name(case.sequence)).stat()
            if any((folder / name).stat().st_size != size for name, size, _ in case.parts):
                raise FileNotFoundError
    except (FileNotFoundError, NotADirectoryError):
        tell(f"warning: the copy in {copy} is not whole any more, and is made anew")
        copy.rename(_aside(copy))
        return False
    return True


def _aside(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.{unique_name()}{TEMPORARY_SUFFIX}")


def _remove_leftovers(home: Path, held: str | None) -> None:
    """Remove what nobody is making now; ``held`` is the copy whose lock this process has, if any."""
    for folder in home.glob(f"*{TEMPORARY_SUFFIX}"):
        name = folder.name.partition(".")[0]
        if name == held:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with suppress(OSError), open(_lock_of(home / name), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _make(store: Store, wanted: Sequence[_Wanted], copy: Path, tell: Callable[[str], None]) -> None:
    """Make the copy aside, and give it its name.

    Raises:
        StoreDamaged: A record or part of the store is not what was written.
        OSError: There is no room, or something cannot be read or written.
    """
    size = sum(size for case in wanted for _, size, _ in case.parts)
    files = sum(2 + len(case.parts) for case in wanted)
    free = shutil.disk_usage(copy.parent).free
    if free < size + files * _FILE_BYTES + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB are free, the copy takes {size / 1e9:.1f} GB")
    tell(f"copying {len(wanted):,} cases, {size / 1e9:.2f} GB, to {copy}")
    started = time.monotonic()
    aside = _aside(copy)
    try:
        (aside / CASES).mkdir(parents=True)
        shutil.copyfile(store.path / MANIFEST, aside / MANIFEST)
        with ThreadPoolExecutor(_THREADS, "featstore-scratch") as pool:
            try:
                for _ in pool.map(lambda case: _copy_case(store, case, aside), wanted):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        try:
            aside.rename(copy)
        except OSError:
            if not copy.is_dir():  # where there are no locks, another process may have been faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    tell(f"copied in {time.monotonic() - started:.1f} s")


def _copy_case(store: Store, case: _Wanted, root: Path) -> None:
    """One case's record and live parts."""
    source, target = (folder / CASES / case.folder for folder in (store.path, root))
    target.mkdir()
    record = record_name(case.sequence)
    data = (source / record).read_bytes()
    check_record(data, source / record, case.sequence, store.spec)
    for name, size, sha256 in case.parts:
        _copy_part(source / name, target / name, size, sha256)
    (target / record).write_bytes(data)


def _copy_part(source: Path, target: Path, size: int, sha256: str) -> None:
    digest, done, block = hashlib.sha256(), 0, memoryview(bytearray(min(_BLOCK, size + 1)))
    with open(source, "rb", buffering=0) as read, open(target, "xb") as write:
        while count := read.readinto(block):
            digest.update(block[:count])
            write.write(block[:count])
            done += count
    if (done, digest.hexdigest()) != (size, sha256):
        raise damaged(
            source,
            f"a part of {done:,} bytes is not what was written (its sha256 does not match)",
            f"{size:,} bytes with the sha256 {sha256}",
        )
