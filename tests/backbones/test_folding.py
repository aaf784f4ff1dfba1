"""Batch normalisation folded into convolutions: the same function, and only where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from featstore.backbones import build_backbone, state_sha256
from featstore.backbones.folding import fold_batch_norms
from featstore.config import BackboneConfig


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With statistics and parameters that are all different."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.copy_(torch.rand(len(tensor), generator=generator) + 0.5)
    return norm


class Net(nn.Module):
    """A convolution and a batch normalisation, joined in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, 4, 3, bias=way == "biased")
        # Weights of their own chance: of others the fold may differ by less than is looked at.
        generator = torch.Generator().manual_seed(4)
        nn.init.uniform_(self.conv.weight, -0.2, 0.3, generator=generator)
        self.norm = trained(nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        out = self.norm(torch.relu(maps) if self.way == "relu between" else maps)
        if self.way == "also read":
            out = out + maps
        if self.way == "twice":
            out = out + self.norm(self.conv(x.flip(2)))
        if self.way == "branching" and bool(out.sum() > 0):
            out = out * 2
        return out


@pytest.mark.parametrize(
    ("way", "folded"),
    [("plain", 1), ("biased", 1), ("relu between", 0), ("also read", 0), ("twice", 0), ("branching", 0)],
)
def test_only_what_nothing_else_reads_is_folded(way: str, folded: int) -> None:
    net = Net(way).eval()
    result = fold_batch_norms(net, 16)
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert torch.allclose(result.module(image), net(image), atol=1e-5)
    assert (result.folded, result.of) == (folded, 1)
    assert (result.module is net) == (folded == 0)


@pytest.mark.parametrize(
    ("name", "folded", "of"),
    [
        ("densenet121", 59, 121),
        pytest.param("resnet50", 53, 53, marks=pytest.mark.slow),
        ("timm:test_resnet", 15, 15),
    ],
)
def test_backbones_fold_as_far_as_their_layers_allow(name: str, folded: int, of: int) -> None:
    backbone = build_backbone(BackboneConfig(name=name, weights="random:0", resize=64), Path())
    before = state_sha256(backbone.module)
    result = fold_batch_norms(backbone.module, 64)
    assert str(result) == f"{folded} of {of} batch normalisations folded into convolutions"
    assert state_sha256(backbone.module) == before
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, expected = result.module(image), backbone.module(image)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_fold_that_computes_something_else_is_not_used() -> None:
    class Peeking(Net):
        """Reads a weight behind the graph's back."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)) * self.conv.weight.sum()

    net = Peeking("plain").eval()
    assert fold_batch_norms(net, 16).module is net
