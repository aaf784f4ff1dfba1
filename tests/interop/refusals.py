"""Bad files: what every refusal must look like, in whatever layout."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.interop.builders import Arrays, features_of
from tests.interop.projects import alone, assert_same, imported, refused, rows_of

FEATURES = features_of()
BAD = FEATURES["s2"]


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def skipped_of(project: Path) -> list[dict[str, str]]:
    with (project / "reports" / "import" / "skipped.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def is_refused_or_skipped(
    folder: Path, source: Path, bad: str, says: str, rest: Arrays | None = None, **imports: Any
) -> None:
    """Without --on-bad skip nothing is made; with it just the bad file is missing, and listed."""
    refused(folder / "p", source, bad, says, **imports)
    report = imported(folder / "p", source, on_bad="skip", **imports)
    wanted = alone({name: x for name, x in FEATURES.items() if name != "s2"} if rest is None else rest)
    assert_same(rows_of(folder / "p"), wanted, "float32")
    assert [path for path, _ in report.skipped] == [bad]
    (listed,) = skipped_of(folder / "p")
    assert listed["path"] == bad
    assert says in listed["reason"]


def made_by(write: Callable[[Path, Arrays], Path], folder: Path, features: Arrays = FEATURES) -> Path:
    """A folder in a layout."""
    folder.mkdir()
    write(folder, features)
    return folder


def everywhere(damages: Iterable[str], first: str, others: Iterable[str], few: Container[str]) -> list[Any]:
    """Every damage in one layout; in the others, whose code is the same, a few, and all as slow tests."""
    cases = [(first, damage, ()) for damage in damages]
    cases += [(o, d, () if d in few else pytest.mark.slow) for o in others for d in damages]
    return [pytest.param(name, damage, marks=marks) for name, damage, marks in cases]
