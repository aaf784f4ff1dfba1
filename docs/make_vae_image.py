"""Draw the picture of docs/vae.md: `python docs/make_vae_image.py [FOLDER]`, twenty minutes on one core.

Two made-up scanners look at the demo's tissue, which ships with scikit-image; the second class has large,
crowded nuclei. A small β-VAE learns to give the patches back.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from featstore.demo_tissue import Look, Tissue, crowd, load_tissue, paint
from heads.config import Config
from heads.vae import train_vae_project

PICTURE = Path(__file__).parent / "images" / "vae_recon.png"
LOOKS = {
    "scanner_a": Look(1.0, 1.0, 0.98, (1.0, 0.98, 0.99), 0.4),
    "scanner_b": Look(0.75, 1.2, 0.9, (0.97, 1.0, 0.9), 1.0),
}
IMAGES, SIDE = 300, 40  # of every class on every scanner; px, before they are resized to 64
SETTINGS = {
    "encoder": "timm:resnet10t", "encoder_weights": "random:0", "size": 64, "hidden": 256, "steps": 2500,
    "lr": 1e-3, "kl_anneal_end": "50%", "picture_every": 0, "device": "cpu", "seed": 0,
}  # fmt: skip


def make_environments(root: Path) -> Path:
    """ROOT/SCANNER/CLASS/*.png."""
    tissue, rng = load_tissue(), np.random.default_rng(0)
    for scanner, look in LOOKS.items():
        for name in ("plain", "crowded"):
            folder = root / scanner / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(IMAGES):
                _patch(tissue, rng, look, name == "crowded").save(folder / f"{i}.png", compress_level=1)
    return root


def _patch(tissue: Tissue, rng: np.random.Generator, look: Look, crowded: bool) -> Image.Image:
    part = tissue.crop(rng, SIDE, SIDE)
    part = crowd(part, tissue.nuclei, rng) if crowded else part
    return paint(part, "h&e", Look.draw(rng, look))


def main() -> None:
    """Train, and write the picture."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        root = make_environments(work / "environments")
        config = Config.model_validate({"vae": {**SETTINGS, "data_dir": str(root.absolute())}})
        done = train_vae_project(config, work, tell=print, observe=print)
        print(done.to_text())
        parts = [Image.open(done.folder / "recon_final" / name) for name in ("val.png", "samples.png")]
        sheet = Image.new("RGB", (parts[0].width, sum(part.height for part in parts) + 4), "white")
        sheet.paste(parts[0], (0, 0))
        sheet.paste(parts[1], (0, parts[0].height + 4))
        sheet.quantize(256, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
