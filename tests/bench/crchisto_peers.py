"""What others reach on 48 colon cases: logistic regression of the mean patch, and three of torchmil.

`bench_crchisto` runs them, on its folds and with its seeds, and compares. The protocol was written down
before the first result, and nothing was changed for one:

- Features: a backbone with random weights (`random:0`), whole patch resized to 64 px, otherwise the
  defaults of `featstore extract`. In every method they are standardised per feature, with mean and
  deviation over all patches of the cases that the method is fitted on, and no deviation less than 1% of
  the median one: what the heads get.
- Splits: `make_splits(labels, {}, 5, seed=42)`, whatever the seed of training. Test = fold k,
  validation = fold k + 1 mod 5, training = the other three.
- Logistic regression has nothing to choose, so validation cases go unused, and it sees the same
  training cases as the rest. C = 1. Two variants: fitted on training and validation cases; and with
  the means over patches standardised once more over the training cases, which weakens its penalty.
- ABMIL (not gated), DSMIL and CLAM_SB (k = 6: the smallest case has six patches), with torchmil's
  default settings otherwise: one bag a step in a new random order every epoch, Adam, three ways:
  `fixed`: 30 epochs, learning rate 1e-4, the last epoch's weights, validation cases unused.
  `fixed_more`: the same, fitted on training and validation cases, as one may who chooses nothing.
  `chosen`: learning rate 3e-4, weight decay 2e-4, at most 30 epochs, the weights of the epoch with the
  least cross-entropy over the validation cases, 5 epochs without a lower one end the training.
  Validation is in evaluation mode; torchmil's own trainer, which validates in training mode, is not used.
  CLAM_SB's instance loss is mended (`SmoothSVM`): torchmil's own stopped the first training of all.
- The loss is the mean of what the model's `compute_loss` returns. The prediction is the bag's logit; for
  DSMIL the bag stream's, as in its authors' code by default.
- Patches: `return_att` of the model in evaluation; how well it ranks the patches of a positive test case
  is the AUC within the case against the truth of every patch, and the mean over cases that have both kinds.
"""

from __future__ import annotations

import copy
import csv
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from featstore.cohort import read_labels
from featstore.cohort.splits import Split
from featstore.config import FeatstoreConfig
from featstore.project import extract_project, init_project
from featstore.settings import PROJECT_FILE
from featstore.store import Store
from heads.evaluation.metrics import evaluate, rank_auc
from heads.models.standardize import usable_deviation

if TYPE_CHECKING:
    from torchmil.models import MILModel

Floats = NDArray[np.floating[Any]]
Bags = Sequence[Floats]  # one (patches, features) array a case
Classes = Sequence[int]
Record = dict[str, Any]  # what is kept of one method on one fold

CLASSES = {"negative": ["0"], "positive": ["1"]}
FOLDS, SPLIT_SEED = 5, 42
LOGISTIC = ("mean_pool_logistic", "mean_pool_logistic_train_val", "mean_pool_logistic_rescaled")
MODELS = ("torchmil_abmil", "torchmil_dsmil", "torchmil_clam_sb")


@dataclass(frozen=True)
class Protocol:
    """How a model of torchmil is trained; without a patience, all epochs, and the last is kept."""

    lr: float
    weight_decay: float
    epochs: int
    patience: int | None


FIXED = Protocol(lr=1e-4, weight_decay=0.0, epochs=30, patience=None)
CHOSEN = Protocol(lr=3e-4, weight_decay=2e-4, epochs=30, patience=5)
WAYS = {"fixed": FIXED, "fixed_more": FIXED, "chosen": CHOSEN}
PEERS = (*LOGISTIC, *(f"{name}_{way}" for name in MODELS for way in WAYS))


def prepare(work: Path, data: Path, backbone: str = "densenet121") -> tuple[Store, dict[str, int]]:
    """Make the project in `work`, extract what is not there yet; the store and every case's class."""
    data = data.resolve()
    config = FeatstoreConfig.model_validate(
        {
            "patches": {"folder": str(data / "patches")},
            "labels": {"file": f"{data}/labels.csv", "case_column": "case_id", "class_column": "label"},
            "classes": CLASSES,
            "backbone": {"name": backbone, "weights": "random:0", "resize": 64},
        }
    )
    work.mkdir(parents=True, exist_ok=True)
    if not (work / PROJECT_FILE).exists():
        init_project(config, work, data / "patches")
    extract_project(config, work)
    store = Store.open(work / config.store.path)
    labels = read_labels(config.labels, config.classes, work, config.patches.normalize_cases).by_case
    return store, {case: labels[case] for case in store.cases()}


