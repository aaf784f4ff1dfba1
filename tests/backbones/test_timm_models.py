"""timm's models: every layout of feature maps, fixed input sizes, published weights from a cache."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from featstore.backbones import build_backbone, downloads, timm_models
from featstore.config import BackboneConfig
from featstore.errors import BackboneError


def build(tmp_path, **settings):
    return build_backbone(BackboneConfig(**{"weights": "random:3", "resize": 64, **settings}), tmp_path)


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(downloads, "reachable", lambda url: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_vit3"]
)
def test_pool_1_is_the_models_own(tmp_path, name):
    size = 160 if "vit" in name else 64
    backbone = build(tmp_path, name=f"timm:{name}", resize=size)
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict(backbone.module.model.state_dict())
    with torch.no_grad():
        expected = model(images(size))
    assert torch.equal(backbone.module(images(size)), expected)
    assert backbone.dim == expected.shape[1]
    assert expected.std() > 0.01


def test_pool_2_of_a_convolutional_map(tmp_path):
    backbone = build(tmp_path, name="timm:test_resnet", pool=2, resize=128)
    maps = backbone.module.model.forward_features(images(128))
    expected = maps.unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(backbone.module(images(128)), expected)


def test_pool_2_of_tokens_drops_the_prefix_and_keeps_rows(tmp_path):
    backbone = build(tmp_path, name="timm:test_vit", pool=2, resize=160)
    model = backbone.module.model
    tokens = model.forward_features(images(160))
    assert tokens.shape[1] == 101
    corner = [1 + 10 * row + column for row in range(5) for column in range(5, 10)]
    found = backbone.module(images(160)).view(2, -1, 2, 2)
    torch.testing.assert_close(found[:, :, 0, 1], tokens[:, corner].mean(1))


@pytest.mark.parametrize(("height", "width"), [(64, 256), (256, 64), (32, 160), (160, 160)])
def test_tokens_of_a_patch_that_is_no_square_keep_their_places(height, width):
    """64 tokens of 4 × 16 places are also the number of 8 × 8."""

    class Model(torch.nn.Module):
        num_features = 1

        def forward_features(self, x):
            return torch.nn.functional.avg_pool2d(x[:, :1], 16).flatten(2).transpose(1, 2)

    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.adaptive_avg_pool2d(x[:, :1], 2).flatten(1)
    torch.testing.assert_close(timm_models.TimmFeatures(Model(), 2, "timm:x")(x), want)


def test_pool_2_of_channels_last_maps(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    backbone = build(tmp_path, name=f"timm:{name}", pool=2, resize=128)
    maps = backbone.module.model.forward_features(images(128))
    assert (maps.shape, backbone.dim) == ((2, 4, 4, 768), 3072)
    found = backbone.module(images(128)).view(2, 768, 2, 2)
    torch.testing.assert_close(found[:, :, 1, 0], maps[:, 2:, :2].mean((1, 2)))


@pytest.mark.parametrize("features", [torch.zeros(2, 8), torch.zeros(2, 7, 8), [torch.zeros(2)]])
def test_what_has_no_map(features):
    class Model(torch.nn.Module):
        num_features = 8

        def forward_features(self, x):
            return features

    with pytest.raises(BackboneError, match="no two-dimensional feature map"):
        timm_models.TimmFeatures(Model(), 2, "timm:x")(images())


def test_sizes(tmp_path):
    assert build(tmp_path, name="timm:test_vit", resize=96).dim == 64
    with pytest.raises(BackboneError, match="100 × 100"):
        build(tmp_path, name="timm:test_vit", resize=100)
    one = build(tmp_path, name="timm:test_vit", resize=96)
    assert one.weights_sha256 == build(tmp_path, name="timm:test_vit", resize=160).weights_sha256


def test_a_model_of_one_size_only(tmp_path, monkeypatch):
    def create(name, num_classes):
        pytest.fail("made at its own size")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(BackboneError, match=r"set backbone\.resize: 160"):
        build(tmp_path, name="timm:test_vit", resize=64)


def test_the_models_own_preprocessing(tmp_path):
    own = build(tmp_path, name="timm:test_resnet", resize="model").preprocessing
    assert (own.size, own.crop, own.resize, own.interpolation) == (160, 160, 168, "bilinear")
    assert own.mean == (0.5, 0.5, 0.5)
    config = BackboneConfig(name="timm:x", resize="model")
    data = {"input_size": (3, 64, 64), "interpolation": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1)}
    squashed = timm_models._preprocessing({**data, "crop_mode": "squash", "crop_pct": 1.0}, config)
    assert (squashed.size, squashed.crop) == (64, None)
    for odd in ({"crop_mode": "border"}, {"input_size": (3, 64, 32)}):
        with pytest.raises(BackboneError, match="resizes in a way"):
            timm_models._preprocessing({**data, **odd}, config)


def test_unknown_names(tmp_path):
    with pytest.raises(BackboneError, match="did you mean test_resnet"):
        build(tmp_path, name="timm:test_resnt")
    with pytest.raises(BackboneError, match=r"did you mean test_resnet\.r160_in1k"):
        build(tmp_path, name="timm:test_resnet.r160")
    with pytest.raises(BackboneError, match=r"timm:resnet50\.a1_in1k"):
        build(tmp_path, name="timm:resnet50", weights="imagenet:a1_in1k")


@pytest.mark.usefixtures("offline")
def test_no_network(tmp_path):
    with pytest.raises(BackboneError) as caught:
        build(tmp_path, name="timm:test_resnet", weights="imagenet")
    assert "timm/test_resnet.r160_in1k/resolve/main/model.safetensors" in str(caught.value)
    assert "--weights PATH" in str(caught.value)
    for prefix in ("hf-hub:", "hf_hub:"):
        with pytest.raises(BackboneError, match=r"resolve|config\.json"):
            build(tmp_path, name=f"timm:{prefix}owner/net", weights="imagenet")
    published = {name.partition(".")[0] for name in timm.list_pretrained()}
    bare = next(name for name in timm.list_models() if name not in published)
    with pytest.raises(BackboneError, match="publishes no weights"):
        build(tmp_path, name=f"timm:{bare}", weights="imagenet")


def published(folder, seed=7):
    """A hub model's folder as the cache has it, with a classifier."""
    folder.mkdir()
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=10)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"num_classes": 10, "input_size": [3, 160, 160], "crop_pct": 0.95, "interpolation": "bicubic"}
    cfg |= {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "first_conv": "conv1.0", "classifier": "fc"}
    text = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(text))
    return model.eval()


