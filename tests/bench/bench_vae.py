"""The β-VAE on real images of two cameras, and its steps a second.

    python tests/bench/bench_vae.py --data FUNDUS_FOLDER --work WORK --kl 1e-5 1e-4 1e-3
    python tests/bench/bench_vae.py --data FUNDUS_FOLDER --work WORK --leave-one-out --seeds 3
    python tests/bench/bench_vae.py --steps-per-second --device cuda --json steps.json

- The images: fundus photographs with a `labels.csv` (`file,dr_grade`). Two classes: `no_or_mild` (grades
  0 and 1) and `referable` (2 to 4). Half of each class, drawn with a fixed seed, is `camera_a` as it is;
  the other half, `camera_b`, is seen through a made-up second camera (`shifted`): colour gains of 0.85, 1,
  1.2 (R, G, B), a gamma of 1.2, a vignette that takes 30 % of the light from the corners, a blur of 1 px.
- `--kl`: a training for each weight of the KL term, all else equal; of the validation images, at the
  last step, by the means of their codes: the terms of the loss; how many latents are in use (variance of
  the mean above 0.01; Burda et al. 2016, arXiv 1509.00519); how far the reconstructions differ from one
  another, as a share of how far the inputs do (0: all are one image); sharpness, the mean gradient of the
  reconstructions as a share of the inputs'. `floor` is the least possible reconstruction loss, that of the
  images themselves; `mean_image` that of the training images' mean.
- `--leave-one-out`: as `featstore train-vae --leave-one-out`. Two environments of which one is made: this
  says that the machinery works and what it costs, not what β-VAEs are worth.
- `--steps-per-second` needs no data: noise of the asked size, decoded from PNG as always (`pipeline`), and
  one batch that is on the device already (`bare`).

Every other setting is a flag that is handed on: `--set steps=2000 --set encoder=timm:resnet18`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.strict_yaml import parse
from heads.config import Config
from heads.evaluation.vae_pictures import plot_vae_history, write_pictures
from heads.leave_one_out import leave_one_out_project
from heads.training.environments import check_environments, read_environments
from heads.training.vae import VaeTraining
from heads.training.vae_config import VaeConfig
from heads.training.vae_data import VaeData
from heads.vae_setup import build_model, choose_device, pixels_of, split_images
from heads.vae_states import line, write_log

SPLIT_SEED = 0
GAINS, GAMMA, VIGNETTE, BLUR = (0.85, 1.0, 1.2), 1.2, 0.3, 1.0
ACTIVE = 0.01  # least variance of a latent in use
WARM = 5  # steps before the clock starts


def shifted(image: Image.Image) -> Image.Image:
    """The image as another camera would have taken it; the same for the same image."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR)), np.float64) / 255
    height, width = pixels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    light = 1 - VIGNETTE * (x**2 + y**2) / 2
    pixels = np.clip(pixels**GAMMA * np.array(GAINS) * light[..., None], 0, 1)
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def make_environments(data: Path, root: Path) -> Path:
    """The two cameras' folders; kept, and used again."""
    if root.is_dir():
        return root
    with (data / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rng = np.random.default_rng(SPLIT_SEED)
    for name, wanted in (("no_or_mild", ("0", "1")), ("referable", ("2", "3", "4"))):
        files = sorted(row["file"] for row in rows if row["dr_grade"] in wanted)
        other = set(rng.permutation(len(files))[: len(files) // 2].tolist())
        for i, file_name in enumerate(files):
            folder = root / ("camera_b" if i in other else "camera_a") / name
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.open(data / file_name).convert("RGB")
            image = shifted(image) if i in other else image
            image.save(folder / f"{Path(file_name).stem}.png", compress_level=1)
    return root


def measures(training: VaeTraining) -> dict[str, float]:
    """What the validation images say of the model as it is."""
    data = training.data
    terms = training.judge(data.val).terms
    parts = np.array_split(data.val, max(1, len(data.val) // 16))
    found = [training.reconstruct(part) for part in parts]
    inputs = np.concatenate([each[0] for each in found]).astype(np.float64) / 255
    outputs = np.concatenate([each[1] for each in found]).astype(np.float64)
    means = np.concatenate([each[2] for each in found])
    train = data.load(data.train).pixels.numpy().astype(np.float64) / 255
    return {
        **terms,
        "latents": float((means.var(axis=0) > ACTIVE).sum()),
        "differ": float((outputs.std(axis=0).mean()) / inputs.std(axis=0).mean()),
        "sharpness": _gradient(outputs) / _gradient(inputs),
        "floor": _cross_entropy(inputs, inputs),
        "mean_image": _cross_entropy(inputs, np.broadcast_to(train.mean(axis=0), inputs.shape)),
    }


def _gradient(images: np.ndarray) -> float:
    return float(np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean())


def _cross_entropy(images: np.ndarray, p: np.ndarray) -> float:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return float(-(images * np.log(p) + (1 - images) * np.log(1 - p)).mean())


def train_once(config: VaeConfig, root: Path, folder: Path) -> dict[str, float]:
    """One training with pictures; what came of it."""
    images = read_environments(root, config.subset_size, config.seed)
    check_environments(images)
    device = choose_device(config)
    data = VaeData(images, pixels_of(images, config, device), *split_images(images, config))
    training = VaeTraining(build_model(config, len(images.classes), Path()), data, config, device)
    folder.mkdir(parents=True, exist_ok=True)

    def watch(training: VaeTraining) -> None:
        step, history = training.progress.step, training.progress.history
        if history and history[-1]["step"] == step and "val_accuracy" in history[-1]:
            print(line(history[-1], config.steps), flush=True)
        if config.picture_every and step % config.picture_every == 0:
            write_pictures(training, folder / f"recon_step_{step}")

    training.run(watch)
    write_log(folder, training.progress.history, config.steps)
    plot_vae_history(training.progress.history, folder / "history.png")
    write_pictures(training, folder / "recon_final")
    progress = training.progress
    found = {**measures(training), "best_step": float(progress.best_step)}
    found |= {
        "best_val_accuracy": progress.best_accuracy,
        "steps_per_second": progress.step / progress.seconds,
    }
    (folder / "measures.json").write_text(json.dumps(found, indent=2))
    return found


def compare_weights(config: VaeConfig, root: Path, work: Path, weights: Sequence[float], tag: str) -> None:
    """One line for each weight of the KL term."""
    for weight in weights:
        mine = config.model_copy(update={"loss_multiplier_kl": weight})
        folder = work / f"kl_{weight:g}{tag}"
        kept = folder / "measures.json"
        found = json.loads(kept.read_text()) if kept.is_file() else train_once(mine, root, folder)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        print(f"loss_multiplier_kl {weight:g}: {shown}", flush=True)


def steps_per_second(config: VaeConfig, steps: int) -> dict[str, Any]:
    """Steps a second with and without the loading of images, and the memory they take."""
    device = choose_device(config)
    config = config.model_copy(update={"steps": WARM + steps + 1, "val_every": 10**8, "log_every": 10**8})
    with tempfile.TemporaryDirectory() as folder:
        images = read_environments(_noise(Path(folder), config), None, 0)
        data = VaeData(images, pixels_of(images, config, device), *split_images(images, config))
        training = VaeTraining(build_model(config, len(images.classes), Path()), data, config, device)
        times: dict[int, float] = {}

        def clock(training: VaeTraining) -> None:
            if training.progress.step in (WARM, WARM + steps):
                _wait(device)
                times[training.progress.step] = time.perf_counter()

        training.run(clock)
        batch = data.load(np.resize(data.train, config.batch_size))
        batch = batch._replace(pixels=batch.pixels.to(device), labels=batch.labels.to(device))
        _wait(device)
        started = time.perf_counter()
        for _ in range(steps):
            training._step(batch)
        _wait(device)
        bare = time.perf_counter() - started
    on_gpu = device.type == "cuda"
    return {
        "pipeline": steps / (times[WARM + steps] - times[WARM]),
        "bare": steps / bare,
        "images_per_second": config.batch_size * steps / (times[WARM + steps] - times[WARM]),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"cpu, {torch.get_num_threads()} threads",
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "amp": training.amp,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "settings": {
            key: getattr(config, key) for key in ("encoder", "size", "batch_size", "latent", "hidden")
        },
        "torch": torch.__version__,
    }


def _noise(root: Path, config: VaeConfig) -> Path:
    """Two environments of two classes of images that are quick to make."""
    rng = np.random.default_rng(0)
    for folder in (root / e / c for e in "ab" for c in ("0", "1")):
        folder.mkdir(parents=True)
        for i in range(max(8, config.batch_size // 2)):
            small = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(small).resize((config.size, config.size)).save(folder / f"{i}.png")
    return root


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="fundus photographs with labels.csv")
    parser.add_argument("--work", type=Path, help="environments and results: kept, used again")
    parser.add_argument("--kl", type=float, nargs="+", default=[], help="weights of the KL term")
    parser.add_argument("--tag", default="", help="end of the folders' names")
    parser.add_argument("--leave-one-out", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps-per-second", action="store_true")
    parser.add_argument("--measured-steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the steps a second here too")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the section vae"
    )
    options = parser.parse_args()
    given = {key: parse(value, "--set") for key, _, value in (text.partition("=") for text in options.set)}
    config = VaeConfig.model_validate({"device": options.device, **given})
    print(
        f"{' '.join(sys.argv[1:])}\ntorch {torch.__version__}, {torch.get_num_threads()} threads",
        flush=True,
    )
    if options.steps_per_second:
        fresh = {} if "encoder_weights" in given else {"encoder_weights": "random:0"}
        found = steps_per_second(config.model_copy(update=fresh), options.measured_steps)
        text = json.dumps(found, indent=2)
        print(text)
        if options.json is not None:
            options.json.write_text(text + "\n")
    if not (options.kl or options.leave_one_out):
        return
    if options.data is None or options.work is None:
        parser.error("--kl and --leave-one-out need --data and --work")
    root = make_environments(options.data, options.work / "environments")
    compare_weights(config, root, options.work, options.kl, options.tag)
    if options.leave_one_out:
        whole = Config(vae=config.model_copy(update={"data_dir": str(root.absolute())}))
        print(leave_one_out_project(whole, options.work, options.seeds, None, print, print).to_text())


if __name__ == "__main__":
    main()
