"""One PNG's embedding, made exactly as those of a store."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.config import FeatstoreConfig
from featstore.errors import BackboneError, FingerprintMismatch, ImageError, StoreError
from featstore.store import Store


def embed_png(
    path: str | PathLike[str],
    store: Store,
    config: FeatstoreConfig,
    project: Path,
    channel_order: str | None = None,
) -> NDArray[Any]:
    """The embedding of one PNG by a store's own backbone, so that `similar` can compare it.

    Args:
        path: The PNG.
        store: Its preprocessing, precision and runtime are used, whatever ``extract`` says now.
        config: The project's settings: which backbone, where its weights are, which device.
        project: The folder that relative paths in the settings start from.
        channel_order: Of this file, ``rgb`` or ``bgr``; by default as in the store's files.

    Returns:
        (D,) of the store's dtype.

    Raises:
        StoreError: The store's embeddings were imported.
        FingerprintMismatch: The settings name another backbone, other weights or other preprocessing.
        BackboneError: The backbone or its weights cannot be had, or the embedding is not finite.
        ConfigError: What computes the store's embeddings is not installed here.
        ImageError: The file cannot be read, or is too small or too large for the backbone.
    """
    spec = store.spec
    if spec.is_imported:
        raise StoreError(
            f"the store's embeddings were imported ({spec.backbone}): no patch can be embedded likewise",
            expected="a store that `featstore extract` filled",
            where=str(store.path),
            fix="look for patches of the store, or extract into a store of your own",
        )
    # torch takes seconds to load, and comparing what is in the store needs none of it.
    from featstore.backbones import build_backbone
    from featstore.extraction.forward import OPENVINO, choose_device, choose_runtime
    from featstore.extraction.loading import load, read
    from featstore.extraction.schedule import plan_schedule
    from featstore.extraction.setup import make_embedder, most_pixels

    device = choose_device("cpu" if spec.runtime == OPENVINO else config.extract.device)
    choose_runtime("auto", device, spec.runtime)
    backbone = build_backbone(config.backbone, project)
    ours = backbone.spec(spec.channel_order, spec.compute_dtype, spec.stored_dtype, spec.runtime)
    if ours.fingerprint != spec.plain.fingerprint:
        raise FingerprintMismatch(
            "the settings describe other embeddings than the store's:\n"
            + "\n".join(f"    {line}" for line in ours.differences(spec.plain)),
            expected="the backbone, weights and preprocessing that the store was extracted with",
            where=f"backbone; {store.path}",
            fix="set them as `featstore info` shows them",
        )
    file, images = Path(path).absolute(), config.images.model_copy(update={"on_bad_image": "skip"})
    raw = read(file.parent, file.name, images.max_pixels)
    limit = most_pixels(config, device, spec)
    for name, reason in plan_schedule([file.name], file.parent, backbone, images, limit).skipped:
        raise ImageError(
            f"{name}: {reason}",
            expected="a patch that the backbone can take",
            where=str(file),
            fix="choose another",
        )
    order = channel_order or spec.channel_order
    loaded = load(raw, file.name, backbone.preprocessing, order, images.max_pixels)
    # Compiling takes minutes, and is no part of what embeddings depend on.
    plain = config.extract.model_copy(update={"compile": False})
    embedder = make_embedder(config.model_copy(update={"extract": plain}), backbone, device, spec)
    try:
        vector: NDArray[Any] = embedder(loaded.pixels).result()[0]
    finally:
        embedder.close()
    if not np.isfinite(vector).all():
        raise BackboneError(
            f"the embedding of {file.name} is not finite in {spec.stored_dtype}",
            expected="numbers that the store could hold",
            where=str(file),
            fix="choose another patch",
        )
    return vector
