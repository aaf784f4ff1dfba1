"""Every head on 48 colon cases, beside logistic regression and torchmil's ABMIL, DSMIL and CLAM.

    OMP_NUM_THREADS=1 python tests/bench/bench_crchisto.py --data CRCHISTO_FOLDER --work WORK_FOLDER

What was asked of it: clam_sb, gated_abmil and dsmil no worse than their peers: the paired 95% interval of
the difference in AUC not wholly below 0, for cases and for patches. The protocol was written down before
the first result, and nothing in it is chosen by one:

- Features, folds and peers are those of `crchisto_peers`; DenseNet121 and ResNet50 with random weights.
- Each head is trained by featstore's own `Training` with the settings that it has when nothing is set
  (`resolved(Config(head=…))`), on the CPU. The seed of training is all that differs between runs.
- The epoch is the one with the lowest validation loss, as `train-head` keeps it; the head of that epoch
  predicts the test cases, with all their patches. Test cases are looked at for nothing else.
- `cases`: the mean of the five folds' AUCs, and the AUC of all 48 test predictions together; both, and
  the log loss, are means over seeds. Intervals: percentiles of 2,000 resamples of the cases, the same
  for both methods, for all seeds and all folds; a fold whose resample lacks a class counts for nothing.
- `patches`: within each positive test case, the AUC of the attention against the truth of every patch;
  the mean over cases that have both kinds, and over seeds. Attention is the effective attention; of a
  head that attends by class, that of the positive class. `score`: the same of the instance scores.
- `bf16`: the same trainings with `train.amp: bf16`, in training and in prediction; the difference to
  float32, paired as above.

What is finished is kept in WORK_FOLDER/trainings.jsonl, and an interrupted benchmark goes on from there.
Early stopping compares losses, and these differ in their last digits between machines and numbers of
threads: an epoch may be chosen differently, and the AUC with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.bags import BagBatch
from featstore.cohort.splits import Split, make_splits
from featstore.resident import CaseBags
from heads.cohort import load_bags
from heads.config import Config, HeadConfig, TrainConfig, resolved
from heads.evaluation.metrics import Estimate, interval_of, resample, weighted_statistics
from heads.evaluation.predict import predict
from heads.models.head import Head, build_head
from heads.models.outputs import HeadOutput, effective_attention
from heads.training.loop import Training
from tests.bench.crchisto_peers import (
    CLASSES,
    FOLDS,
    LOGISTIC,
    PEERS,
    SPLIT_SEED,
    WAYS,
    Record,
    auc_of,
    over_folds,
    patch_auc,
    peer_fold,
    prepare,
    read_truth,
)

FLAT = ("linear", "mean", "max", "abmil", "gated_abmil", "dsmil", "clam_sb", "dual_stream", "transmil")
POOLS = ("gated", "multi_head", "transformer")
HEADS = (*FLAT, "hierarchical", *(f"hierarchical_{pool}" for pool in POOLS))
PAIRS = {
    "gated_abmil": "torchmil_abmil",
    "abmil": "torchmil_abmil",
    "hierarchical": "torchmil_abmil",
    "dsmil": "torchmil_dsmil",
    "dual_stream": "torchmil_dsmil",
    "clam_sb": "torchmil_clam_sb",
}
BACKBONES = ("densenet121", "resnet50")
RESAMPLES = 2000
CURVES = ("train_cross_entropy", "train_batch_loss_variance", "val_cross_entropy", "val_auc")

Floats = NDArray[np.float64]
Truth = Mapping[str, NDArray[np.int64]]


class Trainings:
    """What is finished, by a key, in a file with one line each: a broken last line is done again."""

    def __init__(self, path: Path) -> None:
        self._path, self._found = path, dict[str, Record]()
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = kept[: kept.rfind("\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            self._found[entry["key"]] = entry["record"]
        if whole != kept:
            path.write_text(whole, encoding="utf-8")

    def get(self, key: str, train: Callable[[], Record]) -> Record:
        """The record of this key; `train` makes it where there is none."""
        if key not in self._found:
            record = train()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")
            self._found[key] = record
        return self._found[key]


def default_config(head: str, seed: int, **train: Any) -> Config:
    """What `train-head --model HEAD --seed SEED --device cpu` trains with when nothing else is set."""
    pool = head.removeprefix("hierarchical_")
    named = {"name": "hierarchical", "attention_pool": pool} if pool != head else {"name": head}
    settings = TrainConfig(seed=seed, device="cpu", **train)
    return resolved(Config(head=HeadConfig.model_validate(named), train=settings))


def head_fold(
    config: Config, bags: CaseBags, split: Split, truth: Truth, head: Head | None = None, last: bool = False
) -> Record:
    """One head on one fold; `head` is what is trained if it is not the config's.

    With `last` the last epoch is kept, not the one with the lowest validation loss.

    Returns:
        `probabilities` of the test cases of being positive; `patches`: of positive ones, the AUC within
        the case by what ranks its patches; `top1`: every test case's largest attention; the epoch
        kept, its validation loss, curves, seconds.
    """
    started = time.perf_counter()
    names = list(CLASSES)
    if head is None:
        head = build_head(config.head, bags.store.spec.dim, len(names), config.train.seed)
    training = Training(head, bags, split, config.train, names)
    training.run()
    if not last:
        head.load_state_dict(training.best)
    patches: dict[str, dict[str, float | None]] = {}
    top1: dict[str, float] = {}

    def rank(batch: BagBatch, output: HeadOutput) -> None:
        for name, score in patch_scores(batch, output).items():
            parts = torch.split(score.float(), batch.case_patch_offsets.diff().tolist())
            for case, part in zip(batch.case_ids, parts, strict=True):
                if name == "attention":
                    top1[case] = float(part.max())
                if bags.outlines[case].label == 1 and case in truth:
                    patches.setdefault(name, {})[case] = patch_auc(truth[case], part.numpy())

    found = predict(head, bags, split.test, config.train, observe=rank)
    history = training.progress.history
    return {
        "probabilities": dict(zip(split.test, found.probabilities[:, 1].tolist(), strict=True)),
        "patches": patches,
        "top1": top1,
        "epoch": training.progress.best_epoch,
        "val_loss": training.progress.best_val_loss,
        "curves": {name: [row[name] for row in history] for name in CURVES},
        "seconds": time.perf_counter() - started,
    }


def patch_scores(batch: BagBatch, output: HeadOutput) -> dict[str, torch.Tensor]:
    """What ranks patches as positive: (ΣP,) by name."""
    found = {}
    if (effective := effective_attention(output, batch)) is not None:
        weights = output.attention["patch"].weights
        found["attention"] = effective if weights.ndim == 1 else weights[:, 1]
    if (scores := output.instance_scores) is not None:
        found["score"] = scores if scores.ndim == 1 else scores[:, 1] - scores[:, 0]
    return found


def run_head(config: Config, splits: Sequence[Split], bags: CaseBags, labels: Mapping[str, int]) -> Record:
    """One head with one seed on all folds, as `crchisto_peers.run_method`, with validation losses."""
    records = [head_fold(config, bags, split, {}) for split in splits]
    return over_folds(records, labels) | {"val_losses": [each["val_loss"] for each in records]}


def over_seeds(runs: Mapping[int, Record], labels: Mapping[str, int]) -> Record:
    """Mean and range of the seeds' AUCs, and the AUC of the mean probabilities."""
    aucs = [run["auc"] for run in runs.values()]
    mean = [statistics.mean(run["probabilities"][case] for run in runs.values()) for case in labels]
    return {
        "mean": statistics.mean(aucs),
        "least": min(aucs),
        "most": max(aucs),
        "ensemble": auc_of(list(labels.values()), mean),
    }


