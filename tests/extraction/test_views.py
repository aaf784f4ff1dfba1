"""Cached augmented views: what they depend on, and what they leave alone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.backbones import build_backbone
from featstore.config import BackboneConfig
from featstore.errors import FingerprintMismatch
from featstore.extraction.forward import make_embedder
from featstore.extraction.views import make_views
from featstore.images import Preprocessing, decode, prepare
from featstore.store import Store
from featstore.store.records import read_manifest
from featstore.store.verify import verify
from tests.extraction.conftest import TINY, Zygote, contents, make_project
from tests.extraction.test_extract import patch_file, run
from tests.extraction.test_native import SIZES, make_native

VIEWS = {"extract__views": 3}
MEAN = (0.5, 0.5, 0.5)
FIXED = Preprocessing(32, None, "bilinear", MEAN, MEAN)
NATIVE = Preprocessing("native", None, "bilinear", MEAN, MEAN)
BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
Views = dict[tuple[str, str, str, int], bytes]


def held_views(store: Path) -> Views:
    """Every patch's augmented views by its key, as bytes."""
    view = Store.open(store)
    table = view.table()
    return {
        (row.case_id, row.stain, row.slice_id, row.patch): values.tobytes()
        for case in view.cases()
        for row, values in zip(
            table.loc[view.outline(case).rows].itertuples(), view.views(case), strict=True
        )
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path, cases=2, stains=("h&e",), slices=2, patches=7)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


# Pixels


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    native=st.booleans(),
)
def test_views_are_of_one_size_and_the_first_is_plain(
    size: tuple[int, int], count: int, seed: int, native: bool
) -> None:
    pixels, preprocessing = noise(*size), NATIVE if native else FIXED
    before = pixels.copy()
    views = make_views(pixels, preprocessing, count, seed, "a")
    assert views.shape == (count, *preprocessing.input_size(*size), 3)
    assert np.array_equal(views[0], prepare(pixels, preprocessing))
    assert np.array_equal(pixels, before)
    more = make_views(pixels, preprocessing, count + 1, seed, "a")
    assert np.array_equal(more[:count], views)  # a view's number alone counts, not how many there are


def test_seed_patch_and_number_each_change_a_view() -> None:
    pixels = noise(40, 40)
    views = make_views(pixels, FIXED, 8, 0, "a")
    assert len({view.tobytes() for view in views}) == 8
    for seed, key in ((1, "a"), (0, "b")):
        other = make_views(pixels, FIXED, 8, seed, key)
        assert all((a != b).any() for a, b in zip(views[1:], other[1:], strict=True))


def test_native_views_are_turned_flipped_and_coloured_but_not_cropped() -> None:
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[:20, :30] = 200
    corners = set()
    for view in make_views(ramp, NATIVE, 40, 0, "a")[1:]:
        bright = view[..., 0] > 100
        assert bright.sum() == 20 * 30
        corners.add((bool(bright[0, 0]), bool(bright[0, -1]), bool(bright[-1, 0]), bool(bright[-1, -1])))
    assert len(corners) == 4


def test_colours_change_by_little() -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)
    means = np.stack([view.mean((0, 1)) for view in make_views(grey, FIXED, 60, 0, "a")[1:]])
    assert 128 * 0.9**2 - 1 <= means.min() < 120
    assert 136 < means.max() <= 128 * 1.1**2 + 1
    assert np.ptp(means, axis=1).max() > 5  # channels of their own


# Stores


@pytest.mark.parametrize("file_format", ["hdf5", "zarr"])
def test_the_plain_view_is_that_of_a_store_without_views(project: Path, file_format: str) -> None:
    run(project, store__path="plain")
    report = run(project, **VIEWS, store__format=file_format)
    assert report.committed == 28
    assert contents(project / "store") == contents(project / "plain")
    store = Store.open(project / "store")
    for case in store.cases():
        views = store.views(case)
        assert (views.shape, views.dtype) == ((14, 2, store.spec.dim), np.float16)
        rows = np.concatenate((store.bag(case).features[:, None], views), axis=1).reshape(42, -1)
        assert len(np.unique(rows, axis=0)) == 42
    assert verify(project / "store", "full").damage == []
    assert Store.open(project / "plain").views("1").shape == (14, 0, store.spec.dim)


