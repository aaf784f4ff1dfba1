"""The store's contract, on one screen.

::

    STORE/
      featstore.json               format version, EmbeddingSpec, fingerprint; written once
      cases/<case>/<NNNNNN>.json   commit records; the highest one *is* the case
      cases/<case>/<unique>.h5     parts: embeddings, never changed after they are written;
                  or .zarr.zip     HDF5 or Zarr v3, in one store also both (Zarr since 1.1)
      quarantine/                  damaged files, moved here by `repair`

* A part is written whole under a name nobody else chooses, then fsynced. Nothing sees it yet.
* A commit is the record ``<highest + 1>.json``, published by an exclusive ``link(2)``. It lists
  every live part with size, sha256 and, for every slice in it, the patches that are live.
  A part, a slice or a row that the highest record does not list does not exist.
* If the name is taken, another writer came first: read its record, merge, try the next number.
* Deleting and superseding are next records. Nothing is ever edited in place.
* Within a case each (stain, slice, patch) is live in exactly one part.
* A row is done exactly when the highest record lists it, its part has the recorded size, and
  the fingerprint is the store's. That a file exists means nothing.

In a part, under ``/<stain>/<slice>/`` (ids as `ids.component` writes them; the true ids are
attributes), N rows in ascending patch number, every chunk checksummed (fletcher32, CRC-32C):

    features      (N, D) float16|float32   the plain view
    views         (N, V−1, D) likewise     augmented views, where the store has any (since 1.3)
    patch         (N,)   int64             patch numbers
    quality       (N, 8) float32           columns named in its attribute ``columns``
    geometry      (N, 8) float64           x0, y0, …, x3, y3 in level-0 pixels; where known
    coords        (N, 2) float64           x, y as an imported file has them; where there (since 1.2)
    source_name   (N,)   bytes             path below the patches folder, UTF-8
    source_stat   (N, 2) int64             size in bytes, modification time in ns
    source_sha256 (N, 32) uint8            of the file's bytes
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreDamaged, StoreError
from featstore.quality import QUALITY_COLUMNS
from featstore.spec import EmbeddingSpec
from featstore.store.ranges import decode_ranges

T = TypeVar("T")

FORMAT = "featstore"
# Readers accept any minor version of their major version (it may add fields and columns, which
# they pass over), and refuse other major versions.
VERSION = (1, 3)
MANIFEST = "featstore.json"
CASES = "cases"
PART_NAME = re.compile(r"[0-9a-f]{32}(\.[a-z0-9]+)+")
QUARANTINE = "quarantine"

COLUMNS: dict[str, str] = {
    "features": "the plain view",
    "views": "augmented views",
    "patch": "patch number",
    "quality": "width, height, mean colour, entropy, tissue fraction, sharpness",
    "geometry": "corners in level-0 pixels",
    "coords": "x, y as an imported file has them",
    "source_name": "path below the patches folder",
    "source_stat": "size in bytes, modification time in ns",
    "source_sha256": "digest of the file's bytes",
}
OPTIONAL_COLUMNS = ("views", "geometry", "coords")
# Per column but `features` and `views`: dtype (None: any byte string) and the shape of a row.
ROWS: dict[str, tuple[type | None, tuple[int, ...]]] = {
    "patch": (np.int64, ()),
    "quality": (np.float32, (len(QUALITY_COLUMNS),)),
    "geometry": (np.float64, (8,)),
    "coords": (np.float64, (2,)),
    "source_name": (None, ()),
    "source_stat": (np.int64, (2,)),
    "source_sha256": (np.uint8, (32,)),
}
GEOMETRY_COLUMNS = ("x0", "y0", "x1", "y1", "x2", "y2", "x3", "y3")
COORDS_COLUMNS = ("coord_x", "coord_y")


@dataclass(frozen=True)
class Slice:
    """Rows of one slice on their way into a part, or out of one.

    Attributes:
        stain: Stain name.
        slice_id: Slice id.
        columns: Arrays of N rows by the names of `COLUMNS`, ascending in ``patch``.
    """

    stain: str
    slice_id: str
    columns: dict[str, NDArray[Any]]

    @property
    def patch(self) -> NDArray[np.int64]:
        """(N,) patch numbers, ascending."""
        return self.columns["patch"]


@dataclass(frozen=True)
class Group:
    """One slice in one part, as a record lists it: ``rows`` in the file, ``live`` ones as ranges."""

    stain: str
    slice_id: str
    rows: int
    live: str

    def patches(self, where: str) -> NDArray[np.int64]:
        """(n,) live patch numbers, ascending."""
        return decode_ranges(self.live, self.rows, where)


@dataclass(frozen=True)
class Part:
    """One part file, as a record lists it."""

    name: str
    size: int
    sha256: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Record:
    """The whole live state of one case."""

    case_id: str
    sequence: int
    fingerprint: str
    created: str
    writer: str
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The record's file name."""
        return record_name(self.sequence)


