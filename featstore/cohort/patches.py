"""Folder of patches → the patch table: one row a patch, validated once, naturally ordered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.cohort.geometry import KEY, read_geometry
from featstore.cohort.names import check_id, normalize_case
from featstore.cohort.reading import Ids, Reader, Unparsed, unparsed_error
from featstore.cohort.walk import Found, walk
from featstore.config import PatchesConfig
from featstore.errors import CohortError, ConfigError

EXAMPLES = 5


@dataclass(frozen=True)
class Scan:
    """A folder's patches, and what was found besides.

    Attributes:
        table: One row a patch: `case_id, stain, slice_id` (ordered categoricals), `patch`
            (int64), `path` (POSIX, relative to `folder`), and geometry where known.
        folder: The folder scanned.
        unparsed: Files whose names could not be read, and pipes, sockets and devices named like
            patches (with `on_unparsed: skip`).
        normalized: Kind of id → as found → as used.
        merged: Kind of id → as used → the several spellings found (`38` and `038`).
        ignored: Suffix (or `hidden`, `litter folder`) → number of entries passed over.
        excluded: Case ids (normalised) of the exclusions that matched.
        excluded_patches: How many patches they took out.
        unknown_exclusions: Exclusions, as given, that matched no patch.
        links_skipped: Links to folders already scanned, and broken links.
        broken_links: Those of them that lead nowhere: no target, or a chain of links without end.
        geometry_unmatched: Rows of the geometry CSV that match no patch.
        geometry_missing: Patches without a row there.
    """

    table: pd.DataFrame
    folder: Path
    unparsed: list[Unparsed] = field(default_factory=list)
    normalized: dict[str, dict[str, str]] = field(default_factory=dict)
    merged: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    excluded_patches: int = 0
    unknown_exclusions: list[str] = field(default_factory=list)
    links_skipped: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)
    geometry_unmatched: int = 0
    geometry_missing: int = 0


def scan(
    folder: Path,
    patches: PatchesConfig,
    stains: Mapping[str, Iterable[str]] | None = None,
    exclude: Iterable[str] = (),
    *,
    base: Path | None = None,
    suffix: str = ".png",
) -> Scan:
    """Find and read the names of all patches' files below a folder.

    Args:
        folder: Searched at any depth; links to folders are followed, each folder once.
        patches: Grammar, normalisation, geometry and what to do about unreadable names.
        stains: Further stains: name → aliases.
        exclude: Case ids left out.
        base: What a relative `patches.geometry` is relative to; the working directory if None.
        suffix: Of the files' names.

    Returns:
        The patch table and everything worth reporting.

    Raises:
        CohortError: Folder, names, geometry or ids are not usable as they are.
        ConfigError: The pattern or the stains are not usable.
    """
    found = walk(folder, suffix)
    if not found.paths and not found.not_files:
        raise _no_patches(folder, found)
    result = build_table(
        found.paths, patches, stains, exclude, base=base, not_files=found.not_files, suffix=suffix
    )
    return replace(
        result,
        folder=folder,
        ignored=dict(sorted(found.ignored.items())),
        links_skipped=sorted(found.links_skipped),
        broken_links=sorted(found.broken_links),
    )


def build_table(
    paths: Iterable[str],
    patches: PatchesConfig,
    stains: Mapping[str, Iterable[str]] | None = None,
    exclude: Iterable[str] = (),
    *,
    base: Path | None = None,
    not_files: Iterable[str] = (),
    suffix: str = ".png",
) -> Scan:
    """Read names into a patch table, without touching any file but the geometry's.

    Args:
        paths: POSIX paths of the files, relative to the patch folder, in any order.
        patches: As for `scan`.
        stains: As for `scan`.
        exclude: As for `scan`.
        base: As for `scan`.
        not_files: Paths named like such files that are none; they count as unparsed.
        suffix: Of all names.

    Returns:
        As `scan`, with an empty `folder`.
    """
    reader = Reader(patches, stains or {}, suffix)
    if reader.has_positions and patches.geometry is not None:
        raise ConfigError(
            "patch positions come from two sources",
            expected="either groups x, y in patches.pattern or patches.geometry",
            where=KEY,
            fix="remove one of them",
        )
    for path in paths:
        reader.add(path)
    reader.refuse(not_files, "not a regular file")
    if not reader.paths and not reader.unparsed:
        raise _no_patches(Path(), Found(suffix))
    if reader.unparsed and (patches.on_unparsed == "stop" or not reader.paths):
        raise unparsed_error(reader, EXAMPLES)
    wanted = _exclusions(exclude, patches.normalize_cases)
    hits = [used for used in wanted if used in reader.cases.codes_used]
    kept = reader.without_cases(hits)
    if not len(kept):
        raise _all_excluded(len(reader.paths))
    frame = _frame(reader, kept)
    unmatched = missing = 0
    if patches.geometry is not None:
        file = (base or Path()) / patches.geometry
        columns, unmatched, missing = read_geometry(file, frame["path"].tolist())
        for name, values in columns.items():
            frame[name] = values
    return Scan(
        table=frame,
        folder=Path(),
        unparsed=sorted(reader.unparsed, key=lambda u: u.path),
        normalized=reader.normalized(),
        merged=reader.merged(),
        excluded=hits,
        excluded_patches=len(reader.paths) - len(kept),
        unknown_exclusions=[i for used, i in wanted.items() if used not in hits],
        geometry_unmatched=unmatched,
        geometry_missing=missing,
    )


def _exclusions(cases: Iterable[str], normalize: bool) -> dict[str, str]:
    """Case id as used → as first given."""
    wanted: dict[str, str] = {}
    for case in cases:
        check_id(case, "case", "exclude")
        wanted.setdefault(normalize_case(case) if normalize else case, case)
    return wanted


def _no_patches(folder: Path, found: Found) -> CohortError:
    others = ", ".join(f"{n} {suffix}" for suffix, n in found.ignored.most_common(EXAMPLES))
    kind = found.suffix.removeprefix(".").upper()
    return CohortError(
        f"no {kind} files below {folder}" + (f" (but {others})" if others else ""),
        expected=f"patches named case_ID_SLICE_STAIN_patchN{found.suffix}",
        where="patches.folder",
        fix="give the folder of patches: featstore init FOLDER, or --patches-folder FOLDER",
    )


def _all_excluded(patches: int) -> CohortError:
    return CohortError(
        f"no patches are left: all {patches} belong to excluded cases",
        expected="patches of other cases",
        where="exclude",
        fix="shorten the list `exclude`",
    )


def _frame(reader: Reader, kept: NDArray[np.intp]) -> pd.DataFrame:
    patch = np.frombuffer(reader.patch, dtype=np.int64)[kept]
    ids = [_ranked(group, kept) for group in (reader.cases, reader.stains, reader.slices)]
    (cases, _), (stains, _), (slices, _) = ids
    order = np.lexsort((patch, slices, stains, cases))
    paths = np.array(reader.paths, dtype=object)[kept][order]
    patch = patch[order]
    codes = [group[order] for group, _ in ids]
    _refuse_duplicates(codes, patch, paths)
    frame = pd.DataFrame(
        {
            name: pd.Categorical.from_codes(code, categories=pd.Index(names), ordered=True)
            for name, code, (_, names) in zip(("case_id", "stain", "slice_id"), codes, ids, strict=True)
        }
    )
    frame["patch"] = patch
    frame["path"] = paths
    if reader.has_positions:
        frame["x"] = np.frombuffer(reader.x, dtype=np.float64)[kept][order]
        frame["y"] = np.frombuffer(reader.y, dtype=np.float64)[kept][order]
    return frame


def _ranked(ids: Ids, kept: NDArray[np.intp]) -> tuple[NDArray[np.int32], list[str]]:
    """Codes renumbered in natural order of the ids, and the ids that are left."""
    codes = np.frombuffer(ids.codes, dtype=np.int32)[kept]
    names, rank = ids.ranks(np.unique(codes))
    return rank[codes], names


def _refuse_duplicates(
    codes: list[NDArray[np.int32]], patch: NDArray[np.int64], paths: NDArray[np.object_]
) -> None:
    same = patch[1:] == patch[:-1]
    for code in codes:
        same &= code[1:] == code[:-1]
    where = np.flatnonzero(same)
    if not len(where):
        return
    pairs = [" and ".join(sorted((paths[i], paths[i + 1]))) for i in where[:EXAMPLES]]
    more = f"\n    … and {len(where) - EXAMPLES} more" if len(where) > EXAMPLES else ""
    raise CohortError(
        f"{len(where)} {'patch has' if len(where) == 1 else 'patches have'} two files:\n    "
        + "\n    ".join(pairs)
        + more,
        expected="one file for each case, slice, stain and patch number (after ids are normalised)",
        where="patches.folder",
        fix="remove or rename one of each two; if the ids are truly different, "
        "pass --no-normalize-cases or --no-normalize-slices",
    )
