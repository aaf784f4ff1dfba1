"""TransMIL against plain NumPy in float64, and against torchmil's where both define the same."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featstore.bags import BagBatch, collate
from featstore.errors import ConfigError
from heads.config import TransMILConfig
from heads.models.transmil import TransMIL, inverse_times
from tests.heads.bags import make_bag

DIM, WIDTH, HEADS, LANDMARKS = 6, 8, 2, 5
# One patch; fewer tokens than landmarks; as many; l = 2, 3 and 4 with and without tokens left over.
SIZES = [1, 2, 3, 4, 5, 9, 12, 17, 49]


def transmil(classes: int = 3, seed: int = 0, dropout: float = 0.0, **settings: object) -> TransMIL:
    torch.manual_seed(seed)
    chosen = {
        "embed_dim": WIDTH,
        "transmil_heads": HEADS,
        "transmil_attention": "nystrom",
        "transmil_landmarks": LANDMARKS,
        "dropout": dropout,
        **settings,
    }
    head = TransMIL(DIM, classes, TransMILConfig(**chosen))  # type: ignore[arg-type]
    head.standardize.mean.copy_(torch.linspace(-1, 1, DIM))
    head.standardize.std.copy_(torch.linspace(0.5, 2, DIM))
    with torch.no_grad():  # far from even attention, so that mistakes in it show
        for layer in (head.first, head.second):
            layer.qkv.weight.mul_(3)
    return head.double()


def batch_of(*sizes: int, dim: int = DIM, seed: int = 0) -> BagBatch:
    rng = np.random.default_rng(seed)
    return collate(
        [
            make_bag(rng, str(i), (0,), dim, slices=(1, 1), patches=(size, size))
            for i, size in enumerate(sizes)
        ]
    )


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def inverse(a: np.ndarray) -> np.ndarray:
    z = a.T / (np.abs(a).sum(0).max() * np.abs(a).sum(1).max())
    eye = np.eye(len(a))
    for _ in range(6):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def nystrom(w: dict, name: str, x: np.ndarray, landmarks: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, E) out of the layer, and the (H, n, n) attention of its heads."""
    n, d = len(x), WIDTH // HEADS
    outputs, matrices = [], []
    for h in range(HEADS):
        q, k, v = (x @ part[h * d : (h + 1) * d].T for part in np.split(w[f"{name}.qkv.weight"], 3))
        if n <= landmarks:
            matrix = softmax(q @ k.T / math.sqrt(d))
        else:
            length = math.ceil(n / landmarks)
            ends = np.arange(n, 0, -length)[::-1]
            segments = np.split(np.arange(n), ends[:-1])
            assert len(segments) <= landmarks
            near_q, near_k = (np.stack([y[s].mean(0) for s in segments]) for y in (q, k))
            inner = inverse(softmax(near_q @ near_k.T / math.sqrt(d)))
            outer = softmax(q @ near_k.T / math.sqrt(d)), softmax(near_q @ k.T / math.sqrt(d))
            matrix = outer[0] @ inner @ outer[1]
        kernel = w[f"{name}.convolution.weight"][h, 0, :, 0]
        residual = np.zeros_like(v)
        for i in range(n):
            for t in range(33):
                if 0 <= i + t - 16 < n:
                    residual[i] += kernel[t] * v[i + t - 16]
        outputs.append(matrix @ v + residual)
        matrices.append(matrix)
    together = np.concatenate(outputs, 1) @ w[f"{name}.output.weight"].T + w[f"{name}.output.bias"]
    return together, np.stack(matrices)


def position(w: dict, tokens: np.ndarray, side: int) -> np.ndarray:
    square = tokens.reshape(side, side, -1)
    found = square + w["position.seven.bias"]
    for name, size in (("seven", 7), ("five", 5), ("three", 3)):
        kernel, reach = w[f"position.{name}.weight"], size // 2
        padded = np.pad(square, ((reach, reach), (reach, reach), (0, 0)))
        for i in range(size):
            for j in range(size):
                found = found + kernel[:, 0, i, j] * padded[i : i + side, j : j + side]
    return found.reshape(tokens.shape)


