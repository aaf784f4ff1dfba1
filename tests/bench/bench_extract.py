"""Extraction against its limit and against three ways of one's own, in one run, taking turns.

    python tests/bench/bench_extract.py [FOLDER OF PNG PATCHES] [--backbone NAME] [--sizes lab|224]
                                        [--patches N] [--rounds N] [--runtime auto|torch|openvino]
                                        [--native [native32]] [--device cpu|cuda] [--json]

Without a folder, real tissue is cut into patches. All ways have the same backbone with the same
random weights, resize to 224 px, and start in a process of their own, so that none profits from
what another asks of malloc; importing, building the backbone and a first forward pass are not timed.

extract    the pipeline, as `featstore extract` runs it, and beside it the rates of decoding and of
           the backbone alone, and what share it reaches of the limit that they set: of
           1 / (1 / model + 1 / decode) where both share the cores, of the slower one beside a GPU
lab        one patch at a time: Pillow, float32, one `torch.save` a patch; on every fourth patch
plain      what one writes without thinking about speed: DataLoader with two workers, Pillow,
           float32, NCHW, batch 32, one `torch.save` at the end
careful    a good evaluation loop: DataLoader with two workers, torchvision's decoder and resize
           on uint8, autocast to bfloat16, channels_last, batch 32, one `torch.save` at the end

With --native every patch keeps its own size (native32: sides rounded to multiples of 32): `extract`
with that `resize` against `lab` at their own size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tissue_tiles import make_tiles
from torchvision.io import ImageReadMode, decode_png, read_file
from torchvision.transforms.v2.functional import resize

from featstore.backbones import Backbone, build_backbone
from featstore.bench import bench_extract
from featstore.config import FeatstoreConfig

BATCH, SIDE = 32, 224
# Forked as anybody's are on Linux, although the way itself runs in a process that was spawned.
LOADER = {"batch_size": BATCH, "num_workers": 2, "multiprocessing_context": "fork"}
Rates = dict[str, float]


def settings(options: argparse.Namespace, folder: Path) -> FeatstoreConfig:
    """The project's settings; what is not given stays as anybody gets it."""
    return FeatstoreConfig.model_validate(
        {
            "patches": {"folder": str(folder), "on_unparsed": "skip"},
            "backbone": {
                "name": options.backbone,
                "weights": "random:0",
                "resize": options.native or SIDE,
            },
            "extract": {"device": options.device, "runtime": options.runtime},
        }
    )


class Patches(torch.utils.data.Dataset):
    """Patches as one reads them with Pillow: float32 (3, H, W), normalised."""

    def __init__(self, paths: list[Path], backbone: Backbone, native: bool) -> None:
        self.paths, self.native = paths, native
        self.mean = np.float32(backbone.preprocessing.mean)
        self.std = np.float32(backbone.preprocessing.std)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(self.paths[i]).convert("RGB")
        if not self.native:
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        values = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(values.transpose(2, 0, 1).copy())


