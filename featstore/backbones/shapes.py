"""What comes out of a module for patches of a size: found without data, before anything is computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from featstore.errors import BackboneError


class GridPooling(nn.Module):
    """Averages feature maps over n × n cells, in float32 (in float64, if that is what they are).

    Where n does not divide a side, cells overlap by a row (adaptive pooling: cell i spans rows
    floor(i·h/n) to ceil((i+1)·h/n)). Of a map with fewer than n rows cells share theirs: refused where all
    patches have one size, counted with native sizes; looked at beforehand, as a compiled graph cannot ask.

    Args:
        n: Cells a side.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Features (B, C · n²) of maps (B, C, h, w), index c · n² + row · n + column."""
        return nn.functional.adaptive_avg_pool2d(widened(maps), self.n).flatten(1)


def widened(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or in float64 if that is what they are."""
    return values if values.dtype == torch.float64 else values.float()


class Shapes(NamedTuple):
    """What a module makes of one patch.

    Attributes:
        features: Shape of the features, the leading 1 included.
        map_size: Height and width of the map that a `GridPooling` averages; None where there is none.
    """

    features: tuple[int, ...]
    map_size: tuple[int, int] | None


@torch.no_grad()
def shapes(module: nn.Module, height: int, width: int, name: str) -> Shapes:
    """What a module makes of a patch of this size, computed without data where the model allows it.

    Args:
        module: Float (1, 3, height, width) to features.
        height: In px.
        width: In px.
        name: Of the backbone, for errors.

    Raises:
        BackboneError: The module cannot take such a patch.
    """
    seen: list[tuple[int, int]] = []

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append((int(inputs[0].shape[-2]), int(inputs[0].shape[-1])))

    hooks = [
        part.register_forward_pre_hook(look) for part in module.modules() if isinstance(part, GridPooling)
    ]
    try:
        features = _features(module, height, width, name)
    finally:
        for hook in hooks:
            hook.remove()
    return Shapes(features, seen[-1] if seen else None)


def _features(module: nn.Module, height: int, width: int, name: str) -> tuple[int, ...]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = {key: torch.empty_like(value, device="meta") for key, value in tensors.items()}
    try:
        image = torch.empty(1, 3, height, width, device="meta")
        return tuple(torch.func.functional_call(module, meta, (image,)).shape)
    except BackboneError:
        raise
    except Exception:
        # Some models mix in tensors of their own or read values; those are run for real.
        try:
            device = next(iter(tensors.values())).device if tensors else None
            return tuple(module(torch.zeros(1, 3, height, width, device=device)).shape)
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise BackboneError(
                f"{name} cannot take patches of {width} × {height} px: {error}",
                expected="a size that the model was made for",
                where="backbone.resize",
                fix="set backbone.resize: model, or a multiple of the model's patch size",
            ) from error
