"""Every row of the table in docs/coming-from-scripts.md, typed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import helpers
from tests.command_line import make_project, succeeded

PAGE = helpers.ROOT / "docs" / "coming-from-scripts.md"
ROWS = re.findall(r"^\| `([^`]+)` \| `featstore ([^`]+)` \| (?:`([^`]+)`)? ?\|$", PAGE.read_text(), re.M)
FAST = ("--epochs", "1", "--resamples", "0")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here, and has tests of its own."""
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(f"heads.evaluation.results.{name}", lambda *args: None)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(
        tmp_path_factory.mktemp("seed"), {"labels": {"file": "labels.csv"}}, cases=10, patches=2, size=32
    )
    helpers.write_labels(folder, {str(n): n % 2 for n in range(1, 11)})
    succeeded(folder, "extract")
    succeeded(folder, "split")
    succeeded(folder, "train-head", *FAST)
    return folder


def test_the_table_is_read() -> None:
    named = {row[0].split()[0] for row in ROWS}
    assert len(ROWS) > 30
    assert {"--lr", "--per_slice_cap", "--load_splits", "--eval_only", "--resume"} <= named
    assert {"--analyze_attention", "--temperature-start"} <= named


@pytest.mark.parametrize(("old", "typed", "setting"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_table(project: Path, old: str, typed: str, setting: str) -> None:
    runs = project / "runs"
    before = set(runs.iterdir())
    words = shlex.split(typed.replace("RUN", str(min(before))))
    fast = FAST if words[0] == "train-head" and "--epochs" not in words else FAST[2:]
    if "--epochs" in words:
        words[words.index("--epochs") + 1] = "2"
        setting = "train.epochs = 2"
    succeeded(project, *words, *fast)
    new = sorted(set(runs.iterdir()) - before)
    if not setting:
        assert not new
        return
    path, _, value = setting.partition(" = ")
    section, _, key = path.partition(".")
    config: dict[str, Any] = yaml.safe_load((new[0] / "config.yaml").read_text())
    found, want = config[section][key], json.loads(value)
    if key == "load_splits":
        found = str(Path(found).relative_to(project)) if Path(found).is_absolute() else found
    assert (found, type(found)) == (want, type(want))
