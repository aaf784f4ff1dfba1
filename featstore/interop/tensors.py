"""Tensors in .pt files, read without running what they hold; thousands of small ones a second."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.interop.source import ImportProblem

_DTYPES = {
    "float16", "bfloat16", "float32", "float64",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
}  # fmt: skip

# Of a zip: what ends it, an entry of its directory, and the fixed part of an entry's own header.
_END, _CENTRAL, _LOCAL_BYTES = struct.Struct("<4s4H2IH"), struct.Struct("<4s6H3I5H2I"), 30


def tensor_shape(path: Path) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the one tensor in a .pt file; its data stay on disk.

    Raises:
        ImportProblem: The file holds something else, or cannot be read.
    """
    found = _load(path, path, path.stat().st_size, mapped=zipfile.is_zipfile(path))
    return tuple(found.shape), _name(found)


def read_tensor(path: Path) -> NDArray[Any]:
    """The one tensor in a .pt file; bfloat16, which NumPy lacks, as float32.

    Raises:
        ImportProblem: The file holds something else, or cannot be read.
    """
    return _as_numpy(_load(path, path, path.stat().st_size))


def _load(file: Any, path: Path, size: int, mapped: bool = False) -> Any:
    """The tensor in a file of ``size`` bytes."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # weights_only: a pickle could otherwise run any code.
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what torch raises depends on where the bytes stop making sense
        # torch's own words for a refused pickle advise to run it all the same.
        refused = "weights_only" in str(error) or "Weights only" in str(error)
        reason = "it holds more than a tensor" if refused else str(error).partition("\n")[0][:200]
        raise _problem(path, f"the file cannot be read as a tensor ({reason})") from error
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
        raise _problem(path, f"the file holds a {type(found).__name__}")
    if _name(found) not in _DTYPES or found.device.type != "cpu":
        raise _problem(path, f"the file holds a tensor of {found.dtype} on {found.device}")
    if found.numel() * found.element_size() > size:
        # torch takes any shape a pickle names, and makes room for it.
        raise _problem(path, f"a tensor of the shape {tuple(found.shape)} in a file of {size:,} bytes")
    return found.detach()


def _name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _as_numpy(tensor: Any) -> NDArray[Any]:
    import torch

    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    found: NDArray[Any] = wide.numpy()
    return found


def _problem(path: Path, found: str) -> ImportProblem:
    return ImportProblem(
        found,
        expected="one plain tensor of numbers, as torch.save writes it",
        where=str(path),
        fix="save it again as a tensor, or leave it out with --on-bad skip",
    )


@dataclass
class SmallTensors:
    """Reads many small files that differ in nothing but their numbers.

    A .pt file is a zip: a pickle that says what the tensor is, and its bytes. Of thousands of files
    with the very same pickle only the first goes through `torch.load`; it must show that the tensor
    is exactly those bytes, in order. That is several times as fast, and the zip's CRCs are checked,
    which torch does not do.
    """

    _known: dict[bytes, tuple[np.dtype[Any], tuple[int, ...], int]] = field(default_factory=dict)

    def read(self, data: bytes, path: Path) -> NDArray[Any]:
        """The tensor in a file.

        Args:
            data: The file's bytes.
            path: For messages.

        Raises:
            ImportProblem: They hold something else than one tensor, or are damaged.
        """
        if not data.startswith(b"PK"):
            return _as_numpy(_load(io.BytesIO(data), path, len(data)))  # written before torch 1.6
        try:
            members = _plain_members(data) or _members(data)
        except Exception as error:  # a zip that makes no sense may raise anything
            raise _problem(path, f"the file cannot be read as a tensor ({error})") from error
        if members.keys() >= {"data.pkl", "data/0"}:
            order, content = members.get("byteorder", b"little"), members["data/0"]
            kind = members["data.pkl"] + order
            if kind in self._known:
                dtype, shape, size = self._known[kind]
                if len(content) == size:
                    return np.frombuffer(content, dtype).reshape(shape)
        tensor = _load(io.BytesIO(data), path, len(data))
        found = _as_numpy(tensor)
        if sum(name.startswith("data/") for name in members) == 1 and "data/0" in members:
            plain = tensor.is_contiguous() and tensor.storage_offset() == 0
            if plain and order == b"little" and found.tobytes() == content:
                self._known[kind] = (found.dtype.newbyteorder("<"), found.shape, len(content))
        return found


def _members(data: bytes) -> dict[str, bytes]:
    """The contents of a zip's entries by their names below its one folder, held against their CRCs.

    Raises:
        Exception: It is no zip, claims more than it has, or its contents are not those it lists.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        listed = archive.infolist()
        if any(entry.file_size > len(data) for entry in listed):
            raise ValueError("it claims more bytes than it has")
        found = {entry.filename.partition("/")[2]: archive.read(entry) for entry in listed}
    if len(found) < len(listed):
        raise ValueError("two entries have one name")
    return found


def _plain_members(data: bytes) -> dict[str, bytes] | None:
    """The same of a zip as `torch.save` writes it, six times as fast; None for any other zip.

    Raises:
        ValueError: Its contents are not those that it lists.
    """
    end = len(data) - _END.size
    if end < 0:
        return None
    magic, _, _, _, count, size, start, comment = _END.unpack_from(data, end)
    if magic != b"PK\5\6" or comment or start + size > end:
        return None
    found: dict[str, bytes] = {}
    at = start
    for _ in range(count):
        if at + _CENTRAL.size > start + size:
            return None
        fields = _CENTRAL.unpack_from(data, at)
        magic, _, _, flags, method, _, _, crc, packed, stored, length, extra, comment, *_, header = fields
        first = header + _LOCAL_BYTES
        if magic != b"PK\1\2" or flags & 1 or method or packed != stored or first > start:
            return None
        name = data[at + _CENTRAL.size : at + _CENTRAL.size + length]
        first += int.from_bytes(data[header + 26 : header + 28], "little")
        first += int.from_bytes(data[header + 28 : header + 30], "little")
        content = data[first : first + stored]
        if len(content) != stored or zlib.crc32(content) != crc:
            raise ValueError(f"bad CRC-32 of {name!r}")
        found[name.partition(b"/")[2].decode("latin-1")] = content
        at += _CENTRAL.size + length + extra + comment
    return found if at == start + size and len(found) == count else None
