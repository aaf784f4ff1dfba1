"""`extract`: from a project's settings to a filled store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from featstore.backbones import Backbone, build_backbone
from featstore.cohort.patches import Scan, scan
from featstore.config import FeatstoreConfig
from featstore.errors import FingerprintMismatch
from featstore.extraction import forward
from featstore.extraction.committer import Committer
from featstore.extraction.loading import Views
from featstore.extraction.pipeline import Observer, Progress, Work, run_pass
from featstore.extraction.plan import Plan, make_plan, not_in_store
from featstore.extraction.refresh import check_prune, prune, refresh
from featstore.extraction.report import REPORTS, ExtractionReport, now
from featstore.extraction.schedule import plan_schedule
from featstore.extraction.setup import decoding_threads, describe, make_embedder, most_pixels
from featstore.extraction.setup import provenance as provenance_of
from featstore.extraction.shards import Shard, forward_bytes, parse_shard
from featstore.extraction.utilisation import GpuSampler
from featstore.images import decoder_name
from featstore.process import keep_freed_memory, stop_on_signal
from featstore.spec import EmbeddingSpec
from featstore.store import Store, StoreWriter
from featstore.store.files import unique_name
from featstore.store.records import read_manifest
from featstore.store.writer import check_writable


def extract(
    config: FeatstoreConfig,
    project: Path,
    observe: Observer = lambda progress: None,
    announce: Callable[[Scan, Plan], None] = lambda scan, plan: None,
) -> ExtractionReport:
    """Compute and commit the embedding of every patch that the store lacks.

    Nothing is written before the folder, the settings, the backbone and the header
    of every pending file have been found good; only the table of shares, where there are
    several, is published before the headers are looked at.

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
    spec = describe(config, backbone, device, existing)
    check_writable(path, spec)
    store = Store.open(path) if existing else None
    seen = backbone.preprocessing
    cost = forward_bytes(device.type, seen.resize if seen.is_native else seen.size)
    plan = make_plan(found, store, shard, config.images, project / REPORTS, cost)
    if config.extract.prune:  # before hours of work, not after them
        check_prune(plan.vanished, found, plan.stored)
    schedule = plan_schedule(
        plan.pending["path"].tolist(),
        found.folder,
        backbone,
        config.images,
        most_pixels(config, device, spec),
    )
    announce(found, plan)
    work = Work(
        plan.pending,
        found.folder,
        backbone.preprocessing,
        schedule,
        config.images,
        Views(spec.views, spec.view_seed),
        decoding_threads(config),
    )
    return _carry_out(config, project, found, plan, work, store, backbone, spec, device, shard, observe)


def _carry_out(
    config: FeatstoreConfig,
    project: Path,
    found: Scan,
    plan: Plan,
    work: Work,
    store: Store | None,
    backbone: Backbone,
    spec: EmbeddingSpec,
    device: torch.device,
    shard: Shard,
    observe: Observer,
) -> ExtractionReport:
    settings = config.extract
    if device.type == "cpu":
        keep_freed_memory()
    # What takes minutes is not done for nothing.
    compiled = config if len(plan.pending) else _uncompiled(config)
    embedder = make_embedder(compiled, backbone, device, spec)
    progress, committed, refreshed, pruned, interrupted = Progress(total=0), 0, 0, 0, None
    provenance = {
        # Names the run's report in reports/extract/runs/.
        "run": f"{now():%Y%m%dT%H%M%SZ}_{unique_name()[:8]}",
        "shard": f"{shard.index}/{shard.count}",
        **provenance_of(config, project, backbone, device, embedder),
    }
    sampler = GpuSampler(device)
    began, started, seconds = now(), time.monotonic(), 0.0
    if len(plan.pending) or len(plan.stale) or (settings.prune and len(plan.vanished)):
        writer = StoreWriter(
            project / config.store.path,
            spec,
            provenance,
            config.store.format,
        )
        with stop_on_signal() as received, sampler, contextlib.closing(embedder):
            committer = Committer(
                writer,
                plan.pending,
                settings.part_mb << 20,
                settings.part_seconds,
                work.schedule.rows,
                work.views.count,
            )
            progress = run_pass(work, embedder, committer, observe, lambda: bool(received))
        committed, interrupted = committer.committed, next(iter(received), None)
        seconds = time.monotonic() - started
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
        seconds=seconds,
        settings={
            "device": str(device),
            "compute_dtype": spec.compute_dtype,
            "batch_size": embedder.batch_size,
            "batch_size_halved": embedder.halved,
            "workers": work.workers,
            "runtime": spec.runtime,
            "decoder": decoder_name(),
        },
        weights_ignored=tuple(backbone.weights_ignored),
        interrupted=interrupted,
        shard=shard,
        fingerprint=spec.fingerprint,
        provenance=provenance,
        not_in_store=not_in_store(found.table, plan.shares, project / config.store.path),
        started=began,
        gpu_samples=tuple(sampler.samples),
        gpu_interval=sampler.interval,
        coarse=work.schedule.coarse,
    )


def _uncompiled(config: FeatstoreConfig) -> FeatstoreConfig:
    extract = config.extract.model_copy(update={"compile": False})
    return config.model_copy(update={"extract": extract})
