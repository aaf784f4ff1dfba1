"""Small things that once went wrong, through the command line."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests import helpers
from tests.command_line import featstore, make_project, refused, succeeded

FAST = ("--epochs", "1", "--resamples", "0")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(
        tmp_path_factory.mktemp("edges"), {"labels": {"file": "labels.csv"}}, cases=12, patches=2, size=32
    )
    helpers.write_labels(folder, {str(n): n % 2 for n in range(1, 13)})
    succeeded(folder, "extract")
    return folder


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(f"heads.evaluation.results.{name}", lambda *args: None)


def newest(project: Path) -> Path:
    return max((project / "runs").iterdir(), key=lambda run: run.stat().st_mtime_ns)


def test_an_exclusion_is_normalised_as_names_are(project: Path) -> None:
    succeeded(project, "train-head", "--exclude", '["011", 8]', *FAST)
    labels = json.loads((newest(project) / "run.json").read_text())["labels"]
    assert sorted(labels, key=int) == [str(n) for n in range(1, 13) if n not in (8, 11)]


def test_cases_of_no_named_class_are_told(project: Path) -> None:
    helpers.write_labels(project / "odd", {**{str(n): n % 2 for n in range(1, 12)}, "12": "high"})
    flags = ("--labels", "odd/labels.csv", "--classes", "{a: ['0'], b: ['1']}")
    said = succeeded(project, "train-head", *flags, *FAST).stdout
    assert "warning: 1 cases are of no named class and take no part: 12" in said


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({shape},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00v\x00" + text.encode()


PARTS = ("train_cases", "val_cases", "test_cases")


@pytest.mark.parametrize(
    "content",
    [
        npz(**dict.fromkeys(PARTS, b"1 2 3")),
        npz(**{f"{name}.npy": header("100000000000000") for name in PARTS}),
        npz(**{f"{name}.npy": header("1" + 30 * "0") for name in PARTS}),
        npz(**{f"{name}.npy": header("1")[:40] for name in PARTS}),
        b"case,part\n1,train\n",
    ],
)
def test_splits_of_any_bytes_are_told(project: Path, content: bytes) -> None:
    (project / "s.npz").write_bytes(content)
    refused(project, "train-head", "--load-splits", "s.npz", says=("splits cannot be read",))


def test_splits_of_bytes_that_are_no_text(project: Path) -> None:
    np.savez(project / "s.npz", **{name: np.array([b"\xff\xfe"]) for name in PARTS})
    refused(project, "train-head", "--load-splits", "s.npz", says=("no text",), to_do=False)


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        ("import sys; sys.exit(0)", "SystemExit"),
        (
            "from heads.models.head import *\nfrom heads.config import *\n"
            "@register_head('dual_stream', HierarchicalConfig)\nclass X(Head): pass",
            "a head 'dual_stream' already",
        ),
    ],
)
def test_plugins_that_leave_or_take_a_name(project: Path, plugin: str, says: str) -> None:
    (project / "mine.py").write_text(plugin)
    refused(project, "train-head", "--plugin", "mine.py", says=("plugin cannot be loaded", says))


def test_a_loss_of_the_whole_batch_is_told(project: Path) -> None:
    (project / "mine.py").write_text(
        "from heads.training.losses import register_loss\n"
        "@register_loss('whole')\ndef whole(logits, labels, smoothing): return logits.sum()\n"
    )
    result = featstore(project, "train-head", "--plugin", "mine.py", "--loss", "whole")
    assert result.exit_code == 2
    assert "one value a case: (1,)" in result.stderr


def test_evaluating_with_another_threshold_writes_nothing(project: Path) -> None:
    succeeded(project, "train-head", *FAST)
    run = newest(project)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = succeeded(project, "evaluate", run, "--threshold", "validation").stdout
    assert "nothing is written" in said
    assert ", from the validation cases" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_a_machine_with_a_gpu_is_evaluated_here(project: Path) -> None:
    succeeded(project, "train-head", *FAST)
    config = newest(project) / "config.yaml"
    config.write_text(config.read_text().replace("device: auto\n  memory", "device: cuda\n  memory"))
    assert "device: cuda\n  memory" in config.read_text()
    succeeded(project, "evaluate", config.parent)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--bag-size", "5"), "sampling is all"),
        (("--class-weights", "[1, 2]"), "add --use-class-weights"),
    ],
)
def test_settings_without_effect_are_told(project: Path, flags: tuple[str, ...], says: str) -> None:
    assert says in succeeded(project, "train-head", *flags, *FAST).stdout
