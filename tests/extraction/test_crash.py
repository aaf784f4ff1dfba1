"""Extraction that is killed, told to stop or fails to write, anywhere.

What is committed is right, everything else is absent, and the same command goes on from there.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from featstore.store.records import read_manifest
from featstore.store.verify import verify
from tests.extraction.conftest import Contents, SmallDisk, Zygote, contents, make_project
from tests.extraction.zygote import fatal_step, is_given_up

CASES, PER_CASE = 4, 24
both_formats = pytest.mark.parametrize("file_format", ["hdf5", "zarr"])


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents, float]:
    """A project, what an uninterrupted run makes of it, and how long that takes."""
    project = make_project(
        tmp_path_factory.mktemp("reference"), cases=CASES, stains=("h&e", "sox10"), slices=2, patches=6
    )
    zygote.run({"project": project})  # the first run warms the page cache
    shutil.rmtree(project / "store")
    codes, reports, seconds = zygote.run({"project": project})
    assert codes == [0]
    assert reports[0]["committed"] == CASES * PER_CASE
    return project, contents(project / "store"), seconds


def clone(project: Path, folder: Path, file_format: str = "hdf5", store: Path | None = None) -> Path:
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns("store", "reports"))
    settings = json.loads((folder / "featstore.yaml").read_text())
    settings["store"] = {"format": file_format} | ({"path": str(store)} if store else {})
    (folder / "featstore.yaml").write_text(json.dumps(settings))
    return folder


def committed_in(store: Path, whole: Contents) -> Contents:
    """What is committed: nothing but what an uninterrupted run commits, and all of it undamaged."""
    if read_manifest(store) is None:
        return {}
    found = contents(store)
    assert found.items() <= whole.items()
    report = verify(store, "full")
    assert report.damage == []
    assert report.patches == len(found)
    return found


def check_after_a_kill(project: Path, whole: Contents) -> int:
    """How many embeddings are committed; all of them as they should be, and cases complete."""
    found = committed_in(project / "store", whole)
    cases = [key[0] for key in found]
    assert all(cases.count(case) == PER_CASE for case in set(cases))
    return len(found)


def finish(
    zygote: Zygote, project: Path, whole: Contents, committed: int, store: Path | None = None
) -> None:
    codes, reports, _ = zygote.run({"project": project})
    assert codes == [0], reports
    assert reports[0]["committed"] == len(whole) - committed
    assert committed_in(store or project / "store", whole) == whole


def kill_at_random_moments(
    zygote: Zygote, reference: tuple, folder: Path, times: int, file_format: str = "hdf5"
) -> set[int]:
    project, whole, seconds = reference
    moments = random.Random(0)
    seen = set()
    for i in range(times):
        victim = clone(project, folder / str(i), file_format)
        codes, _, _ = zygote.run({"project": victim, "kill_after": moments.uniform(0, seconds)})
        assert codes in ([-9], [0])
        committed = check_after_a_kill(victim, whole)
        seen.add(committed)
        finish(zygote, victim, whole, committed)
        shutil.rmtree(victim)
    return seen


def test_killed_at_random_moments(zygote: Zygote, reference: tuple, tmp_path: Path) -> None:
    kill_at_random_moments(zygote, reference, tmp_path, 10)


@pytest.mark.slow
@both_formats
def test_killed_at_two_hundred_random_moments(
    zygote: Zygote, reference: tuple, tmp_path: Path, file_format: str
) -> None:
    seen = kill_at_random_moments(zygote, reference, tmp_path, 200, file_format)
    assert len(seen) > 2  # the kills fell before, within and after the commits


def kill_at_every_step(
    zygote: Zygote,
    reference: tuple,
    folder: Path,
    after: bool,
    file_format: str = "hdf5",
    stride: int = 1,
) -> int:
    """About how many steps there are; from every one that is a kill, another run goes on."""
    project, whole, _ = reference
    kills = 0
    while True:
        step = 1 + kills * stride
        victim = clone(project, folder / str(step), file_format)
        codes, _, _ = zygote.run({"project": victim, "kill_at": step, "after": after})
        committed = check_after_a_kill(victim, whole)
        if codes == [0]:
            assert committed == len(whole)
            return step - 1
        assert codes == [-9]
        finish(zygote, victim, whole, committed)
        shutil.rmtree(victim)
        kills += 1


@pytest.fixture(scope="module")
def small_reference(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Contents, float]:
    project = make_project(
        tmp_path_factory.mktemp("small"), cases=2, stains=("h&e", "sox10"), slices=2, patches=6
    )
    codes, _, seconds = zygote.run({"project": project})
    assert codes == [0]
    return project, contents(project / "store"), seconds


# Every step of the store alone is in tests/store/test_faults.py.
@both_formats
def test_killed_before_some_steps_of_the_commits(
    zygote: Zygote, small_reference: tuple, tmp_path: Path, file_format: str
) -> None:
    # Making the store and two commits: folders, part, record, each written, synced and linked.
    assert kill_at_every_step(zygote, small_reference, tmp_path, False, file_format, stride=8) > 60


@pytest.mark.slow
@both_formats
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_step_of_the_commits(
    zygote: Zygote, small_reference: tuple, tmp_path: Path, file_format: str, after: bool
) -> None:
    assert kill_at_every_step(zygote, small_reference, tmp_path, after, file_format) > 60


def test_the_format_of_parts_is_that_of_the_settings(
    zygote: Zygote, small_reference: tuple, tmp_path: Path
) -> None:
    project, whole, _ = small_reference
    victim = clone(project, tmp_path / "zarr", "zarr")
    assert zygote.run({"project": victim})[0] == [0]
    parts = {path.name.partition(".")[2] for path in victim.glob("store/cases/*/*")} - {"json"}
    assert parts == {"zarr.zip"}
    assert contents(victim / "store") == whole


@both_formats
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_in_good_order(
    zygote: Zygote, reference: tuple, tmp_path: Path, name: str, file_format: str
) -> None:
    project, whole, _ = reference
    victim = clone(project, tmp_path / name, file_format)
    codes, reports, _ = zygote.run({"project": victim, "signal_at": 8, "signal": name})
    assert codes == [128 + getattr(signal, name)], reports
    report = reports[0]
    assert report["interrupted"]
    # All that was computed is committed, a case in the middle included.
    found = committed_in(victim / "store", whole)
    assert PER_CASE < len(found) == report["committed"] < 2 * PER_CASE
    finish(zygote, victim, whole, len(found))


@pytest.mark.slow
@both_formats
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_at_random_moments(
    zygote: Zygote, reference: tuple, tmp_path: Path, name: str, file_format: str
) -> None:
    project, whole, seconds = reference
    number, moments = int(getattr(signal, name)), random.Random(1)
    seen = set()
    for i in range(25):
        victim = clone(project, tmp_path / str(i), file_format)
        codes, reports, _ = zygote.run(
            {"project": victim, "kill_after": moments.uniform(0, seconds), "signal": name}
        )
        # Before and after the pass nothing listens, and the process dies of the signal.
        assert codes[0] in (0, 128 + number, -number), reports
        found = committed_in(victim / "store", whole)
        if reports[0].get("interrupted"):
            assert reports[0]["committed"] == len(found)
        seen.add(len(found))
        finish(zygote, victim, whole, len(found))
        shutil.rmtree(victim)
    assert len(seen) > 2  # before, within and after the commits


def test_two_shards_at_once_equal_one_run(zygote: Zygote, reference: tuple, tmp_path: Path) -> None:
    project, whole, _ = reference
    shared = clone(project, tmp_path / "shared")
    jobs = [{"project": shared, "settings": {"extract": {"shard": f"{i}/2"}}} for i in range(2)]
    codes, reports, _ = zygote.run(*jobs)
    assert codes == [0, 0], reports
    shares = [report["committed"] for report in reports]
    assert sum(shares) == len(whole)
    assert min(shares) > 0.3 * len(whole)
    assert contents(shared / "store") == whole


def test_two_whole_runs_at_once_do_no_harm(zygote: Zygote, reference: tuple, tmp_path: Path) -> None:
    project, whole, _ = reference
    shared = clone(project, tmp_path / "shared")
    codes, reports, _ = zygote.run({"project": shared}, {"project": shared})
    assert codes == [0, 0], reports
    assert contents(shared / "store") == whole


@both_formats
def test_a_file_that_may_not_grow_is_a_clean_error(
    zygote: Zygote, reference: tuple, tmp_path: Path, file_format: str
) -> None:
    project, whole, _ = reference
    victim = clone(project, tmp_path / "full", file_format)
    codes, reports, _ = zygote.run({"project": victim, "file_size_limit": 9_000})
    assert codes == [3]
    assert reports[0]["error"].startswith("StoreError: could not write: File too large\n")
    assert "--part-mb" in reports[0]["error"]
    finish(zygote, victim, whole, check_after_a_kill(victim, whole))


# The probe for hard links (before the plan, with the writer, and when the store is made), and the
# store's description.
LINKS_BEFORE_COMMITS = 4


def assert_told(message: str, error: str, folder: Path) -> None:
    first, where, to_do = message.split("\n  ")
    assert first == f"StoreError: could not write: {os.strerror(getattr(errno, error))}"
    assert where.startswith(f"where: {folder}")
    assert ("make space" if error == "ENOSPC" else "mend the disk") in to_do


@pytest.mark.parametrize(
    ("file_format", "error", "lasting", "stride"),
    [
        ("hdf5", "EIO", False, 29),
        ("zarr", "ENOSPC", False, 31),
        *(
            pytest.param(file_format, error, lasting, stride, marks=pytest.mark.slow)
            for file_format in ("hdf5", "zarr")
            for error, lasting, stride in (("EIO", False, 2), ("ENOSPC", False, 3), ("EIO", True, 5))
        ),
    ],
)
def test_a_step_that_fails_ends_the_run_and_costs_nothing(
    zygote: Zygote,
    reference: tuple,
    tmp_path: Path,
    file_format: str,
    error: str,
    lasting: bool,
    stride: int,
) -> None:
    project, whole, _ = reference
    fault = {"error": error, "lasting": lasting}
    unharmed = clone(project, tmp_path / "unharmed", file_format)
    count = len(zygote.run({"project": unharmed, "fail_at": None, **fault})[1][0]["steps"])
    assert count > 150
    for step in range(1, count + 1, stride):
        victim = clone(project, tmp_path / str(step), file_format)
        codes, reports, _ = zygote.run({"project": victim, "fail_at": step, **fault})
        steps = reports[0]["steps"]
        if fatal_step(steps) is None:
            assert codes == [0], reports
        else:
            assert codes == [3], reports
            assert_told(reports[0]["error"], error, victim)
        assert is_given_up(steps)
        # What has been linked is there, even where the failure came after that, and nothing else.
        committed = check_after_a_kill(victim, whole)
        assert committed == PER_CASE * max(0, steps.count("link") - LINKS_BEFORE_COMMITS)
        finish(zygote, victim, whole, committed)
        shutil.rmtree(victim)


def run_on_a_full_disk(
    small_disk: SmallDisk, reference: tuple, victim: Path, space: tuple[int, int]
) -> int:
    """How many embeddings a run commits before the disk is full; after that, another run goes on."""
    whole = reference[1]
    zygote, store = small_disk.zygote, small_disk.here / "store"
    small_disk.fill(*space)
    codes, reports, _ = zygote.run({"project": victim})
    if codes == [0]:
        assert committed_in(store, whole) == whole
    else:
        assert codes == [3], reports
        assert_told(reports[0]["error"], "ENOSPC", small_disk.path)
    found = committed_in(store, whole)
    assert len(found) % PER_CASE == 0
    small_disk.make_space()
    finish(zygote, victim, whole, len(found), store)
    shutil.rmtree(store)
    return len(found)


@both_formats
def test_a_full_disk_is_a_clean_error(
    small_disk: SmallDisk, reference: tuple, tmp_path: Path, file_format: str
) -> None:
    victim = clone(reference[0], tmp_path / "project", file_format, small_disk.path / "store")
    for space in [(0, 60), (12, 60), (60, 12)]:
        assert run_on_a_full_disk(small_disk, reference, victim, space) < CASES * PER_CASE


@pytest.mark.slow
@both_formats
def test_a_disk_that_is_full_at_any_block_or_name(
    small_disk: SmallDisk, reference: tuple, tmp_path: Path, file_format: str
) -> None:
    victim = clone(reference[0], tmp_path / "project", file_format, small_disk.path / "store")
    for spaces in ([(blocks, 60) for blocks in range(80)], [(80, names) for names in range(40)]):
        seen = [run_on_a_full_disk(small_disk, reference, victim, space) for space in spaces]
        assert set(seen) == {case * PER_CASE for case in range(CASES + 1)}
