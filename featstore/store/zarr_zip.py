"""Parts as Zarr v3 in one stored zip: `encode` makes the bytes, `open_part` reads them back.

Neither needs the zarr package, which takes a millisecond to open an array: the layout is the one
that it writes, and the metadata of an array is refused unless it is what `encode` would write.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from featstore.quality import QUALITY_COLUMNS
from featstore.store.damage import damaged, opening
from featstore.store.format import COLUMNS, Slice
from featstore.store.ids import component
from featstore.store.stored_zip import Bytes, StoredZip
from featstore.store.stored_zip import encode as encode_zip

SUFFIX = ".zarr.zip"
_CHUNK_BYTES = 1 << 20
_CRC_BYTES = 4
_DTYPES = ("uint8", "int64", "float16", "float32", "float64")
# Zarr v3 has no byte strings of fixed width in its specification, so they are stored as (N, width)
# bytes, padded with zeros, and told by this attribute.
_STRINGS = {"strings": "bytes, padded with zeros"}


@dataclass(frozen=True)
class _Array:
    """What the metadata of an array say: its regular grid runs along the rows alone."""

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    def chunk_names(self, name: str) -> Iterator[str]:
        """The entries that hold the chunks of the array of this name, in order."""
        zeros = "/0" * (len(self.shape) - 1)
        return (f"{name}/c/{i}{zeros}" for i in range(-(-self.shape[0] // self.chunk_rows)))

    def as_numpy(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of the array that was written."""
        if len(self.shape) == 2 and self.attributes.items() >= _STRINGS.items():
            return self.shape[:1], np.dtype(f"S{self.shape[1]}")
        return self.shape, np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> bytes:
        """As the zarr package writes it: chunks as they are, followed by their CRC-32C."""
        floating = self.dtype.startswith("float")
        endian = {} if self.dtype == "uint8" else {"configuration": {"endian": "little"}}
        return _json(
            {
                "shape": self.shape,
                "data_type": self.dtype,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": (self.chunk_rows, *self.shape[1:])},
                },
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": 0.0 if floating else 0,
                "codecs": [{"name": "bytes", **endian}, {"name": "crc32c"}],
                "attributes": self.attributes,
                "zarr_format": 3,
                "node_type": "array",
                "storage_transformers": [],
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> _Array:
        """The inverse of `to_json`.

        Raises:
            ValueError: These are not metadata that `to_json` writes: another codec, grid, dtype, …
        """
        try:
            body = json.loads(data)
            chunk = body["chunk_grid"]["configuration"]["chunk_shape"]
            found = cls(tuple(body["shape"]), body["data_type"], chunk[0], body["attributes"])
            plausible = found.dtype in _DTYPES and all(
                type(count) is int and count > 0 for count in (found.chunk_rows, *found.shape)
            )
            if plausible and found.shape and type(found.attributes) is dict and found.to_json() == data:
                return found
        except (KeyError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(f"its metadata lack {error}") from error
        raise ValueError("its metadata are not those that featstore writes")


def encode(slices: Sequence[Slice], attributes: Mapping[str, str | int]) -> bytes:
    """A part as the bytes of a zip file; equal parts give equal bytes.

    Args:
        slices: What the part holds; every slice once.
        attributes: Written to the root: case id, fingerprint, provenance.
    """
    return encode_zip(_files(slices, attributes))


def _files(
    slices: Sequence[Slice], attributes: Mapping[str, str | int]
) -> Iterator[tuple[str, list[Bytes]]]:
    yield "zarr.json", _group(dict(attributes))
    stains: set[str] = set()
    for item in slices:
        stain = _node(item.stain)
        if stain not in stains:
            stains.add(stain)
            yield f"{stain}/zarr.json", _group({})
        name = _slice_name(item.stain, item.slice_id)
        yield f"{name}/zarr.json", _group({"stain": item.stain, "slice_id": item.slice_id})
        for column, array in item.columns.items():
            extra = {"columns": ",".join(QUALITY_COLUMNS)} if column == "quality" else {}
            yield from _array_files(f"{name}/{column}", array, extra)


def _array_files(
    name: str, array: NDArray[Any], attributes: dict[str, Any]
) -> Iterator[tuple[str, list[Bytes]]]:
    if array.dtype.kind == "S":
        array = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)
        attributes = attributes | _STRINGS
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    layout = _Array(array.shape, array.dtype.name, 1, attributes)
    # Zarr pads the last chunk to full size: chunks of equal size leave it less to pad.
    count = -(-len(array) // max(1, _CHUNK_BYTES // layout.row_bytes))
    layout = replace(layout, chunk_rows=-(-len(array) // count))
    yield f"{name}/zarr.json", [np.frombuffer(layout.to_json(), np.uint8)]
    flat = array.reshape(-1).view(np.uint8)
    for i, chunk_name in enumerate(layout.chunk_names(name)):
        chunk = flat[i * layout.chunk_bytes : (i + 1) * layout.chunk_bytes]
        padding = np.zeros(layout.chunk_bytes - len(chunk), np.uint8)
        yield chunk_name, [chunk, padding, np.frombuffer(_crc([chunk, padding]), np.uint8)]


def _group(attributes: dict[str, Any]) -> list[Bytes]:
    body = _json({"attributes": attributes, "zarr_format": 3, "node_type": "group"})
    return [np.frombuffer(body, np.uint8)]


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode("ascii")


def _crc(pieces: Sequence[Bytes]) -> bytes:
    crc = 0
    for piece in pieces:
        crc = google_crc32c.extend(crc, piece)
    return crc.to_bytes(_CRC_BYTES, "little")


def _node(text: str) -> str:
    """`component`, but for the names that Zarr keeps for itself."""
    name = component(text)
    reserved = name.startswith("__") or name == "zarr.json"
    return f"%{ord(name[0]):02X}{name[1:]}" if reserved else name


def _slice_name(stain: str, slice_id: str) -> str:
    return f"{_node(stain)}/{_node(slice_id)}"


class Column:
    """One array; `featstore.store.parts.Column` says what it promises."""

    def __init__(self, archive: StoredZip, key: str, path: Path, where: str) -> None:
        self._archive, self._path, self._where = archive, path, where
        with self._telling():
            self._array = _Array.from_json(archive.read(f"{key}/zarr.json"))
            self._chunks: list[str] = []
            # To Zarr a missing chunk is one of fill values. And memory is taken only for what is there.
            for chunk in self._array.chunk_names(key):
                if archive.entries[chunk].size != self._array.chunk_bytes + _CRC_BYTES:
                    raise ValueError(f"{chunk} has another size than its metadata say")
                self._chunks.append(chunk)
        self.shape, self.dtype = self._array.as_numpy()

    def read(self, into: NDArray[Any]) -> None:
        """All rows, into a C-contiguous array of this shape and dtype."""
        rows = self._array.chunk_rows
        for number in range(len(self._chunks)):
            self.read_chunk(number, into[number * rows : (number + 1) * rows])

    def chunks(self) -> tuple[int, NDArray[np.int64]]:
        """Rows a chunk, and the byte of the file where each chunk starts."""
        starts = [self._archive.start(chunk) for chunk in self._chunks]
        return self._array.chunk_rows, np.array(starts, np.int64)

    def read_chunk(self, number: int, into: NDArray[Any]) -> None:
        """The rows of one chunk, held against its CRC-32C."""
        chunk, rows = self._chunks[number], into.reshape(-1).view(np.uint8)
        padding, crc = (
            np.empty(self._array.chunk_bytes - len(rows), np.uint8),
            np.empty(_CRC_BYTES, np.uint8),
        )
        with self._telling():
            self._archive.read_into(chunk, [rows, padding, crc])
            if _crc([rows, padding]) != crc.tobytes():
                raise ValueError(f"{chunk} fails its checksum")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise damaged(self._path, f"{self._where} lacks a chunk ({error})") from error
        except (OSError, ValueError) as error:
            raise damaged(self._path, f"{self._where} is not what was written: {error}") from error


class Reader:
    """The slices of one open Zarr part; use `open_part`."""

    def __init__(self, archive: StoredZip, path: Path) -> None:
        self._archive = archive
        self._path = path

    def columns(self, stain: str, slice_id: str) -> list[str]:
        """The names of the columns that a slice has here."""
        name = self._slice(stain, slice_id)
        return [column for column in COLUMNS if f"{name}/{column}/zarr.json" in self._archive.entries]

    def column(self, stain: str, slice_id: str, name: str) -> Column:
        """One column of one slice.

        Raises:
            StoreDamaged: It is missing or lacks a chunk, or its metadata are not those of `encode`.
        """
        key = f"{self._slice(stain, slice_id)}/{name}"
        if f"{key}/zarr.json" not in self._archive.entries:
            raise damaged(self._path, f"no column {name!r} in {stain}/{slice_id}")
        return Column(self._archive, key, self._path, f"{stain}/{slice_id}/{name}")

    def _slice(self, stain: str, slice_id: str) -> str:
        name = _slice_name(stain, slice_id)
        if f"{name}/zarr.json" not in self._archive.entries:
            raise damaged(self._path, f"no readable slice {stain}/{slice_id} in this part")
        return name


@contextmanager
def open_part(path: Path, size: int) -> Iterator[Reader]:
    """Open a part for reading.

    Args:
        path: The part file.
        size: The number of bytes that the record promises.

    Raises:
        StoreDamaged: The file is missing, has another size, or is no zip as `encode` writes them.
        StoreError: The file may not be read.
    """
    with ExitStack() as stack:
        with opening(path, size, "Zarr"):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            archive = StoredZip(handle, size)
        yield Reader(archive, path)
