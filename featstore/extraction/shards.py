"""Shares of the work for several processes: `--shard I/N`."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.errors import ConfigError

# What schedulers call the index of an array's task.
_ARRAY_VARIABLES = ("SLURM_ARRAY_TASK_ID", "PBS_ARRAY_INDEX", "SGE_TASK_ID", "LSB_JOBINDEX")


@dataclass(frozen=True)
class Shard:
    """Share ``index`` (from 0) of ``count``."""

    index: int = 0
    count: int = 1


def parse_shard(text: str | None) -> Shard:
    """Read ``I/N`` or ``auto/N``; with ``auto``, I comes from the scheduler's array variable.

    N is always written down: a partly resubmitted array changes the scheduler's own count.

    Raises:
        ConfigError: I is not below N, or ``auto`` finds no array variable.
    """
    if text is None:
        return Shard()
    first, _, count = text.partition("/")
    if first == "auto":
        found = {name: os.environ[name] for name in _ARRAY_VARIABLES if os.environ.get(name, "").isdigit()}
        if not found:
            raise ConfigError(
                f"extract.shard is {text!r}, but this is no task of a scheduler's array",
                expected=f"one of the variables {', '.join(_ARRAY_VARIABLES)}",
                where="extract.shard",
                fix=f"name the share, e.g. --shard 0/{count}",
            )
        first = next(iter(found.values()))
    if int(first) >= int(count):
        raise ConfigError(
            f"extract.shard is {text!r}: there is no share {first} of {count}",
            expected=f"0/{count} to {int(count) - 1}/{count}",
            where="extract.shard",
            fix=f"number the array from 0, e.g. --array=0-{int(count) - 1}",
        )
    return Shard(int(first), int(count))


def in_shard(table: pd.DataFrame, sizes: NDArray[np.int64], shard: Shard) -> NDArray[np.bool_]:
    """Which patches are in a share: whole slices, balanced by bytes.

    The largest slice goes first, each to the lightest share so far. All processes
    that see the same folder agree, whatever is done already.

    Args:
        table: The whole patch table, P rows.
        sizes: (P,) file sizes in bytes.
        shard: The share.

    Returns:
        (P,) bool.
    """
    if shard.count == 1:
        return np.ones(len(table), bool)
    keys = ["case_id", "stain", "slice_id"]
    slice_of_patch = table.groupby(keys, observed=True, sort=False).ngroup().to_numpy()
    load = np.bincount(slice_of_patch, weights=sizes)
    share_of_slice = np.empty(len(load), np.int64)
    lightest = [(0.0, share) for share in range(shard.count)]
    for number in np.argsort(-load, kind="stable").tolist():
        total, share = heapq.heappop(lightest)
        share_of_slice[number] = share
        heapq.heappush(lightest, (total + float(load[number]), share))
    mine: NDArray[np.bool_] = share_of_slice[slice_of_patch] == shard.index
    return mine
