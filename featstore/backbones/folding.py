"""Folding of batch normalisation into the convolution before it: less to compute, the same function.

A frozen batch normalisation is one factor and one shift a channel, and so is the end of a
convolution: w' = w · γ / √(σ² + ε), b' = (b − μ) · γ / √(σ² + ε) + β. ResNets fold wholly;
of a DenseNet, whose layers normalise before they convolve, about half.

Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True, eq=False)
class Folded:
    """What came of folding.

    Attributes:
        module: A copy with its batch normalisations folded; the module itself where none could be.
        folded: How many were.
        of: How many there are.
    """

    module: nn.Module
    folded: int
    of: int

    def __str__(self) -> str:
        return f"{self.folded} of {self.of} batch normalisations folded into convolutions"


def fold_batch_norms(module: nn.Module, size: int) -> Folded:
    """Folds every batch normalisation that reads a convolution which nothing else reads.

    Which ones do is found by tracing. What cannot be traced as a whole is traced child by child,
    and what then cannot be traced is left as it is. So is the whole module, should the folded one
    compute something else.

    Args:
        module: Frozen, in eval mode, on the CPU; is not changed.
        size: Side of its input in pixels, for a trial.
    """
    total = sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    pairs = _pairs(module, "") if total else []
    if not pairs:
        return Folded(module, 0, total)
    result = copy.deepcopy(module)
    for convolution, norm in pairs:
        _fold(result, convolution, norm)
    if not _agree(module, result, size):
        return Folded(module, 0, total)
    return Folded(result, len(pairs), total)


@torch.inference_mode()
def _agree(module: nn.Module, folded: nn.Module, size: int) -> bool:
    """Whether both compute the same of one patch of noise, within rounding."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, found = module(image), folded(image)
    return bool((found - expected).norm() <= 1e-3 * expected.norm())


class _Tracer(fx.Tracer):
    """Takes convolutions and batch normalisations for wholes, also those that libraries derive."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, nn.BatchNorm2d | nn.Conv2d)
        return known or super().is_leaf_module(m, module_qualified_name)


def _pairs(module: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """Names of (convolution, batch normalisation) that can become one."""
    if not any(isinstance(part, nn.BatchNorm2d) for part in module.modules()):
        return []
    try:
        graph = _Tracer().trace(module)
    # Tracing runs the model's own code on stand-ins for tensors: anything may be raised.
    except Exception:
        return [
            pair for name, child in module.named_children() for pair in _pairs(child, f"{prefix}{name}.")
        ]
    calls = Counter(id(_called(module, node)) for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        norm = _called(module, node)
        source = node.args[0] if node.args else None
        convolution = _called(module, source) if isinstance(source, fx.Node) else None
        if (
            isinstance(source, fx.Node)
            and _foldable(norm)
            # A derived class may compute its weight anew in every call.
            and type(convolution) is nn.Conv2d
            and len(source.users) == 1
            and calls[id(norm)] == calls[id(convolution)] == 1
        ):
            found.append((f"{prefix}{source.target}", f"{prefix}{node.target}"))
    return found


def _called(module: nn.Module, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _foldable(norm: nn.Module | None) -> bool:
    if not isinstance(norm, nn.BatchNorm2d) or norm.training or norm.running_mean is None:
        return False
    # timm's class applies dropout and an activation besides.
    return type(norm) is nn.BatchNorm2d or type(norm).__name__ == "BatchNormAct2d"


@torch.no_grad()
def _fold(root: nn.Module, convolution_name: str, norm_name: str) -> None:
    convolution: Any = root.get_submodule(convolution_name)
    norm: Any = root.get_submodule(norm_name)
    # In float64, so that nothing is lost before the one rounding at the end.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double()
    if convolution.bias is not None:
        shift = shift + convolution.bias.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = convolution.weight.dtype
    weight = (convolution.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
    rest = nn.Identity() if type(norm) is nn.BatchNorm2d else nn.Sequential(norm.drop, norm.act)
    parent, _, name = norm_name.rpartition(".")
    setattr(root.get_submodule(parent), name, rest.eval())
