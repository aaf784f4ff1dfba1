"""`featstore train-vae`: the run folder, going on, the exported encoder, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import heads.vae
from featstore.backbones.vae import build_encoder
from featstore.settings import Layers
from featstore.store import Store
from featstore.strict_yaml import read_file
from heads.config import Config
from heads.evaluation.runs import RunFolder, read_config
from heads.training.course import TrainingError
from heads.training.vae import Judged, VaeTraining
from heads.vae import TrainedVae, train_vae_project
from tests import helpers
from tests.command_line import answer, featstore, make_project, refused, succeeded
from tests.heads.environments import CLASSES, ENVIRONMENTS, flags, tiny, write_environments

PICTURES = {"train.png", "val.png", "samples.png", "traversal.png"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_environments(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run by the command, in a folder without a project, and what it answered."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(images, folder / "images")
    extra = {"picture_every": 4, "experiment": "first"}
    found = answer(folder, "train-vae", "--data-dir", "images", *flags(**extra))
    return Path(found["run"]), found


def test_a_run_holds_everything_that_is_promised(trained: tuple[Path, dict[str, Any]]) -> None:
    run, found = trained
    assert run.parent.name == "runs"
    assert run.name.startswith("vae_")
    assert run.name.endswith("_first")
    for folder in ("recon_step_4", "recon_step_8", "recon_final"):
        assert {path.name for path in (run / folder).iterdir()} == PICTURES
        for path in (run / folder).iterdir():
            with Image.open(path) as image:
                image.load()
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {n}/8" for n in (2, 4, 6, 8)]
    for name in ("recon_loss", "KLD_loss", "total_loss", "CE", "w", "accuracy"):
        assert all(f"  {name} " in line for line in lines)
    history = pd.read_csv(run / "history.csv")
    assert history["step"].tolist() == [2, 4, 6, 8]
    assert history["val_recon_loss"].notna().tolist() == [False, True, False, True]
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == found["steps"] == 8
    assert results["images"] == {each: dict.fromkeys(CLASSES, 6) for each in ENVIRONMENTS}
    assert results["last"]["terms"]["recon_loss"] == pytest.approx(history["val_recon_loss"].iloc[-1])
    assert results["best"]["metrics"]["n"] == results["val_images"] == 12
    about = json.loads((run / "vae.json").read_text())
    assert about["environments"] == list(ENVIRONMENTS)
    assert (run / "history.png").is_file()
    assert read_config(RunFolder(run)).vae.experiment == "first"


def test_the_encoder_extracts_what_the_training_computes(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = trained
    project = make_project(tmp_path, {"extract": {"dtype": "float32", "runtime": "torch"}}, size=32)
    succeeded(project, "extract", "--backbone", run / "backbone")
    store = Store.open(project / "store")
    assert (store.spec.backbone, store.spec.dim, store.spec.resize) == ("vae:timm:test_resnet", 4, 32)
    encoder = build_encoder("timm:test_resnet", "random:0", 32, tmp_path, 8, 4)
    best = load_file(run / "checkpoints" / "best.safetensors")
    prefix = "encoder."
    encoder.load_state_dict(
        {name.removeprefix(prefix): value for name, value in best.items() if name.startswith(prefix)}
    )
    encoder.eval()
    table = store.table()
    pixels = [np.array(Image.open(project / "patches" / path)) for path in table["path"]]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = encoder(x).numpy()
    for case in store.cases():
        rows = np.flatnonzero(table["case_id"] == case)
        # Batch normalisation is folded for extraction, and sums have another order.
        np.testing.assert_allclose(store.bag(case).features, expected[rows], rtol=1e-3, atol=1e-4)
    assert np.abs(expected - expected.mean(axis=0)).max() > 0.01


def test_the_best_step_is_exported_and_not_the_last(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = VaeTraining.judge

    def told(self: VaeTraining, chosen: np.ndarray) -> Judged:
        found = judge(self, chosen)
        wrong = 1 - np.eye(2)[self.data.images.label[chosen]]
        return Judged(wrong, found.terms) if self.progress.step == 8 else found

    monkeypatch.setattr(VaeTraining, "judge", told)
    done = train_vae_project(Config(vae=tiny(data_dir=str(images))), tmp_path)
    assert done.results is not None
    assert (done.results["best"]["step"], done.results["last"]["step"]) == (4, 8)
    assert done.results["best"]["terms"] != done.results["last"]["terms"]
    best = load_file(done.folder / "checkpoints" / "best.safetensors")
    last = torch.load(done.folder / "checkpoints" / "last.pth", weights_only=True)["model"]
    (exported,) = (done.folder / "backbone").glob("*.safetensors")
    for name, value in load_file(exported).items():
        assert torch.equal(value, best[f"encoder.{name}"])
    assert not torch.equal(best["encoder.mean.weight"], last["encoder.mean.weight"])


def test_interrupted_and_resumed_is_the_same_training(images: Path, tmp_path: Path) -> None:
    config = Config(vae=tiny(data_dir=str(images)))
    whole = train_vae_project(config, tmp_path / "whole")
    assert isinstance(whole, TrainedVae)

    def stop(text: str) -> None:
        if text.startswith("step 4/"):
            signal.raise_signal(signal.SIGTERM)

    first = train_vae_project(config, tmp_path / "parts", observe=stop, name="mine")
    assert isinstance(first, TrainedVae)
    assert first.folder == tmp_path / "parts" / "runs" / "vae_mine"
    assert (first.results, first.steps, first.interrupted) == (None, 4, signal.SIGTERM)
    assert f"featstore train-vae --resume {first.folder}" in first.to_text()
    done = answer(tmp_path / "parts", "train-vae", "--as", "mine", "--vae-lr", "3")
    again = answer(tmp_path / "parts", "train-vae", "--as", "mine")
    assert again == {"run": done["run"], "already_done": True, "interrupted": None}
    refused(tmp_path / "parts", "train-vae", "--leave-one-out", "--as", "mine", says=("another kind",))
    states = [
        torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
        for folder in (whole.folder, Path(done["run"]))
    ]
    assert all(
        torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"]
    )
    logs = [(folder / "log.txt").read_text().splitlines() for folder in (whole.folder, first.folder)]
    assert [[part for part in line.split("  ") if not part.endswith(" s")] for line in logs[0]] == [
        [part for part in line.split("  ") if not part.endswith(" s")] for line in logs[1]
    ]


def test_a_training_that_fails_leaves_its_log(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise TrainingError("the loss is no longer a number", fix="lower the rate")

    monkeypatch.setattr(heads.vae.VaeTraining, "run", fail)
    found = featstore(tmp_path, "train-vae", "--data-dir", images, *flags())
    assert found.exit_code == 1
    assert "no longer a number" in found.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "checkpoints" / "last.pth").is_file()
    assert not (run / "results.json").exists()


def test_a_projects_patches_by_their_domain(tmp_path: Path) -> None:
    project = make_project(
        tmp_path,
        {"labels": {"file": "labels.csv"}, "classes": {"benign": ["1"], "high_grade": ["3"]}},
        cases=[str(n) for n in range(1, 13)],
        patches=2,
        size=16,
    )
    rows = [f"{n},{1 if n % 2 else 3},{'scanner a' if n <= 6 else 'scanner b'}" for n in range(1, 13)]
    (project / "labels.csv").write_text("\n".join(["Case,Class,domain", *rows]) + "\n")
    # Without the split's test cases, which heads are to be tested on.
    succeeded(project, "split")
    with np.load(project / "splits" / "data_splits_01.npz") as split:
        tested = {int(case) for case in split["test_cases"]}
    left = [n for n in range(1, 13) if n not in tested]
    expected = {
        f"scanner {scanner}": {
            name: 2 * sum((n <= 6) == first and n % 2 == odd for n in left)
            for name, odd in (("benign", 1), ("high_grade", 0))
        }
        for scanner, first in (("a", True), ("b", False))
    }
    assert len(left) < 12
    found = answer(project, "train-vae", *flags(steps=2))
    assert found["images"] == expected
    text = succeeded(project, "train-vae", "--leave-one-out", *flags(steps=1)).output
    assert "mean over environments" in text
    helpers.write_labels(project, {str(n): 1 if n % 2 else 3 for n in range(1, 13)})
    refused(project, "train-vae", *flags(), says=("nothing says from which environment", "--data-dir ROOT"))


def test_help_shows_the_settings_of_the_vae(tmp_path: Path) -> None:
    text = succeeded(tmp_path, "train-vae", "--help").output
    for flag in ("--data-dir", "--steps", "--subset-size", "--loss-multiplier-kl", "--kl-anneal-cyclical"):
        assert flag in text


def refuses(folder: Path, *args: object, says: tuple[str, ...]) -> None:
    message = refused(folder, "train-vae", *args, says=("featstore train-vae: ", *says))
    assert "\n  expected: " in message
    assert "\n  where: " in message


def test_folders_that_are_not_environments(images: Path, tmp_path: Path) -> None:
    refuses(tmp_path, *flags(), says=("no folder of images is named", "--data-dir ROOT"))
    refuses(tmp_path, "--data-dir", "none", *flags(), says=("none is not there",))
    environment = images / ENVIRONMENTS[0]
    refuses(tmp_path, "--data-dir", environment, *flags(), says=("ROOT/CLASS/*",))
    refuses(tmp_path, "--data-dir", environment / CLASSES[0], *flags(), says=("images lie in",))
    root = write_environments(tmp_path / "poor")
    shutil.rmtree(root / ENVIRONMENTS[1] / CLASSES[0])
    says = ("environment hospital b has images of 1 class only (high grade)",)
    refuses(tmp_path, "--data-dir", root, *flags(), says=says)
    refuses(tmp_path, "--data-dir", root, "--leave-one-out", *flags(), says=says)


def test_damaged_images_are_told_before_anything_is_written(tmp_path: Path) -> None:
    root = write_environments(tmp_path / "images")
    damaged = sorted((root / ENVIRONMENTS[1] / CLASSES[0]).iterdir())[:2]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    says = ("2 images cannot be used", *(path.name for path in damaged))
    refuses(tmp_path, "--data-dir", root, *flags(), says=says)
    refuses(tmp_path, "--data-dir", root, "--leave-one-out", *flags(), says=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--kl-anneal-start", "70%"), ("starts at 70% and ends at 50%", "vae.kl_anneal_start")),
        (("--kl-anneal-end", "101%"), ("kl_anneal_end is 101%",)),
        (("--kl-anneal-end", "half"), ("vae.kl_anneal_end is 'half'",)),
        (("--kl-anneal-cyclical",), ("kl_anneal_cycle_length is not given",)),
        (("--kl-reduction", "max"), ("vae.kl_reduction is 'max'",)),
        (("--set=vae.encoder=resnet5",), ("unknown backbone 'resnet5'", "where: vae.encoder")),
        (("--set=vae.encoder_weights=no.pth",), ("no.pth", "--encoder-weights PATH")),
        (("--set=vae.amp=fp16",), ("fp16 without a GPU", "--vae-amp bf16")),
        (("--set=vae.device=cuda:7",), ("PyTorch sees no GPU",)),
        (("--seeds", "2"), ("--seeds 2 without --leave-one-out",)),
        (("--subset-size", "1"), ("vae.subset_size is 1",)),
        (("--experiment", "a/b"), ("vae.experiment is 'a/b'",)),
        (("--los-multiplier-kl", "1"), ()),
    ],
)
def test_settings_that_cannot_be(
    images: Path, tmp_path: Path, args: tuple[str, ...], says: tuple[str, ...]
) -> None:
    if "sees no GPU" in str(says) and torch.cuda.is_available():
        pytest.skip("there is one")
    data = ("--data-dir", images, *flags(), *args)
    if says:
        refuses(tmp_path, *data, says=says)
    else:
        assert featstore(tmp_path, "train-vae", *data).exit_code == 2


def test_more_memory_than_there_is(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("heads.vae_setup.ImageBatches", none)
    refuses(tmp_path, "--data-dir", images, *flags(), says=("there is no memory for", "vae.memory_gb"))


def test_images_that_are_decoded_in_every_pass_train_the_same(images: Path, tmp_path: Path) -> None:
    found = [
        train_vae_project(Config(vae=tiny(data_dir=str(images), memory_gb=gb, steps=4)), tmp_path).results
        for gb in (0.0, 1.0)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0]["last"] == found[1]["last"]


@pytest.fixture
def run(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the run, which reads the same images."""
    return Path(shutil.copytree(trained[0], tmp_path / "runs" / "vae_copy"))


