"""Reports from run and study folders: the numbers of their files, a note or an error for what is amiss."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.errors import FeatstoreError
from heads.evaluation import plots
from heads.evaluation.compare import compare, read_contender
from heads.evaluation.metrics import evaluate
from heads.evaluation.runs import RunFolder, write_json
from heads.evaluation.study_report import write_report as write_study
from heads.inspect.report import svg
from heads.inspect.report.content import NO_PICTURES, CaseLink, Chart, Report, Section, Table
from heads.inspect.report.page import render
from heads.inspect.report.reading import ALL_CASES, NO_HISTORY, NO_TRAINING, read_report, read_run
from heads.inspect.report.words import MEANINGS
from tests.command_line import answer
from tests.heads.planted import SMALL, SPLIT, make_planted_project
from tests.heads.test_lab_checkpoints import save, weights_of
from tests.heads.test_studies import make_study
from tests.inspect.reports import with_pictures

SETTINGS: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["0"], "malignant": ["1"]},
    "head": {**SMALL, "name": "abmil"},
    "train": {"device": "cpu", "lr": 0.003, "epochs": 3, "load_splits": "split.npz"},
    "runs": {"resamples": 50},
}


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("results.plot_history", "results.plot_confusion", "results.plot_deviation"):
        monkeypatch.setattr(f"heads.evaluation.{name}", lambda *args: [])
    monkeypatch.setattr("heads.evaluation.study_report.plot_study", lambda *args: [])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two runs and an imported checkpoint; not to be changed."""
    folder = make_planted_project(tmp_path_factory.mktemp("report"), SETTINGS)
    save(folder / "lab.pth", weights_of("gated"))
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        answer(folder, "train-head", "--suffix", "a")
        answer(folder, "train-head", "--suffix", "b", "--model", "dual_stream", "--threshold", "validation")
        answer(
            folder,
            "train-head",
            "--suffix",
            "c",
            "--calibration",
            "temperature",
            "--epochs",
            1,
            "--train-seed",
            7,
        )
        answer(folder, "import", "lab.pth", "--load-splits", "null", "--suffix", "lab")
    return folder


@pytest.fixture
def runs(whole: Path, tmp_path: Path) -> Path:
    """A copy of its runs, each under its suffix alone."""
    new = tmp_path / "runs"
    for path in (whole / "runs").iterdir():
        shutil.copytree(path, new / path.name.rsplit("_", 1)[1])
    return new


def found(run: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((run / name).read_text()))


def make_the_last_epoch_another(run: Path) -> None:
    """So that nobody can take it for the best one."""
    for name in ("results.json", "metrics.json"):
        content = found(run, name)
        last = content["test_last"]
        if name == "results.json":
            last["prediction_probs"] = [p[::-1] for p in content["test"]["prediction_probs"]]
        else:
            last["brier"] = last["accuracy"] = {"value": 0.123, "low": None, "high": None}
            last["confusion_matrix"] = [[0, 0], [0, 4]]
        write_json(run / name, content)


def section(report: Report, anchor: str) -> Section:
    return next(each for each in report.sections if each.anchor == anchor)


def chart(report: Report, title: str) -> Chart:
    return next(each for s in report.sections for each in s.charts if each.title.startswith(title))


