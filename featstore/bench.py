"""How close extraction comes to the limit that decoding and backbone set on this machine."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore.backbones import Backbone, build_backbone
from featstore.cohort import Scan, scan
from featstore.config import FeatstoreConfig
from featstore.extraction import forward
from featstore.extraction.committer import Committer
from featstore.extraction.loading import Views, load, read
from featstore.extraction.pipeline import Work, run_pass
from featstore.extraction.schedule import plan_schedule
from featstore.extraction.setup import decoding_threads, describe, make_embedder, most_pixels
from featstore.process import keep_freed_memory
from featstore.spec import EmbeddingSpec
from featstore.store import StoreWriter


@dataclass(frozen=True)
class ExtractBench:
    """Rates in patches per second: medians over rounds in which all three are measured in turn.

    Attributes:
        decode_rate: Reading, decoding and resizing alone, on all cores.
        model_rate: Forward passes alone, pixels already in memory.
        pipeline_rate: The whole extraction into a temporary store.
        limit: Where decoding and backbone share the cores, 1 / (1/model + 1/decode);
            beside a GPU, the slower of the two.
        fraction_of_limit: Median of pipeline_rate / limit, round by round.
        rounds: How many rounds.
        patches: Patches a round.
        settings: Device, precision, batch size, decoding threads, PyTorch's threads.
    """

    decode_rate: float
    model_rate: float
    pipeline_rate: float
    limit: float
    fraction_of_limit: float
    rounds: int
    patches: int
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}

    def to_text(self) -> str:
        """A few lines for a person."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{self.patches:,} patches, {self.rounds} rounds ({settings})\n"
            f"  decoding alone   {self.decode_rate:>9,.1f} patches/s\n"
            f"  backbone alone   {self.model_rate:>9,.1f} patches/s\n"
            f"  limit of both    {self.limit:>9,.1f} patches/s\n"
            f"  extraction       {self.pipeline_rate:>9,.1f} patches/s, "
            f"{self.fraction_of_limit:.2f} of the limit"
        )


def bench_extract(
    config: FeatstoreConfig, project: Path, sample: int = 512, rounds: int = 3
) -> ExtractBench:
    """Measure on a project's own patches; the project is not changed.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        sample: Patches to measure with, spread over the cohort.
        rounds: How often everything is measured.

    Raises:
        FeatstoreError: The patches or the backbone cannot be used.
    """
    device = forward.choose_device(config.extract.device)
    folder = project / config.patches.folder
    found = scan(folder, config.patches, config.stains, config.exclude, base=project)
    rows = np.linspace(0, len(found.table) - 1, min(sample, len(found.table))).round().astype(int)
    table = found.table.iloc[np.unique(rows)]
    backbone = build_backbone(config.backbone, project)
    spec = describe(config, backbone, device, None)
    if device.type == "cpu":
        keep_freed_memory()
    runner = _Runner(config, Scan(table, folder), backbone, spec, device)
    runner.pipeline(), runner.model()  # warm caches, kernels and memory
    results = []
    for _ in range(rounds):
        decoding, model, pipeline = runner.decoding(), runner.model(), runner.pipeline()
        limit = 1 / (1 / model + 1 / decoding) if device.type == "cpu" else min(model, decoding)
        results.append((decoding, model, pipeline, limit, pipeline / limit))
    decoding, model, pipeline, limit, fraction = (
        statistics.median(values) for values in zip(*results, strict=True)
    )
    return ExtractBench(
        decode_rate=decoding,
        model_rate=model,
        pipeline_rate=pipeline,
        limit=limit,
        fraction_of_limit=fraction,
        rounds=rounds,
        patches=len(table),
        settings={
            "backbone": config.backbone.name,
            "device": str(device),
            "dtype": spec.compute_dtype,
            "batch size": runner.embedder.batch_size,
            "decoding threads": runner.workers,
            "torch threads": torch.get_num_threads(),
        },
    )


class _Runner:
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
        self.preprocessing = backbone.preprocessing
        self.workers = decoding_threads(config)
        self.views = Views(spec.views, spec.view_seed)
        self.embedder = make_embedder(config, backbone, device, spec)
        self._paths = found.table["path"].tolist()
        self.schedule = plan_schedule(
            self._paths, found.folder, self.preprocessing, config.images, most_pixels(config, device, spec)
        )
        with ThreadPoolExecutor(self.workers) as pool:
            images = dict(
                zip(self.schedule.rows.tolist(), pool.map(self._decode, self.schedule.rows), strict=True)
            )
        batches = self.schedule.batches(self.embedder.forward_size, self.views.count)
        self._batches = [np.concatenate([images[row] for row in rows.tolist()]) for rows in batches]

    def _decode(self, row: int) -> Any:
        images, path = self.config.images, self._paths[row]
        raw = read(self.found.folder, path, images.max_pixels)
        order, most = images.channel_order, images.max_pixels
        return load(raw, path, self.preprocessing, order, most, self.views, path).pixels

    def decoding(self) -> float:
        with ThreadPoolExecutor(self.workers) as pool:
            return _rate(len(self.schedule.rows), lambda: list(pool.map(self._decode, self.schedule.rows)))

    def model(self) -> float:
        def work() -> None:
            pending = [self.embedder(pixels) for pixels in self._batches]
            for features in pending:
                features.result()

        return _rate(len(self.schedule.rows), work)

    def pipeline(self) -> float:
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
