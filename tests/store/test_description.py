"""A lost featstore.json is made anew, byte for byte, exactly when the records and the parts agree."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from featstore.errors import StoreDamaged, StoreError
from featstore.store import Store, StoreWriter, description
from featstore.store.format import decode_manifest, decode_record, encode_record
from featstore.store.maintenance import gc, repair, rm
from featstore.store.verify import verify
from tests.command_line import listing
from tests.store.builders import make_slice, make_spec
from tests.store.damage import (
    break_part,
    contents,
    ended,
    flip,
    kill_at,
    part_of,
    record_of,
    refill,
    started,
)

pytestmark = pytest.mark.filterwarnings("error")
Damage = Callable[[Path], object]


@pytest.fixture
def store(small_store: Path) -> Path:
    return small_store


@pytest.fixture
def hdf5_store(small_stores: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_stores["hdf5"], tmp_path / "store"))


def lose(manifest: Path) -> None:
    manifest.unlink()


def empty(manifest: Path) -> None:
    manifest.write_bytes(b"")


def change_a_value(manifest: Path) -> None:
    manifest.write_bytes(manifest.read_bytes().replace(b"bilinear", b"nearest_"))


def change_the_name_of_a_field(manifest: Path) -> None:
    manifest.write_bytes(manifest.read_bytes().replace(b"weights_sha256", b"weights_sha255"))


def change_the_version(manifest: Path) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": ["featstore", 3, 1]}))


def put_another_store_s_in_its_place(manifest: Path) -> None:
    other = manifest.parent.parent / "other"
    StoreWriter(other, make_spec(pool=2), {})
    shutil.copy(other / "featstore.json", manifest)


def link_it(manifest: Path) -> None:
    manifest.rename(manifest.parent.parent / "moved.json")
    manifest.symlink_to(manifest.parent.parent / "moved.json")


def put_a_folder_in_its_place(manifest: Path) -> None:
    manifest.unlink()
    manifest.mkdir()


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lose, "manifest-missing"),
        (empty, "manifest-damaged"),
        (change_a_value, "manifest-damaged"),
        (change_the_name_of_a_field, "manifest-damaged"),
        (change_the_version, "manifest-damaged"),
        (put_another_store_s_in_its_place, "manifest-foreign"),
        (link_it, "link"),
        (put_a_folder_in_its_place, "manifest-damaged"),
    ],
)
def test_a_lost_description_is_made_anew_byte_for_byte(store: Path, damage: Damage, kind: str) -> None:
    whole, before, good = listing(store), contents(store), (store / "featstore.json").read_bytes()
    damage(store / "featstore.json")
    broken = listing(store)
    for level in ("quick", "full"):
        (found,) = verify(store, level).damage
        assert (found.file, found.kind) == ("featstore.json", kind)
        assert "`featstore repair --apply` makes it anew from 6 parts" in found.expected
    planned = repair(store)
    assert listing(store) == broken
    assert planned.exit_code == 1
    assert "featstore.json would be made anew from 6 parts" in planned.to_text()
    assert "featstore repair --apply" in planned.to_text()
    report = repair(store, apply=True)
    assert (report.exit_code, report.repairs, report.left) == (0, [], [])
    assert "featstore.json was made anew from 6 parts" in report.to_text()
    assert report.description is not None
    assert json.loads(json.dumps(report.to_json()))["description"]["parts"] == 6
    assert (store / "featstore.json").read_bytes() == good
    assert not (store / "featstore.json").is_symlink()
    if damage is lose:
        assert (report.description.moved, listing(store)) == ((), whole)
    else:
        assert report.description.moved == ("featstore.json",)
        assert report.quarantine is not None
        assert os.path.lexists(Path(report.quarantine) / "featstore.json")
    assert (contents(store), verify(store, "full").damage) == (before, [])
    again = repair(store, apply=True)
    assert (again.description, again.repairs, again.exit_code) == (None, [], 0)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data.replace(b"  ", b" ")])
def test_a_description_that_is_only_spelt_otherwise(
    hdf5_store: Path, change: Callable[[bytes], bytes]
) -> None:
    """Readers take it; verify tells, and repair writes it as it was: it proves itself, without parts."""
    manifest = hdf5_store / "featstore.json"
    good = manifest.read_bytes()
    for part in hdf5_store.glob("cases/*/*"):
        part.unlink()
    manifest.write_bytes(change(good))
    assert Store.open(hdf5_store).spec == make_spec()
    (found,) = verify(hdf5_store).damage
    assert "not byte for byte" in found.found
    assert "made anew\n" in repair(hdf5_store, apply=True).to_text()
    assert (manifest.read_bytes(), verify(hdf5_store).damage) == (good, [])


def break_every_part(store: Path) -> None:
    for part in store.glob("cases/*/*"):
        if not part.name.endswith(".json"):
            part.write_bytes(b"\0" * part.stat().st_size)


def break_every_record(store: Path) -> None:
    for record in store.glob("cases/*/*.json"):
        flip(record, 100)


def make_a_record_of_another_store(store: Path) -> None:
    file = record_of(store, "2")
    file.write_bytes(encode_record(replace(decode_record(file.read_bytes(), ""), fingerprint="f" * 32)))


def make_a_record_of_another_version(store: Path) -> None:
    file = record_of(store, "2")
    from featstore.store import format as module

    with pytest.MonkeyPatch.context() as patch:
        record = decode_record(file.read_bytes(), "")
        patch.setattr(module, "VERSION", (9, 9))
        file.write_bytes(encode_record(record))


@pytest.mark.parametrize("damage", [lose, empty], ids=["missing", "empty"])
@pytest.mark.parametrize(
    ("more", "why"),
    [
        (break_every_part, "no part that can be read has the records' fingerprint"),
        (break_every_record, "no case has a newest record that can be read"),
        (make_a_record_of_another_store, "the newest records have different fingerprints"),
        (
            make_a_record_of_another_version,
            "the newest record of case 2: the format is ['featstore', 9, 9]",
        ),
    ],
)
def test_a_description_that_nothing_proves_is_not_made(
    store: Path, more: Damage, damage: Damage, why: str
) -> None:
    more(store)
    damage(store / "featstore.json")
    before = listing(store)
    found = verify(store, "quick").damage[0]
    assert found.file == "featstore.json"
    assert "the file from a backup" in found.expected
    assert why in found.expected
    report = repair(store, apply=True)
    assert listing(store) == before
    assert (report.exit_code, report.repairs, report.description) == (1, [], None)
    assert why in report.to_text()
    assert "nothing that repair can mend" in report.to_text()


@pytest.mark.parametrize("keep", [0, 1], ids=["a record", "a part"])
def test_one_witness_for_a_good_description_is_enough(hdf5_store: Path, keep: int) -> None:
    """Records copied here from another store must not pass for the store's own."""
    for case in ("1", "2", "TCGA-AA")[1 - keep :]:
        file = next(
            path for path in hdf5_store.glob("cases/*/000002.json") if f'"{case}"' in path.read_text()
        )
        record = decode_record(file.read_bytes(), "")
        file.write_bytes(encode_record(replace(record, fingerprint=make_spec(pool=2).fingerprint)))
    if keep:  # every record is of the other store, and so is a part; the other parts are not
        other = hdf5_store.parent / "other"
        StoreWriter(other, make_spec(pool=2), {}).commit("1", [make_slice("1", "x", "s", [1])])
        shutil.copy(part_of(other, "1"), hdf5_store / "cases" / "1")
    good = (hdf5_store / "featstore.json").read_bytes()
    assert {finding.kind for finding in verify(hdf5_store).damage} == {"record-damaged"}
    assert repair(hdf5_store, apply=True).description is None
    assert (hdf5_store / "featstore.json").read_bytes() == good


