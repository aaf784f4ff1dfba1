"""Extraction that is killed anywhere: what is committed is right, everything else is absent."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from featstore.errors import StoreError
from tests.extraction.conftest import Contents, Zygote, contents, make_project

CASES, PER_CASE = 4, 24


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


def clone(project: Path, folder: Path, file_format: str = "hdf5") -> Path:
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns("store", "reports"))
    settings = json.loads((folder / "featstore.yaml").read_text())
    settings["store"] = {"format": file_format}
    (folder / "featstore.yaml").write_text(json.dumps(settings))
    return folder


def check_after_a_kill(project: Path, whole: Contents) -> int:
    """How many embeddings are committed; all of them as they should be, and cases complete."""
    try:
        found = contents(project / "store")
    except StoreError as error:
        if "no embedding store" not in error.found:
            raise
        return 0
    assert found.items() <= whole.items()
    cases = [key[0] for key in found]
    assert all(cases.count(case) == PER_CASE for case in set(cases))
    return len(found)


def finish(zygote: Zygote, project: Path, whole: Contents, committed: int) -> None:
    codes, reports, _ = zygote.run({"project": project})
    assert codes == [0], reports
    assert reports[0]["committed"] == len(whole) - committed
    assert contents(project / "store") == whole


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
    seen = kill_at_random_moments(zygote, reference, tmp_path, 20)
    assert len(seen) > 2  # the kills fell before, within and after the commits


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["hdf5", "zarr"])
def test_killed_at_two_hundred_random_moments(
    zygote: Zygote, reference: tuple, tmp_path: Path, file_format: str
) -> None:
    kill_at_random_moments(zygote, reference, tmp_path, 200, file_format)


def kill_at_every_step(
    zygote: Zygote,
    reference: tuple,
    folder: Path,
    after: bool,
    file_format: str = "hdf5",
    stride: int = 1,
) -> int:
    project, whole, _ = reference
    step = 0
    while True:
        step += stride
        victim = clone(project, folder / str(step), file_format)
        codes, _, _ = zygote.run({"project": victim, "kill_at": step, "after": after})
        committed = check_after_a_kill(victim, whole)
        if codes == [0]:
            assert committed == len(whole)
            return step - 1
        assert codes == [-9]
        # Finishing after each of a hundred kills is for the slow suite; here, for some.
        if step % 7 == 0 or stride > 1:
            finish(zygote, victim, whole, committed)
        shutil.rmtree(victim)


@pytest.fixture(scope="module")
def small_reference(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Contents, float]:
    project = make_project(
        tmp_path_factory.mktemp("small"), cases=1, stains=("h&e", "sox10"), slices=2, patches=6
    )
    codes, _, seconds = zygote.run({"project": project})
    assert codes == [0]
    return project, contents(project / "store"), seconds


# The steps are the same for both file formats, so one of them gets a lighter dose.
@pytest.mark.parametrize(("file_format", "stride"), [("hdf5", 1), ("zarr", 5)])
def test_killed_before_every_step_of_the_commit(
    zygote: Zygote, small_reference: tuple, tmp_path: Path, file_format: str, stride: int
) -> None:
    # Making the store and a commit: folders, part, record, each written, synced and linked.
    assert kill_at_every_step(zygote, small_reference, tmp_path, False, file_format, stride) > 20


def test_the_format_of_parts_is_that_of_the_settings(
    zygote: Zygote, small_reference: tuple, tmp_path: Path
) -> None:
    project, whole, _ = small_reference
    victim = clone(project, tmp_path / "zarr", "zarr")
    assert zygote.run({"project": victim})[0] == [0]
    parts = {path.name.partition(".")[2] for path in victim.glob("store/cases/*/*")} - {"json"}
    assert parts == {"zarr.zip"}
    assert contents(victim / "store") == whole


@pytest.mark.slow
def test_killed_after_every_step_of_the_commit(zygote: Zygote, reference: tuple, tmp_path: Path) -> None:
    assert kill_at_every_step(zygote, reference, tmp_path, after=True) > 40


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_run_in_good_order(
    zygote: Zygote, reference: tuple, tmp_path: Path, name: str, code: int
) -> None:
    project, whole, seconds = reference
    victim = clone(project, tmp_path / name)
    codes, reports, _ = zygote.run(
        {"project": victim, "kill_after": seconds + 0.5, "signal": name, "pause": 0.1}
    )
    assert codes == [code], reports
    report = reports[0]
    assert report["interrupted"]
    # All that was computed is committed, a case in the middle included.
    found = contents(victim / "store")
    assert found.items() <= whole.items()
    assert 0 < len(found) == report["committed"] < len(whole)
    finish(zygote, victim, whole, len(found))


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


def test_a_full_disk_is_a_clean_error(zygote: Zygote, reference: tuple, tmp_path: Path) -> None:
    project, whole, _ = reference
    victim = clone(project, tmp_path / "full")
    codes, reports, _ = zygote.run({"project": victim, "file_size_limit": 9_000})
    assert codes == [3]
    assert "could not write" in reports[0]["error"]
    finish(zygote, victim, whole, check_after_a_kill(victim, whole))
