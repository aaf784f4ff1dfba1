"""Zip files of one shape only: entries stored as they are, one after the other, nothing else.

Such a file follows from its entries' names and contents, to the last bit. So a reader needs to
trust nothing: it takes names, sizes and CRCs from the directory, makes of them the directory and
the local headers that `encode` writes, and refuses a file that has others. Compressed, encrypted,
overlapping or prefixed zips all fail this one comparison. The zip's comment is the CRC-32 of its
directory: without it a damaged name would make an optional file look as if it had never been there.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_OFFSET64 = struct.Struct("<2HQ")
_COMMENT = b"directory CRC-32 %08x"
_COMMENT_BYTES = len(_COMMENT % 0)
# From these on, the numbers stand in the Zip64 records instead.
_MANY, _FAR = 0xFFFF, 0xFFFFFFFF
# Zip 2.0 made by Unix; Zip64 asks for 4.5. The date is the earliest there is: equal parts, equal bytes.
_NEEDS, _NEEDS64, _UNIX, _DATE, _MODE = 20, 45, 3 << 8, 1 << 5 | 1, 0o100644 << 16
# What `ids.component` writes, in relative paths without "." and "..".
_NAME = re.compile(r"(?!\.)[A-Za-z0-9%&~_.-]+(/(?!\.)[A-Za-z0-9%&~_.-]+)*")


class Entry(NamedTuple):
    """One file in a zip: where its local header starts, the size and CRC-32 of its contents."""

    offset: int
    size: int
    crc: int


def encode(files: Iterable[tuple[str, Sequence[Bytes]]]) -> bytes:
    """A zip file as bytes.

    Args:
        files: By name, the contents in pieces: (n,) uint8 arrays.

    Raises:
        ValueError: Two files have the same name.
    """
    pieces: list[bytes | memoryview] = []
    entries: dict[str, Entry] = {}
    at = 0
    for name, contents in files:
        if name in entries:
            raise ValueError(f"two files of the name {name}")
        crc = 0
        for piece in contents:
            crc = zlib.crc32(piece.data, crc)
        entry = entries[name] = Entry(at, sum(map(len, contents)), crc)
        header = _local(name, entry)
        pieces += [header, *(piece.data for piece in contents)]
        at += len(header) + entry.size
    pieces.append(_directory(entries, at))
    return b"".join(pieces)


def _local(name: str, entry: Entry) -> bytes:
    raw = name.encode("ascii")
    numbers = (_NEEDS, 0, 0, 0, _DATE, entry.crc, entry.size, entry.size, len(raw), 0)
    return _LOCAL.pack(b"PK\3\4", *numbers) + raw


def _directory(entries: dict[str, Entry], start: int) -> bytes:
    """Everything behind the contents, which end at ``start``."""
    rows = []
    for name, (offset, size, crc) in entries.items():
        raw, extra, near, needs = name.encode("ascii"), b"", offset, _NEEDS
        if offset >= _FAR:
            extra, near, needs = _OFFSET64.pack(1, 8, offset), _FAR, _NEEDS64
        numbers = (_UNIX | needs, needs, 0, 0, 0, _DATE, crc, size, size)
        lengths = (len(raw), len(extra), 0, 0, 0)
        rows.append(_CENTRAL.pack(b"PK\1\2", *numbers, *lengths, _MODE, near) + raw + extra)
    body, count = b"".join(rows), len(rows)
    size, comment = len(body), _COMMENT % zlib.crc32(body)
    if count >= _MANY or start + size >= _FAR:
        rows64 = (_END64.size - 12, _UNIX | _NEEDS64, _NEEDS64, 0, 0, count, count, size, start)
        body += _END64.pack(b"PK\6\6", *rows64) + _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
        count, size, start = _MANY, _FAR, _FAR
    return body + _END.pack(b"PK\5\6", 0, 0, count, count, size, start, len(comment)) + comment


class StoredZip:
    """Reads one open file that `encode` has made.

    Args:
        handle: The file's descriptor; left open.
        size: Its size in bytes.

    Raises:
        ValueError: The file is no such zip.
        OSError: The file cannot be read.
    """

    def __init__(self, handle: int, size: int) -> None:
        self._handle = handle
        self.entries = self._entries(size)

    def _entries(self, size: int) -> dict[str, Entry]:
        length = min(size, _END64.size + _LOCATOR.size + _END.size + _COMMENT_BYTES)
        tail = self._bytes(size - length, length)
        end_at = length - _END.size - _COMMENT_BYTES
        if end_at < 0:
            raise ValueError("too short for a zip")
        start: int = _END.unpack_from(tail, end_at)[6]
        if tail[:4] == b"PK\6\6" and end_at == _END64.size + _LOCATOR.size:
            start = _END64.unpack_from(tail)[-1]
        if start >= size:
            raise ValueError("its directory is outside the file")
        directory = self._bytes(start, size - start)
        entries: dict[str, Entry] = {}
        at = end = 0
        while end < start:
            if directory[at : at + 4] != b"PK\1\2" or at + _CENTRAL.size > len(directory):
                raise ValueError("its directory does not list all of it")
            crc, stored, _, length, extra = struct.unpack_from("<3I2H", directory, at + 16)
            at += _CENTRAL.size
            name = directory[at : at + length].decode("latin-1")
            if name in entries or not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} is there twice, or leads elsewhere")
            entries[name] = Entry(end, stored, crc)
            at += length + extra
            end += _LOCAL.size + length + stored
        if end != start or _directory(entries, start) != directory:
            raise ValueError("its directory is not one that featstore writes")
        return entries

    def read(self, name: str) -> bytes:
        """The contents of an entry, held against their CRC-32.

        Raises:
            KeyError: There is no such entry.
            ValueError: The contents are not those that the directory lists.
            OSError: The file cannot be read.
        """
        contents = np.empty(self.entries[name].size, np.uint8)
        self.read_into(name, [contents])
        if zlib.crc32(contents.data) != self.entries[name].crc:
            raise ValueError(f"{name} fails its checksum")
        return contents.tobytes()

    def start(self, name: str) -> int:
        """The byte of the file where the contents of an entry start."""
        return self.entries[name].offset + _LOCAL.size + len(name)  # names are ASCII

    def read_into(self, name: str, buffers: Sequence[Bytes]) -> None:
        """Fill buffers with the contents of an entry, which are *not* held against their CRC-32.

        Args:
            name: The entry.
            buffers: (n,) uint8 arrays, together as long as the entry.

        Raises:
            KeyError: There is no such entry.
            ValueError: The entry has another size or header than the directory says.
            OSError: The file cannot be read.
        """
        entry = self.entries[name]
        wanted = sum(map(len, buffers))
        if wanted != entry.size:
            raise ValueError(f"{name} has {entry.size} bytes, not {wanted}")
        header = _local(name, entry)
        found = bytearray(len(header))
        # One call for the header and for all buffers: they lie one after the other.
        self._fill([memoryview(found), *(buffer.data for buffer in buffers)], entry.offset)
        if found != header:
            raise ValueError(f"the header of {name} is not that of the directory")

    def _bytes(self, at: int, size: int) -> bytes:
        contents = bytearray(size)
        self._fill([memoryview(contents)], at)
        return bytes(contents)

    def _fill(self, views: list[memoryview], at: int) -> None:
        views = [view for view in views if len(view)]
        while views:
            count = os.preadv(self._handle, views, at)
            if count == 0:
                raise ValueError("the file ends early")
            at += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
