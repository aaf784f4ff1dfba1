"""Folders as other tools write them: by hand, with h5py, PyTorch and NumPy only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

DIM = 6
SLIDES = {"s1": 3, "s2": 1, "s10": 5}
Arrays = dict[str, np.ndarray]

TRIDENT = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "savetodir": "/out/patches",
    "level0_width": 4000,
    "level0_height": 3000,
}
STAMP = {
    "stamp_version": "2.2.0",
    "extractor": "uni2",
    "unit": "um",
    "tile_size_um": 256.0,
    "tile_size_px": 224,
    "code_hash": "abc123",
    "feat_type": "tile",
}


def features_of(
    slides: Mapping[str, int] = SLIDES, dim: int = DIM, dtype: str = "float32", seed: int = 0
) -> Arrays:
    """(N, D) numbers a slide; all of them are exact in float16."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(n, dim)).astype(np.float16).astype(dtype)
        if np.dtype(dtype).kind == "f"
        else rng.integers(0, 100, (n, dim)).astype(dtype)
        for name, n in slides.items()
    }


def corners_of(features: Mapping[str, np.ndarray]) -> Arrays:
    """(N, 2) int64 top left corners, no two of a slide alike."""
    return {name: np.arange(2 * len(x)).reshape(-1, 2) * 512 + 7 for name, x in features.items()}


def square(top_left: np.ndarray, size: float) -> np.ndarray:
    """(N, 8) corners of squares, clockwise from the top left."""
    x, y = top_left.astype(float).T
    return np.stack([x, y, x + size, y, x + size, y + size, x, y + size], axis=1)


def write_h5(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    root: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Path:
    """Arrays in the root of an HDF5 file, attributes of the root and of ``coords``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file.attrs.update(root or {})
        if coords:
            file["coords"].attrs.update(coords)
    return path


def save_pt(path: Path, array: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(array) if isinstance(array, np.ndarray) else array, path)
    return path


def save_npy(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=False)
    return path


def write_clam(
    folder: Path, features: Mapping[str, np.ndarray], kinds: Sequence[str] = ("h5", "pt")
) -> Path:
    corners = corners_of(features)
    for name, x in features.items():
        if "h5" in kinds:
            write_h5(
                folder / "h5_files" / f"{name}.h5",
                {"features": x, "coords": corners[name].astype(np.int32)},
            )
        if "pt" in kinds:
            save_pt(folder / "pt_files" / f"{name}.pt", x)
    return folder


def write_trident(
    folder: Path, features: Mapping[str, np.ndarray], encoder: str = "uni_v1", **attributes: Any
) -> Path:
    """Attributes that TRIDENT does not know stand there as the text 'None'."""
    inner, corners = folder / f"features_{encoder}", corners_of(features)
    for name, x in features.items():
        given = {**TRIDENT, "name": name, **attributes}
        attrs = {key: "None" if value is None else value for key, value in given.items()}
        write_h5(inner / f"{name}.h5", {"features": x, "coords": corners[name]}, coords=attrs)
    return folder


def write_stamp(folder: Path, features: Mapping[str, np.ndarray], **attributes: Any) -> Path:
    """Half a micrometre a level-0 pixel."""
    corners = corners_of(features)
    for name, x in features.items():
        um = (corners[name] * 0.5).astype(np.float32)
        write_h5(folder / f"{name}.h5", {"feats": x, "coords": um}, root={**STAMP, **attributes})
    return folder


def write_slideflow(folder: Path, features: Mapping[str, np.ndarray], **config: Any) -> Path:
    """The index has centres, here of tiles of 512 level-0 pixels."""
    corners = corners_of(features)
    for name, x in features.items():
        save_pt(folder / f"{name}.pt", x)
        np.savez(folder / f"{name}.index.npz", corners[name] + 256)
    about = {
        "extractor": {"class": "slideflow.model.extractors.uni.UNIFeatures", "kwargs": {}},
        "normalizer": None,
        "tile_px": 256,
        "tile_um": 256,
    }
    (folder / "bags_config.json").write_text(json.dumps({**about, **config}))
    return folder


def write_torchmil(
    folder: Path, features: Mapping[str, np.ndarray], labels: Mapping[str, Any] | None = None
) -> Path:
    corners = corners_of(features)
    for name, x in features.items():
        save_npy(folder / "features" / f"{name}.npy", x)
        save_npy(folder / "coords" / f"{name}.npy", corners[name])
        if labels is not None:
            save_npy(folder / "labels" / f"{name}.npy", np.array(labels[name]))
    return folder


def table_rows(features: Mapping[str, np.ndarray], labels: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns of a table of bags; rows of the bags take turns, as tables are not always sorted."""
    rows = sorted((i, name) for name, x in features.items() for i in range(len(x)))
    dim = next(iter(features.values())).shape[1]
    columns: dict[str, list[Any]] = {
        "bag_id": [name for _, name in rows],
        "bag_label": [labels[name] for _, name in rows],
    }
    return columns | {f"f{j}": [features[name][i, j].item() for i, name in rows] for j in range(dim)}


def write_table(path: Path, features: Mapping[str, np.ndarray], labels: Mapping[str, Any]) -> Path:
    columns = table_rows(features, labels)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_vectors(folder: Path, features: Mapping[tuple[str, str, str], np.ndarray]) -> Path:
    """One file a row of every (case, stain, slice); patches are numbered from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for (case, stain, slice_id), x in features.items():
        for i, row in enumerate(x, start=1):
            save_pt(folder / f"case_{case}_{slice_id}_{stain}_patch{i}.pt", row.copy())
    return folder


def write_rows(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A small CSV."""
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")
    return path
