"""What others reach on 48 colon cases: logistic regression of the mean patch, torchmil's ABMIL and DSMIL.

    OMP_NUM_THREADS=1 python tests/bench/crchisto_peers.py WORK_FOLDER CRCHISTO_FOLDER [--seed 42]

The protocol was written down before the first result, and nothing was changed for one:

- Features: DenseNet121 with random weights (`random:0`), whole patch resized to 64 px, otherwise the
  defaults of `featstore extract`. In every method they are standardised per feature, with mean and
  deviation over all patches of the cases that the method is fitted on.
- Splits: `make_splits(labels, {}, 5, seed=42)`, whatever the seed of training. Test = fold k,
  validation = fold k + 1 mod 5, training = the other three.
- Logistic regression has nothing to choose, so validation cases go unused, and it sees the same
  training cases as the rest. C = 1. Two variants: fitted on training and validation cases; and with
  the means over patches standardised once more over the training cases, which weakens its penalty.
- ABMIL and DSMIL, with torchmil's default settings: one bag a step in a new random order every epoch,
  Adam (lr 3e-4, weight decay 2e-4), at most 30 epochs. The weights of the epoch with the least
  cross-entropy over the validation cases are kept, and 5 epochs without a lower one end the training.
  Validation is in evaluation mode; torchmil's own trainer, which validates in training mode, is not used.
- The loss is the cross-entropy of the bag; for DSMIL its mean with that of the highest patch (Li et
  al. 2021). DSMIL's prediction is the bag stream's, as in its authors' code by default; the variant
  takes the mean of both streams' logits, as the paper's equation and torchmil's `predict` do. Each
  chooses its epoch by its own prediction.
- A variant of ABMIL and DSMIL, declared after the first results (a few standardised features are tens of
  deviations away, and DSMIL suffers from them): `clip`, here ±5, cuts the standardised values off.
- The test predictions of the five folds are pooled to one AUC over 48 cases, with the bootstrap
  interval of `heads.evaluation`; beside it stands the mean of the folds' own AUCs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.cohort import read_labels
from featstore.cohort.splits import Split, make_splits
from featstore.config import FeatstoreConfig
from featstore.project import extract_project, init_project
from featstore.settings import PROJECT_FILE
from featstore.store import Store
from heads.evaluation.metrics import evaluate

if TYPE_CHECKING:
    from torchmil.models import MILModel

Floats = NDArray[np.floating[Any]]
Bags = Sequence[Floats]  # one (patches, features) array a case
Classes = Sequence[int]
Predict = Callable[[torch.Tensor], torch.Tensor]  # (1, patches, features) to logits (1,)

CLASSES = {"negative": ["0"], "positive": ["1"]}
FOLDS, SPLIT_SEED, SPREAD_SEEDS = 5, 42, (0, 1, 2)
DETERMINISTIC = ("mean_pool_logistic", "mean_pool_logistic_train_val", "mean_pool_logistic_rescaled")
SEEDED = ("torchmil_abmil", "torchmil_dsmil", "torchmil_dsmil_averaged")
EPOCHS, PATIENCE, LR, WEIGHT_DECAY = 30, 5, 3e-4, 2e-4


def prepare(work: Path, data: Path) -> tuple[Store, dict[str, int]]:
    """Make the project in `work`, extract what is not there yet; the store and every case's class."""
    data = data.resolve()
    config = FeatstoreConfig.model_validate(
        {
            "patches": {"folder": str(data / "patches")},
            "labels": {"file": f"{data}/labels.csv", "case_column": "case_id", "class_column": "label"},
            "classes": CLASSES,
            "backbone": {"name": "densenet121", "weights": "random:0", "resize": 64},
        }
    )
    if not (work / PROJECT_FILE).exists():
        init_project(config, work, data / "patches")
    extract_project(config, work)
    store = Store.open(work / config.store.path)
    labels = read_labels(config.labels, config.classes, work, config.patches.normalize_cases).by_case
    return store, {case: labels[case] for case in store.cases()}


