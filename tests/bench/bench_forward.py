"""What computes the forward pass fastest here, in one process, the ways taking turns.

    python tests/bench/bench_forward.py [--backbone NAME] [--sizes 224 64 native] [--ways WAY ...]

Patches are real tissue (scikit-image). Two rates for each way: patches a second by the clock, which
suffers from whatever else the machine does, and patches a second of one core's own time, which
suffers less. `native` patches have the sizes of a lab's cohort (log-normal, median 195 px).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.backbones import Backbone, build_backbone
from featstore.config import BackboneConfig
from featstore.demo_tissue import tissue_pixels
from featstore.extraction.forward import Embedder, choose_batch_size, choose_device, make_embedder
from featstore.process import keep_freed_memory

Batches = list[np.ndarray]
WAYS = {
    "torch float32": ("float32", "torch", False),
    "torch": ("bfloat16", "torch", False),
    "torch, folded": ("bfloat16", "torch, folded", False),
    "torch, folded, compiled": ("bfloat16", "torch, folded", True),
    "openvino float32": ("float32", "openvino", False),
    "openvino": ("bfloat16", "openvino", False),
}


def batches(size: str, count: int, batch_size: int, rng: np.random.Generator) -> Batches:
    """Patches of one size in full batches, or each of a size of its own."""
    tissue = np.tile(tissue_pixels(), (4, 4, 1))
    if size == "native":
        sides = np.exp(np.log(195) + 0.85 * rng.standard_normal((count, 2))).clip(50, 2000).astype(int)
        return [tissue[:height, :width][None].copy() for height, width in sides]
    side = int(size)
    corners = rng.integers(0, min(tissue.shape[:2]) - side, (count, 2))
    patches = np.stack([tissue[y : y + side, x : x + side] for y, x in corners])
    return [patches[i : i + batch_size] for i in range(0, count, batch_size)]


def measured(embedder: Embedder, work: Batches) -> tuple[float, float]:
    """Seconds by the clock, and seconds of all cores."""
    clock, cores = time.perf_counter(), time.process_time()
    for pending in [embedder(pixels) for pixels in work]:
        pending.result()
    return time.perf_counter() - clock, time.process_time() - cores


def compare(build: Callable[[str], Backbone], size: str, arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    batch_size = choose_batch_size("auto", device, "bfloat16")
    work = batches(size, arguments.patches, batch_size, np.random.default_rng(0))
    count = sum(len(pixels) for pixels in work)
    embedders, ready = {}, {}
    for way in arguments.ways:
        started = time.perf_counter()
        # A backbone for each: PyTorch's changes the layout of its own.
        embedders[way] = make_embedder(
            build(size), device, WAYS[way][0], "float16", batch_size, *WAYS[way][1:]
        )
        measured(embedders[way], work)
        ready[way] = time.perf_counter() - started
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in arguments.ways}
    for _ in range(arguments.rounds):
        for way, embedder in embedders.items():
            seconds[way].append(measured(embedder, work))
    load = os.getloadavg()[0]
    print(
        f"\n{arguments.backbone}, {size} px, {count} patches, "
        f"{torch.get_num_threads()} threads, load {load:.1f}"
    )
    print(f"{'':26}{'patches/s':>10}{'a core':>10}{'ratio':>8}{'ratio a core':>14}{'first, s':>10}")
    rates = {
        way: [count / statistics.median(values) for values in zip(*found, strict=True)]
        for way, found in seconds.items()
    }
    base = rates[arguments.ways[0]]
    for way, (clock, core) in rates.items():
        print(
            f"{way:26}{clock:10.1f}{core:10.1f}{clock / base[0]:8.2f}{core / base[1]:14.2f}"
            f"{ready[way]:10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", default=["224", "64", "native"])
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=["torch", "torch, folded", "openvino"]
    )
    arguments = parser.parse_args()
    keep_freed_memory()

    def build(size: str) -> Backbone:
        resize = "native" if size == "native" else int(size)
        config = BackboneConfig(name=arguments.backbone, weights="random:0", resize=resize)
        return build_backbone(config, Path())

    for size in arguments.sizes:
        compare(build, size, arguments)


if __name__ == "__main__":
    main()
