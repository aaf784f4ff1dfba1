"""An epoch of training of a head here against the same architecture in torchmil.

    python tests/bench/bench_heads.py [ROUNDS]

46 cases of 100 to 700 patches with 1024 made-up features, one case a step, no dropout on either side.
Ours is the epoch that `featstore train-head` runs: sampling, embeddings out of float16, standardising,
loss, Adam, gradient norm, diagnostics. Theirs is a plain loop over float32 tensors that are ready:
`compute_loss`, backward, Adam. Both begin with a layer to 512 units and ReLU. In every round
everything is measured once, in turn; ratios are medians of the rounds' ratios. CLAM_SB has its instance
loss mended, as in `crchisto_peers`: with torchmil's own most runs stop.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.cohort.splits import Split
from featstore.process import keep_freed_memory
from heads.bench import DIM, LAB_TRAIN, MadeUpCases, epoch_of, take_turns
from heads.config import Config, HeadConfig, TrainConfig, resolved
from heads.models.head import build_head
from heads.training.loop import Training
from tests.bench.crchisto_peers import build_peer

LEAST, MOST = 100, 700


def ours(name: str, bags: MadeUpCases, amp: str, **settings: Any) -> Callable[[], object]:
    """An epoch of this head."""
    head = HeadConfig(name=name, dropout=0.0, **settings)
    config = resolved(Config(head=head, train=TrainConfig(amp=amp)))  # type: ignore[arg-type]
    cases = tuple(bags.outlines)
    split = Split(cases, cases[:2], ())
    return epoch_of(Training(build_head(config.head, DIM, 2), bags, split, config.train, ("0", "1")))


def theirs(model: Any, bags: MadeUpCases) -> Callable[[], object]:
    """An epoch of a model of torchmil."""
    data = [
        (bags.features(case).float()[None], torch.tensor([outline.label]))
        for case, outline in bags.outlines.items()
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=2e-4)

    def epoch() -> float:
        model.train()
        total = 0.0
        for i in torch.randperm(len(data)).tolist():
            features, label = data[i]
            _, losses = model.compute_loss(label, features)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        return total

    return epoch


def contestants(bags: MadeUpCases) -> dict[str, dict[str, Callable[[], object]]]:
    """By head: ours in float32 and bf16, and torchmil's."""
    from torchmil import models

    def first() -> nn.Module:
        return nn.Sequential(nn.Linear(DIM, 512), nn.ReLU())

    shape = (DIM,)
    peers = {
        "abmil": models.ABMIL(shape, feat_ext=first()),
        "gated_abmil": models.ABMIL(shape, gated=True, feat_ext=first()),
        "dsmil": models.DSMIL(shape, feat_ext=first()),
        "clam_sb": build_peer("torchmil_clam_sb", DIM, 0, gated=True, k_sample=8, feat_ext=first()),
        # Its own first layer is the one to 512.
        "transmil": models.TransMIL(shape, att_dim=512, n_heads=8),
    }
    found = {
        name: {
            "float32": ours(name, bags, "off"),
            "bf16": ours(name, bags, "bf16"),
            "torchmil": theirs(peer, bags),
        }
        for name, peer in peers.items()
    }
    found["transmil"]["exact"] = ours("transmil", bags, "bf16", transmil_attention="exact")
    return found


def main(rounds: int = 7) -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    sizes = np.random.default_rng(0).integers(LEAST, MOST + 1, LAB_TRAIN).tolist()
    bags = MadeUpCases(sizes, torch.device("cpu"))
    print(f"{LAB_TRAIN} cases, {sum(sizes):,} patches, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"{'head':<13}{'torchmil':>10}{'float32':>10}{'bf16':>10}{'times as fast':>30}")
    for name, runs in contestants(bags).items():
        seconds = take_turns(runs, bags.device, rounds)
        median = {each: statistics.median(times) for each, times in seconds.items()}
        ratios = {
            each: statistics.median(a / b for a, b in zip(seconds["torchmil"], times, strict=True))
            for each, times in seconds.items()
            if each != "torchmil"
        }
        shown = "   ".join(f"{each} {ratio:.2f}" for each, ratio in ratios.items())
        print(
            f"{name:<13}{median['torchmil']:>8.3f} s{median['float32']:>8.3f} s{median['bf16']:>8.3f} s"
            f"   {shown}",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