def standardised(fitted_on: Bags, *parts: Bags, clip: float | None = None) -> list[list[Floats]]:
    """Each part, by the patches' mean and deviation in `fitted_on`; features constant there become 0.

    With `clip` no standardised value is further from 0 than that.
    """
    patches = np.concatenate(fitted_on).astype(np.float64)
    mean, deviation = patches.mean(axis=0), patches.std(axis=0)
    deviation[deviation == 0] = np.inf
    limit = np.inf if clip is None else clip

    def scaled(bag: Floats) -> Floats:
        cut: Floats = ((bag - mean) / deviation).clip(-limit, limit).astype(np.float32)
        return cut

    return [[scaled(bag) for bag in part] for part in parts]


def mean_pool_logistic(
    bags_train: Bags, y_train: Classes, bags_test: Bags, rescale: bool = False
) -> list[float]:
    """Logistic regression of the mean over patches: the test cases' probabilities of being positive.

    Bags are raw features; `rescale` standardises their means once more, over the cases to fit on.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, test = (
        np.stack([bag.mean(axis=0) for bag in part])
        for part in standardised(bags_train, bags_train, bags_test)
    )
    if rescale:
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    model = LogisticRegression(C=1.0, max_iter=5000).fit(train, y_train)
    return list(map(float, model.predict_proba(test)[:, 1]))


def torchmil_abmil(
    bags_train: Bags,
    y_train: Classes,
    bags_val: Bags,
    y_val: Classes,
    bags_test: Bags,
    seed: int = 42,
    clip: float | None = None,
) -> tuple[list[float], int]:
    """torchmil's ABMIL (Ilse et al. 2018), not gated: the test cases' probabilities, and the epoch kept."""
    from torchmil.models import ABMIL

    train, val, test = standardised(bags_train, bags_train, bags_val, bags_test, clip=clip)
    torch.manual_seed(seed)
    model = ABMIL(in_shape=(train[0].shape[1],))
    epoch = _fit(model, model, train, y_train, val, y_val)
    return torch.sigmoid(_logits(model, model, test)).tolist(), epoch


def torchmil_dsmil(
    bags_train: Bags,
    y_train: Classes,
    bags_val: Bags,
    y_val: Classes,
    bags_test: Bags,
    seed: int = 42,
    average: bool = False,
    clip: float | None = None,
) -> tuple[list[float], int]:
    """torchmil's DSMIL (Li et al. 2021), arguments and result as `torchmil_abmil`.

    With `average` it predicts from the mean of both streams' logits, else from the bag stream alone.
    """
    from torchmil.models import DSMIL

    train, val, test = standardised(bags_train, bags_train, bags_val, bags_test, clip=clip)
    torch.manual_seed(seed)
    model = DSMIL(in_shape=(train[0].shape[1],))
    predict = model.predict if average else model
    epoch = _fit(model, predict, train, y_train, val, y_val)
    return torch.sigmoid(_logits(model, predict, test)).tolist(), epoch


def _fit(model: MILModel, predict: Predict, train: Bags, y: Classes, val: Bags, y_val: Classes) -> int:
    """Train, leave the model at its best epoch (from 1) by validation cross-entropy, and return that."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    best, best_epoch, weights = float("inf"), 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for i in torch.randperm(len(train)).tolist():
            _, losses = model.compute_loss(torch.tensor([y[i]]), torch.from_numpy(train[i])[None])
            optimizer.zero_grad()
            torch.stack(list(losses.values())).mean().backward()
            optimizer.step()
        logits = _logits(model, predict, val)
        loss = float(binary_cross_entropy_with_logits(logits, torch.tensor(y_val, dtype=torch.float32)))
        if loss < best:
            best, best_epoch, weights = loss, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= PATIENCE:
            break
    model.load_state_dict(weights)
    return best_epoch


@torch.inference_mode()
def _logits(model: MILModel, predict: Predict, bags: Bags) -> torch.Tensor:
    model.eval()
    return torch.cat([predict(torch.from_numpy(bag)[None]) for bag in bags])


