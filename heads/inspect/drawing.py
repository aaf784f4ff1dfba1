"""Drawing many cases at once, by processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from featstore.errors import FeatstoreError
from featstore.process import die_with_parent, usable_cores

J = TypeVar("J")
R = TypeVar("R")
_FEW = 8  # so many cases are drawn before further processes would have begun
_MOST = 16
_AHEAD = 3  # jobs a process that wait for it: more would only take memory


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
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import BrokenProcessPool

    # Not forked: a process with torch's threads and HDF5's lock must not be. Nor multiprocessing's spawn,
    # which would run the caller's script once more in every process.
    pool = Parallel(
        workers, backend="loky", return_as="generator", pre_dispatch=workers * _AHEAD, batch_size=1
    )
    try:
        for done, drawn in enumerate(pool(delayed(_drawn)(draw, job) for job in jobs), 1):
            yield drawn
            update(done, total)
    except BrokenProcessPool as error:
        raise DrawingError(
            "a process that drew pictures has ended in the middle",
            expected=f"{workers} processes with enough memory",
            where="drawing the cases' pictures",
            fix="free some memory and run the command again; fewer --overlays take less",
        ) from error


def _drawn(draw: Callable[[J], R], job: J) -> R:
    die_with_parent()
    return draw(job)