def record_name(sequence: int) -> str:
    """``000001.json`` for 1."""
    return f"{sequence:06d}.json"


def record_sequence(name: str) -> int | None:
    """The number in a record's file name; None for any other file."""
    stem, dot, suffix = name.partition(".")
    if suffix != "json" or not dot or not stem.isascii() or not stem.isdigit() or len(stem) < 6:
        return None
    return int(stem)


def encode_record(record: Record) -> bytes:
    """A record as JSON that carries its own sha256."""
    body = {"format": [FORMAT, *VERSION], **asdict(record)}
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "sha256": digest}) + b"\n"


def decode_record(data: bytes, where: str) -> Record:
    """The inverse of `encode_record`.

    Raises:
        StoreDamaged: The bytes are not what was written.
        StoreError: The record is of another major version of the format.
    """
    damaged = StoreDamaged(
        "a commit record is not what was written (its sha256 does not match)",
        where=where,
        fix="restore this file from a backup; or `featstore repair --apply`, then `featstore extract` "
        "(or `import`) anew",
    )
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        if not isinstance(digest, str) or data != _canonical({**body, "sha256": digest}) + b"\n":
            raise damaged
        if hashlib.sha256(_canonical(body)).hexdigest() != digest:
            raise damaged
        check_version(body.pop("format"), where)
        parts = tuple(
            Part(p["name"], p["size"], p["sha256"], tuple(_known(Group, g) for g in p["groups"]))
            for p in body["parts"]
        )
        record = _known(Record, {**body, "parts": parts})
        if not all(_plausible(part) for part in parts):
            raise damaged
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error


def encode_manifest(spec: EmbeddingSpec) -> bytes:
    """``featstore.json``: readable by a person, checked by its fingerprint."""
    body = {"format": [FORMAT, *VERSION], "fingerprint": spec.fingerprint, "spec": spec.to_json()}
    return json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n"


def decode_manifest(data: bytes, where: str) -> EmbeddingSpec:
    """The inverse of `encode_manifest`.

    Raises:
        StoreDamaged: The bytes are not what was written.
        StoreError: Another major version of the format.
    """
    try:
        body = json.loads(data)
        check_version(body["format"], where)
        spec = EmbeddingSpec.from_json(body["spec"], where)
        if spec.fingerprint == body["fingerprint"]:
            return spec
    except (ValueError, KeyError, TypeError):
        pass
    raise StoreDamaged(
        "the store's description is not what was written (its fingerprint does not match)",
        where=where,
        fix="`featstore repair --apply` makes it anew from the parts; or restore this file from a backup",
    )


def check_version(found: Any, where: str) -> None:
    """Refuse other formats and other major versions.

    Raises:
        StoreError: ``found`` is not ``[FORMAT, major, minor]`` with this reader's major version.
    """
    if not (isinstance(found, list) and len(found) == 3 and found[:2] == [FORMAT, VERSION[0]]):
        raise StoreError(
            f"the format is {found}",
            expected=f"{FORMAT} {VERSION[0]}.x",
            where=where,
            fix="read it with the featstore version that wrote it",
        )


def _plausible(part: Part) -> bool:
    """Whether a part's entry can be acted on: a bare file name, and sizes that are sizes."""
    counts = [part.size, *(group.rows for group in part.groups)]
    sizes = all(type(count) is int and count >= 0 for count in counts)
    return sizes and PART_NAME.fullmatch(part.name) is not None


def _known(kind: type[T], body: dict[str, Any]) -> T:
    """A dataclass from its own fields; those of later minor versions are passed over."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in body.items() if name in names})


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
