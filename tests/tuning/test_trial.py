"""A trial's trainings: side by side as alone, judged by what each would keep, gone on with to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from featstore.cohort.splits import Split
from featstore.resident import CaseBags
from heads.config import Config
from heads.evaluation.predict import predict
from heads.models.head import build_head
from heads.run import prepare
from heads.training.course import TrainingError
from heads.training.loop import Training
from heads.tuning.trial import Trainings
from tests.heads import planted
from tests.heads.planted import CASES, DIM, NAMES, make_bags, make_config, same_bits

FOLDS = [
    Split(CASES[4:16], CASES[:4], ()),
    Split(CASES[:10], CASES[10:16], ()),
]
PARAMS = {"train.lr": 0.01}


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("bags") / "store")


def about_of(bags: CaseBags) -> dict[str, object]:
    spec = bags.store.spec.plain
    return {"dim": DIM, "class_names": list(NAMES), "store": {"fingerprint": spec.fingerprint}}


def settings(**train: object) -> Config:
    given = {"lr": 0.02, "epochs": 9, "patience": 2, "min_delta": 0.0, "use_class_weights": True}
    head = {"dropout": 0.3}
    return make_config("abmil", head, **{**given, "label_smoothing": 0.1, **train})


def trainings_of(bags: CaseBags, config: Config, objective: str = "val_loss") -> Trainings:
    return Trainings(config, about_of(bags), bags, FOLDS, objective)


def advanced(trainings: Trainings, until: int = 99) -> Trainings:
    for epoch in range(1, until + 1):
        trainings.advance(epoch, ())
    return trainings


def trained_alone(bags: CaseBags, config: Config, split: Split, epochs: int) -> Training:
    """A training that was stopped after so many epochs, or had ended before."""
    alone, stop = prepare(config, dict(about_of(bags)), bags, split), list[int]()

    def watch(training: Training) -> None:
        if training.progress.epoch >= epochs:
            stop.append(0)

    alone.run(watch, stop)
    return alone


def test_values_are_those_of_what_each_training_would_keep(bags: CaseBags) -> None:
    """Computed anew: fold by fold, alone, by the weights that are kept, with the plain log loss."""
    config = settings()
    trainings = advanced(trainings_of(bags, config))
    ends = [each.progress.epoch for each in trainings.trainings]
    assert ends[0] != ends[1]  # else it would not be seen that a stopped one goes on counting
    for objective in ("val_loss", "val_auc"):
        judged = advanced(trainings_of(bags, config, objective))
        for epoch in (1, 3, min(ends) + 1, max(ends)):
            wanted = []
            for split in FOLDS:
                alone = trained_alone(bags, config, split, epoch)
                head = build_head(config.head, DIM, 2)
                head.load_state_dict(alone.best)
                found = predict(head, bags, split.val, config.train, None)
                p = found.probabilities[np.arange(len(found.labels)), found.labels]
                auc = np.mean(
                    [
                        (a > b) + 0.5 * (a == b)
                        for a in found.probabilities[found.labels == 1, 1]
                        for b in found.probabilities[found.labels == 0, 1]
                    ]
                )
                wanted.append(float(-np.log(p).mean()) if objective == "val_loss" else float(auc))
            assert judged.values(epoch) == pytest.approx(wanted, rel=1e-6), epoch
            assert judged.value(epoch) == pytest.approx(np.mean(wanted), rel=1e-6)


def test_the_loss_is_comparable_between_settings(bags: CaseBags) -> None:
    """Class weights and smoothing change what training minimises, not what trials are compared by."""
    rows = []
    for extra in ({"label_smoothing": 0.0, "use_class_weights": False}, {"class_weights": [3.0, 1.0]}):
        training = planted.make_training(bags, settings(lr=1e-12, epochs=1, **extra), FOLDS[0])
        training.run()
        rows.append(training.progress.history[0])
    assert rows[0]["val_log_loss"] == pytest.approx(rows[1]["val_log_loss"], rel=1e-5)
    assert rows[0]["val_log_loss"] == pytest.approx(rows[0]["val_cross_entropy"], rel=1e-5)
    assert rows[1]["val_cross_entropy"] > 1.2 * rows[1]["val_log_loss"]


def test_gone_on_with_equals_never_stopped(bags: CaseBags, tmp_path: Path) -> None:
    config = settings(ema_decay=0.5)
    whole = advanced(trainings_of(bags, config))
    for stop in (1, 3, 5):
        first = advanced(trainings_of(bags, config), stop)
        first.trainings[0].run(lambda training: None, [1])  # nothing: it is told to stop
        first.save(tmp_path, PARAMS)
        again = trainings_of(bags, config)
        again.restore(tmp_path, PARAMS, pytest.fail)
        assert again.epoch == first.epoch
        advanced(again)
        for a, b in zip(whole.trainings, again.trainings, strict=True):
            assert same_bits(dict(a.kept()), dict(b.kept()))
        assert whole.values(99) == again.values(99)


def test_folds_saved_at_different_epochs_catch_up(bags: CaseBags, tmp_path: Path) -> None:
    """A worker killed between two files leaves one fold behind the other."""
    config = settings()
    first = advanced(trainings_of(bags, config), 2)
    first.save(tmp_path, PARAMS)
    newer = (tmp_path / "fold_0.pth").read_bytes()
    advanced(trainings_of(bags, config), 1).save(tmp_path, PARAMS)
    (tmp_path / "fold_0.pth").write_bytes(newer)
    again = trainings_of(bags, config)
    again.restore(tmp_path, PARAMS, pytest.fail)
    assert [each.progress.epoch for each in again.trainings] == [2, 1]
    again.advance(2, ())
    assert again.values(2) == first.values(2)


def test_a_state_that_cannot_be_used_is_told_and_begun_anew(bags: CaseBags, tmp_path: Path) -> None:
    config, said = settings(), list[str]()
    first = advanced(trainings_of(bags, config), 3)
    first.save(tmp_path, PARAMS)
    damaged = bytearray((tmp_path / "fold_0.pth").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "fold_0.pth").write_bytes(damaged)
    again = trainings_of(bags, config)
    again.restore(tmp_path, PARAMS, said.append)
    assert [each.progress.epoch for each in again.trainings] == [0, 3]
    assert len(said) == 1
    assert "fold 0 begins anew" in said[0]
    again.restore(tmp_path, {"train.lr": 0.02}, said.append)  # of another trial
    assert "of another training" in said[-1]
    again.advance(3, ())
    assert again.values(3) == first.values(3)


def test_a_signal_stops_between_epochs(bags: CaseBags) -> None:
    trainings = trainings_of(bags, settings())
    trainings.advance(3, [15])
    assert trainings.epoch == 0


def test_a_training_that_diverges_says_so(bags: CaseBags) -> None:
    trainings = trainings_of(bags, settings())
    with torch.no_grad():
        for value in trainings.trainings[1].head.parameters():
            value.fill_(torch.inf)
    with pytest.raises(TrainingError, match="no longer a number"):
        trainings.advance(1, ())
