"""Memory does not grow with the cohort: ten times the patches, the same peak; and one giant."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featstore.extraction import pipeline
from featstore.extraction import run as run_module
from featstore.extraction.forward import Embedder
from tests import helpers
from tests.command_line import write_config
from tests.extraction.conftest import make_project
from tests.extraction.test_extract import run

MIB = 1 << 20
GIANT = 7_576
FEW, MANY = 2_000, 20_000
CASES = 8
# Starts the command and says what its peak was. The system's figure for a child begins with the peak
# of whoever started it: this is a small process, the one that runs the tests is a large one.
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the package openvino is not installed"
)


def peak(project: Path, *flags: str) -> int:
    """Bytes that `featstore extract` had in memory at most, in a process of its own."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, str(helpers.ROOT / "cli.py"), "extract"]
    done = subprocess.run([*command, *flags], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout)


def committed(project: Path) -> int:
    """What the only report in a project says."""
    (report,) = (project / "reports" / "extract" / "runs").glob("*.json")
    return int(json.loads(report.read_text(encoding="utf-8"))["committed"])


def pictures(sizes: list[tuple[int, int]]) -> list[bytes]:
    """Noise, which no codec makes small, as PNG."""
    rng, made = np.random.default_rng(0), []
    for height, width in sizes:
        file = BytesIO()
        picture = helpers.noise_patch(rng, max(height, width)).crop((0, 0, width, height))
        picture.save(file, "PNG", compress_level=1)
        made.append(file.getvalue())
    return made


def numbered(png: bytes, number: int) -> bytes:
    """The same picture in a file of its own: with a comment, in front of the last twelve bytes, IEND."""
    body = b"tEXtComment\0" + str(number).encode()
    comment = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:-12] + comment + png[-12:]


def write_cohort(folder: Path, count: int, sizes: list[tuple[int, int]]) -> None:
    """Patches of several cases; all files differ, if only by their comments."""
    folder.mkdir(parents=True)
    made = pictures(sizes)
    for number in range(count):
        name = helpers.patch_name(str(number * CASES // count), "match_1", "h&e", number)
        (folder / name).write_bytes(numbered(made[number % len(made)], number))


def measure(folder: Path, count: int, sizes: list[tuple[int, int]], **settings: Any) -> int:
    """The peak of extracting that many patches, all of which must get into the store."""
    project = folder / str(count)
    write_cohort(project / "patches", count, sizes)
    extract = {"amp": "auto", "batch_size": "auto", "runtime": settings.pop("runtime")}
    backbone = {"name": "timm:resnet18", "weights": "random:0", "resize": settings.pop("resize", 64)}
    layers = {"extract": extract, "backbone": backbone, "store": {"format": settings.pop("format", "hdf5")}}
    write_config(project, layers, {"extract": settings})
    found = peak(project)
    assert committed(project) == count
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="HDF5"),
        pytest.param({"format": "zarr"}, id="Zarr"),
        pytest.param({"views": 3}, id="three views"),
        pytest.param({"resize": "native"}, id="native sizes"),
    ],
)
@pytest.mark.parametrize("runtime", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_ten_times_the_patches_take_no_more_memory(
    tmp_path: Path, runtime: str, settings: dict[str, Any]
) -> None:
    sizes = list(product(range(40, 100, 10), repeat=2)) if settings.get("resize") else [(64, 64)] * 64
    few, many = (measure(tmp_path, n, sizes, runtime=runtime, **settings) for n in (FEW, MANY))
    print(f"\n{runtime} {settings}: {few / MIB:.0f} MiB at {FEW:,}, {many / MIB:.0f} MiB at {MANY:,}")
    assert many <= 1.1 * few


@pytest.mark.slow
def test_a_giant_takes_little_more_than_its_pixels(tmp_path: Path) -> None:
    """Decoding alone is in `test_decoders`; this is everything that is done with it."""
    pixels = GIANT * GIANT * 3
    peaks = []
    for side in (64, GIANT):
        project = tmp_path / str(side)
        helpers.make_cohort(project / "patches", cases=1, stains=("h&e",), slices=1, patches=3)
        tissue = np.tile(np.asarray(helpers.noise_patch(np.random.default_rng(0), 512)), (15, 15, 1))
        giant = Image.fromarray(tissue[:side, :side])
        giant.save(project / "patches" / helpers.patch_name("1", "match_1", "h&e", 9), compress_level=1)
        write_config(project, {"extract": {"runtime": "torch"}})
        peaks.append(peak(project))
        assert committed(project) == 4
    print(f"\na giant: {(peaks[1] - peaks[0]) / MIB:.0f} MiB more, {pixels / MIB:.0f} of them pixels")
    assert peaks[1] - peaks[0] < 2 * pixels + 100 * MIB


class AtOnce:
    """A pool whose jobs are done where they are handed in: what is under way can be counted."""

    def __init__(self, *settings: object) -> None:
        pass

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, job: Callable[..., Any], *arguments: object) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(job(*arguments))
        return done

    def shutdown(self, **settings: object) -> None:
        pass


class Counted:
    """An embedder before which decoded pixels queue up."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.waiting = 0
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.embedder, name)

    def __call__(self, pixels: np.ndarray) -> Any:
        self.most = max(self.most, self.waiting)
        self.waiting -= pixels[..., 0].size
        return self.embedder(pixels)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("resize", [32, "native"])
def test_decoding_runs_ahead_by_no_more_than_so_many_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: int | str, views: int
) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=2, patches=30, size=32)
    counted: list[Counted] = []
    make, load = run_module.make_embedder, pipeline.load

    def make_counted(*arguments: Any) -> Counted:
        counted.append(Counted(make(*arguments)))
        return counted[0]

    def load_counted(*arguments: Any) -> Any:
        loaded = load(*arguments)
        counted[0].waiting += loaded.pixels[..., 0].size
        return loaded

    monkeypatch.setattr(run_module, "make_embedder", make_counted)
    monkeypatch.setattr(pipeline, "load", load_counted)
    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", AtOnce)
    patch = 32 * 32 * views
    monkeypatch.setattr(pipeline, "_PIXELS_AHEAD", 5 * patch)
    settings = {"backbone__resize": resize, "extract__views": views, "extract__batch_size": 4}
    assert run(project, **settings, extract__workers=2).committed == 120
    (found,) = counted
    assert found.waiting == 0
    # Two batches, two patches a decoder, what is allowed beside them, and a batch that is being filled.
    assert 4 * patch < found.most <= (2 * 4 + 2 * 2 + 5 + 4) * patch
