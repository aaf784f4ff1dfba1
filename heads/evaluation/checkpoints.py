"""Checkpoints: what they belong to is written in them, and they are read with suspicion."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from featstore.files import replacing
from heads.config import Config, HeadConfig, own_settings
from heads.evaluation.runs import RunError, RunFolder
from heads.models.head import Head, build_head
from heads.training.course import Progress


def save_state(run: RunFolder, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write ``last.pth``, and the best epoch's weights beside it."""
    # The best first: a state that says "finished" then never lies beside older weights.
    save_best(run, state["best"], identity)
    with replacing(run.last) as aside:
        torch.save({"identity": dict(identity), **state}, aside)


def save_best(run: RunFolder, best: Mapping[str, torch.Tensor], identity: Mapping[str, Any]) -> None:
    """Write ``best.safetensors``, with what it belongs to and its digest in its header.

    Nothing is written before there is a best epoch.
    """
    if best:
        tensors = {name: value.contiguous() for name, value in best.items()}
        # One entry: several would be written in a random order, and equal runs have equal bytes.
        about = json.dumps({**identity, "weights_sha256": _digest(tensors)}, ensure_ascii=False)
        with replacing(run.best) as aside:
            save_file(tensors, aside, metadata={"featstore": about})


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and values: neither safetensors nor torch notices a flipped bit."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_plain(path: Path) -> Any:
    """What a torch file holds, without running any code in it.

    Raises:
        ValueError: It is damaged, or holds Python objects.
    """
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"{broken} in it fails its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on where the bytes stop making sense
        reason = (
            "it holds Python objects, which can run code" if "weights_only" in str(error) else str(error)
        )
        raise ValueError(reason.splitlines()[0] if reason else "it is empty") from error


def load_state(
    path: Path, identity: Mapping[str, Any], check: Callable[[Mapping[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Read ``last.pth``, without running any code in it.

    Args:
        path: The file.
        identity: Which head on which embeddings is expected.
        check: Raises ValueError unless the parts that are used are there; by default those of a head.

    Raises:
        RunError: It is none, is damaged, or belongs to another head.
    """
    try:
        state = read_plain(path)
        if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
            raise ValueError("it lacks a featstore training's state")
    except ValueError as error:
        raise unreadable(path, str(error)) from error
    _same_identity(path, state.pop("identity"), identity)
    try:
        (check or _check_state)(state)
    except ValueError as error:
        raise unreadable(path, str(error)) from error
    return state


def _check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError unless the parts that are used are there, and of their types."""
    parts = {"head": dict, "optimizer": dict, "scaler": dict, "progress": dict, "best": dict}
    for name, kind in parts.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"its {name!r} is {type(state.get(name)).__name__}")
    missing = {"ema", "scheduler", "class_weights"} - set(state)
    if missing or not all(isinstance(value, torch.Tensor) for value in state["head"].values()):
        raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'weights'}")
    check_progress(state["progress"])


def check_progress(progress: Mapping[str, Any]) -> None:
    """Raises ValueError unless it is a training's."""
    rows = progress.get("history")
    if set(progress) != set(vars(Progress())) or not isinstance(rows, list):
        raise ValueError("its progress is not that of a training")
    if not all(isinstance(row, dict) and "epoch" in row for row in rows):
        raise ValueError("its history is not that of a training")


def load_best(run: RunFolder, config: Config, about: Mapping[str, Any]) -> Head:
    """The head with the weights of the best epoch.

    Raises:
        RunError: They are missing, damaged, or belong to another head.
    """
    head = build_head(config.head, int(about["dim"]), len(about["class_names"]))
    if not run.best.exists() and run.last.exists():
        raise _no_best_epoch(run, "it is not there")
    try:
        with safe_open(run.best, "pt") as file:
            identity = json.loads((file.metadata() or {}).get("featstore", "{}"))
            if not isinstance(identity, dict):
                raise ValueError("its header does not say what it belongs to")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(run.best, str(error)) from error
    _same_identity(run.best, identity, identity_of(config, about))
    load_weights(head, tensors, run.best)
    if identity.get("weights_sha256") != _digest(tensors):
        raise unreadable(run.best, "its weights fail their checksum")
    return head


def load_best_of(
    run: RunFolder,
    config: Config,
    about: Mapping[str, Any],
    state: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Head:
    """The head with the weights of that epoch which the last state calls the best.

    A process killed between two writes leaves a ``best.safetensors`` of another epoch beside
    ``last.pth``, which holds the best weights as well: then these are taken, and it is told.

    Args:
        run: The folder.
        config: Resolved (`heads.config.resolved`).
        about: What `run.json` says.
        state: What `load_state` gave.
        tell: Called with a remark.

    Raises:
        RunError: As `load_best`, or the state has no best epoch yet.
    """
    head = load_best(run, config, about)
    if not state["best"]:
        raise _no_best_epoch(run, f"{run.last.name} knows of no best epoch")
    own = build_head(config.head, int(about["dim"]), len(about["class_names"]))
    load_weights(own, state["best"], run.last)
    if _digest(own.state_dict()) == _digest(head.state_dict()):
        return head
    tell(
        f"warning: {run.best.name} is of another epoch than {run.last.name} says, perhaps because a "
        f"training was killed: the best weights in {run.last.name} are used; to mend it: "
        f"featstore train-head --resume {run.path}"
    )
    return own


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
        "settings": own_settings(config.head),
        "dim": int(about["dim"]),
        "class_names": list(about["class_names"]),
        "fingerprint": about["store"]["fingerprint"],
    }


def _same_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    defaults = HeadConfig().model_dump()

    def flat(identity: Mapping[str, Any]) -> dict[str, Any]:
        # A setting that is younger than the checkpoint had its default then.
        settings = identity.get("settings")
        known = settings if isinstance(settings, dict) else {}
        own = {name: known.get(name, defaults.get(name)) for name in expected["settings"]}
        return {**{k: v for k, v in identity.items() if k != "settings"}, **own}

    mine, wanted = flat(found), flat(expected)
    for name, value in wanted.items():
        if mine.get(name) != value:
            raise RunError(
                f"the checkpoint is of another training: {name} is {mine.get(name)!r}",
                expected=f"{name} {value!r}",
                where=str(path),
                fix="use the run's own checkpoint, or train anew",
            )


def _no_best_epoch(run: RunFolder, found: str) -> RunError:
    return RunError(
        f"the checkpoint cannot be read: {found}; perhaps no epoch was finished",
        expected="a best epoch",
        where=str(run.best),
        fix=f"featstore train-head --resume {run.path}",
    )


def unreadable(path: Path, reason: str) -> RunError:
    """The error for a checkpoint that is none."""
    return RunError(
        f"the checkpoint cannot be read: {reason}",
        expected="a whole file, as featstore wrote it",
        where=str(path),
        fix="use another run, or train again",
    )
