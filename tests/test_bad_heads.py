"""Odd cohorts and bad input for every head: a result with finite probabilities, or a clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import heads.evaluation.results
from featstore.cohort.splits import Split, save_split
from featstore.store import StoreWriter
from heads.config import HeadConfig
from heads.evaluation.checkpoints import load_weights
from heads.evaluation.runs import RunError
from heads.models.head import build_head
from tests import helpers
from tests.command_line import answer, featstore, refused, write_config
from tests.heads.planted import DIM, SMALL, planted_slice
from tests.store.builders import make_spec

Settings = dict[str, str]
CASES = tuple(str(number) for number in range(1, 19))
SPLIT = Split(CASES[:10], CASES[10:14], CASES[14:])
TWO = {case: i % 2 for i, case in enumerate(CASES)}
# Every head with every one of its kinds, by the settings that make it.
KINDS: dict[str, Settings] = {
    **{
        f"hierarchical {kind}": {"name": "hierarchical", "attention_pool": kind}
        for kind in ("tanh", "gated", "multi_head", "transformer")
    },
    **{
        f"dual_stream {kind}": {"name": "dual_stream", "attention_type": kind}
        for kind in ("gated", "cosine", "dsmil", "abmil")
    },
    **{
        f"dual_stream {kind}": {"name": "dual_stream", "fusion_method": kind}
        for kind in ("weighted", "cross_attn")
    },
    **{f"transmil {k}": {"name": "transmil", "transmil_attention": k} for k in ("nystrom", "exact")},
    **{n: {"name": n} for n in ("abmil", "gated_abmil", "dsmil", "clam_sb", "mean", "max", "linear")},
}
STEPPED = tuple(kind for kind in KINDS if kind != "linear")
SILENT = ("mean", "max", "linear")  # without attention
SCORING = tuple(kind for kind in KINDS if kind.startswith("dual_stream") or kind in ("dsmil", "clam_sb"))
FEW = ("linear",)  # of each test where all heads are slow


def all_heads(kinds: Any = KINDS, few: tuple[str, ...] = FEW) -> pytest.MarkDecorator:
    """A test for every head; most of them slow."""
    marked = [pytest.param(kind, marks=() if kind in few else pytest.mark.slow) for kind in kinds]
    return pytest.mark.parametrize("kind", marked)


def typed(kind: str) -> list[str]:
    flags = {"name": "--model"}
    return [word for name, value in KINDS[kind].items() for word in (flags.get(name, f"--{name}"), value)]


def normal(x: np.ndarray, case: str) -> np.ndarray:
    return x


def make_project(
    folder: Path,
    labels: Mapping[str, int] = TWO,
    change: Callable[[np.ndarray, str], np.ndarray] = normal,
    patches: tuple[int, int] = (3, 7),
    stains: tuple[str, ...] = ("h&e", "sox10"),
    split: Split = SPLIT,
    dtype: str = "float16",
    dim: int = DIM,
) -> Path:
    """Cases of one slice a stain; ``change`` is applied to the features of every case."""
    folder.mkdir(exist_ok=True)
    classes = {f"class {label}": [str(label)] for label in sorted(set(labels.values()))}
    train = {"device": "cpu", "epochs": 3, "load_splits": "split.npz"}
    settings = {"head": SMALL, "train": train, "runs": {"resamples": 0}}
    write_config(folder, {"labels": {"file": "labels.csv"}, "classes": classes}, settings)
    helpers.write_labels(folder, labels)
    writer, rng = (
        StoreWriter(folder / "store", make_spec(dim=dim, stored_dtype=dtype), {}),
        np.random.default_rng(0),
    )
    for case in CASES:
        slices = []
        for stain in stains:
            x = change(rng.normal(size=(int(rng.integers(*patches)), dim)), case)
            if len(x):
                slices.append(planted_slice(case, stain, "match_1", x.astype(dtype)))
        writer.commit(case, slices)
    save_split(folder / "split.npz", split)
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, name, lambda *args: [])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort with nothing odd in it; trainings in it differ by their flags."""
    return make_project(tmp_path_factory.mktemp("plain"))


def trained(project: Path, kind: str, *flags: object) -> Path:
    """A training that must end well: a finite probability of every class for every test case."""
    run = Path(answer(project, "train-head", *typed(kind), *flags)["run"])
    results = json.loads((run / "results.json").read_text())
    for part in ("test", "test_last"):
        found = np.array(results[part]["prediction_probs"])
        assert found.shape == (results[part]["num_samples"], len(results[part]["class_names"]))
        assert np.isfinite(found).all()
        assert found.sum(axis=1) == pytest.approx(np.ones(len(found)))
    assert np.isfinite(pd.read_csv(run / "history.csv")["val_cross_entropy"]).all()
    return run