def test_a_view_is_the_embedding_of_its_pixels(project: Path) -> None:
    run(project, **VIEWS, extract__view_seed=5)
    store = Store.open(project / "store")
    backbone = build_backbone(BackboneConfig(**TINY), project)
    embed = make_embedder(
        backbone, torch.device("cpu"), "float32", store.spec.stored_dtype, 4, store.spec.runtime, False
    )
    row = store.table().iloc[14 + 9]  # the tenth patch of the second case
    data = (project / "patches" / row["path"]).read_bytes()
    key = "\0".join((row["case_id"], row["stain"], row["slice_id"], str(row["patch"])))
    pixels = decode(data, row["path"], "rgb", 10**9).pixels
    want = embed(make_views(pixels, backbone.preprocessing, 3, 5, key)).result()
    assert np.array_equal(store.views("2")[9], want[1:])
    assert np.array_equal(store.bag("2").features[9], want[0])


def test_views_depend_on_the_seed_and_ids_alone(project: Path) -> None:
    run(project, **VIEWS)
    whole = held_views(project / "store")
    # Two shards, the second first, in other batches.
    for shard in ("1/2", "0/2"):
        run(project, **VIEWS, store__path="shards", extract__shard=shard, extract__workers=1)
    assert held_views(project / "shards") == whole
    run(project, **VIEWS, store__path="seed", extract__view_seed=1)
    other = held_views(project / "seed")
    assert all(other[key] != values for key, values in whole.items())
    assert contents(project / "seed") == contents(project / "store")
    # The same pixels as another patch have other views.
    added = patch_file(project, "1", "match_1", "h&e", 99)
    shutil.copy(patch_file(project, "1", "match_1", "h&e", 1), added)
    run(project, **VIEWS)
    found, plain = held_views(project / "store"), contents(project / "store")
    assert whole.items() < found.items()
    first, last = ("1", "h&e", "match_1", 1), ("1", "h&e", "match_1", 99)
    assert plain[first] == plain[last]
    assert found[first] != found[last]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extract__views": 4}, "views: 4 here, 3 there"),
        ({"extract__views": 1}, "views: 1 here, 3 there"),
        ({**VIEWS, "extract__view_seed": 1}, "view_seed: 1 here, 0 there"),
    ],
)
def test_a_store_keeps_its_number_and_seed_of_views(
    project: Path, changes: dict[str, int], says: str
) -> None:
    run(project, **VIEWS)
    with pytest.raises(FingerprintMismatch, match=says):
        run(project, **changes)
    assert run(project, **VIEWS).committed == 0


@pytest.mark.parametrize("said", [{}, VIEWS], ids=["nothing said", "the number said"])
def test_a_later_run_makes_the_views_that_the_store_has(project: Path, said: dict[str, int]) -> None:
    run(project, **VIEWS, extract__view_seed=5)
    whole = held_views(project / "store")
    shutil.copytree(project / "patches", project / "all")
    for patch in (2, 5):
        patch_file(project, "1", "match_1", "h&e", patch).unlink()
    run(project, **VIEWS, extract__view_seed=5, store__path="later")
    assert len(held_views(project / "later")) == len(whole) - 2
    report = run(project, **said, patches__folder="all", store__path="later")
    assert report.committed == 2
    assert held_views(project / "later") == whole


def test_a_new_store_has_no_views_unless_they_are_asked_for(project: Path) -> None:
    run(project, extract__view_seed=5)
    assert Store.open(project / "store").spec.views == 1
    with pytest.raises(FingerprintMismatch, match="views: 3 here, 1 there"):
        run(project, **VIEWS)
    assert run(project).committed == 0


