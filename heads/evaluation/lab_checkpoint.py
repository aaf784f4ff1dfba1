"""Checkpoints of a lab's own trainer of hierarchical attention, as weights of the head `hierarchical`.

The model: ``patch_projector`` (Linear, ReLU, Dropout), ``patch_attention``, ``stain_attention`` and
``case_attention`` (one architecture), ``classifier`` (Dropout, Linear). A pool is gated (``attention_V``:
Linear, Tanh; ``attention_U``: Linear, Sigmoid; ``attention_w``: Linear to 1) or not (``attention``: Linear,
Tanh, Dropout, Linear to 1). Sizes are those of the weights; features are not standardised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from heads.evaluation.checkpoints import read_plain
from heads.evaluation.runs import RunError

# The lab's pool → ours, which is called by what it pools.
_POOLS = {"patch_attention": "patch", "stain_attention": "slice", "case_attention": "stain"}
_LAYERS: dict[Literal["gated", "tanh"], dict[str, str]] = {
    "gated": {"attention_V.0": "value", "attention_U.0": "gate", "attention_w": "weight"},
    "tanh": {"attention.0": "value", "attention.3": "weight"},
}
_PROJECTOR, _CLASSIFIER = "patch_projector.0", "classifier.1"
_WRAPPER = "module."  # of torch's DataParallel


@dataclass(frozen=True)
class LabCheckpoint:
    """What a file holds.

    Attributes:
        path: The file.
        pool: The kind of the attention pools.
        weights: By the names of the head `hierarchical`, float32.
        dim: D, the number of features.
        embed_dim: Width of the projected embeddings.
        attention_hidden: Width of the pools' hidden layer.
        classes: C.
    """

    path: Path
    pool: Literal["gated", "tanh"]
    weights: dict[str, torch.Tensor]
    dim: int
    embed_dim: int
    attention_hidden: int
    classes: int

    def to_text(self) -> str:
        """One line."""
        widths = f"{self.dim} features → {self.embed_dim}, attention {self.attention_hidden}"
        return f"hierarchical, {self.pool} pools, {widths}, {self.classes} classes"


def read_lab_checkpoint(path: Path) -> LabCheckpoint:
    """Read a checkpoint without running any code in it.

    Args:
        path: A torch file with a state dict, bare or as ``model_state_dict``; names may begin with
            ``module.``.

    Raises:
        RunError: It cannot be read, or is not of this model.
    """
    state = _state(path)
    pool: Literal["gated", "tanh"] = "gated" if any("attention_U" in name for name in state) else "tanh"
    names = _names(pool)
    missing, strange = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or strange:
        found = [f"{what} {_some(some)}" for what, some in (("lacks", missing), ("has", strange)) if some]
        raise _refused(path, f"the checkpoint is of another model: it {' and '.join(found)}")
    projector, first = state[f"{_PROJECTOR}.weight"], state[_first_layer(pool)]
    classifier = state[f"{_CLASSIFIER}.weight"]
    if not projector.ndim == first.ndim == classifier.ndim == 2:
        raise _refused(path, "the checkpoint's linear layers are no matrices")
    (embed, dim), hidden, classes = projector.shape, len(first), len(classifier)
    _check_shapes(path, state, _shapes(pool, dim, embed, hidden, classes))
    if classes < 2:
        raise _refused(path, "the checkpoint's classifier has one output", "one output a class")
    weights = {ours: state[theirs].detach().float().contiguous() for theirs, ours in names.items()}
    weights |= {"standardize.mean": torch.zeros(dim), "standardize.std": torch.ones(dim)}
    return LabCheckpoint(path, pool, weights, dim, embed, hidden, classes)


def _state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, without the wrapper's prefix."""
    if not path.exists():
        raise _refused(path, f"there is no file {path}", "a checkpoint", "check the path")
    try:
        content = read_plain(path)
    except ValueError as error:
        raise _refused(
            path,
            f"the checkpoint cannot be read: {error}",
            "a torch file with nothing but tensors, numbers and text",
            "save the weights alone: torch.save({'model_state_dict': model.state_dict()}, PATH)",
        ) from error
    if isinstance(content, dict) and isinstance(content.get("identity"), dict):
        raise _refused(
            path,
            "this is a checkpoint that featstore itself wrote",
            "one of another trainer",
            "featstore evaluate RUN, with the folder of its run",
        )
    state = content.get("model_state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping) or not state:
        what = "an empty state dict" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise _refused(path, f"the checkpoint holds {what}")
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        _check_tensor(path, name, value)
        found[name.removeprefix(_WRAPPER)] = value
    if len(found) < len(state):
        raise _refused(path, f"the checkpoint has weights twice, with and without {_WRAPPER}")
    return found


def _check_tensor(path: Path, name: Any, value: Any) -> None:
    """Raises RunError unless it is a named tensor of finite numbers that the file can hold."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise _refused(path, f"the checkpoint's {name!r} is of the type {kind}, and no tensor")
    plain = value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()
    # torch takes any shape that a pickle names.
    if not plain or value.numel() * value.element_size() > path.stat().st_size:
        shape = tuple(value.shape)
        raise _refused(path, f"the checkpoint's {name} is a {value.dtype} tensor of shape {shape}")
    if not bool(torch.isfinite(value).all()):
        raise _refused(path, f"the checkpoint's {name} is not finite (NaN or infinite)", "finite weights")


def _names(pool: Literal["gated", "tanh"]) -> dict[str, str]:
    """Our name of every one of theirs."""
    layers = {_PROJECTOR: "projector", _CLASSIFIER: "classifier"}
    for theirs, ours in _POOLS.items():
        layers |= {f"{theirs}.{a}": f"pools.{ours}.{b}" for a, b in _LAYERS[pool].items()}
    return {f"{a}.{end}": f"{b}.{end}" for a, b in layers.items() for end in ("weight", "bias")}


def _first_layer(pool: Literal["gated", "tanh"]) -> str:
    return f"patch_attention.{next(iter(_LAYERS[pool]))}.weight"


def _shapes(
    pool: Literal["gated", "tanh"], dim: int, embed: int, hidden: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by their names."""
    sizes = {"projector": (embed, dim), "classifier": (classes, embed)}
    sizes |= {"value": (hidden, embed), "gate": (hidden, embed), "weight": (1, hidden)}
    found: dict[str, tuple[int, ...]] = {}
    for theirs, ours in _names(pool).items():
        layer, end = ours.rpartition(".")[::2]
        out, into = sizes[layer.rpartition(".")[2]]
        found[theirs] = (out, into) if end == "weight" else (out,)
    return found


def _check_shapes(
    path: Path, state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            found = f"the checkpoint's {name} has shape {tuple(state[name].shape)}"
            raise _refused(path, found, f"{shape}, by the other weights; the three pools are of one size")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "")


def _refused(path: Path, found: str, expected: str = "", fix: str = "") -> RunError:
    return RunError(
        found,
        expected=expected
        or f"weights of {_PROJECTOR}, {', '.join(_POOLS)} (gated or tanh pools) and {_CLASSIFIER}",
        where=str(path),
        fix=fix or "name the checkpoint of such a model; others can be trained anew: featstore train-head",
    )
