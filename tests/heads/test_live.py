"""The gradient in two passes against the plain one, and live embeddings against cached ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featstore.config import BackboneConfig
from featstore.resident import CaseBags
from heads.training.course import seeded
from heads.training.live import TwoPass, choose_chunk, sight_of
from heads.training.live_bags import batch_of
from heads.training.ranks import Ranks
from tests import helpers
from tests.heads.finetuned import CASES, LABELS, SPLIT, Cached, make_cached, make_finetuning
from tests.heads.planted import HEADS, POOLS

EVERY = (*HEADS, "linear")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cached:
    return make_cached(tmp_path_factory.mktemp("cached"))


def gradients(training: Any, chunk: int, held: int = 1 << 30, seed: int = 7) -> dict[str, torch.Tensor]:
    """Of all parameters, from one batch of all training cases, in pieces of ``chunk`` patches."""
    live, bags = training.live, [training.bags.outlines[case] for case in SPLIT.train]
    live.chunk = chunk
    training.model.zero_grad(set_to_none=True)
    sight = sight_of(live, training.bags.pixels, bags, held, learns=True)
    pixels = training.bags.pixels.read(sight.requests())
    passes = TwoPass(live, sight, pixels, seed)
    batch = batch_of(bags, passes.features)
    with seeded(torch.device("cpu"), seed):
        output = training.model.head(batch, **training.model.head.schedule(0, 2))
    training.objective(output, batch, 0).total(len(bags)).backward()
    passes.backward()
    assert next(pixels, None) is None  # all that was asked for was used
    return {n: p.grad.clone() for n, p in training.model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # Some are 0 but for rounding, as that of a bias in front of a softmax.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((found[name] - gradient).abs().max()) <= within * scale, name


@pytest.mark.parametrize("name", EVERY)
def test_two_passes_give_the_plain_gradient_of_every_head(cached: Cached, name: str) -> None:
    training = make_finetuning(cached, name, torch.float64)
    plain, chunked = gradients(training, 10_000), gradients(training, 5)
    assert any(name.startswith("backbone.") and g.abs().max() > 0 for name, g in plain.items())
    assert_equal(chunked, plain, 1e-9)


@pytest.mark.parametrize("pool", POOLS)
def test_two_passes_give_the_plain_gradient_of_every_pool(cached: Cached, pool: str) -> None:
    training = make_finetuning(cached, "hierarchical", torch.float64, head={"attention_pool": pool})
    assert_equal(gradients(training, 5), gradients(training, 10_000), 1e-9)


def test_in_float32_they_agree_to_1e_5(cached: Cached) -> None:
    training = make_finetuning(cached, "abmil")
    assert_equal(gradients(training, 7), gradients(training, 10_000), 1e-5)


def test_pixels_that_do_not_fit_are_decoded_twice_to_the_same_gradient(cached: Cached) -> None:
    training = make_finetuning(cached, "abmil", torch.float64)
    assert_equal(gradients(training, 5, held=0), gradients(training, 5), 0.0)


def test_plain_is_what_autograd_makes_of_backbone_and_head(cached: Cached) -> None:
    """Without any of our machinery: pixels, normalisation and chain rule written out here."""
    training = make_finetuning(cached, "mean", torch.float64)
    found = gradients(training, 4)
    seen, model = training.live.preprocessing, training.model
    bags = [training.bags.outlines[case] for case in SPLIT.train]
    sight = sight_of(training.live, training.bags.pixels, bags)
    sight = sight.__class__(sight.rows, [np.arange(len(sight.rows))])
    (pixels,) = training.bags.pixels.read(sight.requests())
    x = (pixels / 255 - np.array(seen.mean)) / np.array(seen.std)
    features = model.backbone(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    batch = batch_of(bags, features)
    logits = model.head(batch).logits
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(logits, torch.tensor([LABELS[case] for case in SPLIT.train])).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal(found, expected, 1e-5)  # ours normalises in float32


@pytest.mark.parametrize("what", ["last:1", "last:2", "layer4", "none"])
def test_what_is_unfrozen_gets_a_gradient_and_nothing_else(cached: Cached, what: str) -> None:
    training = make_finetuning(cached, unfreeze=what)
    learned = {f"backbone.{name}" for name in training.names}
    if what == "none":
        assert not learned
        training.run()
        return
    found = gradients(training, 5)
    network = {name for name in found if name.startswith("backbone.")}
    assert {name.replace("backbone.model.", "backbone.") for name in network} == learned
    assert all(float(found[name].abs().max()) > 0 for name in network)


def test_what_is_frozen_does_not_change(cached: Cached) -> None:
    training = make_finetuning(cached, unfreeze="last:1")
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.run()
    learned = {n for n, p in training.model.named_parameters() if p.requires_grad}
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in learned), name


def noted(seen: list[torch.Tensor], module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
    seen.append(out.detach())


def test_dropout_in_the_backbone_is_the_same_in_both_passes(cached: Cached) -> None:
    class Dropping(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.drop = module, nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.module(x))

    training = make_finetuning(cached, "mean", torch.float64)
    training.live.module = Dropping(training.live.module.eval())  # which is itself in training
    features = []
    for chunk in (5, 5):
        live, bags = training.live, [training.bags.outlines[case] for case in SPLIT.train]
        live.chunk = chunk
        sight = sight_of(live, training.bags.pixels, bags, 1 << 30, learns=True)
        passes = TwoPass(live, sight, training.bags.pixels.read(sight.requests()), 3)
        again: list[torch.Tensor] = []
        note = partial(noted, again)
        handle = live.module.register_forward_hook(note)
        passes.features.sum().backward()
        passes.backward()
        handle.remove()
        first = passes.features.detach()
        for piece, second in zip(sight.pieces, again, strict=True):
            assert torch.equal(first[torch.from_numpy(piece)], second)
        features.append(first)
    assert torch.equal(*features)
    training.live.module.eval()
    plain = training.bags.batch(bags).features  # some are 0 by themselves
    assert 0.4 < float((features[0][plain > 0] == 0).double().mean()) < 0.6


def test_statistics_of_batch_norm_are_updated_once_a_step(cached: Cached) -> None:
    training = make_finetuning(cached, "mean", batch_norm="train")
    norms = [m for m in training.live.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
    first, seen = norms[0], list[torch.Tensor]()
    expected = first.running_mean.clone()
    handle = first.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach().clone()))
    gradients(training, 5)
    handle.remove()
    pieces = len(seen) // 2
    assert {int(norm.num_batches_tracked) for norm in norms} == {pieces}
    for x in seen[pieces:]:  # of the second pass
        expected = 0.9 * expected + 0.1 * x.mean(dim=(0, 2, 3))
    torch.testing.assert_close(first.running_mean, expected)
    frozen = make_finetuning(cached, "mean", batch_norm="frozen")
    before = {n: b.clone() for n, b in frozen.live.module.named_buffers()}
    frozen.run()
    assert all(torch.equal(b, before[n]) for n, b in frozen.live.module.named_buffers())


def test_every_step_process_and_batch_draws_its_own_dropout(cached: Cached) -> None:
    step = make_finetuning(cached)._step
    seeds = {step.seed(epoch, number, micro) for epoch in (0, 1) for number in (0, 1) for micro in (0, 1)}
    other = make_finetuning(cached, ranks=Ranks(1, 2))._step
    assert len(seeds | {other.seed(0, 0, 0)}) == 9


@pytest.mark.parametrize("name", EVERY)
def test_live_embeddings_are_the_cached_ones(cached: Cached, name: str) -> None:
    """The two paths are the same model, within what float16 rounds away."""
    training = make_finetuning(cached, name)
    cache = CaseBags(cached.store, LABELS)
    bags = [cache.outlines[case] for case in SPLIT.train]
    live, stored = training.bags.batch(bags), cache.batch(bags)
    torch.testing.assert_close(live.features, stored.features.float(), rtol=2**-10, atol=1e-4)
    head = training.model.head.eval()
    with torch.no_grad():
        torch.testing.assert_close(head(live).logits, head(stored).logits, rtol=2e-3, atol=2e-3)


def test_native_sizes_go_through_in_groups(tmp_path: Path) -> None:
    backbone = BackboneConfig(name="timm:test_resnet", weights="random:0", resize="native32")
    helpers.make_cohort(tmp_path / "patches", CASES, ("melan",), 1, 3, size=100)
    cached = make_cached(tmp_path, backbone, size=70)
    training = make_finetuning(cached, "abmil", torch.float64)
    pieces = training.live.pieces(training.bags.pixels.size_of(training.bags.outlines["1"].rows))
    assert sorted(map(len, pieces)) == [3, 8] or len(pieces) > 2  # 96 px and 64 px, never together
    assert_equal(gradients(training, 2), gradients(training, 10_000), 1e-9)


def test_the_chunk_follows_the_patches_size() -> None:
    cpu = torch.device("cpu")
    assert choose_chunk("auto", cpu, 224) == 16
    assert choose_chunk("auto", cpu, 448) == 4
    assert choose_chunk("auto", cpu, 32) == 128
    assert choose_chunk("auto", cpu, 4096) == 1
    assert choose_chunk(9, cpu, 32) == 9
