"""The course of a training: steps, chance, resuming and the moving average."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from featstore.bags import BagBatch
from featstore.resident import CaseBags
from heads.evaluation.predict import predict
from heads.models.abmil import ABMIL
from heads.models.head import Head
from heads.models.outputs import HeadOutput
from heads.training.loop import Training
from tests.heads.planted import (
    BOTH,
    DIM,
    FLAT,
    HEADS,
    LABELS,
    PLAIN,
    SPLIT,
    Spy,
    gradient,
    make_bags,
    make_config,
    make_training,
    parameters,
    same_bits,
    trained,
)

TINY = 1e-30  # a learning rate that leaves the weights as they are


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("training") / "store")


def history(training: Training) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in training.progress.history]


# One step after the other


@pytest.mark.parametrize("name", HEADS)
def test_micro_batches_change_nothing(bags: CaseBags, name: str) -> None:
    entropy = 0.0 if name in PLAIN else 0.3
    settings = {"epochs": 1, "batch_size": 6, "reg_weight_entropy": entropy, "use_class_weights": True}
    configs = [make_config(name, patch_budget=budget, **settings) for budget in (1, 40, 10**6)]
    alone, some, whole = (trained(bags, config, nn.Module.double) for config in configs)
    for other in (alone, some):
        np.testing.assert_allclose(gradient(other.head), gradient(whole.head), rtol=1e-9, atol=1e-12)
        a, b = parameters(other.head.state_dict()), parameters(whole.head.state_dict())
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        assert history(other) == [pytest.approx(row, rel=1e-9) for row in history(whole)]
    assert len(gradient(whole.head)) == sum(p.numel() for p in whole.head.parameters())


def test_the_patch_budget_bounds_what_is_computed_at_once(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training(bags, make_config(epochs=1, batch_size=4, patch_budget=60))
    spy = Spy(training, monkeypatch)
    training.run()
    sizes = [(len(batch), len(batch.features)) for _, batch in spy.seen]
    assert all(patches <= 60 or cases == 1 for cases, patches in sizes)
    assert any(cases > 1 for cases, _ in sizes)
    assert max(cases for cases, _ in sizes) <= 4


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("name", HEADS)
def test_accumulated_batches_are_one_batch(bags: CaseBags, name: str, weights: list[float] | None) -> None:
    given = {} if weights is None else {"use_class_weights": True, "class_weights": weights}
    settings = {"epochs": 2, "sampling": "all", "grad_clip": 0.0, **given}
    one = make_config(name, batch_size=1, gradient_accumulation_steps=4, **settings)
    four = make_config(name, batch_size=4, gradient_accumulation_steps=1, **settings)
    a, b = trained(bags, one, nn.Module.double), trained(bags, four, nn.Module.double)
    np.testing.assert_allclose(gradient(a.head), gradient(b.head), rtol=1e-9, atol=1e-13)
    states = [parameters(t.head.state_dict()) for t in (a, b)]
    np.testing.assert_allclose(*states, rtol=1e-9, atol=1e-12)
    for mine, other in zip(history(a), history(b), strict=True):
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)


@pytest.mark.parametrize(("batch", "steps"), [(5, 1), (1, 5), (2, 5), (12, 3)])
def test_the_last_step_counts_its_own_cases(bags: CaseBags, batch: int, steps: int) -> None:
    config = make_config(epochs=1, batch_size=batch, gradient_accumulation_steps=steps, lr=TINY)
    training = make_training(bags, config, change=nn.Module.double)
    order = training.data.epoch(0)
    training.run()
    found = gradient(training.head)
    last = order[-(len(order) % (batch * steps) or batch * steps) :]
    assert len(last) == {5: 2, 10: 2, 36: 12}[batch * steps]
    training.head.zero_grad()
    for bag in last:
        one = bags.batch([bag])
        (nn.functional.cross_entropy(training.head(one).logits, one.labels) / len(last)).backward()
    np.testing.assert_allclose(found, gradient(training.head), rtol=1e-9, atol=1e-14)


def test_class_weights_act_on_a_batch_of_one(bags: CaseBags) -> None:
    found = {}
    for label in (0, 1):
        case = next(c for c in SPLIT.train if LABELS[c] == label)
        for weights in ([1.0, 1.0], [0.5, 3.0]):
            config = make_config(use_class_weights=True, class_weights=weights, epochs=1)
            training = make_training(bags, config)
            batch = bags.batch([bags.outlines[case]])
            training.objective(training.head(batch), batch).total(1).backward()
            found[label, weights[1]] = gradient(training.head)
    np.testing.assert_allclose(found[0, 3.0], 0.5 * found[0, 1.0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[1, 3.0], 3.0 * found[1, 1.0], rtol=1e-4, atol=1e-6)
    assert np.abs(found[1, 1.0]).max() > 1e-3


def test_the_gradient_is_clipped_and_its_norm_before_is_logged(bags: CaseBags) -> None:
    settings = {"epochs": 1, "batch_size": 12, "lr": TINY}
    free = trained(bags, make_config(grad_clip=0.0, **settings))
    norm = float(np.linalg.norm(gradient(free.head)))
    assert norm > 0.02
    for limit in (0.01, 10.0):
        training = trained(bags, make_config(grad_clip=limit, **settings))
        assert np.linalg.norm(gradient(training.head)) == pytest.approx(min(limit, norm), rel=1e-3)
        assert training.progress.history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("hidden", [True, False], ids=["projected", "as they are"])
@pytest.mark.parametrize("amp", ["bf16", "off"])
@pytest.mark.parametrize("name", HEADS)
def test_features_standardised_once_are_those_standardised_in_every_step(
    bags: CaseBags, name: str, hidden: bool, amp: str
) -> None:
    config = make_config(name, {"dropout": 0.3, "use_hidden_layer": hidden}, epochs=2, amp=amp)
    tight, wide = copy.copy(bags), 2 if amp == "bf16" else 4
    tight.memory = bags.bytes + bags.resident.numel() * wide - 1
    once, often = trained(bags, config), trained(tight, config)
    done = name != "dual_stream" or hidden
    kind = torch.float16 if not done else torch.bfloat16 if amp == "bf16" else torch.float32
    assert once.bags.resident.dtype == kind
    assert once.bags.batch([bags.outlines["1"]]).standardized == done
    assert often.bags is tight
    assert same_bits(once.head.state_dict(), often.head.state_dict())
    assert history(once) == history(often)


def test_a_head_derived_from_ours_sees_the_features_as_they_are(bags: CaseBags) -> None:
    class Skips(ABMIL):
        def forward(self, batch: BagBatch, **schedule: float) -> HeadOutput:
            assert not batch.standardized
            assert batch.features.dtype == torch.float16
            return super().forward(batch, **schedule)

    config = make_config("abmil", epochs=1, amp="bf16")
    Training(Skips(DIM, 2, config.head), bags, SPLIT, config.train, ("a", "b")).run()


# Chance


@pytest.mark.parametrize("name", HEADS)
def test_the_seed_decides_everything_and_torch_keeps_its_chance(bags: CaseBags, name: str) -> None:
    def run(seed: int) -> Training:
        head = {"dropout": 0.3}
        return trained(bags, make_config(name, head, epochs=3, seed=seed, per_slice_cap=3, bag_size=8))

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = run(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(2)
    again, other = run(5), run(6)
    assert same_bits(first.head.state_dict(), again.head.state_dict())
    assert same_bits(first.best, again.best)
    assert history(first) == history(again)
    assert not same_bits(first.head.state_dict(), other.head.state_dict())
    assert history(first) != history(other)


def test_every_epoch_has_a_chance_of_its_own(bags: CaseBags) -> None:
    def seeds(seed: int) -> list[int]:
        found = list[int]()
        training = make_training(bags, make_config(epochs=3, batch_size=12, seed=seed))
        training.head.register_forward_pre_hook(
            lambda module, _: found.append(torch.initial_seed()) if module.training else None
        )
        training.run()
        return found

    assert len(set(seeds(1))) == 3
    assert seeds(1) == seeds(1)
    assert not set(seeds(1)) & set(seeds(2))


RESUMED = [
    *((name, 0.5, "plateau", "bf16") for name in FLAT),
    *((name, 0.0, "cosine", "off") for name in FLAT),
    *(
        (name, ema, scheduler, amp)
        for name in BOTH
        for ema, scheduler, amp in [
            (0.0, "plateau", "off"),
            (0.5, "plateau", "bf16"),
            (0.9, "cosine", "off"),
            (0.0, "cosine", "bf16"),
            (0.9, "none", "off"),
            (0.0, "none", "bf16"),
        ]
    ),
]


@pytest.mark.parametrize(("name", "ema", "scheduler", "amp"), RESUMED)
def test_a_resumed_training_equals_one_that_was_not_interrupted(
    bags: CaseBags, name: str, ema: float, scheduler: str, amp: str
) -> None:
    config = make_config(
        name,
        {"dropout": 0.2},
        epochs=6,
        batch_size=4,
        lr=1.0,
        ema_decay=ema,
        scheduler=scheduler,
        scheduler_patience=0,
        amp=amp,
        patience=None,
        per_slice_cap=4,
        bag_size=16,
        reg_epoch_decay=0.9,
        min_delta=0.05,
    )
    whole = trained(bags, config)
    first, stop = make_training(bags, config), list[int]()
    first.run(lambda training: stop.append(15) if training.progress.epoch == 3 else None, stop)
    assert first.progress.epoch == 3
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    resumed = make_training(bags, config, change=lambda head: nn.init.ones_(head.classifier.weight))
    resumed.load_state(torch.load(file, weights_only=True))
    resumed.run()
    assert resumed.progress.epoch == 6
    assert same_bits(whole.head.state_dict(), resumed.head.state_dict())
    assert same_bits(whole.model.state_dict(), resumed.model.state_dict())
    assert same_bits(whole.best, resumed.best)
    assert history(whole) == history(resumed)
    assert {**vars(whole.progress), "history": 0} == {**vars(resumed.progress), "history": 0}
    rates = [row["lr"] for row in history(whole)]
    assert (len(set(rates)) > 1) == (scheduler != "none")


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("name", BOTH)
def test_a_signal_within_an_epoch_is_heeded_and_the_epoch_given_up(
    bags: CaseBags, name: str, epoch: int
) -> None:
    settings = {"epochs": 5, "batch_size": 4, "ema_decay": 0.5, "scheduler": "cosine", "patience": None}
    config = make_config(name, {"dropout": 0.2}, **settings)
    whole = trained(bags, config)
    first, stop = make_training(bags, config), list[int]()

    def signalled(head: nn.Module, inputs: object) -> None:
        if head.training and first.progress.epoch == epoch:
            stop.append(15)

    handle = first.head.register_forward_pre_hook(signalled)
    told: list[int] = []
    first.run(lambda training: told.append(training.progress.epoch), stop)
    handle.remove()
    assert len(stop) == 1  # of the several steps of an epoch
    assert told == list(range(1, epoch + 1))
    resumed = make_training(bags, config, change=lambda head: nn.init.ones_(head.classifier.weight))
    resumed.load_state(copy.deepcopy(first.state()))
    for training in (first, resumed):
        training.run()
        assert same_bits(whole.head.state_dict(), training.head.state_dict())
        assert same_bits(whole.best, training.best)
        assert history(whole) == history(training)


# The moving average


def _count(module: Head, inputs: object) -> None:
    module.seen.add_(float(module.training))


def count_steps(head: Head) -> None:
    """A buffer that changes in training, as those of batch norm do."""
    head.register_buffer("seen", torch.zeros(()))
    head.register_forward_pre_hook(_count)


def test_the_moving_average_equals_its_formula_and_is_what_is_kept(bags: CaseBags) -> None:
    decay, config = 0.8, make_config(epochs=5, batch_size=12, lr=0.05, ema_decay=0.8, patience=None)
    training = make_training(bags, config, change=count_steps)
    average, kept = np.empty(0), {}

    def check(t: Training) -> None:
        nonlocal average
        now = parameters(t.head.state_dict())
        # The first step's weights begin it: those drawn from the seed have learned nothing.
        average = now if t.progress.epoch == 1 else decay * average + (1 - decay) * now
        np.testing.assert_allclose(parameters(t.model.state_dict()), average, rtol=1e-5, atol=1e-6)
        loss = predict(t.model, bags, SPLIT.val, config.train).loss
        assert t.progress.history[-1]["val_cross_entropy"] == pytest.approx(loss, rel=1e-6)
        assert loss != pytest.approx(predict(t.head, bags, SPLIT.val, config.train).loss) or len(kept) == 0
        kept[t.progress.epoch] = copy.deepcopy(t.model.state_dict())

    training.run(check)
    assert float(training.head.seen) == 5
    assert float(training.model.seen) == pytest.approx(1 + sum(1 - decay**i for i in range(1, 5)))
    assert same_bits(training.best, kept[training.progress.best_epoch])


def test_what_was_good_is_not_touched_by_the_epoch_after_a_resume(bags: CaseBags) -> None:
    config = make_config(epochs=3)
    first = make_training(bags, config)
    first.run(stop=[], after_epoch=lambda training: None)
    resumed = make_training(bags, config)
    resumed.load_state(copy.deepcopy(first.good))
    before = copy.deepcopy(resumed.good["optimizer"]["state"])
    resumed.learn(resumed.data.epoch(3), {})
    for index, values in before.items():
        for name, value in values.items():
            assert torch.equal(resumed.good["optimizer"]["state"][index][name], value), name
