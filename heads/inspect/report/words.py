"""A report's words: what each metric means, the result in sentences, what was trained on what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from heads.config import Config, resolved
from heads.evaluation.studies import counted
from heads.inspect.report.content import Cell, Metric, Section, Table

FEW = 30  # test cases below which the reader is told how little they are

MEANINGS = {
    "auc": ("AUC", "How well cases are ranked: 0.5 is chance, 1 is perfect."),
    "accuracy": ("Accuracy", "The share of cases called right."),
    "balanced_accuracy": ("Balanced accuracy", "The mean over the classes of the share called right."),
    "sensitivity": ("Sensitivity", "Of the positive cases, the share called positive."),
    "specificity": ("Specificity", "Of the negative cases, the share called negative."),
    "f1": ("F1", "Harmonic mean of precision and sensitivity."),
    "average_precision": ("Average precision", "Precision, averaged over the recall curve."),
    "brier": ("Brier score", "Mean squared error of the probabilities; lower is better."),
    "ece": (
        "Calibration error (ECE)",
        "How far probabilities are from the share of right calls; lower is better.",
    ),
    "log_loss": ("Log loss", "How surprised the model is by the truth; lower is better."),
}


_OF_POSITIVES = ("sensitivity", "specificity", "f1", "average_precision")


def metrics_of(found: Mapping[str, Any]) -> tuple[Metric, ...]:
    """What `metrics.json` says of the test cases, in the page's order.

    Args:
        found: Its ``test``, or `Metrics.to_json`.

    Raises:
        KeyError, TypeError, ValueError: It is none.
    """
    names = list(found["recall"])
    of_classes = "Mean over the classes, each against the others." if len(names) > 2 else ""
    if len(names) == 2:
        of_classes = f"Positive: {names[1]}."
    rows = [
        _metric(label, found[name], f"{meaning} {of_classes}" if name in _OF_POSITIVES else meaning)
        for name, (label, meaning) in MEANINGS.items()
    ]
    return (*rows, *(
        _metric(f"Recall of {name}", each, f"Of the cases of {name}, the share called so.")
        for name, each in found["recall"].items()
    ))  # fmt: skip


def _metric(name: str, found: Mapping[str, Any], meaning: str) -> Metric:
    if found["value"] == "undefined":
        return Metric(name, None, reason=str(found["reason"]), meaning=meaning)
    low, high = (None if found[end] is None else float(found[end]) for end in ("low", "high"))
    return Metric(name, float(found["value"]), low, high, str(found.get("reason", "")), meaning)


def verdict(
    metrics: Sequence[Metric], labels: Sequence[int], right: int, class_names: Sequence[str]
) -> tuple[str, ...]:
    """The result in sentences.

    Args:
        metrics: From `metrics_of`.
        labels: (N,) true class indices.
        right: How many cases are called right.
        class_names: In config order.
    """
    by_name = {each.name: each for each in metrics}
    accuracy, auc, n = by_name["Accuracy"], by_name["AUC"], len(labels)
    frequent, count = Counter(labels).most_common(1)[0]
    said = [
        f"{right} of {counted(n, 'test case')} called right: accuracy {shown(accuracy)}. "
        f"Calling every case {class_names[frequent]} would have been right in {count / n:.3f}."
    ]
    said.append(f"AUC {shown(auc)}{_auc_meaning(auc, class_names)}")
    if n < FEW:
        few = "one test case" if n == 1 else f"only {n} test cases"
        said.append(f"With {few} every number here is a rough one: other cases could give others.")
    return tuple(said)


def _auc_meaning(auc: Metric, class_names: Sequence[str]) -> str:
    if auc.value is None:
        return "."
    pairs = (
        f": of a {class_names[1]} and a {class_names[0]} case, the first has the higher probability of "
        f"{class_names[1]} in {100 * auc.value:.0f} of 100 pairs."
        if len(class_names) == 2
        else ", the mean over the classes, each against the rest."
    )
    if auc.low is None or auc.high is None:
        return pairs
    if auc.low > 0.5:
        return f"{pairs} The interval lies above 0.5: better than chance."
    if auc.high < 0.5:
        return (
            f"{pairs} The interval lies below 0.5: worse than chance; are the labels the right way round?"
        )
    return f"{pairs} The interval includes 0.5: that it is better than chance has not been shown."


def shown(metric: Metric) -> str:
    """`0.867 (95% interval 0.667 to 1.000)`."""
    if metric.value is None:
        return f"undefined ({metric.reason})"
    if metric.low is None or metric.high is None:
        return f"{metric.value:.3f} ({metric.reason})" if metric.reason else f"{metric.value:.3f}"
    return f"{metric.value:.3f} (95% interval {metric.low:.3f} to {metric.high:.3f})"


def cohort_section(
    labels: Mapping[str, int], parts: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> Section:
    """How many cases of each class are in each part.

    Args:
        labels: Class index of every case.
        parts: Case ids by the part's name.
        class_names: In config order.
    """
    rows: list[tuple[Cell, ...]] = []
    for c, name in enumerate(class_names):
        counts = [sum(labels[case] == c for case in cases) for cases in parts.values()]
        rows.append((name, *counts, sum(label == c for label in labels.values())))
    whole = [len(cases) for cases in parts.values()]
    rows.append(("all classes", *whole, len(labels)))
    table = Table("Cases by class", ("class", *parts, "all labelled"), tuple(rows))
    return Section(
        "cohort", "Cohort", "How many cases of each class there are, and what each was for.", (), (table,)
    )


def provenance(about: Mapping[str, Any], config: Config) -> dict[str, str]:
    """What was trained on what, by which versions.

    Args:
        about: What `run.json` or `study.json` says.
        config: Of the run or study.
    """
    spec = about["store"].get("spec") or {}
    found = {
        "created": about.get("created", ""),
        "head": config.head.name,
        "backbone": spec.get("backbone", ""),
        "weights (sha256)": str(spec.get("weights_sha256", ""))[:16],
        "features": f"{about['dim']} a patch",
        "input": _input(spec),
        "fingerprint": about["store"]["fingerprint"],
        "embeddings (digest)": str(about["store"]["digest"])[:16],
        "classes": ", ".join(about["class_names"]),
        "seed": str(config.train.seed),
        "settings not at their defaults": "; ".join(_changed(config)) or "none",
        "versions": ", ".join(f"{name} {of}" for name, of in about.get("versions", {}).items()),
        "trained on": str(about.get("machine", {}).get("device", "")),
    }
    if imported := about.get("imported"):
        found["imported from"] = f"{imported['checkpoint'].rpartition('/')[2]}: {imported['model']}"
        found["its sha256"] = str(imported["sha256"])[:16]
        del found["settings not at their defaults"], found["seed"], found["trained on"]
    return {name: str(value) for name, value in found.items() if value}


def _input(spec: Mapping[str, Any]) -> str:
    if not spec.get("resize"):
        return ""
    return f"whole patch resized to {spec['resize']} px, {spec.get('channel_order', '')}".rstrip(", ")


def _changed(config: Config) -> list[str]:
    """Settings of head, training and evaluation that differ from what this head has by default."""
    name = {"name": config.head.name, "plugin": config.head.plugin, "options": config.head.options}
    standard = resolved(Config.model_validate({"head": name}))
    places = {"path", "suffix", "name", "seed", "device", "memory_gb", "processes", "load_splits", "amp"}
    found = []
    for section in ("head", "train", "runs"):
        mine, usual = (getattr(each, section).model_dump() for each in (config, standard))
        found += [
            f"{section}.{key} = {value}"
            for key, value in mine.items()
            if key not in places and value != usual[key]
        ]
    return found
