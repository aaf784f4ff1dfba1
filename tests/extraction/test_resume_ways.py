"""Killed, stopped and out of memory in every way that patches can be computed, then resumed.

With views, native sizes, shards, either format and either runtime the end is what an uninterrupted run
makes, bit for bit; where memory ran out on the way, to 1e-5.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.store.records import read_manifest
from featstore.store.verify import verify
from tests import helpers
from tests.extraction.conftest import Contents, Zygote, contents, make_project
from tests.extraction.test_native import SIZES, has_bf16, rewrite
from tests.extraction.test_views import held_views

Way = dict[str, Any]
Held = tuple[Contents, dict[Any, bytes]]

CASES, PATCHES = 3, 7
TOTAL = CASES * PATCHES
# In float32 on a CPU PyTorch computes other sizes one by one; what shares a pass is in bfloat16.
WAYS: dict[str, Way] = {
    "one size": {},
    "views": {"extract": {"views": 3}},
    "native": {"backbone": {"resize": "native"}},
    "native32": {"backbone": {"resize": "native32"}},
    "native32 with views": {"backbone": {"resize": "native32"}, "extract": {"views": 3, "view_seed": 4}},
}
TOLERANCE = 1e-5


def held(store: Path) -> Held:
    """Embeddings and views of a store by case, stain, slice and patch; nothing if there is no store."""
    return (contents(store), held_views(store)) if read_manifest(store) is not None else ({}, {})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches of many sizes, some shared by several."""
    folder = tmp_path_factory.mktemp("cohort")
    project = make_project(folder, cases=CASES, stains=("h&e",), slices=1, patches=PATCHES, size=32)
    rewrite(project, SIZES)
    return project


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, cohort: Path) -> Callable[[Way], tuple[Held, float]]:
    """What an uninterrupted run in this way makes, and how long it takes."""
    known: dict[str, tuple[Held, float]] = {}

    def made(way: Way) -> tuple[Held, float]:
        key = json.dumps(way, sort_keys=True)
        if key not in known:
            path = f"store{len(known)}"
            codes, reports, seconds = zygote.run(
                {"project": cohort, "settings": {**way, "store": {"path": path}}}
            )
            assert codes == [0], reports
            assert reports[0]["committed"] == TOTAL
            known[key] = held(cohort / path), seconds
        return known[key]

    return made


def copy_of(cohort: Path, folder: Path) -> Path:
    shutil.copytree(cohort / "patches", folder / "patches")
    shutil.copy(cohort / "featstore.yaml", folder)
    return folder


def with_shard(settings: Way, shard: str | None) -> Way:
    return settings | {"extract": {**settings.get("extract", {}), "shard": shard}}


def check(store: Path, whole: Held) -> None:
    """Whatever is there is what an uninterrupted run makes, and undamaged."""
    plain, views = held(store)
    assert plain.items() <= whole[0].items()
    assert views.items() <= whole[1].items()
    assert not plain or verify(store, "full").damage == []


def kill_and_resume(
    zygote: Zygote,
    project: Path,
    settings: Way,
    whole: Held,
    seconds: float,
    moments: random.Random,
    times: int,
) -> None:
    """End runs at random moments, by SIGKILL and SIGTERM in turn, then let one come to its end."""
    for name in itertools.islice(itertools.cycle(("SIGKILL", "SIGTERM")), times):
        codes, reports, _ = zygote.run(
            {
                "project": project,
                "settings": settings,
                "kill_after": moments.uniform(0, seconds),
                "signal": name,
            }
        )
        number = int(getattr(signal, name))
        # Before and after the pass nothing listens, and the process dies of the signal.
        assert codes[0] in (0, -number, *([128 + number] if name == "SIGTERM" else [])), reports
        check(project / "store", whole)
    codes, reports, _ = zygote.run({"project": project, "settings": settings})
    assert codes == [0], reports


