"""`similar/` of a project: patches that look alike to the backbone, and a map of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd

from featstore.cohort.tables import write_csv
from featstore.errors import ConfigError, FeatstoreError
from featstore.store import Store
from featstore.store.ids import component
from heads.cohort import labelled_cases
from heads.config import Config
from heads.evaluation.plots import save
from heads.inspect.attention import read_attention
from heads.inspect.case_files import patch_title
from heads.inspect.embed import embed_png
from heads.inspect.maps import plot_map, project_2d
from heads.inspect.opened import open_run
from heads.inspect.pictures import GalleryTile, gallery, images_of
from heads.inspect.similar import find_patch, similar
from heads.inspect.tables import records

FOLDER = "similar"
Color = Literal["stain", "class", "attention"]
Metric = Literal["cosine", "euclidean"]


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
        query: A patch's path in the store, its file or its file's name; or a PNG file that lies outside
            the folder of patches, which goes through the store's own backbone.
        k: How many.
        metric: ``cosine`` (after centring) or ``euclidean``.
        other_cases: Leave out the patch's own case.
        stain: Only patches of this stain.
        per_case: At most so many of a case.

    Raises:
        FeatstoreError: There is no such patch, or the store or its backbone cannot be used.
    """
    store = Store.open(project / config.store.path)
    patch, asked = _asked(store, config, project, query)
    if other_cases and patch is None:
        raise ConfigError(
            f"{query} is no patch of the store, and so of no case",
            expected="--other-cases with a patch of the store",
            where="--other-cases",
            fix="leave it out",
        )
    table = similar(store, asked, k, cast(Metric, metric), other_cases, stain, per_case)
    (project / FOLDER).mkdir(exist_ok=True)
    stem = project / FOLDER / component(Path(query).stem)
    files = [stem.with_name(f"{stem.name}.csv")]
    write_csv(files[0], table.columns.tolist(), table.to_numpy(object).tolist())
    images, why = images_of(config, project, store)
    if images is None:
        return SimilarReport(query, table, tuple(files), (why,))
    near = "similarity" if metric == "cosine" else "distance"
    tiles = [] if patch is None else [GalleryTile(patch, "the patch itself")]
    for row in records(table):
        title = f"case {row['case_id']}\n{patch_title(row)}"
        tiles.append(GalleryTile(row["path"], title, {near: float(row[near])}))
    drawn = gallery(f"Nearest to {query}", tiles, images)
    files.append(stem.with_name(f"{stem.name}.png"))
    drawn.save(files[-1])
    return SimilarReport(query, table, tuple(files), tuple(drawn.notes))


def _asked(store: Store, config: Config, project: Path, query: str) -> tuple[str | None, Any]:
    """The path of a patch of the store, twice; or None and the embedding of a PNG that is not in it."""
    file, patches = Path(query), (project / config.patches.folder).resolve()
    if file.is_file() and not file.resolve().is_relative_to(patches):
        return None, embed_png(file, store, config, project)
    path = file.resolve().relative_to(patches).as_posix() if file.is_file() else query
    case, position = find_patch(store, path)
    found = str(store.table(case)["path"].iloc[position])
    return found, found


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
        tables = read_attention(open_run(config, project, run, "all", tell=tell))
        if tables is None:
            notes.append("no map by attention: the run's head has none")
        else:
            size = tables.patches.groupby("case_id")["effective_attention"].transform("size")
            table["effective_attention"] = tables.patches["effective_attention"] * size
    except FeatstoreError as error:
        notes.append(f"no map by attention: {error.found}")
    folder = project / FOLDER
    folder.mkdir(exist_ok=True)
    files = [folder / "map.csv"]
    write_csv(files[0], table.columns.tolist(), table.to_numpy(object).tolist())
    columns: dict[Color, str] = {"stain": "stain", "class": "class", "attention": "effective_attention"}
    for color, column in columns.items():
        if column in table and table[column].notna().any():
            files.append(folder / f"map_by_{color}.png")
            save(plot_map(table, color), files[-1])
    return MapReport(table, tuple(files), tuple(notes))
