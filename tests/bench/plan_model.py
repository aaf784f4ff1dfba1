"""The cost model behind docs/scale.md: pure functions from a cohort's size to what it takes.

Every rate was measured on two cores of a shared Intel Xeon (BENCHMARKS.md says by which command). What
was not measured is derived, and its column says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DIM = 1024
# Patches a second and core, DenseNet121 in bf16, sizes as a lab has them (BENCHMARKS.md, Extraction).
OPENVINO, PYTORCH = 122 / 2, 46 / 2
# Seconds of one core to decode a patch, by sizes.
DECODE = {"lab": 2.06e-3, "224": 0.70e-3}
# Bytes a PNG of real tissue has at those sizes: mean, and standard deviation over mean.
PNG_BYTES, PNG_SPREAD = 313_000, 2.47
# Bytes a patch takes in a part, of slices as `bench_plan.draw` makes them: HDF5; in Zarr.
PART_BYTES = {"hdf5": 2_182, "zarr": 2_176}
# CPU seconds: a case to list, a case to verify quickly, a slice to read what is known of its files.
LIST_CASE, VERIFY_CASE, SOURCES_SLICE = 95e-6, 102e-6, 0.7e-3
# Bytes a second of one process, checksums included, and seconds a slice, files in the page cache.
VERIFY, FULL, STREAM, COPY = 0.68e9, 0.48e9, 1.26e9, 0.4e9
VERIFY_SLICE, STREAM_SLICE = 0.71e-3, 0.15e-3
# Seconds to take 64 patches of a case that has been taken from before.
TAKE_CASE = 0.2e-3
# Seconds and bytes of memory a patch's name takes while a folder is read; and while a store is extended.
NAME_SECONDS, NAME_BYTES, RESUME_BYTES = 2.2e-6, 340, 620
# A training step of one case (hierarchical, bf16, two cores): of itself, and for each patch.
STEP, STEP_PATCH = 6e-3, 4.2e-6
OUTLINE_BYTES = 18.5
# `extract.part_mb` and `part_seconds`; stains × slices of a case.
PART_MB, PART_SECONDS, SLICES_A_CASE = 256, 60.0, 15


@dataclass(frozen=True)
class Cohort:
    """So many cases and patches, five slices of each of three stains a case."""

    cases: int
    patches: int

    @property
    def slices(self) -> int:
        """Slices of all cases."""
        return self.cases * SLICES_A_CASE

    @property
    def name(self) -> str:
        """As a row of a table begins."""
        return f"{self.cases:,} cases, {self.patches:,}"


COHORTS = (
    Cohort(300, 83_630),
    Cohort(1_000, 10**6),
    Cohort(10_000, 10**7),
    Cohort(100_000, 10**7),
    Cohort(100_000, 10**9),
)


def core_hours(cohort: Cohort, rate: float) -> float:
    """Hours of one core, at a rate in patches a second and core."""
    return cohort.patches / rate / 3600


def decode_bound_rate(cores: int, sizes: str = "lab") -> float:
    """Patches a second that so many cores decode, if a GPU's forward pass keeps up with them."""
    return cores / DECODE[sizes]


def store_bytes(cohort: Cohort, file_format: str = "hdf5") -> float:
    """Bytes of all parts of a store."""
    return cohort.patches * PART_BYTES[file_format]


def inodes(cohort: Cohort, shares: int = 1, rate: float = 2 * OPENVINO) -> int:
    """Files and folders of a store: of each case its folder, and a part and a record a commit.

    Args:
        cohort: Its size.
        shares: Of the extraction; a case's slices are dealt out to as many as there are.
        rate: Patches a second of each share: a part is closed after a minute.
    """
    touched = min(shares, SLICES_A_CASE)
    of_one = cohort.patches / cohort.cases / touched
    size = math.ceil(of_one * PART_BYTES["hdf5"] / (PART_MB << 20))
    commits = touched * max(size, math.ceil(of_one / (rate * PART_SECONDS)))
    return cohort.cases * (1 + 2 * commits)


def epoch_seconds(cohort: Cohort, bag_size: int | None = None) -> float:
    """Seconds of an epoch over all cases, embeddings in memory, one case a step."""
    seen = cohort.patches if bag_size is None else min(cohort.patches, cohort.cases * bag_size)
    return cohort.cases * STEP + seen * STEP_PATCH


def stream_seconds(cohort: Cohort) -> float:
    """Seconds that reading adds to an epoch where embeddings do not fit, files in the page cache."""
    return store_bytes(cohort) / STREAM + cohort.slices * STREAM_SLICE


