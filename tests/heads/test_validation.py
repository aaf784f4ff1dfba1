"""Validation, stopping, rates and temperatures: what a training does between its epochs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from featstore.resident import CaseBags
from heads.evaluation.predict import predict
from heads.models.dual_stream import temperature_at
from heads.training.course import TrainingError
from heads.training.loop import Training
from tests.heads.planted import (
    HEADS,
    LABELS,
    LONE,
    PLAIN,
    SPLIT,
    Spy,
    make_bags,
    make_config,
    make_training,
    same_bits,
    trained,
)

TINY = 1e-30  # a learning rate that leaves the weights as they are


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("validation") / "store")


class Scripted:
    """A validation that says what it is told to say."""

    def __init__(self, losses: Sequence[float]) -> None:
        self._losses = iter(losses)

    def __call__(self, cases: object) -> Scripted:
        return self

    def summary(self, batch_size: int) -> dict[str, float]:
        return {"cross_entropy": next(self._losses), "loss": 0.0}


WORSE = [1.0, 0.8, 0.7995, 0.7992, 0.9, 0.5, 0.6, 0.6, 0.6, 0.6]
STOPS = [
    ({"patience": 2}, 4, 4),
    ({"patience": 3}, 5, 4),
    ({"patience": 4}, 10, 6),
    ({"patience": 2, "min_delta": 0.0}, 8, 6),
    ({"patience": 2, "min_epochs": 5}, 5, 4),
    ({"patience": 3, "min_epochs": 6}, 9, 6),
    ({"patience": None}, 10, 6),
    ({"patience": 1}, 3, 3),
]


@pytest.mark.parametrize(("given", "epochs", "best"), STOPS)
def test_early_stopping(bags: CaseBags, given: dict, epochs: int, best: int) -> None:
    training = make_training(bags, make_config(**{"epochs": 10, "batch_size": 12, **given}))
    training.validate = Scripted(WORSE)  # type: ignore[method-assign, assignment]
    weights: list[dict[str, torch.Tensor]] = []
    training.run(lambda t: weights.append(copy.deepcopy(t.head.state_dict())))
    assert (training.progress.epoch, training.progress.best_epoch) == (epochs, best)
    assert training.progress.best_val_loss == min(WORSE[:epochs])
    assert same_bits(training.best, weights[best - 1])
    assert training.finished


def test_the_learning_rate_follows_its_scheduler(bags: CaseBags) -> None:
    def rates(**given: object) -> list[float]:
        training = make_training(bags, make_config(epochs=7, batch_size=12, patience=None, lr=0.1, **given))
        training.validate = Scripted([1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.4])  # type: ignore[method-assign, assignment]
        training.run()
        return [row["lr"] for row in training.progress.history]

    assert rates(scheduler="none") == [0.1] * 7
    plateau = rates(scheduler="plateau", scheduler_patience=1, scheduler_factor=0.1, min_lr=0.005)
    assert plateau == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.005])
    cosine = [0.02 + 0.08 * (1 + math.cos(math.pi * t / 7)) / 2 for t in range(7)]
    assert rates(scheduler="cosine", min_lr=0.02) == pytest.approx(cosine)


@pytest.mark.parametrize("name", HEADS)
def test_the_validation_loss_is_the_plain_weighted_loss_of_everything(bags: CaseBags, name: str) -> None:
    weights = torch.tensor([0.5, 3.0])
    config = make_config(
        name,
        {"dropout": 0.5},
        epochs=3,
        label_smoothing=0.2,
        use_class_weights=True,
        class_weights=weights.tolist(),
        reg_weight_entropy=0.0 if name in PLAIN else 0.7,
        reg_weight_l2=0.0 if name in PLAIN else 0.2,
        per_slice_cap=1,
        sampling="random",
        bag_size=3,
        max_slices_per_stain=1,
        sub_cases={"n": 2},
    )

    def check(training: Training) -> None:
        row = training.progress.history[-1]
        found = predict(training.head, bags, SPLIT.val, config.train, weights)
        assert row["val_cross_entropy"] == pytest.approx(found.loss, rel=1e-6)
        assert name in PLAIN or row["val_loss"] > row["val_cross_entropy"] + 1e-4
        each = []
        for case in SPLIT.val:
            with torch.no_grad():
                logits = training.head.eval()(bags.batch([bags.outlines[case]]), temperature=1.0).logits[0]
            log = torch.log_softmax(logits.double(), 0).numpy()
            smooth = 0.8 * -log[LABELS[case]] + 0.2 * -log.mean()
            each.append(float(weights[LABELS[case]]) * smooth)
        assert row["val_cross_entropy"] == pytest.approx(np.mean(each), rel=1e-5)

    make_training(bags, config).run(check)


@pytest.mark.parametrize("memory", [0, 10**9])
def test_the_test_cases_are_never_read(
    bags: CaseBags, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    cohort = CaseBags(bags.store, LABELS, memory)
    asked, features, batch = list[str](), cohort.features, cohort.batch
    monkeypatch.setattr(cohort, "features", lambda case: asked.append(case) or features(case))
    monkeypatch.setattr(
        cohort, "batch", lambda bags: asked.extend(cohort._case(bag) for bag in bags) or batch(bags)
    )
    training = make_training(cohort, make_config(epochs=2, sub_cases={"n": 2}, scheduler="cosine"))
    assert set(asked) == set(SPLIT.train)  # to standardise
    spy = Spy(training, monkeypatch)
    training.run()
    assert set(asked) == {*SPLIT.train, *SPLIT.val}
    learned = {case.split("#")[0] for batch in spy.batches(training=True) for case in batch.case_ids}
    watched = {case for batch in spy.batches(training=False) for case in batch.case_ids}
    assert (learned, watched) == (set(SPLIT.train), set(SPLIT.val))
    assert LONE in learned


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_the_temperature_falls_to_its_end(bags: CaseBags, kind: str) -> None:
    head = {"temperature_schedule": kind, "temperature_start": 10.0, "temperature_end": 0.5}
    training = trained(bags, make_config("dual_stream", head, epochs=6, patience=None))
    found = [row["temperature"] for row in training.progress.history]
    assert (found[0], found[-1]) == (10.0, 0.5)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 6
    assert found == [temperature_at(epoch, 6, 10.0, 0.5, kind) for epoch in range(6)]


def test_validation_uses_the_temperature_of_the_end(bags: CaseBags) -> None:
    head = {"temperature_start": 10.0, "temperature_end": 0.01}
    config = make_config("dual_stream", head, epochs=4, lr=TINY)
    training = make_training(bags, config, change=lambda h: h.score[-1].weight.data.mul_(30))
    stop = list[int]()
    training.run(lambda t: stop.append(15), stop)
    row = training.progress.history[0]
    assert row["temperature"] == 10.0
    assert row["val_effective_instances_selection"] < 2 < row["train_effective_instances_selection"]
    assert row["val_cross_entropy"] == pytest.approx(
        predict(training.head, bags, SPLIT.val, config.train).loss
    )


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("epochs", [1, 6])
def test_a_loss_that_is_no_number_ends_the_training(bags: CaseBags, name: str, epochs: int) -> None:
    training = make_training(bags, make_config(name, epochs=epochs, batch_size=12, lr=1e38))
    with pytest.raises(TrainingError, match="no longer a number") as error:
        training.run()
    assert error.value.exit_code == 1
    assert "lower train.lr" in str(error.value)


def test_the_planted_signal_is_learned(bags: CaseBags) -> None:
    training = trained(bags, make_config(epochs=15, lr=0.01, patience=None))
    first, last = training.progress.history[0], training.progress.history[-1]
    assert last["train_cross_entropy"] < 0.3 * first["train_cross_entropy"]
    assert predict(training.head, bags, SPLIT.test, training.config).probabilities.argmax(1).tolist() == [
        LABELS[case] for case in SPLIT.test
    ]
