"""The one pass: decoding, forward passes and commits, all at the same time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from featstore.config import ImagesConfig
from featstore.errors import ImageError
from featstore.extraction.committer import Batch, Committer
from featstore.extraction.forward import Embedder
from featstore.extraction.loading import Loaded, Raw, load, read
from featstore.images import Preprocessing

T = TypeVar("T")
R = TypeVar("R")
# Threads that only wait for the disk or the network.
_READERS = 8


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
        forward: Seconds in forward passes.
        waited_for_writing: Seconds in which the writer was too far behind.
    """

    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)
    waited_for_decoding: float = 0.0
    forward: float = 0.0
    waited_for_writing: float = 0.0

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
    pending: pd.DataFrame,
    folder: Path,
    embedder: Embedder,
    preprocessing: Preprocessing,
    committer: Committer,
    images: ImagesConfig,
    workers: int,
    observe: Observer,
    stopped: Callable[[], bool],
) -> Progress:
    """Push every pending patch through the backbone once, and commit its embedding.

    Whatever ends the pass early (a bad image, a stop), everything computed until
    then is committed.

    Args:
        pending: Rows of the patch table, sorted.
        folder: The patches folder.
        embedder: The backbone.
        preprocessing: What the backbone wants.
        committer: Takes the embeddings; is closed here.
        images: Colour and size policy, and what to do about bad images.
        workers: Decoding threads.
        observe: Called after every batch.
        stopped: Asked before every batch; True ends the pass.

    Raises:
        ImageError: A file turned out to be unusable and ``on_bad_image`` is ``stop``.
        FeatstoreError: Memory or disk ran out, or an embedding is not finite.
    """
    progress = Progress(total=len(pending))
    paths = pending["path"].tolist()

    def read_job(row: int) -> tuple[int, Raw]:
        return row, read(folder, paths[row], images.max_pixels)

    def decode_job(reading: Future[tuple[int, Raw]]) -> Loaded:
        row, raw = reading.result()
        return load(raw, paths[row], preprocessing, images.channel_order, images.max_pixels)

    with (
        ThreadPoolExecutor(_READERS, "featstore-reader") as readers,
        ThreadPoolExecutor(workers, "featstore-decoder") as decoders,
    ):
        try:
            raw = _ahead(readers, read_job, range(len(paths)), 2 * workers + _READERS)
            decoded = _ahead(decoders, decode_job, raw, 2 * embedder.batch_size + 2 * workers)
            for rows, loaded in _batches(decoded, paths, images, embedder, progress):
                if stopped():
                    break
                _advance(np.array(rows), loaded, embedder, committer, progress)
                observe(progress)
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
            decoders.shutdown(wait=True, cancel_futures=True)
            committer.close()
    return progress


def _advance(
    rows: np.ndarray, loaded: list[Loaded], embedder: Embedder, committer: Committer, progress: Progress
) -> None:
    started = time.monotonic()
    features = embedder(np.stack([item.pixels for item in loaded]))
    computed = time.monotonic()
    slim = [_without_pixels(item) for item in loaded]
    committer.put(Batch(rows, features, slim))
    progress.forward += computed - started
    progress.waited_for_writing += time.monotonic() - computed
    progress.done += len(rows)
    progress.converted.update(item.converted for item in loaded if item.converted)


def _without_pixels(item: Loaded) -> Loaded:
    """Pixels are hundreds of times larger than embeddings: they must not wait in the writer."""
    return Loaded(np.empty((0, 0, 3), np.uint8), item.quality, item.stat, item.sha256, item.converted)


def _ahead(
    pool: ThreadPoolExecutor, job: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[Future[R]]:
    """Results in the order of the items, with a bounded number of them in the making."""
    window: deque[Future[R]] = deque()
    for item in items:
        window.append(pool.submit(job, item))
        if len(window) >= ahead:
            yield window.popleft()
    while window:
        yield window.popleft()


def _batches(
    decoded: Iterator[Future[Loaded]],
    paths: list[str],
    images: ImagesConfig,
    embedder: Embedder,
    progress: Progress,
) -> Iterator[tuple[list[int], list[Loaded]]]:
    rows: list[int] = []
    loaded: list[Loaded] = []
    started = time.monotonic()
    for row, future in enumerate(decoded):
        try:
            item = future.result()
        except ImageError as error:
            if images.on_bad_image == "stop":
                # What is decoded already is still computed and committed.
                if rows:
                    yield rows, loaded
                raise
            progress.skipped.append((paths[row], error.reason(paths[row])))
            continue
        rows.append(row)
        loaded.append(item)
        if len(rows) == embedder.batch_size:
            progress.waited_for_decoding += time.monotonic() - started
            yield rows, loaded
            rows, loaded = [], []
            started = time.monotonic()
    if rows:
        yield rows, loaded
