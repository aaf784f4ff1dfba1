"""The store's description, `featstore.json`: whether it is sound, and what it is made anew from.

Every part carries the spec, every record its fingerprint. So nothing is lost with the file: the
records say which fingerprint is the store's, and a spec proves by its fingerprint that it is that one.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from featstore.errors import StoreDamaged, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store import hdf5, zarr_zip
from featstore.store.casecheck import plain_id, read_entry
from featstore.store.format import CASES, MANIFEST
from featstore.store.listing import case_folders, is_folder, list_folder, read_plain
from featstore.store.records import require_manifest
from featstore.store.stored_zip import StoredZip


@dataclass(frozen=True)
class Description:
    """What `featstore.json` says, or should say.

    Attributes:
        spec: The store's; None where its description is lost and cannot be made anew.
        kind: What is wrong with the file, as in `findings.Finding`; empty if nothing is.
        found: The same in words.
        parts: How many parts hold the spec that it can be made anew from; 0 where the file itself still
            tells the spec.
        obstacle: Why it cannot be made anew; empty if it can.
    """

    spec: EmbeddingSpec | None
    kind: str = ""
    found: str = ""
    parts: int = 0
    obstacle: str = ""


def look_at_description(root: Path) -> Description:
    """Read a store's description, and where that fails look for another source of it.

    A description that is valid but of another fingerprint than every newest record has, and than the
    parts have, was copied here from another store.

    Raises:
        StoreError: There is no store at this path; its description may not be read, or is of another
            major version of the format (and the records are too).
    """
    spec, kind, found, refused = _read(root)
    fingerprint, obstacle = _fingerprint(root, spec)
    if spec is not None and (obstacle or fingerprint in (None, spec.fingerprint)):
        return Description(spec, kind, found)
    rebuilt, parts = (None, 0) if fingerprint is None else _spec_of_parts(root, fingerprint, spec)
    if spec is not None:
        if rebuilt is None:
            return Description(spec, kind, found)
        told = f"the description of another store, with the fingerprint {spec.fingerprint}"
        return Description(rebuilt, "manifest-foreign", told, parts)
    if rebuilt is None:
        if refused is not None:
            raise refused
        obstacle = obstacle or f"no part that can be read has the records' fingerprint {fingerprint}"
    return Description(rebuilt, kind, found, parts, obstacle)


def _read(root: Path) -> tuple[EmbeddingSpec | None, str, str, StoreError | None]:
    """The spec, or what is wrong; the error last where another version may be able to read the file."""
    path, seen = root / MANIFEST, True
    try:
        mode = path.lstat().st_mode
    except OSError:
        mode, seen = stat.S_IFREG, False  # what is wrong is told by reading it
    if stat.S_ISLNK(mode):
        return None, "link", f"a link to {os.readlink(path)} stands in for the store's description", None
    if not stat.S_ISREG(mode):
        told = "something else than a plain file stands in for the store's description"
        return None, "manifest-damaged", told, None
    try:
        spec = require_manifest(root)
        if _is_as_written(path):
            return spec, "", "", None
        return (
            spec,
            "manifest-damaged",
            "the store's description is not byte for byte as it was written",
            None,
        )
    except StoreDamaged as error:
        kind = "manifest-damaged" if path.exists() else "manifest-missing"
        return None, kind, error.found, None
    except StoreError as error:
        if isinstance(error.__cause__, OSError):
            raise
        if not path.exists():
            if seen:  # another repair has moved it aside since
                return _read(root)
            raise
        # Damage to the version or to a field's name looks like this too: then the records tell.
        return None, "manifest-damaged", error.found, error


def _is_as_written(path: Path) -> bool:
    """Whether no blank is changed; of any minor version."""
    try:
        data = read_plain(path)
        return data == json.dumps(json.loads(data), indent=2, ensure_ascii=False).encode() + b"\n"
    except (OSError, ValueError):
        return True  # it was read a moment ago: another repair is at work


def _fingerprint(root: Path, spec: EmbeddingSpec | None) -> tuple[str | None, str]:
    """The one fingerprint of all newest records, or None and why there is none.

    Damaged records have no say. A single record of the description's own fingerprint clears it.
    """
    found: Counter[str] = Counter()
    example: dict[str, str] = {}
    for name in case_folders(root) if is_folder(root / CASES) else []:
        folder = root / CASES / name
        if not is_folder(folder):
            continue
        try:
            listing = list_folder(folder)
            if listing.highest is None:
                continue
            record = read_entry(listing.records[listing.highest], listing.highest, None)
        except StoreDamaged:
            continue
        except (StoreError, OSError) as error:
            told = error.found if isinstance(error, StoreError) else f"cannot be read ({error.strerror})"
            return None, f"the newest record of case {plain_id(name) or name}: {told}"
        if spec is not None and record.fingerprint == spec.fingerprint:
            return record.fingerprint, ""
        found[record.fingerprint] += 1
        example.setdefault(record.fingerprint, record.case_id)
    if not found:
        return None, "no case has a newest record that can be read"
    if len(found) > 1:
        told = ", ".join(f"{f} ({n:,}, such as case {example[f]})" for f, n in found.most_common(3))
        return None, f"the newest records have different fingerprints: {told}"
    return next(iter(found)), ""


def _spec_of_parts(
    root: Path, fingerprint: str, other: EmbeddingSpec | None
) -> tuple[EmbeddingSpec | None, int]:
    """The spec with this fingerprint and how many parts hold it; none if a part holds the other one."""
    spec, count = None, 0
    for name in case_folders(root):
        folder = root / CASES / name
        for found in _specs(folder) if is_folder(folder) else ():
            if other is not None and found.fingerprint == other.fingerprint:
                return None, 0
            if found.fingerprint == fingerprint:
                spec, count = found, count + 1
    return spec, count


def _specs(folder: Path) -> Iterator[EmbeddingSpec]:
    for entry in list_folder(folder).parts.values():
        try:
            if entry.is_file(follow_symlinks=False):
                path = Path(entry.path)
                yield EmbeddingSpec.from_json(json.loads(_root_attribute(path, "spec")), entry.path)
        except Exception:
            # Of damaged bytes the libraries below raise whatever they stumble over; another part will do.
            continue


def _root_attribute(path: Path, name: str) -> str:
    """A text among the attributes of a part's root; raises anything where there is none."""
    if path.name.endswith(hdf5.SUFFIX):
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get_id(name).shape != ():
                raise ValueError("no single text")
            value: Any = file.attrs[name]
    elif path.name.endswith(zarr_zip.SUFFIX):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            root = StoredZip(handle, os.fstat(handle).st_size).read("zarr.json")
        finally:
            os.close(handle)
        value = json.loads(root)["attributes"][name]
    else:
        raise ValueError("a file format that is not known")
    return str(value)
