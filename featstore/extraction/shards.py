"""Shares of the work for several processes: `--shard I/N`."""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.share_table import Home, Key, publish_page, read_pages, table_folder

# What schedulers call the index of an array's task, and the number their arrays start with.
_ARRAY_VARIABLES = {"SLURM_ARRAY_TASK_ID": 0, "PBS_ARRAY_INDEX": 0, "SGE_TASK_ID": 1, "LSB_JOBINDEX": 1}
# The forward pass of a patch at 224 px on a CPU (DenseNet121 in bf16: 18 ms of one core) takes as long as
# decoding about this many bytes of PNG (a millisecond for 100 kB or less).
_FORWARD_BYTES, _USUAL_SIDE = 1_200_000, 224
# Network file systems remember for up to a minute that a file was not there.
_PATIENCE = 120.0
# What looking at all files of a cohort may take; in seconds.
_TURN = 1800.0

_SHARE = re.compile(r"(\d+|auto)/[1-9]\d*", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """Share ``index`` (from 0) of ``count``."""

    index: int = 0
    count: int = 1


def parse_shard(text: str | None, setting: str = "extract.shard", flag: str = "--shard") -> Shard:
    """Read ``I/N`` or ``auto/N``; with ``auto``, I comes from the scheduler's array variable.

    N is always written down: a partly resubmitted array changes the scheduler's own count.

    Args:
        text: As given; None: the whole.
        setting: What was given, for messages.
        flag: How it is given, for messages.

    Raises:
        ConfigError: It is neither, I is not below N, or ``auto`` finds no array variable.
    """
    if text is None:
        return Shard()
    if not _SHARE.fullmatch(text):
        raise ConfigError(
            f"{setting} is {text!r}",
            expected="I/N, share I (from 0) of N, or auto/N, I from the scheduler's array",
            where=setting,
            fix=f"{flag} 0/4",
        )
    first, _, count = text.partition("/")
    if first == "auto":
        # SGE says "undefined" and LSF 0 where a job is no array's.
        found = {
            name: int(os.environ[name]) - start
            for name, start in _ARRAY_VARIABLES.items()
            if os.environ.get(name, "").isdigit() and int(os.environ[name]) >= start
        }
        if not found:
            raise ConfigError(
                f"{setting} is {text!r}, but this is no task of a scheduler's array",
                expected=f"one of the variables {', '.join(_ARRAY_VARIABLES)}",
                where=setting,
                fix=f"name the share, e.g. {flag} 0/{count}",
            )
        first = str(next(iter(found.values())))
    if int(first) >= int(count):
        raise ConfigError(
            f"{setting} is {text!r}: there is no share {first} of {count}",
            expected=f"0/{count} to {int(count) - 1}/{count}",
            where=setting,
            fix=f"number the array from 0, e.g. --array=0-{int(count) - 1}",
        )
    return Shard(int(first), int(count))


def forward_bytes(device: str, resize: int | str) -> int:
    """What a patch costs besides its own bytes, in bytes.

    Decoding takes time in proportion to a file's bytes, and so does the forward pass at native sizes. On
    a GPU decoding is the limit. On a CPU the forward pass at a fixed size takes most of the time, the same
    for every patch: with bytes alone, shares of many small patches would end last.

    Args:
        device: Kind of device, ``cpu`` or ``cuda``.
        resize: Side in px that patches are resized to, or ``model``, ``native``, ``native32``.
    """
    if device != "cpu" or resize in ("native", "native32"):
        return 0
    side = resize if isinstance(resize, int) else _USUAL_SIDE
    return round(_FORWARD_BYTES * (side / _USUAL_SIDE) ** 2)


def slices_of(table: pd.DataFrame) -> tuple[NDArray[np.int64], list[Key]]:
    """The slices of a patch table of P rows: (P,) the number of each patch's slice, and their names."""
    keys = ["case_id", "stain", "slice_id"]
    numbers = table.groupby(keys, observed=True, sort=False).ngroup()
    slice_of_patch: NDArray[np.int64] = np.asarray(numbers, np.int64)
    _, first = np.unique(slice_of_patch, return_index=True)
    rows = table[keys].iloc[first].itertuples(index=False)
    return slice_of_patch, [(str(row[0]), str(row[1]), str(row[2])) for row in rows]


def share_of_patches(
    table: pd.DataFrame, count: int, reports: Path, work: Callable[[], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """The share of every patch: whole slices, as the published table has them.

    Slices that are in no table yet are balanced and published first (see `share_table`).

    Args:
        table: The whole patch table, P rows.
        count: The number of shares N.
        reports: Folder in which the table of shares lies or is to lie.
        work: Gives the (P,) work of every patch in bytes; called only if there are new slices.

    Returns:
        (P,) share, 0 … N − 1.

    Raises:
        FeatstoreError: The table is damaged, or cannot be written.
    """
    if count == 1:
        return np.zeros(len(table), np.int64)
    slice_of_patch, keys = slices_of(table)
    folder = table_folder(reports, count)
    homes, pages = read_pages(folder, count)
    deadline = time.monotonic() + _PATIENCE
    while any(key not in homes for key in keys):
        with _turn(folder):
            # The others waited, and find here what the first one has published: one looks at all files.
            homes, pages = read_pages(folder, count)
            if not (new := [i for i, key in enumerate(keys) if key not in homes]):
                break
            work_of_slice = np.zeros(len(keys), np.int64)
            np.add.at(work_of_slice, slice_of_patch, work())
            page = balance({keys[i]: int(work_of_slice[i]) for i in new}, count, homes)
            published = publish_page(folder, count, pages + 1, page)
        if published is None:
            homes.update((key, Home(hashed_share(key, count), page[key].work)) for key in page)
            break
        before = pages
        homes, pages = read_pages(folder, count)
        if pages == before:  # a network file system knows the name already, but not yet the file
            if time.monotonic() > deadline:
                raise FeatstoreError(
                    "another process has published shares that cannot be read here",
                    expected=f"page {pages + 1} of the table within {_PATIENCE:.0f} seconds",
                    where=str(folder),
                    fix="check the (network) file system, then run the same command again",
                )
            time.sleep(0.1)
    share_of_slice = np.array([homes[key].share for key in keys], np.int64)
    shares: NDArray[np.int64] = share_of_slice[slice_of_patch]
    return shares


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait for this process's turn to give slices their shares, where the file system can say whose it is.

    Where it cannot, or whose turn it is hangs, several do the same work, and one of them publishes it.
    """
    with ExitStack() as holding:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = holding.enter_context(open(folder / ".lock", "a+"))
            deadline = time.monotonic() + _TURN
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        yield


def balance(work: Mapping[Key, int], count: int, homes: Mapping[Key, Home]) -> dict[Key, Home]:
    """Give every slice a share: the largest first, each to the share with the least work.

    Args:
        work: New slices and their work in bytes.
        count: The number of shares N.
        homes: The slices that have a share. Their work may be done, so that it decides only between
            shares that have as much of the new work.

    Returns:
        The new slices' homes.
    """
    before = [0] * count
    for home in homes.values():
        before[home.share] += home.work
    loads = [(0, before[share], share) for share in range(count)]
    heapq.heapify(loads)
    found = {}
    for key in sorted(work, key=lambda key: (-work[key], key)):
        load, old, share = loads[0]
        found[key] = Home(share, work[key])
        heapq.heapreplace(loads, (load + work[key], old, share))
    return found


def hashed_share(key: Key, count: int) -> int:
    """The share of a slice where no table can be published: it depends on its name alone."""
    digest = hashlib.sha256("\0".join(key).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % count
