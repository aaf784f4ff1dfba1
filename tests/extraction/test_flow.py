"""What waits for what in a pass, and how much there may be of it."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from featstore.extraction import committer as committing
from featstore.extraction import utilisation
from featstore.extraction.committer import Batch, Committer
from featstore.extraction.forward import (
    BYTES_A_PIXEL,
    FOLDED,
    OPENVINO,
    affordable_patches,
    choose_batch_size,
)
from featstore.extraction.utilisation import BusyClock
from featstore.store import StoreWriter
from tests.extraction.test_schedule import PENDING, ROWS, SPEC, VIEWS, batch, contents


class _Late:
    """Features that are there only when they are let go."""

    def __init__(self, features: Any, ready: threading.Event) -> None:
        self._features, self._ready = features, ready

    def result(self) -> np.ndarray:
        assert self._ready.wait(60)
        return self._features.result()


def one_by_one(ready: threading.Event) -> list[Batch]:
    whole = [batch([row]) for row in range(ROWS)]
    return [Batch(each.rows, _Late(each.features, ready), each.loaded) for each in whole]  # type: ignore[arg-type]


def committer_of(path: Path) -> Committer:
    return Committer(StoreWriter(path, SPEC, {}), PENDING, 1 << 20, 1e6, views=VIEWS)


def test_many_small_batches_are_under_way_at_the_same_time(tmp_path: Path) -> None:
    """With native sizes a batch may be one patch, and every core computes one."""
    ready, committer = threading.Event(), committer_of(tmp_path / "store")
    for each in one_by_one(ready):
        committer.put(each)  # would wait for ever if a place were kept for few batches only
    ready.set()
    committer.close()
    assert len(contents(tmp_path / "store")) == ROWS


def test_embeddings_that_wait_for_the_writer_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "_QUEUED", 3 * VIEWS)
    ready, committer, handed = threading.Event(), committer_of(tmp_path / "store"), []
    third = threading.Event()

    def hand_over() -> None:
        for at, each in enumerate(one_by_one(ready)):
            committer.put(each)
            handed.append(at)
            if at == 2:
                third.set()

    thread = threading.Thread(target=hand_over)
    thread.start()
    assert third.wait(60)
    thread.join(0.1)  # would be enough for all of them
    assert len(handed) == 3
    ready.set()
    thread.join(60)
    committer.close()
    assert len(contents(tmp_path / "store")) == ROWS


def test_time_under_way_is_counted_once_however_many_passes_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(utilisation, "time", SimpleNamespace(monotonic=lambda: now))
    clock = BusyClock()
    with clock:
        now = 1.0
        with clock:
            now = 3.0
        now = 4.0
    now = 10.0
    with suppress(ValueError), clock:
        now = 12.0
        raise ValueError
    assert clock.seconds == 4.0 + 2.0


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [64, 224, 512, 4_000])
@pytest.mark.parametrize("gigabytes", [1, 8, 140])
def test_a_gpu_s_batch_is_the_largest_power_of_two_that_fits(
    gigabytes: int, size: int, compute_dtype: str
) -> None:
    memory = gigabytes << 30
    found = affordable_patches(memory, compute_dtype, size)
    one = BYTES_A_PIXEL[compute_dtype] * size**2
    assert found.bit_count() == 1
    assert found * one <= memory or found == 1
    assert 2 * found * one > memory or found == 512


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", "cpu", 16), (7, "cpu", 7), (7, "cuda", 7), ("auto", "cuda", 64)],
)
def test_the_batch_size_is_as_asked_or_fits_the_device(
    monkeypatch: pytest.MonkeyPatch, setting: int | str, device: str, expected: int
) -> None:
    memory = 4 * 100 * 400 * 224**2  # a quarter holds a hundred patches
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )
    assert choose_batch_size(setting, torch.device(device), "bfloat16", 224) == expected


@pytest.mark.parametrize(
    ("size", "runtime", "expected"),
    [
        (32, FOLDED, 128),
        (64, FOLDED, 128),
        (128, FOLDED, 32),
        (224, FOLDED, 16),
        (448, FOLDED, 16),
        (None, FOLDED, 16),
        (64, OPENVINO, 16),
    ],
)
def test_on_a_cpu_small_patches_go_in_batches_of_as_many_pixels(
    size: int | None, runtime: str, expected: int
) -> None:
    assert choose_batch_size("auto", torch.device("cpu"), "bfloat16", size, runtime) == expected
