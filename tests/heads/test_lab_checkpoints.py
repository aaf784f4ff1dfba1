"""Checkpoints of a lab's own trainer: probabilities as in plain NumPy, and every other file told."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import heads.evaluation.results
from featstore.cohort.splits import save_split
from featstore.store import Store
from heads.config import HeadConfig
from heads.evaluation.lab_checkpoint import read_lab_checkpoint
from heads.evaluation.runs import RunError, RunFolder, read_config
from heads.models.head import build_head
from tests import helpers
from tests.command_line import answer, refused, succeeded
from tests.heads.bags import nested
from tests.heads.in_numpy import linear, sigmoid, softmax
from tests.heads.planted import CASES, DIM, LABELS, LONE, SPLIT, make_planted_project
from tests.interop.builders import write_vectors
from tests.interop.projects import rows_of
from tests.interop.refusals import Evil

CLASSES = {"benign": ["0"], "malignant": ["1"]}
KINDS = ("gated", "tanh")
EMBED, HIDDEN = 8, 5


class GatedPool(nn.Module):
    """As the lab writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(EMBED, HIDDEN), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(EMBED, HIDDEN), nn.Sigmoid())
        self.attention_w = nn.Linear(HIDDEN, 1)


class TanhPool(nn.Module):
    """As the lab wrote it before."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Linear(EMBED, HIDDEN), nn.Tanh(), nn.Dropout(0.2), nn.Linear(HIDDEN, 1)
        )


class LabModel(nn.Module):
    """The lab's model, its names and nothing else."""

    def __init__(self, kind: str, dim: int = DIM, classes: int = 2) -> None:
        super().__init__()
        pool = GatedPool if kind == "gated" else TanhPool
        self.patch_projector = nn.Sequential(nn.Linear(dim, EMBED), nn.ReLU(), nn.Dropout(0.2))
        self.patch_attention, self.stain_attention, self.case_attention = pool(), pool(), pool()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(EMBED, classes))