def _run_fold(
    name: str,
    split: Split,
    bags: dict[str, Floats],
    labels: dict[str, int],
    seed: int,
    clip: float | None,
) -> tuple[list[float], int]:
    """One method on one fold: the test cases' probabilities, and the epoch kept, 0 where there is none."""
    train, val, test = ([bags[case] for case in part] for part in (split.train, split.val, split.test))
    y_train, y_val = ([labels[case] for case in part] for part in (split.train, split.val))
    if name == "mean_pool_logistic_train_val":
        return mean_pool_logistic([*train, *val], [*y_train, *y_val], test), 0
    if name in DETERMINISTIC:
        return mean_pool_logistic(train, y_train, test, rescale=name.endswith("rescaled")), 0
    if name == "torchmil_abmil":
        return torchmil_abmil(train, y_train, val, y_val, test, seed, clip)
    return torchmil_dsmil(train, y_train, val, y_val, test, seed, name.endswith("averaged"), clip)


def run_method(
    name: str,
    splits: Sequence[Split],
    bags: dict[str, Floats],
    labels: dict[str, int],
    seed: int,
    clip: float | None = None,
) -> dict[str, Any]:
    """One method with one seed on all folds: pooled AUC with interval, mean of the folds', seconds.

    `clip`: for ABMIL and DSMIL, as in `standardised`.
    """
    started = time.perf_counter()
    probability: dict[str, float] = {}
    folds, epochs = [], []
    for split in splits:
        predicted, epoch = _run_fold(name, split, bags, labels, seed, clip)
        probability |= dict(zip(split.test, predicted, strict=True))
        folds.append(auc_of([labels[case] for case in split.test], predicted, resamples=0)["auc"])
        epochs += [epoch] if epoch else []
    seconds = time.perf_counter() - started
    pooled = auc_of(list(labels.values()), [probability[case] for case in labels])
    rest = {"fold_mean": statistics.mean(folds), "folds": folds, "epochs": epochs, "seconds": seconds}
    return pooled | rest | {"probabilities": {case: probability[case] for case in labels}}


def auc_of(true: Classes, predicted: Sequence[float], resamples: int = 2000) -> dict[str, Any]:
    """The AUC of the probabilities of being positive, with its interval."""
    probabilities = np.array([(1 - p, p) for p in predicted])
    auc = evaluate(np.array(true), probabilities, list(CLASSES), resamples=resamples).auc
    return {"auc": auc.value, "low": auc.low, "high": auc.high}


def run_baselines(work: Path, data: Path, seed: int = 42) -> dict[str, dict[str, Any]]:
    """Every method's result with `seed`; under "seeds" those with the seeds 0 to 2, where one matters."""
    store, labels = prepare(work, data)
    bags = {case: store.bag(case).features for case in labels}
    splits = make_splits(labels, {}, FOLDS, SPLIT_SEED)
    results = {name: run_method(name, splits, bags, labels, seed) for name in DETERMINISTIC + SEEDED}
    for name in SEEDED:
        results[name]["seeds"] = {s: run_method(name, splits, bags, labels, s) for s in SPREAD_SEEDS}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path, help="becomes a project: kept, and used again")
    parser.add_argument("data", type=Path, help="the folder crchisto, with patches/ and labels.csv")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    results = run_baselines(options.work, options.data, options.seed)
    print(f"{'method':<30}{'seed':>5}{'AUC':>8}  {'95% interval':<16}{'of folds':>8}{'s':>8}  epochs kept")
    for name, result in results.items():
        for seed, row in {options.seed: result, **result.get("seeds", {})}.items():
            print(
                f"{name:<30}{seed if name in SEEDED else '':>5}{row['auc']:>8.4f}  {row['low']:.4f}–"
                f"{row['high']:.4f}   {row['fold_mean']:>8.4f}{row['seconds']:>8.1f}  {row['epochs'] or ''}"
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