def table(report: Report, title: str) -> Table:
    return next(each for s in report.sections for each in s.tables if each.title.startswith(title))


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_runs_report_says_what_its_files_say(runs: Path, name: str) -> None:
    make_the_last_epoch_another(runs / name)
    report = read_report(runs, Path(name))
    metrics, test = found(runs / name, "metrics.json")["test"], found(runs / name, "results.json")["test"]
    by_name = {each.name: each for each in report.metrics}
    for key, (label, _) in MEANINGS.items():
        value = metrics[key]["value"]
        assert by_name[label].value == (None if value == "undefined" else value)
        assert by_name[label].low == metrics[key].get("low")
        assert by_name[label].high == metrics[key].get("high")
    assert by_name["Recall of malignant"].value == metrics["recall"]["malignant"]["value"]

    predictions = pd.read_csv(runs / name / "predictions.csv", dtype={"case_id": str}).set_index("case_id")
    assert [case.case_id for case in report.cases] == list(SPLIT.test)
    for case in report.cases:
        row = predictions.loc[case.case_id]
        assert (case.true_class, case.predicted_class) == (row["true_label"], row["predicted_label"])
        assert case.probabilities["malignant"] == pytest.approx(row["prob_malignant"])
        assert case.correct == bool(row["correct"])
        assert case.notes == (NO_PICTURES,)
    right = int(predictions["correct"].sum())
    assert report.verdict[0].startswith(f"{right} of 4 test cases called right: accuracy {right / 4:.3f}")
    assert "only 4 test cases" in report.verdict[-1]

    label = chart(report, "Confusion").svg
    for (row, column), count in np.ndenumerate(np.array(metrics["confusion_matrix"])):
        names = ("benign", "malignant")
        assert f"{count} of {names[row]} called {names[column]}" in label
    epochs = found(runs / name, "results.json")["train"]["best_epoch"]
    assert f"best epoch: {epochs}" in chart(report, "Loss").svg
    parts = table(report, "Cases by class")
    assert parts.columns == ("class", "train", "val", "test", "all labelled")
    assert parts.rows[-1] == ("all classes", 12, 4, 4, 20)
    assert report.provenance["fingerprint"] == found(runs / name, "run.json")["store"]["fingerprint"]
    assert test["class_names"] == list(report.class_names)
    assert "</html>" in render(report)


def test_threshold_calibration_and_settings_are_told(runs: Path) -> None:
    assert (
        "threshold chosen among the validation cases"
        in section(read_report(runs, Path("b")), "curves").notes[0]
    )
    report = read_report(runs, Path("c"))
    temperature = found(runs / "c", "results.json")["test"]["calibration"]["temperature"]
    assert f"temperature {temperature:.3f}, from 4 validation cases" in section(report, "curves").notes[0]
    changed = report.provenance["settings not at their defaults"]
    assert "train.epochs = 1" in changed
    assert "runs.calibration = temperature" in changed
    assert "train.seed" not in changed
    assert "load_splits" not in changed


def test_a_case_is_called_by_the_runs_threshold(runs: Path) -> None:
    results = found(runs / "a", "results.json")
    p = sorted(each[1] for each in results["test"]["prediction_probs"])
    for threshold, positive in ((0.0, 4), (p[2], 2), (1.0, 0)):
        results["test"]["threshold"] = threshold
        write_json(runs / "a" / "results.json", results)
        cases = read_report(runs, Path("a")).cases
        assert sum(case.predicted_class == "malignant" for case in cases) == positive
        assert [case.correct for case in cases] == [
            case.predicted_class == case.true_class for case in cases
        ]


def test_metrics_of_other_cases_are_refused(runs: Path) -> None:
    metrics = found(runs / "a", "metrics.json")
    metrics["test"]["n"] = 5
    write_json(runs / "a" / "metrics.json", metrics)
    with pytest.raises(FeatstoreError, match=r"it is of 5 cases, and results\.json of 4"):
        read_report(runs, Path("a"))


def test_an_imported_checkpoint_has_no_training_and_warns_of_its_cases(runs: Path) -> None:
    report = read_report(runs, Path("lab"))
    assert report.warnings == (ALL_CASES,)
    assert len(report.cases) == 20
    assert section(report, "training").notes == (NO_TRAINING,)
    assert report.provenance["imported from"].startswith("lab.pth: hierarchical")
    page = render(report)
    assert ALL_CASES in page
    assert NO_TRAINING in page


def test_a_run_without_its_history_says_so_in_its_place(runs: Path) -> None:
    (runs / "a" / "history.csv").unlink()
    report = read_report(runs, Path("a"))
    assert section(report, "training").notes == (NO_HISTORY,)
    assert section(report, "training").charts == ()
    (runs / "b" / "history.csv").write_text("epoch,seconds\n1,0.5\n")
    report = read_report(runs, Path("b"))
    assert [each.note for each in section(report, "training").charts] == [
        "The run's history has no cross-entropy.",
        "The run's history has no accuracy.",
        "The run's history has no AUC.",
    ]


