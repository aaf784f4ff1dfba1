"""From the settings to what a pass works with: description, runtime, threads, limits, provenance."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from featstore import __version__
from featstore.backbones import Backbone
from featstore.config import FeatstoreConfig
from featstore.extraction import forward
from featstore.extraction.forward import Embedder
from featstore.extraction.schedule import affordable_pixels
from featstore.extraction.views import VIEW_POLICY
from featstore.process import usable_cores
from featstore.resident import free_memory
from featstore.spec import EmbeddingSpec

# Whose versions are recorded, where they are there: all that pixels and features go through.
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "h5py", "imagecodecs", "openvino")


def describe(
    config: FeatstoreConfig, backbone: Backbone, device: torch.device, existing: EmbeddingSpec | None
) -> EmbeddingSpec:
    """What embeddings of this project are made with.

    Args:
        config: The project's settings.
        backbone: The frozen network.
        device: Where it runs.
        existing: Of the store that is to be extended; what is left to choose (``auto``) is chosen as there.

    Raises:
        ConfigError: The settings ask for a runtime that is not there.
    """
    settings = config.extract
    spec = backbone.spec(
        channel_order=config.images.channel_order,
        compute_dtype=forward.choose_compute_dtype(
            settings.amp, device, existing.compute_dtype if existing else None
        ),
        stored_dtype=settings.dtype,
        runtime=forward.choose_runtime(settings.runtime, device, existing.runtime if existing else None),
    )
    views, seed = (existing.views, existing.view_seed) if existing else (1, 0)
    # The policy is never the store's: of another one no views can be made, and fingerprints must differ.
    return spec.with_views(
        views if settings.views == "auto" else settings.views,
        seed if settings.view_seed == "auto" else settings.view_seed,
        VIEW_POLICY,
    )


def make_embedder(
    config: FeatstoreConfig, backbone: Backbone, device: torch.device, spec: EmbeddingSpec
) -> Embedder:
    """The backbone, ready to take batches."""
    return forward.make_embedder(
        backbone,
        device,
        spec.compute_dtype,
        spec.stored_dtype,
        forward.choose_batch_size(
            config.extract.batch_size,
            device,
            spec.compute_dtype,
            None if backbone.preprocessing.is_native else backbone.preprocessing.size,
            spec.runtime,
        ),
        spec.runtime,
        config.extract.compile,
    )


def most_pixels(config: FeatstoreConfig, device: torch.device, spec: EmbeddingSpec) -> int:
    """The largest patch, in pixels, that is computed at its own size."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    # OpenVINO computes one patch on every core at once, and each may be a giant.
    together = min(torch.get_num_threads(), usable_cores()) if spec.runtime == forward.OPENVINO else 1
    return affordable_pixels(config.extract.native_pixels, int(free) // together, spec.compute_dtype)


def decoding_threads(config: FeatstoreConfig) -> int:
    """The number of decoding threads: as configured, or one for every core this process may use."""
    if config.extract.workers != "auto":
        return config.extract.workers
    return usable_cores()


def provenance(
    config: FeatstoreConfig, project: Path, backbone: Backbone, device: torch.device, embedder: Embedder
) -> dict[str, Any]:
    """What is recorded with every part, and is no part of the fingerprint."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": {"python": platform.python_version(), "featstore": __version__, **_versions()},
        "machine": platform.node(),
        "device": f"{device} {name}".strip(),
        "threads": torch.get_num_threads(),
        "batch_size": embedder.batch_size,
        "weights": backbone.weights,
        "patches_folder": str((project / config.patches.folder).absolute()),
        "quality_columns": "featstore.quality",
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
