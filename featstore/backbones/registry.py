"""Name → frozen backbone, and the normalisation in front of it.

A new kind of backbone is one builder with `register_backbone`; everything else
(extraction, the store's fingerprint) knows only `Backbone`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from featstore.config import BackboneConfig
from featstore.errors import BackboneError
from featstore.images import COLOR_POLICY, NATIVE_TYPICAL, RESIZE_IMPLEMENTATION, Preprocessing
from featstore.spec import EmbeddingSpec

from .shapes import shapes
from .weights import state_sha256


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network that turns normalised patches into features.

    Attributes:
        name: As configured.
        module: Float (B, 3, size, size), normalised RGB, to float32 (B, dim); in eval mode, frozen.
        preprocessing: What its input must have gone through.
        dim: Number of features D.
        weights: As configured.
        weights_sha256: `weights.state_sha256` of the feature extractor, without a classifier.
        pool: The feature map is averaged over pool × pool cells, D = C · pool², index
            c · pool² + row · pool + column.
        final_relu: Whether DenseNet's last ReLU is applied; None for other models.
        network: The part of ``module`` that has the weights, under its library's own names.
        weights_ignored: Names in the weights file that belong to nothing here; to be shown to the user.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    dim: int
    weights: str
    weights_sha256: str
    pool: int
    final_relu: bool | None
    network: nn.Module
    weights_ignored: tuple[str, ...] = ()

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the feature map of a patch of this size in px.

        Costs a trial without data.

        Returns:
            1 × 1 where the model averages its map by itself; 0 × 0 where it cannot compute such a
            patch, because its maps vanish on the way.
        """
        try:
            found = shapes(self.module, height, width, self.name)
        except BackboneError:
            return 0, 0
        return found.map_size or (1, 1)

    def spec(
        self, channel_order: str, compute_dtype: str, stored_dtype: str, runtime: str = "torch"
    ) -> EmbeddingSpec:
        """The description of embeddings that this backbone makes.

        Args:
            channel_order: ``rgb`` or ``bgr``, of the files.
            compute_dtype: ``float32``, ``bfloat16`` or ``float16``.
            stored_dtype: ``float16`` or ``float32``.
            runtime: What computes the forward pass.
        """
        p = self.preprocessing
        return EmbeddingSpec(
            backbone=self.name,
            weights_sha256=self.weights_sha256,
            resize=p.resize,
            crop=p.crop,
            interpolation=p.interpolation,
            resize_implementation=RESIZE_IMPLEMENTATION,
            channel_order=channel_order,
            color_policy=COLOR_POLICY,
            mean=p.mean,
            std=p.std,
            pool=self.pool,
            final_relu=self.final_relu,
            compute_dtype=compute_dtype,
            stored_dtype=stored_dtype,
            runtime=runtime,
            dim=self.dim,
        )


Builder = Callable[[BackboneConfig, Path], Backbone]
_BUILDERS: dict[str, Builder] = {}
# Given a name that is none of these, they may know a path.
_PATH_BUILDERS: list[Callable[[BackboneConfig, Path], Backbone | None]] = []


def register_path_builder(
    builder: Callable[[BackboneConfig, Path], Backbone | None],
) -> Callable[[BackboneConfig, Path], Backbone | None]:
    """Registers what builds backbones that are named by a path; it gives None for other names."""
    _PATH_BUILDERS.append(builder)
    return builder


