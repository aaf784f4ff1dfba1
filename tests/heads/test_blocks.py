"""Which parts of a backbone learn."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from featstore.backbones.vae import build_encoder
from featstore.errors import ConfigError
from heads.training.blocks import Block, blocks_of, describe, set_mode, unfreeze


def resnet() -> nn.Module:
    with torch.device("meta"):
        whole = torchvision.models.resnet50(weights=None)
    return nn.Sequential(
        OrderedDict((n, c) for n, c in whole.named_children() if n not in ("avgpool", "fc"))
    )


def densenet() -> nn.Module:
    with torch.device("meta"):
        whole = torchvision.models.densenet121(weights=None)
    return nn.Sequential(OrderedDict(features=whole.features))


def of_timm(name: str, **options: float) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=0, **options)
    return model


class Small(nn.Sequential):
    """Norms and dropouts in all places."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                first=nn.Conv2d(3, 4, 3),
                norm=nn.BatchNorm2d(4),
                drop=nn.Dropout(0.5),
                second=nn.Sequential(
                    nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
                ),
                flat=nn.Flatten(),
                after=nn.Dropout(0.5),
            )
        )


def names(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


def owners(network: nn.Module) -> dict[str, str]:
    """Every parameter's block; each must be in one."""
    found = {name: block.name for block in blocks_of(network) for name in block.parameters}
    assert [*found] == sorted(found, key=[n for n, _ in network.named_parameters()].index)
    assert sum(len(block.parameters) for block in blocks_of(network)) == len(found)
    assert set(found) == {name for name, _ in network.named_parameters()}
    return found


def test_the_blocks_of_a_resnet() -> None:
    network = resnet()
    assert names(blocks_of(network)) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert blocks_of(network)[0].parameters == ("conv1.weight", "bn1.weight", "bn1.bias")
    found = owners(network)
    assert all(block == name.split(".")[0] for name, block in found.items() if name.startswith("layer"))


def test_the_blocks_of_a_densenet() -> None:
    network = densenet()
    assert names(blocks_of(network)) == ["stem", *(f"features.denseblock{i}" for i in range(1, 5))]
    found = owners(network)
    assert found["features.transition2.conv.weight"] == "features.denseblock2"
    assert found["features.norm5.bias"] == "features.denseblock4"
    assert found["features.norm0.bias"] == "stem"


def test_the_blocks_of_a_vision_transformer() -> None:
    network = of_timm("test_vit")
    depth = len(network.get_submodule("blocks"))
    assert names(blocks_of(network)) == ["stem", *(f"blocks.{i}" for i in range(depth))]
    found = owners(network)
    assert {found["pos_embed"], found["cls_token"], found["patch_embed.proj.weight"]} == {"stem"}
    assert {found[name] for name in found if name.startswith(("norm", "fc_norm"))} == {
        f"blocks.{depth - 1}"
    }


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("test_resnet", "layer4"),
        ("test_convnext", "stages.3"),
        ("test_efficientnet", "blocks.4"),
        ("mobilenetv3_small_050", "conv_head"),
        ("densenet121", "features.denseblock4"),
        ("swin_tiny_patch4_window7_224", "layers.3"),
        ("hrnet_w18_small", "incre_modules"),
        ("poolformer_s12", "stages"),  # says nothing of its groups
        ("rdnet_tiny", "dense_stages"),  # says nothing of coarse ones
    ],
)
def test_every_parameter_of_a_timm_model_is_in_one_block(name: str, last: str) -> None:
    with torch.device("meta"):
        network = of_timm(name)
    assert set(owners(network).values()) == set(names(blocks_of(network)))
    assert names(blocks_of(network))[-1] == last


def test_the_blocks_of_any_other_network_are_its_children() -> None:
    assert names(blocks_of(Small())) == ["first", "second"]
    assert names(blocks_of(nn.Sequential(OrderedDict(body=Small(), pool=nn.Flatten())))) == [
        "body.first",
        "body.second",
    ]
    assert names(blocks_of(nn.Linear(3, 2))) == ["weight"]
    assert blocks_of(nn.Flatten()) == []
    shared = nn.Linear(2, 2)
    assert set(owners(nn.Sequential(shared, nn.Linear(2, 2), shared))) == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }


@pytest.mark.parametrize("batch_norm", ["frozen", "affine", "train"])
@pytest.mark.parametrize("what", ["last:1", "last:2", "last:5", "all", "none", r"layer4\.2|conv1"])
def test_what_learns(what: str, batch_norm: str) -> None:
    network = resnet()
    whole = owners(network)
    by_hand = {
        "last:1": lambda name: name.startswith("layer4."),
        "last:2": lambda name: name.startswith(("layer3.", "layer4.")),
        "last:5": lambda name: True,
        "all": lambda name: True,
        "none": lambda name: False,
        r"layer4\.2|conv1": lambda name: "layer4.2" in name or "conv1" in name,
    }[what]
    is_norm = {name: "bn" in name or ".downsample.1." in name for name in whole}
    expected = [n for n in whole if by_hand(n) and not (batch_norm == "frozen" and is_norm[n])]
    assert unfreeze(network, what, batch_norm) == expected  # type: ignore[arg-type]
    assert [name for name, p in network.named_parameters() if p.requires_grad] == expected


