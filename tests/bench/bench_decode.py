"""What decoding a patch takes, step by step and decoder by decoder, taking turns.

    OMP_NUM_THREADS=1 python tests/bench/bench_decode.py [--sizes lab|224] [--patches N] [--json]

CPU time of one thread in ms a patch, so that a busy machine disturbs little; medians over rounds.
OpenCV is measured where it is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from tissue_tiles import make_tiles

from featstore import decoders
from featstore.images import decode, decoder_name, resize
from featstore.quality import quality

ROOM = 10**8


def ours(data: bytes) -> np.ndarray:
    return decode(data, "a.png", "rgb", ROOM).pixels


def ours_without_imagecodecs(data: bytes) -> np.ndarray:
    codecs, decoders._codecs = decoders._codecs, lambda: None
    try:
        return ours(data)
    finally:
        decoders._codecs = codecs


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def by_torchvision(data: bytes) -> np.ndarray:
    read = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torchvision.io.decode_png(read).permute(1, 2, 0).numpy()


def decoders_here() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Every decoder that is installed; those that are not ours check neither checksums nor the end."""
    found: dict[str, Callable[[bytes], np.ndarray]] = {
        f"featstore: {decoder_name()}": ours,
        "featstore without imagecodecs": ours_without_imagecodecs,
        "Pillow": by_pillow,
        "torchvision": by_torchvision,
    }
    if importlib.util.find_spec("imagecodecs"):
        import imagecodecs

        found |= {"libspng": imagecodecs.spng_decode, "libpng": imagecodecs.png_decode}
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: cv2.cvtColor(
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
    return found


def in_turns(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of this thread that each job takes: medians over rounds."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.thread_time()
            job()
            times[name].append(time.thread_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def speed_up(files: list[bytes], rounds: int) -> float:
    """How much sooner two threads are done than one."""

    def seconds(threads: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            list(pool.map(ours, files))
            return time.perf_counter() - started

    return statistics.median(seconds(1) / seconds(2) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", choices=["lab", "224"], default="224")
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        files = [
            f.read_bytes() for f in make_tiles(Path(scratch) / "tiles", options.sizes, options.patches)
        ]
    pixels = [ours(data) for data in files]
    ways = decoders_here()
    for name, way in ways.items():
        assert all(np.array_equal(way(f), p) for f, p in zip(files, pixels, strict=True)), name
    jobs: dict[str, Callable[[], Any]] = {
        name: lambda way=way: [way(data) for data in files] for name, way in ways.items()
    }
    jobs |= {
        "resize to 224 (Pillow)": lambda: [resize(p, (224, 224), "bilinear") for p in pixels],
        "quality columns": lambda: [quality(p) for p in pixels],
        "SHA-256": lambda: [hashlib.sha256(data).digest() for data in files],
    }
    taken = {name: 1e3 * value / len(files) for name, value in in_turns(jobs, options.rounds).items()}
    threads = speed_up(files, options.rounds)
    if options.json:
        print(json.dumps({"ms_a_patch": taken, "speed_up_of_two_threads": threads, **vars(options)}))
        return
    area = sum(p.shape[0] * p.shape[1] for p in pixels) / len(pixels) / 224**2
    print(f"{len(files)} patches, {area:.2f} × 224² px on average; ms of one thread a patch")
    for name, value in taken.items():
        print(f"  {name:<74} {value:7.3f}")
    print(f"  two threads are {threads:.2f} × as fast as one")


if __name__ == "__main__":
    main()
