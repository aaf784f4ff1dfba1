"""What a long job asks of its process: to stop at a safe place only, and to keep its memory."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_PR_SET_PDEATHSIG = 1


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """End this process when the one that started it ends, however that is; on Linux alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to give large freed blocks back to the kernel.

    A forward pass on a CPU frees and takes the same hundreds of megabytes for every
    batch, and so does a training step; getting them anew costs up to half of the time in page faults.

    Returns:
        Whether malloc took the advice (it is glibc).
    """
    if platform.system() != "Linux":
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    calls = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20))
    return all(mallopt(parameter, value) == 1 for parameter, value in calls)


def usable_cores() -> int:
    """How many cores this process may use; on Linux those that a scheduler gave it."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone knows what a job was given
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