class BytePatches(torch.utils.data.Dataset):
    """Patches as one reads them with care: uint8 (3, 224, 224), by torchvision."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = decode_png(read_file(str(self.paths[i])), ImageReadMode.RGB)
        return resize(image, [SIDE, SIDE], antialias=True)


def extract(options: argparse.Namespace, folder: Path, paths: list[Path]) -> Rates:
    found = bench_extract(settings(options, folder), Path(), len(paths), rounds=1, try_others=False)
    return {
        "extract": found.pipeline_rate,
        "decoding alone": found.decode_rate,
        "backbone alone": found.model_rate,
        "fraction of limit": found.fraction_of_limit,
    }


def lab(options: argparse.Namespace, folder: Path, paths: list[Path]) -> Rates:
    backbone, device = build_backbone(settings(options, folder).backbone, Path()), device_of(options)
    module = backbone.module.to(device)
    patches = Patches(paths[2::4], backbone, bool(options.native))  # sorted by size: a fair quarter
    with torch.inference_mode(), tempfile.TemporaryDirectory() as out:
        module(torch.zeros(1, 3, SIDE, SIDE, device=device))
        started = time.perf_counter()
        for i in range(len(patches)):
            torch.save(module(patches[i][None].to(device)).cpu(), Path(out) / f"{i}.pt")
        return {"lab": len(patches) / (time.perf_counter() - started)}


def plain(options: argparse.Namespace, folder: Path, paths: list[Path]) -> Rates:
    backbone, device = build_backbone(settings(options, folder).backbone, Path()), device_of(options)
    module = backbone.module.to(device)
    loader = torch.utils.data.DataLoader(Patches(paths, backbone, False), **LOADER)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as out:
        module(torch.zeros(BATCH, 3, SIDE, SIDE, device=device))
        started = time.perf_counter()
        features = torch.cat([module(batch.to(device)).cpu() for batch in loader])
        torch.save(features, Path(out) / "features.pt")
        return {"plain": len(paths) / (time.perf_counter() - started)}


def careful(options: argparse.Namespace, folder: Path, paths: list[Path]) -> Rates:
    backbone, device = build_backbone(settings(options, folder).backbone, Path()), device_of(options)
    module = backbone.module.to(device).to(memory_format=torch.channels_last)
    mean, std = (
        255 * torch.tensor(values, device=device).view(1, 3, 1, 1)
        for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    pinned = device.type == "cuda"
    loader = torch.utils.data.DataLoader(BytePatches(paths), pin_memory=pinned, **LOADER)

    def embed(batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(device, non_blocking=True).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            return module((batch.float() - mean) / std).float()

    with torch.inference_mode(), tempfile.TemporaryDirectory() as out:
        embed(torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.uint8)).cpu()
        started = time.perf_counter()
        features = torch.cat([embed(batch) for batch in loader]).cpu()
        torch.save(features, Path(out) / "features.pt")
        return {"careful": len(paths) / (time.perf_counter() - started)}


Way = Callable[[argparse.Namespace, Path, list[Path]], Rates]


def device_of(options: argparse.Namespace) -> torch.device:
    if options.device != "auto":
        return torch.device(options.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def in_own_process(way: Way, *arguments: Any) -> Rates:
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(way, *arguments).result()


def measure(options: argparse.Namespace, folder: Path, paths: list[Path]) -> dict[str, list[float]]:
    """Every rate, round by round; in each round all ways take their turn."""
    ways: list[Way] = [extract, lab] if options.native else [extract, lab, plain, careful]
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for way in ways:
            for name, value in in_own_process(way, options, folder, paths).items():
                found.setdefault(name, []).append(value)
    return found


def ratio(found: dict[str, list[float]], way: str) -> float:
    """How many times as fast as a way extraction is: the median over rounds."""
    return statistics.median(a / b for a, b in zip(found["extract"], found[way], strict=True))


def show(options: argparse.Namespace, paths: list[Path], found: dict[str, list[float]]) -> None:
    sizes = f"{options.native} sizes" if options.native else f"{SIDE} px"
    print(
        f"{options.backbone} at {sizes}, {len(paths):,} patches ({options.folder or options.sizes}), "
        f"{options.rounds} rounds, runtime {options.runtime}, {device_of(options)}"
    )
    for name, values in found.items():
        middle = statistics.median(values)
        if name == "fraction of limit":
            print(f"  {name:<18} {middle:>9.2f}")
            continue
        spread = f"({min(values):,.1f} to {max(values):,.1f})"
        against = f"  extract is {ratio(found, name):.2f} × as fast" * (name in ("lab", "plain", "careful"))
        print(f"  {name:<18} {middle:>9,.1f} patches/s {spread:<20}{against}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--backbone", default="densenet121", help="densenet121 | resnet50 | timm:NAME")
    parser.add_argument("--sizes", choices=["lab", "224"], default="224")
    parser.add_argument("--patches", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtime", choices=["auto", "torch", "openvino"], default="auto")
    parser.add_argument("--native", nargs="?", const="native", choices=["native", "native32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "tiles"
        if options.folder is None:
            paths = make_tiles(folder, options.sizes, options.patches)
        else:
            paths = sorted(folder.rglob("*.png"), key=lambda path: path.stat().st_size)
            paths = paths[:: max(1, len(paths) // options.patches)][: options.patches]
        found = measure(options, folder, paths)
    if options.json:
        ratios = {way: ratio(found, way) for way in ("lab", "plain", "careful") if way in found}
        print(
            json.dumps({**vars(options), "folder": str(folder), "rates": found, "times as fast as": ratios})
        )
    else:
        show(options, paths, found)


if __name__ == "__main__":
    main()