def in_numpy(head: TransMIL, x: np.ndarray, landmarks: float = LANDMARKS) -> tuple[np.ndarray, np.ndarray]:
    """Logits (C,) and attention (N,) of one case."""
    w = {name: value.double().numpy() for name, value in head.state_dict().items()}
    x = (x.astype(np.float64) - w["standardize.mean"]) / w["standardize.std"]
    h = np.maximum(x @ w["projector.weight"].T + w["projector.bias"], 0)
    side = math.ceil(math.sqrt(len(h)))
    tokens = np.concatenate((w["token"], h, h[: side**2 - len(h)]))
    tokens = tokens + nystrom(w, "first", layer_norm(w, "norms.0", tokens), landmarks)[0]
    tokens[1:] = position(w, tokens[1:], side)
    added, matrices = nystrom(w, "second", layer_norm(w, "norms.1", tokens), landmarks)
    token = layer_norm(w, "norm", (tokens + added)[0])
    share = matrices.mean(0)[0, 1:]
    for copy in range(len(h), side**2):
        share[copy - len(h)] += share[copy]
    share = np.maximum(share[: len(h)], 1e-6 / len(h))
    return token @ w["classifier.weight"].T + w["classifier.bias"], share / share.sum()


@pytest.mark.parametrize("kind", ["nystrom", "exact"])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("size", SIZES)
def test_it_equals_its_formula(size: int, classes: int, kind: str) -> None:
    head, batch = transmil(classes, transmil_attention=kind), batch_of(size)
    output = head(batch)
    logits, share = in_numpy(head, batch.features.numpy(), LANDMARKS if kind == "nystrom" else math.inf)
    np.testing.assert_allclose(output.logits[0].detach(), logits, rtol=1e-9, atol=1e-10)
    attention = output.attention["patch"]
    np.testing.assert_allclose(attention.weights.detach(), share, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(attention.logits.detach(), np.log(share * size), rtol=1e-6, atol=1e-8)


def test_what_the_approximation_makes_negative_is_reported_as_next_to_nothing() -> None:
    head, batch = transmil(), batch_of(49)
    with torch.no_grad():
        head.second.qkv.weight.mul_(5)
    found = head(batch).attention["patch"].weights.detach()
    assert found.min().item() == pytest.approx(found.sort().values[1].item())  # several are at the floor
    assert 0 < found.min() < 1e-5 / 49
    np.testing.assert_allclose(found, in_numpy(head, batch.features.numpy())[1], rtol=1e-6)
    assert found.sum().item() == pytest.approx(1)


def test_auto_approximates_only_beyond_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heads.models.transmil._EXACT", 17)  # a class token and 16 patches
    auto, exact, nystrom = (
        transmil(transmil_attention=kind).eval() for kind in ("auto", "exact", "nystrom")
    )
    for size, like, unlike in ((16, exact, nystrom), (17, nystrom, exact)):
        said, same, other = (head(batch_of(size)).logits for head in (auto, like, unlike))
        assert torch.equal(said, same)
        assert not torch.allclose(said, other)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("size", "landmarks"), [(9, 5), (8, 5), (25, 13), (49, 10), (60, 13), (81, 41)])