def end_and_compare(
    zygote: Zygote,
    cohort: Path,
    undisturbed: Callable[[Way], tuple[Held, float]],
    folder: Path,
    way: str,
    file_format: str,
    shards: int,
    times: int,
) -> None:
    whole, seconds = undisturbed(WAYS[way])
    moments = random.Random(f"{way} {file_format} {shards}")
    project = copy_of(cohort, folder)
    settings = WAYS[way] | {"store": {"format": file_format}}
    for shard in range(shards):  # one after the other, as one process does them
        mine = with_shard(settings, f"{shard}/{shards}") if shards > 1 else settings
        kill_and_resume(zygote, project, mine, whole, seconds, moments, times)
    assert held(project / "store") == whole
    assert verify(project / "store", "full").damage == []


# Native sizes with views in two shards at once, and one size alone, are in test_views.py and test_crash.py.
@pytest.mark.parametrize(
    ("way", "file_format", "shards", "times"),
    [
        ("views", "zarr", 1, 2),
        ("native", "hdf5", 1, 2),
        ("native32 with views", "zarr", 2, 1),
    ],
)
def test_killed_stopped_and_resumed(
    zygote: Zygote,
    cohort: Path,
    undisturbed: Callable[[Way], tuple[Held, float]],
    tmp_path: Path,
    way: str,
    file_format: str,
    shards: int,
    times: int,
) -> None:
    end_and_compare(zygote, cohort, undisturbed, tmp_path, way, file_format, shards, times)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("file_format", ["hdf5", "zarr"])
@pytest.mark.parametrize("way", [name for name in WAYS if name != "one size"])
def test_killed_and_stopped_ten_times_and_resumed(
    zygote: Zygote,
    cohort: Path,
    undisturbed: Callable[[Way], tuple[Held, float]],
    tmp_path: Path,
    way: str,
    file_format: str,
    shards: int,
) -> None:
    end_and_compare(zygote, cohort, undisturbed, tmp_path, way, file_format, shards, 10)


# Memory

WORDS = ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"]
FLOAT32 = {"dtype": "float32"}
# Passes of four images each: four patches, or one patch with its three views.
PASSES = {"one size": 6, "views": TOTAL}
# The fourth batch, after which the signal comes, ends with this patch.
EARLY = [
    ("one size", 3, WORDS[1], 16),
    pytest.param("views", 3, WORDS[0], 4, marks=pytest.mark.slow),
]


def assert_close(found: Held, whole: Held) -> None:
    for some, all_ in zip(found, whole, strict=True):
        assert some.keys() == all_.keys()
        for key, values in some.items():
            a, b = np.frombuffer(values, np.float32), np.frombuffer(all_[key], np.float32)
            assert np.abs(a - b).max(initial=0) <= TOLERANCE, key


@pytest.fixture
def starved(
    zygote: Zygote, cohort: Path, undisturbed: Callable[[Way], tuple[Held, float]], tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], Held]]:
    """A job of a run in which memory runs out once, and what an uninterrupted run makes."""

    def prepare(way: str, at: int, words: str, **extract: str) -> tuple[dict[str, Any], Held]:
        settings = {**WAYS[way], "extract": {**WAYS[way].get("extract", {}), **extract}}
        job = {"project": copy_of(cohort, tmp_path), "settings": settings}
        return {**job, "no_memory_at": at, "words": words}, undisturbed(settings)[0]

    return prepare


@pytest.mark.parametrize(
    ("way", "at", "words"),
    [
        pytest.param(way, at, words, marks=() if (at, words) == (last, WORDS[0]) else pytest.mark.slow)
        for way, last in PASSES.items()
        for at in (1, 3, last)
        for words in WORDS
    ],
)
def test_when_memory_runs_out_in_a_pass_the_batch_is_halved_and_nothing_lost(
    zygote: Zygote, starved: Callable[..., Any], way: str, at: int, words: str
) -> None:
    job, whole = starved(way, at, words, dtype="float32")
    codes, (report,), _ = zygote.run(job)
    assert codes == [0], report
    assert (report["committed"], report["batch_size"], report["batch_size_halved"]) == (TOTAL, 2, 1)
    assert_close(held(Path(job["project"]) / "store"), whole)