def test_parts_of_another_store_tell_nothing(store: Path) -> None:
    other, good = store.parent / "other", (store / "featstore.json").read_bytes()
    StoreWriter(other, make_spec(pool=2), {}).commit("1", [make_slice("1", "x", "s", [1])])
    for digit in "0f":
        shutil.copy(part_of(other, "1"), store / "cases" / "2" / f"{digit * 32}.h5")
    (store / "featstore.json").unlink()
    report = repair(store, apply=True)
    assert report.description is not None
    assert report.description.parts == 6
    assert (store / "featstore.json").read_bytes() == good


def test_other_damage_is_mended_in_the_same_run(store: Path) -> None:
    before = contents(store)
    break_part(store)
    flip(record_of(store, "2"), 100)
    (store / "featstore.json").unlink()
    planned = repair(store)
    report = repair(store, apply=True)
    assert len(report.repairs) == len(planned.repairs) == 2
    assert report.description is not None
    assert (refill(store, patches=4), contents(store)) == (16, before)
    assert verify(store, "full").damage == []


def test_an_empty_store_can_tell_too(store: Path) -> None:
    """No row is live any more, but the parts are still there."""
    good = (store / "featstore.json").read_bytes()
    rm(store, cases=["1", "2", "TCGA-AA"], apply=True)
    (store / "featstore.json").unlink()
    repair(store, apply=True)
    assert (store / "featstore.json").read_bytes() == good


