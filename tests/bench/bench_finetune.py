"""Fine-tuning: what it brings on real tissue, what a step costs, how much memory it takes.

    python -m tests.bench.bench_finetune --tissue     crchisto: frozen, fine-tuned, cached again
    python -m tests.bench.bench_finetune --step       a step against bare forward + backward, and decoding
    python -m tests.bench.bench_finetune --memory     peak memory at 200 and at 2,000 patches a case
    python -m tests.bench.bench_finetune --step --device cuda     the same on a GPU: patches a second

Every figure is printed with what it was measured on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore.backbones import build_backbone, normalize
from featstore.bags import Bag, collate
from featstore.cohort.splits import Split, make_splits, save_split
from featstore.config import BackboneConfig, FeatstoreConfig
from featstore.patch_pixels import PatchPixels
from featstore.process import keep_freed_memory, usable_cores
from heads.config import Config, FinetuneConfig, HeadConfig, TrainConfig, resolved
from heads.evaluation.metrics import rank_auc
from heads.finetune import finetune_project
from heads.models.head import build_head
from heads.project import train_project
from heads.training.finetune import FineTuning
from heads.training.finetune_model import training_config
from heads.training.live import LiveBackbone
from heads.training.live_bags import LiveBags
from heads.training.optimizer import autocast, choose_amp
from tests import helpers

RESNET18 = "timm:resnet18"


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("tissue", "step", "memory"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="--tissue: other settings, KEY=VALUE")
    parser.add_argument("--out", type=Path, help="write the figures of --step to this JSON file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a child of --memory
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(peak_of(given.folder)))
        return
    TUNING.update({key: json.loads(value) for key, _, value in (text.partition("=") for text in given.set)})
    if given.tissue:
        tissue(given.seeds)
    if given.step:
        found = [step(*case, given.device) for case in cases_for(given.device)]
        found.append(epoch(given.device))
        if given.out:
            given.out.write_text(json.dumps(found, indent=2))
    if given.memory:
        memory()


# What fine-tuning of random weights needs: statistics of its own, and rates that move it.
TUNING: dict[str, Any] = {
    "unfreeze": "all",
    "batch_norm": "train",
    "backbone_lr": 3e-5,
    "batch_size": 4,
    "chunk": 128,
    "epochs": 20,
    "patience": 5,
    "patches_per_case": 128,
    "ema_decay": 0.9,
}


def tissue(seeds: int) -> None:
    """Frozen, fine-tuned, and a head trained anew on the fine-tuned cache, on one split of crchisto."""
    data = helpers.shared_data()
    if data is None:
        sys.exit("no shared data: FEATSTORE_SHARED_DATA")
    print(f"crchisto, {RESNET18} with random weights, ABMIL; {TUNING}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        labels = _labels(data / "crchisto" / "labels.csv")
        (split,) = make_splits(labels, {}, None, 42, ["negative", "positive"])
        # Of 48 cases a fifth would be ten to test on: 24 to train on, 8 and 16.
        moved = split.train[::5][:5]
        split = Split(
            tuple(c for c in split.train if c not in moved),
            split.val[:8],
            (*split.test, *split.val[8:], *moved),
        )
        save_split(project / "split.npz", split)
        found: dict[str, list[np.ndarray]] = {"frozen": [], "fine-tuned": [], "cached again": []}
        truth = np.array([labels[case] for case in _test_cases(split)])
        for seed in range(seeds):
            for kind, probabilities in one_seed(data / "crchisto", project, seed).items():
                found[kind].append(probabilities)
                print(
                    f"seed {seed} {kind:12} test AUC {rank_auc(truth, _two(probabilities)):.3f}", flush=True
                )
        summary(found, truth)


def _labels(path: Path) -> dict[str, int]:
    rows = [line.split(",") for line in path.read_text().split()[1:]]
    return {str(int(case)): int(label) for case, label in rows}


def _test_cases(split: Split) -> list[str]:
    return sorted(split.test, key=int)


def _two(positive: np.ndarray) -> np.ndarray:
    return np.stack((1 - positive, positive), 1)


def one_seed(data: Path, project: Path, seed: int) -> dict[str, np.ndarray]:
    """Probabilities of the test cases, in order, by what made them."""
    from featstore.extraction import extract

    def config(**sections: Any) -> Config:
        known: dict[str, Any] = {
            "patches": {"folder": str(data / "patches")},
            "labels": {"file": str(data / "labels.csv"), "case_column": "case_id", "class_column": "label"},
            "classes": {"negative": ["0"], "positive": ["1"]},
            "backbone": {"name": RESNET18, "weights": f"random:{seed}", "resize": 32},
            "store": {"path": f"store{seed}"},
            "head": {"name": "abmil"},
            "train": {"seed": seed, "load_splits": "split.npz"},
            "runs": {"path": f"runs{seed}", "resamples": 0},
            "finetune": {**TUNING, "seed": seed},
        }
        return Config(**{**known, **sections})

    first = config()
    extract(first, project)
    frozen = train_project(first, project)
    began = time.perf_counter()
    tuned = finetune_project(first, project, frozen.run.path, observe=_show)
    assert tuned is not None
    seconds, best = time.perf_counter() - began, tuned.evaluation.best_epoch
    print(f"seed {seed} fine-tuned in {seconds:.0f} s, best epoch {best}")
    second = config(backbone={"name": tuned.export}, store={"path": tuned.store})
    extract(second, project)
    again = train_project(second, project)
    runs = {"frozen": frozen.run.path, "fine-tuned": tuned.run.path, "cached again": again.run.path}
    return {kind: _probabilities(path) for kind, path in runs.items()}


def _show(progress: Any, epochs: int) -> None:
    print(f"  {progress.to_text(epochs)}", flush=True)


def _probabilities(run: Path) -> np.ndarray:
    test = json.loads((run / "results.json").read_text())["test"]
    order = np.argsort([int(case) for case in test["case_ids"]])
    return np.array(test["prediction_probs"])[order, 1]


def summary(found: dict[str, list[np.ndarray]], truth: np.ndarray, resamples: int = 4000) -> None:
    """Mean AUC over the seeds with a bootstrap interval over cases, and paired differences."""
    rng = np.random.default_rng(0)
    draws = [
        d for d in rng.integers(len(truth), size=(resamples, len(truth))) if 0 < truth[d].sum() < len(d)
    ]

    def aucs(kind: str) -> tuple[float, np.ndarray]:
        def mean(chosen: np.ndarray) -> float:
            return float(np.mean([rank_auc(truth[chosen], _two(p[chosen])) for p in found[kind]]))

        return mean(np.arange(len(truth))), np.array([mean(d) for d in draws])

    print(f"{len(truth)} test cases, {len(found['frozen'])} seeds, bootstrap over cases")
    known = {kind: aucs(kind) for kind in found}
    for kind, (value, spread) in known.items():
        low, high = np.quantile(spread, (0.025, 0.975))
        print(f"  {kind:12} AUC {value:.3f} [{low:.3f}, {high:.3f}]")
    for a, b in (("fine-tuned", "frozen"), ("cached again", "fine-tuned")):
        spread = known[a][1] - known[b][1]
        low, high = np.quantile(spread, (0.025, 0.975))
        print(f"  {a} − {b}: {known[a][0] - known[b][0]:+.3f} [{low:+.3f}, {high:+.3f}]")


def cases_for(device: str) -> list[tuple[str, int, int, str]]:
    """Backbone, size in px, patches and precision of the steps that are timed."""
    if device != "cpu":
        return [
            (RESNET18, 224, 512, "bf16"),
            ("resnet50", 224, 256, "bf16"),
            ("densenet121", 224, 256, "bf16"),
        ]
    return [(RESNET18, 64, 128, "off"), (RESNET18, 64, 128, "bf16"), ("resnet50", 224, 16, "bf16")]


class HeldPixels(PatchPixels):
    """Pixels that are decoded already."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.changed = pixels, set()

    def size_of(self, rows: np.ndarray) -> np.ndarray:
        return np.tile(self.pixels.shape[1:3], (len(rows), 1))

    def read(self, chunks: Any) -> Iterator[np.ndarray]:
        for chunk in chunks:
            yield self.pixels[chunk.rows]


