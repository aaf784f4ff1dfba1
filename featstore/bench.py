"""How close extraction comes to the limit that decoding and backbone set on this machine."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from featstore.backbones import Backbone, build_backbone
from featstore.bench_result import Alternative, ExtractBench
from featstore.cohort import Scan, scan
from featstore.config import FeatstoreConfig
from featstore.errors import FeatstoreError, ImageError, first_line
from featstore.extraction import forward
from featstore.extraction.committer import Committer
from featstore.extraction.forward import Embedder
from featstore.extraction.loading import Views, load, read
from featstore.extraction.pipeline import Work, run_pass
from featstore.extraction.schedule import plan_schedule
from featstore.extraction.setup import decoding_threads, describe, make_embedder, most_pixels
from featstore.images import decoder_name
from featstore.process import keep_freed_memory, usable_cores
from featstore.spec import EmbeddingSpec
from featstore.store import StoreWriter
from featstore.store.records import read_manifest

# Settings of ``extract`` that are part of the fingerprint.
_ANOTHER_MAKE = ("amp", "runtime")
# Fewer cases would not stand for a cohort, whatever their size.
_CASES = 8


def bench_extract(
    config: FeatstoreConfig, project: Path, sample: int = 512, rounds: int = 3, try_others: bool = True
) -> ExtractBench:
    """Measure on a project's own patches; the project is not changed.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        sample: Patches to measure with, spread over the cohort.
        rounds: How often everything is measured.
        try_others: Hold other settings against the present ones, too.

    Raises:
        FeatstoreError: The patches or the backbone cannot be used.
    """
    device = forward.choose_device(config.extract.device)
    folder = project / config.patches.folder
    found = scan(folder, config.patches, config.stains, config.exclude, base=project)
    table = _spread(found.table, sample)
    backbone = build_backbone(config.backbone, project)
    # As `extract` would go on there; what another tool made is no pattern for anything.
    existing = read_manifest(project / config.store.path)
    if existing is not None and existing.is_imported:
        existing = None
    spec = describe(config, backbone, device, existing)
    if device.type == "cpu":
        keep_freed_memory()
    runner = Runner(config, Scan(table, folder), backbone, spec, device)
    runner.pipeline(), runner.model()  # warm caches, kernels and memory
    results = []
    for _ in range(rounds):
        decoding, model, pipeline = runner.decoding(), runner.model(), runner.pipeline()
        limit = 1 / (1 / model + 1 / decoding) if device.type == "cpu" else min(model, decoding)
        results.append((decoding, model, pipeline, limit, pipeline / limit))
    alternatives, untried = [], _untried(spec, device)
    for name, value, note in _others(runner) if try_others else []:
        try:
            other = runner.alternative(name, value, note, rounds)
        except FeatstoreError as error:
            untried.append(f"extract.{name}: {value}: {first_line(error)}")
            continue
        if other is not None:
            alternatives.append(other)
    decoding, model, pipeline, limit, fraction = (
        statistics.median(values) for values in zip(*results, strict=True)
    )
    return ExtractBench(
        decode_rate=decoding,
        model_rate=model,
        pipeline_rate=pipeline,
        limit=limit,
        fraction_of_limit=fraction,
        fractions=tuple(result[-1] for result in results),
        rounds=rounds,
        patches=len(table),
        settings={
            "backbone": config.backbone.name,
            "device": str(device),
            "runtime": spec.runtime,
            "dtype": spec.compute_dtype,
            "views": spec.views,
            "batch size": runner.embedder.batch_size,
            "decoding threads": runner.workers,
            "torch threads": torch.get_num_threads(),
        },
        alternatives=tuple(alternatives),
        untried=tuple(untried),
    )


def _spread(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """Patches from all over the cohort, as many a case as it has, so that commits weigh what they weigh."""
    cases = table["case_id"].unique()
    number = max(_CASES, math.ceil(count * len(cases) / len(table)))
    some = table[table["case_id"].isin(cases[_evenly(len(cases), number)])]
    return some.iloc[_evenly(len(some), count)]


def _evenly(length: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def _others(runner: Runner) -> list[tuple[str, Any, str]]:
    """Settings worth a try here: name in ``extract``, value, what else it changes."""
    settings, device, spec = runner.config.extract, runner.device, runner.spec
    found: list[tuple[str, Any, str]] = []
    store = "of another make: needs a store of its own"
    if settings.workers != "auto" and settings.workers != usable_cores():
        found.append(("workers", usable_cores(), ""))
    if spec.runtime == forward.OPENVINO:
        return found  # takes a few patches at a time on every core, whatever the batch
    batch = runner.embedder.batch_size
    found += [("batch_size", size, "") for size in (batch // 2, 2 * batch) if size]
    precision = forward.choose_compute_dtype("auto", device, None)
    if spec.compute_dtype == "float32" != precision:
        found.append(("amp", "auto", f"{precision}, {store}"))
    if device.type == "cpu" and forward.choose_runtime("auto", device, None) == forward.OPENVINO:
        found.append(("runtime", "openvino", store))
    return found


def _untried(spec: EmbeddingSpec, device: torch.device) -> list[str]:
    found = []
    if device.type == "cpu" and forward.choose_runtime("auto", device, None) != forward.OPENVINO:
        found.append("OpenVINO, often the faster runtime on a CPU: pip install 'featstore[openvino]'")
    if "Pillow" in decoder_name():
        found.append("imagecodecs, a faster decoder: pip install 'featstore[imagecodecs]'")
    return found


class Runner:
    """The three measurements, on the same patches with the same settings."""

    def __init__(
        self,
        config: FeatstoreConfig,
        found: Scan,
        backbone: Backbone,
        spec: EmbeddingSpec,
        device: torch.device,
    ) -> None:
        self.config, self.found, self.spec = config, found, spec
        self.backbone, self.device = backbone, device
        self.preprocessing = backbone.preprocessing
        self.workers = decoding_threads(config)
        self.views = Views(spec.views, spec.view_seed)
        self.embedder = make_embedder(config, backbone, device, spec)
        self._paths = found.table["path"].tolist()
        self.schedule = plan_schedule(
            self._paths, found.folder, backbone, config.images, most_pixels(config, device, spec)
        )
        with ThreadPoolExecutor(self.workers) as pool:
            rows = self.schedule.rows.tolist()
            images = dict(zip(rows, pool.map(self._decoded_or_none, rows), strict=True))
        self._images = {row: pixels for row, pixels in images.items() if pixels is not None}
        # What an extraction would skip is no work for anybody here.
        self.schedule = replace(self.schedule, rows=np.array(list(self._images), np.int64))
        self._batches = self._batches_for(self.embedder)

    def _batches_for(self, embedder: Embedder) -> list[NDArray[np.uint8]]:
        batches = self.schedule.batches(embedder.forward_size, self.views.count)
        return [np.concatenate([self._images[row] for row in rows.tolist()]) for rows in batches]

    def _decoded_or_none(self, row: int) -> Any:
        try:
            return self._decode(row)
        except ImageError:
            if self.config.images.on_bad_image == "stop":
                raise
            return None

    def _decode(self, row: int) -> Any:
        images, path = self.config.images, self._paths[row]
        raw = read(self.found.folder, path, images.max_pixels)
        order, most = images.channel_order, images.max_pixels
        return load(raw, path, self.preprocessing, order, most, self.views, path).pixels

    def alternative(self, name: str, value: Any, note: str, rounds: int) -> Alternative | None:
        """Hold another setting of ``extract`` against the present one, in turns; None: it changes nothing.

        Raises:
            FeatstoreError: It cannot be used here.
        """
        setting = f"extract.{name}: {value}"
        if name == "workers":
            ratios = [self.decoding(value) / self.decoding() for _ in range(rounds)]
            return Alternative(setting, statistics.median(ratios), min(ratios), "decoding", note)
        extract = self.config.extract.model_copy(update={name: value})
        config = self.config.model_copy(update={"extract": extract})
        spec = describe(config, self.backbone, self.device, None if name in _ANOTHER_MAKE else self.spec)
        with contextlib.closing(make_embedder(config, self.backbone, self.device, spec)) as embedder:
            batches = self._batches_for(embedder)
            if name == "batch_size" and list(map(len, batches)) == list(map(len, self._batches)):
                return None
            self._model(embedder, batches)  # warm
            ratios = [self._model(embedder, batches) / self.model() for _ in range(rounds)]
        return Alternative(setting, statistics.median(ratios), min(ratios), "backbone", note)

    def decoding(self, workers: int | None = None) -> float:
        """Patches a second: read, decoded, resized, described."""
        with ThreadPoolExecutor(workers or self.workers) as pool:
            return _rate(len(self.schedule.rows), lambda: list(pool.map(self._decode, self.schedule.rows)))

    def model(self) -> float:
        """Patches a second through the backbone, pixels in memory."""
        return self._model(self.embedder, self._batches)

    def _model(self, embedder: Embedder, batches: list[NDArray[np.uint8]]) -> float:
        def work() -> None:
            pending = [embedder(pixels) for pixels in batches]
            for features in pending:
                features.result()

        return _rate(len(self.schedule.rows), work)

    def pipeline(self) -> float:
        """Patches a second of a whole extraction, into a store of its own."""
        table, settings = self.found.table, self.config.extract
        with tempfile.TemporaryDirectory(prefix="featstore-bench-") as folder:
            writer = StoreWriter(
                Path(folder) / "store", self.spec, {"bench": True}, self.config.store.format
            )
            committer = Committer(
                writer,
                table,
                settings.part_mb << 20,
                settings.part_seconds,
                self.schedule.rows,
                self.views.count,
            )
            work = Work(
                table,
                self.found.folder,
                self.preprocessing,
                self.schedule,
                self.config.images,
                self.views,
                self.workers,
            )
            return _rate(
                len(self.schedule.rows),
                lambda: run_pass(work, self.embedder, committer, lambda progress: None, lambda: False),
            )


def _rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)
