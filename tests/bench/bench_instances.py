"""Which patches are cancer? Attention, probing and leaving one out against the truth of every patch.

    OMP_NUM_THREADS=1 python tests/bench/bench_instances.py --data CRCHISTO_FOLDER --work WORK_FOLDER

48 colon cases, DenseNet121 with random weights; a head knows the label of a case alone. As `featstore
train-head --folds 5 --seeds 3` trains them, each with the settings that it has when nothing is set;
every case is looked into by the training whose test case it is. Within each positive case that has both
kinds of patches: the AUC of three scores against the truth, of *attention* (effective attention), *alone*
(the probability of the positive class by the patch as a bag of its own) and *effect* (that of the case,
less that of the case without the patch); the mean over the cases, over the seeds. Intervals: percentiles
of 2,000 resamples of the cases, the same for all scores.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from heads.config import Config
from heads.evaluation.metrics import rank_auc
from heads.evaluation.studies import open_study
from heads.inspect.opened import Wanted, open_run
from heads.inspect.probe_tables import read_probes
from heads.study import study_project
from heads.study_tasks import Asked
from tests.bench.crchisto_peers import CLASSES, FOLDS, SPLIT_SEED, prepare

HEADS = ("hierarchical", "abmil", "gated_abmil", "clam_sb", "dsmil", "dual_stream", "mean", "transmil")
POSITIVE = list(CLASSES)[-1]
SCORES = {
    "attention": "effective_attention",
    "alone": f"alone_{POSITIVE}",
    "effect": f"effect_{POSITIVE}",
}


def main() -> None:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="shared data: crchisto")
    parser.add_argument("--work", type=Path, required=True, help="project folder, kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heads", nargs="+", default=HEADS)
    given = parser.parse_args()
    prepare(given.work, given.data)
    with (given.data / "instance_labels.csv").open(newline="", encoding="utf-8") as file:
        truth = {row["file"]: int(row["instance_label"]) for row in csv.DictReader(file)}
    print(f"{'head':14}{'score':11}{'AUC':>7}  95% interval    cases")
    for head in given.heads:
        show(head, scores_of(given.work, given.data, head, given.seeds, truth))


def scores_of(
    work: Path, data: Path, head: str, seeds: int, truth: dict[str, int]
) -> dict[str, pd.DataFrame]:
    """The AUC of every score: a row a case, a column a seed."""
    config = Config.model_validate(
        {
            "patches": {"folder": str(data.resolve() / "patches")},
            "labels": {
                "file": f"{data.resolve()}/labels.csv",
                "case_column": "case_id",
                "class_column": "label",
            },
            "classes": CLASSES,
            "split": {"seed": SPLIT_SEED},
            "head": {"name": head},
            "train": {"device": "cpu"},
            "runs": {"suffix": head, "resamples": 0},
        }
    )
    there = sorted((work / "runs").glob(f"study_*_{head}"))
    if not there:
        study_project(config, work, Asked(FOLDS, seeds))
        there = sorted((work / "runs").glob(f"study_*_{head}"))
    study = open_study(work / "runs", there[-1])
    rows = []
    for fold, seed in study.trainings:
        wanted = Wanted(study.folder.training(fold, seed).path)
        probes = read_probes(open_run(config, work, wanted))
        for case, patches in probes.patches.groupby("case_id", sort=False):
            positive = np.array([truth[Path(path).name] for path in patches["path"]])
            if study.about["labels"][case] == 0 or positive.min() == positive.max():
                continue
            for name, column in SCORES.items():
                if column in patches:
                    score = patches[column].to_numpy(np.float64)
                    auc = rank_auc(positive, np.stack((-score, score), axis=1))
                    rows.append((name, case, seed, auc))
    table = pd.DataFrame(rows, columns=["score", "case", "seed", "auc"])
    return {
        str(name): mine.pivot(index="case", columns="seed", values="auc")
        for name, mine in table.groupby("score", sort=False)
    }


def show(head: str, found: dict[str, pd.DataFrame]) -> None:
    """A line a score, and each against attention."""
    draws: dict[str, np.ndarray] = {}
    for name, table in found.items():
        each = table.mean(axis=1).to_numpy()
        chosen = np.random.default_rng(0).integers(len(each), size=(2000, len(each)))
        draws[name] = each[chosen].mean(axis=1)
        low, high = np.percentile(draws[name], [2.5, 97.5])
        print(f"{head:14}{name:11}{each.mean():7.3f}  [{low:.3f}, {high:.3f}]  {len(each):4d}")
    for name in ("alone", "effect"):
        if name in draws and "attention" in draws:
            difference = draws[name] - draws["attention"]
            low, high = np.percentile(difference, [2.5, 97.5])
            mean = float((found[name] - found["attention"]).mean(axis=1).mean())
            print(f"{'':14}{name} − attention {mean:+.3f}  [{low:+.3f}, {high:+.3f}]")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
