"""Which patches look alike to the backbone: the nearest ones by embedding, and a map of all of them."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from featstore.errors import ConfigError, StoreError
from featstore.store import Store
from heads.inspect.embed import embed_png
from heads.inspect.maps import plot_map, project_2d
from heads.inspect.tables import IDENTITY

__all__ = ["PatchKey", "cohort_mean", "embed_png", "plot_map", "project_2d", "similar"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Metric = Literal["cosine", "euclidean"]

_BLOCK = 2048  # rows that are held in float32 at a time


class PatchKey(NamedTuple):
    """Which patch: its ids, as the store has them."""

    case_id: str
    stain: str
    slice_id: str
    patch: int


class _Ranked(NamedTuple):
    """The best so far, best first: how near (larger is nearer), row in the store's table, case."""

    nearness: Floats
    rows: Ints
    cases: NDArray[np.object_]


def similar(
    store: Store,
    query: str | PathLike[str] | tuple[str, str, str, int] | ArrayLike,
    k: int = 20,
    metric: Metric = "cosine",
    exclude_case: bool | str = False,
    stain: str | None = None,
    per_case: int | None = None,
    mean: NDArray[np.float64] | None = None,
) -> pd.DataFrame:
    """The patches whose embeddings are nearest to a patch's, or to a vector.

    Cosines are those of embeddings less the mean of all patches: embeddings share a large common
    part, and without that any two patches look alike (a median cosine of 0.993 of random weights).

    Args:
        store: Where the embeddings are.
        query: A patch of the store, by its path or as (case, stain, slice, patch number); or vectors,
            (D,) or (Q, D). The patch itself is left out.
        k: How many.
        metric: ``cosine`` after centring, or ``euclidean``.
        exclude_case: Leave out a case: True for the query's own, or its id.
        stain: Only patches of this stain.
        per_case: At most so many of a case.
        mean: (D,) from `cohort_mean`, to save reading all embeddings for it again.

    Returns:
        ``rank`` from 1, ``similarity`` (the cosine, largest first) or ``distance`` (least first),
        ``case_id, stain, slice_id, patch, path``; of (Q, D) vectors also ``query``, from 0, in front.
        Equally near patches come in the patch table's order.

    Raises:
        StoreError: The store has no such patch or stain, two of this path, or embeddings that are not
            finite.
        ConfigError: A number of patches below 1, or an unknown metric.
    """
    for name, number in (("k", k), ("per_case", per_case)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}", expected="at least 1", where=name, fix="ask for more")
    if metric not in ("cosine", "euclidean"):
        expected = "cosine or euclidean"
        raise ConfigError(f"unknown metric {metric!r}", expected=expected, where="metric", fix="choose one")
    if stain is not None and stain not in store.stains():
        raise StoreError(
            f"the store has no stain {stain!r}",
            expected=" | ".join(store.stains()),
            where=str(store.path),
            fix="choose one of these",
        )
    vectors, itself, case = _query(store, query)
    if exclude_case is True and case is None:
        raise ConfigError(
            "the query is a vector, which is of no case",
            expected="a patch of the store, or a case's id",
            where="exclude_case",
            fix="name the case to leave out",
        )
    excluded = case if exclude_case is True else exclude_case or None
    centre = np.zeros(store.spec.dim)
    if metric == "cosine":
        centre = cohort_mean(store) if mean is None else mean
    shifted = (vectors - centre).astype(np.float32)
    best = [_Ranked(np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, object)) for _ in shifted]
    for name in store.cases():
        if name == excluded:
            continue
        outline = store.outline(name)
        of_stain = np.repeat(outline.stains, outline.stain_sizes)
        wanted = outline.rows != itself
        if stain is not None:
            wanted &= np.repeat(of_stain, outline.slice_sizes) == stain
        if not wanted.any():
            continue
        near = _nearness(store.features(name), shifted, centre.astype(np.float32), metric, name, store)
        for q in range(len(shifted)):
            best[q] = _merged(best[q], near[q][wanted], outline.rows[wanted], name, k, per_case or k)
    tables = [_described(store, ranked, metric) for ranked in best]
    if itself is None and np.ndim(query) == 2:  # type: ignore[arg-type]
        for q, table in enumerate(tables):
            table.insert(0, "query", q)
    return pd.concat(tables, ignore_index=True)


def cohort_mean(store: Store) -> NDArray[np.float64]:
    """(D,) the mean embedding of all patches of a store.

    Raises:
        StoreError: The store is empty, or an embedding is not finite.
    """
    total, count = np.zeros(store.spec.dim), 0
    for case in store.cases():
        features = store.features(case)
        for start in range(0, len(features), _BLOCK):
            total += features[start : start + _BLOCK].sum(axis=0, dtype=np.float64)
        if not np.isfinite(total).all():
            raise _not_finite(store, case)
        count += len(features)
    if not count:
        raise StoreError("the store has no embeddings", where=str(store.path), fix="featstore extract")
    return total / count


