"""Small images of environments whose classes differ in colour, for the tests of the β-VAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from heads.training.vae_config import VaeConfig

ENVIRONMENTS, CLASSES = ("hospital a", "hospital b", "hospital c"), ("benign", "high grade")
TINY = {
    "encoder": "timm:test_resnet", "encoder_weights": "random:0", "size": 32, "hidden": 8, "latent": 4,
    "batch_size": 6, "steps": 8, "val_every": 4, "log_every": 2, "picture_every": 0, "lr": 1e-3,
    "kl_anneal_end": "50%", "val_share": 0.34, "device": "cpu", "amp": "off", "workers": 1, "seed": 3,
}  # fmt: skip


def tiny(**more: object) -> VaeConfig:
    return VaeConfig.model_validate({**TINY, **more})


def flags(**more: object) -> list[str]:
    """The tiny settings as they are typed."""
    return [f"--set=vae.{key}={value}" for key, value in {**TINY, **more}.items()]


def write_environments(root: Path, environments: int = 3, images: int = 6, side: int = 20) -> Path:
    """Noise around colours: red tells the class, brightness the environment."""
    rng = np.random.default_rng(0)
    for number, environment in enumerate(ENVIRONMENTS[:environments]):
        for label, name in enumerate(CLASSES):
            folder = root / environment / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(images):
                colour = np.array([90 + 100 * label, 120, 120]) + 20 * number
                pixels = rng.normal(0, 10, (side, side, 3)) + colour
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"image_{i}.png")
    return root
