"""What soft selection, annealing and the penalties on attention change, on 48 colon cases.

    OMP_NUM_THREADS=1 python tests/bench/bench_stability.py --data CRCHISTO_FOLDER --work WORK_FOLDER

The seed documents claim for soft selection with annealing, against an arg max: variance of the batches'
losses 10 to 50 times lower, fluctuation of the validation AUC ±0.05 where it was ±0.45, AUC 2 to 3 points
higher. The protocol was written down before the first result, and nothing in it is chosen by one:

- Features (DenseNet121), folds, seeds and AUCs are those of `bench_crchisto`. Every variant differs from
  the head's defaults in what its name says alone, and is compared with the head without it.
- Selection, on `dual_stream`, all 30 epochs without early stopping, so that all curves are as long:
  `soft` is the head as it is: temperature from 10 to 1. `soft_1`: temperature 1 throughout. `hard`: the
  critical feature is that of the instance with the highest score, in training and in evaluation; the
  classifier's loss then has no gradient in the scores, only the penalty on their spread has.
  `hard_through`: the same forward, with the gradient of the softmax at temperature 1. The hard ones exist
  in this benchmark alone.
- `loss variance`: over the batches of an epoch, of the mean loss of a batch (4 cases, `bag_size` 64); the
  mean over epochs, of the whole training and of its last ten. `AUC steps`: the standard deviation of the
  differences of validation AUC (10 cases) between consecutive epochs. `largest`: the largest of them.
  All per training; shown is the mean over 15 trainings, and the ratio or difference to `soft` is paired,
  with an interval from 2,000 resamples of the trainings. Test AUC: of the best validation epoch.
- Entropy: `reg_weight_entropy` 0.01 (what dual_stream has) against 0, on gated_abmil, hierarchical and
  dual_stream. `top-1 > 0.5`: the share of test cases in which one patch has more than half of the
  effective attention, all patches looked at (6 to 696 a case); `median top-1`: of those shares.
- Elastic net: `reg_weight_l1` and `reg_weight_l2` 0.001 each against 0, on gated_abmil: the same measures.

What is finished is kept in WORK_FOLDER/trainings.jsonl, and an interrupted benchmark goes on from there.
Heads as they are by default are the trainings of `bench_crchisto`, where that has the same folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.bags import BagBatch
from featstore.cohort.splits import Split, make_splits
from featstore.resident import CaseBags
from heads.cohort import load_bags
from heads.evaluation.metrics import Estimate, interval_of, resample
from heads.models import dual_stream
from heads.models.dual_stream import DualStream
from heads.models.head import Head, build_head
from heads.models.outputs import HeadOutput
from heads.models.pooling import segment_argmax, segment_softmax
from tests.bench.bench_crchisto import Compared, Trainings, default_config, difference, head_fold, shown
from tests.bench.crchisto_peers import CLASSES, FOLDS, SPLIT_SEED, Record, prepare, read_truth

LONG: dict[str, Any] = {"patience": None}
NET = {"reg_weight_l1": 0.001, "reg_weight_l2": 0.001}
LATE, HALF, RESAMPLES = 10, 0.5, 2000
Floats = NDArray[np.float64]


class HardSelection(DualStream):
    """`DualStream` whose critical feature is that of the instance with the highest score."""

    through = False

    def forward(self, batch: BagBatch, temperature: float = 1.0, **schedule: float) -> HeadOutput:
        """As the head, which asks for the selection's softmax first and for the attention's second."""
        steps = iter((self.select, segment_softmax))
        with mock.patch.object(dual_stream, "segment_softmax", lambda z, offsets: next(steps)(z, offsets)):
            return super().forward(batch, 1.0, **schedule)

    def select(self, scores: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """1 for the highest of every segment, 0 for the others."""
        one = torch.zeros_like(scores).index_fill(0, segment_argmax(scores, offsets), 1.0)
        if not self.through:
            return one
        soft = segment_softmax(scores, offsets)
        return one + soft - soft.detach()


class HardThrough(HardSelection):
    """`HardSelection` with the gradient of a softmax."""

    through = True


# By name: the head, its class if it is none of featstore's, its selection's first temperature, settings.
Variant = tuple[str, type[DualStream] | None, float | None, dict[str, Any]]
SELECTION: dict[str, Variant] = {
    "soft": ("dual_stream", None, None, LONG),
    "soft_1": ("dual_stream", None, 1.0, LONG),
    "hard": ("dual_stream", HardSelection, None, LONG),
    "hard_through": ("dual_stream", HardThrough, None, LONG),
}
PENALTIES: dict[str, tuple[Variant, Variant]] = {
    "entropy gated_abmil": (
        ("gated_abmil", None, None, {"reg_weight_entropy": 0.01}),
        ("gated_abmil", None, None, {}),
    ),
    "entropy hierarchical": (
        ("hierarchical", None, None, {"reg_weight_entropy": 0.01}),
        ("hierarchical", None, None, {}),
    ),
    "entropy dual_stream": (
        ("dual_stream", None, None, {}),
        ("dual_stream", None, None, {"reg_weight_entropy": 0.0}),
    ),
    "elastic net gated_abmil": (("gated_abmil", None, None, NET), ("gated_abmil", None, None, {})),
}


def train_variant(
    variant: Variant, bags: CaseBags, split: Split, seed: int, truth: Mapping[str, Any]
) -> Record:
    """One variant on one fold, as `bench_crchisto.head_fold`."""
    name, kind, temperature, settings = variant
    config = default_config(name, seed, **settings)
    if temperature is not None:
        own = config.head.model_copy(update={"temperature_start": temperature})
        config = config.model_copy(update={"head": own})
    head: Head = build_head(config.head, bags.store.spec.dim, len(CLASSES), seed)
    if kind is not None:
        head.__class__ = kind  # the same weights from the same seed, another forward
    return head_fold(config, bags, split, truth, head)


def fluctuation(record: Record) -> dict[str, float]:
    """Of one training: loss variances, and steps of the validation AUC."""
    variance, auc = record["curves"]["train_batch_loss_variance"], record["curves"]["val_auc"]
    steps = np.diff(auc)
    return {
        "loss variance": statistics.mean(variance),
        "loss variance, last": statistics.mean(variance[-LATE:]),
        "AUC steps": float(np.std(steps)),
        "largest": float(np.abs(steps).max()),
    }


def paired(first: Floats, second: Floats, value: Callable[[Floats, Floats], Floats]) -> Estimate:
    """A number of two means over the same trainings, (R,) and (R,), with its interval."""
    weights = resample(np.random.default_rng(0), RESAMPLES, len(first))
    point = value(first.mean(keepdims=True), second.mean(keepdims=True))
    drawn = value(weights @ first / len(first), weights @ second / len(second))
    return interval_of(float(point[0]), [drawn], [])


def ratio(first: Floats, second: Floats) -> Floats:
    """How many times the second the first is."""
    return first / second


def times(found: Estimate) -> str:
    """`1.50 × [0.90, 2.10]`."""
    if found.value is None or found.low is None or found.high is None:
        return found.reason if found.value is None else f"{found.value:.2f} × [none]"
    return f"{found.value:.2f} × [{found.low:.2f}, {found.high:.2f}]"


def concentration(records: Sequence[Record]) -> dict[str, float]:
    """Of the test cases of all trainings, how much of the attention one patch has."""
    top = [value for record in records for value in record["top1"].values()]
    share = statistics.mean(value > HALF for value in top)
    return {"top-1 > 0.5": share, "median top-1": statistics.median(top)}


def print_selection(found: Mapping[str, list[list[Record]]], compared: Compared) -> None:
    """Every variant, and what it is against `soft`."""
    first = {
        name: [fluctuation(record) for seed in each for record in seed] for name, each in found.items()
    }
    measures = {name: compared.measures(each) for name, each in found.items()}
    for name, rows in first.items():
        reached = {key: float(measures[name][key][0]) for key in ("folds", "attention")}
        print(f"\n{name}: test AUC {reached['folds']:.3f}, of patches {reached['attention']:.3f}")
        if name != "soft":
            for key in ("folds", "pooled", "log_loss", "attention"):
                print(f"  {key:<22}− soft: {shown(difference(measures[name][key], measures['soft'][key]))}")
        for key in rows[0]:
            mine, soft = (np.array([row[key] for row in each]) for each in (rows, first["soft"]))
            against = "" if name == "soft" else f"  {times(paired(mine, soft, ratio))} soft"
            print(f"  {key:<22}{mine.mean():.4f}{against}")


def print_penalty(name: str, on: list[list[Record]], off: list[list[Record]], compared: Compared) -> None:
    """With and without the penalty, and the difference in test AUC."""
    print(f"\n{name}")
    for word, each in (("with", on), ("without", off)):
        values = concentration([record for seed in each for record in seed])
        print(f"  {word:<8}" + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    measures = [compared.measures(each) for each in (on, off)]
    for key in ("folds", "pooled", "log_loss", "attention"):
        print(f"  {key:<10}{shown(difference(measures[0][key], measures[1][key]))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="crchisto, with patches/ and labels.csv")
    parser.add_argument("--work", type=Path, required=True, help="project and results: kept, used again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    options = parser.parse_args()
    trainings = Trainings(options.work / "trainings.jsonl")
    store, labels = prepare(options.work / "densenet121", options.data)
    truth, splits = read_truth(store, options.data), make_splits(labels, {}, FOLDS, SPLIT_SEED)
    bags = load_bags(default_config("mean", 0), store, labels, print)
    compared = Compared(labels, splits)

    def every(variant: Variant) -> list[list[Record]]:
        name, kind, temperature, settings = variant
        special = [kind.__name__] if kind else []
        special += [f"temperature_start={temperature:g}"] if temperature else []
        method = " ".join((name, *special, *(f"{key}={value}" for key, value in sorted(settings.items()))))

        def one(seed: int, k: int) -> Record:
            key = f"densenet121/{method}/{seed}/{k}"
            return trainings.get(key, lambda: train_variant(variant, bags, splits[k], seed, truth))

        return [[one(seed, k) for k in range(FOLDS)] for seed in options.seeds]

    print_selection({name: every(variant) for name, variant in SELECTION.items()}, compared)
    for name, (on, off) in PENALTIES.items():
        print_penalty(name, every(on), every(off), compared)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
