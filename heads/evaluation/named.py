"""Folders whose name is chosen beforehand: begun if they are not there, gone on with if they are.

The same command can then simply run again: after a job was requeued, or in every task of an array.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import ConfigError

_NAME = re.compile(r"[\w+-][\w.+-]{0,63}", re.ASCII)


def named_folder(runs: Path, kind: str, name: str) -> Path:
    """``RUNS/KIND_NAME``, whether it is there or not.

    Args:
        runs: The folder of runs.
        kind: ``run``, ``study``, ``finetune``, ``vae`` or ``tune``.
        name: As given by ``--as``; a whole name, as ``KIND_NAME``, means the same.

    Raises:
        ConfigError: It is no name of a folder.
    """
    short = name.removeprefix(f"{kind}_")
    if not _NAME.fullmatch(short):
        raise ConfigError(
            f"--as is {name!r}",
            expected="letters, digits, and . _ + -, at most 64",
            where="--as",
            fix=f"--as first makes, or goes on with, {runs / f'{kind}_first'}",
        )
    return runs / f"{kind}_{short}"


def check_not_both(resume: object, name: object) -> None:
    """Raises ConfigError if a folder to resume and a name are given at once."""
    if resume is not None and name is not None:
        raise ConfigError(
            f"--resume {resume} and --as {name} at once",
            expected="one of them: --as begins a folder of this name, or goes on with it",
            where="--resume, --as",
            fix="leave out --resume",
        )


@contextmanager
def made_at_once(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends: nobody sees half of it.

    If another process was faster, its folder stays, and this one's is dropped.

    Args:
        path: The name; nothing may be there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    aside.mkdir()
    try:
        yield aside
        try:
            aside.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class AlreadyDone:
    """What a command says that finds its folder finished.

    Attributes:
        path: The folder.
        text: What was found then.
    """

    path: Path
    text: str

    def to_text(self) -> str:
        """Where, and what was found."""
        return f"{self.path} is finished; nothing is done again\n{self.text}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {"run": str(self.path), "already_done": True, "interrupted": None}


def already_done(path: Path) -> AlreadyDone:
    """What a finished run says of itself: its ``results.txt``, where there is one."""
    file = path / "results.txt"
    return AlreadyDone(path, file.read_text(encoding="utf-8") if file.is_file() else "")