def make_training(
    backbone_config: BackboneConfig,
    device: str,
    amp: str,
    bags: dict[str, Bag],
    pixels: Any,
    **settings: Any,
) -> FineTuning:
    """A fine-tuning of all of a backbone under ABMIL, of bags that are made up."""
    backbone = build_backbone(backbone_config, Path())
    config = resolved(Config(head=HeadConfig(name="abmil"), train=TrainConfig(device=device)))
    head = build_head(config.head, backbone.dim, 2, 0)
    where = torch.device(device)
    tuning = FinetuneConfig(**{"unfreeze": "all", "amp": amp, "device": device, **settings})
    chunk = settings.get("chunk", 16)
    live = LiveBackbone(backbone, where, choose_amp(tuning.amp, where), int(chunk))
    source = LiveBags.__new__(LiveBags)
    source.live, source.pixels, source.device, source.outlines = live, pixels, where, bags
    cases = tuple(bags)
    split = Split(train=cases, val=cases[:1], test=())
    train = training_config(config.train, tuning)
    return FineTuning(head, backbone, source, split, train, tuning, ("a", "b"))


def made_up_bags(count: int, patches: int) -> dict[str, Bag]:
    """Cases of one slice each, whose rows follow one another."""
    one = np.ones(1, np.int64)

    def bag(i: int) -> Bag:
        rows = np.arange(i * patches, (i + 1) * patches)
        none = np.empty((patches, 0), np.float16)
        return Bag(str(i), none, rows, rows, ("s",), one * patches, ("h&e",), one, one * 0, i % 2)

    return {str(i): bag(i) for i in range(count)}