def test_a_test_set_of_one_class_has_notes_in_place_of_curves(runs: Path) -> None:
    run = RunFolder(runs / "a")
    results = found(run.path, "results.json")
    test = results["test"]
    kept = [i for i, label in enumerate(test["true_labels"]) if label == 1]
    for name in ("true_labels", "case_ids", "prediction_probs", "predictions"):
        test[name] = [test[name][i] for i in kept]
    metrics = evaluate(
        np.array(test["true_labels"]), np.array(test["prediction_probs"]), test["class_names"]
    )
    write_json(run.results, results)
    write_json(run.path / "metrics.json", {"test": metrics.to_json()})
    report = read_run(run)
    assert chart(report, "ROC curve").note.startswith(
        "There is no curve: every test case is of class malignant"
    )
    assert "AUC undefined (no true case of class benign)." in report.verdict[1]
    page = render(report)
    assert "undefined" in page
    assert page.count("There is no curve") == 2


def test_pages_with_pictures_take_the_place_of_those_without(runs: Path) -> None:
    plain = read_report(runs, Path("a"))
    report = read_report(runs, Path("a"), cases=[with_pictures(plain.cases[1])])
    assert [bool(case.overlays) for case in report.cases] == [False, True, False, False]
    assert [case.notes for case in report.cases] == [(NO_PICTURES,), (), (NO_PICTURES,), (NO_PICTURES,)]
    assert report.cases[1].probabilities == plain.cases[1].probabilities


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.json", "{", "results.json cannot be read"),
        ("results.json", None, "the run is not finished"),
        ("metrics.json", None, "metrics.json cannot be read: FileNotFoundError"),
        ("metrics.json", "[1, 2]", "metrics.json cannot be read: TypeError"),
        ("metrics.json", '{"test": {"n": 9, "confusion_matrix": [[1]]}}', "metrics.json cannot be read"),
        ("history.csv", "nonsense\n1\n", "it has no column 'epoch'"),
        ("history.csv", "", "history.csv cannot be read"),
        ("run.json", "{}", "the description cannot be read"),
        ("config.yaml", None, "no config.yaml"),
        ("data_splits.npz", "PK", "data_splits.npz"),
    ],
)
def test_what_cannot_be_read_is_told_with_what_to_do(
    runs: Path, name: str, content: str | None, says: str
) -> None:
    file = runs / "a" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(FeatstoreError) as error:
        read_report(runs, Path("a"))
    assert says in str(error.value)
    assert "\n  to do: " in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prediction_probs": [[float("nan"), 0.5]] * 4}, "a probability or a label is none"),
        ({"true_labels": [0, 1, 2, 0]}, "a probability or a label is none"),
        ({"case_ids": ["1", "1", "2", "3"]}, "a case stands there twice"),
    ],
)
def test_results_that_make_no_sense_are_told(runs: Path, change: dict[str, Any], says: str) -> None:
    results = found(runs / "a", "results.json")
    results["test"] |= change
    (runs / "a" / "results.json").write_text(json.dumps(results))
    with pytest.raises(FeatstoreError, match=says):
        read_report(runs, Path("a"))


def test_a_name_that_is_nothing_is_told(runs: Path) -> None:
    with pytest.raises(FeatstoreError, match="is no run and no study"):
        read_report(runs, Path("nowhere"))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_studys_report_says_what_its_tables_say(tmp_path: Path, classes: int) -> None:
    study = make_study(tmp_path, classes)
    resamples = study.config.runs.resamples
    write_study(study, resamples)
    report = read_report(tmp_path, study.folder.path)
    ensemble = found(study.folder.path, "metrics.json")["ensemble"]
    by_name = {each.name: each for each in report.metrics}
    for key, (label, _) in MEANINGS.items():
        assert (by_name[label].value, by_name[label].low) == (ensemble[key]["value"], ensemble[key]["low"])

    tables = {
        name: pd.read_csv(study.folder.path / f"{name}.csv", dtype={"case_id": str})
        for name in ("ensemble", "per_case", "always_wrong", "per_split", "pooled")
    }
    cases = tables["per_case"].set_index("case_id")
    for case, (_, row) in zip(report.cases, tables["ensemble"].iterrows(), strict=True):
        assert (case.case_id, case.predicted_class) == (row["case_id"], row["predicted_label"])
        mine = cases.loc[case.case_id]
        assert case.details["called right"] == f"in {mine['right']} of 3 trainings"
        assert case.columns["share right"] == pytest.approx(mine["right"] / 3)
        assert case.columns["spread of p"] == pytest.approx(mine["max"] - mine["min"])
        assert len(case.charts) == 1
    wrong = {row[0] for row in table(report, "Wrong in every training").rows}
    assert wrong == {CaseLink(case) for case in tables["always_wrong"]["case_id"]}
    assert wrong
    splits = table(report, "Test results by split").rows
    assert [row[4] for row in splits] == pytest.approx(tables["per_split"]["median"].astype(float).tolist())
    seeds = table(report, "All folds of a seed").rows
    assert [row[3] for row in seeds] == pytest.approx(tables["pooled"]["auc"].tolist())
    assert len(table(report, "Every training").rows) == 9
    assert chart(report, "Each case over the trainings").svg.count("<a href=") == 18
    assert chart(report, "Validation loss").note
    assert "A single training, mean ± standard deviation of 9: AUC " in report.verdict[-1]
    assert "</html>" in render(report)