def refusal(project: Path, kind: str, *flags: object, says: tuple[str, ...]) -> None:
    """A training that must be refused before there is a run."""
    refused(project, "train-head", *typed(kind), *flags, says=("featstore train-head: ", *says))


def odd(x: np.ndarray, case: str) -> np.ndarray:
    """Cases of one patch, of one stain; columns that do not vary; numbers as large as float16 has."""
    x[:, :3] = 2.0
    x[:, 3] = 65504.0 * np.sign(x[:, 3])
    if case in ("1", "11", "15"):
        return x[:1]
    lacks = case in ("2", "12") and x[0, 4] > 0
    return x[:0] if lacks else x


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_takes_an_odd_cohort(tmp_path: Path, kind: str) -> None:
    """Five classes, one test case, a batch larger than the cohort, and what `odd` says."""
    labels = {case: i % 5 for i, case in enumerate(CASES)}
    split = Split(SPLIT.train, SPLIT.val, ("15",))
    project = make_project(tmp_path / "p", labels, odd, split=split)
    run = trained(project, kind, "--batch-size", 1000, "--analyze-attention", "--epochs", 2)
    assert (run / "attention_analysis" / "patch_attention.csv").is_file() is (kind not in SILENT)


def one_patch(x: np.ndarray, case: str) -> np.ndarray:
    return x[:1]


def constant(x: np.ndarray, case: str) -> np.ndarray:
    return np.full_like(x, 2.0)


def largest(x: np.ndarray, case: str) -> np.ndarray:
    """As large as float16 goes: a sum or a square of two overflows there."""
    return np.sign(x) * 65504.0


def astronomic(x: np.ndarray, case: str) -> np.ndarray:
    """Squares of these overflow in float32."""
    return x * 1e30


def of_one_class(part: tuple[str, ...]) -> dict[str, int]:
    return TWO | dict.fromkeys(part, 1)


