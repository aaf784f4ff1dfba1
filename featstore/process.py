"""What a long job asks of its process, to stop safely and to keep its memory, and what it was given."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PROC = Path("/proc")
# By version of cgroups: the controller in /proc/self/cgroup, where it is mounted below the mount point,
# the limits, what is used, and what of that are pages of files, which the kernel takes back when asked.
_CGROUPS = (
    ("", "", ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    (
        "memory",
        "memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


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
    """How many cores this process may use: what a scheduler gave it, its part of that under torchrun.

    SLURM's own words count as well as the cores that the process is bound to: a cluster without
    plugins for that binds nobody, and each job there would take all of the machine's cores.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone knows what a job was given
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    of_task, of_node = _number("SLURM_CPUS_PER_TASK"), _number("SLURM_CPUS_ON_NODE")
    if of_task is not None:
        cores = min(cores, of_task)
    elif of_node is not None:
        cores = min(cores, of_node // _tasks_here())
    return max(1, cores // local_processes())


def local_processes() -> int:
    """How many processes torchrun started on this machine, this one included; 1 without torchrun.

    They share what their job was given, which ``srun`` divides among the tasks that it starts.
    """
    return (_number("LOCAL_WORLD_SIZE") or 1) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _tasks_here() -> int:
    """The most tasks that ``srun`` runs on a node of this step, as SLURM writes it: ``4(x2),3``."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if not re.fullmatch(r"[0-9]{1,9}(\(x[0-9]{1,9}\))?(,[0-9]{1,9}(\(x[0-9]{1,9}\))?)*", text):
        return 1
    return max(1, *(int(each.partition("(")[0]) for each in text.split(",")))


def _number(name: str) -> int | None:
    """A whole number above 0 out of the environment; None for anything else."""
    text = os.environ.get(name, "").strip()
    return (int(text) or None) if re.fullmatch(r"[0-9]{1,12}", text) else None


def scheduled_memory() -> int | None:
    """Bytes that SLURM still grants this process of its job's memory; None where it promised none.

    Only the promise is told, for all of a node. Each task has an equal part of it, and what the
    process and those that it started hold counts against that. Below 0 where they hold more.
    """
    cores = _number("SLURM_CPUS_ON_NODE") or _number("SLURM_CPUS_PER_TASK")
    of_each = (
        ("SLURM_MEM_PER_NODE", 1),
        ("SLURM_MEM_PER_CPU", cores),
        ("SLURM_MEM_PER_GPU", _number("SLURM_GPUS_ON_NODE")),
    )
    promised = (each * (count or 1) for name, count in of_each if (each := _number(name)) is not None)
    megabytes = next(promised, None)
    if megabytes is None:
        return None
    return (megabytes << 20) // (_tasks_here() * local_processes()) - used_memory()


def cgroup_memory(mount: Path) -> list[int]:
    """Bytes that this process's memory cgroup and each one above it still grant; of version 1 and 2.

    What only holds pages of files is free: reading a store fills a job's cgroup with them.

    Args:
        mount: Where cgroups are mounted.

    Returns:
        One number a cgroup that has a limit; below 0 where it is exceeded.
    """
    own: dict[str, str] = {}
    with suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            own.update(dict.fromkeys(controllers.split(","), path))
    found = []
    for controller, below, limits, used, pages in _CGROUPS:
        # A container may see another path than the one that is mounted for it: then only the root is there.
        names = [name for name in own.get(controller, "").split("/") if name not in ("", ".", "..")]
        for depth in range(len(names) + 1):
            folder = mount.joinpath(below, *names[:depth])
            asked = [number for name in limits if (number := _read_number(folder / name)) is not None]
            if asked:
                found.append(min(asked) - _held(folder, used, pages))
    return found


def _held(folder: Path, used: str, pages: tuple[str, ...]) -> int:
    """Bytes that a cgroup holds and cannot give back; where it does not say so, this process's."""
    total = _read_number(folder / used)
    if total is None:
        return used_memory()
    with suppress(OSError, ValueError):
        stat = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        total -= sum(int(stat.get(name, 0)) for name in pages)
    return max(0, total)


def _read_number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        return int(path.read_text())
    return None


def used_memory() -> int:
    """Bytes that this process and all that it started hold, but for pages of files; 0 where unknown."""
    parents, held = dict[int, int](), dict[int, int]()
    for folder in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, KeyError):  # a process may end meanwhile
            lines = (folder / "status").read_text(errors="replace").splitlines()
            status = dict(line.split(":", 1) for line in lines if ":" in line)
            parents[int(folder.name)] = int(status["PPid"])
            kilobytes = (status.get(name, "0").split()[0] for name in ("RssAnon", "RssShmem"))
            held[int(folder.name)] = 1024 * sum(map(int, kilobytes))
    mine, new = set[int](), {os.getpid()}
    while new:
        mine |= new
        new = {child for child, parent in parents.items() if parent in mine} - mine
    return sum(held.get(process, 0) for process in mine)
