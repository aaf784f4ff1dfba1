"""The benchmarks of accuracy: what they compute of given numbers, and that they run, on next to nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore.bags import BagBatch
from featstore.cohort.splits import Split
from featstore.resident import CaseBags
from featstore.store import Store
from heads.cohort import labelled_cases, load_bags
from heads.models.config import DualStreamConfig
from heads.models.dual_stream import DualStream
from heads.models.standardize import Standardize
from heads.training.data import fit_standardize
from tests.bench import bench_crchisto, bench_musk, bench_stability, crchisto_peers

BAGS, PATCHES, FEATURES, FOLDS = 30, 4, 6, 3
LABELS = {str(case): case % 2 for case in range(12)}
SPLITS = [Split((), (), tuple(map(str, range(start, start + 4)))) for start in (0, 4, 8)]


def write_tables(folder: Path) -> Path:
    """Bags whose label the first patch tells, and the folds of two repetitions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "musk1.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["bag_id", "bag_label", *(f"f{i}" for i in range(FEATURES))])
        for bag in range(BAGS):
            features = rng.normal(size=(PATCHES, FEATURES))
            features[0] += 4 * (bag % 2)
            table.writerows([f"b_{bag}", bag % 2, *map(str, row)] for row in features.round(4))
    with (folder / "folds_5x10_musk1.csv").open("w", newline="") as file:
        folds = csv.writer(file)
        folds.writerow(["bag_id", "rep1", "rep2"])
        folds.writerows([f"b_{bag}", bag // 2 % FOLDS, (bag // 2 + 1) % FOLDS] for bag in range(BAGS))
    return folder


def records(probability: Callable[[int], float]) -> list[dict[str, Any]]:
    """What a method said in the folds of `SPLITS`, by case."""
    return [
        {
            "probabilities": {case: probability(int(case)) for case in split.test},
            "patches": {"attention": {case: int(case) / 12 for case in split.test if LABELS[case]}},
        }
        for split in SPLITS
    ]


@pytest.fixture(scope="module", autouse=True)
def _few_folds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_musk, "FOLDS", FOLDS)
        yield


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("mil"))


