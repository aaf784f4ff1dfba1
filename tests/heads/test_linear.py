"""The linear baseline: that its weights are the minimum, along a path of penalties; and its training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore.bags import BagBatch, collate
from featstore.errors import ConfigError
from featstore.resident import CaseBags
from heads.evaluation.predict import predict
from heads.models.elastic_net import ElasticNetLogistic
from heads.models.head import Fit, build_head
from heads.models.linear import Linear
from tests.heads.bags import make_bag
from tests.heads.in_numpy import linear, softmax, weights
from tests.heads.planted import (
    DIM,
    LABELS,
    SPLIT,
    make_bags,
    make_config,
    make_training,
    parameters,
    same_bits,
    trained,
)

WIDTH = 7


def make_head(classes: int = 2, **settings: object) -> Linear:
    head = build_head(make_config("linear", settings).head, WIDTH, classes)
    assert isinstance(head, Linear)
    return head.double()


def batch_of(classes: int = 2, cases: int = 24, offset: float = 3.0) -> BagBatch:
    """Cases of one to twelve patches; the first features tell the class, a little."""
    rng = np.random.default_rng(5)
    made = []
    for i in range(cases):
        sizes = {"slices": (1, 1), "patches": (1, 12)}
        bag = make_bag(rng, str(i), (0,), WIDTH, i % classes, **sizes)  # type: ignore[arg-type]
        shift = np.eye(classes, WIDTH)[i % classes] + offset
        made.append(replace(bag, features=(bag.features * 2 + shift).astype(np.float32)))
    return collate(made)


def fit(**settings: object) -> Fit:
    given = {"class_weights": None, "label_smoothing": 0.0, "standardize": True, "seed": 0}
    return Fit(**{**given, **settings})  # type: ignore[arg-type]


def pooled(batch: BagBatch) -> np.ndarray:
    parts = np.split(batch.features.double().numpy(), batch.case_patch_offsets[1:-1])
    return np.stack([part.mean(axis=0) for part in parts])


def targets(batch: BagBatch, classes: int, fit: Fit) -> np.ndarray:
    """(B, C) what is learned of each case: its class, smoothed, times that class' weight."""
    assert batch.labels is not None
    y = batch.labels.numpy()
    share = np.full((len(y), classes), fit.label_smoothing / classes)
    share[np.arange(len(y)), y] += 1 - fit.label_smoothing
    return share if fit.class_weights is None else share * fit.class_weights.numpy()[y, None]


