"""Checkpoints: what they belong to is written in them, and they are read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from heads.config import Config
from heads.evaluation.runs import RunError, RunFolder, aside
from heads.models.head import Head, build_head


def save_state(run: RunFolder, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write ``last.pth``, and the best epoch's weights beside it."""
    torch.save({"identity": dict(identity), **state}, aside(run.last))
    os.replace(aside(run.last), run.last)
    save_best(run, state["best"], identity)


def save_best(run: RunFolder, best: Mapping[str, torch.Tensor], identity: Mapping[str, Any]) -> None:
    """Write ``best.safetensors``, with what it belongs to and its digest in its header.

    Nothing is written before there is a best epoch.
    """
    if best:
        tensors = {name: value.contiguous() for name, value in best.items()}
        # One entry: several would be written in a random order, and equal runs have equal bytes.
        about = json.dumps({**identity, "weights_sha256": _digest(tensors)}, ensure_ascii=False)
        save_file(tensors, aside(run.best), metadata={"featstore": about})
        os.replace(aside(run.best), run.best)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and values: neither safetensors nor torch notices a flipped bit."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def load_state(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``last.pth``, without running any code in it.

    Args:
        path: The file.
        identity: Which head on which embeddings is expected.

    Raises:
        RunError: It is none, is damaged, or belongs to another head.
    """
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"{broken} in it fails its checksum")
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
    load_weights(head, tensors, run.best)
    if identity.get("weights_sha256") != _digest(tensors):
        raise _unreadable(run.best, "its weights fail their checksum")
    return head


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
