"""hierarchical and dual_stream against plain NumPy, bag by bag; and what every head promises."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from featstore.bags import collate
from featstore.errors import ConfigError
from heads.config import DualStreamConfig, HierarchicalConfig
from heads.models.attention_pool import AttentionPool
from heads.models.dual_stream import DualStream, temperature_at
from heads.models.head import Head, build_head
from heads.models.hierarchical import Hierarchical
from heads.models.outputs import HeadOutput, effective_attention
from heads.models.penalties import (
    confidence_penalty,
    elastic_net_penalty,
    entropy_penalty,
    segments_of_cases,
)
from heads.models.transformer import MultiHeadPool, TransformerPool
from tests.heads.bags import make_bag, nested
from tests.heads.in_numpy import pool, project, sigmoid, softmax, weights
from tests.heads.planted import FLAT, ORDERED, POOLS, SOLVED, make_config

DIM, CLASSES = 6, 3


def bags(count: int = 3, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    stains = [(0, 1, 2), (1,), (0, 2)]
    return [make_bag(rng, str(i), stains[i % 3], DIM, label=i % CLASSES) for i in range(count)]


def hierarchical(kind: str) -> Hierarchical:
    torch.manual_seed(0)
    head = Hierarchical(
        DIM,
        CLASSES,
        HierarchicalConfig(embed_dim=8, attention_hidden=5, attention_pool=kind, dropout=0.0),  # type: ignore[arg-type]
    )
    return ready(head)


def ready(head: Head) -> Head:
    """In float64, with a standardisation that changes something, and nowhere weights of 0."""
    if head.solved:
        nn.init.normal_(head.classifier.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
    head.standardize.mean.copy_(torch.linspace(-1, 1, DIM))
    head.standardize.std.copy_(torch.linspace(0.5, 2, DIM))
    return head.double()


def dual_stream(kind: str = "gated", fusion: str = "concat", hidden: bool = True) -> DualStream:
    torch.manual_seed(0)
    config = DualStreamConfig(
        use_hidden_layer=hidden,
        hidden_dim=8,
        attention_dim=5,
        attention_type=kind,
        fusion_method=fusion,
        dropout=0.0,  # type: ignore[arg-type]
    )
    return ready(DualStream(DIM, CLASSES, config))


@pytest.mark.parametrize("kind", ["tanh", "gated"])
def test_hierarchical_equals_its_formula(kind: str) -> None:
    head, cases = hierarchical(kind), bags()
    output = head(collate(cases))
    w = weights(head)
    found = {level: [] for level in ("patch", "slice", "stain")}
    effective = []
    for i, bag in enumerate(cases):
        stains, of_case = [], []
        for slices in nested(bag):
            members, of_stain = [], []
            for x in slices:
                z, a = pool(w, "pools.patch", project(w, x), kind == "gated")
                members.append(z)
                of_stain.append(a)
            z, b = pool(w, "pools.slice", np.stack(members), kind == "gated")
            stains.append(z)
            of_case.append([weight * a for weight, a in zip(b, of_stain, strict=True)])
            found["patch"] += list(of_stain)
            found["slice"].append(b)
        z, c = pool(w, "pools.stain", np.stack(stains), kind == "gated")
        found["stain"].append(c)
        effective += [weight * a for weight, each in zip(c, of_case, strict=True) for a in each]
        logits = z @ w["classifier.weight"].T + w["classifier.bias"]
        assert np.allclose(output.logits[i].detach(), logits)
    for level, arrays in found.items():
        assert np.allclose(output.attention[level].weights.detach(), np.concatenate(arrays))
    got = effective_attention(output, collate(cases))
    assert got is not None
    assert np.allclose(got.detach(), np.concatenate(effective))


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("tanh", AttentionPool(8, 5, 0.3, "tanh")),
        ("gated", AttentionPool(8, 5, 0.3, "gated")),
        ("multi_head", MultiHeadPool(8, 5, 0.3)),
        ("transformer", TransformerPool(8, 5, 0.3)),
    ],
)
def test_hierarchical_has_three_pools_of_the_kind_that_is_asked_for(kind: str, pool: nn.Module) -> None:
    settings = {"attention_pool": kind, "attention_hidden": 5, "attention_dropout": 0.3}
    head = build_head(make_config("hierarchical", settings).head, DIM, CLASSES)
    assert [repr(each) for each in head.pools.values()] == [repr(pool)] * 3  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hierarchical", "multi_head"), ("hierarchical", "transformer"), ("transmil", "tanh")],
)
def test_a_width_that_heads_cannot_share_is_refused(name: str, kind: str) -> None:
    settings = {"embed_dim": 10, "attention_pool": kind, "transmil_heads": 4}
    with pytest.raises(ConfigError, match=r"head\.embed_dim=12") as error:
        build_head(make_config(name, settings).head, DIM, CLASSES)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("kind", ["gated", "cosine", "dsmil", "abmil"])
@pytest.mark.parametrize("fusion", ["concat", "weighted"])
@pytest.mark.parametrize("hidden", [True, False])
def test_dual_stream_equals_its_formula(kind: str, fusion: str, hidden: bool) -> None:
    head, cases, temperature = dual_stream(kind, fusion, hidden), bags(), 2.5
    output = head(collate(cases), temperature=temperature)
    w = weights(head)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    ends = collate(cases).case_patch_offsets.tolist()
    for i, bag in enumerate(cases):
        x = (bag.features.astype(np.float64) - w["standardize.mean"]) / w["standardize.std"]
        h = np.maximum(linear("hidden", x), 0) if hidden else x
        s = linear("score.3", np.maximum(linear("score.0", h), 0))[:, 0]
        sigma = softmax(s / temperature)
        c = sigma @ h
        if kind == "abmil":
            e = linear("weight", np.tanh(linear("value", h)) * sigmoid(linear("gate", h)))[:, 0]
        elif kind == "cosine":
            e = h @ c / (np.linalg.norm(h, axis=1) * np.linalg.norm(c))
        else:
            k = linear("key", h)
            e = k @ linear("query", c) / np.sqrt(5)
            if kind == "gated":
                e = e * sigmoid(linear("gate", k)[:, 0])
        a = softmax(e)
        z = a @ h
        alpha = 0.5
        fused = np.concatenate((c, z)) if fusion == "concat" else alpha * c + (1 - alpha) * z
        mine = slice(ends[i], ends[i + 1])
        assert np.allclose(output.instance_scores[mine].detach(), s)
        assert np.allclose(output.attention["selection"].weights[mine].detach(), sigma)
        assert np.allclose(output.attention["patch"].weights[mine].detach(), a)
        assert np.allclose(output.logits[i].detach(), linear("classifier", fused))


HEADS = [
    *(pytest.param(lambda kind=kind: hierarchical(kind), id=f"hierarchical-{kind}") for kind in POOLS),
    *(
        pytest.param(lambda kind=kind: dual_stream(kind), id=f"dual-{kind}")
        for kind in ("gated", "cosine", "dsmil", "abmil")
    ),
    pytest.param(lambda: dual_stream(fusion="cross_attn"), id="dual-cross"),
    *(
        pytest.param(lambda name=name: ready(build_head(make_config(name).head, DIM, CLASSES)), id=name)
        for name in (*FLAT, *SOLVED)
    ),
]


def said(output: HeadOutput) -> dict[str, torch.Tensor]:
    """Everything that a head says of each patch."""
    found = {level: attention.weights for level, attention in output.attention.items()}
    return found if output.instance_scores is None else {**found, "score": output.instance_scores}


@pytest.mark.parametrize("make", HEADS)
def test_attention_sums_to_one_in_every_segment(make) -> None:
    batch, head = collate(bags()), make()
    output = head(batch)
    assert set(head.levels) <= set(output.attention)
    for attention in output.attention.values():
        sums = torch.stack([a.sum(0) for a in attention.weights.tensor_split(attention.offsets[1:-1])])
        assert torch.allclose(sums, torch.ones_like(sums))
    effective = effective_attention(output, batch)
    assert (effective is None) == (not head.levels)
    if effective is not None:
        totals = torch.zeros(3, dtype=torch.float64).index_add(0, batch.patch_to_case, effective)
        assert torch.allclose(totals, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("make", HEADS)
def test_batching_cases_together_changes_nothing(make) -> None:
    head, cases = make(), bags(5)
    together = head(collate(cases))
    alone = [head(collate([bag])) for bag in cases]
    assert torch.allclose(together.logits, torch.cat([each.logits for each in alone]))
    for name, value in said(together).items():
        assert torch.allclose(value, torch.cat([said(each)[name] for each in alone])), name


@pytest.mark.parametrize("make", [each for each in HEADS if each.id not in ORDERED])
def test_permuting_patches_permutes_attention(make) -> None:
    rng, bag = np.random.default_rng(1), bags(1)[0]
    starts = np.concatenate(([0], np.cumsum(bag.slice_sizes)))
    order = np.concatenate([rng.permutation(np.arange(a, b)) for a, b in itertools.pairwise(starts)])
    head = make()
    plain, moved = head(collate([bag])), head(collate([replace(bag, features=bag.features[order])]))
    assert torch.allclose(moved.logits, plain.logits)
    for level in {"patch", "selection", "score"} & set(said(plain)):
        assert torch.allclose(said(moved)[level], said(plain)[level][order])


@pytest.mark.parametrize("make", HEADS)
def test_gradients_are_right(make) -> None:
    head, batch = make(), collate(bags(2, seed=3))

    def forward(features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = head(replace(batch, features=features))
        own = head.auxiliary_loss(output, batch.labels)
        further = (output.aux_logits, own)
        return (output.logits, *said(output).values(), *(each for each in further if each is not None))

    assert torch.autograd.gradcheck(forward, (batch.features.double().requires_grad_(),))


def test_scores_are_unbounded_and_selection_sharpens_as_the_temperature_falls() -> None:
    head, batch = dual_stream(), collate(bags())
    with torch.no_grad():
        head.score[3].weight.mul_(50)
    scores = head(batch).instance_scores
    assert scores.max() - scores.min() > 2.0
    effective = []
    for temperature in (10.0, 3.0, 1.0):
        sigma = head(batch, temperature=temperature).attention["selection"].weights.detach()
        effective.append(float(torch.exp(-(torch.special.xlogy(sigma, sigma)).sum() / 3)))
    assert effective[0] > effective[1] > effective[2]


def test_temperatures() -> None:
    for kind in ("linear", "cosine", "exponential"):
        values = [temperature_at(e, 5, 10.0, 1.0, kind) for e in range(7)]
        assert values[0] == pytest.approx(10.0)
        assert values[4:] == [1.0, 1.0, 1.0]
        assert all(a > b for a, b in itertools.pairwise(values[:5]))
    assert temperature_at(2, 5, 10.0, 1.0, "linear") == pytest.approx(5.5)
    assert temperature_at(2, 5, 10.0, 1.0, "cosine") == pytest.approx(5.5)
    assert temperature_at(2, 5, 10.0, 1.0, "exponential") == pytest.approx(10**0.5)
    assert temperature_at(0, 1, 10.0, 1.0) == 1.0


def log(a: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(a, 1e-300))


@pytest.mark.parametrize("form", ["linear", "squared"])
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_entropy_penalty_equals_its_formula(form: str, mode: str, normalize: bool) -> None:
    head, cases = hierarchical("tanh"), bags()
    batch = collate(cases)
    output = head(batch)
    levels = {
        "patch": segments_of_cases(batch.stain_offsets, batch.case_offsets),
        "slice": segments_of_cases(batch.case_offsets),
        "stain": torch.arange(len(cases) + 1),
    }
    for level, case_offsets in levels.items():
        attention = output.attention[level]
        values: dict[int, list[float]] = {}
        for g, case in enumerate(np.repeat(np.arange(len(cases)), case_offsets.diff().tolist())):
            a = attention.weights[attention.offsets[g] : attention.offsets[g + 1]].detach().numpy()
            h, largest = -(a * log(a)).sum(), np.log(len(a))
            if len(a) == 1:
                values.setdefault(case, []).append(0.0)
                continue
            if normalize:
                h, largest = h / largest, 1.0
            if form == "linear":
                value = -h if mode == "max" else h
            else:
                value = (largest - h) ** 2 if mode == "max" else h**2
            values.setdefault(case, []).append(value)
        want = [np.mean(each) for each in values.values()]
        got = entropy_penalty(attention, case_offsets, form, mode, normalize)  # type: ignore[arg-type]
        assert got.tolist() == pytest.approx(want)


def test_the_other_penalties_equal_their_formulas() -> None:
    head, cases = dual_stream(), bags()
    batch = collate(cases)
    output = head(batch)
    attention, case = output.attention["patch"], torch.arange(len(cases) + 1)
    ends = batch.case_patch_offsets.tolist()
    spreads, nets = [], []
    for a, b in itertools.pairwise(ends):
        s, z = output.instance_scores[a:b].detach().numpy(), attention.logits[a:b].detach().numpy()
        spreads.append(s.max() - s.min())
        nets.append(0.3 * np.abs(z).sum() + 0.7 * (z**2).sum())
    offsets = batch.case_patch_offsets
    got = confidence_penalty(output.instance_scores, offsets, case, target=2.0)
    assert got.tolist() == pytest.approx([(spread - 2) ** 2 for spread in spreads])
    got = confidence_penalty(output.instance_scores, offsets, case, target=None)
    assert got.tolist() == pytest.approx([-spread for spread in spreads])
    assert elastic_net_penalty(attention, case, 0.3, 0.7).tolist() == pytest.approx(nets)


def test_penalties_have_finite_gradients_where_attention_vanishes_or_stands_alone() -> None:
    from heads.models.outputs import Attention
    from heads.models.pooling import segment_softmax

    logits = torch.tensor([0.0, 900.0, 5.0], requires_grad=True)
    offsets = torch.tensor([0, 2, 3])
    attention = Attention(segment_softmax(logits, offsets), logits, offsets)
    total = sum(
        entropy_penalty(attention, torch.tensor([0, 1, 2]), form, mode, normalize).mean()
        for form in ("linear", "squared")
        for mode in ("max", "min")
        for normalize in (True, False)
    )
    (total + elastic_net_penalty(attention, torch.tensor([0, 1, 2]), 1, 1).mean()).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[2] == 0


@pytest.mark.parametrize("make", HEADS)
def test_half_precision_features_and_autocast_work(make) -> None:
    head, batch = make().float(), collate(bags())
    plain = head(batch).logits
    assert torch.allclose(head(replace(batch, features=batch.features.half())).logits, plain, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(batch)
    assert torch.allclose(low.logits.float(), plain, atol=0.1)
    assert all(value.dtype == torch.float32 for value in said(low).values())
    low.logits.sum().backward()
    gradients = [p.grad for p in head.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