def test_batch_norm_with_an_activation_stays_frozen_too() -> None:
    network = of_timm("test_efficientnet")
    learning = unfreeze(network, "all", "frozen")
    norms = [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert any(type(m).__name__ == "BatchNormAct2d" for m in network.modules())
    assert not any(name.startswith(f"{norm}.") for name in learning for norm in norms)
    layer_norms = of_timm("test_vit")
    assert any(name.endswith("norm1.weight") for name in unfreeze(layer_norms, "last:1", "frozen"))


@pytest.mark.parametrize(
    "what", ["last:0", "last:6", "last:", "last:-1", "last:x", "last:²", "layer9", "(", "*"]
)
def test_what_cannot_be_unfrozen_is_an_error_that_lists_the_blocks(what: str) -> None:
    network = resnet()
    with pytest.raises(ConfigError) as caught:
        unfreeze(network, what, "frozen")
    assert caught.value.where == "finetune.unfreeze"
    assert "stem, layer1, layer2, layer3, layer4" in caught.value.expected


def test_frozen_norms_alone_leave_nothing_to_learn() -> None:
    with pytest.raises(ConfigError, match="BatchNorm"):
        unfreeze(resnet(), r"bn1\.", "frozen")
    assert unfreeze(resnet(), r"^bn1\.", "affine") == ["bn1.weight", "bn1.bias"]


def in_train_mode(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if module.training}


@pytest.mark.parametrize(
    ("what", "batch_norm", "expected"),
    [
        ("none", "train", set()),
        ("last:1", "frozen", {"", "second", "second.0", "second.1", "second.3", "flat", "after"}),
        ("last:1", "affine", {"", "second", "second.0", "second.1", "second.3", "flat", "after"}),
        (
            "last:1",
            "train",
            {"", "second", "second.0", "second.1", "second.2", "second.3", "flat", "after"},
        ),
        ("first", "train", {"", "first", "drop"}),  # the norm behind it was not chosen
        ("^first|^norm", "train", {"", "first", "norm", "drop"}),
    ],
)
def test_what_learns_is_in_train_mode_and_all_else_is_not(
    what: str, batch_norm: str, expected: set[str]
) -> None:
    network = Small()
    unfreeze(network, what, batch_norm)  # type: ignore[arg-type]
    for before in (True, False):
        network.train(before)
        set_mode(network, batch_norm)  # type: ignore[arg-type]
        assert in_train_mode(network) == expected


def test_no_noise_before_what_learns_in_a_transformer() -> None:
    network = of_timm("test_vit", pos_drop_rate=0.5, drop_path_rate=0.5, proj_drop_rate=0.5)
    depth = len(network.get_submodule("blocks"))
    unfreeze(network, "last:1", "frozen")
    set_mode(network, "frozen")
    learning = in_train_mode(network)
    assert f"blocks.{depth - 1}.drop_path1" in learning
    assert "pos_drop" not in learning
    assert not any(name.startswith("blocks.0") for name in learning)
    size = network.get_submodule("patch_embed").img_size  # type: ignore[union-attr]
    images, seen = torch.rand(2, 3, *size), list[torch.Tensor]()  # type: ignore[misc]
    network.get_submodule(f"blocks.{depth - 1}").register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    first, second = network(images), network(images)
    assert torch.equal(*seen)
    assert not torch.equal(first, second)


def test_moving_statistics_move_only_where_they_may() -> None:
    images = torch.rand(4, 3, 8, 8)
    for batch_norm, moved in (("frozen", False), ("affine", False), ("train", True)):
        network = Small()
        unfreeze(network, "last:1", batch_norm)  # type: ignore[arg-type]
        set_mode(network, batch_norm)  # type: ignore[arg-type]
        network(images)
        assert not network.norm.num_batches_tracked
        assert bool(network.second[2].num_batches_tracked) is moved


def test_description() -> None:
    network = resnet()
    sizes = {name: math.prod(p.shape) for name, p in network.named_parameters()}
    whole, layer4 = sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("layer4"))
    shown = describe(network, unfreeze(network, "last:1", "affine"))
    assert shown == f"layer4 ({layer4 / 1e6:.1f} of {whole / 1e6:.1f} million parameters)"
    assert describe(network, unfreeze(network, "all", "affine")).startswith("stem to layer4 (23.5 of 23.5")
    assert describe(network, unfreeze(network, "^conv1|layer[34]", "affine")).startswith(
        "stem, layer3, layer4 ("
    )
    assert (
        describe(network, unfreeze(network, "none", "affine")) == "nothing (0 of 23.5 million parameters)"
    )
    assert describe(Small(), ["first.bias"]) == "first (4e-06 of 0.00028 million parameters)"


def test_what_has_no_part_in_the_features_is_no_block() -> None:
    encoder = build_encoder("timm:test_resnet", "random:0", 32, Path(), hidden=4, latent=2)
    names = {name for block in blocks_of(encoder) for name in block.parameters}
    assert {name for name, _ in encoder.named_parameters()} - names == {"logvar.weight", "logvar.bias"}
    unfreeze(encoder, "last:1", "frozen")
    encoder(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
