"""Nothing leaks: groups stay whole, test cases leave no trace in a training, noise is not learned."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import heads.evaluation.results
import heads.evaluation.study_report
from featstore.cohort.splits import Split, make_splits, read_split, save_split, write_splits
from featstore.errors import CohortError
from featstore.resident import CaseBags
from featstore.store import Store, StoreWriter
from heads.config import Config
from heads.evaluation.predict import predict
from heads.models.head import build_head
from heads.splits import Cohort, read_folds
from heads.training.loop import Training
from tests import helpers
from tests.command_line import answer, succeeded
from tests.heads.planted import (
    CASES,
    DIM,
    HEADS,
    LABELS,
    NAMES,
    SMALL,
    SOLVED,
    SPLIT,
    make_config,
    make_planted_project,
    planted_slice,
)
from tests.store.builders import make_spec

# Splits


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, str]]:
    """Class of every case, group of some: groups of any size, of one class or of several."""
    classes = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 6), min_size=4 * classes, max_size=24))
    mixed = draw(st.booleans())
    labels: dict[str, int] = {}
    groups: dict[str, str] = {}
    for number, size in enumerate(sizes):
        for _ in range(size):
            case = str(len(labels) + 1)
            labels[case] = (len(labels) if mixed else number) % classes
            if size > 1:
                groups[case] = f"patient {number}"
    return labels, groups


def homes(split: Split, groups: Mapping[str, str]) -> dict[str, set[str]]:
    """The parts in which each group's cases are; a case without a group is one of its own."""
    found: dict[str, set[str]] = {}
    for name, cases in split.parts().items():
        for case in cases:
            found.setdefault(groups.get(case, f"alone {case}"), set()).add(name)
    return found


@settings(max_examples=50)
@given(cohorts(), st.one_of(st.none(), st.integers(3, 8)), st.integers(0, 2**32 - 1))
def test_no_case_and_no_group_is_in_two_parts(
    cohort: tuple[dict[str, int], dict[str, str]], folds: int | None, seed: int
) -> None:
    labels, groups = cohort
    try:
        splits = make_splits(labels, groups, folds, seed)
    except CohortError:  # a class has fewer groups than there are folds
        assume(False)
    assert len(splits) == (folds or 1)
    tested: list[str] = []
    for split in splits:
        assert sorted(split.train + split.val + split.test) == sorted(labels)
        assert all(split.parts().values())
        assert all(len(parts) == 1 for parts in homes(split, groups).values())
        tested += split.test
    if folds:
        assert sorted(tested) == sorted(labels)


@settings(max_examples=25)
@given(cohorts(), st.integers(0, 2**32 - 1), st.data())
def test_written_splits_come_back_and_a_moved_case_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    cohort: tuple[dict[str, int], dict[str, str]],
    seed: int,
    data: st.DataObject,
) -> None:
    labels, groups = cohort
    try:
        splits = make_splits(labels, groups, 3, seed)
    except CohortError:
        assume(False)
    assume(all(all(split.parts().values()) for split in splits))
    folder = tmp_path_factory.mktemp("splits")
    paths = write_splits(splits, folder)
    config, known = Config(), Cohort([], labels, groups)
    config = config.model_copy(update={"split": config.split.model_copy(update={"path": str(folder)})})
    assert read_folds(config, folder, known, None, lambda text: None) == dict(enumerate(splits))
    fold = data.draw(st.integers(0, 2), "fold")
    parts = {name: list(cases) for name, cases in splits[fold].parts().items()}
    source, target = data.draw(st.permutations(sorted(parts)), "parts")[:2]
    case = data.draw(st.sampled_from(parts[source]), "case")
    if groups and data.draw(st.booleans(), "part a group"):
        pairs = [c for c in parts[source] if sum(groups.get(o) == groups.get(c) for o in groups) > 1]
        assume(pairs)
        case = data.draw(st.sampled_from(pairs), "of a group")
        parts[source].remove(case)
        assume(parts[source])
    parts[target].append(case)
    save_split(paths[fold], Split(*(tuple(parts[name]) for name in splits[fold].parts())))
    with pytest.raises(CohortError, match=f"in two parts, or twice: {case}\\n|groups are parted") as error:
        read_folds(config, folder, known, None, lambda text: None)
    assert error.value.where == str(paths[fold])
    with pytest.raises(CohortError):
        read_split(paths[fold], list(labels), groups)


# Test cases

SETTINGS: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["0"], "malignant": ["1"]},
    "head": {**SMALL, "dropout": 0.2},
    "train": {"device": "cpu", "lr": 0.003, "epochs": 3, "processes": 1, "load_splits": "split.npz"},
    "runs": {"resamples": 0, "threshold": "validation", "calibration": "temperature"},
}
QUICK = ("dual_stream", "linear")


def all_heads(quick: tuple[str, ...]) -> pytest.MarkDecorator:
    """A test for every head; most of them slow."""
    marked = [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in (*HEADS, *SOLVED)
    ]
    return pytest.mark.parametrize("name", marked)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, name, lambda *args: [])
    monkeypatch.setattr(heads.evaluation.study_report, "plot_study", lambda *args: [])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted_project(tmp_path_factory.mktemp("leaks"), SETTINGS)


@pytest.fixture
def project(cohort: Path, tmp_path: Path) -> Path:
    """A copy to train in."""
    return Path(shutil.copytree(cohort, tmp_path / "project", dirs_exist_ok=True))


