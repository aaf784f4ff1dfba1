"""Drawing many cases at once, by processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from featstore.errors import FeatstoreError
from featstore.process import die_with_parent, usable_cores

J = TypeVar("J")
R = TypeVar("R")
_FEW = 8  # so many cases are drawn before further processes would have begun
_MOST = 16
_AHEAD = 4  # jobs a process that wait for it: more would only take memory


class DrawingError(FeatstoreError):
    """A process that was to draw is gone."""

    exit_code = 1


def draw_all(
    draw: Callable[[J], R],
    jobs: Iterable[J],
    total: int,
    update: Callable[[int, int], None] = lambda done, total: None,
    processes: int | None = None,
) -> Iterator[R]:
    """``map(draw, jobs)``, in order, by as many processes as there are cores.

    Args:
        draw: A function of a module without torch, which every process imports anew.
        jobs: One a case; asked for as they are needed.
        total: How many there are.
        update: Called with the number of cases done, and of all.
        processes: How many; by default the cores that this process may use, 16 at most, and none but this
            one for few cases.

    Raises:
        DrawingError: A process ended in the middle, as where memory runs out.
    """
    workers = processes or (1 if total <= _FEW else min(usable_cores(), _MOST))
    if workers == 1:
        for done, job in enumerate(jobs, 1):
            yield draw(job)
            update(done, total)
        return
    # Not forked: a process with torch's threads and HDF5's lock must not be.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        pending: dict[int, Future[R]] = {}
        given, wanted, remaining = 0, 0, iter(jobs)
        while wanted < total:
            while given < total and len(pending) < workers * _AHEAD:
                with _without_main():
                    pending[given] = pool.submit(draw, next(remaining))
                given += 1
            wait([f for f in pending.values() if not f.done()] or pending.values(), None, FIRST_COMPLETED)
            while wanted in pending and pending[wanted].done():
                yield pending.pop(wanted).result()
                wanted += 1
                update(wanted, total)
    except BrokenProcessPool as error:
        raise DrawingError(
            "a process that drew pictures has ended in the middle",
            expected=f"{workers} processes with enough memory",
            where="drawing the cases' pictures",
            fix="free some memory and run the command again; fewer --overlays take less",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the parent ends them
    die_with_parent()


@contextmanager
def _without_main() -> Iterator[None]:
    """Without the caller's script, which a process that is started would else run once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
