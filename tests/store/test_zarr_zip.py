"""Zarr parts: as the zarr package writes and reads them; whatever was not written so is refused."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from featstore.errors import StoreDamaged
from featstore.store import Slice, stored_zip, zarr_zip
from featstore.store.parts import open_part
from featstore.store.zarr_zip import encode
from tests.store.builders import make_slice

Files = dict[str, bytes]
FEATURES = "x/s/features"
CHUNK = f"{FEATURES}/c/0/0"


def wide_slice(rows: int = 1300, dim: int = 1024) -> Slice:
    """A slice whose features take several chunks, the last one padded."""
    item = make_slice("a", "x", "s", list(range(rows)))
    rng = np.random.default_rng(0)
    item.columns["features"] = rng.normal(size=(rows, dim)).astype(np.float16)
    item.columns["geometry"] = rng.normal(size=(rows, 8))
    return item


def read_all(path: Path, items: Iterable[Slice]) -> None:
    """Every column as it was written, read into an array and into one that is given."""
    with open_part(path, path.stat().st_size) as reader:
        for item in items:
            assert set(reader.columns(item.stain, item.slice_id)) == set(item.columns)
            for name, want in item.columns.items():
                key = (item.stain, item.slice_id, name, len(want))
                given = np.zeros_like(want)
                assert reader.read(*key, into=given) is given
                for found in (given, reader.read(*key)):
                    assert found.dtype == want.dtype
                    assert np.array_equal(found, want)


@pytest.fixture
def item() -> Slice:
    return make_slice("a", "x", "s", [1, 2, 5])


@pytest.fixture
def part(tmp_path: Path, item: Slice) -> Path:
    path = tmp_path / "part.zarr.zip"
    path.write_bytes(encode([item], {"case_id": "é"}))
    return path


def unpack(path: Path) -> Files:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(files: Files) -> bytes:
    return stored_zip.encode((name, [np.frombuffer(data, np.uint8)]) for name, data in files.items())


def change_metadata(path: Path, change: Callable[[dict[str, Any]], object], name: str = FEATURES) -> None:
    """Metadata as someone else might have written them, in a zip that is in order."""
    files = unpack(path)
    body = json.loads(files[f"{name}/zarr.json"])
    change(body)
    files[f"{name}/zarr.json"] = json.dumps(body, separators=(",", ":")).encode()
    path.write_bytes(pack(files))


def refused(path: Path, item: Slice, match: str) -> None:
    with pytest.raises(StoreDamaged, match=match) as error:
        read_all(path, [item])
    assert error.value.where == str(path)
    assert error.value.fix


def with_checksum(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


# As zarr writes and reads it ------------------------------------------------------------------


def test_plain_zarr_reads_what_we_write(tmp_path: Path) -> None:
    ids = [("h&e", "s"), ("h&e", "__s"), ("H E", "zarr.json"), ("zarr.json", "c"), ("__x", "é" * 150)]
    items = [make_slice("a", *each, [1, 2]) for each in ids] + [wide_slice()]
    path = tmp_path / "part.zarr.zip"
    path.write_bytes(encode(items, {"case_id": "é", "number": 3}))
    with zarr.storage.ZipStore(path, mode="r") as store:
        root = zarr.open(store, mode="r")
        assert dict(root.attrs) == {"case_id": "é", "number": 3}
        stains = root.group_values()
        groups = {(g.attrs["stain"], g.attrs["slice_id"]): g for s in stains for g in s.group_values()}
        for item in items:
            group = groups.pop((item.stain, item.slice_id))
            arrays = dict(group.arrays())
            assert set(arrays) == set(item.columns)
            names = arrays.pop("source_name")[:]
            assert names.view(f"S{names.shape[1]}")[:, 0].tolist() == item.columns["source_name"].tolist()
            for name, array in arrays.items():
                assert array.dtype == item.columns[name].dtype
                assert np.array_equal(array[:], item.columns[name])
        assert not groups
        assert arrays["features"].chunks == (434, 1024)
        assert arrays["quality"].attrs["columns"].startswith("width,height,")
    read_all(path, items)


def test_metadata_and_chunks_are_those_that_zarr_writes(tmp_path: Path) -> None:
    item = wide_slice()
    path = tmp_path / "ours.zarr.zip"
    path.write_bytes(encode([item], {"case_id": "é"}))
    ours = unpack(path)
    with zarr.storage.ZipStore(tmp_path / "theirs.zip", mode="w") as store:
        root = zarr.create_group(store, attributes={"case_id": "é"})
        group = root.create_group("x").create_group("s", attributes={"stain": "x", "slice_id": "s"})
        for name, values in item.columns.items():
            body = json.loads(ours[f"x/s/{name}/zarr.json"])
            raw = values if values.dtype.kind != "S" else values.view(np.uint8).reshape(len(values), -1)
            group.create_array(
                name,
                data=raw,
                chunks=tuple(body["chunk_grid"]["configuration"]["chunk_shape"]),
                compressors=Crc32cCodec(),
                filters=None,
                attributes=body["attributes"],
            )
    theirs = unpack(tmp_path / "theirs.zip")
    assert set(ours) == set(theirs)
    for name, data in ours.items():
        if name.endswith("zarr.json"):
            assert json.loads(data) == json.loads(theirs[name])
        else:
            assert data == theirs[name]


def test_the_zarr_package_is_not_needed(part: Path, item: Slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert encode([item], {"case_id": "é"}) == part.read_bytes()
    read_all(part, [item])


def test_a_column_is_read_into_any_array(tmp_path: Path) -> None:
    item = wide_slice()
    path = tmp_path / "part.zarr.zip"
    path.write_bytes(encode([item], {}))
    wide = np.zeros((1300, 2048), np.float16)
    with open_part(path, path.stat().st_size) as reader:
        reader.read("x", "s", "features", 1300, into=wide[:, ::2])
    assert np.array_equal(wide[:, ::2], item.columns["features"])
    assert not wide[:, 1::2].any()


# The zip ---------------------------------------------------------------------------------------


def test_equal_parts_are_equal_bytes_and_a_sound_zip(part: Path, item: Slice) -> None:
    assert encode([item], {"case_id": "é"}) == part.read_bytes()
    with zipfile.ZipFile(part) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    with pytest.raises(ValueError, match="two files of the name"):
        encode([item, item], {})


def test_zips_of_many_files(tmp_path: Path) -> None:
    files = {f"{i}/zarr.json": str(i).encode() for i in range(70_000)}
    check_zip(tmp_path / "many.zip", files)


def test_zips_beyond_four_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their records, in a small zip: each number that would not fit stands in its 64-bit field."""
    huge = 0xFFFFFFFF
    monkeypatch.setattr(stored_zip, "_FAR", 500)
    files = {f"{i}/zarr.json": str(i).encode() * 50 for i in range(20)}
    data = pack(files)
    assert data.count(b"PK\6\6") == 1
    assert 0 < data.count(b"\1\0\x08\0") == sum(entry.offset >= 500 for entry in entries_of(data)) < 20
    # What we call far, others only know by the highest number.
    sentinel = data.replace(struct.pack("<I", 500), struct.pack("<I", huge))
    (tmp_path / "theirs.zip").write_bytes(sentinel)
    assert unpack(tmp_path / "theirs.zip") == files
    (tmp_path / "ours.zip").write_bytes(data)
    check_entries(tmp_path / "ours.zip", files)


