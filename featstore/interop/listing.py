"""What a foreign folder has to import: its bags' headers, and what is wrong with them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.cohort.names import natural_key
from featstore.cohort.tables import printable
from featstore.errors import FeatstoreError
from featstore.interop.placing import Placing
from featstore.interop.report import Skipped, Target
from featstore.interop.source import Entry, ImportProblem, Key, Source
from featstore.store import Store


def list_bags(
    source: Source,
    placing: Placing,
    listed: Sequence[tuple[str, str]],
    target: Target,
    skipped: Skipped,
) -> dict[Key, Entry]:
    """The bags that can be used, by where they go; in order of case, stain and slice.

    Raises:
        FeatstoreError: A bag cannot be used (and is not to be skipped), or two go to one place.
    """
    found: dict[Key, Entry] = {}
    owners: dict[Key | str, Entry] = {}
    first: FeatstoreError | None = None
    for name, path in listed:
        try:
            entry = source.look(name, path)
            key = placing.key(entry)
        except (FeatstoreError, OSError, MemoryError) as error:
            problem = problem_of(source, path, error)
            first = first or problem
            skipped.append(blame(source, path, problem))
            continue
        # Without a map a bag is a case of its own, also where two names are one id (038 and 38).
        alone = entry.key is None and not placing.is_mapped
        other = owners.setdefault(key.case if alone else key, entry)
        found[key] = entry
        if other is not entry:
            raise ImportProblem(
                f"two bags are case {key.case}"
                if alone
                else f"two bags are slice {key.slice_id} of stain {key.stain} in case {key.case}",
                expected="one bag a case, unless a map says more" if alone else "one bag a slice",
                where=f"{source.root / other.path} and {source.root / entry.path}",
                fix="rename one, or say with --map which case, stain and slice each is",
            )
    if first is not None and not target.skip_bad:
        if len(skipped) > 1:
            first.found += f" (and {len(skipped) - 1:,} more of {len(listed):,} bags cannot be used)"
        raise first
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(key: Key) -> tuple[Any, ...]:
    return natural_key(key.case), natural_key(key.stain), natural_key(key.slice_id)


def of_one_dim(
    source: Source, target: Target, wanted: Mapping[Key, Entry], skipped: Skipped
) -> dict[Key, Entry]:
    """The bags with as many features as most have.

    Raises:
        ImportProblem: Others have another number, and are not to be skipped.
    """
    counts = Counter(entry.dim for entry in wanted.values())
    usual = counts.most_common(1)[0][0]
    like = next(entry.path for entry in wanted.values() if entry.dim == usual)
    for entry in wanted.values():
        if entry.dim == usual:
            continue
        problem = ImportProblem(
            f"{entry.dim} features here, {usual} in {like}",
            expected="features of one encoder",
            where=str(source.root / entry.path),
            fix="import each encoder's features into a store of their own (--store-path FOLDER), "
            "or leave out those of other sizes with --on-bad skip",
        )
        if not target.skip_bad:
            raise problem
        skipped.append(blame(source, entry.path, problem))
    return {key: entry for key, entry in wanted.items() if entry.dim == usual}


def refuse_moved(source: Source, wanted: Mapping[Key, Entry], old: Store) -> None:
    """Refuse bags that the store has as another case, stain or slice: they would be there twice.

    Raises:
        ImportProblem: There is such a bag; says where it is.
    """
    known = set(old.cases())
    if all(key.case in known and _has(old, key) for key in wanted):
        return
    rows = old.sources()
    whole = rows.drop_duplicates(["case_id", "stain", "slice_id", "path"])
    homes: dict[tuple[str, int, int], list[Key]] = {}
    columns = ["case_id", "stain", "slice_id", "path", "size", "mtime_ns"]
    for case, stain, slice_id, path, size, mtime in whole[columns].itertuples(index=False):
        homes.setdefault((path, size, mtime), []).append(Key(case, stain, slice_id))
    for key, entry in wanted.items():
        places = homes.get((entry.path, *source.states(entry)[entry.path]), [])
        # All bags of a table come from one file: there the slice says which bag it is.
        others = [other for other in places if other.slice_id == key.slice_id or not source.is_one_file]
        if key not in places and others:
            there = others[0]
            raise ImportProblem(
                f"the bag {entry.name!r} is in the store already, as slice {there.slice_id} of stain "
                f"{there.stain} in case {there.case}",
                expected=f"it to be slice {key.slice_id} of stain {key.stain} in case {key.case} only",
                where=str(source.root / entry.path),
                fix=f"take it out there first (featstore rm --case {there.case} --slice {there.slice_id} "
                "--apply), or import into another store (--store-path FOLDER)",
            )


def _has(old: Store, key: Key) -> bool:
    groups = (group for part in old.record(key.case).parts for group in part.groups)
    return any((group.stain, group.slice_id) == (key.stain, key.slice_id) for group in groups)


def problem_of(source: Source, path: str, error: FeatstoreError | OSError | MemoryError) -> FeatstoreError:
    """An error that names its file, also where the system raised it."""
    if isinstance(error, MemoryError):
        return source.problem(source.root / path, "there is too little memory for this bag", "more of it")
    if isinstance(error, FeatstoreError):
        if error.where == path:
            error.where = str(source.root / path)
        return error
    where = Path(os.fsdecode(error.filename)) if error.filename else source.root / path
    return source.problem(where, f"the file cannot be read ({error.strerror or error})")


def blame(source: Source, path: str, problem: FeatstoreError) -> tuple[str, str]:
    """The file to blame, which may be another one than the bag's first, and why."""
    root = f"{source.root}/"
    blamed = problem.where.removeprefix(root) if problem.where.startswith(root) else path
    return printable(blamed), printable(problem.found)
