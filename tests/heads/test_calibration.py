"""Temperature scaling against SciPy and a dense grid, its limits, and in a training's results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

import heads.evaluation.results
from heads.config import RunsConfig
from heads.evaluation.calibration import (
    COLDEST,
    HOTTEST,
    Temperature,
    before_and_after,
    calibrate,
    fit_temperature,
    softmax,
)
from heads.evaluation.metrics import EvaluationError, evaluate
from tests import helpers
from tests.command_line import succeeded, write_config
from tests.heads.planted import CASES, SMALL, make_store

NAMES = ("a", "b", "c", "d")
seeds = st.integers(0, 2**32 - 1)
PARTS = ("test", "test_last")


def cases(seed: int, n: int, classes: int, true_temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are calibrated at a temperature, and labels drawn so."""
    rng = np.random.default_rng(seed)
    z = rng.normal(scale=2.0, size=(n, classes))
    p = softmax(z)
    labels = (rng.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    return z * true_temperature, labels


def log_loss(z: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(-log_softmax(z / temperature, axis=1)[np.arange(len(z)), labels].mean())


# The fit


@pytest.mark.parametrize("classes", [2, 4])
@settings(max_examples=40)
@given(seed=seeds, n=st.integers(4, 60), scale=st.sampled_from([0.05, 0.5, 1.0, 3.0, 30.0]))
def test_no_other_temperature_has_a_lower_log_loss(classes: int, seed: int, n: int, scale: float) -> None:
    z, labels = cases(seed, n, classes, scale)
    found = fit_temperature(z, labels, NAMES)
    assert found.cases == n
    assert COLDEST <= found.value <= HOTTEST
    assume("left at 1" not in found.remark)
    loss = log_loss(z, labels, found.value)
    grid = np.geomspace(COLDEST, HOTTEST, 200)
    assert loss <= min(log_loss(z, labels, t) for t in grid) + 1e-12
    other = minimize_scalar(
        lambda b: log_loss(z, labels, np.exp(b)), bounds=np.log([COLDEST, HOTTEST]), method="bounded"
    )
    assert loss <= other.fun + 1e-12
    assert bool(found.remark) == (found.value in (COLDEST, HOTTEST))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_was_is_found_again(classes: int, temperature: float) -> None:
    z, labels = cases(0, 20_000, classes, temperature)
    found = fit_temperature(z, labels, NAMES)
    assert found.value == pytest.approx(temperature, rel=0.05)
    assert not found.remark
    quality = before_and_after(found, z, labels)
    assert quality["after"]["ece"] < 0.02
    if temperature != 1:
        assert quality["before"]["ece"] > 2 * quality["after"]["ece"]


@given(seeds, st.integers(2, 4), st.floats(COLDEST, HOTTEST))
def test_the_most_probable_class_stays(seed: int, classes: int, temperature: float) -> None:
    z = np.random.default_rng(seed).normal(scale=3.0, size=(50, classes))
    p = Temperature(temperature, 50).probabilities(z)
    assert np.array_equal(p.argmax(axis=1), z.argmax(axis=1))
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_allclose(np.log(p), log_softmax(z / temperature, axis=1), rtol=1e-9, atol=1e-9)


TWO = np.array([0, 0, 1, 1])
APART = np.array([[2.0, 0.0], [0.1, 0.0], [0.0, 3.0], [-1.0, 1.0]])  # all called right
NEARLY = np.concatenate((np.repeat(APART, 25, axis=0), [[0.001, 0.0]]))  # all but one, by a hair


@pytest.mark.parametrize(
    ("logits", "labels", "value", "says"),
    [
        (APART, TWO, 1.0, "every validation case is called right"),
        (np.zeros((4, 2)), TWO, 1.0, "the same of all classes"),
        (APART, np.ones(4, int), 1.0, "all validation cases are of b"),
        (np.ones((3, 4)) * [[1], [2], [3]], np.array([0, 1, 3]), 1.0, "the same of all classes"),
        (-APART, TWO, HOTTEST, "worse than chance"),
        (100 * cases(1, 60, 2)[0], cases(1, 60, 2)[1], HOTTEST, "far too sure"),
        (0.01 * cases(1, 60, 2)[0], cases(1, 60, 2)[1], COLDEST, "the smallest allowed"),
        (0.1 * NEARLY, np.r_[np.repeat(TWO, 25), 1], COLDEST, "nearly all are called right"),
    ],
)
def test_cases_that_cannot_tell_are_told_of(
    logits: np.ndarray, labels: np.ndarray, value: float, says: str
) -> None:
    found = calibrate(logits, labels, logits, labels, NAMES)
    assert found.temperature.value == value
    assert says in found.temperature.remark
    assert says in found.to_text()
    json.dumps(found.to_json(), allow_nan=False)


def test_log_loss_and_ece_before_and_after_are_those_of_the_metrics() -> None:
    (z, labels), (others, truth) = cases(3, 40, 3, 4.0), cases(4, 25, 3, 4.0)
    found = calibrate(z, labels, others, truth, NAMES[:3])
    for quality, logits, true in ((found.fitted_on, z, labels), (found.applied_to, others, truth)):
        for name, t in (("before", 1.0), ("after", found.temperature.value)):
            metrics = evaluate(true, softmax(logits / t), NAMES[:3], resamples=0)
            assert quality[name] == {
                "log_loss": pytest.approx(metrics.log_loss.value),
                "ece": pytest.approx(metrics.ece.value),
            }
    assert found.fitted_on["after"]["log_loss"] < found.fitted_on["before"]["log_loss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_no_numbers_are_refused(value: float, which: int) -> None:
    logits = [APART.copy(), APART.copy()]
    logits[which][1, 0] = value
    with pytest.raises(EvaluationError, match="logits of the") as error:
        calibrate(logits[0], TWO, logits[1], TWO, NAMES[:2])
    for part in (("validation", "evaluated")[which], "expected: ", "where: ", "to do: "):
        assert part in str(error.value)


def test_nothing_is_calibrated_unless_asked_for() -> None:
    assert RunsConfig().calibration == "none"


# In a project


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty cases of three classes, with embeddings in which the last class stands out."""
    folder = tmp_path_factory.mktemp("calibration")
    train: dict[str, Any] = {"device": "cpu", "lr": 0.05, "epochs": 8, "patience": None, "processes": 1}
    sections = {
        "head": {**SMALL, "name": "abmil", "dropout": 0.0},
        "train": train,
        "runs": {"resamples": 20},
    }
    classes = {"benign": ["1"], "low_grade": ["2"], "high_grade": ["3"]}
    write_config(folder, {"labels": {"file": "labels.csv"}, "classes": classes}, sections)
    helpers.write_labels(folder, {case: "1323"[i % 4] for i, case in enumerate(CASES)})
    make_store(folder / "store")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing takes far longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_history", "plot_confusion", "plot_deviation"):
            patch.setattr(heads.evaluation.results, name, lambda *args: [])
        patch.setattr("heads.evaluation.study_report.plot_study", lambda *args: [])
        yield


@pytest.fixture(scope="module")
def runs(cohort: Path) -> tuple[Path, Path, str]:
    """A run without and one with calibration, and what was said of the latter; not to be changed."""
    return train(cohort)[0], *train(cohort, "--calibration", "temperature")


@pytest.fixture
def project(cohort: Path, tmp_path: Path) -> Path:
    """A copy to train in."""
    return Path(shutil.copytree(cohort, tmp_path / "project"))


def train(project: Path, *flags: object) -> tuple[Path, str]:
    """The new folder of a run or study, and what was said."""
    before = set((project / "runs").glob("*"))
    said = succeeded(project, "train-head", *flags).stdout
    (made,) = set((project / "runs").glob("*")) - before
    return made, said


def read(run: Path, name: str = "results") -> dict[str, Any]:
    return dict(json.loads((run / f"{name}.json").read_text()))


def test_best_and_last_epoch_each_have_their_own_temperature_on_record(
    runs: tuple[Path, Path, str],
) -> None:
    plain, run, said = runs
    before, after, metrics = read(plain), read(run), read(run, "metrics")
    text = (run / "results.txt").read_text()
    temperatures = set()
    for part in PARTS:
        assert before[part]["calibration"] is None
        done = after[part]["calibration"]
        assert done == metrics[part]["calibration"]
        temperatures.add(done["temperature"])
        assert f"temperature {done['temperature']:.3f}" in text
        assert f"temperature {done['temperature']:.3f}" in said
        p, q = (np.array(each[part]["prediction_probs"]) for each in (before, after))
        z = np.log(p) / done["temperature"]
        np.testing.assert_allclose(q, softmax(z), rtol=1e-6)
        assert after[part]["predictions"] == before[part]["predictions"]
        assert after[part]["test_loss"] == before[part]["test_loss"]  # comparable with the validation loss
        assert done["evaluated"]["after"]["log_loss"] == metrics[part]["log_loss"]["value"]
        assert done["evaluated"]["after"]["ece"] == metrics[part]["ece"]["value"]
        want = read(plain, "metrics")[part]["log_loss"]["value"]
        assert done["evaluated"]["before"]["log_loss"] == pytest.approx(want, rel=1e-9)
        assert done["validation"]["after"]["log_loss"] <= done["validation"]["before"]["log_loss"]
    assert len(temperatures) == 2
    table = pd.read_csv(run / "predictions.csv").filter(like="prob_").to_numpy()
    np.testing.assert_allclose(table, after["test"]["prediction_probs"])


def test_the_temperature_is_fitted_to_the_validation_cases(runs: tuple[Path, Path, str]) -> None:
    run, project = runs[1], runs[1].parent.parent
    done = read(run)["test"]["calibration"]
    asked = ("evaluate", run, "--part", "val", "--json", "--calibration")
    plain = json.loads(succeeded(project, *asked, "none").stdout)["best"]
    scaled = json.loads(succeeded(project, *asked, "temperature").stdout)["best"]
    assert done["validation_cases"] == plain["n"] == scaled["n"]
    assert plain["log_loss"]["value"] == pytest.approx(done["validation"]["before"]["log_loss"])
    assert scaled["log_loss"]["value"] == pytest.approx(done["validation"]["after"]["log_loss"])
    assert scaled["calibration"]["temperature"] == done["temperature"]
    assert scaled["calibration"]["evaluated"] == scaled["calibration"]["validation"]


def test_evaluate_writes_the_same_again(runs: tuple[Path, Path, str], project: Path) -> None:
    run = project / "runs" / runs[1].name
    kept = {name: (run / name).read_bytes() for name in ("results.json", "metrics.json", "results.txt")}
    for name in (*kept, "predictions.csv"):
        (run / name).unlink()
    succeeded(project, "evaluate", run)
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert (run / "predictions.csv").is_file()


def test_another_calibration_than_the_runs_own_writes_nothing(
    runs: tuple[Path, Path, str], project: Path
) -> None:
    run = project / "runs" / runs[1].name
    kept = (run / "results.json").read_bytes()
    said = succeeded(project, "evaluate", run, "--calibration", "none").output
    assert "another calibration than the run's own" in said
    assert (run / "results.json").read_bytes() == kept


def test_a_study_pools_calibrated_probabilities(project: Path) -> None:
    study, _ = train(project, "--folds", 3, "--seeds", 2, "--epochs", 2, "--calibration", "temperature")
    oof = pd.read_csv(study / "out_of_fold.csv", dtype={"case_id": str}).set_index(
        ["fold", "seed", "case_id"]
    )
    trainings = list((study / "trainings").iterdir())
    assert len(trainings) == 6
    for run in trainings:
        _, fold, _, seed = run.name.split("_")
        test = read(run)["test"]
        assert test["calibration"]["method"] == "temperature"
        for case, p in zip(test["case_ids"], test["prediction_probs"], strict=True):
            assert oof.loc[(int(fold), int(seed), case)].filter(like="prob_").tolist() == pytest.approx(p)
    kept = (study / "metrics.json").read_bytes()
    succeeded(project, "evaluate", "--study", study)
    assert (study / "metrics.json").read_bytes() == kept


def test_a_threshold_is_chosen_among_calibrated_probabilities(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {"common": ["1", "3"], "rare": ["2"]}
    seen: list[tuple[np.ndarray, np.ndarray, float]] = []
    choose = heads.evaluation.results.youden_threshold

    def noted(labels: np.ndarray, p: np.ndarray) -> float:
        seen.append((labels, p, choose(labels, p)))
        return seen[-1][2]

    monkeypatch.setattr(heads.evaluation.results, "youden_threshold", noted)
    flags = ("--epochs", 6, "--threshold", "validation", "--set", f"classes={json.dumps(classes)}")
    train(project, *flags)
    run, _ = train(project, *flags, "--calibration", "temperature")
    test = read(run)["test"]
    t = test["calibration"]["temperature"]
    assert t != 1.0
    (labels, plain, before), (same, scaled, after) = seen[0], seen[2]
    assert np.array_equal(labels, same)
    np.testing.assert_allclose(np.log(scaled / (1 - scaled)), np.log(plain / (1 - plain)) / t, rtol=1e-6)
    assert test["threshold"] == after != before
    assert test["predictions"] == [int(p[1] >= after) for p in test["prediction_probs"]]
