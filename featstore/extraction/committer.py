"""The writing end of the pipeline: embeddings are gathered by case and committed."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.errors import FeatstoreError
from featstore.extraction.forward import PendingFeatures
from featstore.extraction.geometry import corners
from featstore.extraction.loading import Loaded
from featstore.store import Slice, StoreWriter

# Batches between the forward pass and the writer: enough to ride out an fsync.
_QUEUE = 16


@dataclass(frozen=True)
class Batch:
    """Patches on their way to the store: rows (n,) of the pending table, in its order."""

    rows: NDArray[np.int64]
    features: PendingFeatures
    loaded: list[Loaded]


@dataclass
class _Buffer:
    """Rows of one case that wait for their commit."""

    rows: list[int] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)
    size: int = 0
    since: float = 0.0


class Committer:
    """Commits what it is given, in a thread of its own.

    A case's part is closed when a row of another case arrives, at ``part_bytes``,
    or when its first row has waited ``part_seconds``.

    Args:
        writer: The store.
        pending: The pending table (n rows), sorted by case.
        part_bytes: Size at which a part is closed.
        part_seconds: Age at which a part is closed.
    """

    def __init__(
        self, writer: StoreWriter, pending: pd.DataFrame, part_bytes: int, part_seconds: float
    ) -> None:
        self.committed = 0
        self.seconds = 0.0
        self._writer = writer
        self._part_bytes = part_bytes
        self._part_seconds = part_seconds
        self._case: NDArray[Any] = pending["case_id"].to_numpy(object)
        self._stain: NDArray[Any] = pending["stain"].to_numpy(object)
        self._slice: NDArray[Any] = pending["slice_id"].to_numpy(object)
        self._patch = pending["patch"].to_numpy(np.int64)
        self._path: NDArray[Any] = pending["path"].to_numpy(object)
        self._geometry = corners(pending)
        self._buffer = _Buffer()
        self._queue: queue.Queue[Batch | None] = queue.Queue(_QUEUE)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="featstore-committer", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Hand a batch over; waits while the writer is far behind.

        Raises:
            FeatstoreError: An earlier batch could not be committed.
        """
        self._raise()
        self._queue.put(batch)

    def close(self) -> None:
        """Commit everything that was handed over.

        Raises:
            FeatstoreError: Something could not be committed.
        """
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            # After an error the queue is still emptied, so that nobody waits for a place in it.
            if self._error is None:
                self._guarded(partial(self._add, batch))
        if self._error is None:
            self._guarded(self._commit)

    def _guarded(self, step: Any) -> None:
        try:
            step()
        except BaseException as error:
            self._error = error

    def _add(self, batch: Batch) -> None:
        features = batch.features.result()
        self._check(features, batch.rows)
        for i, row in enumerate(batch.rows.tolist()):
            buffer = self._buffer
            if buffer.rows and self._is_full(row):
                self._commit()
                buffer = self._buffer
            if not buffer.rows:
                buffer.since = time.monotonic()
            buffer.rows.append(row)
            buffer.features.append(features[i])
            buffer.loaded.append(batch.loaded[i])
            buffer.size += features[i].nbytes

    def _is_full(self, row: int) -> bool:
        buffer = self._buffer
        other = self._case[buffer.rows[-1]] != self._case[row]
        age = time.monotonic() - buffer.since
        return bool(other or buffer.size >= self._part_bytes or age >= self._part_seconds)

    def _check(self, features: NDArray[Any], rows: NDArray[np.int64]) -> None:
        bad = ~np.isfinite(features).all(axis=1)
        if bad.any():
            path = self._path[rows[bad][0]]
            if features.dtype == np.float16 and not np.isnan(features[bad][0]).any():
                raise FeatstoreError(
                    f"the embedding of {path} does not fit float16 (beyond ±65,504)",
                    where="extract.dtype",
                    fix="store float32: --dtype float32 (a new store is needed)",
                )
            raise FeatstoreError(
                f"the embedding of {path} is not finite",
                expected="finite numbers from the backbone",
                where="backbone.weights, extract.amp",
                fix="check the weights; with fp16 try --amp bf16 or --amp off",
            )

    def _commit(self) -> None:
        buffer, self._buffer = self._buffer, _Buffer()
        if not buffer.rows:
            return
        started = time.monotonic()
        rows = np.array(buffer.rows)
        self._writer.commit(self._case[rows[0]], self._slices(rows, buffer))
        self.committed += len(rows)
        self.seconds += time.monotonic() - started

    def _slices(self, rows: NDArray[np.int64], buffer: _Buffer) -> list[Slice]:
        features = np.stack(buffer.features)
        columns: dict[str, NDArray[Any]] = {
            "quality": np.stack([item.quality for item in buffer.loaded]),
            "source_stat": np.stack([item.stat for item in buffer.loaded]),
            "source_sha256": np.stack([item.sha256 for item in buffer.loaded]),
            "source_name": np.array([path.encode("utf-8") for path in self._path[rows]]),
        }
        if self._geometry is not None:
            columns["geometry"] = self._geometry[rows]
        # The pending table is sorted, so a slice's rows lie together, ascending in patch.
        same = (self._stain[rows][1:] == self._stain[rows][:-1]) & (
            self._slice[rows][1:] == self._slice[rows][:-1]
        )
        edges = [0, *(np.flatnonzero(~same) + 1).tolist(), len(rows)]
        return [
            Slice(
                stain=self._stain[rows[a]],
                slice_id=self._slice[rows[a]],
                columns={
                    "features": features[a:b],
                    "patch": self._patch[rows[a:b]],
                    **{name: values[a:b] for name, values in columns.items()},
                },
            )
            for a, b in pairwise(edges)
        ]