def entries_of(data: bytes) -> list[stored_zip.Entry]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return list(stored_zip.StoredZip(file.fileno(), len(data)).entries.values())


def check_zip(path: Path, files: Files) -> None:
    path.write_bytes(pack(files))
    assert unpack(path) == files
    check_entries(path, files)


def check_entries(path: Path, files: Files) -> None:
    with path.open("rb") as file:
        archive = stored_zip.StoredZip(file.fileno(), path.stat().st_size)
        assert {name: archive.read(name) for name in archive.entries} == files


def patch_headers(data: bytes, at: int, central: bool, value: int, form: str = "<H") -> bytes:
    """One field of the headers of `CHUNK` changed: of the local one, or of that in the directory."""
    found = bytearray(data)
    name = CHUNK.encode()
    start = data.rindex(name) - 46 if central else data.index(name) - 30
    struct.pack_into(form, found, start + at, value)
    return bytes(found)


@pytest.mark.parametrize("central", [True, False], ids=["directory", "header"])
@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 1), (0, 8), (2, 8), (8, 0x12345678), (12, 10**9), (16, 10**9)],
    ids=["encrypted", "size after the data", "deflated", "CRC-32", "stored size", "size"],
)
def test_a_zip_with_other_headers_is_refused(
    part: Path, item: Slice, central: bool, at: int, value: int
) -> None:
    form = "<I" if at > 4 else "<H"
    part.write_bytes(patch_headers(part.read_bytes(), at + (8 if central else 6), central, value, form))
    refused(part, item, "directory" if central else "header")


