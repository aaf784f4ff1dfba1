"""Features of KimiaNet's kind against plain torchvision: each patch alone, at its own size, in float32.

What extracts here runs in a process of its own, which this file starts: one that has used OpenVINO has
its thread pool, and children that are forked from it later crash.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from featstore.backbones import build_backbone
from featstore.config import BackboneConfig
from featstore.extraction.forward import FOLDED, choose_compute_dtype, make_embedder
from featstore.store import Store
from tests import helpers
from tests.bench.tissue_tiles import sides, sources
from tests.command_line import write_config
from tests.extraction.runtimes import tissue
from tests.extraction.test_extract import run
from tests.extraction.test_native import features_by_path

Sizes = list[tuple[int, int]]
Way = tuple[str, str, str]  # kind of cohort, runtime, precision

CPU = torch.device("cpu")
KIMIANET = {"name": "densenet121", "weights": "random:0", "final_relu": False}
# Below 61 px the last feature map has one row, which both rows of the grid then share.
KINDS, POOL, SMALLEST = ("equal", "native", "small"), 2, 61
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision documents them
PRECISIONS = {"float32": "off", "bfloat16": "bf16"}
# What was asked for: the length of the error relative to that of the features.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
ALL: list[Way] = list(product(KINDS, ("torch", "openvino"), PRECISIONS))
# Kernels for new sizes cost seconds, so here is each runtime once, and each precision.
FEW: list[Way] = [("native", "torch", "float32"), ("native", "openvino", "bfloat16")]
# Of 97 px the last feature map has three rows, of which both cells have the one in the middle.
FEW_SIZES = {"native": [(61, 61), (97, 64), (97, 64)]}
ALL_SIZES = {
    "equal": [(224, 224)] * 24,
    "native": [
        *((int(side), int(side)) for side in sides("lab", 16).clip(SMALLEST)),
        *((61, 61), (61, 97), (97, 61), (61, 600), (333, 217), (127, 129), (63, 65), (64, 64)),
        *((224, 224), (224, 224), (224, 224)),
    ],
    "small": [(50, 50), (50, 50), (50, 97), (97, 50), (50, 600), (51, 53)],
}


def computable(ways: list[Way]) -> list[Way]:
    """Those for which this machine has the package and the precision."""
    return [
        (kind, runtime, precision)
        for kind, runtime, precision in ways
        if (runtime == "torch" or importlib.util.find_spec("openvino") is not None)
        and (precision == "float32" or choose_compute_dtype("auto", CPU, None) == precision)
    ]


def each(ways: list[Way]) -> pytest.MarkDecorator:
    """A test for every way; what cannot be computed here is skipped."""
    unfit = pytest.mark.skip(reason="needs the package openvino, or a CPU with bfloat16")
    here = computable(ways)
    cases = [pytest.param(*way, marks=() if way in here else unfit, id="-".join(way[::-1])) for way in ways]
    return pytest.mark.parametrize(("kind", "runtime", "precision"), cases)


def make_tissue(folder: Path, kind: str, sizes: Sizes) -> None:
    """A project of real tissue, patches of these heights and widths, with KimiaNet's settings."""
    images, rng = sources(), np.random.default_rng(0)
    (folder / "patches").mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        image = images[number % len(images)]
        more = ((0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1])), (0, 0))
        image = np.pad(image, more, mode="symmetric")
        top, left = (
            int(rng.integers(whole - part + 1))
            for whole, part in zip(image.shape, (height, width), strict=False)
        )
        file = folder / "patches" / helpers.patch_name("1", "match_1", "h&e", number)
        Image.fromarray(image[top : top + height, left : left + width]).save(file)
    backbone = {**KIMIANET, "pool": POOL, "resize": sizes[0][0] if kind == "equal" else "native"}
    write_config(folder, {"backbone": backbone, "extract": {"dtype": "float32", "batch_size": "auto"}})


