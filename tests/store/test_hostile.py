"""Input that means harm: ids, links, records, parts and descriptions of someone who may write here.

Ids are refused with a clear error or come back as they were, and nothing is made outside the store's
folder. What was forged under right sizes and checksums is refused and told by `verify`, and `repair`
takes it away; no code in it is run, no file outside is read for it, and no memory is taken for it.

Elsewhere: parts in test_hostile_parts.py, zips as such in test_zarr_zip.py, path components in
test_ids.py, names of patches and tables in tests/test_bad_input.py, checkpoints in
tests/heads/test_runs.py, images in tests/test_bad_images.py.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.cohort.splits import read_split
from featstore.errors import CohortError, StoreDamaged, StoreError
from featstore.store import Slice, Store, StoreWriter
from featstore.store.commit import publish_next
from featstore.store.findings import Finding, VerifyReport
from featstore.store.maintenance import gc, repair, rm
from featstore.store.verify import verify
from tests.command_line import listing
from tests.store.builders import make_slice, make_spec
from tests.store.damage import contents, part_of, record_of

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_waiting_for_the_disk")]


# Ids -------------------------------------------------------------------------------------------

SOUND = {
    "parent": "../x",
    "absolute": "/etc/x",
    "backslash": "..\\x",
    "drive": "C:\\x",
    "dot": ".",
    "two dots": "..",
    "newline": "a\nb",
    "escape": "\x1b[31m",
    "255 letters": "x" * 255,
    "255 bytes": "é" * 127 + "x",
    "device": "CON",
    "small device": "con",
    "device with a suffix": "nul.txt",
    "formula": "=1+1",
    "at": "@x",
    "trailing dot": "a.",
    "trailing blank": "a ",
    "leading blank": " a",
    "tilde": "~",
    "escaped": "%2e%2e",
    "byte-order mark": "\ufeffx",
    "right to left": "\u202egnp",
    "beyond the basic plane": "🧬",
    "name of Zarr's": "zarr.json",
    "prefix of Zarr's": "__x",
    "name of a column": "features",
    "path of a chunk": "c/0",
    "name of a record": "000001.json",
    "name of a part": "0" * 32 + ".h5",
}
REFUSED = {
    "empty": "",
    "bytes that are no text": "\udcff",
    "NUL": "a\0b",
}
NONE = r"empty id|not valid Unicode|NUL"


def slices(stain: str = "x", slice_id: str = "s", version: int = 0) -> list[Slice]:
    item = make_slice("case", "x", "s", [1, 2], version)
    return [Slice(stain, slice_id, item.columns)]


def ids_of(path: Path) -> set[tuple[str, str, str]]:
    """Every case, stain and slice that a store shows."""
    table = Store.open(path).table()
    return set(table[["case_id", "stain", "slice_id"]].itertuples(index=False, name=None))


@pytest.mark.parametrize("text", SOUND.values(), ids=SOUND.keys())
def test_hostile_ids_come_back_and_stay_inside(writer: StoreWriter, text: str) -> None:
    wanted = {(text, "x", "s"), ("a", text, "s"), ("a", "x", text), (text, text, text)}
    for case, stain, slice_id in wanted:
        writer.commit(case, slices(stain, slice_id))
    assert ids_of(writer.path) == wanted
    assert os.listdir(writer.path.parent) == ["store"]
    for path in writer.path.rglob("*"):
        name = path.name.lower()
        assert name.isascii()
        assert not set(name) & set('\\/:*?"<>| \n')
        assert len(name) < 100
    assert verify(writer.path, "full").findings == []
    json.dumps(verify(writer.path).to_json())
    assert rm(writer.path, cases=[text], apply=True).cases == 1
    assert rm(writer.path, cases=["a"], stains=[text], apply=True).patches == 2
    assert rm(writer.path, slices=[text], apply=True).slices == 1
    assert Store.open(writer.path).cases() == []
    assert os.listdir(writer.path.parent) == ["store"]


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_ids_that_are_none_are_refused(writer: StoreWriter, text: str) -> None:
    writer.commit("a", slices())
    before = listing(writer.path)
    for case, stain, slice_id in ((text, "x", "s"), ("a", text, "s"), ("a", "x", text)):
        with pytest.raises(StoreError, match=NONE):
            writer.commit(case, slices(stain, slice_id))
        with pytest.raises(StoreError, match=rf"{NONE}|no stain|no slice"):
            rm(writer.path, cases=[case], stains=[stain], slices=[slice_id], apply=True)
    with pytest.raises(StoreError, match=NONE):
        Store.open(writer.path).bag(text)
    assert listing(writer.path) == before


ALIKE = [
    ("A", "a"),
    (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
    ("ß", "ss"),
    ("ﬁ", "fi"),
    ("1", "１"),
    ("a", "а"),  # the second one is Cyrillic
    ("x" * 200 + "1", "x" * 200 + "2"),
    ("a b", "a%20b"),
    ("a", "a "),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=ascii)
def test_ids_that_look_alike_stay_apart(writer: StoreWriter, one: str, other: str) -> None:
    for version, text in enumerate((one, other)):
        writer.commit(text, slices(text, text, version))
        writer.commit("both", slices(text, text, version))
    wanted = {(one, one, one), (other, other, other), ("both", one, one), ("both", other, other)}
    assert ids_of(writer.path) == wanted
    folders = os.listdir(writer.path / "cases")
    # Nor would they meet where the file system ignores case, or normalises.
    assert len({unicodedata.normalize("NFKC", name).lower() for name in folders}) == 3
    rm(writer.path, cases=[one], apply=True)
    rm(writer.path, cases=["both"], stains=[other], apply=True)
    assert ids_of(writer.path) == {(other, other, other), ("both", one, one)}
    assert verify(writer.path, "full").findings == []


# Links -----------------------------------------------------------------------------------------


@pytest.fixture
def store(small_store: Path) -> Path:
    return small_store


def swap(path: Path, outside: Path) -> None:
    """Move a file or folder out of the store, and leave a link to it."""
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


LINKED: dict[str, Callable[[Path], Path]] = {
    "case": lambda store: store / "cases" / "1",
    "cases": lambda store: store / "cases",
    "record": lambda store: record_of(store, "1"),
    "part": lambda store: part_of(store, "1"),
    "quarantine": lambda store: store / "quarantine",
    "description": lambda store: store / "featstore.json",
}


@pytest.mark.parametrize("which", LINKED)
def test_no_link_leads_out_of_the_store(store: Path, tmp_path: Path, which: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    swap(LINKED[which](store), outside)
    part_of(store, "2").write_bytes(b"")  # something to be moved to quarantine
    before = listing(outside)
    report = verify(store, "full")
    assert [finding.kind for finding in report.findings].count("link") == 1
    assert report.damage != []
    works: list[Callable[[], object]] = [
        lambda: rm(store, stains=["h&e"], apply=True),
        lambda: gc(store, 0, apply=True, quarantine=True),
        lambda: repair(store, apply=True),
        lambda: repair(store, apply=True),
        lambda: rm(store, cases=["1"], apply=True),
    ]
    for work in works:
        try:
            work()
        except StoreError as error:
            assert error.fix  # noqa: PT017
        assert listing(outside) == before


def test_rm_and_the_next_record_of_a_linked_case(store: Path, tmp_path: Path) -> None:
    """Refused, and before any other case is changed."""
    (tmp_path / "outside").mkdir()
    folder = store / "cases" / max(os.listdir(store / "cases"))
    swap(folder, tmp_path / "outside")
    before = listing(tmp_path)
    with pytest.raises(StoreDamaged, match="a link to"):
        rm(store, stains=["h&e"], apply=True)
    with pytest.raises(StoreDamaged, match="a link to"):
        publish_next(folder, "1", make_spec().fingerprint, 2, ())
    assert listing(tmp_path) == before


@pytest.mark.parametrize("which", ["case", "cases"])
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "full"])
def test_no_writer_follows_a_link(store: Path, tmp_path: Path, which: str, empty: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    swap(LINKED[which](store), outside)
    if empty:
        for path in [path for path in outside.rglob("*") if path.is_file()]:
            path.unlink()
    before = listing(outside)
    with pytest.raises(StoreDamaged, match="link"):
        StoreWriter(store, make_spec(), {}).commit("1", slices())
    assert listing(outside) == before


# Records ---------------------------------------------------------------------------------------


def forge_record(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record, and give it the sha256 of what it says then."""

    def canonical(body: dict[str, Any]) -> bytes:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass")

    body = json.loads(file.read_bytes())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(canonical(body)).hexdigest()
    file.write_bytes(canonical({**body, "sha256": digest}) + b"\n")


