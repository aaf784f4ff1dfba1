"""Writing foreign bags into a store, slice by slice, each whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore import __version__
from featstore.cohort.names import natural_sorted
from featstore.errors import FeatstoreError
from featstore.interop.listing import blame, list_bags, of_one_dim, problem_of, refuse_moved
from featstore.interop.placing import Placing
from featstore.interop.report import ImportReport, Skipped, Target
from featstore.interop.source import Contents, Entry, ImportProblem, Key, Places, Source
from featstore.process import stop_on_signal
from featstore.quality import QUALITY_COLUMNS
from featstore.spec import EmbeddingSpec
from featstore.store import Slice, Store, StoreWriter
from featstore.store.format import COORDS_COLUMNS, GEOMETRY_COLUMNS
from featstore.store.records import read_manifest
from featstore.store.writer import check_writable


def import_bags(
    source: Source,
    placing: Placing,
    target: Target,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> ImportReport:
    """Write all bags of a source that the store does not have.

    Every bag's header is read before anything is written (of vectors, the first of each slice). A
    slice is committed whole, and in one step with what it replaces; a case's slices together, up to
    about ``part_bytes``.

    Args:
        source: The foreign folder or file.
        placing: Which case, stain and slice a bag is.
        target: Where bags go, and how.
        observe: Called after every bag with how many are done, and of how many.

    Raises:
        FeatstoreError: A bag cannot be used (and is not to be skipped), bags do not fit together,
            or the store holds embeddings of another make.
    """
    started = time.monotonic()
    skipped: Skipped = []
    listed = source.bags()
    if not listed:
        raise source.problem(source.root, "there are no bags here")
    entries = list_bags(source, placing, listed, target, skipped)
    wanted = {key: entry for key, entry in entries.items() if key.case not in target.exclude}
    if not wanted:
        raise source.problem(source.root, "no bag is left to import", "at least one that can be used")
    excluded = len(entries) - len(wanted)
    wanted = of_one_dim(source, target, wanted, skipped)
    existing = read_manifest(target.path)
    spec = _spec(source, target, list(wanted.values()), existing)
    report = ImportReport(source.format, spec, target.path, skipped=skipped, notes=source.notes)
    report.excluded = excluded
    if unused := placing.unused(entries.values()):
        shown = ", ".join(natural_sorted(unused)[:5])
        report.notes.append(f"the map names {len(unused):,} bags that are not there ({shown})")
    report.labels = _labels(source, wanted)
    check_writable(target.path, spec)
    old = None if existing is None else Store.open(target.path)
    if old is not None:
        refuse_moved(source, wanted, old)

    @cache
    def writer() -> StoreWriter:  # makes the store: not before there is something to write
        return StoreWriter(target.path, spec, _provenance(source), target.file_format)

    with stop_on_signal() as received:
        _write(source, writer, old, wanted, target, report, observe, lambda: bool(received))
        report.interrupted = next(iter(received), None)
    if skipped and not report.bags + report.already and report.interrupted is None:
        raise source.problem(source.root / skipped[0][0], f"no bag could be used: {skipped[0][1]}")
    report.seconds = time.monotonic() - started
    return report


def _spec(
    source: Source, target: Target, entries: Sequence[Entry], existing: EmbeddingSpec | None
) -> EmbeddingSpec:
    """What is known of the embeddings."""
    dtypes = {entry.dtype for entry in entries}
    dtype = target.precision
    if dtype == "keep":
        half = dtypes == {"float16"}
        # A store of float32 takes float16 as it is; the other way round would lose digits.
        into_wider = existing is not None and existing.stored_dtype == "float32"
        dtype = "float16" if half and not into_wider else "float32"
    if other := sorted(dtypes - {dtype}):
        source.notes.append(f"{', '.join(other)} features are stored as {dtype}")
    encoder = target.encoder or source.encoder
    if encoder is None:
        source.notes.append(
            "the files do not say what made the features; --encoder NAME keeps those of others out"
        )
    return EmbeddingSpec.imported(source.format, encoder, entries[0].dim, dtype)


def _labels(source: Source, wanted: Mapping[Key, Entry]) -> dict[str, str]:
    """Raw class by case, from the classes of its bags."""
    found: dict[str, str] = {}
    for key, entry in wanted.items():
        label = source.labels.get(entry.name)
        if label is not None and found.setdefault(key.case, label) != label:
            raise ImportProblem(
                f"the bags of case {key.case} have two classes, {found[key.case]!r} and {label!r}",
                expected="one class a case",
                where=str(source.root / entry.path),
                fix="let each bag be a case of its own (no --map), or mend the labels",
            )
    return found


def _provenance(source: Source) -> dict[str, Any]:
    options = source.options
    return {
        "imported_from": str(source.root.absolute()),
        "format": source.format,
        "coords": source.coords_meaning,
        "details": source.details,
        "patch_size": options.patch_size,
        "mpp": options.mpp,
        "versions": {"featstore": __version__, "numpy": np.__version__},
    }


def _write(
    source: Source,
    writer: Callable[[], StoreWriter],
    old: Store | None,
    wanted: Mapping[Key, Entry],
    target: Target,
    report: ImportReport,
    observe: Callable[[int, int], None],
    stopped: Callable[[], bool],
) -> None:
    done = 0
    known = set() if old is None else set(old.cases())
    for case, members in groupby(wanted.items(), key=lambda item: item[0].case):
        there = _there(old, case) if old is not None and case in known else {}
        pending: list[Slice] = []
        for key, entry in members:
            if stopped():
                break
            item = _slice(source, key, entry, there, target, report)
            if item is not None:
                pending.append(item)
            if sum(kept.columns["features"].nbytes for kept in pending) >= target.part_bytes:
                _commit(writer(), case, pending, source, report)
                pending = []
            done += 1
            observe(done, len(wanted))
        if pending:
            _commit(writer(), case, pending, source, report)
        if stopped():
            return


def _commit(
    writer: StoreWriter, case: str, pending: Sequence[Slice], source: Source, report: ImportReport
) -> None:
    report.replaced += writer.commit(case, pending, whole=source.holds_whole_slices)
    report.bags += len(pending)
    report.patches += sum(len(item.patch) for item in pending)


def _there(old: Store, case: str) -> Mapping[tuple[str, str], pd.DataFrame]:
    """What the store has of a case, by stain and slice."""
    grouped = old.sources(case).groupby(["stain", "slice_id"], sort=False)
    return {(str(stain), str(slice_id)): rows for (stain, slice_id), rows in grouped}


def _slice(
    source: Source,
    key: Key,
    entry: Entry,
    there: Mapping[tuple[str, str], pd.DataFrame],
    target: Target,
    report: ImportReport,
) -> Slice | None:
    """A bag ready for its commit; None where the store has it, or it is skipped."""
    rows = there.get((key.stain, key.slice_id))
    try:
        states = source.states(entry)
        if rows is not None and not source.holds_whole_slices:  # a patch whose file is gone stays
            rows = rows[rows["path"].isin(list(states))]
        same = rows is not None and _same_files(rows, states, entry.rows)
        if same and rows is not None and _same_places(rows, source.places(entry)):
            report.already += 1
            return None
        return _columns(source, key, source.read(entry), report.spec)
    except (FeatstoreError, OSError, MemoryError) as error:
        problem = problem_of(source, entry.path, error)
        if not target.skip_bad:
            raise problem from error
        report.skipped.append(blame(source, entry.path, problem))
        return None


def _same_files(rows: pd.DataFrame, states: Mapping[str, tuple[int, int]], count: int) -> bool:
    here = zip(rows["path"], zip(rows["size"], rows["mtime_ns"], strict=True), strict=True)
    return len(rows) == count and all(states.get(path) == state for path, state in here)


def _same_places(rows: pd.DataFrame, places: Places) -> bool:
    """Whether the store has these positions: they may come from other files, or from options.

    What is not known now (no --patch-size this time) is no news.
    """
    pairs = ((GEOMETRY_COLUMNS, places.corners), (COORDS_COLUMNS, places.coords))
    for columns, values in pairs:
        stored = rows[list(columns)].to_numpy(np.float64)
        if values is not None and not ((stored == values) | np.isnan(values)).all():
            return False
    return True


def _columns(source: Source, key: Key, contents: Contents, spec: EmbeddingSpec) -> Slice:
    columns: dict[str, NDArray[Any]] = {
        "features": _cast(source, contents, spec.stored_dtype),
        "patch": contents.patch,
        "quality": np.full((len(contents.patch), len(QUALITY_COLUMNS)), np.nan, np.float32),
        "source_name": np.array([_bytes(name) for name in contents.names]),
        "source_stat": np.ascontiguousarray(contents.stat),
        "source_sha256": np.ascontiguousarray(contents.sha256),
    }
    places = contents.places
    for name, values in (("geometry", places.corners), ("coords", places.coords)):
        if values is not None:
            columns[name] = values
    return Slice(key.stain, key.slice_id, columns)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "backslashreplace")


def _cast(source: Source, contents: Contents, dtype: str) -> NDArray[Any]:
    """Embeddings in the store's dtype, all of them finite."""
    features = contents.features
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.ascontiguousarray(features, dtype)
    finite = np.isfinite(found).all(axis=1)
    if finite.all():
        return found
    bad = int(np.flatnonzero(~finite)[0])
    was_finite = bool(np.isfinite(features[bad]).all())
    what = f"values beyond the range of {dtype}" if was_finite else "NaN or infinity"
    raise ImportProblem(
        f"{what} in {int((~finite).sum()):,} of {len(found):,} embeddings, first in row {bad}",
        expected="finite numbers",
        where=str(source.root / contents.names[bad]),
        fix="import as --precision float32"
        if was_finite and dtype == "float16"
        else "mend it, or leave it out: --on-bad skip",
    )
