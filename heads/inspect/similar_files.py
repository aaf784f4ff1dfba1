"""`similar/` of a project: patches that look alike to the backbone, and a map of all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd

from featstore.cohort.tables import write_csv
from featstore.errors import ConfigError, FeatstoreError, StoreError
from featstore.store import Store
from featstore.store.ids import component
from heads.cohort import labelled_cases
from heads.config import Config
from heads.evaluation.plots import save
from heads.inspect.attention import read_attention
from heads.inspect.case_files import patch_title
from heads.inspect.embed import embed_png
from heads.inspect.maps import COLUMNS, plot_map, project_2d
from heads.inspect.opened import Wanted, open_run
from heads.inspect.pictures import GalleryTile, gallery, images_of
from heads.inspect.similar import Metric, PatchKey, find_patch, similar
from heads.inspect.tables import records

FOLDER = "similar"


@dataclass(frozen=True, eq=False)
class SimilarReport:
    """What `featstore similar` found.

    Attributes:
        query: The patch, as given.
        table: The nearest patches, the nearest first.
        files: What was written.
        notes: What could not be shown, and why.
    """

    query: str
    table: pd.DataFrame
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """One line a patch, and where the gallery is."""
        lines = [f"nearest to {self.query}"]
        for row in records(self.table):
            near = row.get("similarity", row.get("distance"))
            lines.append(f"  {row['rank']:3d}  {near:.4f}  {row['path']}")
        return "\n".join([*lines, *map(str, self.files), *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        found = {"query": self.query, "patches": records(self.table.astype(object))}
        return found | {"files": list(map(str, self.files)), "notes": list(self.notes)}


@dataclass(frozen=True, eq=False)
class MapReport:
    """What `featstore similar --map` drew.

    Attributes:
        table: Every patch with its place.
        files: What was written.
        notes: What could not be drawn, and why.
    """

    table: pd.DataFrame
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """Where the map is, and how much of the embeddings it shows."""
        first, second = self.table.attrs["explained_variance_ratio"]
        lines = [
            f"{len(self.table):,} patches; the map shows {first + second:.1%} of the embeddings' variance"
        ]
        return "\n".join([*lines, *map(str, self.files), *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types, without the patches."""
        share = [float(value) for value in self.table.attrs["explained_variance_ratio"]]
        found = {"patches": len(self.table), "explained_variance_ratio": share}
        return found | {"files": list(map(str, self.files)), "notes": list(self.notes)}


def similar_project(
    config: Config,
    project: Path,
    query: str,
    k: int = 20,
    metric: str = "cosine",
    other_cases: bool = False,
    stain: str | None = None,
    per_case: int | None = None,
) -> SimilarReport:
    """Find the patches nearest to one of the store, or to a PNG that is not in it.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        query: A patch's path in the store, its file or its file's name; or any other PNG file, which
            goes through the store's own backbone.
        k: How many.
        metric: ``cosine`` (after centring) or ``euclidean``.
        other_cases: Leave out the patch's own case.
        stain: Only patches of this stain.
        per_case: At most so many of a case.

    Raises:
        FeatstoreError: There is no such patch, or the store or its backbone cannot be used.
    """
    store = Store.open(project / config.store.path)
    asked = _asked(store, config, project, query)
    if other_cases and asked.path is None:
        raise ConfigError(
            f"{query} is no patch of the store, and so of no case",
            expected="--other-cases with a patch of the store",
            where="--other-cases",
            fix="leave it out",
        )
    like = embed_png(query, store, config, project) if asked.path is None else asked.path
    table = similar(store, like, k, cast(Metric, metric), other_cases, stain, per_case)
    (project / FOLDER).mkdir(exist_ok=True)
    files = [project / FOLDER / f"{asked.name}.csv"]
    write_csv(files[0], table.columns.tolist(), table.to_numpy(object).tolist())
    shown = [case for case in (asked.case, *table["case_id"]) if case is not None]
    images, why = images_of(config, project, store, shown)
    if images is None:
        return SimilarReport(query, table, tuple(files), (*asked.notes, why))
    near = "similarity" if metric == "cosine" else "distance"
    tiles = [] if asked.path is None else [GalleryTile(asked.path, "the patch itself")]
    for row in records(table):
        title = f"case {row['case_id']}\n{patch_title(row)}"
        tiles.append(GalleryTile(row["path"], title, {near: float(row[near])}))
    drawn = gallery(f"Nearest to {query}", tiles, images)
    files.append(project / FOLDER / f"{asked.name}.png")
    drawn.save(files[-1])
    return SimilarReport(query, table, tuple(files), (*asked.notes, *drawn.notes))


