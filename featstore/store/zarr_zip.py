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

from featstore.errors import StoreDamaged
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


class PartReader:
    """Reads the slices of one open Zarr part; use `open_part`."""

    def __init__(self, archive: StoredZip, path: Path) -> None:
        self._archive = archive
        self._path = path

    def columns(self, stain: str, slice_id: str) -> list[str]:
        """The names of the columns that a slice has here."""
        name = self._slice(stain, slice_id)
        return [column for column in COLUMNS if f"{name}/{column}/zarr.json" in self._archive.entries]

    def read(
        self, stain: str, slice_id: str, name: str, rows: int, into: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """All rows of one column of one slice.

        Args:
            stain: Stain name.
            slice_id: Slice id.
            name: One of `format.COLUMNS`.
            rows: The number of rows that the record promises.
            into: Array of the right shape and dtype to read into.

        Returns:
            (rows, …) array; ``into`` if it was given.

        Raises:
            StoreDamaged: The column or a chunk of it is missing, has another shape, or fails its
                checksum.
        """
        key = f"{self._slice(stain, slice_id)}/{name}"
        if f"{key}/zarr.json" not in self._archive.entries:
            raise self._damaged(f"no column {name!r} in {stain}/{slice_id}")
        try:
            array = self._array(key)
            shape, dtype = array.as_numpy()
            expected = (rows, *shape[1:]) if into is None else into.shape
            if shape != expected or (into is not None and dtype != into.dtype):
                raise self._damaged(
                    f"{stain}/{slice_id}/{name} has the shape {shape} of {dtype}",
                    expected=f"{expected}" + ("" if into is None else f" of {into.dtype}"),
                )
            if into is not None and into.flags.c_contiguous:
                self._fill(key, array, into)
                return into
            result: NDArray[Any] = np.empty(shape, dtype)
            self._fill(key, array, result)
        except KeyError as error:
            raise self._damaged(f"{stain}/{slice_id}/{name} lacks a chunk ({error})") from error
        except (OSError, ValueError) as error:
            raise self._damaged(f"{stain}/{slice_id}/{name} is not what was written: {error}") from error
        if into is None:
            return result
        into[...] = result
        return into

    def _array(self, key: str) -> _Array:
        """An array's metadata, when all its chunks are there and as large as they must be.

        To Zarr a missing chunk is one of fill values. And memory is taken only for what is there.
        """
        array = _Array.from_json(self._archive.read(f"{key}/zarr.json"))
        for chunk in array.chunk_names(key):
            if self._archive.entries[chunk].size != array.chunk_bytes + _CRC_BYTES:
                raise ValueError(f"{chunk} has another size than its metadata say")
        return array

    def _fill(self, key: str, array: _Array, into: NDArray[Any]) -> None:
        """Read an array's chunks into a C-contiguous one, and hold each against its CRC-32C."""
        flat, size = into.reshape(-1).view(np.uint8), array.chunk_bytes
        crc = np.empty(_CRC_BYTES, np.uint8)
        for i, chunk in enumerate(array.chunk_names(key)):
            rows = flat[i * size : (i + 1) * size]
            padding = np.empty(size - len(rows), np.uint8)
            self._archive.read_into(chunk, [rows, padding, crc])
            if _crc([rows, padding]) != crc.tobytes():
                raise ValueError(f"{chunk} fails its checksum")

    def _slice(self, stain: str, slice_id: str) -> str:
        name = _slice_name(stain, slice_id)
        if f"{name}/zarr.json" not in self._archive.entries:
            raise self._damaged(f"no readable slice {stain}/{slice_id} in this part")
        return name

    def _damaged(self, found: str, expected: str = "") -> StoreDamaged:
        return damaged(self._path, found, expected)


@contextmanager
def open_part(path: Path, size: int) -> Iterator[PartReader]:
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
        yield PartReader(archive, path)
