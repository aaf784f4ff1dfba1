"""A run's folder: its paths in one place, made exclusively, and its checkpoints read with suspicion."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from featstore.cohort.names import natural_key
from featstore.errors import ConfigError, FeatstoreError
from featstore.settings import Layers
from featstore.strict_yaml import parse, read_file
from heads.config import Config
from heads.models.head import Head, build_head


class RunError(FeatstoreError):
    """A run folder or a checkpoint that cannot be used."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole config, resolved."""
        return self.path / "config.yaml"

    @property
    def about(self) -> Path:
        """What was trained on what: classes, labels, store, versions."""
        return self.path / "run.json"

    @property
    def splits(self) -> Path:
        """Which case was for what."""
        return self.path / "data_splits.npz"

    @property
    def last(self) -> Path:
        """The state to resume from."""
        return self.path / "checkpoints" / "last.pth"

    @property
    def best(self) -> Path:
        """The weights of the best epoch."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def history(self) -> Path:
        """One row an epoch."""
        return self.path / "history.csv"

    @property
    def results(self) -> Path:
        """Written last: with it the run is finished."""
        return self.path / "results.json"

    @property
    def finished(self) -> bool:
        """Whether the run was trained and evaluated to the end."""
        return self.results.is_file()


def create_run(runs: Path, suffix: str | None, now: datetime | None = None) -> RunFolder:
    """Make ``run_YYYYMMDD_HHMMSS[_suffix]``; a second one in the same second gets ``-2``, and so on.

    Args:
        runs: The folder of runs.
        suffix: The name's end.
        now: The time; the present one by default.
    """
    runs.mkdir(parents=True, exist_ok=True)
    name = f"run_{now or datetime.now():%Y%m%d_%H%M%S}" + (f"_{suffix}" if suffix else "")
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()  # fails if another process was faster
        except FileExistsError:
            number += 1
            continue
        (path / "checkpoints").mkdir()
        return RunFolder(path)


def find_run(runs: Path, wanted: Path | None, finished: bool = True) -> RunFolder:
    """The run that is named, else the newest.

    Args:
        runs: The folder of runs.
        wanted: A path, or the name of a folder in ``runs``.
        finished: Only finished ones, where none is named.

    Raises:
        RunError: There is none.
    """
    if wanted is not None:
        for path in (wanted, runs / wanted):
            if (path / "run.json").is_file():
                return RunFolder(path)
        raise RunError(
            f"{wanted} is no run",
            expected="a folder that holds run.json",
            where=str(wanted),
            fix=f"choose one of the folders in {runs}",
        )
    found = [RunFolder(path) for path in runs.glob("run_*") if (path / "run.json").is_file()]
    chosen = [run for run in found if run.finished or not finished]
    if not chosen:
        raise RunError(
            f"there is no {'finished ' if finished else ''}run in {runs}"
            + (f", but {len(found)} unfinished" if found else ""),
            expected="a run folder",
            where=str(runs),
            fix="train one: featstore train-head; or go on with one: featstore train-head --resume RUN",
        )
    return max(chosen, key=lambda run: natural_key(run.path.name))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON aside and move it into place."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _replace(path, text.encode())


def write_config(path: Path, config: Config) -> None:
    """Write the config as YAML that `--config` takes."""
    text = yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    _replace(path, text.encode())


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our own reader would take for something else, such as ``1e3``."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        plain = parse(text, "") == text
    except ConfigError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def read_config(run: RunFolder) -> Config:
    """The run's own config.

    Raises:
        RunError, ConfigError: It is missing or damaged.
    """
    layers = Layers()
    layers.add(Config, read_file(run.config), str(run.config))
    return layers.build(Config)


def read_about(run: RunFolder) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        RunError: It is damaged.
    """
    try:
        about = json.loads(run.about.read_text(encoding="utf-8"))
        if {"dim", "class_names", "labels", "store"} <= set(about):
            return dict(about)
        found = "it lacks what a run's description holds"
    except (OSError, ValueError, TypeError) as error:
        found = str(error)
    raise RunError(
        f"the run's description cannot be read: {found}",
        expected="run.json as `featstore train-head` wrote it",
        where=str(run.about),
        fix="train again, or bring the file back",
    )


