"""Stores and folders that cannot be written or read: told with code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from featstore.store import files
from tests import helpers
from tests.command_line import (
    as_nobody,
    featstore,
    listing,
    make_project,
    refused,
    succeeded,
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    helpers.write_labels(tmp_path, {"1": "1", "2": "3"})
    return make_project(tmp_path, {"labels": {"file": "labels.csv"}})


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach (pytest's own are closed to them)."""
    folder = Path(tempfile.mkdtemp(prefix="featstore-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_store_made_with_another_backbone(project: Path) -> None:
    succeeded(project, "extract")
    refused(
        project,
        "extract",
        "--weights",
        "random:1",
        says=("embeddings of another make", "weights_sha256", str(project / "store"), "--store-path"),
    )
    refused(project, "extract", "--channel-order", "bgr", says=("channel_order", "another make"))
    refused(project, "extract", "--dtype", "float32", says=("stored_dtype", "another make"))


def test_paths_that_are_no_store(project: Path) -> None:
    (project / "a_file").write_text("mine")
    refused(project, "extract", "--store", "a_file", says=("the store's path is a file", "a_file"))
    refused(project, "extract", "--store", "a_file/deeper", says=("a_file",))
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").write_text("mine")
    refused(project, "extract", "--store", "mine", says=("other things than a store (thesis.txt)", "mine"))
    refused(project, "info", says=("there is no embedding store here", str(project / "store")))


def test_a_store_of_a_later_format(project: Path) -> None:
    succeeded(project, "extract")
    manifest = project / "store" / "featstore.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "format": ["featstore", 2, 0]}))
    for command in ("info", "extract", "check"):
        refused(project, command, says=("the format is ['featstore', 2, 0]", str(manifest)))


@pytest.mark.parametrize("error", [PermissionError(1, "Not permitted"), OSError(95, "Unsupported")])
def test_no_hard_links(project: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def refuse(source: object, target: object) -> None:
        raise type(error)(*error.args, source, None, target)

    monkeypatch.setattr(files.os, "link", refuse)
    refused(project, "extract", says=("no hard links", "--store-path"))


def test_no_permission_to_read(open_folder: Path) -> None:
    project = make_project(open_folder, {"labels": {"file": "labels.csv"}}, stains=("h&e", "melan"))
    helpers.write_labels(project, {"1": "1", "2": "3"})
    succeeded(project, "check")
    shutil.rmtree(project / "reports")
    project.chmod(0o777)
    inner = project / "patches" / "inner"
    inner.mkdir()
    patch = next((project / "patches").glob("*.png"))
    for path, says in (
        (project / "patches", f"{project / 'patches'} cannot be read: Permission denied"),
        (inner, f"{inner} cannot be read: Permission denied"),
        (project / "labels.csv", f"{project / 'labels.csv'} cannot be read: Permission denied"),
        (project / "featstore.yaml", "the config cannot be read (Permission denied)"),
        (patch, f"{patch.name}: cannot be read: Permission denied"),
    ):
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            with as_nobody(project):
                message = refused_unseen(project, "extract", says)
        finally:
            path.chmod(mode)
        assert path.name in message
        assert not (project / "store").exists()


def refused_unseen(project: Path, command: str, says: str) -> str:
    """`refused`, where the folder cannot be listed from within."""
    result = featstore(project, command)
    assert (result.exit_code, says in result.stderr) == (2, True), result.output
    assert "\n  to do: " in result.stderr
    return str(result.stderr)


def test_no_permission_to_write(open_folder: Path) -> None:
    project = make_project(open_folder)
    succeeded(project, "extract", "--store", "mine")
    before = listing(project)
    modes = {path: path.stat().st_mode for path in [project, *project.rglob("*")]}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        with as_nobody(project):
            refused(project, "extract", says=("no permission to write", str(project)))
            refused(project, "extract", "--store", "mine", says=("no permission to write", "mine"))
            refused(project, "extract", "--store", "/featstore-test", says=("no permission to write",))
            refused(project, "init", "patches", "--force", says=("no permission to write", str(project)))
            refused(project, "check", says=("ermission", str(project / "reports")))
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert listing(project) == before
