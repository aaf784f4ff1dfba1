"""A checkpoint of the lab's own trainer as a run of the project, evaluated like any other."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from featstore.cohort.names import natural_sorted
from featstore.cohort.splits import Split
from featstore.store import Store
from heads.cohort import describe, labelled_cases, load_bags, read_cohort, sizes
from heads.config import Config, TrainConfig, resolved
from heads.evaluation.checkpoints import identity_of, load_weights, save_state
from heads.evaluation.lab_checkpoint import LabCheckpoint, read_lab_checkpoint
from heads.evaluation.predict import predict
from heads.evaluation.results import Evaluation, check_threshold
from heads.evaluation.runs import RunError, create_run
from heads.models.head import build_head
from heads.run import begin, evaluate_run
from heads.training.course import Progress

# Of a checkpoint's training nothing is known: of these settings alone the project's have a meaning.
_KEPT = ("device", "memory_gb", "patch_budget", "load_splits", "fold")


def import_checkpoint(
    config: Config, project: Path, path: Path, tell: Callable[[str], None] = lambda text: None
) -> Evaluation:
    """Make a run of a checkpoint of the lab's trainer, and evaluate it on its test cases.

    Args:
        config: The project's settings; ``train.load_splits`` (and ``fold``) say which are the test
            cases. Without, all labelled cases are.
        project: The folder that relative paths start from.
        path: The checkpoint.
        tell: Called with remarks.

    Raises:
        FeatstoreError: The checkpoint is none of this model, or does not fit store or classes.
    """
    found = read_lab_checkpoint(path)
    config = _own_config(config, found)
    store = Store.open(project / config.store.path)
    _check_dim(found, store)
    names, labels, split = _cases(config, project, store, tell)
    _check_classes(found, names)
    bags = load_bags(config, store, labels, tell)
    imported: dict[str, Any] = {
        "checkpoint": str(path.absolute()),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "model": found.to_text(),
        "splits": config.train.load_splits,
    }
    about = describe(bags, names, labels, split) | {"imported": imported}
    head = load_weights(build_head(config.head, found.dim, found.classes), found.weights, path)
    loss = predict(head, bags, split.val, config.train).loss if split.val else math.nan
    run = create_run(project / config.runs.path, config.runs.suffix)
    begin(run, config, about, split)
    progress = asdict(Progress(epoch=1, best_epoch=1, best_val_loss=loss))
    nothing: dict[str, Any] = {"ema": None, "scheduler": None, "class_weights": None}
    nothing |= {"optimizer": {}, "scaler": {}, "progress": progress}
    save_state(run, {"head": found.weights, "best": found.weights, **nothing}, identity_of(config, about))
    order = ", ".join(f"{i} = {name}" for i, name in enumerate(names))
    tell(f"{run.path}: {found.to_text()}; {sizes(split)}, {bags.device}")
    tell(f"the checkpoint's outputs are taken for {order}: the order of `classes`")
    return evaluate_run(run, config, about, bags, split, tell)


def _cases(
    config: Config, project: Path, store: Store, tell: Callable[[str], None]
) -> tuple[list[str], dict[str, int], Split]:
    """Names of the classes, class index by case, and the split that is named; else all are test cases."""
    if config.train.load_splits is not None:
        names, labels, split = read_cohort(config, project, store, tell)
        check_threshold(config.runs, [labels[case] for case in split.val], names)
        return names, labels, split
    _check_nothing_fitted(config)
    cohort = labelled_cases(config, project, store, tell)
    tell(
        "warning: no splits are named, and all labelled cases are evaluated, those too that the "
        "checkpoint was trained on: --load-splits FILE"
    )
    return cohort.class_names, cohort.labels, Split((), (), tuple(natural_sorted(cohort.labels)))


def _own_config(config: Config, found: LabCheckpoint) -> Config:
    """The settings of the head that the weights are of, and of a training of one epoch."""
    widths = {"embed_dim": found.embed_dim, "attention_hidden": found.attention_hidden}
    own: dict[str, Any] = {"name": "hierarchical", "attention_pool": found.pool, "plugin": None}
    kept = {name: getattr(config.train, name) for name in _KEPT}
    train = TrainConfig(epochs=1, standardize="none", amp="off", **kept)
    head = config.head.model_copy(update={**own, **widths, "options": {}})
    return resolved(config.model_copy(update={"head": head, "train": train}))


def _check_dim(found: LabCheckpoint, store: Store) -> None:
    if found.dim != store.spec.dim:
        raise RunError(
            f"the checkpoint takes {found.dim} features, and the store has {store.spec.dim} "
            f"({store.spec.backbone})",
            expected="the embeddings that the checkpoint was trained on",
            where=f"{found.path}, {store.path}",
            fix="import or extract those (4096 of DenseNet121: --pool 2), or name their store: "
            "--store-path FOLDER",
        )


def _check_nothing_fitted(config: Config) -> None:
    if config.runs.threshold != "argmax" or config.runs.calibration != "none":
        raise RunError(
            "no threshold or calibration can be chosen: without splits there are no validation cases",
            expected="splits with validation cases of every class",
            where="runs.threshold, runs.calibration, train.load_splits",
            fix="--load-splits FILE, or --threshold argmax --calibration none",
        )


def _check_classes(found: LabCheckpoint, names: Sequence[str]) -> None:
    if found.classes != len(names):
        raise RunError(
            f"the checkpoint has {found.classes} classes, and the project {len(names)}: {', '.join(names)}",
            expected="as many classes, in the order of the checkpoint's outputs",
            where=f"{found.path}, classes",
            fix="set `classes:` in featstore.yaml as they were in training",
        )
