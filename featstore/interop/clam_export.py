"""A store's embeddings in CLAM's layout: ``h5_files``, ``pt_files``, ``dataset.csv``, ``splits``.

Features are float32: CLAM's models crash on float16 ones.
Source: github.com/mahmoodlab/CLAM, `dataset_modules/dataset_generic.py`, `create_splits_seq.py`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import id_problem
from featstore.cohort.splits import Split
from featstore.errors import StoreError
from featstore.interop.clam import H5, PT
from featstore.store import Store
from featstore.store.format import GEOMETRY_COLUMNS

_SPLITS = "splits"
# A file's name has at most 255 bytes, its suffix among them.
_LONGEST_NAME = 250


@dataclass
class ExportReport:
    """What an export wrote.

    Attributes:
        folder: Where to.
        slides: Number of bags.
        patches: Number of embeddings.
        labelled: Bags in ``dataset.csv``.
        splits: Number of splits.
        notes: What CLAM's layout cannot hold, and what was missing.
    """

    folder: Path
    slides: int = 0
    patches: int = 0
    labelled: int = 0
    splits: int = 0
    notes: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.patches:,} patches in {self.slides:,} bags written to {self.folder} in CLAM's layout",
            f"  dataset.csv: {self.labelled:,} bags with a label; bags.csv: case, stain and slice of all",
            f"  {_SPLITS}/splits_K.csv: {self.splits} splits",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {**self.__dict__, "folder": str(self.folder), "format": "clam"}


@dataclass(frozen=True)
class _Bag:
    """What becomes one of CLAM's slides: rows ``first`` to ``last`` of a case's bag."""

    name: str
    case: str
    stain: str
    slice_id: str
    first: int
    last: int


def export_clam(
    store: Store,
    folder: Path,
    by: str,
    labels: Mapping[str, str],
    splits: Sequence[Split],
    observe: Callable[[int, int], None] = lambda done, total: None,
    exclude: Collection[str] = (),
) -> ExportReport:
    """Write the cases of a store into a new folder.

    Args:
        store: The store.
        folder: Must be missing or empty.
        by: ``slice``: a bag a slice (named by its case where no case has more than one), or
            ``case``: all of a case's patches in one bag.
        labels: Class name by case, for those that have one.
        splits: Of the cases; every slice goes with its case.
        observe: Called after every case with how many are done, and of how many.
        exclude: Cases that are left out.

    Raises:
        StoreError: The folder holds something, two bags would have one name, or the store cannot
            be read.
        OSError: Something could not be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            "the folder for the export is not empty",
            expected="a new or empty folder",
            where=str(folder),
            fix="name another one",
        )
    cases = [case for case in store.cases() if case not in exclude]
    bags = {case: list(_bags(store, case, by)) for case in cases}
    if by == "slice" and all(len(held) == 1 for held in bags.values()):
        bags = {case: list(_bags(store, case, "one")) for case in cases}
    _refuse_clashes([bag for held in bags.values() for bag in held], folder)
    for name in (H5, PT, _SPLITS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    report = ExportReport(folder, splits=len(splits))
    odd: set[str] = set()
    for done, case in enumerate(cases):
        features, table = store.bag(case).features, store.table(case)
        for bag in bags[case]:
            rows = slice(bag.first, bag.last)
            coords = _top_left(table.iloc[rows], odd)
            _write(folder, bag.name, features[rows].astype(np.float32), coords)
            report.slides += 1
            report.patches += bag.last - bag.first
        observe(done + 1, len(cases))
    report.notes += sorted(odd)
    _write_tables(folder, bags, labels, splits, report)
    return report


def _bags(store: Store, case: str, by: str) -> Iterator[_Bag]:
    outline = store.outline(case)
    if by == "case":
        yield _Bag(case, case, "", "", 0, len(outline))
        return
    stains = np.repeat(np.array(outline.stains, object), outline.stain_sizes)
    first = 0
    for stain, slice_id, size in zip(stains, outline.slices, outline.slice_sizes.tolist(), strict=True):
        name = case if by == "one" else f"{case}_{slice_id}_{stain}"
        yield _Bag(name, case, stain, slice_id, first, first + size)
        first += size


def _refuse_clashes(bags: Sequence[_Bag], folder: Path) -> None:
    seen: dict[str, _Bag] = {}
    for bag in bags:
        # Names become files: an id that a store holds safely could lead out of the folder here.
        reason = id_problem(bag.name)
        if reason is None and len(bag.name.encode()) > _LONGEST_NAME:
            reason = f"is longer than {_LONGEST_NAME} bytes"
        if reason is not None:
            raise StoreError(
                f"the name {bag.name[:60]!a} of slice {bag.slice_id[:60]!a} {reason}",
                expected="names that can be names of files",
                where=f"case {bag.case[:60]!a}",
                fix="leave the case out (exclude), or export by case: --by case",
            )
        other = seen.setdefault(bag.name.casefold(), bag)
        if other is not bag:
            raise StoreError(
                f"two bags would have the name {bag.name!r}: slice {other.slice_id} of case {other.case} "
                f"and slice {bag.slice_id} of case {bag.case}",
                expected="names that differ in more than upper and lower case",
                where=str(folder),
                fix="export by case: --by case, or rename one of the cases",
            )


def _top_left(table: Any, odd: set[str]) -> NDArray[np.int32] | None:
    """(N, 2) top left corners in level-0 pixels; None unless all are known."""
    if GEOMETRY_COLUMNS[0] not in table.columns or table[["x0", "y0"]].isna().any(axis=None):
        odd.add("bags without known positions have no coords")
        return None
    corners = table[list(GEOMETRY_COLUMNS)].to_numpy(np.float64).reshape(-1, 4, 2)
    found: NDArray[np.float64] = np.nanmin(corners, axis=1)
    if not np.array_equal(found, corners[:, 0]):
        odd.add("of rotated patches the upright box around them is kept: its top left corner")
    if (np.abs(found) >= 2**31 - 1).any():
        odd.add("bags with positions beyond 32 bits have no coords")
        return None
    if not np.array_equal(found, np.round(found)):
        odd.add("coordinates are rounded to whole pixels")
    return np.round(found).astype(np.int32)


def _write(
    folder: Path, name: str, features: NDArray[np.float32], coords: NDArray[np.int32] | None
) -> None:
    import torch

    with h5py.File.in_memory() as file:  # a disk that fills up must not crash HDF5
        file.create_dataset("features", data=features)
        if coords is not None:
            file.create_dataset("coords", data=coords)
        file.flush()
        image: bytes = file.id.get_file_image()
    (folder / H5 / f"{name}.h5").write_bytes(image)
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(features), buffer)
    (folder / PT / f"{name}.pt").write_bytes(buffer.getbuffer())