def verify_seconds(cohort: Cohort, rate: float) -> float:
    """Seconds of `verify` by one process, files in the page cache, at so many bytes a second."""
    return store_bytes(cohort) / rate + cohort.slices * VERIFY_SLICE


def extraction(cohort: Cohort) -> list[str]:
    """Hours of cores and GPUs, and what must be read."""
    rate = decode_bound_rate(16)
    return [
        time_text(3600 * core_hours(cohort, OPENVINO)),
        time_text(3600 * core_hours(cohort, PYTORCH)),
        time_text(3600 * core_hours(cohort, OPENVINO) / 256 / 8),
        time_text(cohort.patches * DECODE["lab"]),
        time_text(cohort.patches / rate),
        bytes_text(cohort.patches * PNG_BYTES),
    ]


def storage(cohort: Cohort) -> list[str]:
    """Bytes and inodes of a store, and inodes of what else one may do."""
    return [
        bytes_text(cohort.patches * DIM * 2),
        bytes_text(store_bytes(cohort)),
        bytes_text(store_bytes(cohort, "zarr")),
        f"{inodes(cohort):,}",
        f"{inodes(cohort, 256):,}",
        f"{cohort.patches:,}",
        f"{2 * cohort.slices:,}",
    ]


def upkeep(cohort: Cohort) -> list[str]:
    """CPU time of one process, and memory of one share."""
    return [
        time_text(cohort.patches * NAME_SECONDS),
        bytes_text(cohort.patches * NAME_BYTES),
        bytes_text(cohort.patches * RESUME_BYTES),
        time_text(cohort.slices * SOURCES_SLICE),
        time_text(cohort.cases * LIST_CASE),
        time_text(cohort.cases * VERIFY_CASE),
        time_text(verify_seconds(cohort, VERIFY)),
        time_text(verify_seconds(cohort, FULL)),
    ]


def training(cohort: Cohort) -> list[str]:
    """Memory, and seconds of an epoch in memory, with 64 patches a case, and read in every epoch."""
    return [
        bytes_text(cohort.patches * DIM * 2),
        bytes_text(cohort.patches * OUTLINE_BYTES),
        time_text(epoch_seconds(cohort)),
        time_text(epoch_seconds(cohort, 64)),
        time_text(stream_seconds(cohort)),
        time_text(cohort.cases * TAKE_CASE),
        time_text(store_bytes(cohort) / COPY),
    ]


TABLES: dict[str, tuple[tuple[str, ...], Callable[[Cohort], list[str]]]] = {
    "Extraction": (
        (
            "cores × time, OpenVINO",
            "cores × time, PyTorch",
            "256 tasks of 8 cores, OpenVINO",
            "cores × time, decoding alone",
            "one GPU with 16 cores (derived)",
            "PNG bytes (derived)",
        ),
        extraction,
    ),
    "Storage": (
        (
            "embeddings, float16",
            "store, HDF5",
            "store, Zarr",
            "inodes, one share",
            "inodes, 256 shares",
            "inodes, one `.pt` a patch",
            "inodes, CLAM's two files a slice",
        ),
        storage,
    ),
    "Upkeep": (
        (
            "scan, CPU",
            "scan, memory",
            "extending a store, memory",
            "reading what is known of the files",
            "open and list",
            "verify --quick",
            "verify",
            "verify --full",
        ),
        upkeep,
    ),
    "Training": (
        (
            "embeddings in memory",
            "outlines in memory",
            "epoch in memory",
            "epoch of `bag_size: 64`",
            "reading, each epoch, if streamed",
            "… of `bag_size: 64`",
            "copy to scratch",
        ),
        training,
    ),
}


def time_text(seconds: float) -> str:
    """``2.1 h``: two digits or more."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= (3 if unit == "days" else 1.5) * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s"


def bytes_text(count: float) -> str:
    """``2.1 GB``: two digits or more."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{_digits(count / 1e3)} kB"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def all_tables(cohorts: Sequence[Cohort] = COHORTS) -> str:
    """Every table, as docs/scale.md has it."""
    return "\n\n".join(f"{name}:\n\n{table(name, cohorts)}" for name in TABLES)


def table(name: str, cohorts: Sequence[Cohort] = COHORTS) -> str:
    """One of `TABLES` in Markdown, a row a cohort."""
    heads, cells = TABLES[name]
    rows = [["cohort", *heads], ["---"] * (1 + len(heads)), *([c.name, *cells(c)] for c in cohorts)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
