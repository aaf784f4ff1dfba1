"""A study's tables and comparisons, from hand-made predictions, against pandas, scikit-learn and SciPy."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr
from sklearn.metrics import log_loss, roc_auc_score

from featstore.cohort.splits import Split
from heads.config import Config, resolved
from heads.evaluation import agreement
from heads.evaluation.compare import COMPARED, Contender, compare, read_contender
from heads.evaluation.metrics import evaluate, resample
from heads.evaluation.runs import RunError, write_json
from heads.evaluation.studies import Study, StudyFolder, clear_training, create_study, record_failure
from heads.evaluation.study_plots import roc
from heads.evaluation.study_report import write_report
from heads.evaluation.study_results import CasePredictions

NAMES = {2: ["benign", "malignant"], 3: ["a", "b", "c"]}
FOLDS, SEEDS = [0, 1, 2], [7, 8, 9]


def predictions(fold: int, seed: int, classes: int, cases: int = 6) -> dict[str, Any]:
    """Test results of one training, with ties; of three classes, fold 2 lacks the last."""
    rng = np.random.default_rng(100 * fold + seed)
    p = rng.integers(1, 5, size=(cases, classes)).astype(float)
    p /= p.sum(axis=1, keepdims=True)
    labels = (np.arange(cases) % (2 if fold == 2 else classes)).tolist()
    return {
        "test_loss": float(rng.random()),
        "test_accuracy": float((p.argmax(axis=1) == labels).mean()),
        "test_auc": None,
        "true_labels": labels,
        "case_ids": [str(fold * cases + i + 1) for i in range(cases)],
        "prediction_probs": p.tolist(),
        "class_names": NAMES[classes],
        "threshold": None,
    }


def write_training(study: Study, fold: int, seed: int, test: dict[str, Any]) -> None:
    run = clear_training(study.folder, fold, seed)
    found = evaluate(
        np.array(test["true_labels"]), np.array(test["prediction_probs"]), test["class_names"],
        threshold=test["threshold"], resamples=0,
    )  # fmt: skip
    test["test_auc"] = found.auc.value
    write_json(run.path / "metrics.json", {"test": found.to_json(), "test_last": found.to_json()})
    pd.DataFrame({"epoch": [1, 2], "seconds": [0.5, 0.25]}).to_csv(run.history, index=False)
    pd.DataFrame({"true_label": test["true_labels"]}).to_csv(run.path / "predictions.csv", index=False)
    save_file({"weight": np.zeros(1)}, run.best)
    train = {"best_val_loss": 0.1 * fold + seed, "epochs": 2, "best_epoch": 1}
    write_json(run.results, {"train": train, "test": test, "test_last": test})


def make_study(folder: Path, classes: int = 2, thresholds: dict[int, float] | None = None) -> Study:
    """Three folds of six cases, three seeds; with thresholds, one a fold."""
    cases = [str(i + 1) for i in range(18)]
    about = {
        "dim": 4, "class_names": NAMES[classes], "labels": dict.fromkeys(cases, 0),
        "store": {"fingerprint": "x", "digest": "y"}, "folds": FOLDS, "seeds": SEEDS,
    }  # fmt: skip
    split = Split(tuple(cases[:6]), tuple(cases[6:12]), tuple(cases[12:]))
    study = create_study(folder, resolved(Config()), about, dict.fromkeys(FOLDS, split))
    for fold, seed in study.trainings:
        test = predictions(fold, seed, classes)
        write_training(study, fold, seed, test | {"threshold": thresholds and thresholds[fold]})
    return study


def read(study: Study, name: str) -> pd.DataFrame:
    return pd.read_csv(study.folder.path / f"{name}.csv", dtype={"case_id": str})


def long_table(classes: int) -> pd.DataFrame:
    """All predictions, one row a case, fold and seed, by plain loops."""
    rows = []
    for fold in FOLDS:
        for seed in SEEDS:
            test = predictions(fold, seed, classes)
            for case, true, p in zip(
                test["case_ids"], test["true_labels"], test["prediction_probs"], strict=True
            ):
                right = int(np.argmax(p) == true)
                rows.append({"case": case, "fold": fold, "seed": seed, "true": true, "right": right,
                             "own": p[true], **{f"p{c}": v for c, v in enumerate(p)}})  # fmt: skip
    return pd.DataFrame(rows)


def auc_of(true: np.ndarray, p: np.ndarray) -> float:
    if p.shape[1] == 2:
        return float(roc_auc_score(true, p[:, 1]))
    return float(np.mean([roc_auc_score(true == c, p[:, c]) for c in np.unique(true)]))


@pytest.mark.parametrize("classes", [2, 3])
def test_every_table_says_what_plain_pandas_says(tmp_path: Path, classes: int) -> None:
    study = make_study(tmp_path, classes)
    report = write_report(study, resamples=50)
    long = long_table(classes)
    columns = [f"p{c}" for c in range(classes)]

    oof = read(study, "out_of_fold")
    assert oof[["seed", "case_id"]].apply(tuple, axis=1).is_unique
    merged = oof.merge(long, left_on=["case_id", "seed"], right_on=["case", "seed"])
    assert len(merged) == len(long) == 54
    probabilities = [f"prob_{name}" for name in NAMES[classes]]
    assert np.array_equal(merged[probabilities], merged[columns])
    assert (merged["correct"] == merged["right"]).all()
    assert (merged["fold_x"] == merged["fold_y"]).all()

    cases = read(study, "per_case").set_index("case_id")
    expected = long.groupby("case").agg(
        right=("right", "sum"), of=("right", "size"), mean=("own", "mean"),
        min=("own", "min"), q1=("own", lambda v: v.quantile(0.25)), median=("own", "median"),
        q3=("own", lambda v: v.quantile(0.75)), max=("own", "max"),
    )  # fmt: skip
    for name in expected:
        assert cases[name].to_numpy() == pytest.approx(expected.loc[cases.index, name].to_numpy())
    wrong = expected.index[expected["right"] == 0]
    assert 0 < len(wrong) < 18
    assert set(read(study, "always_wrong")["case_id"]) == set(wrong) == set(report.always_wrong)

    mean = long.groupby("case")[columns].mean()
    true = long.groupby("case")["true"].first()
    ensemble = read(study, "ensemble").set_index("case_id").loc[mean.index]
    assert ensemble[probabilities].to_numpy() == pytest.approx(mean.to_numpy())
    pooled = read(study, "pooled").set_index("seed")
    groups = {str(seed): mine for seed, mine in long.groupby("seed")}
    aucs = {seed: auc_of(g["true"].to_numpy(), g[columns].to_numpy()) for seed, g in groups.items()}
    for seed, mine in groups.items():
        assert pooled.loc[seed, "auc"] == pytest.approx(aucs[seed])
        assert pooled.loc[seed, "accuracy"] == pytest.approx(mine["right"].mean())
        assert pooled.loc[seed, "log_loss"] == pytest.approx(-np.log(mine["own"]).mean())
        assert pooled.loc[seed, "auc_low"] < pooled.loc[seed, "auc"] < pooled.loc[seed, "auc_high"]
    assert pooled.loc["ensemble", "auc"] == pytest.approx(auc_of(true.to_numpy(), mean.to_numpy()))
    numbers = json.loads((study.folder.path / "metrics.json").read_text())
    spread = numbers["pooled_over_seeds"]["auc"]
    assert spread["mean"] == pytest.approx(np.mean([*aucs.values()]))
    assert spread["sd"] == pytest.approx(np.std([*aucs.values()], ddof=1))
    by_training = long.groupby(["fold", "seed"])["right"].mean()
    every = numbers["over_trainings"]["best"]["accuracy"]
    assert (every["mean"], every["sd"], every["n"]) == pytest.approx(
        (by_training.mean(), by_training.std(), 9)
    )

    table = read(study, "study").set_index(["fold", "seed"])
    assert (table["seconds"] == 0.75).all()
    assert table["best_accuracy"].to_dict() == pytest.approx(by_training.to_dict())
    for row in read(study, "per_split").itertuples():
        mine = table.loc[row.fold, f"best_{row.metric}"].astype(float).sort_values(kind="stable")
        assert (row.min, row.median, row.max) == pytest.approx(tuple(mine.iloc[[0, 1, 2]]))
        for value, seed in (
            (row.min, row.min_seed),
            (row.median, row.median_seed),
            (row.max, row.max_seed),
        ):
            assert table.loc[(row.fold, int(seed)), f"best_{row.metric}"] == pytest.approx(value)
    for name in ("roc", "case_probabilities", "metrics_by_fold"):
        assert (study.folder.path / f"{name}.png").stat().st_size > 10_000
    if classes == 3:
        assert set(table.loc[2, "best_recall_c"]) == {"undefined"}


def test_a_fold_of_one_class_is_undefined_and_no_crash(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for seed in SEEDS:
        write_training(study, 1, seed, predictions(1, seed, 2) | {"true_labels": [0] * 6})
    write_report(study, 20)
    table = read(study, "study").set_index("fold")
    assert set(table.loc[1, "best_auc"]) == {"undefined"}
    split = read(study, "per_split").set_index(["fold", "metric"])
    assert split.loc[(1, "auc"), "median"] == "undefined"
    assert split.loc[(1, "auc"), "n"] == 0
    numbers = json.loads((study.folder.path / "metrics.json").read_text())
    assert numbers["over_trainings"]["best"]["auc"]["n"] == 6


def test_failed_and_missing_trainings_have_rows_and_are_left_out(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for fold, seed in study.trainings:
        if seed == 8 or fold == 2:
            clear_training(study.folder, fold, seed)
    record_failure(study.folder, 0, 8, ValueError("first\nsecond"))
    report = write_report(study, 20)
    table = read(study, "study").set_index(["fold", "seed"])
    assert table["status"].value_counts().to_dict() == {"finished": 4, "missing": 4, "failed": 1}
    assert table.loc[(0, 8), "error"] == "ValueError: first"
    assert report.failed == ["fold 0 seed 8: ValueError: first"]
    assert set(report.pooled) == {7, 9}
    assert report.pooled[7].n == 12
    for fold, seed in study.trainings:
        clear_training(study.folder, fold, seed)
    empty = write_report(study, 20)
    assert "0 of 9 trainings finished" in empty.to_text()
    assert not (study.folder.path / "roc.png").exists()


def test_each_fold_keeps_its_own_threshold(tmp_path: Path) -> None:
    thresholds = {0: 0.2, 1: 0.5, 2: 0.7}
    study = make_study(tmp_path, thresholds=thresholds)
    report = write_report(study, 0)
    long = long_table(2)
    called = long["p1"] >= long["fold"].map(thresholds)
    right = (called == long["true"]).groupby(long["seed"]).mean()
    assert {seed: m.accuracy.value for seed, m in report.pooled.items()} == pytest.approx(right.to_dict())
    assert right.to_dict() != pytest.approx(long.groupby("seed")["right"].mean().to_dict())


def test_a_case_of_two_folds_counts_once(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for seed in SEEDS:
        write_training(
            study, 2, seed, predictions(2, seed, 2) | {"case_ids": [str(i) for i in range(1, 7)]}
        )
    report = write_report(study, 20)
    assert {m.n for m in report.pooled.values()} == {12}
    first, third = (predictions(fold, 7, 2)["prediction_probs"][0][0] for fold in (0, 2))
    (mine,) = (each for seed, each in report.results.per_seed().items() if seed == 7)
    assert mine.probabilities[0, 0] == pytest.approx((first + third) / 2)


def test_the_curve_is_the_auc() -> None:
    rng = np.random.default_rng(0)
    positive, score = rng.random(40) < 0.4, rng.integers(0, 9, 40) / 9
    assert np.trapezoid(*roc(positive, score)[::-1]) == pytest.approx(roc_auc_score(positive, score))


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 60, 100])
def test_agreement_is_as_in_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    p, q = rng.integers(0, 6, n) + 0.0, rng.random(n)
    p[0] += 1
    assert agreement.jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-12)
    count = -(-n * 5 // 100)
    best = [set(sorted(range(n), key=lambda i: (-each[i], i))[:count]) for each in (p, q)]
    assert agreement.top_overlap(p, q) == len(best[0] & best[1]) / count
    if n > 2:
        assert agreement.spearman(p, q) == pytest.approx(spearmanr(p, q).statistic)
    else:
        assert n > 1 or math.isnan(agreement.spearman(p, q))
    assert agreement.jensen_shannon(p, p) == 0
    assert agreement.jensen_shannon(np.eye(3)[0], np.eye(3)[1]) == 1


def test_attention_is_aligned_by_patch_for_every_pair_of_seeds(tmp_path: Path) -> None:
    study, rng = make_study(tmp_path), np.random.default_rng(1)
    frames = {}
    for seed in SEEDS:
        frame = pd.DataFrame({"case_id": ["1"] * 30 + ["2"] * 10, "stain": "h&e", "slice_id": "match_1",
                              "patch": [*range(30), *range(10)], "path": "p",
                              "effective_attention": rng.random(40)})  # fmt: skip
        frames[seed] = frame
        folder = study.folder.training(0, seed).path / "attention_analysis"
        folder.mkdir()
        frame.sample(frac=1, random_state=seed).to_csv(folder / "patch_attention.csv", index=False)
    report = write_report(study, 0)
    table = read(study, "attention_agreement").set_index(["case_id", "seed_a", "seed_b"])
    assert len(table) == 6
    for case, (a, b) in ((case, pair) for case in "12" for pair in combinations(SEEDS, 2)):
        p, q = (frames[s].loc[frames[s]["case_id"] == case, "effective_attention"] for s in (a, b))
        row = table.loc[(case, a, b)]
        assert row["jensen_shannon"] == pytest.approx(jensenshannon(p, q, base=2) ** 2)
        assert row["spearman"] == pytest.approx(spearmanr(p, q).statistic)
    assert report.agreement is not None
    assert report.agreement.to_json()["spearman"] == pytest.approx(table["spearman"].mean())


def contender(cases: list[str], labels: list[int], seeds: int, seed: int) -> Contender:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(seeds):
        p = rng.integers(1, 9, len(cases)) / 10
        both = np.stack((1 - p, p), axis=1)
        found.append(CasePredictions(tuple(cases), np.array(labels), both, None, np.ones(len(p), np.int64)))
    return Contender(Path("x"), "made", ("benign", "malignant"), found)


def test_a_comparison_is_a_paired_bootstrap_of_the_shared_cases() -> None:
    cases, labels = [str(i) for i in range(24)], [i % 2 for i in range(24)]
    a = contender(cases[:20], labels[:20], 3, 0)
    b = contender(cases[::-1][:20], labels[::-1][:20], 2, 1)
    found = compare(a, b, resamples=60, seed=5)
    assert (found.cases, found.only) == (16, (4, 4))
    shared = cases[4:20]
    true = np.array(labels[4:20])

    def values(side: Contender, index: np.ndarray) -> tuple[float, float, float]:
        scores = []
        for each in side.seeds:
            p = each.probabilities[[each.case_ids.index(case) for case in shared]][index, 1]
            pair = np.stack((1 - p, p), axis=1)
            right = (pair.argmax(axis=1) == true[index]).mean()
            auc = roc_auc_score(true[index], p) if len(set(true[index])) == 2 else math.nan
            scores.append((auc, right, log_loss(true[index], pair, labels=[0, 1])))
        return tuple(np.mean(scores, axis=0).tolist())  # type: ignore[return-value]

    whole = np.arange(16)
    draws = [np.repeat(whole, w.astype(int)) for w in resample(np.random.default_rng(5), 60, 16)]
    drawn = np.array([np.subtract(values(a, d), values(b, d)) for d in draws])
    rows = {row.metric: row for row in found.rows}
    assert tuple(rows) == COMPARED
    for i, name in enumerate(("auc", "accuracy", "log_loss")):
        row = rows[name]
        assert (row.a, row.b) == pytest.approx((values(a, whole)[i], values(b, whole)[i]))
        assert row.difference.value == pytest.approx(values(a, whole)[i] - values(b, whole)[i])
        interval = np.nanquantile(drawn[:, i], [0.025, 0.975])
        assert (row.difference.low, row.difference.high) == pytest.approx(tuple(interval))


def test_what_cannot_be_compared_is_refused() -> None:
    cases, labels = ["1", "2", "3"], [0, 1, 0]
    a = contender(cases, labels, 1, 0)
    with pytest.raises(RunError, match="1 case has different true labels, such as 2: malignant and benign"):
        compare(a, contender(cases, [0, 0, 0], 1, 1), 10)
    with pytest.raises(RunError, match="no test case in common"):
        compare(a, contender(["7", "8", "9"], labels, 1, 1), 10)
    other = Contender(a.path, a.kind, ("malignant", "benign"), a.seeds)
    with pytest.raises(RunError, match="the classes are benign, malignant and malignant, benign"):
        compare(a, other, 10)


def without(study: Study, *trainings: tuple[int, int]) -> Path:
    """The study's folder, these folds and seeds no longer in it."""
    for fold, seed in trainings:
        shutil.rmtree(study.folder.training(fold, seed).path)
    return study.folder.path


