"""Leaving environments out: the table against scikit-learn and plain loops, and what trainings may see."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

import heads.leave_one_out
from featstore.errors import ConfigError
from heads.config import Config
from heads.evaluation.domains import MEAN, METRICS, DomainTable, HeldOut, leave_one_out_table
from heads.evaluation.metrics import EvaluationError
from heads.evaluation.named import AlreadyDone
from heads.evaluation.runs import RunError
from heads.leave_one_out import LeftOut, leave_one_out_project
from heads.training.vae import VaeTraining
from tests.heads.environments import CLASSES, ENVIRONMENTS, tiny, write_environments

Floats = np.ndarray
SKLEARN = {
    "accuracy": lambda y, p: accuracy_score(y, p[:, 1] > 0.5),
    "balanced_accuracy": lambda y, p: balanced_accuracy_score(y, p[:, 1] > 0.5),
    "auc": lambda y, p: roc_auc_score(y, p[:, 1]),
}


def made_up(seeds: int = 2, environments: int = 3) -> list[HeldOut]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(environments):
        labels = np.arange(20 + 7 * number) % 2
        said = {}
        for method, skill in (("vae", 0.8), ("erm", 0.3)):
            positive = [1 / (1 + np.exp(-rng.normal(skill * (2 * labels - 1), 1))) for _ in range(seeds)]
            said[method] = [np.stack([1 - p, p], axis=1) for p in positive]
        found.append(HeldOut(f"e{number}", labels, said))
    return found


def row(table: DomainTable, environment: str, metric: str) -> Any:
    (found,) = [r for r in table.rows if (r.environment, r.metric) == (environment, metric)]
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_values_are_scikit_learns_meant_over_seeds_and_then_over_environments(metric: str) -> None:
    held_out = made_up()
    table = leave_one_out_table(held_out, CLASSES, resamples=50)
    means: dict[str, list[float]] = {"vae": [], "erm": []}
    for each in held_out:
        found = row(table, each.environment, metric)
        for method in means:
            values = [SKLEARN[metric](each.labels, p) for p in each.probabilities[method]]
            means[method].append(float(np.mean(values)))
            assert found.values[method].value == pytest.approx(means[method][-1])
        assert found.difference.value == pytest.approx(means["vae"][-1] - means["erm"][-1])
        vae, erm = (each.probabilities[method] for method in ("vae", "erm"))
        by_seed = [
            SKLEARN[metric](each.labels, a) - SKLEARN[metric](each.labels, b)
            for a, b in zip(vae, erm, strict=True)
        ]
        assert found.by_seed == pytest.approx(by_seed)
    whole = row(table, MEAN, metric)
    for method, values in means.items():
        assert whole.values[method].value == pytest.approx(np.mean(values))
    assert whole.difference.value == pytest.approx(np.mean(means["vae"]) - np.mean(means["erm"]))
    assert whole.images == 81


def test_intervals_are_those_of_resampled_images_the_same_for_both_methods() -> None:
    held_out = made_up(environments=2)
    table = leave_one_out_table(held_out, CLASSES, resamples=300, seed=5)
    rng = np.random.default_rng(5)
    differences = []
    for each in held_out:
        n = len(each.labels)
        mine = []
        for drawn in rng.integers(n, size=(300, n)):
            values = {
                method: np.mean([accuracy_score(each.labels[drawn], p[drawn, 1] > 0.5) for p in several])
                for method, several in each.probabilities.items()
            }
            mine.append(values["vae"] - values["erm"])
        found = row(table, each.environment, "accuracy").difference
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(mine, [0.025, 0.975])))
        differences.append(mine)
    found = row(table, MEAN, "accuracy").difference
    expected = np.quantile(np.mean(differences, axis=0), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_equal_methods_do_not_differ() -> None:
    held_out = [
        HeldOut(each.environment, each.labels, dict.fromkeys(("vae", "erm"), each.probabilities["vae"]))
        for each in made_up()
    ]
    table = leave_one_out_table(held_out, CLASSES, resamples=20)
    assert [r.difference.value for r in table.rows] == [0] * 12
    assert not any("*" in line for line in table.to_text().splitlines()[:13])


def test_without_resamples_and_what_is_no_probability(tmp_path: Path) -> None:
    table = leave_one_out_table(made_up(1), CLASSES, resamples=0)
    assert {r.difference.low for r in table.rows} == {None}
    table.write_csv(tmp_path / "table.csv")
    frame = pd.read_csv(tmp_path / "table.csv")
    assert list(frame["environment"].unique()) == ["e0", "e1", "e2", MEAN]
    assert frame["vae"].notna().all()
    assert frame["vae_low"].isna().all()
    held_out = made_up(1)
    held_out[1].probabilities["erm"][0][3] = np.nan
    with pytest.raises(EvaluationError, match="no valid probabilities"):
        leave_one_out_table(held_out, CLASSES)


def test_a_held_out_environment_of_one_class_has_no_auc() -> None:
    held_out = made_up()
    ones = held_out[0].labels == 1
    said = {m: [p[ones] for p in several] for m, several in held_out[0].probabilities.items()}
    held_out[0] = HeldOut("e0", held_out[0].labels[ones], said)
    table = leave_one_out_table(held_out, CLASSES, resamples=20)
    assert row(table, "e0", "auc").values["vae"].value is None
    assert row(table, MEAN, "auc").values["vae"].value is None
    assert row(table, MEAN, "auc").values["vae"].reason == "no true case of class benign in e0"
    assert "undefined" in table.to_text()
    assert json.dumps(table.to_json(), allow_nan=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_environments(tmp_path_factory.mktemp("images"))


def config(root: Path, **more: Any) -> Config:
    return Config(vae=tiny(data_dir=str(root), steps=3, val_every=2, **more))


def test_no_training_sees_the_environment_that_is_held_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, set[int], dict[str, torch.Tensor], list[int]]] = []
    whole = VaeTraining.run

    def watch(self: VaeTraining, *args: Any) -> None:
        looked_at: list[int] = []
        load = self.data.batches.batch
        monkeypatch.setattr(
            self.data.batches, "batch", lambda chosen: looked_at.extend(chosen.tolist()) or load(chosen)
        )
        first = {name: value.clone() for name, value in self.model.state_dict().items()}
        whole(self, *args)
        monkeypatch.setattr(self.data.batches, "batch", load)
        environments = set(self.data.images.environment[looked_at].tolist())
        seen.append((self.method, self.config.seed, environments, first, looked_at))

    monkeypatch.setattr(VaeTraining, "run", watch)
    told: list[str] = []
    found = leave_one_out_project(config(root), tmp_path, 2, None, told.append)
    assert found.table is not None
    assert len(seen) == 3 * 2 * 2
    for number, (method, seed, environments, first, looked_at) in enumerate(seen):
        assert environments == {0, 1, 2} - {number // 4}
        assert (seed, method) == (3 + number // 2 % 2, ("vae", "erm")[number % 2])
        if method == "erm":  # the same initial weights and the same images as the VAE before it
            before = seen[number - 1]
            assert all(torch.equal(value, before[3][name]) for name, value in first.items())
            assert looked_at == before[4]
    frame = pd.read_csv(found.folder / "predictions.csv")
    assert len(frame) == 36 * 2 * 2
    for environment in ENVIRONMENTS:
        mine = frame[(frame["environment"] == environment) & (frame["method"] == "vae")]
        truth = (mine["class"] == CLASSES[1]).to_numpy()
        accuracy = ((mine[f"p_{CLASSES[1]}"] > 0.5).to_numpy() == truth).mean()
        assert row(found.table, environment, "accuracy").values["vae"].value == pytest.approx(accuracy)
    assert {p.name for p in found.folder.iterdir()} >= {
        "leave_one_out.csv", "leave_one_out.txt", "results.json", "vae.json", "config.yaml", "trainings",
    }  # fmt: skip
    assert "1/12: vae, hospital a held out, seed 3" in told


def test_an_interrupted_evaluation_goes_on_where_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = leave_one_out_project(config(root), tmp_path / "whole")
    started: list[str] = []

    def tell(text: str) -> None:
        started.append(text)
        if text.startswith("4/6"):
            signal.raise_signal(signal.SIGTERM)

    first = leave_one_out_project(config(root), tmp_path / "parts", tell=tell, name="mine")
    assert (first.table, first.done, first.interrupted) == (None, 3, signal.SIGTERM)
    assert f"--leave-one-out --resume {first.folder}" in first.to_text()
    assert not (first.folder / "results.json").exists()
    second = leave_one_out_project(Config(), tmp_path / "parts", tell=started.append, name="mine")
    assert second.folder == tmp_path / "parts" / "runs" / "vae_mine"
    assert second.table is not None
    assert whole.table is not None
    assert second.table.to_json() == whole.table.to_json()
    assert len([text for text in started if "/6: " in text]) == 7
    third = leave_one_out_project(Config(), tmp_path / "parts", name="mine")
    assert third == AlreadyDone(second.folder, "")
    damaged = first.folder / "trainings" / "held_out_02_seed_3_erm.json"
    damaged.write_text("{}")
    with pytest.raises(RunError, match="result of a training cannot be read") as caught:
        leave_one_out_project(Config(), tmp_path / "parts", resume=first.folder)
    assert str(damaged) in str(caught.value)


def test_one_environment_cannot_be_left_out(tmp_path: Path) -> None:
    only = write_environments(tmp_path / "one", environments=1)
    with pytest.raises(ConfigError, match="there is one environment: hospital a"):
        leave_one_out_project(config(only), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_the_answer_of_an_interrupted_evaluation_is_json() -> None:
    found = LeftOut(Path("runs/vae_1"), None, 2, 15)
    assert found.to_json() == {"trainings": 2, "run": "runs/vae_1", "interrupted": 15}
    assert heads.leave_one_out.Task(1, 7, "erm").file == "held_out_02_seed_7_erm.json"
