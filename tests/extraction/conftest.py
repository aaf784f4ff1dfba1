from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featstore.store import Store
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
        "extract": {"device": "cpu", "amp": "off", "batch_size": 4, "workers": 2},
    }
    (folder / "featstore.yaml").write_text(json.dumps(sections))
    return folder


class Zygote:
    """Runs extractions in forked children; see `zygote.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.extraction.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=helpers.ROOT,
        )
        assert self._line() == "ready"

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
        self._process.wait(10)
        self._process.stdout.close()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()
