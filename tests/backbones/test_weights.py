"""Weights files of every make: found by name and shape, or refused with the reason."""

import hashlib
import io
import subprocess
import sys
import urllib.error
import urllib.request
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from featstore.backbones import build_backbone, downloads, state_sha256, weights
from featstore.config import BackboneConfig
from featstore.errors import BackboneError


def small():
    """A network with every kind of tensor that matters, and DenseNet's names."""
    layer = nn.Module()
    layer.norm1, layer.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
    return nn.Sequential(OrderedDict(features=nn.Sequential(OrderedDict(denselayer1=layer)))).eval()


def filled(seed=0):
    network = small()
    weights.init_random(network, seed)
    with torch.no_grad():
        network.features.denselayer1.norm1.running_mean.fill_(0.5)
    return network


def load(path, base=Path("/")):
    network = small()
    ignored = weights.load_into(network, str(path), base, "small", lambda: pytest.fail("fetched"))
    return network, ignored


def old_names(state):
    """The names of torchvision's first DenseNets."""
    return {k.replace("norm1.", "norm.1.").replace("conv1.", "conv.1."): v for k, v in state.items()}


PREFIXES = ["", "module.", "model.", "module.model.0.", "backbone.", "encoder.", "module.encoder."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_prefixes_and_wrappers(tmp_path, prefix, wrapper):
    state = {prefix + k: v for k, v in old_names(filled().state_dict()).items()}
    state["module.fc_4.weight"] = torch.zeros(4, 4)
    state["classifier.bias"] = torch.zeros(4)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    network, ignored = load("w.pth", tmp_path)
    assert state_sha256(network) == state_sha256(filled())
    assert ignored == ()


def test_the_best_prefix_wins_and_the_rest_is_reported(tmp_path):
    state = {"model." + k: v for k, v in filled(1).state_dict().items()}
    state |= {"ema." + k: v for k, v in filled(2).state_dict().items()}
    state["decoder.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "w.pt")
    network, ignored = load(tmp_path / "w.pt")
    assert state_sha256(network) == state_sha256(filled(1))
    assert "decoder.weight" in ignored
    assert "ema.features.denselayer1.conv1.weight" in ignored


def test_a_better_prefix_by_shape(tmp_path):
    """The same names twice: only the set with fitting shapes is taken."""
    state = {k: torch.zeros(1) for k in filled().state_dict()}
    state |= {"encoder." + k: v for k, v in filled().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert state_sha256(load(tmp_path / "w.pt")[0]) == state_sha256(filled())


def test_the_digest_is_of_the_weights_not_of_the_file(tmp_path):
    state = filled().state_dict()
    without = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file({"module." + k: v for k, v in without.items()}, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.bin")
    one, two = load(tmp_path / "w.safetensors")[0], load(tmp_path / "w.bin")[0]
    assert state_sha256(one) == state_sha256(two) == state_sha256(filled())
    assert state_sha256(one.to(memory_format=torch.channels_last)) == state_sha256(two)
    two.features.denselayer1.norm1.running_var[0] += 1e-6
    assert state_sha256(one) != state_sha256(two)


def test_the_digest_by_hand():
    linear = nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(-2.0)
    text = b"bias torch.float32 (1,)\n\0\0\0\xc0weight torch.float32 (1, 1)\n\0\0\x80\x3f"
    assert state_sha256(linear) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "key", ["features.denselayer1.conv1.weight", "features.denselayer1.norm1.running_var"]
)
def test_missing_reshaped_and_broken_tensors(tmp_path, key):
    path = tmp_path / "w.pth"
    state = filled().state_dict()
    torch.save({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(BackboneError, match=f"1 of 6 missing, e.g. {key}"):
        load(path)
    torch.save({**state, key: state[key].flatten()[:2]}, path)
    with pytest.raises(BackboneError, match=rf"1 of another shape or kind, e.g. {key}: \(2,\), expected"):
        load(path)
    torch.save({**state, key: state[key].to(torch.int8)}, path)
    with pytest.raises(BackboneError, match="another shape or kind"):
        load(path)
    torch.save({**state, key: state[key] * float("nan")}, path)
    with pytest.raises(BackboneError, match=f"NaN or infinity, e.g. {key}"):
        load(path)


class Opaque:
    """Needs more than tensors to unpickle."""


@pytest.mark.parametrize(
    "content", [Opaque(), {"state_dict": {"a": torch.zeros(1)}, "args": Opaque()}, small()]
)
def test_a_pickle_of_objects_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="Python objects"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, torch.zeros(3)])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="no tensors by name"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_and_foreign_files(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(filled().state_dict(), path)
    data = path.read_bytes()
    for length in (0, 3, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(BackboneError, match="weights file"):
            load(path)
    path.write_bytes(b"<html>404</html>" * 10)
    with pytest.raises(BackboneError, match="weights file"):
        load(path)


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(BackboneError, match="does not exist") as caught:
        load("nets/w.pth", tmp_path)
    assert str(tmp_path / "nets" / "w.pth") in str(caught.value)
    with pytest.raises(BackboneError, match="is a folder"):
        load(tmp_path)


def test_kimianet_like_file(tmp_path):
    """DenseNet121 as KimiaNet's file has it: DataParallel, wrapped, with a head of its own."""
    full = torchvision.models.densenet121(weights=None)
    state = {
        f"module.model.0.{k.removeprefix('features.')}": v for k, v in full.features.state_dict().items()
    }
    torch.save({**state, "module.fc_4.weight": torch.zeros(30, 1024)}, tmp_path / "k.pth")
    config = BackboneConfig(name="densenet121", weights="k.pth", resize=64)
    backbone = build_backbone(config, tmp_path)
    assert backbone.weights_ignored == ()
    assert torch.equal(backbone.module.body.features.conv0.weight, full.features.conv0.weight)
    with pytest.raises(BackboneError, match="do not fit resnet50"):
        build_backbone(config.model_copy(update={"name": "resnet50"}), tmp_path)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1))
def test_any_seed_works_and_repeats(seed):
    one, two = small(), small()
    weights.load_into(one, f"random:{seed}", Path(), "x", Path)
    torch.rand(3)
    weights.load_into(two, f"random:{seed}", Path(), "x", Path)
    assert state_sha256(one) == state_sha256(two)


def test_random_weights_are_the_same_everywhere():
    """Pinned: a store made with random weights can be extended on any machine, with any torch."""
    assert state_sha256(filled(0))[:16] == "5b0efa81a2a9caa2"
    assert state_sha256(filled(0)) != state_sha256(filled(1))


@pytest.mark.parametrize(
    "text", ["random", "random:", "random:x", "random:-1", "random:1.5", f"random:{2**63}"]
)
def test_bad_seeds(text):
    with pytest.raises(BackboneError, match="seed"):
        weights.load_into(small(), text, Path(), "x", Path)


def imagenet(tmp_path, monkeypatch, **settings):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return build_backbone(BackboneConfig(resize=64, **settings), tmp_path)


def test_no_network_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "reachable", lambda url: False)
    with pytest.raises(BackboneError) as caught:
        imagenet(tmp_path, monkeypatch)
    message = str(caught.value)
    assert "https://download.pytorch.org/models/densenet121-a639ec97.pth" in message
    assert str(tmp_path / "hub/checkpoints/densenet121-a639ec97.pth") in message
    assert "--weights" in message


def test_a_failing_download_is_no_traceback(tmp_path, monkeypatch):
    def fail(url, dst, prefix, progress):
        raise RuntimeError('invalid hash value (expected "a639ec97", got "00")')

    monkeypatch.setattr(downloads, "reachable", lambda url: True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(BackboneError, match="invalid hash value"):
        imagenet(tmp_path, monkeypatch)


def test_downloaded_once_then_cached_and_checked(tmp_path, monkeypatch):
    full = torchvision.models.densenet121(weights=None)
    buffer = io.BytesIO()
    torch.save(old_names(full.state_dict()), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    calls = []

    class Published:
        url = f"https://example.org/densenet121-{digest}.pth"
        transforms = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.transforms

    def download(url, dst, prefix, progress):
        calls.append((url, prefix))
        Path(dst).write_bytes(buffer.getvalue())

    monkeypatch.setattr(downloads, "reachable", lambda url: not calls)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    fake = type("Weights", (), {"IMAGENET1K_V1": Published})
    monkeypatch.setattr(torchvision.models, "DenseNet121_Weights", fake)
    first = imagenet(tmp_path, monkeypatch)
    again = imagenet(tmp_path, monkeypatch)
    assert calls == [(Published.url, digest)]
    assert first.weights_sha256 == again.weights_sha256
    assert first.weights_ignored == ()
    cached = tmp_path / "hub/checkpoints" / f"densenet121-{digest}.pth"
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(BackboneError, match="not what their name says"):
        imagenet(tmp_path, monkeypatch)


def test_v2_and_unknown_tags(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "reachable", lambda url: False)
    with pytest.raises(BackboneError, match="resnet50-11ad3fa6"):
        imagenet(tmp_path, monkeypatch, name="resnet50", weights="imagenet:v2")
    with pytest.raises(BackboneError, match="imagenet:v1"):
        imagenet(tmp_path, monkeypatch, name="densenet121", weights="imagenet:v2")


def test_reachable(monkeypatch):
    def answer(error):
        def urlopen(request, timeout):
            assert timeout <= 10
            raise error

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return downloads.reachable("https://example.org/x")

    assert not answer(urllib.error.URLError("no name"))
    assert not answer(TimeoutError())
    assert answer(urllib.error.HTTPError("u", 403, "no", None, io.BytesIO()))


def test_timm_is_not_imported_for_torchvision():
    code = "import sys, featstore.backbones; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=12) | st.sampled_from([b"abc", b"\x80\x02", b"PK\x03\x04", b""]))
def test_any_short_file_is_refused_in_words(tmp_path, data):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BackboneError, match="weights file"):
            build_backbone(BackboneConfig(name="timm:test_resnet", weights=name, resize=32), tmp_path)
