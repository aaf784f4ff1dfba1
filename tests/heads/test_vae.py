"""The β-VAE and its training: what a step computes, sees and keeps, and that it can go on."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featstore.errors import ConfigError, ImageError
from heads.evaluation.vae_pictures import as_pixels, grid, shown_images
from heads.models.vae import BetaVae, Decoder, VaeOutput
from heads.training.course import TrainingError
from heads.training.environments import read_environments
from heads.training.vae import Method, VaeTraining
from heads.training.vae_data import VaeData
from heads.vae_setup import build_model, pixels_of, split_images
from tests.heads.environments import tiny, write_environments
from tests.heads.in_numpy import linear, softmax, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_environments(tmp_path_factory.mktemp("images"))


def make(root: Path, method: Method = "vae", **more: Any) -> VaeTraining:
    config = tiny(**more)
    images = read_environments(root, None, 0)
    data = VaeData(images, pixels_of(images, config, CPU), *split_images(images, config))
    return VaeTraining(build_model(config, 2, Path()), data, config, CPU, method)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit, times aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))


@pytest.mark.parametrize("size", [32, 45, 64, 112])
def test_the_decoder_gives_images_of_the_inputs_size(size: int) -> None:
    found = Decoder(5, 8, size)(torch.randn(2, 5))
    assert found.shape == (2, 3, size, size)
    image = VaeOutput(found, found, found, found).image
    assert 0 <= float(image.detach().min()) <= float(image.detach().max()) <= 1


def test_decoder_and_classifier_see_mean_plus_deviation_times_noise(root: Path) -> None:
    model = build_model(tiny(), 2, Path()).eval()
    x, noise = torch.rand(3, 3, 32, 32), torch.randn(3, 4)
    with torch.no_grad():
        drawn, plain = model(x, noise), model(x)
    mean, logvar = drawn.mean.double().numpy(), drawn.logvar.double().numpy()
    z = mean + np.sqrt(np.exp(logvar)) * noise.numpy()
    w = weights(model)
    np.testing.assert_allclose(drawn.logits.numpy(), linear(w, "classifier", z), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain.logits.numpy(), linear(w, "classifier", mean), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = model.decoder(torch.from_numpy(z.astype(np.float32)))
        assert torch.equal(model.classify(x), plain.logits)
    np.testing.assert_allclose(drawn.reconstruction.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_reconstruction_and_classification_improve(root: Path, amp: str) -> None:
    training = make(root, steps=40, val_every=20, log_every=10, amp=amp)
    training.run()
    history = training.progress.history
    assert [row["step"] for row in history] == [10, 20, 30, 40]
    assert history[-1]["recon_loss"] < history[0]["recon_loss"] - 0.01
    assert history[-1]["CE"] < history[0]["CE"]
    assert [row["w"] for row in history] == [9 / 20, 19 / 20, 1, 1]  # of the last step, counted from 0
    assert ["val_CE" in row for row in history] == [False, True, False, True]


def test_a_row_holds_the_means_of_its_steps(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, seen = make(root, log_every=4), list[Any]()
    terms = training._terms

    def watch(images: torch.Tensor, labels: torch.Tensor, w: float) -> Any:
        found = terms(images, labels, w)
        seen.append([*found.stacked().tolist(), w])
        return found

    monkeypatch.setattr(training, "_terms", watch)
    training.run()
    config = training.config
    for number, row in enumerate(training.progress.history):
        mine = np.array(seen[4 * number : 4 * number + 4])
        means = mine.mean(axis=0)
        for place, name in enumerate(("recon_loss", "KLD_loss", "CE", "total_loss")):
            assert row[name] == pytest.approx(means[place], rel=1e-5)
        assert row["accuracy"] == pytest.approx(means[4] / config.batch_size)
        total = mine[:, 0] + config.loss_multiplier_kl * mine[:, 5] * mine[:, 1] + 0.1 * mine[:, 2]
        assert row["total_loss"] == pytest.approx(total.mean(), rel=1e-5)
    assert [step[5] for step in seen] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


@pytest.mark.parametrize("method", ["vae", "erm"])
@pytest.mark.parametrize("stopped", [1, 5])
def test_an_interrupted_training_ends_as_one_that_was_not(root: Path, method: Method, stopped: int) -> None:
    whole, first, second = (make(root, method) for _ in range(3))
    whole.run()
    stop: list[int] = []
    first.run(lambda training: stop.extend([15] * (training.progress.step == stopped)), stop)
    assert first.progress.step == stopped
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.load_state(torch.load(file, weights_only=True))
    second.run()
    assert second.finished
    one, other = whole.state(), second.state()
    one["progress"]["history"], other["progress"]["history"] = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in state["progress"]["history"]]
        for state in (one, other)
    )
    assert same(one, other)


def test_batches_are_those_of_the_seed_whatever_the_method(root: Path) -> None:
    def batches(training: VaeTraining, start: int = 0) -> list[torch.Tensor]:
        found = training.data.training_batches(start, training.config, False)
        return [batch.pixels for batch in itertools.islice(found, 4)]

    first, again = batches(make(root)), batches(make(root, "erm"))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first[2:], batches(make(root), 2)))
    assert not all(map(torch.equal, first, batches(make(root, seed=4))))
    assert not all(map(torch.equal, first, batches(make(root, flip=False))))


def test_flips_mirror_whole_images_and_nothing_else(root: Path) -> None:
    config = tiny(batch_size=12)
    data = make(root).data
    unturned = config.model_copy(update={"flip": False})
    plain_batches, batches = (data.training_batches(0, each, False) for each in (unturned, config))
    ways: list[list[tuple[int, ...]]] = []
    for _ in range(2):
        plain, found = next(plain_batches), next(batches)
        assert torch.equal(plain.labels, found.labels)
        ways.append([])
        for before, after in zip(plain.pixels, found.pixels, strict=True):
            all_ways: list[tuple[int, ...]] = [(), (0,), (1,), (0, 1)]
            (way,) = [axes for axes in all_ways if torch.equal(before.flip(axes), after)]
            ways[-1].append(way)
        assert len(set(ways[-1])) == 4
    assert ways[0] != ways[1]


def test_both_methods_begin_with_the_same_weights_and_plain_training_leaves_the_decoder(root: Path) -> None:
    vae, erm = make(root), make(root, "erm")
    before = {name: value.clone() for name, value in erm.model.state_dict().items()}
    assert same(dict(vae.model.state_dict()), before)
    vae.run()
    erm.run()
    for name, value in erm.model.state_dict().items():
        unused = name.startswith(("decoder", "encoder.logvar"))
        assert torch.equal(value, before[name]) == (unused or name.endswith(("shift", "scale"))), name
    assert all(math.isnan(row["recon_loss"]) for row in erm.progress.history)
    assert erm.progress.history[0]["total_loss"] == erm.progress.history[0]["CE"]


def test_plain_training_is_the_means_cross_entropy(root: Path) -> None:
    training = make(root, "erm")
    judged = training.judge(training.data.val)
    model = training.model.eval()
    x = training.data.load(training.data.val).pixels.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        code = model.encoder(x).double().numpy()
    p = softmax(linear(weights(model), "classifier", code).T).T
    np.testing.assert_allclose(judged.probabilities, p, rtol=1e-4)
    labels = training.data.images.label[training.data.val]
    expected = -np.log(p[np.arange(len(labels)), labels]).mean()
    assert judged.terms["CE"] == pytest.approx(expected, rel=1e-4)
    assert judged.terms["accuracy"] == (p.argmax(axis=1) == labels).mean()


def test_the_best_step_is_that_of_the_highest_mean_accuracy_of_environments(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make(root, steps=4, val_every=1)
    val, images = training.data.val, training.data.images
    environment, truth = images.environment[val], images.label[val]
    cross_entropies = iter([0.5, 0.9, 0.7, 0.1])
    # Right of each environment's validation images: all; one environment wrong; all again; none.
    wrong = iter([environment < 0, environment == 1, environment < 0, environment >= 0])
    judge = training.judge

    def told(chosen: np.ndarray) -> Any:
        found = judge(chosen)
        said = np.where(next(wrong), 1 - truth, truth)
        found.terms["CE"] = next(cross_entropies)
        return type(found)(np.eye(2)[said], found.terms)

    monkeypatch.setattr(training, "judge", told)
    kept: list[dict[str, torch.Tensor]] = []
    training.run(lambda t: kept.append({k: v.clone() for k, v in t.model.state_dict().items()}))
    rows = training.progress.history
    assert [row["val_accuracy"] for row in rows] == pytest.approx([1, 2 / 3, 1, 0])
    assert training.progress.best_step == 1  # as accurate as the third, and with the lower cross-entropy
    assert same(training.best, kept[0])


def test_evaluation_changes_nothing(root: Path) -> None:
    training = make(root)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    first, second = training.judge(training.data.val), training.judge(training.data.val)
    assert np.array_equal(first.probabilities, second.probabilities)
    training.reconstruct(training.data.val)
    training.decode(np.zeros((2, 4), np.float32))
    assert same(dict(training.model.state_dict()), before)


def test_a_loss_that_is_no_number_ends_the_training(root: Path) -> None:
    training = make(root)
    with torch.no_grad():
        training.model.encoder.logvar.bias.fill_(2000)
    with pytest.raises(TrainingError, match="no longer a number in the steps up to 2"):
        training.run()
    assert training.progress.history == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_too_little_memory_is_told_with_the_settings(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: BetaVae, x: torch.Tensor, noise: torch.Tensor | None = None) -> VaeOutput:
        raise error

    monkeypatch.setattr(BetaVae, "forward", fail)
    with pytest.raises(TrainingError, match="memory ran out in a step of 6 images of 32 × 32") as caught:
        make(root).run()
    assert "--vae-batch-size 3" in caught.value.fix


def test_other_errors_of_a_step_stay_what_they_are(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make(root)
    training.model.classifier = nn.Linear(5, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        training.run()


def test_an_image_that_is_damaged_on_the_way(tmp_path: Path) -> None:
    root = write_environments(tmp_path, images=3)
    training = make(root, memory_gb=0.0)
    training.data.images.paths[0].write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"image_0\.png"):
        training.run()


def test_fp16_needs_a_gpu(root: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 without a GPU"):
        make(root, amp="fp16")


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_on_a_gpu(root: Path, amp: str) -> None:
    device = torch.device("cuda")
    config = tiny(amp=amp, steps=40, log_every=10, val_every=20)
    images = read_environments(root, None, 0)
    data = VaeData(images, pixels_of(images, config, device), *split_images(images, config))
    training = VaeTraining(build_model(config, 2, Path()), data, config, device)
    training.run()
    history = training.progress.history
    assert history[-1]["recon_loss"] < history[0]["recon_loss"]


def test_too_few_images_for_validation(tmp_path: Path) -> None:
    images = read_environments(write_environments(tmp_path, images=1), None, 0)
    with pytest.raises(ConfigError, match="6 images are too few"):
        split_images(images, tiny())


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_a_grid_holds_every_image(columns: int, rows: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 6, 6, 3), np.uint8)
    captions = ["words" * (row % 2) for row in range(rows)]
    sheet = np.asarray(grid(list(pixels), captions))
    top = 0
    for row, caption in zip(pixels, captions, strict=True):
        top += 18 * bool(caption)
        for column, image in enumerate(row):
            assert np.array_equal(sheet[top : top + 6, 10 * column : 10 * column + 6], image)
        top += 10
    assert sheet.shape[:2] == (top - 4, 10 * columns - 4)


def test_pictures_show_every_environment() -> None:
    environment = np.repeat([0, 1, 2], [50, 5, 40])
    shown = shown_images(np.arange(95), environment)
    assert len(shown) == len(set(shown.tolist())) == 8
    assert set(environment[shown].tolist()) == {0, 1, 2}
    assert len(shown_images(np.arange(3), environment)) == 3


def test_pixels_are_rounded_and_clipped() -> None:
    found = as_pixels(np.array([-0.1, 0, 0.5, 1 / 255, 1, 1.1], np.float32))
    assert found.tolist() == [0, 0, 128, 1, 255, 255]


def test_the_seed_alone_decides_the_weights() -> None:
    def state(**more: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(np.random.default_rng().integers(1000))
        return dict(build_model(tiny(**more), 2, Path()).state_dict())

    assert same(state(), state())
    assert not same(state(), state(seed=4))