def other_labels(project: Path) -> None:
    """The test cases' labels, turned round."""
    turned = {case: 1 - label if case in SPLIT.test else label for case, label in LABELS.items()}
    helpers.write_labels(project, turned)


def other_features(project: Path) -> None:
    """The test cases' embeddings, elsewhere and a hundred times as wide."""
    old = Store.open((project / "store").rename(project / "before"))
    writer = StoreWriter(project / "store", old.spec, {})
    for case in old.cases():
        bag = old.bag(case)
        stains = np.repeat(bag.stains, bag.stain_sizes).tolist()
        x = bag.features * np.float16(100) + np.float16(7) if case in SPLIT.test else bag.features
        parts = np.split(x, np.cumsum(bag.slice_sizes)[:-1])
        triples = zip(stains, bag.slices, parts, strict=True)
        writer.commit(case, [planted_slice(case, *each) for each in triples])


def left_by(run: Path) -> dict[str, Any]:
    """What a training leaves before the test cases are looked at."""
    results = json.loads((run / "results.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    found: dict[str, Any] = {
        "train": results["train"],
        "best": (run / "checkpoints/best.safetensors").read_bytes(),
    }
    found["history"] = pd.read_csv(run / "history.csv").drop(columns="seconds").to_csv()
    for part in ("test", "test_last"):
        found[f"threshold {part}"] = results[part]["threshold"]
        fitted = metrics[part]["calibration"]
        found[f"calibration {part}"] = [fitted[name] for name in ("temperature", "remark", "validation")]
    return found


def said_of(run: Path) -> dict[str, Any]:
    found = json.loads((run / "results.json").read_text())["test"]
    return {name: found[name] for name in ("prediction_probs", "true_labels", "test_loss", "case_ids")}


@all_heads(QUICK)
def test_what_the_test_cases_are_leaves_no_trace_in_a_training(project: Path, name: str) -> None:
    runs = []
    for change in (None, other_labels, other_features):
        if change is not None:
            change(project)
        run = Path(answer(project, "train-head", "--model", name)["run"])
        runs.append((left_by(run), said_of(run)))
    (plain, said), (turned, other), (moved, elsewhere) = runs
    assert plain == turned == moved
    assert plain["threshold test"] is not None
    assert other["prediction_probs"] == said["prediction_probs"]
    assert other["true_labels"] == [1 - label for label in said["true_labels"]]
    assert other["test_loss"] != said["test_loss"]
    assert elsewhere["prediction_probs"] != other["prediction_probs"]


@pytest.mark.slow
def test_nor_in_the_trainings_of_a_study(project: Path) -> None:
    studies = []
    for change in (lambda project: None, other_labels, other_features):
        change(project)
        before = set(project.glob("runs/study_*"))
        succeeded(project, "train-head", "--model", "abmil", "--seeds", 2)
        (study,) = set(project.glob("runs/study_*")) - before
        runs = [study / "trainings" / f"fold_0_seed_{seed}" for seed in (42, 43)]
        studies.append(([left_by(run) for run in runs], [said_of(run) for run in runs]))
    assert studies[0][0] == studies[1][0] == studies[2][0]
    assert studies[0][0][0] != studies[0][0][1]
    assert studies[0][1] != studies[1][1] != studies[2][1]


# Noise


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, int]]:
    """Sixty cases of one slice each, of which half show what their class is."""
    path, rng = tmp_path_factory.mktemp("noise") / "store", np.random.default_rng(3)
    writer = StoreWriter(path, make_spec(dim=DIM, stored_dtype="float32"), {})
    labels = {str(i): i % 2 for i in range(1, 61)}
    for case, label in labels.items():
        x = rng.normal(size=(int(rng.integers(3, 7)), DIM))
        x[: len(x) // 2 + 1, :4] += 2.0 * label
        writer.commit(case, [planted_slice(case, "h&e", "match_1", x.astype(np.float32))])
    return Store.open(path), labels


def auc_on_test(name: str, store: Store, labels: dict[str, int], seed: int) -> float:
    """Of a training on a split of its own, its best epoch."""
    config = make_config(name, epochs=3, lr=0.01, seed=seed, batch_size=8)
    bags = CaseBags(store, labels, 10**9)
    (split,) = make_splits(labels, {}, None, seed)
    head = build_head(config.head, DIM, 2, seed)
    training = Training(head, bags, split, config.train, NAMES)
    training.run()
    head.load_state_dict(training.best)
    found = predict(head, bags, split.test, config.train)
    return float(roc_auc_score(found.labels, found.probabilities[:, 1]))


def shuffled(labels: Mapping[str, int], seed: int) -> dict[str, int]:
    values = list(labels.values())
    random.Random(seed).shuffle(values)
    return dict(zip(labels, values, strict=True))


@all_heads(("mean",))
def test_of_shuffled_labels_nothing_can_be_learned(
    planted: tuple[Store, dict[str, int]], name: str
) -> None:
    store, labels = planted
    aucs = [auc_on_test(name, store, shuffled(labels, seed), seed) for seed in range(20)]
    assert 0.40 <= np.mean(aucs) <= 0.60
    assert np.std(aucs) > 0.02
    assert auc_on_test(name, store, labels, 0) > 0.8  # as they are, something can


def test_the_cohort_is_the_planted_one() -> None:
    """The properties above speak of cases of both classes in every part."""
    assert all({LABELS[case] for case in part} == {0, 1} for part in SPLIT.parts().values())
    assert sorted(case for part in SPLIT.parts().values() for case in part) == sorted(CASES)
