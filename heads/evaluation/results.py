"""What a finished training is worth, written into its run folder: numbers, tables, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from featstore.bags import BagBatch
from featstore.cohort.tables import write_csv
from featstore.errors import ConfigError
from heads.config import Config, RunsConfig, TrainConfig
from heads.evaluation.calibration import Calibration, calibrate
from heads.evaluation.case_plots import plot_confusion, plot_deviation
from heads.evaluation.metrics import Floats, Metrics, evaluate, youden_threshold
from heads.evaluation.plots import plot_history
from heads.evaluation.predict import PatchAttention, Predictions, predict
from heads.evaluation.runs import RunFolder, write_json, write_text
from heads.models.head import Head
from heads.models.outputs import HeadOutput
from heads.training.data import Bags

ATTENTION = "attention_analysis/patch_attention.csv"


@dataclass(frozen=True)
class Evaluation:
    """The best and the last epoch on the test cases.

    Attributes:
        run: The folder.
        part: Which cases: ``test``, ``val`` or ``train``.
        best: Predictions and metrics of the best epoch.
        last: Those of the last.
        best_epoch: Its number, from 1.
        best_val_loss: Its validation loss.
        epochs: Epochs trained.
        calibration: Of ``best`` and of ``last``; empty without calibration.

    Where ``last`` is ``best``, the last epoch is not there any more, and is not told of.
    """

    run: RunFolder
    part: str
    best: tuple[Predictions, Metrics]
    last: tuple[Predictions, Metrics]
    best_epoch: int
    best_val_loss: float
    epochs: int
    calibration: Mapping[str, Calibration] = field(default_factory=dict)

    def to_text(self) -> str:
        """Losses, accuracy and AUC, and where the rest is."""
        lines = [f"{self.run.path}"]
        lines.append(
            f"  best epoch {self.best_epoch} of {self.epochs}, validation loss {self.best_val_loss:.4f}"
        )
        lines += self.lines("best", f"{self.part}, best epoch")
        if self.last is not self.best:
            lines += self.lines("last", f"{self.part}, last epoch")
        return "\n".join(lines + self.threshold_lines())

    def lines(self, name: Literal["best", "last"], title: str) -> list[str]:
        """Loss, accuracy and AUC of the best or the last epoch, and its calibration if there is one."""
        predictions, metrics = self.best if name == "best" else self.last
        numbers = f"loss {predictions.loss:.4f}  accuracy {_shown(metrics, 'accuracy')}"
        lines = [f"  {title}: {metrics.n} cases  {numbers}  AUC {_shown(metrics, 'auc')}"]
        done = self.calibration.get(name)
        return lines + ([] if done is None else [f"    {done.to_text()}"])

    def threshold_lines(self) -> list[str]:
        """The threshold of the best epoch, if there is one."""
        threshold = self.best[1].threshold
        return [] if threshold is None else [f"  threshold {threshold:.3f}, from the validation cases"]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types, all metrics included."""
        return {
            "run": str(self.run.path),
            "part": self.part,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
            "epochs": self.epochs,
            "best": {"loss": self.best[0].loss, **self.metrics("best")},
            "last": {"loss": self.last[0].loss, **self.metrics("last")},
        }

    def metrics(self, name: Literal["best", "last"]) -> dict[str, Any]:
        """The metrics of the best or the last epoch, and its calibration if there is one, as JSON types."""
        metrics = self.best[1] if name == "best" else self.last[1]
        done = self.calibration.get(name)
        return metrics.to_json() | ({} if done is None else {"calibration": done.to_json()})


def check_threshold(runs: RunsConfig, val_labels: Sequence[int], class_names: Sequence[str]) -> None:
    """Whether a threshold can be had from the validation cases, if one is asked for.

    Raises:
        ConfigError: There are not two classes, or the validation cases are all of one.
    """
    if runs.threshold == "argmax" or (len(class_names) == 2 and len(set(val_labels)) == 2):
        return
    found = ", ".join(class_names[label] for label in sorted(set(val_labels)))
    raise ConfigError(
        f"no threshold can be chosen: the validation cases are of {found}",
        expected="two classes, both of them among the validation cases",
        where="runs.threshold",
        fix="--threshold argmax, or split again",
    )