class Cohort:
    """Projects of tissue, whose stores are made all together where the first is asked for."""

    def __init__(self, folder: Path, sizes: dict[str, Sizes], ways: list[Way]) -> None:
        self.folder = folder
        self.ways = computable(ways)
        for kind in sizes:
            make_tissue(folder / kind, kind, sizes[kind])

    @cache  # noqa: B019 - lives as long as the tests do
    def _expected(self, kind: str) -> dict[str, np.ndarray]:
        body = plain_body()
        return {file.name: alone(body, file, POOL) for file in (self.folder / kind / "patches").iterdir()}

    def errors(self, kind: str, runtime: str, precision: str) -> dict[str, float]:
        """Relative error of every patch, by its name."""
        store = self.folder / kind / f"{runtime}_{precision}"
        if not store.exists():
            extract_apart(self.folder, self.ways)
        found, expected = features_by_path(store), self._expected(kind)
        spec = Store.open(store).spec
        assert (spec.compute_dtype, spec.stored_dtype) == (precision, "float32")
        assert spec.runtime == ("torch, folded" if runtime == "torch" else runtime)
        assert found.keys() == expected.keys()
        return {
            path: float(np.linalg.norm(found[path] - want) / np.linalg.norm(want))
            for path, want in expected.items()
        }


def plain_body() -> torch.nn.Module:
    """torchvision's own network with the weights `random:0`: images to the last maps, before any ReLU."""
    weights = build_backbone(BackboneConfig(**KIMIANET, resize=64), Path()).module.body.state_dict()
    network = torchvision.models.densenet121(weights=None)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["classifier.weight", "classifier.bias"], [])
    return network.features.eval()


@torch.inference_mode()
def alone(body: torch.nn.Module, file: Path, pool: int) -> np.ndarray:
    """Features (1024 · pool²,) of one file: channel by channel, row by row."""
    pixels = np.asarray(Image.open(file).convert("RGB"), np.float64)
    normalised = (pixels / 255 - MEAN) / STD
    maps = body(torch.from_numpy(normalised.astype(np.float32)).permute(2, 0, 1)[None].contiguous())[0]
    down, right = (cells(length, pool) for length in maps.shape[1:])
    means = [maps[:, rows, columns].mean(dim=(1, 2)) for rows, columns in product(down, right)]
    return torch.stack(means, dim=1).flatten().numpy()


def cells(length: int, pool: int) -> list[slice]:
    """Equal parts; a row that belongs to two of them is in both."""
    return [slice(i * length // pool, math.ceil((i + 1) * length / pool)) for i in range(pool)]


def extract_apart(folder: Path, ways: list[Way]) -> None:
    """Fill the stores in a process of its own."""
    command = [sys.executable, "-m", "tests.extraction.test_fidelity", str(folder), json.dumps(ways)]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def extract_here(folder: Path, ways: list[Way]) -> None:
    """What that process does."""
    for kind, runtime, precision in ways:
        settings = {"extract__runtime": runtime, "extract__amp": PRECISIONS[precision]}
        run(folder / kind, **settings, store__path=f"{runtime}_{precision}")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("few"), FEW_SIZES, FEW)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("many"), ALL_SIZES, ALL)


@each(FEW)
def test_every_patch_has_the_features_that_torchvision_gives_it_alone(
    few: Cohort, kind: str, runtime: str, precision: str
) -> None:
    errors = few.errors(kind, runtime, precision)
    assert max(errors.values()) <= TOLERANCE[precision], json.dumps(errors, indent=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each(ALL)
def test_so_it_is_with_patches_of_all_sizes(many: Cohort, kind: str, runtime: str, precision: str) -> None:
    errors = many.errors(kind, runtime, precision)
    least, most = min(errors.values()), max(errors.values())
    print(f"\n{kind}, {runtime}, {precision}: errors of {least:.1e} to {most:.1e}")
    assert most <= TOLERANCE[precision], json.dumps(errors, indent=1)


if __name__ == "__main__":
    extract_here(Path(sys.argv[1]), json.loads(sys.argv[2]))


@pytest.mark.skipif(choose_compute_dtype("auto", CPU, None) != "bfloat16", reason="a CPU without bfloat16")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "resnet50"])
@pytest.mark.parametrize("side", [32, 40, 64])
def test_in_bfloat16_real_networks_compute_small_patches_as_if_alone(side: int, name: str) -> None:
    """Kernels are chosen by the number of patches, and where maps are small they round differently."""
    backbone = build_backbone(BackboneConfig(name=name, weights="random:0", resize="native"), Path())
    made = make_embedder(backbone, CPU, "bfloat16", "float32", 16, FOLDED, False)
    pixels = tissue(96, side, side)
    together = made(pixels).result()
    for row, picture in enumerate(pixels):
        assert made(picture[None]).result()[0].tobytes() == together[row].tobytes(), row