def weights_of(kind: str, dim: int = DIM, classes: int = 2) -> dict[str, torch.Tensor]:
    """Large random weights, so that no attention is uniform and no pool can stand for another."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LabModel(kind, dim, classes)
        for value in model.parameters():
            nn.init.normal_(value, std=1.0 if value.ndim == 2 else 0.2)
        last = model.classifier[1].weight.data
        last -= last.mean(dim=1, keepdim=True)  # or every case would be of one class
        return dict(model.state_dict())


def probabilities(state: dict[str, torch.Tensor], stains: list[list[np.ndarray]]) -> np.ndarray:
    """The lab's model on one case, in float64 NumPy: stains of slices of (P, D) patches."""
    w = {name: value.double().numpy() for name, value in state.items()}

    def pool(name: str, members: np.ndarray) -> np.ndarray:
        if f"{name}.attention_w.weight" in w:
            hidden = np.tanh(linear(w, f"{name}.attention_V.0", members))
            hidden = hidden * sigmoid(linear(w, f"{name}.attention_U.0", members))
            scores = linear(w, f"{name}.attention_w", hidden)
        else:
            scores = linear(w, f"{name}.attention.3", np.tanh(linear(w, f"{name}.attention.0", members)))
        pooled: np.ndarray = softmax(scores[:, 0]) @ members
        return pooled

    def patches(x: np.ndarray) -> np.ndarray:
        return pool("patch_attention", np.maximum(linear(w, "patch_projector.0", x), 0))

    of_stains = [pool("stain_attention", np.stack([patches(x) for x in slices])) for slices in stains]
    return softmax(linear(w, "classifier.1", pool("case_attention", np.stack(of_stains))))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, name, lambda *args: [])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty cases with embeddings, labels and a split; some lack a stain, one has a single patch."""
    settings = {"train": {"device": "cpu"}, "runs": {"resamples": 20}}
    labels = {"labels": {"file": "labels.csv"}, "classes": CLASSES}
    return make_planted_project(tmp_path_factory.mktemp("lab"), labels, settings)


@pytest.fixture
def project(cohort: Path, tmp_path: Path) -> Path:
    """A copy to work in, with a checkpoint of gated pools."""
    new = Path(shutil.copytree(cohort, tmp_path / "project"))
    save(new / "lab.pth", weights_of("gated"))
    return new


def save(path: Path, state: object) -> Path:
    """As a trainer saves it, with more beside the weights."""
    beside = {"epoch": 17, "val_loss": 0.3, "optimizer_state_dict": {"state": {}, "param_groups": []}}
    torch.save({"model_state_dict": state, **beside}, path)
    return path


def said_by(run: Path) -> tuple[list[str], np.ndarray]:
    test = json.loads((run / "results.json").read_text())["test"]
    return test["case_ids"], np.array(test["prediction_probs"])


def expected(project: Path, state: dict[str, torch.Tensor], cases: list[str]) -> np.ndarray:
    store = Store.open(project / "store")
    return np.stack([probabilities(state, nested(store.bag(case))) for case in cases])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_probabilities_are_those_of_the_labs_model(project: Path, kind: str, classes: int) -> None:
    state = weights_of(kind, classes=classes)
    save(project / "lab.pth", state)
    names = dict(zip("abc", ([["0"], ["1"]], [["0"], ["1"], ["2"]])[classes - 2], strict=False))
    labels = {case: i % classes for i, case in enumerate(CASES)}
    helpers.write_labels(project, labels)
    flags = ("--classes", json.dumps(names))
    run = Path(answer(project, "import", "lab.pth", *flags)["run"])
    cases, found = said_by(run)
    assert cases == list(CASES)
    wanted = expected(project, state, cases)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp(wanted, axis=0).min() > 0.1  # cases differ: the comparison says something
    store = Store.open(project / "store")
    assert {len(store.bag(case).stain_sizes) for case in cases} == {1, 2, 3}
    assert len(store.bag(LONE)) == 1
    table = pd.read_csv(run / "predictions.csv", dtype={"case_id": str})
    np.testing.assert_allclose(table[[f"prob_{name}" for name in names]], wanted, atol=1e-5)


@pytest.mark.parametrize("form", ["bare", "module.", "model_state_dict", "half", "double", "old format"])
def test_every_form_of_a_file_gives_the_same(project: Path, form: str) -> None:
    state: dict[str, Any] = {name: value.half() for name, value in weights_of("gated").items()}
    wanted = expected(project, state, list(SPLIT.test))
    if form != "half":
        state = {
            name: value.double() if form == "double" else value.float() for name, value in state.items()
        }
    if form == "module.":
        state = {f"module.{name}": nn.Parameter(value) for name, value in state.items()}
    content = state if form == "bare" else {"model_state_dict": state}
    torch.save(content, project / "lab.pth", _use_new_zipfile_serialization=form != "old format")
    run = Path(answer(project, "import", "lab.pth", "--load-splits", "split.npz")["run"])
    cases, found = said_by(run)
    assert cases == list(SPLIT.test)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_run_folder_is_made_that_every_command_takes(project: Path) -> None:
    said = succeeded(project, "import", "lab.pth", "--load-splits", "split.npz", "--suffix", "lab").stdout
    for part in (
        "0 = benign, 1 = malignant: the order of `classes`",
        f"hierarchical, gated pools, {DIM} features → {EMBED}, attention {HIDDEN}, 2 classes",
        "12 train, 4 val, 4 test cases",
        "test: 4 cases",
    ):
        assert part in said
    assert "epoch" not in said
    (run,) = (project / "runs").glob("run_*_lab")
    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert there >= {
        *("config.yaml", "run.json", "data_splits.npz", "predictions.csv", "metrics.json", "results.txt"),
        *("checkpoints/best.safetensors", "checkpoints/last.pth", "results.json"),
    }
    assert "history.csv" not in there
    before = {name: (run / name).read_bytes() for name in ("predictions.csv", "metrics.json")}
    for name in before:
        (run / name).unlink()
    (project / "lab.pth").unlink()  # the run stands for itself
    again = answer(project, "evaluate", run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert again["imported"]["checkpoint"] == str(project / "lab.pth")
    assert "best_epoch" not in again
    assert answer(project, "evaluate", run, "--part", "val")["best"]["n"] == 4
    assert "threshold 0." in succeeded(project, "evaluate", run, "--threshold", "validation").stdout
    assert len(answer(project, "evaluate")["best"]["confusion_matrix"]) == 2  # it is the newest run
    attention = ("evaluate", run, "--analyze-attention")
    succeeded(project, *attention)
    table = pd.read_csv(run / "attention_analysis" / "patch_attention.csv", dtype={"case_id": str})
    sums = table.groupby("case_id")["effective_attention"].sum()
    assert sums.to_numpy() == pytest.approx(np.ones(4))
    same = answer(project, "compare", run, run)
    assert same["cases"] == 4


def test_without_splits_all_labelled_cases_are_test_cases_and_it_is_told(project: Path) -> None:
    said = succeeded(project, "import", "lab.pth").stdout
    assert "warning: no splits are named, and all labelled cases are evaluated" in said
    (run,) = (project / "runs").iterdir()
    assert said_by(run)[0] == list(CASES)
    assert json.loads((run / "results.json").read_text())["train"]["best_val_loss"] is None
    text = succeeded(project, "evaluate", run).stdout
    assert f"test: {len(CASES)} cases" in text
    assert "nan" not in text
    json.loads(succeeded(project, "evaluate", run, "--json").stdout, parse_constant=pytest.fail)
    fitted = (("--threshold", "validation"), ("--calibration", "temperature"))
    for flags in (("--part", "val"), ("--part", "train"), *fitted):
        refused(project, "evaluate", run, *flags, says=("the run has no ", "--load-splits"))
    for flags in fitted:
        refused(project, "import", "lab.pth", *flags, says=("no threshold or calibration",))


def test_what_an_imported_run_is_compared_by_is_said(project: Path) -> None:
    run = answer(project, "import", "lab.pth")["run"]
    said = succeeded(project, "compare", run, run).stdout
    assert "an imported checkpoint on all labelled cases, those it was trained on perhaps among" in said


def test_an_imported_run_cannot_be_resumed(project: Path) -> None:
    run = answer(project, "import", "lab.pth")["run"]
    refused(project, "train-head", "--resume", run, says=("imported checkpoint", "featstore evaluate"))


def test_the_projects_settings_of_training_do_not_matter(project: Path) -> None:
    flags = ("--model", "dual_stream", "--reg-weight-confidence", "0.1", "--standardize", "train")
    plain, other = (answer(project, "import", "lab.pth", *more)["run"] for more in ((), flags))
    assert np.array_equal(said_by(Path(plain))[1], said_by(Path(other))[1])
    config = read_config(RunFolder(Path(other)))
    assert (config.head.name, config.head.attention_pool) == ("hierarchical", "gated")
    assert (config.train.standardize, config.train.reg_weight_confidence) == ("none", 0)


BIAS = "classifier.1.bias"


def put(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    """The state dict with one weight changed; None: without it."""
    return lambda state: {k: v for k, v in {**state, name: value}.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put(BIAS, None), ("it lacks classifier.1.bias",)),
        (put("extra.weight", torch.zeros(2)), ("it has extra.weight",)),
        (put("case_attention.attention_U.0.bias", None), ("it lacks case_attention.attention_U.0.bias",)),
        (put("classifier.1.weight", torch.zeros(2, 9)), ("classifier.1.weight", "(2, 9)", "(2, 8)")),
        (put("patch_projector.0.bias", torch.zeros(9)), ("patch_projector.0.bias", "(9,)", "(8,)")),
        (put("stain_attention.attention_V.0.weight", torch.zeros(6, 8)), ("(6, 8)", "(5, 8)", "one size")),
        (put("classifier.1.weight", torch.zeros(2)), ("no matrices",)),
        (put(BIAS, torch.full((2,), torch.nan)), ("classifier.1.bias is not finite",)),
        (put(BIAS, torch.zeros(2, dtype=torch.int64)), ("int64 tensor",)),
        (put(BIAS, 3.0), ("of the type float",)),
        (put(BIAS, torch.zeros(1).expand(10**9)), ("shape (1000000000,)",)),
        (lambda state: state | {f"module.{k}": v for k, v in state.items()}, ("twice, with and without",)),
        (lambda state: {}, ("an empty state dict",)),
        (lambda state: [1, 2], ("holds a list",)),
        (lambda state: {3: torch.zeros(1)}, ("3",)),
        (lambda state: weights_of("gated", classes=1), ("one output",)),
        (lambda state: weights_of("gated", classes=3), ("3 classes, and the project 2: benign, malig",)),
        (lambda state: weights_of("gated", dim=9), ("takes 9 features, and the store has 12", "--store-")),
        (lambda state: {**weights_of("tanh"), **state}, ("it has case_attention.attention.0.bias",)),
    ],
)  # fmt: skip
def test_other_weights_are_told(project: Path, change: Any, says: tuple[str, ...]) -> None:
    save(project / "lab.pth", change(weights_of("gated")))
    message = refused(project, "import", "lab.pth", says=(*says, "\n  expected: ", "lab.pth"))
    assert "featstore import: " in message


@pytest.mark.parametrize("form", ["new", "old"])
def test_code_in_a_checkpoint_is_not_run(project: Path, tmp_path: Path, form: str) -> None:
    trap = tmp_path / "trap"
    content = {"model_state_dict": weights_of("gated"), "args": Evil(trap)}
    torch.save(content, project / "lab.pth", _use_new_zipfile_serialization=form == "new")
    refused(project, "import", "lab.pth", says=("Python objects, which can run code", "model.state_dict()"))
    assert not trap.exists()


def test_a_checkpoint_that_is_not_there(project: Path) -> None:
    refused(project, "import", "nothing.pth", says=("there is no file", "nothing.pth", "check the path"))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoints_are_told(project: Path, content: bytes) -> None:
    (project / "lab.pth").write_bytes(content)
    refused(project, "import", "lab.pth", says=("the checkpoint", "lab.pth"))


def test_cut_and_flipped_files_are_told_or_give_the_same_weights(project: Path) -> None:
    path, chance = project / "lab.pth", np.random.default_rng(0)
    whole, wanted, told = path.read_bytes(), read_lab_checkpoint(path).weights, 0
    for _ in range(80):
        data = bytearray(whole)
        data[chance.integers(len(data))] ^= 1 << int(chance.integers(8))
        path.write_bytes(data if chance.random() < 0.7 else whole[: chance.integers(len(whole))])
        try:
            found = read_lab_checkpoint(path).weights
        except RunError:
            told += 1
            continue
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert told > 25


def test_a_checkpoint_of_featstore_itself_is_sent_to_evaluate(project: Path) -> None:
    run = Path(answer(project, "import", "lab.pth")["run"])
    refused(project, "import", run / "checkpoints" / "last.pth", says=("featstore itself", "evaluate RUN"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_its_place_in_the_head(tmp_path: Path, kind: str) -> None:
    """The names are those of the head, and no two of the lab's go to one place."""
    found = read_lab_checkpoint(save(tmp_path / "lab.pth", weights_of(kind)))
    own = HeadConfig(attention_pool=found.pool, embed_dim=EMBED, attention_hidden=HIDDEN)
    head = build_head(own, DIM, 2)
    assert {k: v.shape for k, v in found.weights.items()} == {
        k: v.shape for k, v in head.state_dict().items()
    }


