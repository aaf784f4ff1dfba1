"""Reading what is committed: the manifest, and every case's newest record."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from featstore.errors import StoreDamaged, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store.format import (
    CASES,
    MANIFEST,
    Record,
    decode_manifest,
    decode_record,
    record_name,
    record_sequence,
)
from featstore.store.ids import component
from featstore.store.listing import case_folders, is_folder

# Of the patch number alone; no file format of parts compresses.
_ROW_BYTES = 8


def read_manifest(root: Path) -> EmbeddingSpec | None:
    """The store's EmbeddingSpec; None where there is no store."""
    path = root / MANIFEST
    try:
        data = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(
            f"the store may not be read ({error.strerror})", where=str(path), fix="give yourself permission"
        ) from error
    try:
        return decode_manifest(data, str(path))
    except RecursionError as error:
        raise StoreDamaged("the store's description is nested too deeply", where=str(path)) from error


def require_manifest(root: Path) -> EmbeddingSpec:
    """The store's EmbeddingSpec.

    Raises:
        StoreError: There is no store.
        StoreDamaged: Its description is missing, or not what was written.
    """
    spec = read_manifest(root)
    if spec is None and any(is_folder(root / CASES / name) for name in case_folders(root)):
        raise StoreDamaged(
            f"the store's description ({MANIFEST}) is missing",
            expected=f"a folder with {MANIFEST} in it, beside {CASES}/",
            where=str(root.absolute()),
            fix="`featstore repair --apply` makes it anew from the parts; or restore it from a backup",
        )
    if spec is None:
        raise StoreError(
            "there is no embedding store here",
            expected=f"a folder with {MANIFEST} in it",
            where=str(root.absolute()),
            fix="make one with `featstore extract` (or `import`), or name another with --store-path FOLDER",
        )
    return spec


def _read(path: Path) -> bytes:
    """A file's bytes; of a pipe that stands in its place none, instead of waiting for a writer."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        return file.read()


def require_own_folder(folder: Path) -> None:
    """Refuse to write through a link: what it leads to is no part of the store.

    Raises:
        StoreDamaged: A link stands in for a case's folder, or for the folder of cases.
    """
    for place in (folder.parent, folder):
        if place.is_symlink():
            raise StoreDamaged(
                f"a link to {os.readlink(place)} stands in for a folder of the store",
                expected="the folder itself",
                where=str(place),
                fix="put the folder itself in the link's place, then run the same command again",
            )


def newest_records(root: Path) -> dict[str, int]:
    """The highest record number of every case folder that has one."""
    newest = {}
    try:
        with os.scandir(root / CASES) as folders:
            for folder in folders:
                number = highest_record(Path(folder.path)) if folder.is_dir() else None
                if number is not None:
                    newest[folder.name] = number
    except OSError as error:
        raise StoreError(
            f"the store's cases cannot be listed ({error.strerror})",
            where=str(error.filename),
            fix="check the file system and your permissions",
        ) from error
    return newest


def highest_record(folder: Path) -> int | None:
    """The number of a case folder's newest record; None where there is none."""
    try:
        numbers = [record_sequence(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return None
    return max((number for number in numbers if number is not None), default=None)


def read_record(root: Path, name: str, sequence: int, spec: EmbeddingSpec) -> Record:
    """Read and check one record.

    Args:
        root: The store's folder.
        name: The case's folder name.
        sequence: The record's number.
        spec: The store's; the record must have its fingerprint.

    Raises:
        StoreError: The record is gone (`gc` removed it after this view was opened), or unreadable.
        StoreDamaged: The record is not what was written, or not of this store.
    """
    path = root / CASES / name / record_name(sequence)
    try:
        data = _read(path)
    except FileNotFoundError as error:
        raise StoreError(
            "a record is gone since the store was opened", where=str(path), fix="open it again"
        ) from error
    except OSError as error:
        raise StoreError(f"a record may not be read ({error.strerror})", where=str(path)) from error
    return check_record(data, path, sequence, spec)


def check_record(data: bytes, path: Path, sequence: int, spec: EmbeddingSpec | None) -> Record:
    """A record from the bytes of its file.

    Args:
        data: What the file holds.
        path: The file, in its case's folder.
        sequence: The number in its name.
        spec: The store's; the record must have its fingerprint. None: any will do.

    Raises:
        StoreError: The record is of another major version of the format.
        StoreDamaged: The record is not what was written, or not of this store.
    """
    try:
        record = decode_record(data, str(path))
        problem = _implausible(record)
    except RecursionError as error:
        raise StoreDamaged("a commit record is nested too deeply", where=str(path)) from error
    if problem:
        raise StoreDamaged(
            f"a commit record names {problem}",
            expected="what featstore writes",
            where=str(path),
            fix="`featstore repair` moves it away",
        )
    name = path.parent.name
    if record.sequence != sequence or component(record.case_id) != name:
        raise StoreDamaged(
            f"this record was written as number {record.sequence} of case {record.case_id!r}",
            expected=f"number {sequence} of the case in {name}",
            where=str(path),
            fix="it was copied here by hand: `featstore repair` moves it away",
        )
    if spec is not None and record.fingerprint != spec.fingerprint:
        raise StoreDamaged(
            f"this record has the fingerprint {record.fingerprint}",
            expected=f"{spec.fingerprint}, the store's",
            where=str(path),
            fix="it was copied here from another store: `featstore repair` moves it away",
        )
    return record


def _implausible(record: Record) -> str:
    """What no writer writes: a record can be forged with a right sha256, and must cost nobody memory."""
    groups = [group for part in record.parts for group in part.groups]
    ids = [record.case_id, *(name for group in groups for name in (group.stain, group.slice_id))]
    texts = [record.fingerprint, record.writer, *(part.sha256 for part in record.parts)]
    if not all(isinstance(text, str) for text in [*ids, *texts, *(group.live for group in groups)]):
        return "things that are no text"
    if type(record.sequence) is not int:
        return f"the number {record.sequence!r}"
    try:
        for name in ids:
            component(name)
        datetime.fromisoformat(record.created)
    except (StoreError, TypeError, ValueError) as error:
        return f"an id or a time that is none ({error})"
    if len({part.name for part in record.parts}) < len(record.parts):
        return "a part twice"
    for part in record.parts:
        if sum(group.rows for group in part.groups) * _ROW_BYTES > part.size:
            return f"more rows than {part.size:,} bytes of {part.name} can hold"
    return ""
