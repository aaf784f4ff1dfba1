"""An epoch out of the store against an epoch out of one `.pt` file a patch, 4096 features.

    python tests/bench/bench_pt_files.py WORK [ROUNDS]

Twelve cases of three stains with five slices of 20 patches: the same float16 embeddings in a store and,
as a lab's scripts keep them, in 3,600 files that `torch.load` reads in every epoch. Both sides train the
same hierarchical head, one case a step; theirs is a loop of ours over batches that it puts together from
the files. Ours is measured with the embeddings in memory, and with none (`memory_gb 0`: read out of the
store in every epoch). Everything is in the page cache, all in turn in every round; medians.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.bags import collate
from featstore.cohort.splits import Split
from featstore.process import keep_freed_memory
from featstore.resident import CaseBags
from featstore.store import Slice, Store, StoreWriter
from heads.bench import epoch_of, take_turns
from heads.config import Config, TrainConfig, resolved
from heads.models.head import build_head
from heads.training.loop import Training
from heads.training.losses import cross_entropy
from heads.training.optimizer import autocast
from tests.store.builders import make_slice, make_spec

DIM, CASES, STAINS, SLICES, PATCHES = 4096, 12, 3, 5, 20


def make_store(folder: Path) -> tuple[Store, Path]:
    """The store, and the folder of the `.pt` files; both are made once."""
    files = folder / "pt"
    if (folder / "store").exists():
        return Store.open(folder / "store"), files
    files.mkdir(parents=True)
    rng, writer = np.random.default_rng(0), StoreWriter(folder / "store", make_spec(dim=DIM), {})
    for case in map(str, range(CASES)):
        slices = []
        for stain in map(str, range(STAINS)):
            for name in map(str, range(SLICES)):
                features = rng.standard_normal((PATCHES, DIM), np.float32).astype(np.float16)
                for patch, row in enumerate(features):
                    path = files / f"case_{case}_{name}_{stain}_patch{patch}.pt"
                    torch.save(torch.from_numpy(row.copy()), path)
                made = make_slice(case, stain, name, list(range(PATCHES)))
                slices.append(Slice(stain, name, {**made.columns, "features": features}))
        writer.commit(case, slices)
    return Store.open(folder / "store"), files


def ours(store: Store, memory: int | None) -> Callable[[], object]:
    """An epoch as `featstore train-head` runs it."""
    labels = {case: int(case) % 2 for case in store.cases()}
    bags, config = CaseBags(store, labels, memory=memory), resolved(Config(train=TrainConfig()))
    split = Split(tuple(labels), tuple(labels)[:2], ())
    return epoch_of(Training(build_head(config.head, DIM, 2), bags, split, config.train, ("0", "1")))


def from_files(store: Store, files: Path) -> Callable[[], object]:
    """An epoch that reads every patch's own file."""
    head = build_head(resolved(Config()).head, DIM, 2).train()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-4, weight_decay=2e-4)
    bags = [store.bag(case) for case in store.cases()]

    def read(row: int) -> torch.Tensor:
        patch = table.iloc[row]
        name = f"case_{patch.case_id}_{patch.slice_id}_{patch.stain}_patch{patch.patch}.pt"
        loaded: torch.Tensor = torch.load(files / name, weights_only=True)
        return loaded

    table = store.table()

    def epoch() -> float:
        total = 0.0
        for bag in bags:
            batch = collate([bag])
            batch.features.copy_(torch.stack([read(row) for row in bag.rows.tolist()]))
            with autocast(torch.device("cpu"), "auto"):
                logits = head(batch).logits
            loss = cross_entropy(logits, torch.tensor([int(bag.case_id) % 2])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        return total

    return epoch


def main(work: Path, rounds: int = 7) -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    store, files = make_store(work)
    runs = {
        "one .pt a patch": from_files(store, files),
        "store, in memory": ours(store, None),
        "store, read in every epoch": ours(store, 0),
    }
    seconds = take_turns(runs, torch.device("cpu"), rounds)
    theirs = seconds["one .pt a patch"]
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(theirs, times, strict=True))
        print(f"{name:<28}{statistics.median(times):>8.3f} s   {ratio:.1f} × as fast")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 7)
