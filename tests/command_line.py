"""Commands run in-process as typed in a folder, and what they leave behind there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cli
from tests import helpers

NOBODY = 65534
TINY_FLAGS = ("--backbone", "timm:test_resnet", "--weights", "random:0", "--resize", "32")
TINY = {
    "backbone": {"name": "timm:test_resnet", "weights": "random:0", "resize": 32},
    "extract": {"device": "cpu", "amp": "off", "batch_size": 4, "workers": 2},
}


def featstore(folder: Path, *args: object) -> Result:
    """Run a command as typed in ``folder``; whatever goes wrong must be told, not raised."""
    with contextlib.chdir(folder):
        result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"featstore {args} ends with a traceback") from result.exception
    assert "Traceback" not in result.output
    return result


def succeeded(folder: Path, *args: object) -> Result:
    """Run a command that must succeed."""
    result = featstore(folder, *args)
    assert result.exit_code == 0, result.output
    return result


def answer(folder: Path, *args: object) -> dict[str, Any]:
    """What a command says with --json: all of stdout, and nothing else in it."""
    found = json.loads(succeeded(folder, *args, "--json").stdout)
    assert isinstance(found, dict)
    return found


def refused(folder: Path, *args: object, says: tuple[str, ...] = (), to_do: bool = True) -> str:
    """Run a command that must end with code 2, say why, and leave the folder as it was.

    Returns:
        The message.
    """
    before = listing(folder)
    result = featstore(folder, *args)
    assert result.exit_code == 2, result.output
    assert listing(folder) == before
    for part in says:
        assert part in result.stderr
    if to_do:
        assert "\n  to do: " in result.stderr
    return str(result.stderr)


def all_refuse(project: Path, *flags: str, says: tuple[str, ...]) -> None:
    """init, check and extract refuse this project alike, each leaving everything as it was."""
    for command in ("check", "extract"):
        refused(project, command, *flags, says=(f"featstore {command}: ", *says))
    config = project / "featstore.yaml"
    kept = config.read_bytes()
    config.unlink()
    (project.parent / "kept.yaml").write_bytes(kept)
    refused(
        project, "init", "patches", "--config", "../kept.yaml", *flags, says=("featstore init: ", *says)
    )
    config.write_bytes(kept)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def write_config(folder: Path, *layers: dict[str, Any]) -> Path:
    """Write featstore.yaml: patches in `patches`, the tiny backbone, and what is laid over."""
    sections: dict[str, Any] = {"patches": {"folder": "patches"}, **TINY}
    for layer in layers:
        for name, value in layer.items():
            merge = isinstance(value, dict) and isinstance(sections.get(name), dict)
            sections[name] = {**sections[name], **value} if merge else value
    file = folder / "featstore.yaml"
    file.write_text(json.dumps(sections), encoding="utf-8")
    return file


def make_project(folder: Path, *layers: dict[str, Any], **cohort: Any) -> Path:
    """A project of noise patches with the tiny backbone."""
    helpers.make_cohort(folder / "patches", **{"cases": 2, "stains": ("h&e",), "slices": 1, **cohort})
    write_config(folder, *layers)
    return folder


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Without the rights of root, to whom permissions mean nothing; the test skips where that fails.

    Args:
        folder: Must be readable by everybody.
    """
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, 0)
        # The saved id stays 0: the way back.
        os.setresuid(NOBODY, NOBODY, 0)
    except OSError as error:
        pytest.skip(f"root cannot become another user here: {error}")
    try:
        if not os.access(folder, os.R_OK | os.X_OK):
            pytest.skip(f"{folder} is closed to other users")
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)