def test_a_cached_hub_model_needs_no_network(tmp_path, monkeypatch):
    import huggingface_hub

    model = published(tmp_path / "snap")
    monkeypatch.setattr(downloads, "reachable", lambda url: pytest.fail("asked the network"))
    cached = lambda repo, file, revision: str(tmp_path / "snap" / file)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    hub = build(tmp_path, name="timm:hf-hub:owner/net@v1", weights="imagenet", resize="model")
    model.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(hub.module(images(160)), model(images(160)))
    assert hub.preprocessing.mean == (0.1, 0.2, 0.3)
    # The same file as published weights of a named model, and as a local file.
    named = build(tmp_path, name="timm:test_resnet", weights="imagenet")
    local = build(tmp_path, name="timm:test_resnet", weights="snap/model.safetensors")
    assert hub.weights_sha256 == named.weights_sha256 == local.weights_sha256
    assert local.weights_ignored == ()


def test_a_hub_repository_of_another_kind(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    monkeypatch.setattr(timm_models, "fetch_hub_file", lambda *a: path)
    for text in ('{"model_type": "bert"}', "[]", "{"):
        path.write_text(text)
        with pytest.raises(BackboneError, match="names no architecture"):
            build(tmp_path, name="timm:hf-hub:owner/net")


def test_the_hub_refuses(tmp_path, monkeypatch):
    import huggingface_hub

    def gated(*args, **kwargs):
        raise OSError("401: you must be authenticated")

    monkeypatch.setattr(downloads, "reachable", lambda url: True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    with pytest.raises(BackboneError, match="401: you must be authenticated"):
        build(tmp_path, name="timm:hf-hub:owner/net", weights="imagenet")