def read_truth(store: Store, data: Path) -> dict[str, NDArray[np.int64]]:
    """Of every case, which of its patches are positive, in the order of its bag."""
    with (data / "instance_labels.csv").open(newline="", encoding="utf-8") as file:
        positive = {row["file"]: int(row["instance_label"]) for row in csv.DictReader(file)}
    truth = {}
    for case in store.cases():
        paths = store.table(case)["path"]
        truth[case] = np.array([positive[Path(path).name] for path in paths], np.int64)
    return truth


def patch_auc(truth: NDArray[np.int64], score: Floats) -> float | None:
    """How well a score ranks a case's patches; None where all are of one kind."""
    found = rank_auc(truth, np.stack((-score, score), axis=1))
    return None if np.isnan(found) else found


def standardised(fitted_on: Bags, *parts: Bags) -> list[list[Floats]]:
    """Each part, by the patches' mean and deviation in `fitted_on`, as the heads standardise."""
    patches = np.concatenate(fitted_on).astype(np.float64)
    mean = patches.mean(axis=0)
    deviation = usable_deviation(torch.from_numpy(patches.std(axis=0))).numpy()
    return [[((bag - mean) / deviation).astype(np.float32) for bag in part] for part in parts]


def mean_pool_logistic(train: Bags, y: Classes, test: Bags, rescale: bool = False) -> list[float]:
    """Logistic regression of the mean over patches: the test cases' probabilities of being positive.

    Bags are standardised; `rescale` standardises their means once more, over the cases to fit on.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    means, asked = (np.stack([bag.mean(axis=0) for bag in part]) for part in (train, test))
    if rescale:
        scaler = StandardScaler().fit(means)
        means, asked = scaler.transform(means), scaler.transform(asked)
    model = LogisticRegression(C=1.0, max_iter=5000).fit(means, y)
    return list(map(float, model.predict_proba(asked)[:, 1]))


def build_peer(name: str, dim: int, seed: int, **settings: Any) -> MILModel:
    """One of `MODELS`, with weights from a seed."""
    from torchmil.models import ABMIL, CLAM_SB, DSMIL

    kinds = {
        "torchmil_abmil": lambda: ABMIL(in_shape=(dim,), **settings),
        "torchmil_dsmil": lambda: DSMIL(in_shape=(dim,), **settings),
        "torchmil_clam_sb": lambda: CLAM_SB(in_shape=(dim,), **{"k_sample": 6, **settings}),
    }
    torch.manual_seed(seed)
    model = kinds[name]()
    if name == "torchmil_clam_sb":
        model.inst_loss_fn = SmoothSVM()
    return model


class SmoothSVM(torch.nn.Module):
    """The mean over (N, C) scores of log Σ_c exp(s_c + [c ≠ y] − s_y), a smooth top-1 SVM loss.

    torchmil's own adds numbers of different patches up, and fails as soon as three patches of a case
    are told apart by more than 6.9.

    Source: Berrada, Zisserman and Kumar 2018 (arXiv 1802.07595), with α = τ = 1, as CLAM uses it.
    """

    def forward(self, scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        own = y.long().reshape(-1, 1)
        margin = torch.ones_like(scores).scatter(1, own, 0.0)
        return torch.logsumexp(scores + margin - scores.gather(1, own), dim=1).mean()


def fit(
    model: MILModel, train: Bags, y: Classes, val: Bags, y_val: Classes, protocol: Protocol
) -> tuple[int, float | None]:
    """Train, and leave the model at the epoch that is kept: its number, from 1, and its validation loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay)
    best, best_epoch, weights = float("inf"), 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, protocol.epochs + 1):
        model.train()
        for i in torch.randperm(len(train)).tolist():
            _, losses = model.compute_loss(torch.tensor([y[i]]), torch.from_numpy(train[i])[None])
            optimizer.zero_grad()
            torch.stack(list(losses.values())).mean().backward()
            optimizer.step()
        if protocol.patience is None:
            continue
        logits, _ = ask(model, val)
        loss = float(binary_cross_entropy_with_logits(logits, torch.tensor(y_val, dtype=torch.float32)))
        if loss < best:
            best, best_epoch, weights = loss, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= protocol.patience:
            break
    if protocol.patience is None:
        return protocol.epochs, None
    model.load_state_dict(weights)
    return best_epoch, best