def save_state(run: RunFolder, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write ``last.pth``, and the best epoch's weights beside it."""
    torch.save({"identity": dict(identity), **state}, _aside(run.last))
    os.replace(_aside(run.last), run.last)
    save_best(run, state["best"], identity)


def save_best(run: RunFolder, best: Mapping[str, torch.Tensor], identity: Mapping[str, Any]) -> None:
    """Write ``best.safetensors``, with what it belongs to in its header; nothing before an epoch."""
    if best:
        header = {"featstore": json.dumps(dict(identity), ensure_ascii=False)}
        tensors = {name: value.contiguous() for name, value in best.items()}
        save_file(tensors, _aside(run.best), metadata=header)
        os.replace(_aside(run.best), run.best)


def load_state(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``last.pth``, without running any code in it.

    Args:
        path: The file.
        identity: Which head on which embeddings is expected.

    Raises:
        RunError: It is none, is damaged, or belongs to another head.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
            raise ValueError("it lacks a featstore training's state")
    except Exception as error:  # what torch raises depends on where the bytes stop making sense
        reason = (
            "it holds Python objects, which can run code" if "weights_only" in str(error) else str(error)
        )
        raise _unreadable(path, reason.splitlines()[0] if reason else "it is empty") from error
    _same_identity(path, state.pop("identity"), identity)
    return state


def load_best(run: RunFolder, config: Config, about: Mapping[str, Any]) -> Head:
    """The head with the weights of the best epoch.

    Raises:
        RunError: They are missing, damaged, or belong to another head.
    """
    head = build_head(config.head, int(about["dim"]), len(about["class_names"]))
    try:
        with safe_open(run.best, "pt") as file:
            identity = json.loads((file.metadata() or {}).get("featstore", "{}"))
            if not isinstance(identity, dict):
                raise ValueError("its header does not say what it belongs to")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(run.best, str(error)) from error
    _same_identity(run.best, identity, identity_of(config, about))
    return load_weights(head, tensors, run.best)


def load_weights(head: Head, tensors: Mapping[str, torch.Tensor], path: Path) -> Head:
    """Put weights into a head; every one must be there and fit."""
    expected = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != expected:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))[0]
        raise RunError(
            f"the checkpoint's {wrong} has shape {found.get(wrong, 'missing')}",
            expected=str(expected.get(wrong, "no such weight")),
            where=str(path),
            fix="use a checkpoint of the same head, settings and number of features",
        )
    head.load_state_dict(dict(tensors))
    return head


def identity_of(config: Config, about: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint belongs to: the head, its shape, its classes, the embeddings' fingerprint."""
    return {
        "head": config.head.name,
        "settings": config.head.model_dump(exclude={"name", "plugin"}),
        "dim": int(about["dim"]),
        "class_names": list(about["class_names"]),
        "fingerprint": about["store"]["fingerprint"],
    }


def _same_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in expected:
        if found.get(name) != expected[name]:
            raise RunError(
                f"the checkpoint is of another training: {name} is {found.get(name)!r}",
                expected=f"{name} {expected[name]!r}",
                where=str(path),
                fix="use the run's own checkpoint, or train anew",
            )


def _unreadable(path: Path, reason: str) -> RunError:
    return RunError(
        f"the checkpoint cannot be read: {reason}",
        expected="a file that `featstore train-head` wrote",
        where=str(path),
        fix="use another run, or train again",
    )


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _replace(path: Path, content: bytes) -> None:
    _aside(path).write_bytes(content)
    os.replace(_aside(path), path)
