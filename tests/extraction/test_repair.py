"""Damage, `repair --apply`, and a real extraction: the store is what it was, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from featstore.store.maintenance import repair
from featstore.store.verify import verify
from tests.extraction.conftest import Zygote, contents, make_project
from tests.store.damage import dose, flip, parts_of, record_of, spot

PER_PART = 2 * 2 * 3


@pytest.fixture(scope="module", params=["hdf5", "zarr"])
def extracted(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    project = make_project(
        tmp_path_factory.mktemp("extracted"), cases=3, stains=("h&e", "sox10"), slices=2, patches=3
    )
    settings = json.loads((project / "featstore.yaml").read_text())
    (project / "featstore.yaml").write_text(json.dumps({**settings, "store": {"format": request.param}}))
    assert zygote.run({"project": project})[0] == [0]
    return project


@pytest.fixture
def project(extracted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extracted, tmp_path / "project"))


def repaired(zygote: Zygote, project: Path, damage: Callable[[Path], object]) -> int:
    """Damage a store and make it whole; how many embeddings were computed again."""
    store = project / "store"
    before, manifest = contents(store), (store / "featstore.json").read_bytes()
    damage(store)
    assert verify(store, "full").findings != []
    assert repair(store, apply=True).left == []
    codes, reports, _ = zygote.run({"project": project})
    assert codes == [0], reports
    assert contents(store) == before
    assert (store / "featstore.json").read_bytes() == manifest
    assert verify(store, "full").damage == []
    return int(reports[0]["committed"])


def flip_bits(zygote: Zygote, project: Path, count: int) -> None:
    chance = random.Random(count)
    for kind in dose(count):
        again = repaired(zygote, project, lambda store: flip(*spot(store, kind, chance)))  # noqa: B023
        assert again == (0 if kind == "description" else PER_PART) or kind == "old record"


def test_a_flipped_bit_costs_one_case(zygote: Zygote, project: Path) -> None:
    flip_bits(zygote, project, 5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixty_flipped_bits(zygote: Zygote, project: Path) -> None:
    flip_bits(zygote, project, 60)


def cut_a_part(store: Path) -> None:
    part = parts_of(store)[0]
    part.write_bytes(part.read_bytes()[:-100])


def lose_every_part_and_the_description(store: Path) -> None:
    """The description goes last but one part, which tells it."""
    for part in parts_of(store)[1:]:
        part.unlink()
    (store / "featstore.json").unlink()


def empty_all_records(store: Path) -> None:
    for case in ("1", "2", "3"):
        record_of(store, case).write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "again"),
    [(cut_a_part, 1), (lose_every_part_and_the_description, 2), (empty_all_records, 3)],
)
def test_files_that_are_cut_deleted_or_emptied(
    zygote: Zygote, project: Path, damage: Callable[[Path], object], again: int
) -> None:
    assert repaired(zygote, project, damage) == again * PER_PART
