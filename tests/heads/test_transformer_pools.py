"""The pools of several heads against plain NumPy, segment by segment, and against torch's attention."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from featstore.errors import ConfigError
from heads.models.attention_pool import AttentionPool
from heads.models.outputs import Attention
from heads.models.penalties import elastic_net_penalty, entropy, entropy_penalty
from heads.models.transformer import MultiHeadPool, TransformerPool, attention_of_heads
from tests.heads.test_transmil import LargestMade

WIDTH, HIDDEN, HEADS = 12, 5, 4
SIZES = [1, 2, 700, 1, 33]


def make(kind: type[nn.Module], dropout: float = 0.0, heads: int = HEADS) -> nn.Module:
    torch.manual_seed(0)
    pool = kind(WIDTH, HIDDEN, dropout, heads).double()
    with torch.no_grad():  # far from the start, where norms, biases and the token do next to nothing
        for parameter in pool.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return pool


def segments(*sizes: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return torch.randn(int(offsets[-1]), WIDTH, dtype=torch.float64), offsets


def numbers(pool: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in pool.state_dict().items()}


def linear(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def layer_norm(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
    )


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def multi_head_in_numpy(w: dict, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E,) and the (H, N) logits."""
    part, parts, logits = WIDTH // HEADS, [], []
    for h in range(HEADS):
        x, hidden = members[:, h * part : (h + 1) * part], slice(h * HIDDEN, (h + 1) * HIDDEN)
        inner = np.tanh(x @ w["value.weight"][hidden, :, 0].T + w["value.bias"][hidden])
        z = inner @ w["weight.weight"][h, :, 0] + w["weight.bias"][h]
        parts.append(softmax(z) @ x)
        logits.append(z)
    return linear(w, "output", np.concatenate(parts)), np.stack(logits)