def test_the_oldest_store_can_tell_too(tmp_path: Path) -> None:
    store = Path(shutil.copytree(Path(__file__).parent / "golden" / "1.0", tmp_path / "store"))
    spec = Store.open(store).spec
    (store / "featstore.json").unlink()
    repair(store, apply=True)
    assert Store.open(store).spec == spec
    assert verify(store, "full").damage == []


@pytest.mark.parametrize(
    "work",
    [Store.open, gc, lambda path: rm(path, cases=["1"])],
    ids=["read", "gc", "rm"],
)
def test_everyone_else_says_what_to_do(hdf5_store: Path, work: Callable[[Path], object]) -> None:
    (hdf5_store / "featstore.json").unlink()
    before = listing(hdf5_store)
    with pytest.raises(StoreDamaged, match=r"featstore\.json.*missing") as error:
        work(hdf5_store)
    assert "featstore repair --apply" in error.value.fix
    assert listing(hdf5_store) == before


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_the_description_blocks_nothing(hdf5_store: Path) -> None:
    (hdf5_store / "featstore.json").unlink()
    os.mkfifo(hdf5_store / "featstore.json")
    with pytest.raises(StoreError):
        Store.open(hdf5_store)
    assert [finding.kind for finding in verify(hdf5_store).damage] == ["manifest-damaged"]


def test_every_bit_of_the_description_counts(hdf5_store: Path) -> None:
    """But for the minor version, which no reader goes by."""
    good = (hdf5_store / "featstore.json").read_bytes()
    minor = range(good.rindex(b",", 0, good.index(b"]")), good.index(b"]"))
    spec, harmless = decode_manifest(good, ""), set()
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            try:
                assert decode_manifest(bytes(bad), "") == spec
                harmless.add(at)
            except StoreError:
                continue
    assert harmless <= set(minor)


def test_killed_at_every_step(small_stores: dict[str, Path], tmp_path: Path) -> None:
    whole, step = small_stores["zarr"], 0
    good, before = (whole / "featstore.json").read_bytes(), contents(whole)
    while True:
        step += 1
        path = Path(shutil.copytree(whole, tmp_path / str(step)))
        flip(path / "featstore.json", 200)
        code = kill_at(step, lambda path=path: repair(path, apply=True))  # type: ignore[misc]
        repair(path, apply=True)
        assert (path / "featstore.json").read_bytes() == good
        assert (verify(path, "full").damage, contents(path)) == ([], before)
        if code == 0:
            break
        assert code == -9
    assert step > 8


def test_several_repairs_at_once(hdf5_store: Path) -> None:
    good = (hdf5_store / "featstore.json").read_bytes()
    for k in range(5):
        flip(hdf5_store / "featstore.json", random.Random(k).randrange(100, len(good)))
        children = [started(lambda: repair(hdf5_store, apply=True)) for _ in range(3)]
        assert [ended(child) for child in children] == [0] * 3
        assert (hdf5_store / "featstore.json").read_bytes() == good


def test_a_damaged_description_that_another_repair_has_mended_meanwhile(
    hdf5_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read with a field's name damaged, is moved aside at once, and then it is there again."""
    manifest = hdf5_store / "featstore.json"
    good, real = manifest.read_bytes(), description.require_manifest
    manifest.write_bytes(good.replace(b'"resize"', b'"rerize"'))

    def moved(root: Path) -> object:
        try:
            return real(root)
        except StoreError:
            manifest.unlink()
            monkeypatch.setattr(description, "require_manifest", mended)
            raise

    def mended(root: Path) -> object:
        manifest.write_bytes(good)
        return real(root)

    monkeypatch.setattr(description, "require_manifest", moved)
    found = description.look_at_description(hdf5_store)
    assert (found.kind, found.obstacle) == ("", "")


def test_a_description_that_another_repair_moves_meanwhile(
    hdf5_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read, then it is gone for a moment, and then it is there again."""
    manifest = hdf5_store / "featstore.json"
    good, real = manifest.read_bytes(), description.read_plain

    def gone(path: Path) -> bytes:
        manifest.unlink()
        try:
            return real(path)
        finally:
            manifest.write_bytes(good)

    monkeypatch.setattr(description, "read_plain", gone)
    assert verify(hdf5_store).findings == []
    found = description.look_at_description(hdf5_store)
    late = replace(found, kind="manifest-missing", found="gone", parts=6)
    monkeypatch.setattr("featstore.store.verify.look_at_description", lambda path: late)
    report = repair(hdf5_store, apply=True)
    assert (report.description, report.left, report.quarantine) == (None, [], None)
    assert manifest.read_bytes() == good
