"""Every head on MUSK1, 92 bags of 166 features, on the five times ten folds that others publish on.

    OMP_NUM_THREADS=1 python tests/bench/bench_musk.py --data MIL_FOLDER --work WORK_FOLDER

What was asked of it: `gated_abmil` at least 0.86 (Ilse et al. 2018 report 0.900 ± 0.050), and not below
torchmil's gated ABMIL under the same protocol. The protocol was written down before the first result:

- `musk1.csv` is imported into a project, as `featstore import` does it; every repetition's ten folds
  become a folder of split files, read as `train-head --load-splits` reads them: test = fold k,
  validation = fold k + 1 mod 10, training = the other eight. Features are standardised on these.
- Every head has its defaults but for what is one for all and no head's own: Adam at 5e-4, no scheduler,
  at most 50 epochs, 10 without a lower validation loss end it, and the epoch with the lowest is kept.
  `linear` has its path of penalties in 50 steps.
- The seed of training is the repetition's number, from 1.
- Declared after the first results (gated_abmil 0.854, torchmil's 0.822, both at 5e-4 with the heads' weight
  decay of 2e-4): `--tune` trains gated_abmil on the first repetition with the settings of `TRIED` and
  prints their mean lowest validation loss alone. That with the least is all heads': 5e-4, a weight decay
  of 5e-3, which are also the published ones, and a dropout of 0.25 (validation loss 0.170; dropout 0.1:
  0.181, 0.5: 0.171; weight decay 2e-4: 0.203; rate 1e-4: 0.294). With dropout 0.1 gated_abmil had 0.854
  again. The peer gets the rate and the weight decay; it has no dropout.
- `--nine`, declared after these results, and with nothing left to choose: nine folds train, as in what is
  published, with the published rate, weight decay and 100 epochs (Ilse et al. 2018); the last epoch's
  weights predict. No validation: the heads' defaults otherwise (dropout 0.1), the peer's too.
- torchmil's ABMIL, gated, with its default settings: one bag a step, the same rate, weight decay, epochs
  and patience, the same splits and seeds.
- Accuracy is that of the more probable class, the mean over the 50 folds. ±: the standard deviation over
  the five repetitions of their means, and over all 50 folds. The difference to torchmil is that of the
  bags' mean over the repetitions, its interval from 2,000 resamples of the bags.

What is finished is kept in WORK_FOLDER/trainings.jsonl, and an interrupted benchmark goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.cohort.names import natural_sorted
from featstore.cohort.splits import Split, write_splits
from featstore.interop.project import import_project
from featstore.resident import CaseBags
from featstore.store import Store
from heads.cohort import labelled_cases, load_bags
from heads.config import Config
from heads.evaluation.metrics import Estimate, interval_of, resample
from heads.splits import read_folds
from tests.bench.bench_crchisto import FLAT, Trainings, default_config, head_fold, shown
from tests.bench.crchisto_peers import CLASSES, Protocol, Record, ask, build_peer, fit, standardised

HEADS = (*FLAT, "hierarchical")
PEER = "torchmil_gated_abmil"
FIRST, WANTED = "gated_abmil", 0.86
EPOCHS, PATIENCE, NINE_EPOCHS = 50, 10, 100
LR, WEIGHT_DECAY, DROPOUT = 5e-4, 5e-3, 0.25
TRIED = ((5e-4, 2e-4, 0.1), (5e-4, 5e-3, 0.1), (1e-4, 2e-4, 0.1), (5e-4, 5e-3, 0.25), (5e-4, 5e-3, 0.5))
FOLDS, RESAMPLES = 10, 2000


def make_project(work: Path, data: Path) -> tuple[Config, list[Path]]:
    """Import the table, write every repetition's split files; the settings, and the files' folders."""
    project = work / "project"
    project.mkdir(parents=True, exist_ok=True)
    config = Config.model_validate({"classes": CLASSES})
    import_project(config, project, data / "musk1.csv")
    labels = {"file": "labels.csv", "case_column": "Case", "class_column": "Class"}
    config = Config.model_validate({"classes": CLASSES, "labels": labels})
    folders = []
    for name, splits in given_folds(data / "folds_5x10_musk1.csv").items():
        folders.append(project / name)
        if not folders[-1].exists():
            write_splits(splits, folders[-1])
    return config, folders


def nine_folds(split: Split) -> Split:
    """Validation joins training; two bags stand in for it, that nothing is chosen by."""
    train = (*split.train, *split.val)
    return Split(train, train[:2], split.test)


def config_of(
    name: str, seed: int, lr: float = LR, weight_decay: float = WEIGHT_DECAY, dropout: float = DROPOUT
) -> Config:
    """A head's settings: the course of training is the same for all."""
    rest = {"epochs": EPOCHS, "patience": PATIENCE, "min_delta": 0.0, "scheduler": "none", "amp": "off"}
    config = default_config(name, seed, lr=lr, weight_decay=weight_decay, **rest)
    return config.model_copy(update={"head": config.head.model_copy(update={"dropout": dropout})})


