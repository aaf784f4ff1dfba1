"""Extraction on a GPU: how close it comes to the limit there, and how long a lab's cohort takes.

    python tests/bench/bench_gpu.py --out FOLDER     (or: make bench-gpu)

    [--device cuda|cpu] [--backbones NAME ...] [--batch-sizes N ...] [--amp bf16|fp16|off]
    [--size PX] [--patches N] [--rounds N] [--cohort N] [--distinct N] [--compile] [--json]

Patches are real tissue in the sizes of a lab's cohort, resized to --size. For each backbone and
batch size, in patches a second, medians over rounds in which all of them take their turn:

model      forward passes alone, the pixels already on the device (CUDA events)
copied     the same with the copies to the device and back, as extraction makes them
decode     reading, decoding and resizing alone, on all cores
pipeline   the whole extraction into a temporary store
fraction   pipeline / min(model, decode), round by round; the goal is 0.90 or more

beside them the peak of the device's memory, and how busy the driver says the GPU was while the
pipeline ran. A batch that does not fit in memory is told, and the next one is measured. --compile adds
the model's rate with torch.compile, and the seconds until its first batch was done. How busy a GPU is
is known where NVML's Python module is (pip install nvidia-ml-py).

Then a cohort of --cohort patches, in wall time, by `featstore extract` in a process of its own: from
the command to its end. Its files are names of --distinct different ones, so that most of them are
read from the page cache: decoding is what it would be, reading is not.

Results go to FOLDER/gpu.json after every measurement: what has been measured outlives a run that is
cut short; where a command may not run for long, give one of the --backbones at a time. On a CPU the
file shows only that it works: there the limit cannot be reached, because backbone and decoding share
the cores. Needs neither Zarr nor OpenVINO.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.backbones import Backbone, build_backbone
from featstore.bench import Runner
from featstore.cohort import scan
from featstore.config import FeatstoreConfig
from featstore.errors import FeatstoreError
from featstore.extraction.forward import choose_device, is_out_of_memory
from featstore.extraction.pytorch import TorchEmbedder
from featstore.extraction.setup import describe, make_embedder
from featstore.extraction.utilisation import GpuSampler
from featstore.images import decoder_name
from featstore.process import usable_cores
from tests.bench.tissue_tiles import make_tiles
from tests.helpers import ROOT, patch_name

GOAL = 0.90
RATES = ("model", "copied", "decode", "pipeline")
# A lab's cohort of 64,526 patches in 143 cases.
PATCHES_A_CASE = 451
# Batches kept on the device; enough that none is still in its caches when its turn comes again.
RESIDENT = 8
Row = dict[str, Any]


def settings(options: argparse.Namespace, name: str, folder: Path, **extract: Any) -> FeatstoreConfig:
    """The settings of a project with this backbone; what is not given stays as anybody gets it."""
    return FeatstoreConfig.model_validate(
        {
            "patches": {"folder": str(folder)},
            "store": {"format": "hdf5"},
            "backbone": {"name": name, "weights": "random:0", "resize": options.size},
            "extract": {
                "device": options.device,
                "amp": options.amp,
                "runtime": "torch",
                **extract,
            },
        }
    )


def name_again(tiles: Sequence[Path], folder: Path, count: int) -> None:
    """Give ``count`` patches of a cohort the contents of fewer files."""
    folder.mkdir()
    order = np.random.default_rng(0).permutation(len(tiles))
    for n in range(count):
        tile = tiles[order[n % len(tiles)]]
        name = patch_name(str(n // PATCHES_A_CASE + 1), "match_1", "h&e", n % PATCHES_A_CASE + 1)
        try:
            os.link(tile, folder / name)
        except OSError:  # not on this file system, or too many of one file
            (folder / name).symlink_to(tile)


class Finished:
    """Waits for a device, and measures what it did since `start`.

    Args:
        device: On a GPU its own clock is asked, on a CPU the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        if self._device.type != "cuda":
            self._began = time.perf_counter()
            return
        torch.cuda.synchronize(self._device)
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._first.record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        if self._device.type != "cuda":
            return time.perf_counter() - self._began
        self._last.record(torch.cuda.current_stream(self._device))
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1000


