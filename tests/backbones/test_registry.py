"""Names, shapes, normalisation, pooling, and the description that goes into the fingerprint."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from featstore.backbones import (
    Backbone,
    backbone_names,
    build_backbone,
    normalize,
    register_backbone,
    registry,
)
from featstore.backbones.registry import assemble
from featstore.backbones.shapes import GridPooling
from featstore.config import BackboneConfig
from featstore.errors import BackboneError
from featstore.images import Preprocessing


def build(tmp_path, **settings):
    return build_backbone(BackboneConfig(**{"weights": "random:3", "resize": 64, **settings}), tmp_path)


@pytest.fixture(scope="module")
def densenet(tmp_path_factory):
    return build(tmp_path_factory.mktemp("project"), name="densenet121")


def images(size=64, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def same_weights(full, backbone):
    """torchvision's own model with the backbone's weights and no classifier."""
    full.load_state_dict(backbone.module.body.state_dict(), strict=False)
    return full.eval()


def test_densenet121_is_torchvisions(densenet):
    backbone = densenet
    full = same_weights(torchvision.models.densenet121(weights=None), backbone)
    full.classifier = nn.Identity()
    x = images()
    with torch.no_grad():
        expected = full(x)
    found = backbone.module(x)
    assert (backbone.dim, backbone.final_relu) == (1024, True)
    assert torch.equal(found, expected)
    assert found.std() > 0.05


def test_densenet121_without_the_last_relu(tmp_path):
    backbone = build(tmp_path, name="densenet121", final_relu=False)
    maps = backbone.module.body(images())
    assert backbone.final_relu is False
    torch.testing.assert_close(backbone.module(images()), maps.mean((2, 3)))
    assert (backbone.module(images()) < 0).any()


def test_resnet50_is_torchvisions(tmp_path):
    backbone = build(tmp_path, name="resnet50")
    full = same_weights(torchvision.models.resnet50(weights=None), backbone)
    full.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(backbone.module(images()), full(images()))
    assert (backbone.dim, backbone.final_relu) == (2048, None)


@pytest.mark.parametrize("name", ["densenet121", "resnet50"])
def test_random_features_fit_float16(tmp_path, name):
    backbone = build(tmp_path, name=name)
    p = backbone.preprocessing
    batch = torch.stack([torch.full((64, 64, 3), v, dtype=torch.uint8) for v in (0, 255)])
    features = backbone.module(normalize(batch, p.mean, p.std, torch.float32))
    assert torch.isfinite(features.half()).all()
    assert features.std() > 0.01


def test_pool_2_by_hand(tmp_path):
    backbone = build(tmp_path, name="densenet121", pool=2)
    maps = torch.relu(backbone.module.body(images())).numpy()
    assert (backbone.dim, backbone.pool, maps.shape[2:]) == (4096, 2, (2, 2))
    expected = np.stack(
        [maps[:, c, row, column] for c in range(1024) for row in range(2) for column in range(2)],
        axis=1,
    )
    np.testing.assert_allclose(backbone.module(images()).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "n"), [(7, 2), (7, 3), (5, 5), (8, 1)])
def test_pool_grid_where_cells_overlap(side, n):
    maps = images(side).double()
    edges = [(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]
    cells = [maps[:, :, a:b, c:d].mean((2, 3)) for a, b in edges for c, d in edges]
    expected = torch.stack(cells, 2).flatten(1)
    torch.testing.assert_close(GridPooling(n)(maps), expected)
    torch.testing.assert_close(GridPooling(n)(maps.bfloat16()), expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["densenet121", "resnet50", "timm:test_resnet"])
def test_a_map_smaller_than_the_grid_is_an_error(tmp_path, name):
    with pytest.raises(BackboneError, match=f"{name} gives a feature map of 2 × 2") as caught:
        build(tmp_path, name=name, pool=3)
    assert "raise backbone.resize" in str(caught.value)


class Shrunk(nn.Module):
    """A map of 1 / step of the patch's sides, averaged over a grid."""

    def __init__(self, pool, step, reads):
        super().__init__()
        self.step, self.reads, self.grid = step, reads, GridPooling(pool)

    def forward(self, x):
        if self.reads:
            assert float(x.mean()) == 0  # a value, which no trial without data has
        return self.grid(nn.functional.avg_pool2d(x, self.step))


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("reads", [False, True], ids=["without data", "run for real"])
def test_the_map_is_seen_whichever_way_a_module_is_tried(reads):
    def made(pool, resize, step=2):
        module = Shrunk(pool, step, reads)
        config = BackboneConfig(name="x", pool=pool)
        return assemble(config, module, module, Preprocessing(resize, None, "box", HALF, HALF))

    backbone = made(4, 8)
    assert (backbone.dim, backbone.map_size(9, 31), backbone.map_size(1, 9)) == (48, (4, 15), (0, 0))
    assert not backbone.module.grid._forward_pre_hooks
    with pytest.raises(BackboneError, match="x gives a feature map of 4 × 4 at this size"):
        made(5, 8)
    # Patches at their own sizes are asked one by one: no usual size stands for them.
    assert made(16, "native", 32).map_size(600, 700) == (18, 21)


