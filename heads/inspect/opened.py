"""A trained run, opened to be looked into: its head, its settings, its cases' embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from featstore.bags import BagBatch
from featstore.cohort.names import natural_sorted, normalize_case
from featstore.errors import ConfigError
from featstore.resident import CaseBags
from featstore.settings import nearest_name
from featstore.store import Store
from heads.cohort import check_unchanged, load_bags
from heads.config import Config
from heads.evaluation.checkpoints import identity_of, load_best_of, load_state
from heads.evaluation.runs import RunError, RunFolder, find_run, read_about, read_own_split
from heads.models.head import Head, load_plugin
from heads.project import on_this_machine, own_config, plugin_of, store_of
from heads.training.data import micro_batches

PARTS = ("test", "val", "train", "all")


@dataclass(frozen=True)
class Wanted:
    """Which run is looked into, and which of its cases.

    Attributes:
        run: Its path or name; the newest finished one by default.
        part: ``test``, ``val``, ``train``, or ``all`` three.
        cases: Case ids; these alone, if there are any.
    """

    run: Path | None = None
    part: str = "test"
    cases: tuple[str, ...] = ()


NEWEST = Wanted()


@dataclass(frozen=True)
class Opened:
    """A run and the cases of it that are looked into.

    Everything here is computed in float32, whatever the run was trained and evaluated in: the effect
    of one patch among thousands is less than what bf16 rounds away.

    Attributes:
        run: The folder.
        config: The run's, on this machine.
        project: The folder that the config's paths start from.
        about: What `run.json` says.
        head: Of the best epoch.
        bags: The cases' embeddings.
        cases: N case ids, in natural order.
        part: Which cases: ``test``, ``val``, ``train`` or ``all``.
        threshold: Of two classes, the probability of the second from which on it is called; None: the
            most probable class is called.
        temperature: That the run's calibration divides logits by; 1 without one.
        remarks: What is to be known of all that is found here: cases that the store lacks, embeddings
            that are others than those trained on.
    """

    run: RunFolder
    config: Config
    project: Path
    about: dict[str, Any]
    head: Head
    bags: CaseBags
    cases: tuple[str, ...]
    part: str
    threshold: float | None = None
    temperature: float = 1.0
    remarks: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """In config order."""
        return tuple(self.about["class_names"])

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) true class indices."""
        return np.array([self.about["labels"][case] for case in self.cases], np.int64)

    @property
    def schedule(self) -> dict[str, float]:
        """What the head is told of the epoch: the last one's, as in evaluation."""
        return self.head.schedule(self.config.train.epochs - 1, self.config.train.epochs)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a patch of the cases, in order; see `Store.table`."""
        return pd.concat([self.bags.store.table(case) for case in self.cases])

    def batches(self, budget: int | None = None) -> Iterator[BagBatch]:
        """The cases with all their patches, some at once.

        Args:
            budget: Patches a batch, at most; a larger case comes alone. By default the run's.
        """
        outlines = [self.bags.outlines[case] for case in self.cases]
        for bags in micro_batches(outlines, budget or self.config.train.patch_budget):
            yield self.bags.batch(bags)

    def share(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, C) logits as probabilities, float64, calibrated as the run's own are."""
        return torch.softmax(logits.double() / self.temperature, 1)

    def called(self, probabilities: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """(N,) the class that (N, C) probabilities are called, by the run's threshold if it has one."""
        if self.threshold is None:
            return np.asarray(probabilities.argmax(axis=1), np.int64)
        return np.asarray(probabilities[:, 1] >= self.threshold, np.int64)


def open_run(
    config: Config,
    project: Path,
    wanted: Wanted = NEWEST,
    tell: Callable[[str], None] = lambda text: None,
) -> Opened:
    """Open a run to look into it.

    Args:
        config: The project's settings; of the run its own are used.
        project: The folder that relative paths start from.
        wanted: Which run, and which of its cases.
        tell: Called with remarks.

    Raises:
        FeatstoreError: Run, checkpoint or store cannot be used; there are no such cases.
    """
    if wanted.part not in PARTS:
        raise ConfigError(f"--part is {wanted.part!r}", expected=" | ".join(PARTS), fix="--part test")
    run = find_run(project / config.runs.path, wanted.run)
    mine, about = on_this_machine(own_config(config, run, tell), config), read_about(run)
    # Where pictures are is a matter of the place, too.
    mine = mine.model_copy(update={"patches": config.patches, "images": config.images})
    mine = mine.model_copy(update={"train": mine.train.model_copy(update={"views": False})})
    load_plugin(plugin_of(mine, project))
    remarks: list[str] = []

    def remark(text: str) -> None:
        remarks.append(text.removeprefix("warning: "))
        tell(text)

    store = store_of(config, mine, about, project)
    cases = _there(store, _chosen(run, about, wanted, config.patches.normalize_cases), remark)
    labels = {case: about["labels"][case] for case in cases}
    bags = load_bags(mine, store, labels, tell, about["store"]["fingerprint"])
    if set(store.cases()) >= set(about["labels"]):
        check_unchanged(bags, about, remark)
    state = load_state(run.last, identity_of(mine, about))
    head = load_best_of(run, mine, about, state, remark).to(bags.device).float().eval()
    threshold, temperature = _of_results(run)
    return Opened(
        run, mine, project, about, head, bags, cases, wanted.part, threshold, temperature, tuple(remarks)
    )


def _there(store: Store, cases: tuple[str, ...], remark: Callable[[str], None]) -> tuple[str, ...]:
    """The cases that the store has."""
    known = set(store.cases())
    missing = [case for case in cases if case not in known]
    if len(missing) == len(cases):
        raise RunError(
            f"the store has none of the {len(cases)} cases",
            expected="the embeddings that the run was trained on",
            where=str(store.path),
            fix="featstore extract, or name the run's store: --store-path STORE",
        )
    if missing:
        some = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        remark(f"warning: {len(missing)} cases are no longer in the store and are left out: {some}")
    return tuple(case for case in cases if case in known)


def _chosen(run: RunFolder, about: dict[str, Any], wanted: Wanted, normalize: bool) -> tuple[str, ...]:
    part, only = wanted.part, wanted.cases
    parts = {n.removesuffix("_cases"): list(c) for n, c in read_own_split(run, about).parts().items()}
    there = natural_sorted(c for name, cases in parts.items() if part in (name, "all") for c in cases)
    if not there:
        raise RunError(
            f"the run has no {part} cases",
            expected="cases to look into",
            where=str(run.path),
            fix=f"choose another part: --part {next((n for n, c in parts.items() if c), 'all')}",
        )
    named = [normalize_case(case) if normalize and case not in there else case for case in only]
    if missing := [case for case in named if case not in there]:
        other = next((name for name, cases in parts.items() if missing[0] in cases), None)
        near = nearest_name(missing[0], there)
        raise RunError(
            f"{missing[0]!r} is no {'' if part == 'all' else f'{part} '}case of the run",
            expected=f"one of {', '.join(there[:10])}{', …' if len(there) > 10 else ''}",
            where=f"--case, {run.path}",
            fix=f"--part {other}" if other else f"--case {near}" if near else "choose another case",
        )
    return tuple(natural_sorted(set(named))) if only else tuple(there)


def _of_results(run: RunFolder) -> tuple[float | None, float]:
    """The run's own threshold and temperature; of a run without readable results, none and 1."""
    try:
        test = json.loads(run.results.read_text(encoding="utf-8"))["test"]
        threshold = None if test["threshold"] is None else float(test["threshold"])
        fitted = test.get("calibration")
        return threshold, 1.0 if fitted is None else float(fitted["temperature"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 1.0
