"""Flat heads and pools of several heads as typed, on three classes: trained, resumed, evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import heads.evaluation.results
from tests import helpers
from tests.command_line import featstore, refused, succeeded, write_config
from tests.heads.planted import CASES, FLAT, PLAIN, SMALL, SOLVED, make_store

CLASSES = {"benign": ["1"], "low_grade": ["2"], "high_grade": ["3"]}
ATTENTION = "attention_analysis/patch_attention.csv"
# By what is typed after train-head.
TYPED = [("--model", name) for name in (*FLAT, *SOLVED)]
TYPED += [("--attention-pool", kind) for kind in ("multi_head", "transformer")]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty cases of three classes with embeddings; no patches, which training does not need."""
    folder = tmp_path_factory.mktemp("flat")
    train: dict[str, Any] = {"device": "cpu", "lr": 0.003, "patience": None, "scheduler": "none"}
    settings = {"head": SMALL, "train": train, "runs": {"resamples": 20}}
    write_config(folder, {"labels": {"file": "labels.csv"}, "classes": CLASSES}, settings)
    helpers.write_labels(folder, {case: "123"[i % 3] for i, case in enumerate(CASES)})
    make_store(folder / "store")
    return folder


@pytest.fixture
def project(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to train in, without pictures."""
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, name, lambda *args: [])
    return Path(shutil.copytree(cohort, tmp_path / "project"))


def run_of(project: Path, *flags: object) -> Path:
    before = set((project / "runs").glob("*"))
    succeeded(project, "train-head", *flags)
    (run,) = set((project / "runs").glob("*")) - before
    return run


def predictions(run: Path) -> np.ndarray:
    found = json.loads((run / "results.json").read_text())["test"]["prediction_probs"]
    return np.array(found)


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: typed[1])
def test_a_head_is_trained_resumed_and_evaluated_as_typed(
    project: Path, typed: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(project, *typed, "--epochs", 3, "--suffix", "whole")
    assert predictions(whole).shape == (len(predictions(whole)), 3)
    assert np.isfinite(predictions(whole)).all()
    with monkeypatch.context() as patch:
        stopped = [False, False, True]  # looked at before every epoch
        patch.setattr(
            "heads.training.course.is_finished", lambda *args: stopped.pop(0) if stopped else True
        )
        cut = run_of(project, *typed, "--epochs", 3, "--suffix", "cut")
    assert len(pd.read_csv(cut / "history.csv")) < 3
    succeeded(project, "train-head", "--resume", cut)
    assert np.array_equal(predictions(cut), predictions(whole))
    (whole / "predictions.csv").unlink()
    succeeded(project, "evaluate", whole)  # from the checkpoints alone
    assert np.array_equal(predictions(whole), predictions(cut))
    assert (whole / "predictions.csv").read_bytes() == (cut / "predictions.csv").read_bytes()


@pytest.mark.parametrize(
    ("name", "flags", "unread"),
    [
        ("abmil", ("--attention-hidden", 5, "--attention-dropout", 0.2), "--k-sample"),
        ("gated_abmil", ("--attention-hidden", 5, "--embed-dim", 7), "--attention-dim"),
        ("dsmil", ("--attention-dim", 5, "--projector-dropout", 0.2), "--attention-hidden"),
        ("clam_sb", ("--k-sample", 2, "--bag-weight", 0.5, "--subtyping"), "--temperature-start"),
        ("transmil", ("--transmil-heads", 4, "--transmil-attention", "exact"), "--attention-hidden"),
        ("transmil", ("--transmil-landmarks", 3, "--classifier-dropout", 0.2), "--attention-dropout"),
        ("mean", ("--embed-dim", 7, "--classifier-dropout", 0.2), "--attention-hidden"),
        ("max", ("--embed-dim", 7, "--dropout", 0.2), "--bag-weight"),
        ("linear", ("--l1-ratio", 0.9, "--path-end", 0.1), "--embed-dim"),
    ],
)
def test_a_head_reads_its_settings_and_tells_of_others(
    project: Path, name: str, flags: tuple[object, ...], unread: str
) -> None:
    value = {"--bag-weight": 0.4, "--attention-dropout": 0.4}.get(unread, 9)
    said = succeeded(project, "train-head", "--model", name, "--epochs", 1, *flags, unread, value)
    told = [line for line in said.output.splitlines() if "warning" in line]
    assert any(f"head.{unread[2:].replace('-', '_')}" in line for line in told)
    own = [str(flag)[2:].replace("-", "_") for flag in flags if str(flag).startswith("--")]
    assert own
    assert not any(f"head.{each}" in line for each in own for line in told)


def test_linear_tells_that_it_takes_no_steps(project: Path) -> None:
    flags = ("--epochs", 1, "--grad-clip", 0.5)
    said = succeeded(
        project, "train-head", "--model", "linear", *flags
    ).output  # lr 0.003 in featstore.yaml
    told = [line for line in said.splitlines() if "does not read it" in line]
    assert [line.split(" is set")[0].split(": ")[-1] for line in told[-3:]] == [
        "train.grad_clip",
        "train.lr",
        "train.scheduler",
    ]
    other = succeeded(project, "train-head", "--model", "mean", *flags).output
    assert "warning: train." not in other


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: typed[1])
def test_attention_is_written_or_said_not_to_be_there(project: Path, typed: tuple[str, str]) -> None:
    name = typed[1]
    said = succeeded(project, "train-head", *typed, "--epochs", 1, "--analyze-attention")
    (run,) = (project / "runs").iterdir()
    if name in PLAIN + SOLVED:
        assert "no attention table: this head has no attention" in said.output
        assert not (run / ATTENTION).exists()
        return
    table = pd.read_csv(run / ATTENTION, dtype={"case_id": str})
    sums = table.groupby("case_id")["effective_attention"].sum()
    assert sums.to_numpy() == pytest.approx(np.ones(len(sums)), rel=1e-5)
    if typed[0] == "--attention-pool":
        levels = table[[f"{level}_attention" for level in ("patch", "slice", "stain")]].to_numpy()
        assert table["effective_attention"].to_numpy() == pytest.approx(levels.prod(axis=1), rel=1e-5)
    elif name != "dsmil":
        assert np.array_equal(table["effective_attention"], table["patch_attention"])
    else:
        each = table[[f"patch_attention_{c}" for c in CLASSES]].to_numpy()
        assert table["effective_attention"].to_numpy() == pytest.approx(each.mean(axis=1), rel=1e-5)
    if name in ("dsmil", "clam_sb"):
        assert np.isfinite(table[[f"instance_score_{c}" for c in CLASSES]].to_numpy()).all()


@pytest.mark.parametrize("typed", [("--model", "transmil", "--transmil-heads", 4), *TYPED[-2:]])
def test_a_width_that_heads_cannot_share_is_refused_before_there_is_a_run(
    project: Path, typed: tuple[object, ...]
) -> None:
    refused(project, "train-head", *typed, "--embed-dim", 10, says=("head.embed_dim is 10", "embed_dim=12"))
    assert not (project / "runs").exists()


@pytest.mark.parametrize("name", PLAIN + SOLVED)
def test_a_penalty_on_attention_that_there_is_not_is_refused(project: Path, name: str) -> None:
    result = featstore(project, "train-head", "--model", name, "--reg-weight-entropy", 0.1)
    assert result.exit_code == 2
    assert "this head has no attention" in result.stderr
