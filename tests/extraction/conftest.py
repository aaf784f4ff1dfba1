from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featstore.settings import Layers
from featstore.store import Store
from featstore.strict_yaml import read_file
from heads.config import Config
from tests import helpers

Contents = dict[tuple[str, str, str, int], bytes]

# The smallest network that timm has: what is tested here is everything around it.
TINY = {"name": "timm:test_resnet", "weights": "random:0", "resize": 32}


def contents(store: Path) -> Contents:
    """Every embedding in a store by its key, as bytes."""
    view = Store.open(store)
    table = view.table()
    found = {}
    for case in view.cases():
        bag = view.bag(case)
        rows = table.loc[bag.rows]
        for row, values in zip(rows.itertuples(), bag.features, strict=True):
            found[row.case_id, row.stain, row.slice_id, row.patch] = values.tobytes()
    return found


def make_project(folder: Path, **cohort: Any) -> Path:
    """A project of noise patches with a tiny backbone."""
    helpers.make_cohort(folder / "patches", **cohort)
    sections = {
        "patches": {"folder": "patches"},
        "backbone": TINY,
        "extract": {"device": "cpu", "amp": "off", "batch_size": 4, "workers": 2, "runtime": "torch"},
    }
    (folder / "featstore.yaml").write_text(json.dumps(sections))
    return folder


def config_of(project: Path, **settings: Any) -> Config:
    """A project's config; settings as ``section__key``."""
    layers = Layers()
    layers.add(Config, read_file(project / "featstore.yaml"), "featstore.yaml")
    for path, value in settings.items():
        section, _, key = path.partition("__")
        layers.add(Config, {section: {key: value}}, "the test")
    return layers.build(Config)


class Zygote:
    """Runs extractions in forked children; see `zygote.py`.

    Args:
        prefix: What starts its command line, where another command is to start it.
    """

    def __init__(self, *prefix: str) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.extraction.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=helpers.ROOT,
        )
        if self._line() != "ready":
            self.close()
            raise OSError("the process that forks did not start")

    @property
    def root(self) -> Path:
        """The root folder as this process sees it, with what is mounted there."""
        return Path(f"/proc/{self._process.pid}/root")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, *jobs: dict[str, Any]) -> tuple[list[int], list[dict[str, Any]], float]:
        """Exit codes, answers and seconds of extractions that run at the same time."""
        assert self._process.stdin is not None
        for i, job in enumerate(jobs):
            job["project"] = str(job["project"])
            job["answer"] = str(Path(job["project"]) / f"answer{i}.json")
            Path(job["answer"]).unlink(missing_ok=True)
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._line())
        reports = [
            json.loads(Path(job["answer"]).read_text()) if Path(job["answer"]).exists() else {}
            for job in jobs
        ]
        return answer["codes"], reports, answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()  # does nothing where it has ended
            self._process.stdout.close()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


class SmallDisk:
    """A file system of two megabytes, and what fills it.

    Attributes:
        path: Its folder, for a job of ``zygote``.
        here: The same folder, for this process.
        zygote: Sees it.
    """

    def __init__(self, path: Path, here: Path, zygote: Zygote) -> None:
        self.path, self.here, self.zygote = path, here, zygote

    def fill(self, blocks: int, files: int) -> None:
        """Leave this many free blocks of 4 KiB, and room for this many new names."""
        found = os.statvfs(self.here)
        assert found.f_bsize == 4096
        (self.here / "ballast").write_bytes(bytes(4096 * (found.f_bavail - blocks)))
        for i in range(os.statvfs(self.here).f_favail - files):
            (self.here / f"ballast{i}").touch()

    def make_space(self) -> None:
        """Undo `fill`."""
        for ballast in self.here.glob("ballast*"):
            ballast.unlink()


@pytest.fixture
def small_disk(zygote: Zygote, tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that can really be full; the test skips where nothing may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=200", "tmpfs", str(folder))
    if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield SmallDisk(folder, folder, zygote)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    # Without the rights of root: in a mount namespace of its own, which ends with its process.
    try:
        inside = Zygote("unshare", "-rm", "sh", "-c", f'{shlex.join(mount)} 1>&2 && exec "$@"', "sh")
    except OSError as error:
        pytest.skip(f"no file system may be mounted here, with mount or with unshare -rm: {error}")
    try:
        yield SmallDisk(folder, inside.root / folder.relative_to("/"), inside)
    finally:
        inside.close()