def test_views_of_another_kind_are_not_added_to(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.extraction.setup.VIEW_POLICY", "of long ago")
    run(project, **VIEWS)
    monkeypatch.undo()
    with pytest.raises(FingerprintMismatch, match="here, of long ago there"):
        run(project)


@pytest.mark.parametrize("file_format", ["hdf5", "zarr"])
def test_a_file_that_moved_keeps_its_views(project: Path, file_format: str) -> None:
    settings = {**VIEWS, "store__format": file_format}
    run(project, **settings)
    before = held_views(project / "store"), contents(project / "store")
    below = project / "patches" / "below"
    below.mkdir()
    for patch in (2, 5):
        file = patch_file(project, "1", "match_1", "h&e", patch)
        file.rename(below / file.name)
    report = run(project, **settings)
    assert (report.committed, report.refreshed) == (0, 2)
    assert (held_views(project / "store"), contents(project / "store")) == before
    assert verify(project / "store", "full").damage == []


# Killed, in shards, at native sizes

NATIVE_VIEWS = {
    "backbone": {"resize": "native"},
    "extract": {"views": 3, "view_seed": 4, "amp": "bf16" if BFLOAT16 else "off"},
}
Reference = tuple[Path, dict, Views, float]


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    project = make_native(tmp_path_factory.mktemp("views"), SIZES[:7], cases=3)
    codes, reports, seconds = zygote.run({"project": project, "settings": NATIVE_VIEWS})
    assert codes == [0], reports
    return project, contents(project / "store"), held_views(project / "store"), seconds


def kill_and_resume(zygote: Zygote, reference: Reference, folder: Path, times: int, seed: int = 0) -> None:
    project, plain, views, seconds = reference
    moments = random.Random(seed)
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns("store", "reports"))
    jobs = [
        {
            "project": folder,
            "settings": {**NATIVE_VIEWS, "extract": {**NATIVE_VIEWS["extract"], "shard": f"{i}/2"}},
        }
        for i in range(2)
    ]
    for _ in range(times):
        for job in jobs:
            job["kill_after"] = moments.uniform(0, seconds)
        codes, reports, _ = zygote.run(*jobs)
        assert set(codes) <= {-9, 0}, reports
        if read_manifest(folder / "store") is not None:
            assert held_views(folder / "store").items() <= views.items()
            assert verify(folder / "store", "full").damage == []
    for job in jobs:
        job.pop("kill_after", None)
    codes, reports, _ = zygote.run(*jobs)
    assert codes == [0, 0], reports
    assert contents(folder / "store") == plain
    assert held_views(folder / "store") == views


def test_killed_and_resumed_in_two_shards_at_native_sizes(
    zygote: Zygote, reference: Reference, tmp_path: Path
) -> None:
    kill_and_resume(zygote, reference, tmp_path / "victim", 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_ten_times_in_two_shards_at_native_sizes(
    zygote: Zygote, reference: Reference, tmp_path: Path, seed: int
) -> None:
    kill_and_resume(zygote, reference, tmp_path / "victim", 10, seed)


@pytest.mark.parametrize("stop_at", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_told_to_stop_with_views_at_native_sizes(
    zygote: Zygote, reference: Reference, tmp_path: Path, stop_at: int
) -> None:
    project, plain, views, _ = reference
    victim = tmp_path / "victim"
    shutil.copytree(project, victim, ignore=shutil.ignore_patterns("store", "reports"))
    job = {"project": victim, "settings": NATIVE_VIEWS}
    codes, reports, _ = zygote.run({**job, "signal": "SIGTERM", "signal_at": stop_at})
    assert codes == [128 + 15], reports
    some = held_views(victim / "store")
    assert 0 < len(some) < len(views)  # what was computed is kept, though rows before it are missing
    assert some.items() <= views.items()
    codes, reports, _ = zygote.run(job)
    assert codes == [0]
    assert reports[0]["committed"] == len(views) - len(some)
    assert (contents(victim / "store"), held_views(victim / "store")) == (plain, views)
