"""The one pass: decoding, forward passes and commits, all at the same time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.config import ImagesConfig
from featstore.errors import FeatstoreError, ImageError
from featstore.extraction.committer import Batch, Committer
from featstore.extraction.forward import Embedder
from featstore.extraction.loading import Loaded, Raw, Views, load, read
from featstore.extraction.schedule import Rows, Schedule
from featstore.images import Preprocessing

T = TypeVar("T")
R = TypeVar("R")
# Threads that only wait for the disk or the network.
_READERS = 8
# While a patch is waited for, a stop is looked for this often.
_SECONDS = 0.2
# Pixels that may be decoded ahead of the forward pass, besides the patches of the next batches.
_PIXELS_AHEAD = 1 << 25
# Of small patches these would be thousands, which helps nobody.
_PATCHES_AHEAD = 1 << 10


@dataclass(frozen=True)
class Work:
    """What a pass has to do.

    Attributes:
        pending: Rows of the patch table, sorted.
        folder: The patches folder.
        preprocessing: What the backbone wants.
        schedule: Which rows, in which order.
        images: Colour and size policy, and what to do about bad images.
        views: How many views each patch has.
        workers: Decoding threads.
    """

    pending: pd.DataFrame
    folder: Path
    preprocessing: Preprocessing
    schedule: Schedule
    images: ImagesConfig
    views: Views
    workers: int


@dataclass
class Progress:
    """How far a pass is, and what it waits for.

    Attributes:
        total: Patches to do.
        done: Patches computed.
        started: When the pass began, on the monotonic clock.
        skipped: (path, reason) of files that turned out to be unusable.
        converted: How many patches were converted, by how.
        waited_for_decoding: Seconds in which the forward pass had no batch.
        forward: Seconds in which the backbone was waited for.
        waited_for_writing: Seconds in which the writer was too far behind.
        reading: Seconds of all reading threads together.
        decoding: Seconds of all decoding threads together.
        writing: Seconds of the writing thread.
        busy: Seconds in which the device computed; None where only its driver knows.
    """

    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)
    waited_for_decoding: float = 0.0
    forward: float = 0.0
    waited_for_writing: float = 0.0
    reading: float = 0.0
    decoding: float = 0.0
    writing: float = 0.0
    busy: float | None = None

    @property
    def rate(self) -> float:
        """Patches per second so far."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    @property
    def bound_by(self) -> str:
        """What takes most of the time: ``decoding``, ``backbone`` or ``writing``."""
        times = {
            "decoding": self.waited_for_decoding,
            "backbone": self.forward,
            "writing": self.waited_for_writing,
        }
        return max(times, key=lambda name: times[name])


Observer = Callable[[Progress], None]