ABSENT = TWO | dict.fromkeys((*SPLIT.val[:2], *SPLIT.test[:2]), 2)  # class 2 has no training case
ODD: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "one patch a case": ({"change": one_patch, "stains": ("h&e",)}, ()),
    "one slice a case": ({"stains": ("sox10",)}, ()),
    "nothing varies": ({"change": constant}, ()),
    "nothing varies, one patch": (
        {"change": constant, "patches": (1, 2)},
        ("--calibration", "temperature"),
    ),
    "largest float16": ({"change": largest}, ()),
    "largest float16 as it is": ({"change": largest}, ("--standardize", "none")),
    "largest float16 in bf16": ({"change": largest}, ("--standardize", "none", "--amp", "bf16")),
    "1e30 in float32": ({"change": astronomic, "dtype": "float32"}, ()),
    "one class in validation": ({"labels": of_one_class(SPLIT.val)}, ("--calibration", "temperature")),
    "one class in the test": ({"labels": of_one_class(SPLIT.test)}, ()),
    "three classes": ({"labels": {case: i % 3 for i, case in enumerate(CASES)}}, ()),
    "a class without training cases": ({"labels": ABSENT}, ()),
    "one validation case": ({"split": Split(SPLIT.train, SPLIT.val[:1], SPLIT.test)}, ()),
    "two training cases": ({"split": Split(SPLIT.train[:2], SPLIT.val, SPLIT.test)}, ()),
    "one patch of each bag": ({}, ("--bag-size", 1, "--sampling", "random", "--per-slice-cap", 1)),
    "one of three classes that does not count": (
        {"labels": {case: i % 3 for i, case in enumerate(CASES)}},
        ("--use-class-weights", "--class-weights", "[0, 1, 2]"),
    ),
    "threshold and calibration": ({}, ("--threshold", "validation", "--calibration", "temperature")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("situation", ODD)
def test_every_head_in_every_odd_situation(tmp_path: Path, situation: str, kind: str) -> None:
    cohort, flags = ODD[situation]
    trained(make_project(tmp_path / "p", **cohort), kind, *flags)


@all_heads()
def test_training_cases_of_one_class_are_refused(tmp_path: Path, kind: str) -> None:
    project = make_project(tmp_path / "p", of_one_class(SPLIT.train))
    refusal(project, kind, says=("all 10 training cases are of class class 1",))


@all_heads()
def test_balancing_a_class_without_training_cases_is_refused(tmp_path: Path, kind: str) -> None:
    project = make_project(tmp_path / "p", ABSENT)
    refusal(project, kind, "--use-class-weights", says=("no training case is of class",))


@all_heads()
def test_weights_that_leave_one_class_are_refused(plain: Path, kind: str) -> None:
    flags = ("--use-class-weights", "--class-weights")
    refusal(plain, kind, *flags, "[0, 1]", says=("class 1 alone counts in training", "above 0 for two"))
    refusal(plain, kind, *flags, "{class 0: 0, class 1: 0}", says=("no class counts",))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@all_heads()
def test_features_that_are_no_numbers_are_refused_with_case_and_file(
    tmp_path: Path, kind: str, value: float
) -> None:
    def bad(x: np.ndarray, case: str) -> np.ndarray:
        x[-1, 2] = value if case == "16" else x[-1, 2]
        return x

    project = make_project(tmp_path / "p", change=bad)
    refusal(project, kind, says=("of 16_h&e_match_1_", "not finite", "case 16, h&e", "exclude: [16]"))


@all_heads(few=("linear", "hierarchical gated"))
def test_a_penalty_on_what_a_head_lacks_is_refused(plain: Path, kind: str) -> None:
    for name in ("reg-weight-entropy", "reg-weight-l1", "reg-weight-l2"):
        if kind in SILENT:
            refusal(plain, kind, f"--{name}", 0.1, says=("this head has no attention",))
        else:
            trained(plain, kind, f"--{name}", 0.1, "--epochs", 1)
    if kind in SCORING:
        trained(plain, kind, "--reg-weight-confidence", 0.1, "--epochs", 1)
    else:
        refusal(plain, kind, "--reg-weight-confidence", 0.1, says=("this head has no instance scores",))


@all_heads(STEPPED, few=("dual_stream gated",))
def test_a_training_that_diverges_says_so(plain: Path, kind: str) -> None:
    done = featstore(plain, "train-head", *typed(kind), "--lr", "1e30", "--suffix", "diverges")
    assert done.exit_code == 1
    assert "the loss is no longer a number in epoch 1" in done.stderr
    assert "\n  to do: lower train.lr" in done.stderr


_LATE = """
import torch
from heads.training.losses import register_loss

@register_loss("late")
def late(logits, labels, smoothing):
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    third = torch.initial_seed() == 42 * 1_000_003 + 2 and logits.requires_grad
    return loss * float("nan") if third else loss
"""


@all_heads(STEPPED, few=("clam_sb",))
def test_what_was_good_stays_when_a_later_epoch_diverges(plain: Path, kind: str) -> None:
    (plain / "late.py").write_text(_LATE)
    flags = ("--plugin", "late.py", "--loss", "late", "--epochs", 5)
    before = set((plain / "runs").glob("*"))
    done = featstore(plain, "train-head", *typed(kind), *flags)
    assert done.exit_code == 1
    assert "no longer a number in epoch 3" in done.stderr
    (run,) = set((plain / "runs").glob("*")) - before
    assert not (run / "results.json").exists()
    state = torch.load(run / "checkpoints" / "last.pth", weights_only=True)
    assert state["progress"]["epoch"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in state["head"].values())
    found = answer(plain, "evaluate", run)
    assert found["epochs"] == 2
    assert np.isfinite(found["best"]["loss"])


@all_heads(few=tuple(KINDS))
def test_weights_of_another_width_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    config = HeadConfig(**{**SMALL, **KINDS[kind]})
    other = build_head(config, DIM + 1, 2).state_dict()
    with pytest.raises(RunError, match=rf"has shape .*{DIM + 1}") as error:
        load_weights(build_head(config, DIM, 2), other, tmp_path / "best.safetensors")
    assert str(DIM) in error.value.expected
    with pytest.raises(RunError, match=r"the checkpoint's .* has shape"):
        load_weights(build_head(config, DIM, 2), build_head(config, DIM, 3).state_dict(), tmp_path)


@all_heads()
def test_a_store_of_another_width_is_refused(plain: Path, tmp_path: Path, kind: str) -> None:
    project = Path(shutil.copytree(plain, tmp_path / "p", ignore=shutil.ignore_patterns("runs")))
    run = trained(project, kind, "--epochs", 1)
    shutil.rmtree(project / "store")
    make_project(project, dim=DIM + 1)
    for words in (("evaluate", run), ("train-head", "--resume", run)):
        refused(project, *words, says=(f"the store has {DIM + 1} features", "featstore "))
