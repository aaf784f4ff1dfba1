"""Backbones that were trained here: a folder of weights and a description, used by its path.

    FOLDER/backbone.json                       what it is: kind, how to build it, digest, where from
    FOLDER/backbone-<digest>.safetensors       its weights, under their library's own names

The weights are named after their digest and the description is written last, so that a folder
always holds a whole backbone: the old one or the new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from featstore.config import BackboneConfig
from featstore.errors import BackboneError
from featstore.files import replacing
from featstore.images import Preprocessing

from .registry import Backbone, build_by_name, register_path_builder
from .weights import state_sha256

FORMAT = "featstore backbone 1"
DESCRIPTION = "backbone.json"
FINETUNED = "finetuned"


@dataclass(frozen=True)
class ExportSpec:
    """What an exported backbone says of itself.

    Attributes:
        kind: Who builds it: ``finetuned``, ``vae``, …
        description: What its builder needs to know, JSON types.
        made_by: Where it comes from: run, versions, settings; for the reader.
        weights: The file of its weights.
        weights_sha256: `weights.state_sha256` of the network.
        path: The description itself.
    """

    kind: str
    description: dict[str, Any]
    made_by: dict[str, Any]
    weights: Path
    weights_sha256: str
    path: Path


Builder = Callable[[ExportSpec, BackboneConfig], Backbone]
_BUILDERS: dict[str, Builder] = {}


def register_export(kind: str) -> Callable[[Builder], Builder]:
    """Registers what builds the exported backbones of a kind, their weights included."""

    def register(builder: Builder) -> Builder:
        _BUILDERS[kind] = builder
        return builder

    return register


def export_backbone(
    folder: Path,
    kind: str,
    network: nn.Module,
    description: Mapping[str, Any],
    made_by: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained backbone, to be used as ``--backbone FOLDER``.

    Args:
        folder: Made where missing; a backbone that it holds already is replaced.
        kind: One that `register_export` knows.
        network: Whose parameters and buffers are written; without a classifier.
        description: What the builder of this kind needs to know, JSON types.
        made_by: Where it comes from, JSON types.

    Returns:
        The description's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = state_sha256(network)
    weights = folder / f"backbone-{digest[:12]}.safetensors"
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with replacing(weights) as aside:
        save_file(tensors, aside)
    content = {
        "format": FORMAT,
        "kind": kind,
        "weights": weights.name,
        "weights_sha256": digest,
        "description": dict(description),
        "description_sha256": _digest(description),
        "made_by": dict(made_by or {}),
    }
    with replacing(folder / DESCRIPTION) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for other in folder.glob("backbone-*.safetensors"):
        if other != weights:
            other.unlink(missing_ok=True)
    return folder / DESCRIPTION


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def export_again(
    folder: Path, backbone: Backbone, config: BackboneConfig, base: Path, made_by: Mapping[str, Any]
) -> Path:
    """Write a backbone whose weights were trained on since it was built.

    Args:
        folder: As in `export_backbone`.
        backbone: With the weights of now in its network.
        config: What it was built by: a library's name, or the path of an exported backbone.
        base: Folder that a relative path in ``config`` starts from.
        made_by: Where it comes from, JSON types.

    Returns:
        The description's path.
    """
    path = base / Path(config.name).expanduser()
    if is_export(path):
        before = read_export(path)
        return export_backbone(folder, before.kind, backbone.network, before.description, made_by)
    network = {name: getattr(config, name) for name in ("name", "resize", "pool", "final_relu")}
    # Recorded, since a library may change what it thinks the right preprocessing is.
    description = {**network, "preprocessing": asdict(backbone.preprocessing), "dim": backbone.dim}
    return export_backbone(folder, FINETUNED, backbone.network, description, made_by)


def is_export(path: Path) -> bool:
    """Whether a path is that of an exported backbone: its folder, or its description."""
    return (path / DESCRIPTION).is_file() or (path.name == DESCRIPTION and path.is_file())


@register_path_builder
def build_exported(config: BackboneConfig, base: Path) -> Backbone | None:
    """The exported backbone that ``name`` is the path of; None if it is no path of one.

    It brings weights, resize, pool and final_relu with it; those of the settings do not count.

    Args:
        config: The section ``backbone``.
        base: Folder that a relative path starts from.

    Raises:
        BackboneError: The folder is damaged, incomplete, or of a kind that is not known here.
    """
    path = base / Path(config.name).expanduser()
    if not is_export(path):
        if path.is_dir() or path.suffix == ".json":
            raise BackboneError(
                f"there is no exported backbone in {config.name!r}",
                expected=f"a folder that holds {DESCRIPTION}, as `featstore finetune` writes it",
                where=str(path.absolute()),
                fix="name the folder `backbone` of a run of finetune or train-vae",
            )
        return None
    spec = read_export(path)
    builder = _BUILDERS.get(spec.kind)
    if builder is None:
        raise BackboneError(
            f"the backbone is of a kind that is not known here: {spec.kind!r}",
            expected=" | ".join(sorted(_BUILDERS)),
            where=str(spec.path),
            fix="use the version of featstore that wrote it, or a later one",
        )
    backbone = builder(spec, config)
    if backbone.weights_sha256 != spec.weights_sha256:
        raise damaged(spec.path, f"the weights in {spec.weights.name} are not those that were written")
    return backbone


@register_export(FINETUNED)
def _finetuned(spec: ExportSpec, config: BackboneConfig) -> Backbone:
    try:
        own = {name: spec.description[name] for name in ("name", "resize", "pool", "final_relu")}
        known = {**spec.description["preprocessing"]}
        known.update({name: tuple(known[name]) for name in ("mean", "std")})
        preprocessing = Preprocessing(**known)
        network = BackboneConfig(**own, weights=str(spec.weights.absolute()))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(spec.path, f"its description is not complete ({error})") from error
    return replace(build_by_name(network, spec.path.parent), preprocessing=preprocessing)


def read_export(path: Path) -> ExportSpec:
    """What an exported backbone says of itself.

    Args:
        path: Its folder, or its description.

    Raises:
        BackboneError: It cannot be read, or its weights are missing.
    """
    file = path / DESCRIPTION if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise BackboneError(
                f"the backbone's format is {content['format']!r}",
                expected=FORMAT,
                where=str(file),
                fix="use the version of featstore that wrote it, or a later one",
            )
        weights = file.parent / Path(str(content["weights"])).name
        found = ExportSpec(
            str(content["kind"]),
            dict(content["description"]),
            dict(content.get("made_by", {})),
            weights,
            str(content["weights_sha256"]),
            file,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from error
    if content.get("description_sha256") != _digest(found.description):
        raise damaged(file, "its description is not what was written")
    if not weights.is_file():
        raise damaged(file, f"its weights, {weights.name}, are missing")
    return found


def damaged(path: Path, reason: str) -> BackboneError:
    """The error for an exported backbone that cannot be used."""
    return BackboneError(
        f"the exported backbone cannot be used: {reason}",
        expected=f"{DESCRIPTION} and its weights, as they were written",
        where=str(path),
        fix="copy the whole folder again, or export it anew from its run",
    )