def given_folds(path: Path) -> dict[str, list[Split]]:
    """By repetition, its ten splits; the file gives every bag's test fold."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in (column for column in rows[0] if column.startswith("rep")):
        fold = {row["bag_id"]: int(row[name]) for row in rows}
        found[name] = [_split(fold, k) for k in range(FOLDS)]
    return found


def _split(fold: Mapping[str, int], k: int) -> Split:
    def chosen(wanted: Callable[[int], bool]) -> tuple[str, ...]:
        return tuple(natural_sorted(bag for bag, number in fold.items() if wanted(number)))

    val = (k + 1) % FOLDS
    return Split(chosen(lambda n: n not in (k, val)), chosen(lambda n: n == val), chosen(lambda n: n == k))


def peer_fold(
    split: Split, bags: CaseBags, labels: Mapping[str, int], seed: int, protocol: Protocol
) -> Record:
    """torchmil's gated ABMIL on one fold, as `bench_crchisto.head_fold`."""
    started = time.perf_counter()
    parts = [[bags.features(case).numpy() for case in part] for part in split.parts().values()]
    train, val, test = standardised(parts[0], *parts)
    y, y_val = ([labels[case] for case in part] for part in (split.train, split.val))
    model = build_peer("torchmil_abmil", train[0].shape[1], seed, gated=True)
    epoch, val_loss = fit(model, train, y, val, y_val, protocol)
    logits, _ = ask(model, test)
    predicted = torch.sigmoid(logits.double()).tolist()
    return {
        "probabilities": dict(zip(split.test, predicted, strict=True)),
        "epoch": epoch,
        "val_loss": val_loss,
        "seconds": time.perf_counter() - started,
    }


Method = Callable[[Split, int], Record]


def methods(bags: CaseBags, labels: Mapping[str, int], nine: bool) -> dict[str, Method]:
    """Every method by name: a split and a seed to what it did."""
    protocol = Protocol(LR, WEIGHT_DECAY, NINE_EPOCHS if nine else EPOCHS, None if nine else PATIENCE)

    def head(name: str, split: Split, seed: int) -> Record:
        if not nine:
            return head_fold(config_of(name, seed), bags, split, {})
        config = config_of(name, seed, dropout=0.1)
        every = {"epochs": NINE_EPOCHS, "patience": None}
        config = config.model_copy(update={"train": config.train.model_copy(update=every)})
        return head_fold(config, bags, nine_folds(split), {}, last=True)

    def peer(split: Split, seed: int) -> Record:
        return peer_fold(nine_folds(split) if nine else split, bags, labels, seed, protocol)

    return {PEER: peer, **{name: functools.partial(head, name) for name in HEADS}}


def right(records: Sequence[Record], labels: Mapping[str, int]) -> dict[str, float]:
    """Of every bag that the records predict, whether the more probable class is its own."""
    found = {case: p for record in records for case, p in record["probabilities"].items()}
    return {case: float((p > 0.5) == (labels[case] == 1)) for case, p in found.items()}


def summary(repetitions: Sequence[Sequence[Record]], labels: Mapping[str, int]) -> dict[str, float]:
    """Mean accuracy over all folds, and what it deviates by."""
    folds = [[statistics.mean(right([fold], labels).values()) for fold in each] for each in repetitions]
    means = [statistics.mean(each) for each in folds]
    every = [accuracy for each in folds for accuracy in each]
    records = [record for each in repetitions for record in each]
    return {
        "accuracy": statistics.mean(every),
        "of repetitions": statistics.stdev(means) if len(means) > 1 else 0.0,
        "of folds": statistics.stdev(every),
        "validation loss": statistics.mean(record["val_loss"] or math.nan for record in records),
        "epoch": statistics.median(record["epoch"] for record in records),
        "s": statistics.mean(record["seconds"] for record in records),
    }