def test_trainings_that_are_not_finished_are_named_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for fold, seed in study.trainings[1:]:
        study.folder.training(fold, seed).results.unlink()
    report = read_report(tmp_path, study.folder.path)
    assert report.warnings[0].startswith("8 trainings of 9 left out: fold 1 seed 7 (missing)")
    assert len(report.cases) == 6
    assert all(not case.charts for case in report.cases)  # of one training there is no spread
    assert "</html>" in render(report)
    study.folder.training(*study.trainings[0]).results.unlink()
    with pytest.raises(FeatstoreError, match="no training of the study is finished"):
        read_report(tmp_path, study.folder.path)


def test_two_runs_are_laid_side_by_side(runs: Path) -> None:
    report = read_report(runs, Path("a"), Path("b"), resamples=50)
    expected = compare(read_contender(runs, Path("a")), read_contender(runs, Path("b")), 50)
    for row, wanted in zip(table(report, "Metrics of A and B").rows, expected.rows, strict=True):
        assert row[1:6] == (
            wanted.a,
            wanted.b,
            wanted.difference.value,
            wanted.difference.low,
            wanted.difference.high,
        )
    first, second = ({c.case_id: c for c in read_report(runs, Path(name)).cases} for name in "ab")
    apart = []
    for case in report.cases:
        a, b = first[case.case_id], second[case.case_id]
        assert [each.correct for each in case.opinions] == [a.correct, b.correct]
        assert [each.probabilities for each in case.opinions] == [a.probabilities, b.probabilities]
        words = {(True, True): "both right", (True, False): "only A right", (False, True): "only B right"}
        assert case.verdict == words.get((a.correct, b.correct), "both wrong")
        apart += [CaseLink(case.case_id)] if a.correct != b.correct else []
    one = table(report, "Right in one only")
    assert {row[0] for row in one.rows} == set(apart)
    assert bool(one.rows) != bool(one.note)
    differences = [abs(float(str(row[4]))) for row in table(report, "Every case by its difference").rows]
    assert differences == sorted(differences, reverse=True)
    assert len(differences) == 4
    page = render(report)
    assert "A calls" in page
    assert re.search(r"Of 4 cases A calls \d right and B \d", page)


def test_a_run_beside_an_imported_checkpoint_says_which_cases_are_left_out(runs: Path) -> None:
    report = read_report(runs, Path("a"), Path("lab"), resamples=20)
    assert report.warnings == ("16 cases only in B: left out.",)
    assert "those it was trained on perhaps among them" in report.provenance["B"]
    with pytest.raises(FeatstoreError, match="is no run and no study"):
        read_report(runs, Path("a"), Path("nowhere"))


def test_colours_and_markers_are_those_of_the_other_pictures() -> None:
    for place, (color, _) in enumerate(plots.COLORS):
        assert svg.color(place) == color
        assert color in svg.marker(place, 0, 0)
    assert len({svg.marker(place, 0, 0, fill="#000") for place in range(len(plots.COLORS))}) == len(
        plots.COLORS
    )
