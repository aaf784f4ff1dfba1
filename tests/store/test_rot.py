"""Bits that turn over, files that are cut short, emptied or deleted: `verify` sees every one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from featstore.store.maintenance import repair
from featstore.store.verify import verify
from tests.store.damage import CASES, contents, dose, flip, parts_of, record_of, refill, spot

pytestmark = pytest.mark.filterwarnings("error")
LEVELS = ("quick", "default", "full")


@pytest.fixture(params=["hdf5", "zarr"])
def whole(whole_stores: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return whole_stores[request.param]


def flip_bits(store: Path, count: int) -> None:
    """Turn bits over one at a time, and hold what each level of `verify` finds against it."""
    chance, before = random.Random(count), contents(store)
    unseen = flips = 0
    for kind in dose(count):
        file, at = spot(store, kind, chance)
        kept = file.read_bytes()
        flip(file, at, chance.randrange(8))
        full, name = verify(store, "full"), str(file.relative_to(store))
        seen = full.findings if kind == "old record" else full.damage
        assert name in [finding.file for finding in seen], (kind, file, at)
        if name not in [finding.file for finding in verify(store).findings]:
            # Bytes that no value hangs on, such as gaps between HDF5's structures.
            assert kind == "metadata", (kind, file, at)
            assert contents(store) == before
            unseen += 1
        file.write_bytes(kept)
        flips += 1
    assert flips == count
    assert unseen < flips / 4
    assert verify(store, "full").findings == []


def test_every_flipped_bit_is_found_by_full_and_in_values_by_default(store: Path) -> None:
    flip_bits(store, 60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_hundred_flipped_bits_are_found(store: Path) -> None:
    flip_bits(store, 500)


def mend_flipped_bits(store: Path, count: int) -> None:
    """After every flip, repair and writing anew what is missing give the same embeddings, bit for bit."""
    chance, before = random.Random(count), contents(store)
    manifest = (store / "featstore.json").read_bytes()
    for kind in dose(count):
        file, at = spot(store, kind, chance)
        flip(file, at, chance.randrange(8))
        report = repair(store, apply=True)
        assert report.left == []
        assert (report.description is not None) == (kind == "description")
        assert len(report.repairs) == (kind != "description")
        # A part and its rows, or a case, and nothing else.
        assert refill(store) in {"payload": (40, 80), "metadata": (40, 80), "record": (120,)}.get(
            kind, (0,)
        )
        assert contents(store) == before
        assert verify(store, "full").damage == []
    assert (store / "featstore.json").read_bytes() == manifest


def test_flipped_bits_are_mended(store: Path) -> None:
    mend_flipped_bits(store, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_flipped_bits_are_mended(store: Path) -> None:
    mend_flipped_bits(store, 100)


@pytest.mark.parametrize("level", LEVELS)
def test_every_file_that_is_cut_short_emptied_or_deleted_is_found(store: Path, level: str) -> None:
    """A part of the newest record or a newest record that is cut; the description; parts deleted."""
    chance = random.Random(0)
    victims = [*parts_of(store), *(record_of(store, case) for case in CASES), store / "featstore.json"]
    assert len(victims) == 10
    for file in victims:
        kept = file.read_bytes()
        size = len(kept)
        for length in (0, 1, size // 3, size // 2, size - 512, size - 1, chance.randrange(size), None):
            if length is None:
                file.unlink()
            else:
                file.write_bytes(kept[: max(0, length)])
            report = verify(store, level)
            if length is None and file.name.startswith("0000"):
                # The record before it may be the newest one; what shows is a part that no record names.
                assert [note.kind for note in report.notes] == ["part-unnamed"]
                assert "a newer record was deleted" in report.notes[0].found
            else:
                assert [finding.file for finding in report.damage] == [str(file.relative_to(store))]
                assert report.exit_code == 1
                assert "DAMAGE" in report.to_text()
                assert "featstore repair" in report.to_text()
            file.write_bytes(kept)
    assert verify(store, level).findings == []


def test_all_records_of_a_case_deleted(store: Path) -> None:
    for file in (store / "cases" / "2").glob("*.json"):
        file.unlink()
    kinds = [note.kind for note in verify(store).notes]
    assert sorted(kinds) == ["no-record", *["part-unnamed"] * 2]
