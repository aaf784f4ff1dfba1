"""`probing/` of a run: what every single patch says, as tables, plots and galleries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from featstore.cohort.tables import write_csv
from featstore.errors import ConfigError
from featstore.files import replacing
from featstore.store.ids import component
from heads.config import Config
from heads.evaluation.plots import save
from heads.evaluation.runs import held
from heads.evaluation.studies import counted
from heads.inspect.attention_files import UNFINISHED, patch_images, remove_old, write_notes
from heads.inspect.case_files import patch_title
from heads.inspect.curve_tables import area_summary, curve_areas, effect_agreement, read_curves
from heads.inspect.opened import NEWEST, Opened, Wanted, open_run
from heads.inspect.pictures import GalleryTile, gallery, with_digests
from heads.inspect.probe_plots import alone_figure, curves_figure, effect_figure
from heads.inspect.probe_tables import MODES, ProbeTables, attended_but_neutral, most_for, read_probes
from heads.inspect.tables import records

FOLDER = "probing"
_OWN = ("*.csv", "*.parquet", "*.png", "notes.txt", "galleries/*.png")
FORMATS = ("csv", "parquet")
Update = Callable[[int, int], None]


@dataclass(frozen=True)
class ProbeOptions:
    """What is computed and shown of the patches.

    Attributes:
        mode: What galleries and plots are of: ``alone`` or ``in_place``; the tables have both.
        top_n: Patches a gallery.
        table_format: ``csv`` or ``parquet``.
        leave_out: Whether the effects of leaving patches, slices and stains out are wanted.
        curves: Whether deletion and insertion curves are wanted.
    """

    mode: str = "alone"
    top_n: int = 10
    table_format: str = "csv"
    leave_out: bool = True
    curves: bool = True


_USUAL = ProbeOptions()


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """What `featstore probe` wrote.

    Attributes:
        run: The run's folder.
        folder: Where the files are.
        tables: What every patch says.
        areas: Of deletion and insertion (`area_summary`), or None.
        agreement: Mean rank correlation over the cases of attention with the ``size`` of a patch's effect,
            and with the ``signed`` effect; None where there is none.
        notes: What could not be computed or shown, and why.
    """

    run: Path
    folder: Path
    tables: ProbeTables
    areas: pd.DataFrame | None
    agreement: dict[str, float] | None
    notes: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """Where the files are, and whether attention agrees with effect."""
        cases, patches = counted(len(self.tables.cases), "case"), len(self.tables.patches)
        lines = [f"{self.folder}: {cases}, {patches:,} patches"]
        if self.agreement is not None:
            lines.append(
                f"  attention and the effect of leaving a patch out, rank correlation, mean of the cases: "
                f"{self.agreement['size']:.3f} with its size, {self.agreement['signed']:.3f} with what it "
                f"adds to the called class"
            )
        if self.areas is not None:
            for row in records(self.areas):
                if row["order"] == "random":
                    continue
                against = f"{row['against_random']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
                name = f"{row['kind']} by {row['order']}"
                lines.append(f"  {name}: area {row['area']:.3f}, against random {against}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        areas = []
        if self.areas is not None:
            areas = records(self.areas.astype(object).where(self.areas.notna(), None))
        return {
            "run": str(self.run),
            "folder": str(self.folder),
            "cases": len(self.tables.cases),
            "patches": len(self.tables.patches),
            "attention_effect_correlation": self.agreement,
            "areas": areas,
            "notes": self.notes,
        }


def probe_project(
    config: Config,
    project: Path,
    wanted: Wanted = NEWEST,
    options: ProbeOptions = _USUAL,
    tell: Callable[[str], None] = lambda text: None,
    update: Update = lambda done, total: None,
) -> ProbeReport:
    """Write a run's `probing/`.

    Args:
        config: The project's settings; of the run its own are used.
        project: The folder that relative paths start from.
        wanted: Which run, and which of its cases.
        options: What is computed and shown.
        tell: Called with remarks.
        update: Called with the number of cases done, and of all.

    Raises:
        FeatstoreError: Run, checkpoint or store cannot be used; there are no such cases.
    """
    _one_of("--mode", options.mode, MODES)
    _one_of("--tables", options.table_format, FORMATS)
    if options.table_format == "parquet":
        _require_parquet()
    opened = open_run(config, project, wanted, tell)
    tables = read_probes(opened, options.leave_out, update)
    folder = opened.run.path / FOLDER
    folder.mkdir(exist_ok=True)
    with held(folder, "writing this probing"):
        remove_old(folder, _OWN)
        return _write_all(opened, tables, folder, options, update)


def _write_all(
    opened: Opened, tables: ProbeTables, folder: Path, options: ProbeOptions, update: Update
) -> ProbeReport:
    notes = [*opened.remarks, *([tables.reason] if tables.reason else [])]
    write_notes(folder, opened, [UNFINISHED])
    for name in ("patches", "slices", "stains", "cases"):
        _write(folder / f"{name}.{options.table_format}", getattr(tables, name), options.table_format)
    areas: pd.DataFrame | None = None
    agreement: dict[str, float] | None = None
    if options.curves:
        lines = read_curves(opened, tables, update=update)
        areas = area_summary(curve_areas(lines))
        _write(folder / "deletion_insertion.csv", lines, "csv")
        _write(folder / "deletion_insertion_areas.csv", areas, "csv")
        save(curves_figure(lines, areas), folder / "deletion_insertion.png")
    called = [f"effect_{name}" for name in opened.class_names]
    if "effective_attention" in tables.patches and set(called) <= set(tables.patches):
        ranks = effect_agreement(tables)
        _write(folder / "attention_effect.csv", ranks, "csv")
        save(effect_figure(tables), folder / "attention_effect.png")
        known = ranks[["size", "signed"]].dropna()
        agreement = (
            {str(name): float(value) for name, value in known.mean().items()} if len(known) else None
        )
    notes += _pictures(opened, tables, folder, options.mode, options.top_n)
    write_notes(folder, opened, notes)
    return ProbeReport(opened.run.path, folder, tables, areas, agreement, notes)


def _pictures(opened: Opened, tables: ProbeTables, folder: Path, mode: str, top_n: int) -> list[str]:
    """Plots and galleries; what cannot be shown is said."""
    if f"{mode}_{opened.class_names[0]}" not in tables.patches:
        return [f"no pictures of --mode {mode}: {tables.reason}"]
    save(alone_figure(tables, opened.class_names, mode), folder / f"{mode}_by_class.png")
    images, why = patch_images(opened)
    if images is None:
        return [why]
    (folder / "galleries").mkdir(exist_ok=True)
    notes: list[str] = []
    for name, title, rows in galleries(tables, opened.class_names, mode, top_n):
        of_cases = with_digests(images, opened.bags.store, rows["case_id"])
        drawn = gallery(title, probe_tiles(rows, opened.class_names, mode), of_cases)
        drawn.save(folder / "galleries" / f"{name}.png")
        notes += drawn.notes
    return list(dict.fromkeys(notes))


def galleries(
    tables: ProbeTables, class_names: tuple[str, ...], mode: str, top_n: int
) -> list[tuple[str, str, pd.DataFrame]]:
    """File name, title and patches of every gallery over all cases."""
    what = "alone" if mode == "alone" else "in the place of their slice"
    found = []
    for name in class_names:
        rows = most_for(tables, name, mode, top_n)
        found.append((f"most_{component(name)}", f"Patches that say most for {name}, {what}", rows))
    if "effective_attention" in tables.patches:
        rows = attended_but_neutral(tables, mode, top_n)
        found.append(("attended_but_neutral", f"Much attended, but neutral {what}", rows))
    return found


def probe_tiles(rows: pd.DataFrame, class_names: tuple[str, ...], mode: str) -> list[GalleryTile]:
    """A tile a patch, with what it says for each class (of two: for the second), and its attention."""
    names = class_names[1:] if len(class_names) == 2 else class_names
    tiles = []
    for row in records(rows):
        values = {f"p({name})": float(row[f"{mode}_{name}"]) for name in names}
        if "effective_attention" in row:
            values["attention"] = float(row["effective_attention"])
        tiles.append(GalleryTile(str(row["path"]), f"case {row['case_id']}\n{patch_title(row)}", values))
    return tiles


def _write(path: Path, table: pd.DataFrame, kind: str) -> None:
    if kind == "csv":
        write_csv(path, table.columns.tolist(), table.to_numpy(object).tolist())
        return
    with replacing(path) as aside:
        table.to_parquet(aside, index=False)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{option} is {value!r}", expected=" | ".join(known), fix=f"{option} {known[0]}")


def _require_parquet() -> None:
    """Raises ConfigError without pyarrow: better now than after the work."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Parquet needs pyarrow, which is not installed",
            where="--tables parquet",
            fix="pip install 'featstore[parquet]', or --tables csv",
        ) from error