def evaluate_heads(
    run: RunFolder,
    heads: Mapping[str, Head],
    bags: Mapping[str, Bags],
    config: Config,
    cases: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    progress: Mapping[str, Any],
    weights: torch.Tensor | None,
    part: str = "test",
) -> tuple[Evaluation, pd.DataFrame | None]:
    """Evaluate the ``best`` and the ``last`` head on one part of the split.

    Args:
        run: The folder.
        heads: By ``best`` and ``last``.
        bags: The cohort, with the embeddings that each of them takes.
        config: Resolved (`heads.config.resolved`).
        cases: Case ids by ``train``, ``val`` and ``test``.
        class_names: In config order.
        progress: ``epoch``, ``best_epoch`` and ``best_val_loss`` of the training.
        weights: (C,) class weights of the loss, or None.
        part: Which cases.

    Returns:
        The evaluation; the best head's attention on every patch of the cases, if the config asks
        for it and the head has attention.
    """
    wanted = config.runs.analyze_attention and part == "test"
    attention = PatchAttention(bags["best"], class_names) if wanted else None
    notes = {"best": attention}
    found: dict[str, tuple[Predictions, Metrics, Calibration | None]] = {}
    for name, head in heads.items():
        if name == "last" and head is heads["best"]:
            found[name] = found["best"]
            continue
        found[name] = _evaluate(
            head, bags[name], config, cases, class_names, weights, part, notes.get(name)
        )
    evaluation = Evaluation(
        run,
        part,
        found["best"][:2],
        found["last"][:2],
        int(progress["best_epoch"]),
        float(progress["best_val_loss"]),
        int(progress["epoch"]),
        {name: done for name, (_, _, done) in found.items() if done is not None},
    )
    return evaluation, attention.table() if attention is not None and attention.seen else None


def _evaluate(
    head: Head,
    bags: Bags,
    config: Config,
    cases: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    weights: torch.Tensor | None,
    part: str,
    attention: PatchAttention | None,
) -> tuple[Predictions, Metrics, Calibration | None]:
    """One head on one part; calibration and threshold, where asked for, are of the validation cases."""
    logits, predictions = _predict(head, bags, cases[part], config.train, weights, attention)
    threshold = done = None
    if config.runs.calibration == "temperature" or config.runs.threshold == "validation":
        seen_logits, seen = _predict(head, bags, cases["val"], config.train, weights)
        if config.runs.calibration == "temperature":
            done = calibrate(seen_logits, seen.labels, logits, predictions.labels, class_names)
            predictions = replace(predictions, probabilities=done.temperature.probabilities(logits))
            seen = replace(seen, probabilities=done.temperature.probabilities(seen_logits))
        if config.runs.threshold == "validation":
            threshold = youden_threshold(seen.labels, seen.probabilities[:, -1])
    metrics = evaluate(
        predictions.labels,
        predictions.probabilities,
        class_names,
        threshold=threshold,
        resamples=config.runs.resamples,
    )
    return predictions, metrics, done


def _predict(
    head: Head,
    bags: Bags,
    cases: Sequence[str],
    train: TrainConfig,
    weights: torch.Tensor | None,
    attention: PatchAttention | None = None,
) -> tuple[Floats, Predictions]:
    """(N, C) logits of cases, and what `predict` makes of them."""
    logits: list[torch.Tensor] = []

    def observe(batch: BagBatch, output: HeadOutput) -> None:
        logits.append(output.logits.double().cpu())
        if attention is not None:
            attention(batch, output)

    predictions = predict(head, bags, cases, train, weights, observe)
    return np.asarray(torch.cat(logits).numpy(), np.float64), predictions


