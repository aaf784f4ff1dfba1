"""Small tensors are what torch.load says they are, however they were saved; damage is found."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import FeatstoreError
from featstore.interop import tensors
from featstore.interop.tensors import SmallTensors

HERE = Path("x.pt")
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)


def saved(tensor: Any, name: str = "archive", **how: Any) -> bytes:
    """What torch.save writes under a file name."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer, **how)
    return (
        buffer.getvalue().replace(b"archive/", name.encode() + b"/")
        if len(name) == 7
        else buffer.getvalue()
    )


def saved_as(folder: Path, name: str, tensor: Any) -> bytes:
    torch.save(tensor, folder / name)
    return (folder / name).read_bytes()


def wanted(data: bytes) -> np.ndarray:
    found = torch.load(io.BytesIO(data), weights_only=True)
    return (found.float() if found.dtype == torch.bfloat16 else found).detach().numpy()


def assert_read(reader: SmallTensors, data: bytes) -> None:
    found, right = reader.read(data, HERE), wanted(data)
    assert found.dtype == right.dtype
    assert found.shape == right.shape
    np.testing.assert_array_equal(found, right)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every call of torch.load."""
    calls: list[int] = []
    real = tensors._load
    monkeypatch.setattr(tensors, "_load", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_torch_reads_it_the_first_time_and_the_second(dtype: torch.dtype) -> None:
    reader = SmallTensors()
    for seed in range(3):
        values = torch.randint(-100, 100, (7,), generator=torch.Generator().manual_seed(seed))
        assert_read(reader, saved(values.to(dtype)))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x,
    "offset": lambda x: x[3:],
    "head": lambda x: x[:5],
    "strided": lambda x: x[::2],
    "turned": lambda x: x.reshape(3, 4).T,
    "column": lambda x: x.reshape(3, 4)[:, 1],
    "matrix": lambda x: x.reshape(3, 4),
    "scalar": lambda x: x[2],
    "none": lambda x: x[:0],
    "parameter": lambda x: torch.nn.Parameter(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_storage_are_read_as_what_they_show(view: str) -> None:
    reader = SmallTensors()
    for other in (view, "whole", view, "strided", view):
        for i in range(2):
            assert_read(reader, saved(VIEWS[other](torch.arange(12.0) + 100 * i)))


def test_vectors_that_share_a_storage_are_told_apart() -> None:
    reader, storage = SmallTensors(), torch.arange(12.0)
    for first in range(0, 12, 4):
        assert_read(reader, saved(storage[first : first + 4]))
    for first in range(0, 12, 4):
        assert_read(reader, saved(storage[first : first + 4].clone()))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from(["clone", "view", "turned", "step", "old"]),
            st.integers(0, 2**31),
        ),
        max_size=6,
    )
)
def test_any_row_of_tensors_is_read_as_torch_reads_it(cases: list[Any]) -> None:
    reader = SmallTensors()
    for dtype, shape, how, seed in cases:
        x = torch.randint(-50, 50, (5, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)
        made = {"clone": x, "view": x[2], "turned": x.transpose(0, -1), "step": x[::2], "old": x[1:]}[how]
        assert_read(reader, saved(made, _use_new_zipfile_serialization=how != "old"))


def test_files_of_any_name_are_of_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, calls = SmallTensors(), counted(monkeypatch)
    names = ["a.pt", "case_1_match_1_h&e_patch1.pt", f"{'long' * 50}.pt", "ä ö.pt", "a.b.c.pt", "noext"]
    for i, name in enumerate(names):
        data = saved_as(tmp_path, name, torch.full((9,), float(i)))
        assert reader.read(data, HERE).tolist() == [i] * 9
    assert len(calls) == 1


def test_only_the_first_of_each_kind_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, calls = SmallTensors(), counted(monkeypatch)
    for _ in range(3):
        reader.read(saved(torch.ones(4)), HERE)
        reader.read(saved(torch.ones(4, dtype=torch.float16)), HERE)
        reader.read(saved(torch.ones(5)), HERE)
    assert len(calls) == 3
    for _ in range(3):  # these never become a known kind: the bytes are not the tensor
        reader.read(saved(torch.ones(9)[2:6]), HERE)
    assert len(calls) == 6


def rewritten(data: bytes, change: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    """The same zip with other contents, without torch's alignment."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", packing) as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(entry.filename, change.get(name, old.read(entry)))
    return out.getvalue()


def test_bytes_of_a_big_endian_machine_are_turned_round() -> None:
    reader, values = SmallTensors(), np.arange(5, dtype="f4")
    little = saved(torch.from_numpy(values))
    turned = {"byteorder": b"big", "data/0": values.astype(">f4").tobytes()}
    for data in (little, rewritten(little, turned), little, rewritten(little, turned)):
        np.testing.assert_array_equal(reader.read(data, HERE), values)


def test_every_flipped_bit_of_the_numbers_is_found() -> None:
    reader = SmallTensors()
    values = np.arange(64, dtype=np.float16)
    data = saved(torch.from_numpy(values))
    reader.read(data, HERE)
    at = data.index(values.tobytes())
    for place in range(at, at + values.nbytes, 3):
        bad = bytearray(data)
        bad[place] ^= 1 << place % 8
        with pytest.raises(FeatstoreError, match="CRC") as error:
            reader.read(bytes(bad), Path("folder/bad.pt"))
        assert error.value.where == "folder/bad.pt"


@pytest.mark.parametrize("known", [False, True])
def test_any_flipped_bit_and_any_cut_is_an_error_or_does_no_harm(known: bool) -> None:
    values = np.arange(8, dtype=np.float32)
    data = saved(torch.from_numpy(values))
    for place in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        for damaged in (bytes(flipped), data[:place]):
            reader = SmallTensors()
            if known:
                reader.read(data, HERE)
            try:
                found = reader.read(damaged, HERE)
            except FeatstoreError:
                continue
            np.testing.assert_array_equal(found, values)
    with pytest.raises(FeatstoreError):
        SmallTensors().read(data[: len(data) // 2], HERE)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, b"PK\3\4" + noise, noise + saved(torch.ones(2))[-98:]):
        with pytest.raises(FeatstoreError):
            SmallTensors().read(data, HERE)


def test_a_packed_zip_is_refused_before_it_is_unpacked() -> None:
    """A few kB that claim 8 MB."""
    data = rewritten(saved(torch.zeros(2_000_000)), {}, zipfile.ZIP_DEFLATED)
    assert len(data) < 20_000
    with pytest.raises(FeatstoreError, match="claims more bytes"):
        SmallTensors().read(data, HERE)


def test_a_shape_beyond_the_bytes_is_refused() -> None:
    reader, data = SmallTensors(), saved(torch.ones(300))
    reader.read(data, HERE)
    pickle = zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")
    grown = pickle.replace(struct.pack("<BH", 0x4D, 300), struct.pack("<BH", 0x4D, 60_000))
    assert grown != pickle
    for change in ({"data.pkl": grown}, {"data/0": bytes(8)}):
        with pytest.raises(FeatstoreError):
            reader.read(rewritten(data, change), HERE)
    with pytest.raises(FeatstoreError, match="shape"):
        reader.read(saved(torch.ones(1).expand(10**9)), HERE)


def test_a_second_entry_of_the_same_name_is_refused() -> None:
    data = saved(torch.ones(3))
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("other/data/0", np.zeros(3, "f4").tobytes())
    with pytest.raises(FeatstoreError, match="two entries"):
        SmallTensors().read(out.getvalue(), HERE)