def test_compressed_entries_are_refused(part: Path, item: Slice) -> None:
    files = {**unpack(part), "bomb": bytes(10**7)}
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    assert part.stat().st_size < 10**5
    refused(part, item, "directory")


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "x/../../y", "x//y", "x/", "./x", "x\\y", "x\0y", "C:x", "", ".."],
)
def test_names_that_lead_elsewhere_are_refused(part: Path, item: Slice, name: str) -> None:
    part.write_bytes(pack({**unpack(part), name: b"1"}))
    refused(part, item, "leads elsewhere")


def test_a_name_that_is_there_twice_is_refused(part: Path, item: Slice) -> None:
    other = f"{FEATURES}/c/1/0"
    data = pack({**unpack(part), other: b"1"})
    part.write_bytes(data.replace(other.encode(), CHUNK.encode()))
    refused(part, item, "twice")


@pytest.mark.parametrize("change", ["prefix", "comment", "gap", "tail"])
def test_bytes_that_no_entry_owns_are_refused(part: Path, item: Slice, change: str) -> None:
    data, files = part.read_bytes(), unpack(part)
    if change == "prefix":
        data = b"#!/bin/sh\n" + data
    elif change == "comment":
        data = data[:-8] + b"01234567"
    elif change == "tail":
        comment = data[data.index(b"directory CRC-32") :]
        end = data.removesuffix(struct.pack("<H", len(comment)) + comment)
        data = end + struct.pack("<H", len(comment) + 1) + comment + b"\0"
    else:
        directory = data.index(b"PK\1\2")
        start, later = struct.pack("<I", directory), struct.pack("<I", directory + 7)
        data = data[:directory] + b"\0" * 7 + data[directory:].replace(start, later)
    part.write_bytes(data)
    assert unpack(part) == files  # to others it is sound
    refused(part, item, "no readable Zarr file")


def test_a_last_entry_that_reaches_beyond_the_contents_is_refused(part: Path, item: Slice) -> None:
    data = part.read_bytes()
    with part.open("rb") as file:
        entries = stored_zip.StoredZip(file.fileno(), len(data)).entries
    (name, entry), start = list(entries.items())[-1], data.index(b"PK\1\2")
    longer = entry._replace(size=entry.size + 10)
    local, contents = data[: entry.offset], data[entry.offset + 30 + len(name) : start]
    directory = stored_zip._directory({**entries, name: longer}, start)
    part.write_bytes(local + stored_zip._local(name, longer) + contents + directory)
    refused(part, item, "no readable Zarr file")


