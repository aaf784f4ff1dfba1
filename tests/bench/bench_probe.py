"""What probing costs, beside what cannot be left out.

    python tests/bench/bench_probe.py [cost] [many] [--patches 7500] [--rounds 9] [--heads HEAD ...]

``cost``: `probe` of one case, as multiples of the head's own forward pass in evaluation, float32, with and
without leaving patches, slices and stains out; they take turns. ``many``: `probe` of a million patches in
cases (`hierarchical`; alone, in place and attention), beside the bare matrix products of projector,
attention and classifier on the same cases, and the memory that both sizes take, each in its own process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.bags import Bag, BagBatch, collate
from featstore.process import keep_freed_memory
from heads.config import HeadConfig
from heads.inspect.probing import probe
from heads.models.head import Head, build_head

CLASSES = 2
POOLS = [f"hierarchical:{pool}" for pool in ("tanh", "gated", "multi_head", "transformer")]
STREAMS = [f"dual_stream:{kind}" for kind in ("gated", "dsmil", "cosine", "abmil")]
OTHERS = ["abmil", "gated_abmil", "clam_sb", "dsmil", "mean", "max", "linear"]
CROSSED = ["dual_stream:abmil:cross_attn", "dual_stream:gated:cross_attn"]
HEADS = [*POOLS, *STREAMS, *CROSSED, *OTHERS]


def make(name: str, dim: int) -> Head:
    """A head of the default widths."""
    name, *kinds = name.split(":")
    names = ("attention_pool",) if name == "hierarchical" else ("attention_type", "fusion_method")
    config = HeadConfig(name=name, **dict(zip(names, kinds, strict=False)))  # type: ignore[arg-type]
    head = build_head(config, dim, CLASSES, seed=0)
    if name == "linear":
        torch.nn.init.normal_(head.classifier.weight)  # type: ignore[union-attr, arg-type]
    return head.eval()


def make_case(count: int, dim: int, seed: int = 0, dtype: str = "float16") -> BagBatch:
    """Three stains of slices of about 300 patches."""
    rng = np.random.default_rng(seed)
    slices = max(3, count // 300)
    sizes = rng.multinomial(count - slices, np.full(slices, 1 / slices)) + 1
    stains = np.array([slices - 2 * (slices // 3), slices // 3, slices // 3])
    bag = Bag(
        case_id=str(seed),
        features=rng.standard_normal((count, dim), dtype=np.float32).astype(dtype),
        rows=np.arange(count),
        patches=np.arange(count),
        slices=tuple(map(str, range(slices))),
        slice_sizes=sizes,
        stains=("a", "b", "c"),
        stain_sizes=stains,
        stain_ids=np.arange(3),
    )
    return collate([bag])


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def cost(arguments: argparse.Namespace) -> None:
    """Each head's probe over its forward pass."""
    batch = make_case(arguments.patches, arguments.dim)
    print(f"\none case of {arguments.patches} patches, {arguments.dim} features, float32")
    print(f"{'':32}{'forward, ms':>12}{'probe':>10}{'left out':>10}{'ratio':>8}{'ratio':>8}")
    for name in arguments.heads:
        head = make(name, arguments.dim)

        @torch.no_grad()
        def forward(head: Head = head) -> object:
            return head(batch)

        found = medians(
            {
                "forward": forward,
                "probe": lambda head=head: probe(head, batch, False),  # type: ignore[misc]
                "out": lambda head=head: probe(head, batch),  # type: ignore[misc]
            },
            arguments.rounds,
        )
        milliseconds = "".join(
            f"{1000 * found[way]:{width}.1f}" for way, width in zip(found, (12, 10, 10), strict=True)
        )
        ratios = "".join(f"{found[way] / found['forward']:8.2f}" for way in ("probe", "out"))
        print(f"{name:32}{milliseconds}{ratios}", flush=True)


@torch.no_grad()
def products(head: Head, x: torch.Tensor) -> None:
    """The bare matrix products of float32 features: the least that alone, in place and attention take."""
    h = x @ head.projector.weight.T  # type: ignore[operator, union-attr]
    hidden = h @ head.pools["patch"].value.weight.T  # type: ignore[index, union-attr, operator]
    _ = hidden @ head.pools["patch"].weight.weight.T, h @ head.classifier.weight.T  # type: ignore[index, union-attr, operator]


def many_of(count: int, size: int, dim: int) -> None:
    """In a process of its own, for the memory that it takes: cases come one by one, off four tables."""
    keep_freed_memory()
    head = make("hierarchical", dim)
    tables = [make_case(size, dim, seed) for seed in range(4)]
    ours = bare = widening = 0.0
    for turn in range(-1, count // size):
        batch = tables[turn % 4]
        started = time.perf_counter()
        probe(head, batch, leave_out=False)
        between = time.perf_counter()
        x = batch.features.float()
        widened = time.perf_counter()
        products(head, x)
        ended = time.perf_counter()
        del x
        if turn >= 0:
            ours, bare = ours + between - started, bare + ended - widened
            widening += widened - between
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{count:>10}{ours:10.1f}{bare:10.1f}{widening:10.1f}{ours / bare:8.2f}"
        f"{count / ours:12.0f}{peak:10.0f}",
        flush=True,
    )


def many(arguments: argparse.Namespace) -> None:
    """Probing of more and more patches."""
    print(f"\nhierarchical, cases of {arguments.patches} patches, {arguments.dim} features in float16")
    print(
        f"{'patches':>10}{'probe, s':>10}{'bare, s':>10}{'widen, s':>10}{'ratio':>8}"
        f"{'patches/s':>12}{'peak, MB':>10}"
    )
    spawn = multiprocessing.get_context("spawn")
    for count in arguments.counts:
        process = spawn.Process(target=many_of, args=(count, arguments.patches, arguments.dim))
        process.start()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", help="cost, many; by default both")
    parser.add_argument("--patches", type=int, default=7500)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", nargs="+", default=HEADS)
    parser.add_argument("--counts", nargs="+", type=int, default=[100_000, 1_000_000])
    arguments = parser.parse_args()
    parts = {"cost": cost, "many": many}
    if not set(arguments.what) <= set(parts):
        parser.error(f"{' '.join(arguments.what)}: cost, many or both are there")
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for what in arguments.what or parts:
        parts[what](arguments)


if __name__ == "__main__":
    main()