def write_results(
    done: Evaluation, config: Config, history: pd.DataFrame, attention: pd.DataFrame | None
) -> None:
    """Write everything about the test cases; ``results.json`` comes last and says: finished."""
    folder, (predictions, metrics) = done.run.path, done.best
    if attention is not None:
        (folder / ATTENTION).parent.mkdir(exist_ok=True)
        write_csv(folder / ATTENTION, attention.columns.tolist(), attention.to_numpy(object).tolist())
    write_predictions(folder / "predictions.csv", predictions, metrics)
    plot_confusion(metrics.confusion_matrix, metrics.class_names, folder / "confusion_matrix.png")
    plot_deviation(
        predictions.case_ids,
        predictions.labels,
        predictions.probabilities,
        metrics.class_names,
        folder / "deviation_plot.png",
        None if metrics.threshold is None else float(metrics.threshold),
    )
    plot_history(history, folder)
    write_json(folder / "metrics.json", {"test": done.metrics("best"), "test_last": done.metrics("last")})
    write_text(folder / "results.txt", _results_text(done))
    write_json(
        done.run.results,
        {
            "train": {
                "best_val_loss": done.best_val_loss,
                "epochs": done.epochs,
                "best_epoch": done.best_epoch,
            },
            "test": _results(*done.best, done.calibration.get("best")),
            "test_last": _results(*done.last, done.calibration.get("last")),
            "args": config.model_dump(),
        },
    )


def write_predictions(path: Path, predictions: Predictions, metrics: Metrics) -> None:
    """``case_id, true_label, predicted_label, prob_<class>…, correct``, one row a case."""
    names, chosen = metrics.class_names, predicted(predictions, metrics)
    columns = ["case_id", "true_label", "predicted_label", *(f"prob_{name}" for name in names), "correct"]
    rows = zip(
        predictions.case_ids,
        predictions.labels.tolist(),
        chosen,
        predictions.probabilities.tolist(),
        strict=True,
    )
    write_csv(
        path, columns, [(case, names[t], names[p], *probs, int(t == p)) for case, t, p, probs in rows]
    )


def predicted(predictions: Predictions, metrics: Metrics) -> list[int]:
    """(N,) class indices: the most probable class, or by the threshold."""
    if metrics.threshold is None:
        return [int(index) for index in predictions.probabilities.argmax(axis=1)]
    return [int(p >= metrics.threshold) for p in predictions.probabilities[:, 1]]


def _results(predictions: Predictions, metrics: Metrics, calibration: Calibration | None) -> dict[str, Any]:
    return {
        "test_loss": predictions.loss,
        "test_accuracy": metrics.accuracy.value,
        "test_auc": metrics.auc.value,
        **{f"recall_{name}": estimate.value for name, estimate in metrics.recall.items()},
        "predictions": predicted(predictions, metrics),
        "true_labels": predictions.labels.tolist(),
        "case_ids": list(predictions.case_ids),
        "prediction_probs": predictions.probabilities.tolist(),
        "num_samples": metrics.n,
        "class_names": list(metrics.class_names),
        "threshold": metrics.threshold,
        "calibration": None if calibration is None else calibration.to_json(),
    }


def _results_text(done: Evaluation) -> str:
    lines = []
    checkpoints = {"best": done.run.best.name, "last": done.run.last.name}
    for name, (predictions, metrics) in (("best", done.best), ("last", done.last)):
        epoch = done.best_epoch if name == "best" else done.epochs
        lines += [
            f"Checkpoint: checkpoints/{checkpoints[name]} ({name} epoch, {epoch})",
            f"Test loss: {predictions.loss:.4f}",
            f"Test accuracy: {_shown(metrics, 'accuracy')}",
            f"Test AUC: {_shown(metrics, 'auc')}",
            f"Number of samples: {metrics.n}",
            *([] if metrics.threshold is None else [f"Threshold (validation): {metrics.threshold:.3f}"]),
            *([f"Calibration: {done.calibration[name].to_text()}"] if name in done.calibration else []),
            "",
        ]
    return "\n".join(lines)


def _shown(metrics: Metrics, name: str) -> str:
    estimate = getattr(metrics, name)
    if estimate.value is None:
        return f"undefined ({estimate.reason})"
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{interval}"