def test_a_file_that_is_cut_while_it_is_open(part: Path) -> None:
    size = part.stat().st_size
    with open_part(part, size) as reader:
        with part.open("r+b") as file:
            file.truncate(size // 4)
        with pytest.raises(StoreDamaged, match="the file ends early"):
            reader.read("x", "s", "source_sha256", 3)


def test_buffers_of_another_size_are_refused(part: Path) -> None:
    with part.open("rb") as file:
        archive = stored_zip.StoredZip(file.fileno(), part.stat().st_size)
        with pytest.raises(ValueError, match="has 46 bytes, not 45"):
            archive.read_into(CHUNK, [np.empty(45, np.uint8)])


@pytest.mark.parametrize("data", [b"", b"PK", b"\0" * 22, b"\x89HDF\r\n" * 50, b"PK\5\6" + b"\xff" * 18])
def test_other_files_are_refused(part: Path, item: Slice, data: bytes) -> None:
    part.write_bytes(data)
    refused(part, item, "no readable Zarr file")


# Chunks and metadata ---------------------------------------------------------------------------


def test_a_deleted_chunk_is_never_a_fill_value(tmp_path: Path) -> None:
    item = wide_slice()
    path = tmp_path / "part.zarr.zip"
    whole = encode([item], {})
    for chunk in (f"{FEATURES}/c/{i}/0" for i in range(3)):
        path.write_bytes(whole)
        files = unpack(path)
        del files[chunk]
        path.write_bytes(pack(files))
        with zarr.storage.ZipStore(path, mode="r") as store:  # as the zarr package reads it
            assert (zarr.open_array(store, path=FEATURES, mode="r")[:] == 0).all(axis=1).any()
        refused(path, item, f"lacks a chunk .*{chunk}")


def test_a_chunk_that_fails_its_checksum(part: Path, item: Slice) -> None:
    files = unpack(part)
    chunk = bytearray(files[CHUNK])
    chunk[3] ^= 1
    part.write_bytes(pack({**files, CHUNK: bytes(chunk)}))
    refused(part, item, f"{CHUNK} fails its checksum")


def test_damage_to_the_padding_is_told(tmp_path: Path) -> None:
    item = wide_slice()
    path = tmp_path / "part.zarr.zip"
    path.write_bytes(encode([item], {}))
    files, last = unpack(path), f"{FEATURES}/c/2/0"
    files[last] = files[last][:-5] + b"\1" + files[last][-4:]
    path.write_bytes(pack(files))
    refused(path, item, f"{last} fails its checksum")


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "no checksum"])
def test_a_chunk_of_another_size(part: Path, item: Slice, change: str) -> None:
    files = unpack(part)
    data = files[CHUNK][:-4]
    changed = {
        "shorter": with_checksum(data[:-1]),
        "longer": with_checksum(data + b"1"),
        "empty": b"",
        "no checksum": data,
    }
    part.write_bytes(pack({**files, CHUNK: changed[change]}))
    refused(part, item, "another size than its metadata say")


def test_more_rows_than_there_are_take_no_memory(part: Path, item: Slice) -> None:
    rows = 10**15

    def change(body: dict[str, Any]) -> None:
        body["shape"][0] = body["chunk_grid"]["configuration"]["chunk_shape"][0] = rows

    change_metadata(part, change)
    with open_part(part, part.stat().st_size) as reader, pytest.raises(StoreDamaged, match="another size"):
        reader.read("x", "s", "features", rows)
    change_metadata(part, lambda body: body["chunk_grid"]["configuration"].update(chunk_shape=[3, 7]))
    with open_part(part, part.stat().st_size) as reader, pytest.raises(StoreDamaged, match="lacks a chunk"):
        reader.read("x", "s", "features", rows)


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC = {"name": "crc32c"}
CODECS: list[Any] = [
    [],
    [LITTLE],
    [{"name": "bytes", "configuration": {"endian": "big"}}, CRC],
    [LITTLE, {"name": "gzip", "configuration": {"level": 5}}],
    [LITTLE, CRC, {"name": "gzip", "configuration": {"level": 5}}],
    [{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE, CRC],
    "none",
]


@pytest.mark.parametrize("codecs", CODECS)
def test_other_codecs_are_refused(part: Path, item: Slice, codecs: Any) -> None:
    change_metadata(part, lambda body: body.update(codecs=codecs))
    refused(part, item, "its metadata are not those")


@pytest.mark.parametrize(
    "change",
    [
        {"zarr_format": 2},
        {"node_type": "group"},
        {"fill_value": 1.0},
        {"data_type": "int16"},
        {"data_type": "bfloat16"},
        {"data_type": ["float16"]},
        {"data_type": {"name": "float16"}},
        {"shape": [3]},
        {"shape": []},
        {"shape": [], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3]}}},
        {"shape": 3},
        {"shape": [3, -7]},
        {"shape": [3.0, 7]},
        {"shape": [True, 7]},
        {"shape": ["3", "7"]},
        {"attributes": []},
        {"chunk_grid": {"name": "rectangular", "configuration": {"chunk_shape": [3, 7]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 1]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 7]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": []}}},
        {"chunk_grid": []},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
        {"storage_transformers": [{"name": "sharding"}]},
        {"dimension_names": ["row", "feature"]},
        {"must_understand": True},
    ],
    ids=str,
)
def test_other_metadata_are_refused(part: Path, item: Slice, change: dict[str, Any]) -> None:
    change_metadata(part, lambda body: body.update(change))
    refused(part, item, "its metadata (are not those|lack)")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b"9" * 10_000])