@torch.inference_mode()
def resident_rate(embedder: TorchEmbedder, batches: Sequence[np.ndarray], count: int) -> float:
    """Patches a second of forward passes whose pixels are on the device already.

    Args:
        embedder: Its copies are left out, the rest is as extraction does it.
        batches: Full ones, (batch size, H, W, 3) uint8.
        count: At least so many patches are computed.
    """
    with embedder._on_device():
        resident = [torch.from_numpy(pixels).to(embedder.device) for pixels in batches[:RESIDENT]]
        turns = [n % len(resident) for n in range(-(-count // len(batches[0])))]
        clock = Finished(embedder.device)
        with mock.patch.object(embedder, "_on_its_way", side_effect=[resident[turn] for turn in turns]):
            clock.start()
            for turn in turns:
                embedder._forward(batches[turn])
            return sum(len(batches[turn]) for turn in turns) / clock.seconds()


class Bench:
    """One backbone at one batch size.

    Args:
        options: Of the command line.
        name: The backbone's.
        batch_size: Patches in a forward pass.
        folder: Of the patches.
    """

    def __init__(self, options: argparse.Namespace, name: str, batch_size: int, folder: Path) -> None:
        self.device = choose_device(options.device)
        self._config = settings(options, name, folder, batch_size=batch_size)
        config = self._config
        found = scan(folder, config.patches, config.stains, config.exclude, base=Path())
        self.runner = Runner(config, found, self._build(), self._spec(), self.device)
        full = [pixels for pixels in self.runner._batches if len(pixels) == batch_size]
        # Fewer patches than a batch: repeated, as extraction repeats the last one.
        self._full = full or [
            np.resize(self.runner._batches[0], (batch_size, options.size, options.size, 3))
        ]
        self.count = len(self.runner.schedule.rows)

    def _build(self) -> Backbone:
        return build_backbone(self._config.backbone, Path())

    def _spec(self) -> Any:
        return describe(self._config, self._build(), self.device, None)

    def warm_up(self) -> int:
        """Kernels are chosen and memory is taken.

        Returns:
            How many patches fit in a forward pass: fewer than asked for where memory ran out.
        """
        self.runner.model()
        self.runner.pipeline()
        return int(self.runner.embedder.batch_size)

    def round(self) -> dict[str, float]:
        found = {
            "decode": self.runner.decoding(),
            "model": resident_rate(self.runner.embedder, self._full, self.count),
            "copied": self.runner.model(),
            "pipeline": self.runner.pipeline(),
        }
        return {**found, "fraction": found["pipeline"] / min(found["model"], found["decode"])}

    def compiled(self, rounds: int) -> Row:
        """The model's rate with torch.compile."""
        config = self._config.model_copy(
            update={"extract": self._config.extract.model_copy(update={"compile": True})}
        )
        started = time.perf_counter()
        embedder = make_embedder(config, self._build(), self.device, self._spec())
        assert isinstance(embedder, TorchEmbedder)
        embedder(self._full[0]).result()
        ready = time.perf_counter() - started
        rates = [resident_rate(embedder, self._full, self.count) for _ in range(rounds)]
        return {"compile_seconds": ready, "model_compiled": statistics.median(rates)}


def measure(options: argparse.Namespace, name: str, batch_size: int, folder: Path) -> Row:
    """All rates of a backbone at a batch size; if memory runs out, that instead of them."""
    row: Row = {"backbone": name, "batch_size": batch_size, "out_of_memory": None}
    try:
        bench = Bench(options, name, batch_size, folder)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        fits = bench.warm_up()
        if fits < batch_size:
            return {**row, "out_of_memory": f"a batch of {batch_size} does not fit, one of {fits} does"}
        with GpuSampler(bench.device, seconds=0.25) as sampler:
            rounds = [bench.round() for _ in range(options.rounds)]
        middle = {key: statistics.median(found[key] for found in rounds) for key in (*RATES, "fraction")}
        row |= {
            "patches": bench.count,
            **middle,
            "goal": GOAL,
            "limited_by": "decode" if middle["decode"] < middle["model"] else "model",
            "rounds": rounds,
            "peak_memory_bytes": memory(torch.cuda.max_memory_allocated, bench.device),
            "peak_reserved_bytes": memory(torch.cuda.max_memory_reserved, bench.device),
            **busy(sampler.samples, sampler.interval),
        }
        if options.compile:
            row |= bench.compiled(options.rounds)
    except (FeatstoreError, RuntimeError, MemoryError) as error:
        if not (is_out_of_memory(error) or is_out_of_memory(error.__cause__ or error)):
            raise
        row["out_of_memory"] = str(error).partition("\n")[0]
    return row


def memory(ask: Callable[[torch.device], int], device: torch.device) -> int | None:
    return ask(device) if device.type == "cuda" else None


def busy(samples: Sequence[float], interval: float) -> Row:
    """How busy the GPU was over time; the mean is None where the driver was not asked."""
    return {
        "gpu_utilisation": [round(value, 2) for value in samples],
        "gpu_seconds_apart": interval,
        "gpu_utilisation_mean": statistics.fmean(samples) if samples else None,
    }


def whole_cohort(options: argparse.Namespace, name: str, folder: Path) -> Row:
    """Wall time of `featstore extract` over a cohort, from the command to its end."""
    with tempfile.TemporaryDirectory(prefix="featstore-bench-") as project:
        config = settings(options, name, folder)
        (Path(project) / "featstore.yaml").write_text(config.model_dump_json(exclude_unset=True))
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), "extract", "--json"],
            cwd=project,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
    row: Row = {"backbone": name, "patches": options.cohort, "error": None}
    if done.returncode:
        return {**row, "error": f"exit code {done.returncode}: {done.stderr[-2000:]}"}
    report = json.loads(done.stdout)
    over_time = report["gpu_utilisation_over_time"]
    return {
        **row,
        "committed": report["committed"],
        "wall_seconds": seconds,
        "patches_per_second": report["committed"] / seconds,
        "report_seconds": report["seconds"],
        "bound_by": report["bound_by"],
        **{key: report[key] for key in ("batch_size", "batch_size_halved", "compute_dtype", "workers")},
        **busy(over_time["fractions"], over_time["seconds_apart"]),
    }


def machine(device: torch.device) -> Row:
    """What the figures belong to."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "decoder": decoder_name(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def told(row: Row) -> str:
    """A row of rates, as a line of the table."""
    start = f"{row['backbone']:<16}{row['batch_size']:>6}"
    if row["out_of_memory"]:
        return f"{start}  out of memory: {row['out_of_memory']}"
    peak = "–" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}"
    mean = "–" if row["gpu_utilisation_mean"] is None else f"{100 * row['gpu_utilisation_mean']:.0f}%"
    compiled = (
        f"{row['model_compiled']:>11,.0f} (ready in {row['compile_seconds']:.0f} s)"
        if "model_compiled" in row
        else ""
    )
    rates = "".join(f"{row[key]:>10,.1f}" for key in RATES)
    return f"{start}{rates}{row['fraction']:>10.2f}{peak:>10}{mean:>7}{compiled}"


def told_cohort(row: Row) -> str:
    start = f"{row['backbone']}: {row['patches']:,} patches of a lab's sizes"
    if row["error"]:
        return f"{start}: {row['error']}"
    mean = row["gpu_utilisation_mean"]
    used = "" if mean is None else f", the GPU was busy {100 * mean:.0f}% of the time"
    return (
        f"{start} in {row['wall_seconds']:,.1f} s of wall time, {row['patches_per_second']:,.0f} patches/s "
        f"(batch {row['batch_size']}, bound by {row['bound_by']}{used})"
    )


def bench(options: argparse.Namespace) -> Row:
    """Measure everything; print lines as they come, and keep the file up to date."""
    device = choose_device(options.device)
    result: Row = {"machine": machine(device), "options": vars(options), "rates": [], "cohort": []}

    def keep(part: str, row: Row, line: str) -> None:
        result[part].append(row)
        say(line)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            fresh = options.out / "gpu.json.new"
            fresh.write_text(json.dumps(result, indent=1, default=str) + "\n")
            fresh.replace(options.out / "gpu.json")

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    with tempfile.TemporaryDirectory(prefix="featstore-bench-") as scratch:
        folder, started = Path(scratch), time.perf_counter()
        tiles = make_tiles(
            folder / "tiles", "lab", min(options.distinct, max(options.patches, options.cohort))
        )
        name_again(tiles, folder / "rates", options.patches)
        name_again(tiles, folder / "cohort", options.cohort)
        about = result["machine"]
        about["making_files_seconds"] = time.perf_counter() - started
        about["distinct_files"] = len(tiles)
        about["bytes_a_file"] = statistics.fmean(tile.stat().st_size for tile in tiles)
        say(
            f"{about['device']}, {about['cores']} cores, PyTorch {about['torch']}, {options.amp}; "
            f"{options.patches:,} patches, {options.rounds} rounds; files made in "
            f"{about['making_files_seconds']:.0f} s\n"
            f"{'patches a second':<16}{'batch':>6}"
            + "".join(f"{key:>10}" for key in RATES)
            + f"{'fraction':>10}"
            f"{'peak GiB':>10}{'busy':>7}{'  compiled' * options.compile}   (goal: fraction >= {GOAL:.2f})"
        )
        for name in options.backbones:
            for batch_size in options.batch_sizes:
                row = measure(options, name, batch_size, folder / "rates")
                keep("rates", row, told(row))
                release(device)
        for name in options.backbones if options.cohort else ():
            row = whole_cohort(options, name, folder / "cohort")
            keep("cohort", row, told_cohort(row))
    return result


def release(device: torch.device) -> None:
    """Give memory back to the device: another batch size, or another process, is to find it free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda[:N] | cpu")
    parser.add_argument("--backbones", nargs="+", default=["densenet121", "resnet50"], metavar="NAME")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[64, 128, 256, 512, 1024], metavar="N"
    )
    parser.add_argument("--amp", choices=["bf16", "fp16", "off"], default="bf16")
    parser.add_argument("--size", type=int, default=224, help="side in px that patches are resized to")
    parser.add_argument("--patches", type=int, default=8_192, help="for the rates")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cohort", type=int, default=64_526, help="patches of the cohort; 0: none")
    parser.add_argument("--distinct", type=int, default=2_048, help="different files among them")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--json", action="store_true", help="print the results as JSON; lines go to stderr")
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a cohort was not extracted, 2 if there is no such device."""
    options = parse(arguments)
    try:
        result = bench(options)
    except FeatstoreError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(result, indent=1, default=str))
    return int(any(row["error"] for row in result["cohort"]))


if __name__ == "__main__":
    sys.exit(main())