def test_a_study_enters_by_its_complete_seeds(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    without(study, (2, 8))
    whole = read_contender(tmp_path, study.folder.path)
    assert (len(whole.seeds), whole.left_out) == (2, (8,))
    (ensemble,) = read_contender(tmp_path, study.folder.path, ensemble=True).seeds
    long = long_table(2)
    mean = long[long["seed"] != 8].groupby("case")["p1"].mean()
    assert ensemble.probabilities[:, 1] == pytest.approx(mean.loc[list(ensemble.case_ids)].to_numpy())
    assert StudyFolder(study.folder.path).status(2, 8) == "missing"
    assert "without seed 8, which lacks a fold" in compare(whole, whole, 0).to_text()
    one = read_contender(tmp_path, without(study, (0, 9)))
    assert (len(one.seeds), one.left_out) == (1, (8, 9))
    said = compare(one, one, 0).to_text()
    assert "without seeds 8, 9, which lack a fold" in said
    assert "mean of the metrics of 1 seed\n" in said


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize(
    "gone",
    [
        [(0, 7), (1, 8), (2, 9)],  # as many cases in every seed, and different ones
        [(2, 7), (2, 8), (2, 9)],  # the same cases, a fold of none
        [(0, 7), (2, 8), (1, 9), (2, 9)],
    ],
)
def test_without_a_complete_seed_the_missing_trainings_are_named(
    tmp_path: Path, gone: list[tuple[int, int]], ensemble: bool
) -> None:
    path = without(make_study(tmp_path), *gone)
    with pytest.raises(RunError, match="no seed of the study has every fold finished") as caught:
        read_contender(tmp_path, path, ensemble)
    for fold, seed in gone:
        assert f"fold {fold} seed {seed}" in str(caught.value)
    assert f"train-head --resume {path}" in str(caught.value)


def test_seeds_of_different_test_cases_of_one_fold_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    other = predictions(1, 8, 2)
    write_training(study, 1, 8, other | {"case_ids": ["1", *other["case_ids"][1:]]})
    with pytest.raises(RunError, match="fold 1: seeds 7 and 8 have different test cases, such as 1"):
        write_report(study, 0)


def test_trainings_with_a_threshold_and_without_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, thresholds={0: 0.2, 1: 0.5, 2: 0.7})
    write_training(study, 1, 8, predictions(1, 8, 2) | {"threshold": None})
    with pytest.raises(RunError, match="fold 1, seed 8 has no threshold, and others have one"):
        write_report(study, 0)