class _Asked(NamedTuple):
    """What is looked for: case and path of a patch of the store, or neither of another PNG.

    `name` is that of the files that are written, different for different patches and files.
    """

    case: str | None
    path: str | None
    name: str
    notes: tuple[str, ...] = ()


def _asked(store: Store, config: Config, project: Path, query: str) -> _Asked:
    file, folder = Path(os.path.abspath(query)), Path(os.path.abspath(project / config.patches.folder))
    wanted, is_file = query, file.is_file()
    # As written first: a folder below that of patches may be a link to elsewhere.
    for one, root in ((file, folder), (Path(os.path.realpath(file)), Path(os.path.realpath(folder)))):
        if one.is_relative_to(root):
            wanted = one.relative_to(root).as_posix()
            break
    try:
        case, position = find_patch(store, wanted)
        path = str(store.table(case)["path"].iloc[position])
    except StoreError:
        if not is_file:
            raise
        path = None
    name = f"nearest_{component(Path(query).stem)}"
    # A file of its own is none that only has the name of a patch in another folder.
    if path is None or (is_file and path != wanted):
        return _Asked(None, None, f"{name}~{_digest(file)}")
    notes: tuple[str, ...] = ()
    if is_file and wanted == query and not file.is_relative_to(folder):
        notes = (
            f"{path} is a patch of the store, and a file: the patch was taken; for the file, ./{path}",
        )
    if not _is_called_alone(store, path):
        name += f"~{_digest(path)}"
    return _Asked(case, path, name, notes)


def _is_called_alone(store: Store, path: str) -> bool:
    """Whether no patch of another folder has the file's name."""
    last = path.rpartition("/")[2]
    return [other.rpartition("/")[2] for other in store.table()["path"]].count(last) == 1


def _digest(path: Path | str) -> str:
    return sha256(os.fsencode(path)).hexdigest()[:8]


def map_project(
    config: Config,
    project: Path,
    run: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> MapReport:
    """Draw the map of all patches: coloured by stain, by class, and by a run's attention.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        run: Whose attention; the newest finished one by default. Its cases of all parts are asked.
        tell: Called with remarks.

    Raises:
        FeatstoreError: The store cannot be used.
    """
    store = Store.open(project / config.store.path)
    table = project_2d(store)
    notes: list[str] = []
    try:
        known = labelled_cases(config, project, store, lambda text: None)
        names = {case: known.class_names[label] for case, label in known.labels.items()}
        table["class"] = table["case_id"].map(names)
    except FeatstoreError as error:
        notes.append(f"no map by class: {error.found}")
    try:
        opened = open_run(config, project, Wanted(run, "all"), tell)
        tables = read_attention(opened)
        if tables is None:
            notes.append("no map by attention: the run's head has none")
        else:
            notes += _join_attention(table, tables.patches, store, opened.bags.store)
    except FeatstoreError as error:
        notes.append(f"no map by attention: {error.found}")
    folder = project / FOLDER
    folder.mkdir(exist_ok=True)
    files = [folder / "map.csv"]
    write_csv(files[0], table.columns.tolist(), table.to_numpy(object).tolist())
    for color, column in COLUMNS.items():
        if column in table and table[column].notna().any():
            files.append(folder / f"map_by_{color}.png")
            save(plot_map(table, color), files[-1])
    return MapReport(table, tuple(files), tuple(notes))


def _join_attention(table: pd.DataFrame, patches: pd.DataFrame, store: Store, of_run: Store) -> list[str]:
    """Add the column ``times_equal`` to a map's table.

    By the patches' ids: rows are numbered store by store, and the run's may be another than the map's.

    Returns:
        Notes.
    """
    size = patches.groupby("case_id")["effective_attention"].transform("size")
    ids = list(PatchKey._fields)
    index, places = (pd.MultiIndex.from_frame(frame[ids]) for frame in (patches, table))
    times = pd.Series((patches["effective_attention"] * size).to_numpy(), index)
    table[COLUMNS["attention"]] = times.reindex(places).to_numpy()
    notes = []
    if of_run.path.resolve() != store.path.resolve():
        notes.append(f"the attention is of a run on another store: {of_run.path}")
    if missing := int((~index.isin(places)).sum()):
        notes.append(f"{missing:,} of the run's {len(index):,} patches are not on the map by attention")
    return notes