def step(name: str, size: int, patches: int, amp: str, device: str) -> dict[str, Any]:
    """A whole step (one case, no recomputation) against bare forward and backward on the same tensors."""
    keep_freed_memory()
    pixels = np.random.default_rng(0).integers(0, 256, (2 * patches, size, size, 3), np.uint8)
    backbone = BackboneConfig(name=name, weights="random:0", resize=size)
    bags = made_up_bags(2, patches)
    training = make_training(
        backbone, device, amp, bags, HeldPixels(pixels), chunk=patches, patches_per_case=None, augment=False
    )  # fmt: skip
    training.model.train()
    live, where = training.live, torch.device(device)
    x = normalize(
        live.upload(pixels[:patches]), live.preprocessing.mean, live.preprocessing.std, live.dtype
    )
    batch = collate([bags["0"]]).to(where)
    label = torch.zeros(1, dtype=torch.int64, device=where)

    def bare() -> None:
        training.model.zero_grad(set_to_none=True)
        with autocast(where, training.config.amp):
            features = live.module(x)
            logits = training.model.head(replace(batch, features=features.to(live.dtype))).logits
        torch.nn.functional.cross_entropy(logits.float(), label).backward()

    def ours() -> None:
        plan = training.plan([bags["0"]])
        asked = (chunk for _, sight in plan for chunk in sight.requests())
        _, loss = training.accumulate(plan, 1, training.bags.pixels.read(asked))
        training.update(loss)

    times = {"bare": [], "ours": []}
    for round_ in range(4 if device == "cpu" else 20):
        for kind, function in (("bare", bare), ("ours", ours)):
            with timed(where) as clock:
                function()
            if round_:
                times[kind].append(clock[0])
    low = {kind: min(values) for kind, values in times.items()}
    ratio = float(np.median(np.array(times["ours"]) / np.array(times["bare"])))
    rate = patches / low["ours"]
    print(
        f"{name} {size} px, {patches} patches, {amp}, {device}: bare {low['bare'] * 1e3:.0f} ms, step "
        f"{low['ours'] * 1e3:.0f} ms, {ratio:.2f} × (median of pairs), {rate:,.0f} patches/s",
        flush=True,
    )
    return {
        "backbone": name,
        "size": size,
        "patches": patches,
        "amp": amp,
        "ratio": ratio,
        "patches_s": rate,
    }


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Seconds of a block, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock: list[float] = []
    began = time.perf_counter()
    yield clock
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock.append(time.perf_counter() - began)


