"""Extraction against its limit and against a plain loop, in one run: `make bench`.

    python tests/bench/bench_extract.py [FOLDER OF PNG PATCHES] [--backbone NAME] [--patches N]

Without a folder, tissue of scikit-image is cut into 224 px patches. The plain loop is what one
writes without thinking about speed: DataLoader with two workers, Pillow, float32, NCHW, batch 32,
one `torch.save` at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.backbones import build_backbone
from featstore.bench import bench_extract
from featstore.config import FeatstoreConfig
from featstore.demo_tissue import tissue_pixels


class Patches(torch.utils.data.Dataset):
    """Patches as the plain loop reads them."""

    def __init__(self, paths: list[Path], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.paths, self.mean, self.std = paths, np.float32(mean), np.float32(std)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(self.paths[i]).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        values = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(values.transpose(2, 0, 1).copy())


def plain_rate(paths: list[Path], config: FeatstoreConfig, device: str) -> float:
    backbone = build_backbone(config.backbone, Path())
    module = backbone.module.to(device)
    loader = torch.utils.data.DataLoader(
        Patches(paths, backbone.preprocessing.mean, backbone.preprocessing.std),
        batch_size=32,
        num_workers=2,
    )
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        module(torch.zeros(32, 3, 224, 224, device=device))
        started = time.perf_counter()
        features = torch.cat([module(batch.to(device)).cpu() for batch in loader])
        torch.save(features, Path(folder) / "features.pt")
        return len(paths) / (time.perf_counter() - started)


def make_tiles(folder: Path, count: int) -> None:
    """Crops of real tissue under the naming convention, all different."""
    pixels = tissue_pixels()
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        y, x = rng.integers(0, np.array(pixels.shape[:2]) - 223)
        crop = np.rot90(pixels[y : y + 224, x : x + 224], i % 4)
        Image.fromarray(crop).save(folder / f"case_{i // 64}_match_1_h&e_patch{i % 64}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--patches", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "tiles"
        if options.folder is None:
            make_tiles(folder, options.patches)
        config = FeatstoreConfig.model_validate(
            {
                "patches": {"folder": str(folder), "on_unparsed": "skip"},
                "backbone": {"name": options.backbone, "weights": "random:0"},
                "extract": {"device": options.device},
            }
        )
        paths = sorted(folder.rglob("*.png"))[: options.patches]
        device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
        # The plain loop comes first: the pipeline's advice to malloc would speed it up too.
        plain = statistics.median(plain_rate(paths, config, device) for _ in range(options.rounds))
        result = bench_extract(config, Path(), options.patches, options.rounds)
    print(result.to_text())
    print(
        f"  plain loop       {plain:>9,.1f} patches/s; "
        f"extraction is {result.pipeline_rate / plain:.2f} × as fast"
    )
    print(json.dumps({**result.to_json(), "plain_rate": round(plain, 2)}))


if __name__ == "__main__":
    main()
