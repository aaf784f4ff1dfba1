"""Drawing many cases at once, by processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")
_FEW = 8  # so many cases are drawn before further processes would have begun
_AHEAD = 4  # jobs a process that wait for it: more would only take memory


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
    """
    workers = processes or (1 if total <= _FEW else min(len(os.sched_getaffinity(0)), 16))
    if workers == 1:
        for done, job in enumerate(jobs, 1):
            yield draw(job)
            update(done, total)
        return
    # Not forked: a process with torch's threads and HDF5's lock must not be.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        pending: dict[int, Future[R]] = {}
        given, wanted, remaining = 0, 0, iter(jobs)
        while wanted < total:
            while given < total and len(pending) < workers * _AHEAD:
                pending[given] = pool.submit(draw, next(remaining))
                given += 1
            wait([f for f in pending.values() if not f.done()] or pending.values(), None, FIRST_COMPLETED)
            while wanted in pending and pending[wanted].done():
                yield pending.pop(wanted).result()
                wanted += 1
                update(wanted, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
