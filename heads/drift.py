"""`drift/` of a project: two stores of the same patches compared, and the same head on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.cohort.tables import write_csv
from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.forward import choose_device
from featstore.process import keep_freed_memory
from featstore.store import Store
from featstore.store.ids import component
from heads.cohort import labelled_cases
from heads.config import Config
from heads.drift_heads import Downstream, checked, restricted, train_both
from heads.evaluation.drift import Drift, compare_stores
from heads.evaluation.drift_plots import plot_drift
from heads.evaluation.drift_sums import PER_PATCH
from heads.evaluation.drift_words import lines, numbers, reading, strict
from heads.evaluation.metrics import Estimate
from heads.evaluation.runs import held, write_json, write_text

FOLDER = "drift"
RESULT = "drift.json"
_IDENTITY = ("case_id", "stain", "slice_id", "patch", "path")


@dataclass(frozen=True, eq=False)
class DriftReport:
    """What `featstore drift` found.

    Attributes:
        drift: The comparison.
        downstream: The same head on both; None if it was not trained.
        files: What was written.
        notes: What could not be done, and why.
    """

    drift: Drift
    downstream: Downstream | None
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def aucs(self) -> tuple[float | None, float | None, Estimate] | None:
        """Test AUC on A and on B, and their difference, means over the seeds."""
        if self.downstream is None:
            return None
        row = self.downstream.row("auc")
        return row.b, row.a, row.difference

    def to_text(self) -> str:
        """The measures, what they mean, and where the tables and pictures are."""
        found = lines(self.drift)
        if self.downstream is not None:
            found += ["", *_of_heads(self.downstream)]
        found += ["", reading(self.drift, self.aucs), ""]
        return "\n".join([*found, *map(str, self.files), *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types, without the single patches."""
        found = numbers(self.drift)
        found["downstream"] = None if self.downstream is None else self.downstream.to_json()
        found["reading"] = reading(self.drift, self.aucs)
        return strict(found | {"files": list(map(str, self.files)), "notes": list(self.notes)})