def epoch(device: str) -> dict[str, Any]:
    """An epoch with decoding and augmentation: what share of it is spent waiting for pixels."""
    size, patches = (64, 256) if device == "cpu" else (224, 2048)
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name), cases=4, patches=patches, size=size)
        backbone = BackboneConfig(name=RESNET18, weights="random:0", resize=size)
        seen = build_backbone(backbone, Path()).preprocessing
        images = FeatstoreConfig().images
        pixels = PatchPixels(store.table(), Path(name) / "patches", images, seen, usable_cores())
        bags = {c: replace(store.outline(c), label=i % 2) for i, c in enumerate(store.cases())}
        training = make_training(
            backbone, device, "auto", bags, pixels, chunk=64 if device == "cpu" else 512,
            patches_per_case=None, epochs=1,
        )  # fmt: skip
        began = time.perf_counter()
        training.run()
        seconds = time.perf_counter() - began
        share = pixels.waited / seconds
    print(
        f"an epoch of {RESNET18} at {size} px with decoding, augmentation and two passes, {device}: "
        f"{100 * share:.1f}% of it waiting for pixels",
        flush=True,
    )
    return {"epoch": RESNET18, "waiting": share}


def make_store(folder: Path, cases: int, patches: int, size: int) -> Any:
    """PNGs of noise and a store of them."""
    from featstore.extraction import extract
    from featstore.store import Store

    helpers.make_cohort(
        folder / "patches", cases=cases, stains=("h&e",), slices=1, patches=patches, size=size
    )
    config = FeatstoreConfig(
        backbone={"name": RESNET18, "weights": "random:0", "resize": size},  # type: ignore[arg-type]
        extract={"device": "cpu", "runtime": "torch"},  # type: ignore[arg-type]
    )
    extract(config, folder)
    return Store.open(folder / "store")


def memory() -> None:
    """Peak resident size of a whole fine-tuning, at 200 and at 2,000 patches a case."""
    found = {}
    for patches in (200, 2000):
        folder = Path(tempfile.mkdtemp())
        try:
            make_store(folder, cases=5, patches=patches, size=64)
            command = [
                sys.executable,
                "-m",
                "tests.bench.bench_finetune",
                "--one",
                str(patches),
                "--folder",
            ]
            done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
            found[patches] = json.loads(done.stdout.splitlines()[-1])
        finally:
            shutil.rmtree(folder)
        print(
            f"{patches:5} patches a case, 64 px, {RESNET18}, all of it learning: {found[patches]}",
            flush=True,
        )
    for what in ("peak_mb", "peak_gpu_mb"):
        if found[200].get(what):
            print(f"  {what}: {found[2000][what] / found[200][what]:.3f} ×")


def peak_of(folder: Path) -> dict[str, float]:
    """Fine-tune a project that `make_store` made; the most memory that this process had."""
    import resource

    (folder / "labels.csv").write_text(
        "Case,Class\n" + "".join(f"{i},{'13'[i % 2]}\n" for i in range(1, 6))
    )
    save_split(folder / "split.npz", Split(("1", "2", "3"), ("4",), ("5",)))
    config = Config(
        patches={"folder": "patches"}, labels={"file": "labels.csv"}, classes={"a": ["1"], "b": ["3"]},
        backbone={"name": RESNET18, "weights": "random:0", "resize": 64}, head={"name": "abmil"},
        train={"epochs": 1, "load_splits": "split.npz"}, runs={"resamples": 0},
        finetune={"unfreeze": "all", "epochs": 1, "patches_per_case": None, "chunk": 64},
    )  # type: ignore[arg-type] # fmt: skip
    run = train_project(config, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    finetune_project(config, folder, run.run.path)
    found = {"before_mb": before, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        found["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in found.items()}


if __name__ == "__main__":
    main()