class Compared:
    """The records of several methods on the same folds, and paired intervals of what they reach.

    Args:
        labels: Of all N cases.
        splits: The folds.
        resamples: Of the cases; the same for all methods.
    """

    def __init__(
        self, labels: Mapping[str, int], splits: Sequence[Split], resamples: int = RESAMPLES
    ) -> None:
        self.cases, self.labels = list(labels), np.array(list(labels.values()), np.int64)
        fold = {case: k for k, split in enumerate(splits) for case in split.test}
        self.fold = np.array([fold[case] for case in self.cases])
        drawn = resample(np.random.default_rng(0), resamples, len(labels))
        self.weights = np.concatenate((np.ones((1, len(labels))), drawn))

    def measures(self, seeds: Sequence[Sequence[Record]]) -> dict[str, Floats]:
        """Every measure of a method: (1 + resamples,), first of the cases as they are.

        Args:
            seeds: Of every seed, the folds' records.
        """
        found = [self._of_seed(records) for records in seeds]
        return {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}

    def _of_seed(self, records: Sequence[Record]) -> dict[str, Floats]:
        probability = {case: p for each in records for case, p in each["probabilities"].items()}
        positive = np.array([probability[case] for case in self.cases])
        p = np.stack((1 - positive, positive), axis=1)
        every = weighted_statistics(self.weights, self.labels, p, p.argmax(axis=1))
        folds = []
        for k in np.unique(self.fold):
            of = self.fold == k
            folds.append(weighted_statistics(self.weights[:, of], self.labels[of], p[of], p[of].argmax(1)))
        found = {
            "folds": _defined_mean(np.stack([each["auc"] for each in folds])),
            "pooled": every["auc"],
            "log_loss": every["log_loss"],
            "accuracy": every["accuracy"],
        }
        for name in records[0]["patches"]:
            value = {case: auc for each in records for case, auc in each["patches"][name].items()}
            auc = np.array([value.get(case) for case in self.cases], np.float64)
            there = ~np.isnan(auc)
            weights = self.weights[:, there]
            with np.errstate(invalid="ignore"):  # a resample without any such case is left out
                found[name] = weights @ auc[there] / weights.sum(axis=1)
        return found


