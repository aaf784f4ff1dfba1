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

# Embeddings between the forward pass and the writer, views included: enough to ride out an fsync.
# Of a patch at a time there may be thousands of batches; that the backbone has not computed them
# yet is not for the writer to wait for.
_QUEUED = 4_096
# Between two looks at what waits, while nothing comes.
_IDLE_SECONDS, _LONGEST_WAIT = 0.05, 60.0


@dataclass(frozen=True)
class Batch:
    """Patches on their way to the store.

    Attributes:
        rows: (n,) rows of the pending table, ascending.
        features: Their n · V embeddings, view by view within a patch; None if there are none.
        loaded: What else is known of each.
        failed: Rows that will never come: their files cannot be used.
    """

    rows: NDArray[np.int64]
    features: PendingFeatures | None
    loaded: list[Loaded]
    failed: list[int] = field(default_factory=list)


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

    Rows that come out of order (`schedule`) wait for those before them, up to ``part_seconds``. A
    case's part is closed when a row of another case arrives, at ``part_bytes``, or when its first row
    has waited ``part_seconds``.

    Args:
        writer: The store.
        pending: The pending table (n rows), sorted by case.
        part_bytes: Size at which a part is closed.
        part_seconds: Age at which a part is closed.
        rows: The rows that will come, ascending; all by default.
        views: Views a patch V.
    """

    def __init__(
        self,
        writer: StoreWriter,
        pending: pd.DataFrame,
        part_bytes: int,
        part_seconds: float,
        rows: NDArray[np.int64] | None = None,
        views: int = 1,
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
        self._views = views
        self._expected = list(range(len(pending))) if rows is None else rows.tolist()
        self._next = 0
        self._gone: set[int] = set()
        self._waiting: dict[int, tuple[NDArray[Any], Loaded]] = {}
        self._waiting_since = 0.0
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._queued = 0
        self._room = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="featstore-committer", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Hand a batch over; waits while the writer is far behind.

        Raises:
            FeatstoreError: An earlier batch could not be committed.
        """
        self._raise()
        with self._room:
            self._room.wait_for(lambda: self._queued < _QUEUED)
            self._queued += self._weight(batch)
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
        while (batch := self._next_batch()) is not None:
            # After an error the queue is still emptied, so that nobody waits for a place in it.
            if self._error is None:
                self._guarded(partial(self._add, batch))
            with self._room:
                self._queued -= self._weight(batch)
                self._room.notify_all()
        if self._error is None:
            self._guarded(self._finish)

    def _next_batch(self) -> Batch | None:
        """The next one; while none comes, what has waited long enough is committed."""
        while True:
            try:
                return self._queue.get(timeout=min(max(self._part_seconds, _IDLE_SECONDS), _LONGEST_WAIT))
            except queue.Empty:
                if self._error is None:
                    self._guarded(self._commit_old)

    def _weight(self, batch: Batch) -> int:
        return self._views * (len(batch.rows) + len(batch.failed))

    def _finish(self) -> None:
        self._release_all()
        self._commit()

    def _guarded(self, step: Any) -> None:
        try:
            step()
        except MemoryError as error:
            self._error = FeatstoreError(
                "memory ran out while embeddings were being written; what was committed is safe",
                where="extract.part_mb",
                fix="free the memory or set a smaller --part-mb, and run the command again",
            )
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error

    def _add(self, batch: Batch) -> None:
        self._gone.update(batch.failed)
        if batch.features is not None:
            features = batch.features.result()
            features = features.reshape(len(batch.rows), self._views, features.shape[-1])
            self._check(features, batch.rows)
            if not self._waiting:
                self._waiting_since = time.monotonic()
            for i, row in enumerate(batch.rows.tolist()):
                self._waiting[row] = (features[i], batch.loaded[i])
        while self._next < len(self._expected):
            row = self._expected[self._next]
            if row in self._waiting:
                self._take(row, *self._waiting.pop(row))
            elif row in self._gone:
                self._gone.discard(row)
            else:
                break
            self._next += 1
        if self._waiting and time.monotonic() - self._waiting_since >= self._part_seconds:
            self._finish()

    def _commit_old(self) -> None:
        """Commit what has waited ``part_seconds``, although nothing comes that would close its part."""
        since = [self._waiting_since] * bool(self._waiting) + [self._buffer.since] * bool(self._buffer.rows)
        if since and time.monotonic() - min(since) >= self._part_seconds:
            self._finish()

    def _release_all(self) -> None:
        """Let rows go that still wait for others: those are late, or will never come."""
        for row in sorted(self._waiting):
            self._take(row, *self._waiting.pop(row))
            self._gone.add(row)

    def _take(self, row: int, features: NDArray[Any], loaded: Loaded) -> None:
        if self._buffer.rows and self._is_full(row):
            self._commit()
        buffer = self._buffer
        if not buffer.rows:
            buffer.since = time.monotonic()
        buffer.rows.append(row)
        buffer.features.append(features)
        buffer.loaded.append(loaded)
        buffer.size += features.nbytes

    def _is_full(self, row: int) -> bool:
        buffer = self._buffer
        other = self._case[buffer.rows[-1]] != self._case[row] or row < buffer.rows[-1]
        age = time.monotonic() - buffer.since
        return bool(other or buffer.size >= self._part_bytes or age >= self._part_seconds)

    def _check(self, features: NDArray[Any], rows: NDArray[np.int64]) -> None:
        bad = ~np.isfinite(features).all(axis=(1, 2))
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
                    "features": np.ascontiguousarray(features[a:b, 0]),
                    **({"views": np.ascontiguousarray(features[a:b, 1:])} if self._views > 1 else {}),
                    "patch": self._patch[rows[a:b]],
                    **{name: values[a:b] for name, values in columns.items()},
                },
            )
            for a, b in pairwise(edges)
        ]