def test_it_gives_torchmils_numbers_where_no_zeros_are_put_before_the_tokens(
    size: int, landmarks: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("torchmil.models").TransMIL((WIDTH,), WIDTH, 2, heads, landmarks).double()
    module = __import__("torchmil.nn.attention.nystrom_attention", fromlist=["_"])
    plain = module.moore_penrose_iter_pinv

    # Theirs scales by the largest sums of all heads; head by head it is the paper's.
    def by_head(x: torch.Tensor, iters: int) -> torch.Tensor:
        return torch.stack([plain(a[None], iters)[0] for a in x[0]])[None]

    monkeypatch.setattr(module, "moore_penrose_iter_pinv", by_head)
    head = transmil(1, transmil_heads=heads, transmil_landmarks=landmarks)
    with torch.no_grad():
        head.projector = nn.Linear(WIDTH, WIDTH).double()
        head.projector.weight.copy_(torch.eye(WIDTH))  # theirs has no ReLU: ours is given what it passes
        head.projector.bias.zero_()
        head.standardize = type(head.standardize)(WIDTH).double()
        head.token.copy_(theirs.cls_token[0])
        for ours, norm, layer in zip((head.first, head.second), head.norms, theirs.layers, strict=True):
            ours.qkv.weight.copy_(layer.att_module.qkv_nn.weight)
            ours.output.weight.copy_(torch.eye(WIDTH))
            ours.output.bias.zero_()
            ours.convolution.weight.zero_()
            norm.load_state_dict(layer.norm1.state_dict())
        pyramid = theirs.pos_layer
        for kernel, name in ((pyramid.proj, "seven"), (pyramid.proj1, "five"), (pyramid.proj2, "three")):
            getattr(head.position, name).weight.copy_(kernel.weight)
        head.position.seven.bias.copy_(sum(p.bias for p in (pyramid.proj, pyramid.proj1, pyramid.proj2)))
        head.norm.load_state_dict(theirs.norm.state_dict())
        head.classifier.load_state_dict(theirs.classifier.state_dict())
    features = torch.rand(size, WIDTH, dtype=torch.float64)
    want, rows = theirs(features[None], return_att=True)
    output = head(replace(batch_of(size), features=features))
    assert torch.allclose(output.logits[0], want, rtol=1e-9)
    if math.isqrt(size) ** 2 == size:  # elsewhere theirs drops the copies' shares
        assert torch.allclose(output.attention["patch"].weights, (rows / rows.sum())[0], rtol=1e-8)


@pytest.mark.parametrize("kind", ["nystrom", "exact"])
def test_batching_cases_together_changes_nothing(kind: str) -> None:
    head = transmil(transmil_attention=kind)
    batch = batch_of(*SIZES)
    together = head(batch)
    ends = batch.case_patch_offsets.tolist()
    for i, size in enumerate(SIZES):
        mine = slice(ends[i], ends[i + 1])
        alone = head(replace(batch_of(size), features=batch.features[mine]))
        assert torch.allclose(together.logits[i], alone.logits[0], rtol=1e-9)
        for what in ("weights", "logits"):
            found, want = (getattr(o.attention["patch"], what) for o in (together, alone))
            assert torch.allclose(found[mine], want, rtol=1e-6)
        assert together.attention["patch"].weights[mine].sum().item() == pytest.approx(1)


def test_the_same_bits_come_twice() -> None:
    head, batch = transmil().float(), batch_of(60, 3, 17)
    found = []
    for _ in range(2):
        head.zero_grad()
        logits = head(batch).logits
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in head.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("size", "kind"), [(1, "nystrom"), (3, "nystrom"), (7, "nystrom"), (7, "exact")])
def test_gradients_are_right(size: int, kind: str) -> None:
    head, batch = transmil(transmil_attention=kind, embed_dim=4), batch_of(size, 2)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def forward(features: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = (replace(batch, features=features),)
        output = torch.func.functional_call(head, dict(zip(names, values, strict=True)), given)
        return output.logits, output.attention["patch"].logits

    inputs = (batch.features.double().requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True, atol=1e-4)


def test_gradients_of_the_inverse_are_right_for_any_matrix() -> None:
    torch.manual_seed(0)
    matrix = torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True)
    block = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(inverse_times, (matrix, block))


def test_in_float32_the_inverse_is_right_to_four_digits() -> None:
    rng = np.random.default_rng(0)
    q, k, block = (rng.normal(size=(64, 16)) for _ in range(3))
    matrix = softmax(2 * q @ k.T).astype(np.float32)
    want = inverse(matrix.astype(np.float64)) @ block
    found = inverse_times(torch.tensor(matrix)[None], torch.tensor(block).float()[None])[0]
    assert np.abs(found.numpy() - want).max() < 1e-4 * np.abs(want).max()


class LargestMade(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes, forward or backward."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["nystrom", "exact"])
def test_no_tensor_grows_faster_than_the_bag(kind: str) -> None:
    head = transmil(transmil_attention=kind).float()

    def largest(size: int) -> int:
        batch = batch_of(size)
        with LargestMade() as made:
            head(batch).logits.sum().backward()
        return made.bytes

    assert largest(80**2) < 4.1 * largest(40**2)
    assert largest(80**2) < 4 * max(3 * WIDTH, HEADS * LANDMARKS) * 1.1 * 80**2


def test_autocast_and_half_precision_features_work() -> None:
    head, batch = transmil(embed_dim=32).float(), batch_of(1, 60, 700)
    plain = head(batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(replace(batch, features=batch.features.half()))
        low.logits.float().square().sum().backward()
    assert torch.allclose(low.logits.float(), plain.logits, atol=0.15)
    assert low.attention["patch"].weights.dtype == torch.float32
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_dropout_acts_in_training_alone() -> None:
    head, batch = transmil(dropout=0.5), batch_of(20)
    assert not torch.allclose(head(batch).logits, head(batch).logits)
    head.eval()
    assert torch.equal(head(batch).logits, head(batch).logits)


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="embed_dim=12") as refused:
        transmil(embed_dim=9, transmil_heads=4)
    assert "embed_dim is 9" in str(refused.value)