def register_backbone(name: str) -> Callable[[Builder], Builder]:
    """Registers a builder under a name, or under a prefix that ends in a colon (``timm:``)."""

    def register(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return register


def backbone_names() -> list[str]:
    """The registered names and prefixes, sorted."""
    return sorted(_BUILDERS)


def build_backbone(config: BackboneConfig, base: Path) -> Backbone:
    """Builds the backbone that the config names, on the CPU; torch's random state is left as it was.

    Args:
        config: The section ``backbone``.
        base: Folder that a relative path in ``name`` or ``weights`` starts from.

    Raises:
        BackboneError: Unknown name; weights missing, unreadable or of another network; an
            input size or a pooling that the network cannot take.
    """
    generator = torch.default_generator
    state = generator.get_state()
    try:
        # What a library draws while it builds must depend on nothing that ran before. Not
        # torch.manual_seed: it would also seed the GPU, whose state is not restored here.
        generator.manual_seed(0)
        if _builder(config.name) is None:
            for builder in _PATH_BUILDERS:
                if (found := builder(config, base)) is not None:
                    return found
        return build_by_name(config, base)
    finally:
        generator.set_state(state)


def build_by_name(config: BackboneConfig, base: Path) -> Backbone:
    """Builds a backbone of one of the libraries; arguments and errors as `build_backbone`."""
    builder = _builder(config.name)
    if builder is None:
        near = nearest(config.name, backbone_names())
        names = [n + "NAME" if n.endswith(":") else n for n in backbone_names()]
        raise BackboneError(
            f"unknown backbone {config.name!r}",
            expected=" | ".join([*names, "the folder of an exported one"]),
            where="backbone.name",
            fix=near or "for a model of timm write timm:NAME",
        )
    return builder(config, base)


def _builder(name: str) -> Builder | None:
    prefix = name.partition(":")[0] + ":"
    return _BUILDERS.get(name) or (_BUILDERS.get(prefix) if prefix in name else None)


def nearest(name: str, names: list[str]) -> str:
    """``did you mean …?``, or nothing if no name is near."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else ""


def assemble(
    config: BackboneConfig,
    network: nn.Module,
    module: nn.Module,
    preprocessing: Preprocessing,
    *,
    final_relu: bool | None = None,
    weights_ignored: tuple[str, ...] = (),
) -> Backbone:
    """Freezes a module, tries its shapes, and describes it.

    Args:
        config: The section ``backbone``.
        network: What the weights' digest is taken of: the library's own names, no classifier.
        module: Normalised input to features (B, D); holds ``network``.
        preprocessing: In front of it.
        final_relu: As in `Backbone`.
        weights_ignored: As in `Backbone`.

    Raises:
        BackboneError: The module cannot take such an input.
    """
    module.eval().requires_grad_(False)
    shape, map_size = shapes(module, preprocessing.size, preprocessing.size, config.name)
    if preprocessing.is_native:
        _check_native(module, config.name, shape, preprocessing.input_size(_TRIAL, _TRIAL)[0])
    elif map_size is not None and min(map_size) < config.pool:
        raise BackboneError(
            f"{config.name} gives a feature map of {map_size[1]} × {map_size[0]} at this size",
            expected=f"at least {config.pool} × {config.pool}, for backbone.pool {config.pool}",
            where="backbone.pool",
            fix="lower backbone.pool, or raise backbone.resize",
        )
    if len(shape) != 2:
        raise BackboneError(
            f"{config.name} gives features of shape {shape[1:]} a patch",
            expected="a vector a patch",
            where="backbone.name",
            fix="choose another model",
        )
    return Backbone(
        name=config.name,
        module=module,
        preprocessing=preprocessing,
        dim=shape[1],
        weights=config.weights,
        weights_sha256=state_sha256(network),
        pool=config.pool,
        final_relu=final_relu,
        network=network,
        weights_ignored=weights_ignored,
    )


# No multiple of any patch size: with native sizes nearly all patches are none.
_TRIAL = 2 * NATIVE_TYPICAL + 33


def _check_native(module: nn.Module, name: str, shape: tuple[int, ...], size: int) -> None:
    """Whether the module takes patches of any size, and gives features of one length."""
    try:
        fits = shapes(module, size, size, name).features == shape
    except BackboneError:
        fits = False
    if not fits:
        raise BackboneError(
            f"{name} takes patches of one size only",
            expected="a convolutional network, for native sizes",
            where="backbone.resize",
            fix="set backbone.resize: model, or choose densenet121 or resnet50",
        )


def normalize(
    batch: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> torch.Tensor:
    """(x / 255 − mean) / std, computed in float32 on the batch's device.

    Args:
        batch: (B, H, W, 3) uint8.
        mean: Per channel, on a 0 to 1 scale.
        std: Per channel.
        dtype: Of the result.

    Returns:
        (B, 3, H, W) in channels_last memory format. No synchronisation with the device,
        besides the first call's copy of six numbers.
    """
    shift, scale = _affine(tuple(mean), tuple(std), batch.device)
    # The permuted view of (B, H, W, 3) is channels_last already, and `to` keeps strides.
    return batch.permute(0, 3, 1, 2).to(torch.float32).sub_(shift).mul_(scale).to(dtype)


@lru_cache(maxsize=16)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached tensors made in inference mode would be useless to fine-tuning later.
    with torch.inference_mode(False):
        shift = torch.tensor([255 * m for m in mean], dtype=torch.float32)
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
        return shift.view(1, 3, 1, 1).to(device), scale.view(1, 3, 1, 1).to(device)
