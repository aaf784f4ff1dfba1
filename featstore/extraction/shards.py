"""Shares of the work for several processes: `--shard I/N`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.errors import ConfigError

# What schedulers call the index of an array's task, and the number their arrays start with.
_ARRAY_VARIABLES = {"SLURM_ARRAY_TASK_ID": 0, "PBS_ARRAY_INDEX": 0, "SGE_TASK_ID": 1, "LSB_JOBINDEX": 1}


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
        # SGE says "undefined" and LSF 0 where a job is no array's.
        found = {
            name: int(os.environ[name]) - start
            for name, start in _ARRAY_VARIABLES.items()
            if os.environ.get(name, "").isdigit() and int(os.environ[name]) >= start
        }
        if not found:
            raise ConfigError(
                f"extract.shard is {text!r}, but this is no task of a scheduler's array",
                expected=f"one of the variables {', '.join(_ARRAY_VARIABLES)}",
                where="extract.shard",
                fix=f"name the share, e.g. --shard 0/{count}",
            )
        first = str(next(iter(found.values())))
    if int(first) >= int(count):
        raise ConfigError(
            f"extract.shard is {text!r}: there is no share {first} of {count}",
            expected=f"0/{count} to {int(count) - 1}/{count}",
            where="extract.shard",
            fix=f"number the array from 0, e.g. --array=0-{int(count) - 1}",
        )
    return Shard(int(first), int(count))


def in_shard(table: pd.DataFrame, shard: Shard) -> NDArray[np.bool_]:
    """Which patches are in a share: whole slices, by a hash of case, stain and slice.

    A slice's share depends on nothing else, neither on other files nor on their sizes: tasks of an
    array start hours apart, and files that come in between must not move a slice out of a share
    that has run into one that has run as well.

    Args:
        table: The whole patch table, P rows.
        shard: The share.

    Returns:
        (P,) bool.
    """
    if shard.count == 1:
        return np.ones(len(table), bool)
    keys = ["case_id", "stain", "slice_id"]
    slice_of_patch = table.groupby(keys, observed=True, sort=False).ngroup().to_numpy()
    _, first = np.unique(slice_of_patch, return_index=True)
    slices = table[keys].iloc[first].itertuples(index=False)
    share_of_slice = np.array(
        [share_of(str(row[0]), str(row[1]), str(row[2]), shard.count) for row in slices], np.int64
    )
    mine: NDArray[np.bool_] = share_of_slice[slice_of_patch] == shard.index
    return mine


def share_of(case_id: str, stain: str, slice_id: str, count: int) -> int:
    """The share, 0 … count − 1, that a slice belongs to."""
    digest = hashlib.sha256("\0".join((case_id, stain, slice_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % count
