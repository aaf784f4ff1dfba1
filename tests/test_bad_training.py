"""Trainings that cannot be, fail, or are stopped: told, nothing half-made, and nothing lost."""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import heads.evaluation.results
from featstore.errors import ConfigError
from featstore.store import StoreWriter
from heads.config import Config
from tests import helpers
from tests.command_line import as_nobody, featstore, refused, succeeded, write_config
from tests.heads.planted import HEADS, PLAIN, SOLVED
from tests.store.builders import DIM, make_slice, make_spec
from tests.test_train_command import SETTINGS, history, read, train

CASES = [str(number) for number in range(1, 13)]  # odd ones benign


def store(folder: Path, cases: dict[str, dict[str, list[int]]], nan: str = "", **spec: Any) -> None:
    """Embeddings of cases: {case: {stain: patches of its one slice}}; ``nan``: a case with one that is."""
    writer = StoreWriter(folder, make_spec(**spec), {})
    for case, stains in cases.items():
        slices = [make_slice(case, stain, "match_1", patches) for stain, patches in stains.items()]
        for item in slices:
            features = item.columns["features"] / np.float16(100)
            item.columns["features"] = np.resize(features, (len(features), spec.get("dim", DIM)))
        if case == nan:
            slices[-1].columns["features"][1, 2] = np.nan
        writer.commit(case, slices)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve cases with embeddings and labels; no patches, which training does not need."""
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, name, lambda *args: [])
    write_config(tmp_path, SETTINGS)
    helpers.write_labels(tmp_path, {case: "3" if int(case) % 2 == 0 else "1" for case in CASES})
    store(tmp_path / "store", {case: {"h&e": [1, 2, 3], "sox10": [1, 2]} for case in CASES})
    return tmp_path


def splits(project: Path, name: str = "s.npz", **parts: Any) -> Path:
    """A file of splits: 1–6 train, 7–9 val, 10–12 test, but for what is given."""
    whole = {"train": range(1, 7), "val": range(7, 10), "test": range(10, 13), **parts}
    arrays = {f"{part}_cases": np.asarray(cases) for part, cases in whole.items() if cases is not None}
    np.savez(project / name, allow_pickle=True, **arrays)
    return project / name


def refuses(project: Path, *args: object, says: tuple[str, ...]) -> str:
    """train-head ends with code 2, four parts of a message, and no run folder."""
    message = refused(project, "train-head", *args, says=("featstore train-head: ", *says))
    for part in ("\n  expected: ", "\n  where: "):
        assert part in message
    assert not (project / "runs").exists()
    return message


def test_no_store(project: Path) -> None:
    shutil.rmtree(project / "store")
    refuses(project, says=("no embedding store", str(project / "store"), "featstore extract"))


def test_labels_that_are_missing(project: Path) -> None:
    refuses(project, "--labels", "null", says=("no table of labels is named", "labels.file", "--labels"))
    refuses(project, "--labels", "none.csv", says=("cannot be read", "none.csv"))
    (project / "labels.csv").write_text("Case,Class\nA,1\nB,3\n")
    refuses(project, says=("no labelled case has embeddings", "featstore extract", str(project / "store")))


@pytest.mark.parametrize("memory", ["auto", "0"])
@pytest.mark.parametrize("case", ["1", "7", "10"])
def test_an_embedding_that_is_not_a_number(project: Path, case: str, memory: str) -> None:
    shutil.rmtree(project / "store")
    store(project / "store", {name: {"h&e": [1, 2]} for name in CASES}, nan=case)
    splits(project)
    flags = ("--load-splits", "s.npz", "--memory-gb", memory)
    says = ("not finite", f"{case}_h&e_match_1_2", f"case {case},", f"exclude: [{case}]")
    refuses(project, *flags, says=says)


@pytest.mark.parametrize("model", HEADS + SOLVED)
def test_one_patch_alone_and_a_stain_that_lacks(project: Path, model: str) -> None:
    shutil.rmtree(project / "store")
    cases: dict[str, dict[str, list[int]]] = {case: {"h&e": [1, 2], "sox10": [4, 5, 6]} for case in CASES}
    cases |= {"1": {"h&e": [1]}, "2": {"sox10": [9]}, "7": {"h&e": [3]}, "10": {"sox10": [1]}}
    store(project / "store", cases)
    splits(project)
    run = train(project, "--model", model, "--load-splits", "s.npz", "--analyze-attention")
    assert np.isfinite(read(run)["test"]["prediction_probs"]).all()
    if model in PLAIN + SOLVED:  # no attention
        return
    table = pd.read_csv(run / "attention_analysis" / "patch_attention.csv", dtype={"case_id": str})
    assert table.loc[table["case_id"] == "10", "effective_attention"].tolist() == [1.0]


def test_cases_without_embeddings_or_labels_are_named(project: Path) -> None:
    shutil.rmtree(project / "store" / "cases" / "3")
    with (project / "labels.csv").open("a") as file:
        file.write("77,1\n")
    (project / "labels.csv").write_text((project / "labels.csv").read_text().replace("\n4,3\n", "\n"))
    said = succeeded(project, "train-head", "--split-folds", "3").stdout
    assert "2 labelled cases have no embeddings and take no part: 3, 77" in said
    assert "1 cases of the store have no label and take no part: 4" in said


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"val": []}, "val_cases is empty"),
        ({"train": []}, "train_cases is empty"),
        ({"test": [9, 10]}, "1 cases are in two parts, or twice: 9"),
        ({"test": [10, 99]}, "1 cases are not in the cohort: 99"),
        ({"test": None}, "lack test_cases"),
        ({"test": [10.5, 11.0]}, "test_cases holds float64"),
        ({"test": [[10, 11]]}, "shape (1, 2)"),
        ({"train": [1, 3, 5]}, "all 3 training cases are of class benign"),
        ({"train": np.array([1, 2, 3], object)}, "holds Python objects, which can run code"),
    ],
)
def test_files_of_splits_of_no_use(project: Path, parts: dict[str, Any], says: str) -> None:
    file = splits(project, **parts)
    message = refused(project, "train-head", "--load-splits", file, says=(says,), to_do=False)
    assert "all 3 training" in says or str(file) in message
    assert not (project / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"train_cases\n1\n", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_splits(project: Path, content: bytes) -> None:
    (project / "s.npz").write_bytes(content)
    refuses(project, "--load-splits", "s.npz", says=("splits cannot be read", str(project / "s.npz")))


def test_a_group_that_is_parted(project: Path) -> None:
    splits(project)
    flags = ("--load-splits", "s.npz", "--groups", "{twins: [1, 12]}")
    refuses(project, *flags, says=("1 groups are parted: twins", "s.npz", "featstore split"))


def test_more_folds_than_cases_of_a_class(project: Path) -> None:
    refuses(project, "--split-folds", "7", says=("class benign has 6 cases", "7 folds", "fewer folds"))
    helpers.make_cohort(project / "patches", CASES, stains=("h&e",), slices=1, patches=1)
    refused(project, "split", "--folds", "7", says=("class benign has 6 cases", "7 folds"))
    assert not (project / "splits").exists()


def test_folds_that_are_not_there(project: Path) -> None:
    refuses(project, "--fold", "1", says=("train.fold is 1", "featstore split --folds 5"))
    refuses(project, "--fold", "3", "--split-folds", "3", says=("train.fold is 3", "3 folds"))
    refuses(project, "--fold", "-1", says=("train.fold is -1", "greater than or equal to 0"))
    splits(project)
    refuses(project, "--fold", "0", "--load-splits", "s.npz", says=("single file", "leave out --fold"))
    (project / "splits").mkdir()
    refuses(project, "--load-splits", "splits", says=("no data_splits_01.npz", "featstore split"))
    refuses(project, "--load-splits", "none", says=("no file or folder", str(project / "none")))
    splits(project, "splits/data_splits_01.npz")
    refuses(project, "--fold", "1", says=("no data_splits_02.npz", "data_splits_01.npz", "from 0"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model", "dual_stram"), ("no head 'dual_stram'", "write dual_stream")),
        (("--loss", "cross_entropi"), ("no loss 'cross_entropi'", "cross_entropy")),
        (("--class-weights", "{benign: 1, other: 2}", "--use-class-weights"), ("other", "high_grade")),
        (("--class-weights", "[1, 2, 3]", "--use-class-weights"), ("[1.0, 2.0, 3.0]", "high_grade")),
        (("--class-weights", "[1, -2]"), ("train.class_weights", "greater than or equal to 0")),
        (
            ("--reg-weight-entropy", "{slice: 1}", "--model", "dual_stream"),
            ("level 'slice'", "one of patch"),
        ),
        (("--reg-weight-l2", "{slide: 1}"), ("'slide'", "'slice'")),
        (("--reg-weight-confidence", "0.1"), ("no instance scores", "reg_weight_confidence=0")),
        (("--set", "train.sub_cases={n: 2, classes: [bening]}"), ("'bening'", "benign, high_grade")),
        (("--amp", "fp16"), ("fp16 without a GPU", "--amp bf16")),
        (("--plugin", "none.py"), ("plugin", "none.py")),
        (("--lr", "0"), ("train.lr", "greater than 0")),
        (("--suffix", "../x"), ("runs.suffix", "../x")),
    ],
)
def test_settings_that_do_not_suit(project: Path, flags: tuple[str, ...], says: tuple[str, ...]) -> None:
    refuses(project, *flags, says=says)


def test_one_class_alone_in_the_test(project: Path) -> None:
    splits(project, test=[9, 11], val=[7, 8])
    run = train(project, "--load-splits", "s.npz")
    for part in ("test", "test_last"):
        assert read(run, "metrics.json")[part]["auc"]["value"] == "undefined"
        assert "high_grade" in read(run, "metrics.json")[part]["auc"]["reason"]
    assert read(run)["test"]["test_auc"] is None
    assert "undefined" in (run / "results.txt").read_text()
    assert "undefined" in succeeded(project, "evaluate").stdout


@pytest.mark.parametrize("kind", ["one class in validation", "three classes"])
def test_a_threshold_that_cannot_be_chosen_is_told_before_training(project: Path, kind: str) -> None:
    splits(project, val=[7, 9])
    flags: tuple[str, ...] = ("--load-splits", "s.npz", "--threshold", "validation")
    if kind == "three classes":
        splits(project)
        helpers.write_labels(project, {case: "123"[int(case) % 3] for case in CASES})
        flags += ("--classes", "{a: ['1'], b: ['2'], c: ['3']}")
    refused(project, "train-head", *flags, says=("threshold",))
    assert not (project / "runs").exists()


def test_a_loss_that_is_no_number_ends_with_1_and_keeps_the_history(project: Path) -> None:
    flags = ("--lr", "1e30", "--batch-size", "100", "--standardize", "none")
    result = featstore(project, "train-head", *flags, "--epochs", "9")
    assert result.exit_code == 1
    for part in ("no longer a number in epoch", "lr 1e+30", "  to do: lower train.lr"):
        assert part in result.stderr
    (run,) = (project / "runs").iterdir()
    assert history(run)["epoch"].tolist() == [1]
    assert not (run / "results.json").exists()
    refused(project, "evaluate", says=("no finished run", "1 unfinished"))


def test_a_validation_loss_that_is_no_number_is_a_failed_training_too(project: Path) -> None:
    result = featstore(project, "train-head", "--lr", "1e30", "--batch-size", "100", "--epochs", "1")
    assert (result.exit_code, "no longer a number" in result.stderr) == (1, True), result.stderr


def test_runs_that_cannot_be_resumed(project: Path) -> None:
    refuses(project, "--resume", "runs/run_1", says=("runs/run_1 is no run", str(project / "runs")))
    run = train(project)
    (run / "checkpoints" / "last.pth").write_bytes(b"")
    for words in (("train-head", "--resume", run), ("evaluate", run)):
        refused(project, *words, says=("the checkpoint cannot be read", "last.pth"))


def test_a_finished_run_that_is_resumed_stays_as_it_is(project: Path) -> None:
    run = train(project, "--epochs", 2)
    before = read(run)
    said = succeeded(project, "train-head", "--resume", run, "--lr", "0.5").stdout
    assert "train.lr" in said
    assert read(run) == before


@pytest.mark.parametrize("words", [("train-head", "--resume"), ("evaluate",)])
def test_a_store_of_another_backbone(project: Path, words: tuple[str, ...]) -> None:
    run = train(project)
    shutil.rmtree(project / "store")
    cases = {case: {"h&e": [1, 2, 3], "sox10": [1, 2]} for case in CASES}
    store(project / "store", cases, dim=DIM + 2)
    refused(project, *words, run, says=(str(DIM), str(DIM + 2), str(project / "store")))
    shutil.rmtree(project / "store")
    del cases["10"]
    store(project / "store", cases)
    refused(project, *words, run, says=("'10'", str(project / "store")))


def test_runs_that_may_not_be_written(project: Path) -> None:
    (project / "runs").mkdir(mode=0o555)
    for folder in (project, *(parent for parent in project.parents if "pytest" in str(parent))):
        folder.chmod(folder.stat().st_mode | 0o055)
    codecs.lookup("utf-8-sig")  # is loaded when first asked for, and Python may be closed to other users
    with as_nobody(project):
        message = refused(project, "train-head", says=("ermission denied", str(project / "runs")))
    assert "permissions" in message
    assert not list((project / "runs").iterdir())


@pytest.mark.parametrize(
    ("words", "section", "key", "value"),
    [
        (("train-head", "--seed", "3"), "train", "seed", 3),
        (("train-head", "--batch-size", "2"), "train", "batch_size", 2),
        (("train-head", "--device", "cuda:1"), "train", "device", "cuda:1"),
        (("train-head", "--split-seed", "9"), "split", "seed", 9),
        (("train-head", "--path", "elsewhere"), "runs", "path", "elsewhere"),
        (("extract", "--batch-size", "8"), "extract", "batch_size", 8),
        (("extract", "--device", "cuda:1"), "extract", "device", "cuda:1"),
        (("extract", "--train-seed", "4"), "train", "seed", 4),
        (("split", "--seed", "7"), "split", "seed", 7),
        (("split", "--train_seed", "4"), "train", "seed", 4),
    ],
)
def test_a_flag_means_the_section_that_the_command_is_about(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    section: str,
    key: str,
    value: object,
) -> None:
    def seen(config: Config, *args: object) -> None:
        got.append(config)
        raise ConfigError("seen")

    got: list[Config] = []
    monkeypatch.setattr("heads.study.train_project", seen)
    monkeypatch.setattr("featstore.project.extract_project", seen)
    monkeypatch.setattr("featstore.project.split_project", seen)
    refused(project, *words, says=("seen",), to_do=False)
    others = {"train", "extract", "split", "runs"} - {section}
    assert getattr(getattr(got[0], section), key) == value
    before = Config.model_validate({**json.loads((project / "featstore.yaml").read_text())})
    assert all(getattr(got[0], name) == getattr(before, name) for name in others)
