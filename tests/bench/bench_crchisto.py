"""Both heads on 48 colon cases, beside logistic regression and torchmil's ABMIL and DSMIL.

    OMP_NUM_THREADS=1 python tests/bench/bench_crchisto.py --data CRCHISTO_FOLDER --work WORK_FOLDER

What was asked of it: a pooled AUC of at least 0.85 for each head. The protocol was written down before
the first result, and nothing in it is chosen by one:

- Features, splits and the AUC's interval are those of `crchisto_peers`, whose protocol the others follow:
  DenseNet121 with random weights at 64 px; `make_splits(labels, {}, 5, seed=42)` whatever the seed of
  training; test = fold k, validation = fold k + 1 mod 5, training = the other three.
- Each head is trained by featstore's own `Training` with the settings that it has when nothing is set
  (`resolved(Config(head=…))`), on the CPU. The seed of training is all that differs between runs.
- The epoch is the one with the lowest validation loss, as `train-head` keeps it; the head of that epoch
  predicts the test cases, with all their patches. Test cases are looked at for nothing else.
- Per seed: the test predictions of the five folds pooled to one AUC over all cases, with its bootstrap
  interval; and the mean of the folds' own AUCs. Over seeds: the mean and range of the pooled AUCs, and
  the seed ensemble: the pooled AUC of every case's mean probability over the seeds.
- The peers are run with the same seeds, as they are. Declared variant, for ABMIL and DSMIL alone:
  standardised features cut off at ±5. Logistic regression has no seed.

Early stopping compares losses, and these differ in their last digits between machines and numbers of
threads: an epoch may be chosen differently, and the AUC with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from crchisto_peers import CLASSES, DETERMINISTIC, FOLDS, SEEDED, SPLIT_SEED, auc_of, prepare, run_method

from featstore.cohort.splits import Split, make_splits
from featstore.resident import CaseBags
from heads.cohort import load_bags
from heads.config import Config, HeadConfig, TrainConfig, resolved
from heads.evaluation.predict import predict
from heads.models.head import build_head
from heads.training.loop import Training

HEADS = ("hierarchical", "dual_stream")
WANTED = 0.85  # the pooled AUC asked of every head
CLIP = 5.0

Result = dict[str, Any]


def default_config(head: str, seed: int) -> Config:
    """What `train-head --model HEAD --seed SEED --device cpu` trains with when nothing else is set."""
    return resolved(Config(head=HeadConfig(name=head), train=TrainConfig(seed=seed, device="cpu")))


def train_fold(config: Config, bags: CaseBags, split: Split) -> tuple[list[float], Training]:
    """One head on one fold: the test cases' probabilities of being positive, and the training."""
    names = list(CLASSES)
    head = build_head(config.head, bags.store.spec.dim, len(names), config.train.seed)
    training = Training(head, bags, split, config.train, names)
    training.run()
    head.load_state_dict(training.best)
    return predict(head, bags, split.test, config.train).probabilities[:, 1].tolist(), training


def run_head(config: Config, splits: Sequence[Split], bags: CaseBags, labels: Mapping[str, int]) -> Result:
    """One head with one seed on all folds, as `crchisto_peers.run_method`, with validation losses."""
    started = time.perf_counter()
    probability: dict[str, float] = {}
    folds, epochs, losses = [], [], []
    for split in splits:
        predicted, training = train_fold(config, bags, split)
        probability |= dict(zip(split.test, predicted, strict=True))
        folds.append(auc_of([labels[case] for case in split.test], predicted, resamples=0)["auc"])
        epochs.append(training.progress.best_epoch)
        losses.append(training.progress.best_val_loss)
    seconds = time.perf_counter() - started
    pooled = auc_of(list(labels.values()), [probability[case] for case in labels])
    rest = {"fold_mean": statistics.mean(folds), "folds": folds, "epochs": epochs, "seconds": seconds}
    each = {case: probability[case] for case in labels}
    return pooled | rest | {"val_losses": losses, "probabilities": each}


def over_seeds(runs: Mapping[int, Result], labels: Mapping[str, int]) -> Result:
    """Mean and range of the seeds' AUCs, and the AUC of the mean probabilities."""
    aucs = [run["auc"] for run in runs.values()]
    mean = [statistics.mean(run["probabilities"][case] for run in runs.values()) for case in labels]
    return {
        "mean": statistics.mean(aucs),
        "least": min(aucs),
        "most": max(aucs),
        "ensemble": auc_of(list(labels.values()), mean),
    }


def print_run(name: str, seed: int | str, run: Result) -> None:
    print(
        f"{name:<30}{seed:>5}{run['auc']:>8.3f}  {run['low']:.3f}–{run['high']:.3f}"
        f"{run['fold_mean']:>9.3f}{run['seconds']:>8.1f}  {run['epochs'] or ''}",
        flush=True,
    )


def print_summary(methods: Mapping[str, Result]) -> None:
    print(f"\n{'over seeds':<30}{'mean':>8}{'least':>8}{'most':>8}{'ensemble':>10}  95% interval")
    for name, method in methods.items():
        if "over_seeds" in method:
            found, ensemble = method["over_seeds"], method["over_seeds"]["ensemble"]
            print(
                f"{name:<30}{found['mean']:>8.3f}{found['least']:>8.3f}{found['most']:>8.3f}"
                f"{ensemble['auc']:>10.3f}  {ensemble['low']:.3f}–{ensemble['high']:.3f}"
            )
    for name in HEADS:
        found = methods[name]["over_seeds"]
        verdict = "reached" if found["mean"] >= WANTED else "NOT reached"
        below = sum(run["auc"] < WANTED for run in methods[name]["seeds"].values())
        seeds = len(methods[name]["seeds"])
        print(f"{name}: {WANTED} {verdict} in the mean over seeds; {below} of {seeds} seeds below it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="crchisto, with patches/ and labels.csv")
    parser.add_argument("--work", type=Path, required=True, help="becomes a project: kept, and used again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1, 2], help="of training")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write everything here, predictions too")
    options = parser.parse_args()
    started = time.perf_counter()
    store, labels = prepare(options.work, options.data)
    splits = make_splits(labels, {}, FOLDS, SPLIT_SEED)
    bags = load_bags(default_config(HEADS[0], 0), store, labels, print)
    print(
        f"{len(labels)} cases, {FOLDS} folds, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"\n{'':<30}{'seed':>5}{'AUC':>8}  {'95% interval':<11}{'folds':>8}{'s':>8}  epochs kept")
    methods: dict[str, Result] = {}
    for name in HEADS:
        runs = {}
        for seed in options.seeds:
            runs[seed] = run_head(default_config(name, seed), splits, bags, labels)
            print_run(name, seed, runs[seed])
        methods[name] = {"seeds": runs, "over_seeds": over_seeds(runs, labels)}
    if options.peers:
        features = {case: store.bag(case).features for case in labels}
        for name in DETERMINISTIC:
            run = run_method(name, splits, features, labels, options.seeds[0])
            print_run(name, "", run)
            methods[name] = {"seeds": {options.seeds[0]: run}}
        for clip in (None, CLIP):
            for name in SEEDED:
                runs, shown = {}, name if clip is None else f"{name}_clip{clip:g}"
                for seed in options.seeds:
                    runs[seed] = run_method(name, splits, features, labels, seed, clip)
                    print_run(shown, seed, runs[seed])
                methods[shown] = {"seeds": runs, "over_seeds": over_seeds(runs, labels)}
    print_summary(methods)
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(methods, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