@torch.inference_mode()
def ask(model: MILModel, bags: Bags) -> tuple[torch.Tensor, list[Floats]]:
    """Logits (N,) of N bags, and what the model attends to in each: (patches,)."""
    model.eval()
    found = [model(torch.from_numpy(bag)[None], return_att=True) for bag in bags]
    return torch.cat([logit for logit, _ in found]), [att.flatten().numpy() for _, att in found]


def peer_fold(
    name: str,
    split: Split,
    bags: Mapping[str, Floats],
    labels: Mapping[str, int],
    seed: int,
    truth: Mapping[str, NDArray[np.int64]],
) -> Record:
    """One method on one fold, as `bench_crchisto.head_fold`; `name` is one of `PEERS`."""
    started = time.perf_counter()
    fitted_on = (*split.train, *split.val) if name.endswith(("_train_val", "_fixed_more")) else split.train
    train, val, test = standardised(
        [bags[case] for case in fitted_on],
        *([bags[case] for case in part] for part in (fitted_on, split.val, split.test)),
    )
    y, y_val = ([labels[case] for case in part] for part in (fitted_on, split.val))
    record: Record = {"epoch": 0, "val_loss": None, "patches": {}}
    if name in LOGISTIC:
        predicted = mean_pool_logistic(train, y, test, rescale=name.endswith("rescaled"))
    else:
        kind = next(each for each in MODELS if name.startswith(each))
        model = build_peer(kind, train[0].shape[1], seed)
        way = name.removeprefix(f"{kind}_")
        record["epoch"], record["val_loss"] = fit(model, train, y, val, y_val, WAYS[way])
        logits, attention = ask(model, test)
        predicted = torch.sigmoid(logits.double()).tolist()
        record["patches"]["attention"] = {
            case: patch_auc(truth[case], score)
            for case, score in zip(split.test, attention, strict=True)
            if labels[case] == 1 and case in truth
        }
    record["probabilities"] = dict(zip(split.test, predicted, strict=True))
    return record | {"seconds": time.perf_counter() - started}


def run_method(
    name: str, splits: Sequence[Split], bags: dict[str, Floats], labels: dict[str, int], seed: int
) -> Record:
    """One method with one seed on all folds: pooled AUC with interval, mean of the folds', seconds."""
    return over_folds([peer_fold(name, split, bags, labels, seed, {}) for split in splits], labels)


def over_folds(records: Sequence[Record], labels: Mapping[str, int]) -> Record:
    """The folds of one seed together: pooled AUC with interval, mean of the folds', epochs, seconds."""
    folds = [
        auc_of([labels[case] for case in each["probabilities"]], list(each["probabilities"].values()), 0)
        for each in records
    ]
    probability = {case: p for each in records for case, p in each["probabilities"].items()}
    pooled = auc_of([labels[case] for case in probability], list(probability.values()))
    return pooled | {
        "fold_mean": statistics.mean(fold["auc"] for fold in folds),
        "folds": [fold["auc"] for fold in folds],
        "epochs": [each["epoch"] for each in records if each["epoch"]],
        "seconds": sum(each["seconds"] for each in records),
        "probabilities": {case: probability[case] for case in labels},
    }


def auc_of(true: Classes, predicted: Sequence[float], resamples: int = 2000) -> Record:
    """The AUC of the probabilities of being positive, with its interval."""
    probabilities = np.array([(1 - p, p) for p in predicted])
    auc = evaluate(np.array(true), probabilities, list(CLASSES), resamples=resamples).auc
    return {"auc": auc.value, "low": auc.low, "high": auc.high}