def test_a_report_on_a_study_with_gaps_says_what_its_numbers_are_of(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    assert "ensemble of the seeds" in write_report(study, 0).to_text()
    without(study, (0, 7))
    report = write_report(study, 0)
    said = report.to_text()
    assert "2 of 3 folds of seed 7, 12 cases" in said
    assert "folds of seed 8 pooled, 18 cases" in said
    assert "mean ± sd of 2 seeds" in said
    assert "seed 7 lacks a fold, and is in no mean over seeds" in said
    assert "ensemble of 2 to 3 seeds, 18 cases" in said
    numbers = report.numbers()
    assert numbers["whole_seeds"] == [8, 9]
    values = [report.pooled[seed].accuracy.value for seed in (8, 9)]
    assert numbers["pooled_over_seeds"]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    pooled = read(study, "pooled").set_index("seed")["trainings"]
    assert pooled.to_dict() == {"7": 2, "8": 3, "9": 3, "ensemble": 8}
    without(study, (1, 8), (2, 9))
    said = write_report(study, 0).to_text()
    assert "seeds 7, 8, 9 lack a fold, and are in no mean over seeds" in said
    assert "mean ± sd of 3 seeds" not in said
    assert "ensemble of 2 seeds, 18 cases" in said


def test_the_tables_of_trainings_that_are_gone_are_removed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for seed in SEEDS:
        path = study.folder.training(0, seed).path / "attention_analysis" / "patch_attention.csv"
        path.parent.mkdir()
        path.write_text("case_id,stain,slice_id,patch,effective_attention\n1,h,m,0,0.5\n1,h,m,1,0.5\n")
    write_report(study, 0)
    ensemble, agreed = (study.folder.path / f"{n}.csv" for n in ("ensemble", "attention_agreement"))
    assert (ensemble.is_file(), agreed.is_file()) == (True, True)
    without(study, (0, 8), (0, 9))
    write_report(study, 0)
    assert (ensemble.is_file(), agreed.is_file()) == (True, False)
    without(study, *(each for each in study.trainings if each not in ((0, 8), (0, 9))))
    write_report(study, 0)
    assert not ensemble.exists()


def test_one_is_no_plural(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    about = {**study.about, "folds": [0], "seeds": [7]}
    one = Study(study.folder, study.config, about)
    assert "1 split × 1 seed: 1 of 1 trainings finished" in write_report(one, 0).to_text()
    record_failure(study.folder, 0, 7, ValueError("x"))
    assert "  1 training failed:" in write_report(one, 0).to_text()
    without(study, (0, 7))
    assert "  1 training is still to do" in write_report(one, 0).to_text()
