"""Wrong, damaged and hostile tensors, arrays and tables: a message that names the file, nothing made.

With ``--on-bad skip`` the rest is imported, and the bad file is listed.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.interop.builders import (
    SLIDES,
    Arrays,
    corners_of,
    save_pt,
    write_clam,
    write_slideflow,
    write_table,
    write_torchmil,
    write_vectors,
)
from tests.interop.projects import assert_same, imported, refused, rows_of
from tests.interop.refusals import (
    BAD,
    FEATURES,
    Evil,
    everywhere,
    is_refused_or_skipped,
    made_by,
    skipped_of,
)

CORNERS = corners_of(FEATURES)["s2"]

# .pt, .npy and .npz


def evil_pt(path: Path, trace: Path) -> None:
    torch.save(Evil(trace), path)


def evil_legacy_pt(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(trace)))


def cut(path: Path, trace: Path) -> None:
    path.write_bytes(path.read_bytes()[:-80])


def emptied(path: Path, trace: Path) -> None:
    path.write_bytes(b"")


def as_text(path: Path, trace: Path) -> None:
    path.write_text("hello, this is no tensor")


def pt_holding(value: Any) -> Callable[[Path, Path], None]:
    return lambda path, trace: torch.save(value, path)


def pt_bomb(path: Path, trace: Path) -> None:
    torch.save(torch.ones(1, 6).expand(10**9, 6), path)


def pt_packed(path: Path, trace: Path) -> None:
    """A zip whose tensor is packed: torch would unpack whatever it claims."""
    torch.save(torch.zeros(10**6, 6), path)
    with zipfile.ZipFile(path) as archive:
        held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)


PT_DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "runs code": evil_pt,
    "runs code, old": evil_legacy_pt,
    "truncated": cut,
    "empty": emptied,
    "text": as_text,
    "a dict": pt_holding({"features": torch.ones(1, 6)}),
    "a list": pt_holding([torch.ones(1, 6)]),
    "a number": pt_holding(3.0),
    "complex": pt_holding(torch.ones(1, 6, dtype=torch.complex64)),
    "bool": pt_holding(torch.ones(1, 6, dtype=torch.bool)),
    "float8": pt_holding(torch.ones(1, 6).to(torch.float8_e4m3fn)),
    "sparse": pt_holding(torch.eye(6).to_sparse()),
    "meta": pt_holding(torch.ones(1, 6, device="meta")),
    "three dimensions": pt_holding(torch.ones(1, 1, 6)),
    "no rows": pt_holding(torch.ones(0, 6)),
    "other width": pt_holding(torch.ones(1, 7)),
    "NaN": pt_holding(torch.full((1, 6), torch.nan)),
    "bomb": pt_bomb,
    "packed": pt_packed,
}


def write_pt_files(path: Path, features: Arrays) -> Path:
    return write_clam(path, features, ("pt",))


TENSORS: dict[str, tuple[Callable[[Path, Arrays], Path], str]] = {
    "clam": (write_pt_files, "pt_files/{}.pt"),
    "slideflow": (write_slideflow, "{}.pt"),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    everywhere(
        PT_DAMAGE, "clam", ("slideflow",), ("runs code", "truncated", "a dict", "other width", "NaN")
    ),
)
def test_a_bad_tensor(tmp_path: Path, name: str, damage: str) -> None:
    write, bad = TENSORS[name]
    # The first bag is the bad one: damage within the data shows only when it is read.
    features = {"s0": BAD, **FEATURES}
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", features)
    PT_DAMAGE[damage](tmp_path / "in" / bad.format("s0"), tmp_path / "trace")
    is_refused_or_skipped(tmp_path, tmp_path / "in", bad.format("s0"), "", FEATURES)
    assert not (tmp_path / "trace").exists()


def evil_array(path: Path, trace: Path) -> None:
    np.save(path, np.array([Evil(trace)], object), allow_pickle=True)


def npy_bomb(path: Path, trace: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 6)}
    )
    path.write_bytes(head.getvalue() + bytes(24))


def as_npz(path: Path, trace: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=BAD)


NPY_DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "runs code": evil_array,
    "a pickle": evil_legacy_pt,
    "truncated": lambda path, trace: path.write_bytes(path.read_bytes()[:-4]),
    "empty": emptied,
    "text": as_text,
    "bomb": npy_bomb,
    "an npz": as_npz,
    "complex": lambda path, trace: np.save(path, BAD * 1j),
    "text array": lambda path, trace: np.save(path, np.array([["a"]])),
    "no rows": lambda path, trace: np.save(path, BAD[:0]),
    "one vector": lambda path, trace: np.save(path, BAD[0]),
}


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        each
        for each in everywhere(
            NPY_DAMAGE, "features", ("coords", "labels"), ("runs code", "truncated", "bomb", "no rows")
        )
        if each.values != ("labels", "text array")  # a class may be text
    ],
)
def test_a_bad_numpy_file_of_torchmil(tmp_path: Path, part: str, damage: str) -> None:
    write_torchmil(tmp_path / "in", FEATURES, dict.fromkeys(SLIDES, 1))
    bad = f"{part}/s2.npy"
    NPY_DAMAGE[damage](tmp_path / "in" / bad, tmp_path / "trace")
    is_refused_or_skipped(tmp_path, tmp_path / "in", bad, "")
    assert not (tmp_path / "trace").exists()


def evil_npz(path: Path, trace: Path) -> None:
    np.savez(path, arr_0=np.array([Evil(trace)], object), allow_pickle=True)


def npz_with_a_flipped_bit(path: Path, trace: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 - 40] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(evil_npz, id="runs code"),
        pytest.param(cut, id="truncated"),
        pytest.param(emptied, id="empty"),
        pytest.param(as_text, id="text"),
        pytest.param(lambda path, trace: np.savez(path, other=CORNERS), id="no arr_0"),
        pytest.param(lambda path, trace: np.savez(path, CORNERS[:0]), id="no rows"),
        pytest.param(lambda path, trace: np.savez(path, CORNERS * 1j), id="complex"),
        pytest.param(lambda path, trace: path.write_bytes(npy_bytes(CORNERS)), id="an npy"),
    ],
)
def test_a_bad_index_of_slideflow(tmp_path: Path, damage: Callable[[Path, Path], Any]) -> None:
    source = made_by(write_slideflow, tmp_path / "in")
    damage(source / "s2.index.npz", tmp_path / "trace")
    is_refused_or_skipped(tmp_path, source, "s2.index.npz", "")
    assert not (tmp_path / "trace").exists()


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"extractor": {"class": 3}, "tile_um": [}', "\xff", "null"]
)
def test_a_bad_description_of_slideflow(tmp_path: Path, text: str) -> None:
    source = made_by(write_slideflow, tmp_path / "in")
    (source / "bags_config.json").write_text(text, encoding="latin-1")
    refused(tmp_path / "p", source, "bags_config.json", "not what slideflow writes")


# Tables


def csv_with(change: Callable[[str], str]) -> Callable[[Path, Path], Path]:
    def write(folder: Path, trace: Path) -> Path:
        file = write_table(folder / "bags.csv", FEATURES, dict.fromkeys(SLIDES, 1))
        file.write_text(change(file.read_text()))
        return file

    return write


def npz_with(**arrays: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, trace: Path) -> Path:
        np.savez(folder / "bags.npz", **{**FEATURES, **arrays})
        return folder / "bags.npz"

    return write


def file_of(name: str, change: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Path]:
    def write(folder: Path, trace: Path) -> Path:
        with (folder / name).open("wb") as file:
            np.savez(file, **FEATURES)
        change(folder / name, trace)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (csv_with(lambda text: text.replace("bag_id", "id")), "no column bag_id"),
        (csv_with(lambda text: text.replace("f3", "f9")), "feature columns"),
        (csv_with(lambda text: text.replace("f", "g")), "feature columns missing"),
        (csv_with(lambda text: text + "s1,1,1,2,3,,5,6\n"), "f3 is '' in row 10"),
        (csv_with(lambda text: text + "s1,1,1,2,3,nan,5,6\n"), "row 10"),
        (csv_with(lambda text: text + "s1,1,1,2,3,inf,5,6\n"), "row 10"),
        (csv_with(lambda text: text + "s1,1,1,2,3,1e39,5,6\n"), "f3 is 1e+39 in row 10"),
        (csv_with(lambda text: text + "s1,1,1,2,3,x,5,6\n"), "f3 is 'x' in row 10"),
        (csv_with(lambda text: text + "s1,2,1,2,3,4,5,6\n"), "bag 's1' has two labels"),
        (csv_with(lambda text: text + "s1,1,1,2,3,4,5,6,7\n"), "cannot be read"),
        (csv_with(lambda text: text + ",1,1,2,3,4,5,6\n"), "no bag_id in row"),
        (csv_with(lambda text: text + "../x,1,1,2,3,4,5,6\n"), "contains"),
        (csv_with(lambda text: text.partition("\n")[0] + "\n"), "there are no bags"),
        (csv_with(lambda text: ""), "cannot be read"),
        (npz_with(s2=BAD[0]), "shape (6,)"),
        (npz_with(s2=BAD[:0]), "shape (0, 6)"),
        (npz_with(s2=BAD * 1j), "complex64"),
        (npz_with(s2=np.ones((1, 7))), "7 features here, 6 in"),
        (file_of("bags.npz", evil_npz), "cannot be read"),
        (file_of("bags.npz", evil_legacy_pt), "cannot be read"),
        (file_of("bags.npz", cut), "cannot be read"),
        (file_of("bags.npz", emptied), "cannot be read"),
        (file_of("bags.npz", npz_with_a_flipped_bit), "cannot be read"),
        (file_of("bags.npz", lambda path, trace: path.write_bytes(npy_bytes(BAD))), "cannot be read"),
        (file_of("bags.parquet", as_text), "cannot be read"),
        (file_of("bags.parquet", emptied), "cannot be read"),
    ],
)
def test_a_bad_table(tmp_path: Path, write: Callable[[Path, Path], Path], says: str) -> None:
    (tmp_path / "in").mkdir()
    file = write(tmp_path / "in", tmp_path / "trace")
    if file.suffix == ".parquet":
        pytest.importorskip("pyarrow")
    refused(tmp_path / "p", file, file, says)
    assert not (tmp_path / "trace").exists()


# Vectors


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (evil_pt, "cannot be read as a tensor"),
        (evil_legacy_pt, "cannot be read as a tensor"),
        (cut, "cannot be read as a tensor"),
        (emptied, "cannot be read as a tensor"),
        (pt_holding({"x": torch.ones(6)}), "holds a dict"),
        (pt_holding(torch.ones(1, 6)), "shape (1, 6)"),
        (pt_holding(torch.tensor(1.0)), "shape ()"),
        (pt_holding(torch.ones(0)), "shape (0,)"),
        (pt_holding(torch.ones(7)), "a vector of 7 numbers"),
        (pt_holding(torch.full((6,), torch.inf)), "NaN or infinity"),
        (pt_holding(torch.ones(6).to(torch.float8_e5m2)), "tensor of torch.float8_e5m2"),
    ],
)
def test_a_bad_vector_costs_its_slice_and_is_named(
    tmp_path: Path, damage: Callable[[Path, Path], None], says: str
) -> None:
    keys = {("1", "h&e", "a"): FEATURES["s10"], ("2", "h&e", "a"): FEATURES["s1"]}
    write_vectors(tmp_path / "in", keys)
    bad = "case_1_a_h&e_patch4.pt"
    damage(tmp_path / "in" / bad, tmp_path / "trace")
    refused(tmp_path / "p", tmp_path / "in", bad, says)
    report = imported(tmp_path / "p", tmp_path / "in", on_bad="skip")
    assert_same(rows_of(tmp_path / "p"), {("2", "h&e", "a"): FEATURES["s1"]}, "float32")
    assert [path for path, _ in report.skipped] == [bad]
    assert says in skipped_of(tmp_path / "p")[0]["reason"]
    assert not (tmp_path / "trace").exists()


def test_a_name_that_is_no_patchs_stops_the_import_of_vectors(tmp_path: Path) -> None:
    write_vectors(tmp_path / "in", {("1", "h&e", "a"): BAD})
    save_pt(tmp_path / "in" / "whatever.pt", BAD[0])
    refused(
        tmp_path / "p", tmp_path / "in", tmp_path / "in", "1 of 2 file names cannot be read", "whatever.pt"
    )


def test_two_vectors_of_one_patch(tmp_path: Path) -> None:
    write_vectors(tmp_path / "in", {("1", "h&e", "a"): BAD})
    write_vectors(tmp_path / "in" / "again", {("01", "h&e", "a"): BAD})
    refused(tmp_path / "p", tmp_path / "in", tmp_path / "in", "two files", "again/case_01_a_h&e_patch1.pt")