def drift_project(
    config: Config,
    project: Path,
    a: Path,
    b: Path,
    out: Path | None = None,
    neighbours: int = 10,
    sample: int = 5000,
    seeds: int = 1,
    downstream: bool = True,
    tell: Callable[[str], None] = lambda text: None,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> DriftReport:
    """Compare two stores, train the project's head on both, and write tables and pictures.

    Args:
        config: The project's settings: labels, head, training; ``train.seed`` also draws the sample.
        project: The folder that relative paths start from.
        a: A store, such as of the backbone before it was tuned.
        b: Another of the same patches.
        out: Where to write; ``drift/A_B/`` of the project by default.
        neighbours: How many nearest patches are compared.
        sample: Among how many patches; 0: all.
        seeds: How many trainings of the head on each store.
        downstream: Whether the head is trained.
        tell: Called with remarks.
        observe: Called with how many cases are read, and of how many.

    Raises:
        FeatstoreError: A store cannot be used, or they have no patch in common; the head of the config
            cannot be built. Labels or splits that cannot be used are a note in the report.
    """
    _check_asked(config, project, out, neighbours, sample)
    stores = (Store.open(a), Store.open(b))
    folder = project / FOLDER / _name(a, b) if out is None else out
    _refuse_inside(folder, stores)
    mine = checked(config, project, seeds) if downstream else config
    device = choose_device(config.train.device, "train.device")
    if device.type == "cpu":
        keep_freed_memory()
    notes: list[str] = []
    labels = _labels(config, project, stores, notes)
    limit = None if sample == 0 else sample
    seed = config.train.seed
    found = compare_stores(*stores, neighbours, limit, seed, labels, device, observe)
    trained = None
    if downstream and labels is None:
        notes.append("no head was trained: it needs labels")
    elif downstream:
        trained = _trained(mine, project, found, seeds, notes, tell)
    return _written(DriftReport(found, trained, (), tuple(notes)), folder)


def _check_asked(config: Config, project: Path, out: Path | None, neighbours: int, sample: int) -> None:
    """Raises ConfigError for what is named and not there, before hours of work."""
    splits = config.train.load_splits
    if splits is not None and not (project / splits).exists():
        raise ConfigError(
            f"there is no {splits}",
            expected="a file of a split, or a folder of them",
            where="train.load_splits",
            fix="check the path, or compare no head: --no-downstream",
        )
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(
            f"{out} is a file", expected="a folder to write to", where="--out", fix="--out FOLDER"
        )
    if sample > 1 and neighbours >= sample:
        raise ConfigError(
            f"{neighbours} neighbours among {sample} patches: all would be neighbours",
            expected="far fewer neighbours than patches",
            where="--neighbours, --sample",
            fix="--neighbours 10 --sample 5000",
        )


def _name(a: Path, b: Path) -> str:
    """Of the folder: both stores' names, with their parents' where they have the same."""
    paths = [each.resolve() for each in (a, b)]
    names = [each.name for each in paths]
    if names[0] == names[1]:
        names = [f"{each.parent.name}-{each.name}" for each in paths]
    return component("_".join(names))


def _refuse_inside(folder: Path, stores: tuple[Store, Store]) -> None:
    for store in stores:
        if folder.resolve().is_relative_to(store.path.resolve()):
            raise ConfigError(
                "the results would be written into a store",
                expected="a folder of their own",
                where=f"--out {folder}",
                fix="leave out --out, or name another folder",
            )


def _labels(
    config: Config, project: Path, stores: tuple[Store, Store], notes: list[str]
) -> dict[str, str] | None:
    """Class name of the labelled cases that both stores have; None without labels."""
    shared = sorted(set(stores[0].cases()) & set(stores[1].cases()))
    try:
        known = labelled_cases(config, project, restricted(stores[0], shared), lambda text: None)
    except FeatstoreError as error:
        notes.append(f"nothing by class: {error.found}")
        return None
    return {case: known.class_names[label] for case, label in known.labels.items()}


def _trained(
    config: Config, project: Path, drift: Drift, seeds: int, notes: list[str], tell: Callable[[str], None]
) -> Downstream | None:
    pairing = drift.pairing
    alone = {case for out in (pairing.only_a, pairing.only_b, pairing.changed) for case in out.cases}
    if alone & {case.case_id for case in pairing.cases}:
        notes.append("the heads see all patches of their store's common cases, not only the common patches")
    try:
        return train_both(config, project, (drift.a, drift.b), seeds, tell)
    except FeatstoreError as error:
        notes.append(f"no head was compared: {error.found}")
        return None


def _of_heads(found: Downstream) -> list[str]:
    """The heads' results as text."""
    sizes = "{} train, {} val, {} test cases".format(*found.cases)
    seeds = f"seed{'s' * (len(found.seeds) > 1)} {', '.join(map(str, found.seeds))}"
    said = [
        f"{found.head} trained on A and on B, {sizes}, {seeds}",
        f"{'':34}{'A':>10}{'B':>10}{'B − A':>10}",
    ]
    for metric, name in (("auc", "test AUC"), ("log_loss", "test log loss")):
        row = found.row(metric)
        values = ["undefined" if v is None else f"{v:.4f}" for v in (row.b, row.a)]
        estimate = row.difference
        shown = "undefined" if estimate.value is None else f"{estimate.value:+.4f}"
        interval = estimate.reason
        if estimate.low is not None and estimate.high is not None:
            interval = f"95% interval [{estimate.low:+.4f}, {estimate.high:+.4f}]"
        said.append(f"  {name:32}{values[0]:>10}{values[1]:>10}{shown:>10}   {interval}")
    losses = [sum(each) / len(each) for each in found.val_losses]
    said.append(
        f"  {'validation loss':32}{losses[0]:>10.4f}{losses[1]:>10.4f}{losses[1] - losses[0]:>+10.4f}"
    )
    return said


def _written(report: DriftReport, folder: Path) -> DriftReport:
    """The report with its files in the folder; `drift.json` says that they are whole, and comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, "comparing stores here"):
        (folder / RESULT).unlink(missing_ok=True)
        drift = report.drift
        write_csv(folder / "patches.csv", [*_IDENTITY, *PER_PATCH], _rows(drift))
        groups = drift.groups.astype(object).where(drift.groups.notna(), "")
        write_csv(folder / "groups.csv", groups.columns.tolist(), groups.to_numpy(object).tolist())
        aucs = None if report.aucs is None else report.aucs[:2]
        pictures = plot_drift(drift, folder, aucs)
        names = ["drift.txt", "groups.csv", "patches.csv", *(path.name for path in pictures), RESULT]
        done = DriftReport(drift, report.downstream, tuple(folder / name for name in names), report.notes)
        write_text(folder / "drift.txt", done.to_text() + "\n")
        write_json(folder / RESULT, done.to_json())
    return done


def _rows(drift: Drift) -> Iterator[tuple[object, ...]]:
    """The table of patches, case by case: of a million patches it is never held whole."""
    for table in drift.tables():
        numbers = [[_cell(value) for value in table[name].tolist()] for name in PER_PATCH]
        yield from zip(*(table[name].tolist() for name in _IDENTITY), *numbers, strict=True)


def _cell(value: float) -> float | str:
    """Six digits, which is what float32 carries; nothing where undefined."""
    return "" if math.isnan(value) else float(f"{value:.6g}")
