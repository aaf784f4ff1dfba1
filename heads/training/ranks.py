"""The processes of one training under ``torchrun``: who am I, and what do all of us have together?

Gradients are summed once a step, after all of a process's passes through the backbone, not by hooks
in each of them as in torch's DistributedDataParallel: a process may need any number of passes, and
processes need not have equally many cases. What is summed is exactly one process's gradient, because
each loss is divided by the number of cases of the whole step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from featstore.errors import ConfigError
from featstore.extraction.forward import is_out_of_memory
from heads.training.course import TrainingError

T = TypeVar("T")
_MINUTES = 30.0  # that the others may be late: an epoch's validation ends at different times
_BUCKET = 64 << 20  # bytes that are summed at once


@dataclass(frozen=True)
class Ranks:
    """One of ``count`` processes that train together.

    Attributes:
        rank: Which one, from 0; the first alone writes files and talks.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, members: Sequence[T]) -> Sequence[T]:
        """This process's members: every ``count``-th."""
        return members[self.rank :: self.count]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place.

        Raises:
            TrainingError: Another process has ended.
        """
        if self.count == 1:
            return
        with _together():
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                distributed.all_reduce(flat)
                parts = torch.split(flat, [tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def mean(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their means over all processes, in place; errors as `sum`."""
        if self.count > 1 and tensors:
            self.sum(tensors)
            torch._foreach_div_(list(tensors), self.count)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set in any process; no GPU waits for the answer."""
        if self.count == 1:
            return flags
        with _together():
            found = torch.tensor(flags, dtype=torch.int32)
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return tuple(bool(flag) for flag in found.tolist())

    def gather(self, mine: T) -> list[T]:
        """What every process has, of types that can be pickled, in order of rank."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        with _together():
            distributed.all_gather_object(found, mine)
        return found

    def to_first(self, mine: T) -> list[T]:
        """What every process has, in order of rank, in the first one; nothing in the others."""
        if self.count == 1:
            return [mine]
        found: list[Any] | None = [None] * self.count if self.first else None
        with _together():
            distributed.gather_object(mine, found, 0)
        return found or []

    def from_first(self, mine: T) -> T:
        """What the first process has."""
        if self.count == 1:
            return mine
        found: list[Any] = [mine]
        with _together():
            distributed.broadcast_object_list(found, 0)
        first: T = found[0]
        return first


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """This process among those that ``torchrun`` started, if it did, and the device it is to use.

    Args:
        device: As configured; of several GPUs each process takes its own.

    Raises:
        ConfigError: A single GPU is named for several processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(), device
        return
    if device.startswith("cuda:"):
        raise ConfigError(
            f"finetune.device is {device}, for {count} processes",
            expected="auto, cuda (each process takes the GPU of its local rank), or cpu",
            where="finetune.device",
            fix="--device auto",
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        # More processes than GPUs share them, which NCCL refuses with an error of its own.
        device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    with _together():
        distributed.init_process_group(backend, timeout=timedelta(minutes=_MINUTES))
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size()), device
    finally:
        # Where another process has died, taking leave fails as well.
        with suppress(Exception):
            distributed.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """The libraries' errors about processes that are gone, in words."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingError(
            f"another process of this training has ended, or cannot be reached ({reason})",
            expected=f"all {os.environ.get('WORLD_SIZE', '?')} processes that torchrun started",
            where=f"process {os.environ.get('RANK', '?')}",
            fix="look at the other processes' last words; then go on from the last saved state: "
            "the same torchrun command, with `featstore finetune --resume RUN`",
        ) from error


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of tensors of one type that are small enough to be copied into one."""
    run: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if run and (size + bytes_ > _BUCKET or tensor.dtype != run[0].dtype):
            yield run
            run, size = [], 0
        run.append(tensor)
        size += bytes_
    if run:
        yield run
