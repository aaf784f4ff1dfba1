"""Any model of timm: ``timm:NAME``, ``timm:NAME.TAG``, ``timm:hf-hub:OWNER/NAME``.

timm is imported when such a model is asked for. With ``pool: 1`` the features are the
model's own, pooled as it was trained (``num_classes=0``); with more, its last feature map
(``forward_features``) is averaged over the grid.

Source: Wightman, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featstore.config import BackboneConfig
from featstore.errors import BackboneError
from featstore.images import Preprocessing

from .downloads import fetch_hub_file, fetch_url
from .registry import Backbone, assemble, nearest, register_backbone
from .shapes import GridPooling, widened
from .weights import load_into, read_state

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]


class TimmFeatures(nn.Module):
    """A timm model without its classifier, pooled by itself or over a grid.

    Args:
        model: Made with ``num_classes=0``.
        pool: Cells a side; 1 leaves pooling to the model.
        name: For errors.
    """

    def __init__(self, model: nn.Module, pool: int, name: str) -> None:
        super().__init__()
        self.model = model
        self.grid = GridPooling(pool) if pool > 1 else None
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, D) float32 of normalised images (B, 3, H, W)."""
        features: torch.Tensor
        if self.grid is None:
            features = self.model(x)
            return widened(features)
        features = self.grid(_feature_map(self.model, x, self.name))
        return features


def _feature_map(model: Any, x: torch.Tensor, name: str) -> torch.Tensor:
    """The last feature map as (B, C, h, w), from any of the layouts that timm has."""
    maps: torch.Tensor = model.forward_features(x)
    layout = getattr(model, "output_fmt", None)
    if isinstance(maps, torch.Tensor) and maps.ndim == 4:
        last = str(layout) == "NHWC" or (
            layout is None and maps.shape[1] != model.num_features == maps.shape[3]
        )
        return maps.permute(0, 3, 1, 2) if last else maps
    if isinstance(maps, torch.Tensor) and maps.ndim == 3:
        tokens = maps[:, getattr(model, "num_prefix_tokens", 0) :]
        rows, columns = _token_grid(tokens.shape[1], *x.shape[-2:])
        if rows * columns == tokens.shape[1]:
            return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)
    shape = tuple(maps.shape) if isinstance(maps, torch.Tensor) else type(maps).__name__
    raise BackboneError(
        f"{name} has no two-dimensional feature map (its last features are {shape})",
        expected="a map, or one token for each square of the patch, to average over a grid",
        where="backbone.pool",
        fix="set backbone.pool: 1",
    )