def by_bag(repetitions: Sequence[Sequence[Record]], labels: Mapping[str, int]) -> NDArray[np.float64]:
    """(N,) how often each bag was right, of the repetitions."""
    each = [right(records, labels) for records in repetitions]
    return np.array([statistics.mean(found[case] for found in each) for case in labels])


def difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Estimate:
    """First minus second, paired over bags, with its interval."""
    each = first - second
    weights = resample(np.random.default_rng(0), RESAMPLES, len(each))
    return interval_of(float(each.mean()), [weights @ each / len(each)], [])


@dataclass(frozen=True)
class Musk:
    """The data: bags, their classes, and by repetition the splits."""

    bags: CaseBags
    labels: dict[str, int]
    splits: list[dict[int, Split]]


def load(work: Path, data: Path, repetitions: int | None = None) -> Musk:
    """The project, made where there is none, as a study reads it."""
    config, folders = make_project(work, data)
    project = work / "project"
    store = Store.open(project / config.store.path)
    cohort = labelled_cases(config, project, store, print)
    splits = []
    for folder in folders[:repetitions]:
        train = config.train.model_copy(update={"load_splits": str(folder)})
        own = config.model_copy(update={"train": train})
        splits.append(read_folds(own, project, cohort, FOLDS, lambda text: None))
    bags = load_bags(default_config("mean", 0), store, cohort.labels, print)
    return Musk(bags, cohort.labels, splits)


def tune(musk: Musk, trainings: Trainings) -> None:
    """Print the validation losses of `FIRST` with the settings of `TRIED`; test folds stay unread."""
    for tried in TRIED:

        def train(split: Split, tried: tuple[float, float, float] = tried) -> Record:
            found = head_fold(config_of(FIRST, 1, *tried), musk.bags, split, {})
            return {name: found[name] for name in ("val_loss", "epoch")}

        words = " ".join(f"{value:g}" for value in tried)
        records = [
            trainings.get(f"tune {words}/{k}", functools.partial(train, split))
            for k, split in musk.splits[0].items()
        ]
        loss = statistics.mean(record["val_loss"] for record in records)
        print(f"{FIRST}, rate, weight decay, dropout {words}: validation loss {loss:.4f}", flush=True)


def run(musk: Musk, trainings: Trainings, names: Sequence[str], nine: bool = False) -> None:
    """Train what is not finished, and print the table."""
    every = methods(musk.bags, musk.labels, nine)
    found: dict[str, list[list[Record]]] = {}
    for name in names:
        key = f"{name} {LR:g} {WEIGHT_DECAY:g}" + ("" if name == PEER or nine else f" {DROPOUT:g}")
        key += " nine" * nine
        found[name] = [
            [
                trainings.get(f"{key}/{number}/{k}", functools.partial(every[name], split, number))
                for k, split in splits.items()
            ]
            for number, splits in enumerate(musk.splits, 1)
        ]
        print_method(name, found[name], found.get(PEER), musk.labels)
    if FIRST in found:
        accuracy = summary(found[FIRST], musk.labels)["accuracy"]
        print(f"{FIRST}: {WANTED} {'reached' if accuracy >= WANTED else 'NOT reached'}")


def print_method(
    name: str,
    repetitions: Sequence[Sequence[Record]],
    peer: Sequence[Sequence[Record]] | None,
    labels: Mapping[str, int],
) -> None:
    """One line: accuracy, deviations, and the difference to the peer."""
    values = summary(repetitions, labels)
    against = ""
    if peer is not None and peer is not repetitions:
        against = shown(difference(by_bag(repetitions, labels), by_bag(peer, labels)))
    line = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
    print(f"{name:<22}{line}  {against}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="with musk1.csv, folds_5x10_musk1.csv")
    parser.add_argument("--work", type=Path, required=True, help="project and results: kept, used again")
    parser.add_argument("--heads", nargs="+", choices=(PEER, *HEADS), default=(PEER, *HEADS))
    parser.add_argument("--repetitions", type=int, help="only so many of the five")
    parser.add_argument("--tune", action="store_true", help="validation losses of what was tried, no more")
    parser.add_argument("--nine", action="store_true", help="nine folds train for 100 epochs")
    options = parser.parse_args()
    musk = load(options.work, options.data, options.repetitions)
    trainings = Trainings(options.work / "trainings.jsonl")
    if options.tune:
        tune(musk, trainings)
    else:
        run(musk, trainings, options.heads, options.nine)


if __name__ == "__main__":
    main()