@pytest.mark.parametrize(("way", "at", "words", "done"), EARLY)
def test_stopped_after_memory_ran_out_and_resumed(
    zygote: Zygote, starved: Callable[..., Any], way: str, at: int, words: str, done: int
) -> None:
    job, whole = starved(way, at, words, dtype="float32")
    codes, (report,), _ = zygote.run({**job, "signal_at": 4, "signal": "SIGTERM"})
    assert codes == [128 + signal.SIGTERM], report
    assert (report["committed"], report["batch_size_halved"]) == (done, 1)
    codes, (rest,), _ = zygote.run({**job, "no_memory_at": None})
    assert codes == [0], rest
    assert (rest["committed"], rest["batch_size"]) == (TOTAL - done, 4)
    assert_close(held(Path(job["project"]) / "store"), whole)


@has_bf16
@pytest.mark.parametrize("at", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_when_memory_runs_out_with_native_sizes_nothing_is_lost(
    zygote: Zygote, starved: Callable[..., Any], at: int
) -> None:
    job, whole = starved("native", at, WORDS[0], dtype="float32", amp="bf16")
    codes, (report,), _ = zygote.run(job)
    assert codes == [0], report
    assert (report["committed"], report["batch_size"], report["batch_size_halved"]) == (TOTAL, 2, 1)
    # In bfloat16 a patch of another size has the same bits in whatever company.
    assert held(Path(job["project"]) / "store") == whole


@pytest.mark.parametrize("at", [12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, TOTAL))])
def test_without_memory_for_one_patch_of_its_own_size_the_run_ends_and_is_resumed(
    zygote: Zygote, starved: Callable[..., Any], at: int
) -> None:
    job, whole = starved("native", at, WORDS[1])
    codes, (report,), _ = zygote.run(job)
    assert codes == [3]
    assert report["error"].startswith("FeatstoreError: cpu has too little memory for one patch of ")
    store = Path(job["project"]) / "store"
    check(store, whole)
    # In float32 every pass is of one patch: all those before it are computed, and committed.
    assert len(held(store)[0]) == at - 1
    codes, (report,), _ = zygote.run({**job, "no_memory_at": None})
    assert (codes, report["committed"]) == ([0], TOTAL - (at - 1))
    assert held(store) == whole


# OpenVINO, whose processes must not fork: each run is a command of its own

OPENVINO_WAYS: dict[str, list[str]] = {
    "one size": [],
    "views": ["--views", "3"],
    "native": ["--resize", "native"],
    "native32 with views": ["--resize", "native32", "--views", "3"],
}


def command(project: Path, store: str, way: str, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "cli.py", "extract", "--project", str(project), "--json"),
            *("--store-path", str(project / store), "--runtime", "openvino", *OPENVINO_WAYS[way], *flags),
        ],
        cwd=helpers.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["runtime"] == "openvino"
    return dict(answer)


def end_after_commits(process: subprocess.Popen[str], store: Path, commits: int, number: int) -> int:
    """Send a signal once there are so many records; returns the exit code."""
    while process.poll() is None and len(list(store.glob("cases/*/*.json"))) < commits:
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate()
    return process.returncode


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("way", OPENVINO_WAYS)
def test_killed_and_resumed_with_openvino(tmp_path: Path, way: str) -> None:
    cases, patches = 12, 20
    project = make_project(tmp_path, cases=cases, stains=("h&e",), slices=1, patches=patches, size=32)
    rewrite(project, SIZES)
    assert finish(command(project, "undisturbed", way))["committed"] == cases * patches
    whole = held(project / "undisturbed")
    moments, seen = random.Random(way), set()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        shards = ["--shard", "0/2"] if moments.random() < 0.5 else []
        commits = len(list(project.glob("store/cases/*/*.json"))) + moments.randint(0, 3)
        code = end_after_commits(
            command(project, "store", way, *shards), project / "store", commits, number
        )
        assert code in (0, -number, 128 + number)
        check(project / "store", whole)
        seen.add(len(held(project / "store")[0]))
    assert max(seen) > 0
    missing = cases * patches - len(held(project / "store")[0])
    assert finish(command(project, "store", way))["committed"] == missing
    assert held(project / "store") == whole
