"""How busy the device is while an extraction runs."""

from __future__ import annotations

import threading
import time

import torch

# NVML's own figures are means over up to a second.
_SECONDS = 1.0
# A long run's curve is thinned before it has this many points, an even number.
_POINTS = 600


class BusyClock:
    """Measures how long at least one forward pass has been under way; a context manager for each.

    Attributes:
        seconds: So far, without what is under way now.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0

    def __enter__(self) -> BusyClock:
        with self._lock:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self.seconds += time.monotonic() - self._since


class GpuSampler:
    """Asks NVML once a second how much of the time the device has computed; a context manager.

    Nothing is asked on a CPU, nor where NVML's Python module or driver is missing.

    Args:
        device: The device that computes.
        seconds: Between two questions.

    Attributes:
        samples: Fractions of the time, 0 … 1, evenly spaced.
        interval: Seconds between them.
    """

    def __init__(self, device: torch.device, seconds: float = _SECONDS) -> None:
        self.samples: list[float] = []
        self.interval = seconds
        self._device = device
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuSampler:
        if self._device.type == "cuda" and self._ask() is not None:
            self._thread = threading.Thread(target=self._run, name="featstore-sampler", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            found = self._ask()
            if found is None:
                return
            self.samples.append(found)
            if len(self.samples) == _POINTS:
                # Means of two, so that the mean of all stays what it was.
                halves = zip(self.samples[::2], self.samples[1::2], strict=True)
                self.samples = [(first + second) / 2 for first, second in halves]
                self.interval *= 2

    def _ask(self) -> float | None:
        try:
            return float(torch.cuda.utilization(self._device)) / 100
        except Exception:
            # No module, no driver, no permission, a MIG slice: each raises something of its own, and
            # a figure for the report is no reason to stop hours of work.
            return None