def test_metadata_that_are_no_metadata_are_refused(part: Path, item: Slice, data: bytes) -> None:
    part.write_bytes(pack({**unpack(part), f"{FEATURES}/zarr.json": data}))
    refused(part, item, "is not what was written")


def test_another_shape_or_dtype_is_refused(part: Path, item: Slice) -> None:
    files = unpack(part)
    floats = with_checksum(np.ones((3, 7), np.float32).tobytes())
    part.write_bytes(pack({**files, CHUNK: floats}))
    change_metadata(part, lambda body: body.update(data_type="float32"))
    refused(part, item, r"has the shape \(3, 7\) of float32")
    part.write_bytes(encode([make_slice("a", "x", "s", [1, 2])], {}))
    refused(part, item, r"has the shape \(2, 7\) of float16")
    with open_part(part, part.stat().st_size) as reader, pytest.raises(StoreDamaged) as error:
        reader.read("x", "s", "patch", 3)
    assert error.value.expected == "(3,)"


def test_damage_to_an_attribute_is_told(part: Path, item: Slice) -> None:
    """Without their attribute the names would be read as rows of numbers."""
    good = part.read_bytes()
    part.write_bytes(good.replace(b'"strings":"bytes', b'"strings":"bytez', 1))
    refused(part, item, "source_name/zarr.json fails its checksum")


def test_what_is_not_there_is_told(part: Path, item: Slice) -> None:
    with open_part(part, part.stat().st_size) as reader:
        with pytest.raises(StoreDamaged, match="no column 'geometry' in x/s"):
            reader.read("x", "s", "geometry", 3)
        with pytest.raises(StoreDamaged, match="no readable slice x/t"):
            reader.read("x", "t", "patch", 3)
        with pytest.raises(StoreDamaged, match="no readable slice y/s"):
            reader.columns("y", "s")


# Bits ------------------------------------------------------------------------------------------


def payload(path: Path) -> list[tuple[int, int]]:
    """First and last byte + 1 of every chunk."""
    with path.open("rb") as file:
        entries = stored_zip.StoredZip(file.fileno(), path.stat().st_size).entries
    return [
        (entry.offset + 30 + len(name), entry.offset + 30 + len(name) + entry.size)
        for name, entry in entries.items()
        if not name.endswith("zarr.json")
    ]


def test_every_flipped_bit_of_the_payload_is_told(part: Path, item: Slice) -> None:
    good, rng = part.read_bytes(), np.random.default_rng(0)
    places = np.concatenate([np.arange(first, last) for first, last in payload(part)])
    for place in rng.choice(places, 100, replace=False).tolist():
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        part.write_bytes(bad)
        refused(part, item, "fails its checksum")


def test_a_flipped_bit_elsewhere_is_told_or_harmless(part: Path, item: Slice) -> None:
    good, rng = part.read_bytes(), np.random.default_rng(1)
    directory = good.index(b"PK\1\2")
    inside = np.zeros(len(good), bool)
    for first, last in payload(part):
        inside[first:last] = True
    told = harmless = 0
    for place in rng.choice(np.flatnonzero(~inside), 500, replace=False).tolist():
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        part.write_bytes(bad)
        try:
            read_all(part, [item])
            harmless += 1  # in the metadata of a group, which reading a column does not need
            assert place < directory
        except StoreDamaged:
            told += 1
    assert told > 8 * harmless


def test_a_checksum_of_zarr_is_the_plain_crc32c() -> None:
    """The check value of the CRC catalogue, so that nobody exchanges the polynomial."""
    assert zarr_zip._crc([np.frombuffer(b"123456789", np.uint8)]) == struct.pack("<I", 0xE3069283)
