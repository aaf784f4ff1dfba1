"""In which order patches are computed, and that the store does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import FeatstoreError
from featstore.extraction import committer as committing
from featstore.extraction import schedule
from featstore.extraction.committer import Batch, Committer
from featstore.extraction.loading import Loaded
from featstore.extraction.schedule import Schedule
from featstore.store import Store, StoreWriter
from featstore.store.verify import verify
from tests.extraction.conftest import contents
from tests.store.builders import DIM, make_spec

VIEWS = 3
SIDES = st.sampled_from([32, 40, 64, 224])


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), max_size=60),
    left_out=st.sets(st.integers(0, 59)),
    budget=st.integers(1, 60_000),
    views=st.integers(1, 4),
    window=st.integers(1, 20),
)
def test_every_row_comes_once_with_its_like_within_its_window(
    sizes: list[tuple[int, int]], left_out: set[int], budget: int, views: int, window: int
) -> None:
    table = np.array(sizes, np.int64).reshape(-1, 2)
    rows = np.array([row for row in range(len(sizes)) if row not in left_out], np.int64)

    def forward_size(height: int, width: int) -> int:
        return max(1, budget // (height * width))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "WINDOW", window)
        batches = list(Schedule(table, rows).batches(forward_size, views))
    order = [row for batch in batches for row in batch.tolist()]
    assert sorted(order) == rows.tolist()
    one_size = len({sizes[row] for row in order}) <= 1
    place = {row: at for at, row in enumerate(rows.tolist())}
    for batch in batches:
        assert len({sizes[row] for row in batch}) == 1
        assert (np.diff(batch) > 0).all()
        images = len(batch) * views
        assert images <= max(views, forward_size(*sizes[batch[0]]))
        if not one_size:
            assert len({place[row] // window for row in batch.tolist()}) == 1
    if one_size:
        assert order == sorted(order)
    else:
        seen = [place[row] // window for row in order]
        assert seen == sorted(seen)


def test_batches_are_as_full_as_the_window_lets_them() -> None:
    sizes = np.array([(32, 32), (64, 64)] * 10)
    batches = list(Schedule(sizes, np.arange(20)).batches(lambda height, width: 4))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]


def test_patches_of_one_size_are_in_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "WINDOW", 6)
    sizes = np.full((20, 2), 224)
    batches = list(Schedule(sizes, np.arange(20)).batches(lambda height, width: 8))
    assert [len(batch) for batch in batches] == [8, 8, 4]


# The committer

PENDING = pd.DataFrame(
    [
        (case, stain, "match_1", patch, f"{case}_{stain}_{patch}.png")
        for case in ("1", "2", "10")
        for stain in ("h&e", "melan")
        for patch in (1, 2, 3, 10)
    ],
    columns=["case_id", "stain", "slice_id", "patch", "path"],
)
ROWS = len(PENDING)
SPEC = make_spec(dim=DIM).with_views(VIEWS, 7, "test")


class _Ready:
    """Features that are there already."""

    def __init__(self, features: np.ndarray) -> None:
        self._features = features

    def result(self) -> np.ndarray:
        return self._features


def embedding(row: int) -> np.ndarray:
    return (np.arange(VIEWS * DIM) + 100 * row).reshape(VIEWS, DIM).astype(np.float16)


def batch(rows: list[int], failed: list[int] | None = None) -> Batch:
    loaded = [
        Loaded(
            pixels=np.empty((0, 0, 0, 3), np.uint8),
            quality=np.full(8, row, np.float32),
            stat=np.array([row, row], np.int64),
            sha256=np.full(32, row, np.uint8),
            converted="",
        )
        for row in rows
    ]
    features: Any = _Ready(np.concatenate([embedding(row) for row in rows])) if rows else None
    return Batch(np.array(rows, np.int64), features, loaded, failed or [])


def fill(path: Path, batches: list[Batch], **settings: Any) -> StoreWriter:
    writer = StoreWriter(path, SPEC, {})
    options = {"part_bytes": 1 << 20, "part_seconds": 1e6, "views": VIEWS, **settings}
    committer = Committer(writer, PENDING, **options)
    for each in batches:
        committer.put(each)
    committer.close()
    return writer


def held(path: Path) -> dict[str, tuple[bytes, bytes, Any]]:
    """Everything that a reader sees of each case."""
    store = Store.open(path)
    return {
        case: (
            store.bag(case).features.tobytes(),
            store.views(case).tobytes(),
            store.sources(case)[["stain", "slice_id", "patch", "path", "sha256"]].to_dict("list"),
        )
        for case in store.cases()
    }


def part_count(path: Path) -> int:
    return len(list(path.glob("cases/*/*.h5")))


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in_order") / "store"
    fill(path, [batch(list(range(at, at + 4))) for at in range(0, ROWS, 4)])
    return path


def shuffled(seed: int, size: int = 3) -> list[list[int]]:
    order = np.random.default_rng(seed).permutation(ROWS).tolist()
    return [sorted(order[at : at + size]) for at in range(0, ROWS, size)]


@pytest.mark.parametrize("seed", range(4))
def test_rows_out_of_order_make_the_same_store(in_order: Path, tmp_path: Path, seed: int) -> None:
    fill(tmp_path / "store", [batch(rows) for rows in shuffled(seed)])
    assert held(tmp_path / "store") == held(in_order)
    assert part_count(tmp_path / "store") == part_count(in_order) == 3  # one a case
    assert verify(tmp_path / "store", "full").damage == []


def test_each_row_keeps_its_own_embedding(in_order: Path) -> None:
    store = Store.open(in_order)
    paths = PENDING["path"].tolist()
    for case in store.cases():
        views = store.views(case)
        for i, path in enumerate(store.sources(case)["path"]):
            want = embedding(paths.index(path))
            assert np.array_equal(store.bag(case).features[i], want[0])
            assert np.array_equal(views[i], want[1:])


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_never_come_hold_nothing_back(tmp_path: Path, seed: int) -> None:
    bad = {0, 5, 11, 23}
    batches = [
        batch([row for row in rows if row not in bad], [row for row in rows if row in bad])
        for rows in shuffled(seed)
    ]
    fill(tmp_path / "store", batches)
    assert len(contents(tmp_path / "store")) == ROWS - len(bad)
    assert part_count(tmp_path / "store") == 3


def test_a_bad_first_row_does_not_make_the_others_wait(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", SPEC, {})
    committer = Committer(writer, PENDING, 1, 1e6, views=VIEWS)  # each row is a part of its own
    committer._add(batch([1, 2, 3], [0]))
    assert committer.committed == 2  # the last is in the open part
    committer.close()
    assert committer.committed == 3


def test_rows_that_the_schedule_leaves_out_are_not_waited_for(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", SPEC, {})
    rows = np.array([1, 3, 4, 5], np.int64)
    committer = Committer(writer, PENDING, 1, 1e6, rows, VIEWS)
    committer._add(batch([1, 3, 4, 5]))
    assert committer.committed == 3
    committer.close()


def test_a_stop_in_the_middle_keeps_what_waits(tmp_path: Path) -> None:
    fill(tmp_path / "store", [batch([2, 9, 17]), batch([3, 20])])
    paths = sorted(Store.open(tmp_path / "store").table()["path"])
    assert paths == sorted(PENDING["path"].iloc[[2, 3, 9, 17, 20]])
    fill(tmp_path / "store", [batch([row for row in range(ROWS) if row not in (2, 3, 9, 17, 20)])])
    assert len(contents(tmp_path / "store")) == ROWS


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committer's own thread leaves alone what a test hands over."""
    monkeypatch.setattr(committing, "_IDLE_SECONDS", 60.0)