@pytest.mark.parametrize("damage", ["cut", "bits", "other", "objects"])
def test_a_corrupt_checkpoint(run: Path, tmp_path: Path, damage: str) -> None:
    last = run / "checkpoints" / "last.pth"
    data = bytearray(last.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "bits":
        data[len(data) // 2] ^= 0xFF
    last.write_bytes(data)
    if damage == "other":
        state = torch.load(last, weights_only=True)
        torch.save({**state, "model": {"a": torch.zeros(1)}}, last)
    elif damage == "objects":
        torch.save({"identity": Path("x")}, last)
    refuses(tmp_path, "--resume", "vae_copy", says=("the checkpoint cannot be read", str(last)))


def test_runs_that_cannot_go_on(run: Path, tmp_path: Path) -> None:
    refuses(tmp_path, "--resume", "none", says=("none is no run of train-vae",))
    refuses(tmp_path, "--resume", run, "--leave-one-out", says=("another kind of training: train",))
    about = json.loads((run / "vae.json").read_text())
    (run / "vae.json").write_text(json.dumps({**about, "digest": "0"}))
    refuses(tmp_path, "--resume", run, says=("no longer those that the run began with",))
    (run / "vae.json").write_text("{")
    refuses(tmp_path, "--resume", run, says=("no run of train-vae",))


def test_a_checkpoint_of_other_settings(run: Path, tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert "latent: 4" in text
    (run / "config.yaml").write_text(text.replace("latent: 4", "latent: 5"))
    refuses(tmp_path, "--resume", run, says=("of another training: latent is 4", "latent 5"))


def test_the_commented_example_holds_the_defaults() -> None:
    layers = Layers()
    path = helpers.ROOT / "configs" / "vae.yaml"
    layers.add(Config, read_file(path), str(path))
    assert layers.build(Config).vae == Config().vae
