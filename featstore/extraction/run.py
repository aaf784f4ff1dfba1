"""`extract`: from a project's settings to a filled store."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from featstore import __version__
from featstore.backbones import Backbone, build_backbone
from featstore.cohort.patches import Scan, scan
from featstore.config import FeatstoreConfig
from featstore.errors import FingerprintMismatch
from featstore.extraction import forward
from featstore.extraction.committer import Committer
from featstore.extraction.pipeline import Observer, Progress, run_pass
from featstore.extraction.plan import Plan, make_plan
from featstore.extraction.refresh import check_prune, prune, refresh
from featstore.extraction.shards import Shard, parse_shard
from featstore.process import keep_freed_memory, stop_on_signal
from featstore.spec import EmbeddingSpec
from featstore.store import Store, StoreWriter
from featstore.store.records import read_manifest
from featstore.store.writer import check_writable


@dataclass(frozen=True)
class ExtractionReport:
    """What an extraction did.

    Attributes:
        plan: What there was to do.
        progress: What was computed, and where the time went.
        committed: Patches whose embeddings are now in the store.
        refreshed: Embeddings that were given another path, time stamp or position.
        pruned: Embeddings dropped because their PNG has vanished.
        seconds: Wall time of the pass.
        settings: Device, precision, batch size (as it ended), workers.
        weights_ignored: Keys of a weights file that no part of the backbone took.
        interrupted: The signal that ended the pass early; None if it was not.
        shard: The share of the work that this was.
    """

    plan: Plan
    progress: Progress
    committed: int
    refreshed: int
    pruned: int
    seconds: float
    settings: dict[str, Any]
    weights_ignored: tuple[str, ...]
    interrupted: int | None
    shard: Shard

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of every file left out."""
        return [*self.plan.skipped, *self.progress.skipped]

    def to_text(self) -> str:
        """What was done, in a few lines for a person."""
        progress, lines = self.progress, []
        if self.progress.done:
            lines.append(
                f"{self.committed:,} patches embedded and committed in {self.seconds:,.1f} s "
                f"({progress.done / self.seconds:,.0f} patches/s, bound by {progress.bound_by}; "
                f"{self.settings['device']}, {self.settings['compute_dtype']}, "
                f"batch {self.settings['batch_size']})"
            )
        if self.settings["batch_size_halved"]:
            lines.append(f"memory ran out {self.settings['batch_size_halved']} times; the batch was halved")
        if self.weights_ignored:
            shown = ", ".join(self.weights_ignored[:5])
            lines.append(f"{len(self.weights_ignored)} keys of the weights file were not used: {shown}")
        lines += [f"{count:,} patches converted: {how}" for how, count in progress.converted.most_common()]
        if self.skipped:
            lines.append(f"{len(self.skipped):,} files skipped, all listed in reports/extract/:")
            lines += [f"  {path}: {reason}" for path, reason in self.skipped[:5]]
        if self.pruned:
            lines.append(f"{self.pruned:,} embeddings of vanished patches dropped")
        if self.interrupted is not None:
            left = len(self.plan.pending) - progress.done - len(progress.skipped)
            lines.append(f"interrupted with {left:,} patches left; the same command goes on from here")
        elif not lines:
            lines.append("nothing left to do")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Counts, times and settings as JSON types."""
        plan, progress = self.plan, self.progress
        return {
            "committed": self.committed,
            "new": plan.new,
            "changed": plan.changed,
            "already_done": plan.done,
            "refreshed": self.refreshed,
            "vanished": len(plan.vanished),
            "pruned": self.pruned,
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
            "converted": dict(progress.converted),
            "seconds": round(self.seconds, 3),
            "patches_per_second": round(progress.done / self.seconds, 2) if progress.done else None,
            "bound_by": progress.bound_by if progress.done else None,
            "seconds_waiting_for_decoding": round(progress.waited_for_decoding, 3),
            "seconds_forward": round(progress.forward, 3),
            "seconds_waiting_for_writing": round(progress.waited_for_writing, 3),
            "interrupted": self.interrupted is not None,
            "shard": f"{self.shard.index}/{self.shard.count}",
            "weights_ignored": list(self.weights_ignored),
            **self.settings,
        }


def extract(
    config: FeatstoreConfig,
    project: Path,
    observe: Observer = lambda progress: None,
    announce: Callable[[Scan, Plan], None] = lambda scan, plan: None,
) -> ExtractionReport:
    """Compute and commit the embedding of every patch that the store lacks.

    Nothing is written before the folder, the settings, the backbone and the header
    of every pending file have been found good.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        observe: Called after every batch.
        announce: Called once before any work, with the patch table and the plan.

    Raises:
        FeatstoreError: Whatever stands in the way.
    """
    device = forward.choose_device(config.extract.device)
    shard = parse_shard(config.extract.shard)
    path = project / config.store.path
    existing = read_manifest(path)
    if existing is not None and existing.is_imported:
        raise FingerprintMismatch(
            f"the store's embeddings were imported ({existing.backbone})",
            expected="a store that `featstore extract` filled, or none",
            where=str(path),
            fix="extract into another store: --store-path FOLDER",
        )
    found = scan(
        project / config.patches.folder, config.patches, config.stains, config.exclude, base=project
    )
    backbone = build_backbone(config.backbone, project)
    spec = backbone.spec(
        channel_order=config.images.channel_order,
        compute_dtype=forward.choose_compute_dtype(
            config.extract.amp, device, existing.compute_dtype if existing else None
        ),
        stored_dtype=config.extract.dtype,
    )
    check_writable(path, spec)
    store = Store.open(path) if existing else None
    plan = make_plan(found, store, shard, config.images)
    if config.extract.prune:  # before hours of work, not after them
        check_prune(plan.vanished, found, plan.stored)
    announce(found, plan)
    return _carry_out(config, project, found, plan, store, backbone, spec, device, shard, observe)


def _carry_out(
    config: FeatstoreConfig,
    project: Path,
    found: Scan,
    plan: Plan,
    store: Store | None,
    backbone: Backbone,
    spec: EmbeddingSpec,
    device: torch.device,
    shard: Shard,
    observe: Observer,
) -> ExtractionReport:
    settings = config.extract
    workers = decoding_threads(config)
    if device.type == "cpu":
        keep_freed_memory()
    batch_size = forward.choose_batch_size(settings.batch_size, device)
    embedder = forward.Embedder(backbone, device, spec.compute_dtype, spec.stored_dtype, batch_size)
    progress, committed, refreshed, pruned, interrupted = Progress(total=0), 0, 0, 0, None
    started = time.monotonic()
    if len(plan.pending) or len(plan.stale) or (settings.prune and len(plan.vanished)):
        writer = StoreWriter(
            project / config.store.path,
            spec,
            _provenance(config, project, backbone, device, batch_size),
            config.store.format,
        )
        committer = Committer(writer, plan.pending, settings.part_mb << 20, settings.part_seconds)
        with stop_on_signal() as received:
            progress = run_pass(
                plan.pending,
                found.folder,
                embedder,
                backbone.preprocessing,
                committer,
                config.images,
                workers,
                observe,
                lambda: bool(received),
            )
        committed, interrupted = committer.committed, next(iter(received), None)
        if len(plan.stale) and store is not None and interrupted is None:
            refreshed = refresh(writer, store, plan.stale)
        # One share prunes for all of them.
        if settings.prune and shard.index == 0 and interrupted is None:
            pruned = prune(writer, plan.vanished, found)
    return ExtractionReport(
        plan=plan,
        progress=progress,
        committed=committed,
        refreshed=refreshed,
        pruned=pruned,
        seconds=time.monotonic() - started,
        settings={
            "device": str(device),
            "compute_dtype": spec.compute_dtype,
            "batch_size": embedder.batch_size,
            "batch_size_halved": embedder.halved,
            "workers": workers,
        },
        weights_ignored=tuple(backbone.weights_ignored),
        interrupted=interrupted,
        shard=shard,
    )


def decoding_threads(config: FeatstoreConfig) -> int:
    """The number of decoding threads: as configured, or one for every core this process may use."""
    if config.extract.workers != "auto":
        return config.extract.workers
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone knows what a job was given
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _provenance(
    config: FeatstoreConfig, project: Path, backbone: Backbone, device: torch.device, batch_size: int
) -> dict[str, Any]:
    packages = ["torch", "torchvision", "timm", "numpy", "pillow", "h5py"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": {
            "python": platform.python_version(),
            "featstore": __version__,
            **{p: version(p) for p in packages},
        },
        "machine": platform.node(),
        "device": f"{device} {name}".strip(),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "weights": backbone.weights,
        "patches_folder": str((project / config.patches.folder).absolute()),
        "quality_columns": "featstore.quality",
    }