PAGE = helpers.ROOT / "docs" / "coming-from-scripts.md"
# Of a test's size: what is typed after the page's own words.
MORE = {"train-head": ["--epochs", "4", "--embed-dim", "8", "--attention-hidden", "6", "--device", "cpu"]}


def typed_on_the_page() -> list[list[str]]:
    """The commands for a lab's folder."""
    section = PAGE.read_text(encoding="utf-8").partition("## A lab's folder, as it is")[2]
    block = section.partition("```bash\n")[2].partition("```")[0]
    return [shlex.split(line)[1:] for line in block.splitlines()]


def test_a_whole_lab_folder_is_imported_trained_on_and_compared(cohort: Path, tmp_path: Path) -> None:
    """Labels, splits, one .pt a patch and a checkpoint, by the commands of the documentation."""
    lab = tmp_path / "lab"
    write_vectors(lab / "vectors", rows_of(cohort))
    helpers.write_labels(lab, {case: (1, 3 + i % 2)[LABELS[case]] for i, case in enumerate(CASES)})
    (lab / "labels.csv").rename(lab / "case_grade_match.csv")
    (lab / "splits").mkdir()
    save_split(lab / "splits" / "data_splits_01.npz", SPLIT)
    state = weights_of("gated")
    save(lab / "best_model.pth", state)
    (tmp_path / "configs").symlink_to(helpers.ROOT / "configs")
    said, made = [], dict[str, Path]()
    for command in typed_on_the_page():
        words = [str(made[word.rpartition("_")[2]]) if "…" in word else word for word in command]
        said.append(succeeded(tmp_path, *words, *MORE.get(command[0], [])).stdout)
        made = {run.name.rpartition("_")[2]: run for run in tmp_path.glob("runs/run_*")}
    assert [line[0] for line in typed_on_the_page()] == ["import", "import", "train-head", "compare"]
    cases, found = said_by(made["lab"])
    assert cases == list(SPLIT.test)
    np.testing.assert_allclose(found, expected(tmp_path, state, cases), atol=1e-5)
    assert "0 = benign, 1 = high_grade" in said[1]
    assert said_by(made["mine"])[0] == cases
    assert "4 cases of both" in said[3]
    before = (made["lab"] / "predictions.csv").read_bytes()
    (made["lab"] / "predictions.csv").unlink()
    assert "test: 4 cases" in succeeded(tmp_path, "evaluate", made["lab"]).stdout
    assert (made["lab"] / "predictions.csv").read_bytes() == before


def test_the_calibration_of_an_imported_checkpoint_is_said_once(project: Path) -> None:
    flags = ("--load-splits", "split.npz", "--calibration", "temperature", "--threshold", "validation")
    said = succeeded(project, "import", "lab.pth", *flags).stdout.splitlines()
    for part in ("test: 4 cases", "temperature ", "threshold "):
        assert len([line for line in said if line.strip().startswith(part)]) == 1, part