def _write_tables(
    folder: Path,
    bags: Mapping[str, Sequence[_Bag]],
    labels: Mapping[str, str],
    splits: Sequence[Split],
    report: ExportReport,
) -> None:
    everything = [bag for held in bags.values() for bag in held]
    _csv(
        folder / "bags.csv",
        ["slide_id", "case_id", "stain", "slice"],
        [[bag.name, bag.case, bag.stain, bag.slice_id] for bag in everything],
    )
    labelled = [bag for bag in everything if bag.case in labels]
    report.labelled = len(labelled)
    if len(labelled) < len(everything):
        report.notes.append(f"{len(everything) - len(labelled):,} bags have no label: not in dataset.csv")
    _csv(
        folder / "dataset.csv",
        ["case_id", "slide_id", "label"],
        [[bag.case, bag.name, labels[bag.case]] for bag in labelled],
    )
    names = list(dict.fromkeys(labels.values()))
    for k, split in enumerate(splits):
        parts = [[bag for case in part for bag in bags.get(case, ())] for part in split.parts().values()]
        slides = [[bag.name for bag in part] for part in parts]
        longest = max(map(len, slides))
        padded = [[*part, *[""] * (longest - len(part))] for part in slides]
        header = ["", "train", "val", "test"]
        stem = folder / _SPLITS / f"splits_{k}"
        _csv(Path(f"{stem}.csv"), header, [[i, *row] for i, row in enumerate(zip(*padded, strict=True))])
        flags = [[name, *(i == j for j in range(3))] for i, part in enumerate(slides) for name in part]
        _csv(Path(f"{stem}_bool.csv"), header, flags)
        counts = [
            [name, *(sum(labels[bag.case] == name for bag in part) for part in parts)] for name in names
        ]
        _csv(Path(f"{stem}_descriptor.csv"), header, counts)


def _csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    # Ids as they are, not made safe for spreadsheets: CLAM looks them up as names of files.
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