def _token_grid(count: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens that stand for equal squares of a patch; 0 × 0 where they do not."""
    rows, columns = (round(math.sqrt(count * a / b)) for a, b in ((height, width), (width, height)))
    return (rows, columns) if rows * width == columns * height else (0, 0)


@register_backbone("timm:")
def timm_model(config: BackboneConfig, base: Path) -> Backbone:
    """Builds ``timm:NAME`` for the asked input size, with published, local or random weights."""
    name = config.name.removeprefix("timm:")
    if config.weights.startswith("imagenet:"):
        tagged = f"{name.partition('.')[0]}.{config.weights.removeprefix('imagenet:')}"
        raise BackboneError(
            f"{config.weights!r} means nothing to timm",
            expected="imagenet, with the tag in the model's name",
            where="backbone.weights",
            fix=f"set backbone.name: timm:{tagged}",
        )
    source = _Source(name, config.name)
    preprocessing = _preprocessing(source.data_config(), config)
    model = source.create(preprocessing.size, config.weights == "imagenet")
    ignored: tuple[str, ...] = ()
    if config.weights != "imagenet":
        ignored = load_into(model, config.weights, base, config.name, source.weights_file)
    module = TimmFeatures(model, config.pool, config.name)
    return assemble(config, model, module, preprocessing, weights_ignored=ignored)


class _Source:
    """Where a model's definition and published weights come from."""

    def __init__(self, name: str, shown: str) -> None:
        import timm

        self.shown = shown
        self.repo = ""
        self.revision: str | None = None
        self.name = name
        self.cfg: dict[str, Any]
        for prefix in _HUB_PREFIXES:
            if name.startswith(prefix):
                self.repo, _, revision = name.removeprefix(prefix).partition("@")
                self.revision = revision or None
        if self.repo:
            config = fetch_hub_file(self.repo, self.revision, ["config.json"], shown)
            # With its files at hand the model is made from their folder, without the hub's client.
            self.name = f"local-dir:{config.parent}"
            self.cfg = _hub_config(config, shown)
            return
        if not timm.is_model(name.partition(".")[0]) or not self._has_tag(name):
            raise _unknown(name)
        found = timm.get_pretrained_cfg(name)
        self.cfg = found.to_dict() if found is not None else {}

    @staticmethod
    def _has_tag(name: str) -> bool:
        import timm

        return "." not in name or name in timm.list_pretrained(name.partition(".")[0] + "*")

    def data_config(self) -> dict[str, Any]:
        """Input size, crop, interpolation, mean and std of the published model."""
        from timm.data import resolve_data_config

        resolved: dict[str, Any] = resolve_data_config(pretrained_cfg=self.cfg)
        return resolved

    def weights_file(self) -> Path:
        """The published weights, on this machine."""
        hub = self.repo or str(self.cfg.get("hf_hub_id") or "")
        if hub:
            repo, _, revision = hub.partition("@")
            given = self.cfg.get("hf_hub_filename")
            safe = (
                [given.replace("pytorch_model.bin", "model.safetensors"), given] if given else _WEIGHT_FILES
            )
            return fetch_hub_file(
                repo, self.revision or revision or None, list(dict.fromkeys(safe)), self.shown
            )
        if self.cfg.get("url"):
            return fetch_url(str(self.cfg["url"]), self.shown)
        raise BackboneError(
            f"timm publishes no weights for {self.shown}",
            expected="a model with weights, a file of your own, or random:SEED",
            where="backbone.weights",
            fix=f"see timm.list_pretrained(); {_suggest(self.name, pretrained=True)}",
        )

    def create(self, size: int, pretrained: bool) -> nn.Module:
        """The model for square inputs of a size, with or without its published weights."""
        import timm

        kwargs: dict[str, Any] = {"num_classes": 0}
        if pretrained:
            path = self.weights_file()
            kwargs["pretrained"] = True
            if not self.repo:
                # timm's own filters adapt the published names; as a dict, so that read_state reads it.
                entry = "file" if self.cfg.get("custom_load") else "state_dict"
                kwargs["pretrained_cfg_overlay"] = {
                    entry: str(path) if entry == "file" else read_state(path)
                }
        input_size = self.cfg.get("input_size") or (3, 224, 224)
        sizes: list[dict[str, Any]] = [{}]
        if tuple(input_size[1:]) != (size, size):
            # With dynamic_img_size position embeddings keep the shape that weights files have.
            fixed = self.cfg.get("fixed_input_size")
            sizes = [{"dynamic_img_size": True} if fixed else {}, {"img_size": size}]
        cause: Exception | None = None
        for option in sizes:
            try:
                model: nn.Module = timm.create_model(self.name, **kwargs, **option)
            except TypeError as error:
                cause = error
                continue
            except (AssertionError, RuntimeError, ValueError) as error:
                cause = error
                break
            if len(sizes) > 1 and not _takes(model, size):
                continue
            # The overlay's tensors would otherwise stay in memory with the model.
            getattr(model, "pretrained_cfg", {}).pop("state_dict", None)
            return model
        raise BackboneError(
            f"{self.shown} cannot be built for patches of {size} × {size} px: {cause}",
            expected=f"its own input size, {input_size[1]} × {input_size[2]} px",
            where="backbone.resize",
            fix=f"set backbone.resize: {input_size[1]}",
        ) from cause


def _takes(model: nn.Module, size: int) -> bool:
    """Whether patches of this size fit; some models swallow an option without heeding it."""
    embed = getattr(model, "patch_embed", None)
    strict = getattr(embed, "strict_img_size", False)
    return not strict or getattr(embed, "img_size", None) in (None, (size, size))


def _hub_config(path: Path, shown: str) -> dict[str, Any]:
    """The part of a hub model's ``config.json`` that describes its inputs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        content = error
    if not isinstance(content, dict) or "architecture" not in content:
        raise BackboneError(
            f"{shown} is no model of timm's kind: its config.json names no architecture",
            expected="a hub model whose card says timm",
            where=str(path),
            fix="choose another model, or fetch its weights and give them as --weights PATH",
        )
    # Older files have everything on one level.
    found = content.get("pretrained_cfg", content)
    return dict(found) if isinstance(found, dict) else {}


def _preprocessing(data: dict[str, Any], config: BackboneConfig) -> Preprocessing:
    """From timm's data config, of which all but ``model`` keeps interpolation, mean and std."""
    size, crop = data["input_size"][1], None
    resize = size if config.resize == "model" else config.resize
    if config.resize == "model":
        mode, share = data.get("crop_mode") or "center", float(data.get("crop_pct") or 0.875)
        plain = mode == "center" or (mode == "squash" and share == 1.0)
        if data["input_size"][1] != data["input_size"][2] or not plain:
            raise BackboneError(
                f"{config.name} resizes in a way that featstore does not ({mode}, {data['input_size']})",
                expected="square inputs with a centre crop",
                where="backbone.resize",
                fix=f"set backbone.resize: {size}",
            )
        if mode == "center":
            crop, resize = size, math.floor(size / share)
    return Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=str(data["interpolation"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _suggest(name: str, pretrained: bool) -> str:
    import timm

    architecture = name.partition(".")[0]
    names = timm.list_pretrained() if pretrained or timm.is_model(architecture) else timm.list_models()
    return nearest(name, names)


def _unknown(name: str) -> BackboneError:
    return BackboneError(
        f"timm has no model {name!r}",
        expected="a name, or NAME.TAG, that timm.list_models() or timm.list_pretrained() gives",
        where="backbone.name",
        fix=_suggest(name, pretrained=False) or "python -c 'import timm; print(timm.list_models())'",
    )