def test_what_waits_is_released_in_time(in_order: Path, tmp_path: Path, patient: None) -> None:
    writer = StoreWriter(tmp_path / "store", SPEC, {})
    committer = Committer(writer, PENDING, 1 << 20, 0.0, views=VIEWS)
    for done, rows in ((2, [6, 7]), (4, [20, 21])):
        committer._add(batch(rows))
        assert committer.committed == done
    late = [row for row in range(ROWS) if row not in (6, 7, 20, 21)]
    committer._add(batch(late))
    committer.close()
    assert committer.committed == ROWS
    assert held(tmp_path / "store") == held(in_order)


def test_what_was_released_is_not_waited_for_again(tmp_path: Path, patient: None) -> None:
    writer = StoreWriter(tmp_path / "store", SPEC, {})
    committer = Committer(writer, PENDING, 1 << 20, 0.0, views=VIEWS)
    committer._add(batch([1, 2]))
    assert committer.committed == 2
    committer._part_seconds = 1e6
    committer._add(batch([0, 3, 4, 5, 6, 7, 8]))  # the last is of another case
    assert committer.committed == 8
    committer.close()


def test_an_embedding_that_is_not_finite_names_its_patch_wherever_it_comes(tmp_path: Path) -> None:
    broken = batch([8, 3])
    features = np.concatenate([embedding(8), embedding(3)])
    features[VIEWS + 1, 2] = np.nan  # the second patch's second view
    with pytest.raises(FeatstoreError, match=PENDING["path"][3]):
        fill(tmp_path / "store", [Batch(broken.rows, _Ready(features), broken.loaded)])  # type: ignore[arg-type]
