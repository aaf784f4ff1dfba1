"""Small embeddings for store tests: everything about a row follows from its key."""

from __future__ import annotations

import hashlib

import numpy as np

from featstore.spec import EmbeddingSpec
from featstore.store import Slice

DIM = 7


def make_spec(**changes: object) -> EmbeddingSpec:
    fields: dict[str, object] = {
        "backbone": "test",
        "weights_sha256": "0" * 64,
        "resize": 224,
        "crop": None,
        "interpolation": "bilinear",
        "resize_implementation": "test",
        "channel_order": "rgb",
        "color_policy": "test",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "pool": 1,
        "final_relu": None,
        "compute_dtype": "float32",
        "stored_dtype": "float16",
        "runtime": "torch",
        "dim": DIM,
    }
    return EmbeddingSpec(**{**fields, **changes})  # type: ignore[arg-type]


def feature(case: str, stain: str, slice_id: str, patch: int, version: int = 0) -> np.ndarray:
    digest = hashlib.sha256(f"{case}|{stain}|{slice_id}|{patch}|{version}".encode()).digest()
    return (np.frombuffer(digest[: 2 * DIM], np.uint16) / 64).astype(np.float16)


def make_slice(case: str, stain: str, slice_id: str, patches: list[int], version: int = 0) -> Slice:
    names = [f"{case}_{stain}_{slice_id}_{patch}_v{version}" for patch in patches]
    return Slice(
        stain=stain,
        slice_id=slice_id,
        columns={
            "features": np.stack([feature(case, stain, slice_id, p, version) for p in patches]),
            "patch": np.array(patches, np.int64),
            "quality": np.arange(8 * len(patches), dtype=np.float32).reshape(-1, 8),
            "source_name": np.array([name.encode() for name in names]),
            "source_stat": np.array([[p + 1, 1000 + version] for p in patches], np.int64),
            "source_sha256": np.stack(
                [np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8) for name in names]
            ),
        },
    )