def gradients(head: Linear, batch: BagBatch, fit: Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derivatives of Σ CE by W (C, D) and b (C,), and the standardised means (B, D)."""
    w = weights(head)
    z = (pooled(batch) - w["standardize.mean"]) / w["standardize.std"]
    share = targets(batch, len(w["classifier.bias"]), fit)
    p = softmax(linear(w, "classifier", z).T).T
    error = p * share.sum(1, keepdims=True) - share
    return error.T @ z, error.sum(0), z


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_it_classifies_the_mean_of_all_patches(classes: int) -> None:
    head, batch = make_head(classes), batch_of(classes)
    batch = replace(batch, features=batch.features.double())
    torch.manual_seed(0)
    with torch.no_grad():
        head.classifier.weight.normal_()
        head.standardize.mean.normal_()
        head.standardize.std.uniform_(0.5, 2)
    w = weights(head)
    z = (pooled(batch) - w["standardize.mean"]) / w["standardize.std"]
    np.testing.assert_allclose(head(batch).logits.detach(), linear(w, "classifier", z), rtol=1e-10)


FITS = [
    {},
    {"label_smoothing": 0.2},
    {"class_weights": torch.tensor([0.5, 3.0, 1.0, 2.0, 1.5])},
    {"standardize": False},
]


@pytest.mark.parametrize("settings", FITS, ids=lambda settings: next(iter(settings), "plain"))
@pytest.mark.parametrize("l1", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_weights_are_the_minimum(classes: int, l1: float, settings: dict) -> None:
    """By the conditions of a minimum: 0 lies among the subgradients by every weight."""
    if "class_weights" in settings:
        settings = {"class_weights": settings["class_weights"][:classes]}
    given, batch = fit(**settings), batch_of(classes, offset=0.3)
    head, penalty = make_head(classes, l1_ratio=l1), 0.05
    for _ in range(5):  # each goes on where the last one ended
        head.solve([batch], given, penalty=penalty)
    by_weight, by_bias, z = gradients(head, batch, given)
    share = targets(batch, classes, given)
    prior = share.sum(0) / share.sum()
    centred = z - z.mean(0)
    null = np.abs((share - share.sum(1, keepdims=True) * prior).T @ centred).max()
    strength = penalty * null / max(l1, 1e-3)
    w = head.classifier.weight.detach().numpy()
    if classes == 2:  # the penalty is on their difference
        np.testing.assert_allclose(w[0], -w[1], atol=1e-12)
        w, by_weight = w[1:] - w[:1], by_weight[1:]
    assert np.abs(by_bias).max() < 0.001 * null
    smooth = by_weight + strength * (1 - l1) * w
    assert (np.abs(w) > 1e-3).any()
    slack = np.where(
        w != 0, np.abs(smooth + strength * l1 * np.sign(w)), np.maximum(np.abs(smooth) - strength * l1, 0)
    )
    assert slack.max() < 0.001 * null


@pytest.mark.parametrize("penalties", [(0.5, 0.1, 0.02), (0.01,)], ids=["a path", "a leap"])
@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_minimum_with_far_more_features_than_cases(
    classes: int, l1_ratio: float, penalties: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(7)
    y = rng.integers(0, classes, 40)
    x = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 400)) + rng.standard_normal((40, 400))
    x[:, :classes] += 2 * np.eye(classes)[y]
    x = (x - x.mean(0)) / x.std(0)
    share = 0.9 * np.eye(classes)[y] + 0.1 / classes
    problem = ElasticNetLogistic(x, share)
    w, b = np.zeros((1 if classes == 2 else classes, 400)), problem.null
    for penalty in penalties:
        strength = penalty * problem.largest / max(l1_ratio, 0.1)
        w, b = problem.minimum(w, b, strength * l1_ratio, strength * (1 - l1_ratio))
        logits = x @ w.T + b
        if classes == 2:
            logits = np.concatenate((np.zeros((40, 1)), logits), axis=1)
        error = (softmax(logits.T).T - share)[:, -len(b) :]
        smooth = error.T @ x + strength * (1 - l1_ratio) * w
        least = strength * l1_ratio
        slack = np.where(w != 0, np.abs(smooth + least * np.sign(w)), np.maximum(np.abs(smooth) - least, 0))
        assert max(slack.max(), np.abs(error.sum(0)).max()) <= 2e-4 * problem.largest
    assert (np.abs(w) > 1e-3).sum() > 20


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_class_of_weight_0_has_no_say(smoothing: float) -> None:
    weights, batch = torch.tensor([1.0, 2.0, 0.0]), batch_of(3)
    found = []
    for changed in (0.0, 50.0):
        features = batch.features + changed * (batch.labels == 2)[batch.patch_to_case][:, None]
        head = make_head(3)
        given = fit(class_weights=weights, label_smoothing=smoothing, standardize=False)
        for _ in range(3):
            head.solve([replace(batch, features=features)], given, penalty=0.1)
        with torch.no_grad():
            logits = head(replace(batch, features=batch.features.double())).logits
        found.append(torch.softmax(logits[batch.labels != 2], 1))
    assert found[0].isfinite().all()
    assert (found[0].argmax(1) == batch.labels[batch.labels != 2]).float().mean() > 0.7
    # Centring alone sees the cases: the minimum is the same, found from another start.
    torch.testing.assert_close(*found, atol=0.005, rtol=0.01)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_path_begins_where_the_weights_leave_zero(classes: int) -> None:
    head, batch = make_head(classes), batch_of(classes)
    found = []
    for penalty in (1.05, 1.0, 0.9, 0.3, 0.01):
        head.solve([batch], fit(), penalty=penalty)
        found.append(int((head.classifier.weight.abs() > 1e-6).sum()))
    assert found[0] == found[1] == 0
    assert 0 < found[2] < found[3] <= found[4]


def test_the_path_of_penalties() -> None:
    head = make_head(path_end=0.01)
    assert [head.schedule(e, 3)["penalty"] for e in range(4)] == pytest.approx([1, 0.1, 0.01, 0.01])
    assert head.schedule(0, 1)["penalty"] == 0.01


def test_with_standardisation_the_scale_of_features_does_not_matter() -> None:
    batch = batch_of()
    scale = torch.logspace(-2, 2, WIDTH)
    scaled = replace(batch, features=batch.features * scale + 10)
    found = []
    for each in (batch, scaled):
        head = make_head()
        head.solve([each], fit(), penalty=0.1)
        found.append(head(each).logits.detach())
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_a_class_without_training_cases_is_improbable() -> None:
    batch = batch_of(2)
    for smoothing, largest in ((0.0, 1e-3), (0.1, 0.1)):
        head = make_head(3)
        head.solve([batch], fit(label_smoothing=smoothing), penalty=0.3)
        p = torch.softmax(head(batch).logits, 1)
        assert (p[:, 2] < largest).all()
        assert (p[:, 2] > 0).all()


def test_features_that_do_not_vary_leave_the_prior() -> None:
    batch = batch_of(2, cases=9)
    even = replace(batch, features=torch.ones_like(batch.features))
    head = make_head()
    head.solve([even], fit(), penalty=0.1)
    assert not head.classifier.weight.any()
    p = torch.softmax(head(even).logits, 1).detach()
    np.testing.assert_allclose(p[:, 0], 5 / 9, rtol=1e-6)


# Training


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("linear") / "store")


def test_the_planted_signal_is_learned_and_the_path_is_logged(bags: CaseBags) -> None:
    training = trained(bags, make_config("linear", epochs=15, patience=None))
    rows = training.progress.history
    assert [row["penalty"] for row in rows] == pytest.approx(np.geomspace(1, 0.01, 15))
    assert rows[0]["train_auc"] == 0.5
    losses = [row["train_cross_entropy"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0] == pytest.approx(0.5 * math.log(2), rel=0.01)
    assert all(math.isnan(row["lr"]) and math.isnan(row["grad_norm"]) for row in rows)
    found = predict(training.head, bags, SPLIT.test, training.config)
    assert found.probabilities.argmax(1).tolist() == [LABELS[case] for case in SPLIT.test]


def test_early_stopping_ends_the_path_and_the_best_epoch_is_kept(bags: CaseBags) -> None:
    training = make_training(bags, make_config("linear", epochs=20, patience=2, min_delta=0.5))
    training.run()
    assert training.progress.epoch == 3  # no later epoch is better by that much
    values = [row["val_cross_entropy"] for row in training.progress.history]
    assert training.progress.best_epoch == int(np.argmin(values)) + 1


def test_standardisation_is_that_of_the_training_cases_or_none(bags: CaseBags) -> None:
    mean = np.stack([bags.features(case).double().numpy().mean(axis=0) for case in SPLIT.train])
    settings = {"epochs": 2, "sampling": "all", "per_slice_cap": None}
    own = trained(bags, make_config("linear", **settings)).head.standardize
    np.testing.assert_allclose(own.mean, mean.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(own.std[:-1], mean.std(axis=0)[:-1], rtol=1e-4)
    assert own.std[-1] == 1  # which does not vary
    none = trained(bags, make_config("linear", standardize="none", **settings)).head.standardize
    assert not none.mean.any()
    assert (none.std == 1).all()


def test_micro_batches_and_batch_sizes_change_nothing(bags: CaseBags) -> None:
    given = {"epochs": 4, "use_class_weights": True, "label_smoothing": 0.1}
    heads = [
        trained(bags, make_config("linear", patch_budget=budget, batch_size=size, **given)).head
        for budget, size in ((1, 1), (40, 5), (10**6, 12))
    ]
    for head in heads[:2]:
        np.testing.assert_allclose(
            parameters(head.state_dict()), parameters(heads[2].state_dict()), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_training_has_the_same_bits(bags: CaseBags, cut: int, tmp_path: Path) -> None:
    config = make_config("linear", epochs=7, patience=None, scheduler="cosine", per_slice_cap=3, amp="bf16")
    whole, first = trained(bags, config), make_training(bags, config)
    first.run(
        after_epoch=lambda training: stop.append(2) if training.progress.epoch == cut else None,
        stop=(stop := []),
    )
    torch.save(first.state(), tmp_path / "state")
    second = make_training(bags, config)
    second.load_state(torch.load(tmp_path / "state", weights_only=True))
    second.run()
    assert second.progress.epoch == 7
    assert same_bits(second.head.state_dict(), whole.head.state_dict())
    assert same_bits(second.best, whole.best)


@pytest.mark.parametrize(
    ("setting", "fix"), [({"ema_decay": 0.5}, "ema_decay=0.0"), ({"loss": "x"}, "loss=cross")]
)
def test_what_needs_steps_is_refused(
    bags: CaseBags, setting: dict, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heads.training import losses

    monkeypatch.setattr(losses, "_LOSSES", {**losses._LOSSES, "x": losses._LOSSES["cross_entropy"]})
    with pytest.raises(ConfigError, match="fitted by a solver") as error:
        make_training(bags, make_config("linear", **setting))
    assert fix in str(error.value)


def test_a_case_of_one_patch_and_other_numbers_of_classes_train(bags: CaseBags) -> None:
    assert len(bags.features("3")) == 1
    head = build_head(make_config("linear").head, DIM, 5)
    batch = bags.batch([bags.outlines[case] for case in ("3", "4", "5", "6")])
    head.solve([batch], fit(), penalty=0.1)
    assert torch.isfinite(head(batch).logits).all()