def transformer_in_numpy(w: dict, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E,) and the (H, N) logits."""
    x, token = layer_norm(w, "member_norm", members), w["token"]
    query, key = linear(w, "query", layer_norm(w, "token_norm", token)), linear(w, "key", x)
    value, part = linear(w, "value", x), WIDTH // HEADS
    logits = [
        key[:, h * part : (h + 1) * part] @ query[h * part : (h + 1) * part] / math.sqrt(part)
        for h in range(HEADS)
    ]
    parts = [softmax(z) @ value[:, h * part : (h + 1) * part] for h, z in enumerate(logits)]
    token = token + linear(w, "output", np.concatenate(parts))
    inner = linear(w, "mlp.0", layer_norm(w, "pooled_norm", token))
    gelu = 0.5 * inner * (1 + np.array([math.erf(z / math.sqrt(2)) for z in inner]))
    return token + linear(w, "mlp.3", gelu), np.stack(logits)


POOLS = {MultiHeadPool: multi_head_in_numpy, TransformerPool: transformer_in_numpy}
every_pool = pytest.mark.parametrize("kind", POOLS)


@every_pool
def test_a_pool_equals_its_formula(kind: type[nn.Module]) -> None:
    pool, (members, offsets) = make(kind), segments(*SIZES)
    pooled, attention = pool(members, offsets)
    for g, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        want, z = POOLS[kind](numbers(pool), members[a:b].numpy())
        mean = np.mean([softmax(each) for each in z], 0)
        logits = np.log(mean) + np.log(np.exp(z).sum(1)).mean()
        np.testing.assert_allclose(pooled[g].detach(), want, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(attention.weights[a:b].detach(), mean, rtol=1e-9)
        np.testing.assert_allclose(attention.logits[a:b].detach(), logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 40])
def test_the_transformers_token_attends_as_torchs_own_attention_does(size: int) -> None:
    pool, (members, offsets) = make(TransformerPool), segments(size)
    torchs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat((pool.query.weight, pool.key.weight, pool.value.weight)))
        key_bias = torch.randn(WIDTH)  # which changes nothing: why the pool has none
        torchs.in_proj_bias.copy_(torch.cat((pool.query.bias, key_bias, pool.value.bias)))
        torchs.out_proj.load_state_dict(pool.output.state_dict())
    keys = pool.member_norm(members)[None]
    answer, weights = torchs(pool.token_norm(pool.token)[None, None], keys, keys)
    token = pool.token + answer[0, 0]
    pooled, attention = pool(members, offsets)
    assert torch.allclose(pooled[0], token + pool.mlp(pool.pooled_norm(token)))
    assert torch.allclose(attention.weights, weights[0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_pool
def test_segments_of_very_different_sizes_give_what_each_gives_alone(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    pool, (members, offsets) = make(kind).to(dtype), segments(*SIZES)
    members, close = members.to(dtype), {"rtol": 1e-6, "atol": 1e-6 if dtype == torch.float32 else 1e-12}
    pooled, attention = pool(members, offsets)
    for g, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        alone, its = pool(members[a:b], torch.tensor([0, b - a]))
        assert torch.allclose(pooled[g], alone[0], **close)
        assert torch.allclose(attention.weights[a:b], its.weights, **close)
        assert torch.allclose(attention.logits[a:b], its.logits, **close)
        assert attention.weights[a:b].sum().item() == pytest.approx(1, rel=1e-6)


@every_pool
def test_the_order_within_a_segment_does_not_matter(kind: type[nn.Module]) -> None:
    pool, (members, offsets) = make(kind), segments(*SIZES)
    order = torch.cat([a + torch.randperm(b - a) for a, b in itertools.pairwise(offsets.tolist())])
    (pooled, attention), (moved, of_moved) = pool(members, offsets), pool(members[order], offsets)
    assert torch.allclose(moved, pooled)
    assert torch.allclose(of_moved.weights, attention.weights[order])


@every_pool
def test_gradients_are_right(kind: type[nn.Module]) -> None:
    pool, (members, offsets) = make(kind), segments(3, 1, 2)
    names, parameters = zip(*pool.named_parameters(), strict=True)

    def forward(members: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = dict(zip(names, values, strict=True))
        pooled, attention = torch.func.functional_call(pool, weights, (members, offsets))
        return pooled, attention.weights, attention.logits

    assert torch.autograd.gradcheck(forward, (members.requires_grad_(), *parameters), fast_mode=True)


@every_pool
def test_the_same_bits_come_twice(kind: type[nn.Module]) -> None:
    pool, (members, offsets) = make(kind).float(), segments(*SIZES)
    found = []
    for _ in range(2):
        pool.zero_grad()
        pooled, attention = pool(members.float(), offsets)
        (pooled.square().sum() + attention.logits.square().sum()).backward()
        found.append([pooled, attention.weights, *(p.grad for p in pool.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_with_one_head_the_logits_are_those_of_the_tanh_pool() -> None:
    pool, single, (members, offsets) = (
        make(MultiHeadPool, heads=1),
        AttentionPool(WIDTH, HIDDEN),
        segments(9, 4),
    )
    single = single.double()
    with torch.no_grad():
        for name in ("value", "weight"):
            getattr(single, name).weight.copy_(getattr(pool, name).weight[:, :, 0])
            getattr(single, name).bias.copy_(getattr(pool, name).bias)
    (pooled, attention), (want, of_single) = pool(members, offsets), single(members, offsets)
    assert torch.allclose(pooled, pool.output(want))
    assert torch.allclose(attention.logits, of_single.logits)
    assert torch.allclose(attention.weights, of_single.weights)


def test_penalties_read_the_mean_of_the_heads() -> None:
    torch.manual_seed(0)
    offsets, cases = torch.tensor([0, 4, 7]), torch.tensor([0, 1, 2])
    z = torch.randn(7, HEADS, dtype=torch.float64)
    _, attention = attention_of_heads(z, offsets)
    for g, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        mean = torch.softmax(z[a:b], 0).mean(1)
        assert entropy(attention)[g].item() == pytest.approx(float(-(mean * mean.log()).sum()))
    even = attention_of_heads(torch.zeros(7, HEADS), offsets)[1]
    assert torch.allclose(elastic_net_penalty(even, cases, 1.0, 1.0), torch.zeros(2), atol=1e-6)
    assert (elastic_net_penalty(attention, cases, 1.0, 1.0) > 0.1).all()


def test_penalties_have_finite_gradients_where_attention_vanishes() -> None:
    z = torch.tensor([[0.0, 0.0], [900.0, -900.0], [1.0, 900.0], [3.0, 3.0]], requires_grad=True)
    attention = attention_of_heads(z, torch.tensor([0, 3, 4]))[1]
    cases = torch.tensor([0, 1, 2])
    total = entropy_penalty(attention, cases).sum() + elastic_net_penalty(attention, cases, 1.0, 1.0).sum()
    total.backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad[3] == 0).all()


@every_pool
def test_no_tensor_grows_faster_than_the_members(kind: type[nn.Module]) -> None:
    pool = make(kind).float()

    def largest(size: int) -> int:
        members, offsets = segments(1, size, 2)
        members = members.float().requires_grad_()
        with LargestMade() as made:
            pool(members, offsets)[0].sum().backward()
        return made.bytes

    assert largest(6000) < 4.1 * largest(1500)
    assert largest(6000) <= 8 * max(WIDTH, HEADS * HIDDEN) * 6003


@every_pool
def test_autocast_works(kind: type[nn.Module]) -> None:
    pool, (members, offsets) = make(kind).float(), segments(*SIZES)
    plain, _ = pool(members.float(), offsets)
    with torch.autocast("cpu", torch.bfloat16):
        low, attention = pool(members.float(), offsets)
        low.float().square().sum().backward()
    assert torch.allclose(low.float(), plain, atol=0.3)
    assert isinstance(attention, Attention)
    assert attention.weights.dtype == torch.float32
    gradients = [p.grad for p in pool.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_pool
def test_dropout_acts_in_training_alone(kind: type[nn.Module]) -> None:
    pool, (members, offsets) = make(kind, 0.5), segments(*SIZES)
    assert not torch.equal(pool(members, offsets)[0], pool(members, offsets)[0])
    pool.eval()
    assert torch.equal(pool(members, offsets)[0], pool(members, offsets)[0])


@every_pool
def test_a_width_that_heads_cannot_share_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ConfigError, match="embed_dim=12"):
        kind(10, heads=4)