def _not_finite(store: Store, case: str) -> StoreError:
    return StoreError(
        f"case {case} has embeddings that are not finite (NaN or infinite)",
        expected="finite numbers",
        where=str(store.folder(case)),
        fix="embed or import the case again",
    )


def _query(store: Store, query: Any) -> tuple[NDArray[np.float64], int | None, str | None]:
    """(Q, D) vectors; of a patch its row in the store's table, and its case."""
    if isinstance(query, str | PathLike):
        return _patch(store, *find_patch(store, str(query)))
    if isinstance(query, tuple) and len(query) == 4 and isinstance(query[0], str):
        return _patch(store, *_by_key(store, PatchKey(*query)))
    vectors = np.atleast_2d(np.asarray(query, np.float64))
    if vectors.ndim != 2 or vectors.shape[1] != store.spec.dim or not np.isfinite(vectors).all():
        raise ValueError(f"a query of shape {vectors.shape} for finite vectors of {store.spec.dim}")
    return vectors, None, None


def _patch(store: Store, case: str, position: int) -> tuple[NDArray[np.float64], int, str]:
    vector = store.take(case, [position]).astype(np.float64)
    if not np.isfinite(vector).all():
        raise _not_finite(store, case)
    return vector, int(store.outline(case).rows[position]), case


def _by_key(store: Store, key: PatchKey) -> tuple[str, int]:
    if key.case_id in store.cases():
        table = store.table(key.case_id)
        hit = (table["stain"] == key.stain) & (table["slice_id"] == key.slice_id)
        found = np.flatnonzero((hit & (table["patch"] == key.patch)).to_numpy())
        if len(found):
            return key.case_id, int(found[0])
    raise StoreError(
        f"the store has no patch {key.patch} of slice {key.slice_id}, {key.stain}, case {key.case_id}",
        expected="case, stain, slice and patch number as Store.table() has them",
        where=str(store.path),
        fix="look them up there; `featstore info` lists cases and stains",
    )


def find_patch(store: Store, path: str) -> tuple[str, int]:
    """Case and position of the patch of this path, or of a bare file name that only one patch has."""
    exact: list[tuple[str, int]] = []
    named: list[tuple[str, int]] = []
    # Tables take milliseconds each: the cases whose ids are in the name first. Of patches that were
    # extracted, no two have one path.
    for case in sorted(store.cases(), key=lambda case: case not in path):
        for position, other in enumerate(store.table(case)["path"]):
            if other == path:
                exact.append((case, position))
            elif other.rpartition("/")[2] == path:
                named.append((case, position))
        if exact and not store.spec.is_imported:
            break
    found = exact or named
    if len(found) == 1:
        return found[0]
    raise StoreError(
        f"{len(found)} patches of the store are called {path}" if found else f"no patch is called {path}",
        expected="the path of one patch below the folder of patches",
        where=str(store.path),
        fix="write the path with its folders"
        if found
        else "check the path, or name a PNG file to have it embedded",
    )


def _nearness(
    features: NDArray[Any], queries: Floats, centre: Floats, metric: Metric, case: str, store: Store
) -> Floats:
    """(Q, P) how near a case's patches are, larger is nearer.

    Row by row, not as a matrix product, which gives equal rows results that differ in the last bits:
    equally near patches shall be told as such.
    """
    near = np.empty((len(queries), len(features)), np.float32)
    lengths = np.sqrt((queries**2).sum(axis=1))
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK].astype(np.float32) - centre
        if not np.isfinite(block).all():
            raise _not_finite(store, case)
        own = np.sqrt((block**2).sum(axis=1)) if metric == "cosine" else None
        for q, (query, length) in enumerate(zip(queries, lengths, strict=True)):
            place = near[q, start : start + len(block)]
            if own is None:
                place[:] = -np.sqrt(((block - query) ** 2).sum(axis=1))
            else:  # what lies at the mean has no direction: it is like nothing
                both = own * length
                np.divide((block * query).sum(axis=1), both, out=place, where=both > 0)
                place[both == 0] = 0
    return near


def _merged(best: _Ranked, near: Floats, rows: Ints, case: str, k: int, most: int) -> _Ranked:
    chosen = np.argsort(-near, kind="stable")[: min(k, most)]
    nearness = np.concatenate([best.nearness, near[chosen]])
    both = np.concatenate([best.rows, rows[chosen]])
    cases = np.concatenate([best.cases, np.full(len(chosen), case, object)])
    order = np.lexsort((both, -nearness))[:k]
    return _Ranked(nearness[order], both[order], cases[order])


def _described(store: Store, ranked: _Ranked, metric: Metric) -> pd.DataFrame:
    tables = {case: store.table(case)[IDENTITY] for case in dict.fromkeys(ranked.cases)}
    found = pd.concat(
        [tables[case].loc[[row]] for case, row in zip(ranked.cases, ranked.rows, strict=True)]
        or [pd.DataFrame(columns=IDENTITY)],
        ignore_index=True,
    )
    name, sign = ("similarity", 1) if metric == "cosine" else ("distance", -1)
    found.insert(0, name, sign * ranked.nearness)
    found.insert(0, "rank", np.arange(1, len(found) + 1))
    return found