FORGED: dict[str, dict[str, Any]] = {
    "case that is no text": {"case_id": 1},
    "empty case": {"case_id": ""},
    "number that is none": {"sequence": 2.0},
    "time that is none": {"created": "yesterday"},
    "time as a number": {"created": 5},
    "writer that is no text": {"writer": [1]},
    "fingerprint that is none": {"fingerprint": None},
    "stain that is no text": {"stain": 5},
    "empty stain": {"stain": ""},
    "stain that is nothing": {"stain": None},
    "stain of half a character": {"stain": "\ud800"},
    "slice that is a list": {"slice_id": [1]},
    "rows that are no text": {"live": 5},
    "more rows than fit": {"rows": 10**15},
    "a trillion rows": {"live": "0-999999999999", "rows": 10**12},
    "digest that is no text": {"digest": 5},
    "path for a part": {"name": "../../" + "0" * 32 + ".h5"},
    "absolute path for a part": {"name": "/" + "0" * 32 + ".h5"},
    "negative size": {"size": -1},
    "part that is there twice": {"twice": True},
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_a_record_that_signs_itself_is_refused(store: Path, tmp_path: Path, forged: dict[str, Any]) -> None:
    before = contents(store)
    kept = {key: value for key, value in before.items() if key[0] != "1"}

    def change(body: dict[str, Any]) -> None:
        part = body["parts"][0]
        for name, value in forged.items():
            if name == "twice":
                body["parts"].append(part)
            elif name in body:
                body[name] = value
            elif name == "digest":
                part["sha256"] = value
            else:
                (part if name in part else part["groups"][0])[name] = value

    forge_record(record_of(store, "1"), change)
    for work in (
        lambda: Store.open(store).bag("1"),
        lambda: Store.open(store).table(),
        lambda: rm(store, stains=["h&e"], apply=True),
        lambda: StoreWriter(store, make_spec(), {}).commit("1", slices("h&e", "s1")),
    ):
        with pytest.raises(StoreDamaged):
            work()
    report = verify(store, "quick")
    assert [finding.kind for finding in report.damage] == ["record-damaged"]
    assert gc(store, 0, apply=True).passed_over != []
    assert repair(store, apply=True).left == []
    assert (contents(store), verify(store, "full").damage) == (kept, [])
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    "group",
    [
        {"live": "0-9999999999999999999999"},
        {"live": "0-999", "rows": 1000},
        {"live": "3-1"},
        {"live": "1,1"},
        {"live": "0-3,0-3", "rows": 8},
        {"live": "all"},
    ],
    ids=str,
)
def test_rows_that_cannot_be_there_are_refused(store: Path, group: dict[str, Any]) -> None:
    before = contents(store)
    forge_record(record_of(store, "1"), lambda body: body["parts"][0]["groups"][0].update(group))
    with pytest.raises(StoreDamaged):
        Store.open(store).bag("1")
    assert {finding.case for finding in verify(store).damage} == {"1"}
    assert repair(store, apply=True, level="default").left == []
    assert verify(store, "full").damage == []
    found = contents(store)
    assert found.items() <= before.items()
    assert {key for key in before if key[0] != "1"} <= found.keys()


DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"null", b"[]", b"{}", b'"\\ud800"', b"\xff\xfe"]


@pytest.mark.parametrize("data", DEEP, ids=range(len(DEEP)))
@pytest.mark.parametrize("which", ["record", "description"])
def test_json_that_is_deep_or_nothing(store: Path, data: bytes, which: str) -> None:
    file = LINKED[which](store)
    file.write_bytes(data)
    with pytest.raises(StoreDamaged):
        Store.open(store).bag("1")
    (found,) = verify(store).damage
    assert found.file == str(file.relative_to(store))
    assert repair(store, apply=True).left == []
    assert verify(store).damage == []


# Code and formulas -----------------------------------------------------------------------------


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_of_splits_is_not_run(tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "s.npz"
    np.savez(file, train_cases=np.array([Trap(trap)], object), val_cases=["b"], test_cases=["c"])
    with pytest.raises(CohortError, match="can run code"):
        read_split(file, ["a", "b", "c"], {})
    assert not trap.exists()
    with np.load(file, allow_pickle=True) as loaded:  # the trap works where nothing is in its way
        _ = loaded["train_cases"]
    assert trap.exists()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " =", "\n="])
def test_no_cell_of_a_table_of_findings_is_a_formula(tmp_path: Path, start: str) -> None:
    hostile = start + "cmd|' /C calc'!A0"
    report = VerifyReport("store", "full", findings=[Finding(hostile, hostile, hostile, hostile, hostile)])
    report.write_csv(tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert sum("calc" in cell for cell in cells) == 5
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+", "-", "@"))]
    assert not [cell for cell in cells if set(cell) & set("\t\r\n")]