@pytest.mark.parametrize("name", ["densenet121", "resnet50", "timm:test_resnet"])
@pytest.mark.parametrize(("height", "width"), [(32, 47), (65, 100), (129, 33)])
def test_the_size_of_a_map_is_known_without_computing_it(tmp_path, name, height, width):
    backbone = build(tmp_path, name=name, pool=16, resize="native")
    seen = []
    backbone.module.grid.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        backbone.module(torch.zeros(1, 3, height, width))
    assert backbone.map_size(height, width) == tuple(seen[0])


def test_a_model_that_pools_by_itself_has_one_cell(tmp_path):
    backbone = build(tmp_path, name="timm:test_resnet", resize="native")
    assert backbone.map_size(33, 500) == (1, 1)


def test_frozen(densenet):
    module = densenet.module
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_preprocessing(densenet, tmp_path):
    whole = densenet.preprocessing
    assert (whole.resize, whole.size, whole.crop) == (64, 64, None)
    own = build(tmp_path, name="resnet50", resize="model").preprocessing
    assert (own.resize, own.size, own.crop) == (256, 224, 224)
    assert own.interpolation == "bilinear"
    assert (own.mean, own.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_spec_changes_with_what_changes_features(tmp_path):
    def fingerprint(order="rgb", **settings):
        backbone = build(tmp_path, **{"name": "timm:test_resnet", **settings})
        return backbone.spec(order, "float32", "float16").fingerprint

    all_ = [
        fingerprint(),
        fingerprint("bgr"),
        fingerprint(weights="random:4"),
        fingerprint(resize=96),
        fingerprint(pool=2),
    ]
    assert len(set(all_)) == len(all_)
    assert fingerprint() == all_[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize(dtype):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    batch = torch.randint(0, 256, (3, 8, 5, 3), dtype=torch.uint8)
    with torch.inference_mode():
        found = normalize(batch, mean, std, dtype)
    x = batch.double() / 255
    expected = ((x - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected.to(dtype).double(), atol=3e-2, rtol=1e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    # Tensors that the cache made inside inference mode must serve training later.
    assert not normalize(batch, mean, std, dtype).is_inference()


def test_unknown_names_suggest_near_ones(tmp_path):
    with pytest.raises(BackboneError, match="did you mean densenet121"):
        build(tmp_path, name="densnet121")
    with pytest.raises(BackboneError, match="timm:NAME"):
        build(tmp_path, name="vgg:16")


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(tmp_path, name="timm:test_resnet")
    assert torch.equal(torch.get_rng_state(), before)


def test_one_registration_adds_a_backbone(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @register_backbone("tuned:")
    def tuned(config, base):
        network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        third = (0.3, 0.3, 0.3)
        preprocessing = Preprocessing(32, None, "bilinear", third, third)
        return assemble(config, network, network, preprocessing)

    backbone = build(tmp_path, name="tuned:run_1")
    assert isinstance(backbone, Backbone)
    assert (backbone.name, backbone.dim) == ("tuned:run_1", 12)
    assert "tuned:" in backbone_names()


def test_features_that_are_no_vector_are_refused(tmp_path):
    identity = nn.Identity()
    with pytest.raises(BackboneError, match="shape"):
        assemble(BackboneConfig(), identity, identity, Preprocessing(8, None, "box", HALF, HALF))