def _defined_mean(values: Floats) -> Floats:
    """(R,) means of (K, R) values; NaN are left out."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0.0).sum(axis=0) / there.sum(axis=0)


def difference(first: Floats, second: Floats) -> Estimate:
    """First minus second, of `Compared.measures`, with its interval."""
    each = first - second
    return interval_of(float(each[0]), [each[1:]], [])


def shown(found: Estimate) -> str:
    """`+0.012 [-0.003, +0.030]`, and a star where 0 is not in it."""
    if found.value is None or found.low is None or found.high is None:
        return found.reason if found.value is None else f"{found.value:+.3f} [none]"
    apart = "*" if found.low > 0 or found.high < 0 else ""
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{apart}"


def print_methods(
    measures: Mapping[str, dict[str, Floats]], runs: Mapping[str, list[list[Record]]]
) -> None:
    """One line a method; patches where it ranks them."""
    names = ("folds", "pooled", "log_loss", "attention", "score")
    print(f"\n{'':<30}{''.join(f'{name:>10}' for name in names)}{'seeds':>7}{'epochs':>8}{'s':>7}")
    for method, found in measures.items():
        values = "".join(f"{found[name][0]:>10.3f}" if name in found else f"{'':>10}" for name in names)
        records = [record for seed in runs[method] for record in seed]
        epochs = statistics.median(record["epoch"] for record in records)
        seconds = statistics.mean(record["seconds"] for record in records)
        print(f"{method:<30}{values}{len(runs[method]):>7}{epochs:>8.0f}{seconds:>7.1f}", flush=True)


def print_pairs(measures: Mapping[str, dict[str, Floats]], pairs: Sequence[tuple[str, str]]) -> None:
    """Differences, paired, of what both methods have."""
    for first, second in pairs:
        if first not in measures or second not in measures:
            continue
        both = [name for name in measures[first] if name in measures[second] and name != "accuracy"]
        print(f"\n{first} − {second}")
        for name in both:
            print(f"  {name:<10}{shown(difference(measures[first][name], measures[second][name]))}")


Runs = dict[str, list[list[Record]]]  # by method; of every seed, the folds' records


def train_all(backbone: str, options: argparse.Namespace) -> tuple[Runs, dict[str, int], list[Split]]:
    """Every method with every seed on every fold; what is finished comes from the file."""
    trainings = Trainings(options.work / "trainings.jsonl")
    store, labels = prepare(options.work / backbone, options.data, backbone)
    truth, splits = read_truth(store, options.data), make_splits(labels, {}, FOLDS, SPLIT_SEED)
    bags = load_bags(default_config("mean", 0), store, labels, print)
    features = {case: store.bag(case).features for case in labels} if options.peers else {}

    def every(
        method: str, seeds: Sequence[int], train: Callable[[Split, int], Record]
    ) -> list[list[Record]]:
        def one(seed: int, k: int) -> Record:
            return trainings.get(f"{backbone}/{method}/{seed}/{k}", lambda: train(splits[k], seed))

        found = [[one(seed, k) for k in range(FOLDS)] for seed in seeds]
        print(f"{backbone} {method} done", file=sys.stderr, flush=True)
        return found

    runs: Runs = {}
    for name in options.peers:
        seeds = options.seeds[:1] if name in LOGISTIC else options.seeds
        runs[name] = every(
            name, seeds, lambda split, seed, n=name: peer_fold(n, split, features, labels, seed, truth)
        )
    for amp in options.amp:
        for name in options.heads:
            runs[name if amp == "off" else f"{name}_{amp}"] = every(
                name if amp == "off" else f"{name}_{amp}",
                options.seeds,
                lambda split, seed, n=name, a=amp: head_fold(
                    default_config(n, seed, amp=a), bags, split, truth
                ),
            )
    return runs, labels, splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="crchisto, with patches/ and labels.csv")
    parser.add_argument("--work", type=Path, required=True, help="projects and results: kept, used again")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--amp", nargs="+", choices=("off", "bf16"), default=["off", "bf16"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    options = parser.parse_args()
    for backbone in options.backbones:
        runs, labels, splits = train_all(backbone, options)
        compared = Compared(labels, splits)
        measures = {name: compared.measures(seeds) for name, seeds in runs.items()}
        print(f"\n{backbone}: {len(labels)} cases, torch {torch.__version__}")
        print_methods(measures, runs)
        ways = [(ours, f"{peer}_{way}") for ours, peer in PAIRS.items() for way in WAYS]
        print_pairs(measures, [*ways, *((name, LOGISTIC[0]) for name in options.heads)])
        print_pairs(measures, [(f"{name}_bf16", name) for name in options.heads])


if __name__ == "__main__":
    main()
