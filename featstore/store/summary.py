"""What a store holds, in a person's words."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from featstore.spec import IMPORTED
from featstore.store.format import CASES
from featstore.store.store import Store
from featstore.store.verify import verify


@dataclass(frozen=True)
class StoreSummary:
    """Counts and sizes of a store.

    Attributes:
        path: The store's folder.
        fingerprint: Of its EmbeddingSpec.
        spec: The EmbeddingSpec as JSON types.
        cases: Number of cases.
        slices: Number of slices.
        patches: Number of live embeddings.
        stains: By stain: cases, slices and patches that have it.
        parts: Number of part files that are live.
        bytes_live: Size of the live parts.
        bytes_dead: Size of everything else in the case folders but the records.
        commits: Number of commit records.
        first_commit: Time of the oldest of the newest records, ISO 8601, UTC.
        last_commit: Time of the newest record.
        damaged: What a quick look finds damaged or missing.
    """

    path: str
    fingerprint: str
    spec: dict[str, Any]
    cases: int
    slices: int
    patches: int
    stains: dict[str, dict[str, int]]
    parts: int
    bytes_live: int
    bytes_dead: int
    commits: int
    first_commit: str | None
    last_commit: str | None
    damaged: int

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dict(self.__dict__)

    def to_text(self) -> str:
        """A few lines for a person."""
        spec = self.spec
        lines = [
            f"{self.path}: {self.patches:,} patches of {self.cases:,} cases in {self.slices:,} slices",
            f"  backbone     {_backbone(spec)}",
            f"  input        {_input(spec)}",
            f"  fingerprint  {self.fingerprint}{_weights(spec)}",
            f"  on disk      {_bytes(self.bytes_live)} in {self.parts:,} parts, {self.commits:,} commits"
            + (f"; {_bytes(self.bytes_dead)} that nothing names any more" if self.bytes_dead else ""),
        ]
        if self.first_commit and self.last_commit:
            lines.append(
                f"  committed    {self.first_commit[:19]} to {self.last_commit[:19]} UTC"
                f" ({_ago(self.last_commit)})"
            )
        health = "every record and part is there, as far as a quick look tells"
        if self.damaged:
            health = f"DAMAGED: {self.damaged:,} findings; `featstore verify` lists them"
        lines.append(f"  health       {health}")
        width = max((len(name) for name in self.stains), default=0)
        for name, counts in self.stains.items():
            missing = self.cases - counts["cases"]
            lines.append(
                f"  {name:<{width}}  {counts['cases']:>6,} cases  {counts['slices']:>7,} slices  "
                f"{counts['patches']:>10,} patches" + (f"  (missing in {missing:,})" if missing else "")
            )
        return "\n".join(lines)


def summarize(store: Store) -> StoreSummary:
    """Count what a store holds; reads records and file sizes, no embeddings."""
    stains: dict[str, Counter[str]] = {name: Counter() for name in store.stains()}
    slices = patches = parts = live = dead = commits = 0
    times = []
    for case in store.cases():
        record, found = store.record(case), store.layout(case)
        times.append(record.created)
        slices += len(found.slices)
        patches += len(found.patches)
        parts += len(record.parts)
        live += sum(part.size for part in record.parts)
        first = 0
        for name, count in zip(found.stains, found.stain_sizes.tolist(), strict=True):
            stains[name]["cases"] += 1
            stains[name]["slices"] += count
            stains[name]["patches"] += int(found.slice_sizes[first : first + count].sum())
            first += count
        named = {part.name for part in record.parts}
        with os.scandir(store.path / CASES / store.folder(case).name) as entries:
            for entry in entries:
                commits += entry.name.endswith(".json")
                if not entry.name.endswith(".json") and entry.name not in named:
                    dead += entry.stat().st_size
    return StoreSummary(
        path=str(store.path),
        fingerprint=store.spec.fingerprint,
        spec=store.spec.to_json(),
        cases=len(store.cases()),
        slices=slices,
        patches=patches,
        stains={name: dict(counts) for name, counts in stains.items()},
        parts=parts,
        bytes_live=live,
        bytes_dead=dead,
        commits=commits,
        first_commit=min(times, default=None),
        last_commit=max(times, default=None),
        damaged=len(verify(store.path, "quick").damage),
    )


def _backbone(spec: dict[str, Any]) -> str:
    stored = f"{spec['backbone']}, {spec['dim']} features as {spec['stored_dtype']}"
    if _is_imported(spec):
        return stored
    views = f"; {spec['views']} views (seed {spec.get('view_seed', 0)})" if spec.get("views", 1) > 1 else ""
    return f"{stored}, computed in {spec['compute_dtype']} by {spec.get('runtime', 'torch')}{views}"


def _weights(spec: dict[str, Any]) -> str:
    return "" if _is_imported(spec) else f" (weights {spec['weights_sha256'][:12]}…)"


def _is_imported(spec: dict[str, Any]) -> bool:
    return bool(spec["backbone"].startswith(IMPORTED))


def _input(spec: dict[str, Any]) -> str:
    if _is_imported(spec):
        return "not known: another tool made the embeddings"
    if isinstance(spec["resize"], str):
        rounded = ", sides rounded to multiples of 32" if spec["resize"] == "native32" else ""
        size = f"each patch at its own size{rounded}"
    else:
        size = _resized(spec)
    relu = "" if spec["final_relu"] is None else f", final ReLU {'on' if spec['final_relu'] else 'off'}"
    return f"{size}, {spec['channel_order']}, pool {spec['pool']}{relu}"


def _resized(spec: dict[str, Any]) -> str:
    return (
        f"whole patch resized to {spec['resize']} px"
        if spec["crop"] is None
        else f"resized to {spec['resize']}, centre crop of {spec['crop']} px"
    )


def _ago(time: str) -> str:
    """How long ago an ISO 8601 time is."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size):,} {unit} ago"
    return "just now"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