@pytest.fixture(scope="module")
def imported(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    work = tmp_path_factory.mktemp("work")
    config, _ = bench_musk.make_project(work, tables)
    store = Store.open(work / "project" / config.store.path)
    cohort = labelled_cases(config, work / "project", store, print)
    return load_bags(bench_crchisto.default_config("mean", 0), store, cohort.labels, print)


def test_what_is_finished_is_not_trained_again_and_a_broken_last_line_is(tmp_path: Path) -> None:
    path, trained = tmp_path / "new" / "trainings.jsonl", list[str]()

    def asked(keys: Sequence[str]) -> list[dict[str, Any]]:
        kept = bench_crchisto.Trainings(path)
        return [kept.get(key, lambda k=key: trained.append(k) or {"of": k}) for key in keys]  # type: ignore[misc, func-returns-value]

    asked("ab")
    path.write_text(path.read_text() + '{"key": "c", "rec')
    assert asked("abc") == [{"of": key} for key in "abc"]
    assert asked("abc") == [{"of": key} for key in "abc"]
    assert trained == ["a", "b", "c"]


def test_the_folds_auc_is_their_mean_and_the_pooled_one_is_over_all_cases() -> None:
    # Right within every fold, but later folds have higher probabilities altogether.
    found = bench_crchisto.Compared(LABELS, SPLITS, 10).measures(
        [records(lambda n: 0.1 * (n // 4) + n % 2 / 20)]
    )
    assert found["folds"][0] == 1
    assert found["pooled"][0] == pytest.approx((18 + 18 - 12) / 36)


def test_patches_count_as_the_mean_over_positive_cases_with_a_value_and_over_seeds() -> None:
    seeds = [records(lambda n: 0.5), records(lambda n: 0.5)]
    seeds[0][0]["patches"]["attention"]["1"] = None
    seeds[1][0]["patches"]["attention"]["1"] = None
    found = bench_crchisto.Compared(LABELS, SPLITS, 10).measures(seeds)
    assert found["attention"][0] == pytest.approx(np.mean([3, 5, 7, 9, 11]) / 12)


def test_a_method_does_not_differ_from_itself_and_does_from_its_opposite() -> None:
    compared = bench_crchisto.Compared(LABELS, SPLITS, 200)
    good, bad = (
        compared.measures([records(p)]) for p in (lambda n: n % 2 * 0.8, lambda n: 1 - n % 2 * 0.8)
    )
    assert bench_crchisto.difference(good["folds"], good["folds"]).value == 0
    assert bench_crchisto.difference(good["folds"], bad["folds"]).value == 1
    assert "*" in bench_crchisto.shown(bench_crchisto.difference(good["log_loss"], bad["log_loss"]))


def test_peers_get_the_features_that_the_heads_standardise(imported: CaseBags) -> None:
    cases = list(imported.outlines)
    standardize = Standardize(FEATURES)
    fit_standardize(standardize, imported, cases[:20])
    bags = [imported.features(case).numpy() for case in cases]
    (theirs,) = crchisto_peers.standardised(bags[:20], bags)
    ours = [standardize(imported.features(case)).numpy() for case in cases]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_a_feature_that_hardly_varies_does_not_outvote_the_others_of_a_peer() -> None:
    bag = np.random.default_rng(0).normal(size=(5000, 3))
    bag[:, 2] = 0
    bag[0, 2] = 1e-3
    ((found,),) = crchisto_peers.standardised([bag], [bag])
    assert np.abs(found[:, 2]).max() < 1


@pytest.mark.parametrize(
    ("truth", "score", "auc"), [([1, 0], [2, 1], 1), ([1, 0], [1, 2], 0), ([1, 1], [1, 2], None)]
)
def test_patches_are_ranked_within_a_case_that_has_both_kinds(
    truth: list[int], score: list[float], auc: float | None
) -> None:
    assert crchisto_peers.patch_auc(np.array(truth), np.array(score, np.float64)) == auc


def test_the_mended_loss_is_that_of_each_patch_alone() -> None:
    scores, y = torch.tensor([[1.0, 9.0], [0.5, 0.0], [-8.0, 3.0]]), torch.tensor([[1], [1], [0]])
    each = [math.log(1 + math.exp(1 + a - b)) for b, a in ((9, 1), (0, 0.5), (-8, 3))]
    assert float(crchisto_peers.SmoothSVM()(scores, y)) == pytest.approx(np.mean(each))


def test_the_given_folds_are_test_then_validation_and_training_is_the_rest(tables: Path) -> None:
    found = bench_musk.given_folds(tables / "folds_5x10_musk1.csv")
    assert {name: len(splits) for name, splits in found.items()} == {"rep1": FOLDS, "rep2": FOLDS}
    first, last = found["rep1"][0], found["rep1"][-1]
    assert first.test[:4] == ("b_0", "b_1", "b_6", "b_7")
    assert first.test == last.val
    assert first.val == found["rep1"][1].test
    assert all(len({*s.train, *s.val, *s.test}) == BAGS for each in found.values() for s in each)


def test_a_bag_counts_by_how_often_it_was_right() -> None:
    repetitions = [records(lambda n: n % 2 * 0.9), records(lambda n: 0.1)]
    often = bench_musk.by_bag(repetitions, LABELS)
    assert often.tolist() == [1, 0.5] * 6
    assert bench_musk.difference(often, often * 0).value == pytest.approx(0.75)


@pytest.mark.parametrize(
    "methods",
    [("gated_abmil",), pytest.param((bench_musk.PEER, "gated_abmil"), marks=pytest.mark.slow)],
)
def test_musk_runs_whole_and_goes_on_from_what_is_finished(
    tables: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    methods: tuple[str, ...],
) -> None:
    monkeypatch.setattr(bench_musk, "EPOCHS", 1)
    path = tmp_path / "trainings.jsonl"

    def run() -> None:
        bench_musk.run(bench_musk.load(tmp_path, tables), bench_crchisto.Trainings(path), methods)

    run()
    kept = path.read_text()
    assert len(kept.splitlines()) == 2 * FOLDS * len(methods)
    first = capsys.readouterr().out
    assert "gated_abmil: 0.86" in first
    run()
    assert path.read_text() == kept
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]


@pytest.mark.parametrize("head", ["dsmil", "clam_sb", "hierarchical_gated"])
def test_a_head_is_kept_with_what_it_says_of_patches(imported: CaseBags, head: str) -> None:
    cases = list(imported.outlines)
    split = Split(tuple(cases[:16]), tuple(cases[16:22]), tuple(cases[22:]))
    truth = {case: np.array([1, 0, 0, 0]) for case in cases}
    config = bench_crchisto.default_config(head, 0, epochs=2)
    found = bench_crchisto.head_fold(config, imported, split, truth)
    positive = {case for case in split.test if imported.outlines[case].label == 1}
    assert list(found["probabilities"]) == list(split.test) == list(found["top1"])
    assert set(found["patches"]["attention"]) == positive
    assert all(0.25 <= value <= 1 for value in found["top1"].values())
    assert [len(curve) for curve in found["curves"].values()] == [2] * 4
    if head != "hierarchical_gated":
        assert set(found["patches"]) == {"attention", "score"}


@pytest.fixture
def batch(imported: CaseBags) -> BagBatch:
    return imported.batch([imported.outlines[case] for case in list(imported.outlines)[:3]])


@pytest.mark.parametrize("kind", [bench_stability.HardSelection, bench_stability.HardThrough])
def test_hard_selection_takes_the_highest_score_and_nothing_else_differs(
    batch: BagBatch, kind: type[DualStream]
) -> None:
    head = DualStream(FEATURES, 2, DualStreamConfig()).eval()
    soft = head(batch, temperature=1e-9)
    head.__class__ = kind
    hard = head(batch, temperature=5.0)
    chosen = hard.attention["selection"].weights.view(3, PATCHES)
    assert torch.equal(chosen.argmax(1), hard.instance_scores.view(3, PATCHES).argmax(1))
    assert chosen.max(1).values.tolist() == pytest.approx([1, 1, 1])
    torch.testing.assert_close(hard.logits, soft.logits)
    torch.testing.assert_close(hard.attention["patch"].weights, soft.attention["patch"].weights)


@pytest.mark.parametrize(
    ("kind", "learns"), [(bench_stability.HardSelection, False), (bench_stability.HardThrough, True)]
)
def test_only_the_soft_gradient_teaches_the_scores(
    batch: BagBatch, kind: type[DualStream], learns: bool
) -> None:
    head = DualStream(FEATURES, 2, DualStreamConfig())
    head.__class__ = kind
    head(batch).logits.square().sum().backward()
    gradient = head.score[0].weight.grad
    assert (gradient is not None and bool(gradient.any())) is learns


def test_fluctuation_is_of_steps_between_epochs() -> None:
    curves = {"train_batch_loss_variance": [1.0] * 5 + [0.5] * 10, "val_auc": [0.5, 1.0, 0.5, 1.0]}
    found = bench_stability.fluctuation({"curves": curves})
    assert found["loss variance"] == pytest.approx(2 / 3)
    assert found["loss variance, last"] == 0.5
    assert found["AUC steps"] == pytest.approx(np.std([0.5, -0.5, 0.5]))
    assert found["largest"] == 0.5


def test_a_ratio_of_means_is_paired_over_trainings() -> None:
    first, second = np.array([2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0])
    found = bench_stability.paired(first, second, bench_stability.ratio)
    assert (found.value, found.low) == (2, None)  # every resample gives the same
    assert bench_stability.paired(first, second[::-1], bench_stability.ratio).low is not None


def test_concentration_counts_cases_in_which_one_patch_has_most() -> None:
    found = bench_stability.concentration([{"top1": {"1": 0.6, "2": 0.5}}, {"top1": {"3": 0.1, "4": 0.9}}])
    assert found == {"top-1 > 0.5": 0.5, "median top-1": pytest.approx(0.55)}
