"""`featstore tune` as typed: a tuning, the same again, its winner as a config, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import answer, refused, succeeded
from tests.tuning.projects import make_project

WORDS = ("tune", "--as", "mine", "--trials", 2, "--inner-folds", 2)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tuning; not to be changed."""
    folder = make_project(tmp_path_factory.mktemp("tuned") / "project")
    said = succeeded(folder, *WORDS).stdout
    assert "[2/2]" in said
    assert "looks" in said.lower()
    return folder


def test_the_same_command_finds_it_finished(project: Path) -> None:
    found = answer(project, *WORDS)
    assert found == answer(project, "tune", "--as", "tune_mine")
    assert [path.name for path in (project / "runs").iterdir()] == ["tune_mine"]
    assert "nothing is done again" in succeeded(project, *WORDS).stdout


def test_settings_that_are_not_used_are_told(project: Path) -> None:
    said = succeeded(project, "tune", "--as", "mine", "--trials", 3).stdout
    assert "given now, and not used: tune.trials" in said


def test_the_winner_is_a_config_that_trains_the_same(project: Path) -> None:
    tuned = answer(project, *WORDS)
    best = project / "runs" / "tune_mine" / "best.yaml"
    again = answer(project, "train-head", "--config", best, "--runs-path", "others")
    (final,) = tuned["final"]
    assert again["best"]["log_loss"]["value"] == final["test"]["log_loss"]["value"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--as", "../x"), ("--as is '../x'", "letters, digits")),
        (("--trials", 0), ("tune.trials",)),
        (("--objective", "accuracy"), ("tune.objective", "val_loss")),
        (("--heads", "[abmil, nothing]"), ("nothing",)),
        (("--set", "tune.space={train.lrr: {low: 1, high: 2}}"), ("train.lrr", "train.lr")),
        (("--set", "tune.space={train.lr: {low: 2, high: 1}}"), ("tune.space.train.lr",)),
        (("--inner-folds", 20), ("--inner-folds",)),
        (("--gpu",), ("train.device",)),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    project: Path, flags: tuple[object, ...], says: tuple[str, ...]
) -> None:
    refused(project, "tune", *flags, says=says)
    assert [path.name for path in (project / "runs").iterdir()] == ["tune_mine"]
