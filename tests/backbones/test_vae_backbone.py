"""The encoder of a β-VAE as a backbone: what it computes, and that its export computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore.backbones import build_backbone, normalize
from featstore.backbones.exported import _digest, export_backbone
from featstore.backbones.folding import fold_batch_norms
from featstore.backbones.vae import VaeEncoder, build_encoder, description_of
from featstore.config import BackboneConfig
from featstore.errors import BackboneError
from featstore.images import prepare

NAME, SIZE, HIDDEN, LATENT = "timm:test_resnet", 32, 16, 8


@pytest.fixture
def encoder() -> VaeEncoder:
    """With statistics of batch normalisation that a training has moved."""
    torch.manual_seed(0)
    made = build_encoder(NAME, "random:0", SIZE, Path(), HIDDEN, LATENT)
    for _ in range(3):
        made(torch.rand(4, 3, SIZE, SIZE))
    return made


def export(encoder: VaeEncoder, folder: Path) -> Path:
    export_backbone(folder, "vae", encoder, description_of(NAME, SIZE, HIDDEN, LATENT))
    return folder


def test_mean_and_logvar_are_two_layers_on_two_layers_on_normalised_features(encoder: VaeEncoder) -> None:
    encoder.eval()
    x = torch.rand(2, 3, SIZE, SIZE)
    body = build_backbone(BackboneConfig(name=NAME, weights="random:0", resize=SIZE), Path())
    mean, std = np.array(body.preprocessing.mean), np.array(body.preprocessing.std)
    normalised = (x.numpy() - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)
    with torch.no_grad():
        h = encoder.features(torch.from_numpy(normalised.astype(np.float32))).numpy()
        both = [each.numpy() for each in encoder.both(x)]
        assert torch.equal(encoder(x), encoder.both(x)[0])
    weights = {name: value.numpy() for name, value in encoder.state_dict().items()}
    for layer in ("hidden.0", "hidden.2"):
        h = np.maximum(h @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"], 0)
    for found, layer in zip(both, ("mean", "logvar"), strict=True):
        expected = h @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert found.shape == (2, LATENT)


def test_torchvisions_networks_are_normalised_as_imagenet() -> None:
    made = build_encoder("resnet50", "random:0", 32, Path(), 4, 2)
    assert made.shift.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert made.scale.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert all(p.requires_grad for p in made.parameters())
    assert made.training
    assert made.hidden[0].in_features == 2048


def test_an_export_computes_the_very_same(encoder: VaeEncoder, tmp_path: Path) -> None:
    backbone = build_backbone(BackboneConfig(name=str(export(encoder, tmp_path / "out"))), tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    p = backbone.preprocessing
    assert np.array_equal(prepare(pixels[0], p), pixels[0])
    x = normalize(torch.from_numpy(pixels), p.mean, p.std, torch.float32)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    encoder.eval()
    with torch.no_grad():
        assert torch.equal(backbone.module(x), encoder(x))
    assert (backbone.name, backbone.dim, backbone.pool) == (f"vae:{NAME}", LATENT, 1)
    assert not any(each.requires_grad for each in backbone.module.parameters())
    folded = fold_batch_norms(backbone.module, SIZE)
    assert folded.folded == folded.of > 0


def test_a_description_or_weights_that_are_not_whole(encoder: VaeEncoder, tmp_path: Path) -> None:
    folder = export(encoder, tmp_path / "out")
    description = folder / "backbone.json"
    kept = json.loads(description.read_text())
    for change, says in (
        ({"description": {"encoder": NAME}}, "not complete"),
        ({"description": {**kept["description"], "latent": LATENT + 1}}, "do not fit vae:timm:test_resnet"),
    ):
        changed = {**kept, **change}
        changed["description_sha256"] = _digest(changed["description"])
        description.write_text(json.dumps(changed))
        with pytest.raises(BackboneError, match=says):
            build_backbone(BackboneConfig(name=str(folder)), tmp_path)


def test_an_encoder_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="unknown backbone 'resnet5'"):
        build_encoder("resnet5", "random:0", SIZE, tmp_path)