def run_pass(
    work: Work,
    embedder: Embedder,
    committer: Committer,
    observe: Observer,
    stopped: Callable[[], bool],
) -> Progress:
    """Push every pending patch through the backbone once, and commit its embedding.

    Whatever ends the pass early (a bad image, a stop), everything computed until
    then is committed.

    Args:
        work: What to do.
        embedder: The backbone.
        committer: Takes the embeddings; is closed here.
        observe: Called after every batch.
        stopped: Asked before every batch; True ends the pass.

    Raises:
        ImageError: A file turned out to be unusable and ``on_bad_image`` is ``stop``.
        FeatstoreError: Memory or disk ran out, or an embedding is not finite.
    """
    progress = Progress(total=len(work.pending), skipped=list(work.schedule.skipped))
    paths = work.pending["path"].tolist()
    keys = _keys(work)

    def read_job(row: int) -> tuple[int, Raw]:
        return row, read(work.folder, paths[row], work.images.max_pixels)

    def decode_job(reading: Future[tuple[int, Raw]]) -> tuple[float, Loaded]:
        row, raw = reading.result()
        loaded = load(
            raw,
            paths[row],
            work.preprocessing,
            work.images.channel_order,
            work.images.max_pixels,
            work.views,
            keys[row] if keys else "",
        )
        _check_size(loaded, work.schedule.sizes[row], paths[row])
        return raw.seconds, loaded

    batches = list(work.schedule.batches(embedder.forward_size, work.views.count))
    order = [row for rows in batches for row in rows.tolist()]
    pixels = work.schedule.sizes.prod(axis=1) * work.views.count
    ahead = 2 * max(1, embedder.batch_size // work.views.count) + 2 * work.workers
    with (
        ThreadPoolExecutor(_READERS, "featstore-reader") as readers,
        ThreadPoolExecutor(work.workers, "featstore-decoder") as decoders,
    ):
        try:
            raw = _ahead(readers, read_job, order, lambda at: 1, 2 * work.workers + _READERS)
            most = ahead * int(pixels[order].min()) + _PIXELS_AHEAD if order else 1
            least = most // max(ahead, _PATCHES_AHEAD)
            decoded = _ahead(decoders, decode_job, raw, lambda at: max(least, int(pixels[order[at]])), most)
            for rows in batches:
                if stopped():
                    break
                _advance(rows, decoded, paths, work, embedder, committer, progress, stopped)
                observe(progress)
        finally:
            # What was computed is committed before a read that hangs is waited for.
            readers.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(wait=False, cancel_futures=True)
            _close(committer, embedder, progress)
    return progress


def _close(committer: Committer, embedder: Embedder, progress: Progress) -> None:
    """Let everything be committed; only its own work there is the writer's, the rest the backbone's."""
    before, started = committer.seconds, time.monotonic()
    try:
        committer.close()
    finally:
        waited, written = time.monotonic() - started, committer.seconds - before
        progress.waited_for_writing += min(waited, written)
        progress.forward += max(0.0, waited - written)
        progress.writing, progress.busy = committer.seconds, embedder.busy_seconds


def _keys(work: Work) -> list[str]:
    """What tells each patch from all others; nothing where no view depends on it."""
    if work.views.count == 1:
        return []
    columns = work.pending[["case_id", "stain", "slice_id", "patch"]].astype(str)
    return ["\0".join(row) for row in columns.itertuples(index=False)]


def _check_size(loaded: Loaded, size: NDArray[np.int64], path: str) -> None:
    """A file may be replaced after its header was looked at: it no longer fits its batch.

    Raises:
        ImageError: The patch has another size than it was scheduled with.
    """
    height, width = loaded.pixels.shape[1:3]
    if (height, width) != tuple(size.tolist()):
        raise ImageError(
            f"{path} is {width} × {height} px now",
            expected=f"{size[1]} × {size[0]} px, as at the start of the run",
            where=path,
            fix="run the command again when nobody is changing the folder",
        )


def _advance(
    rows: Rows,
    decoded: Iterator[Future[tuple[float, Loaded]]],
    paths: list[str],
    work: Work,
    embedder: Embedder,
    committer: Committer,
    progress: Progress,
    stopped: Callable[[], bool],
) -> None:
    """One batch: take its patches, compute, hand over; of a stop while waiting, those that are there.

    Raises:
        ImageError: A file is unusable and that is to end the pass; what was decoded before it in
            this batch is computed and handed over all the same.
    """
    started = time.monotonic()
    taken, loaded, failed = [], [], []
    error: ImageError | None = None
    for row in rows.tolist():
        future = next(decoded)
        while not wait((future,), _SECONDS).done and not stopped():
            pass
        if not future.done():
            break
        try:
            seconds, item = future.result()
        except ImageError as problem:
            if work.images.on_bad_image == "stop":
                error = problem
                break
            progress.skipped.append((paths[row], problem.reason(paths[row])))
            failed.append(row)
            continue
        progress.reading += seconds
        progress.decoding += item.seconds
        taken.append(row)
        loaded.append(item)
    progress.waited_for_decoding += time.monotonic() - started
    if taken or failed:
        _compute(np.array(taken, np.int64), loaded, failed, embedder, committer, progress)
    if error is not None:
        raise error


def _compute(
    rows: Rows,
    loaded: list[Loaded],
    failed: list[int],
    embedder: Embedder,
    committer: Committer,
    progress: Progress,
) -> None:
    started = time.monotonic()
    features = embedder(_together(loaded)) if loaded else None
    computed = time.monotonic()
    # Pixels are hundreds of times larger than embeddings: they must not wait in the writer.
    slim = [replace(item, pixels=np.empty((0, 0, 0, 3), np.uint8)) for item in loaded]
    committer.put(Batch(rows, features, slim, failed))
    progress.forward += computed - started
    progress.waited_for_writing += time.monotonic() - computed
    progress.done += len(rows)
    progress.converted.update(item.converted for item in loaded if item.converted)


def _together(loaded: list[Loaded]) -> NDArray[np.uint8]:
    """Pixels (n, H, W, 3) of a batch; FeatstoreError where memory does not suffice."""
    try:
        return np.concatenate([item.pixels for item in loaded])
    except MemoryError as error:
        raise FeatstoreError(
            f"there is too little memory to put {len(loaded)} patches side by side",
            where="extract.batch_size",
            fix="use a smaller --batch-size, or free the memory",
        ) from error


def _ahead(
    pool: ThreadPoolExecutor,
    job: Callable[[T], R],
    items: Iterable[T],
    weight: Callable[[int], int],
    most: int,
) -> Iterator[Future[R]]:
    """Results in the order of the items, with a bounded amount of them in the making.

    Args:
        pool: Does the jobs.
        job: What is done with each item.
        items: In order.
        weight: Of the item at a place in that order.
        most: The weights in the making together, but for the last.
    """
    window: deque[tuple[int, Future[R]]] = deque()
    total = 0
    for at, item in enumerate(items):
        window.append((weight(at), pool.submit(job, item)))
        total += window[-1][0]
        while window and total >= most:
            size, future = window.popleft()
            total -= size
            yield future
    while window:
        yield window.popleft()[1]
