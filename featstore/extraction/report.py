"""What one extraction did: for a person, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from featstore.extraction.merged_report import MergedReport
from featstore.extraction.pipeline import Progress
from featstore.extraction.plan import Plan
from featstore.extraction.shards import Shard

# Below the project's folder.
REPORTS = "reports/extract"
FORMAT = "featstore extraction report 1"


def now() -> datetime:
    """The time, with its zone: shares run on several machines."""
    return datetime.now(UTC)


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
        settings: Device, runtime, decoder, precision, batch size (as it ended), workers.
        weights_ignored: Keys of a weights file that no part of the backbone took.
        interrupted: The signal that ended the pass early; None if it was not.
        shard: The share of the work that this was.
        fingerprint: Of what the embeddings are made with.
        provenance: As every part has it: the run's id, machine, versions, weights, source folder.
        not_in_store: By share, how many of the folder's patches the store lacked at the end.
        started: When the pass began.
        finished: When it was over.
        gpu_samples: Fractions of the time in which the GPU computed; empty where nobody knows.
        gpu_interval: Seconds between them.
        coarse: Patches with a feature map smaller than the backbone's grid.
        merged: What all shares did, where this was the last of them to end.
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
    fingerprint: str
    provenance: Mapping[str, Any]
    not_in_store: Mapping[int, int]
    started: datetime
    finished: datetime = field(default_factory=now)
    gpu_samples: tuple[float, ...] = ()
    gpu_interval: float = 1.0
    coarse: int = 0
    merged: MergedReport | None = None

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of every file left out."""
        return [*self.plan.skipped, *self.progress.skipped]

    @property
    def device_utilisation(self) -> float | None:
        """Fraction of the wall time in which the device computed; None where nobody knows.

        On a CPU the time in which a forward pass was under way. On a GPU passes are only started
        from here, so that the driver is asked.
        """
        if not self.progress.done:
            return None
        if self.progress.busy is not None:
            return min(1.0, self.progress.busy / self.seconds)
        return sum(self.gpu_samples) / len(self.gpu_samples) if self.gpu_samples else None

    def to_text(self) -> str:
        """What was done, in a few lines for a person."""
        progress, lines = self.progress, []
        if progress.done:
            lines += [
                f"{self.committed:,} patches embedded and committed in {self.seconds:,.1f} s "
                f"({progress.done / self.seconds:,.0f} patches/s, bound by {progress.bound_by}; "
                f"{self.settings['device']}, {self.settings['compute_dtype']}, "
                f"batch {self.settings['batch_size']})",
                self._times(),
            ]
        if self.settings["batch_size_halved"]:
            lines.append(f"memory ran out {self.settings['batch_size_halved']} times; the batch was halved")
        if self.weights_ignored:
            shown = ", ".join(self.weights_ignored[:5])
            lines.append(f"{len(self.weights_ignored)} keys of the weights file were not used: {shown}")
        lines += [f"{count:,} patches converted: {how}" for how, count in progress.converted.most_common()]
        if self.coarse:
            lines.append(
                f"{self.coarse:,} patches have a feature map of fewer rows or columns than "
                "backbone.pool: cells of their grid share some"
            )
        if self.skipped:
            lines.append(f"{len(self.skipped):,} files skipped, all listed in reports/extract/:")
            lines += [f"  {path}: {reason}" for path, reason in self.skipped[:5]]
        if self.pruned:
            lines.append(f"{self.pruned:,} embeddings of vanished patches dropped")
        if self.interrupted is not None:
            left = len(self.plan.pending) - progress.done - len(progress.skipped)
            state = f"with {left:,} patches left" if left else "when all patches were committed"
            lines.append(f"interrupted {state}; the same command goes on from here")
        elif not lines:
            lines.append("nothing left to do")
        if self.shard.count > 1:
            lines.append(self._other_shares())
        if self.merged is not None:
            lines.append(self.merged.to_text())
        return "\n".join(lines)

    def _times(self) -> str:
        progress = self.progress
        parts = {
            "forward": progress.forward,
            "waiting for decoding": progress.waited_for_decoding,
            "waiting for the writer": progress.waited_for_writing,
        }
        told = ", ".join(f"{100 * value / self.seconds:.0f}% {name}" for name, value in parts.items())
        busy = (
            f"reading {progress.reading:,.1f} s, decoding {progress.decoding:,.1f} s, "
            f"writing {progress.writing:,.1f} s"
        )
        used = self.device_utilisation
        gpu = (
            f"; the GPU was busy {100 * used:.0f}% of the time"
            if used is not None and self.gpu_samples
            else ""
        )
        return f"  {told}; beside it {busy}{gpu}"

    def _other_shares(self) -> str:
        others = sum(n for share, n in self.not_in_store.items() if share != self.shard.index)
        name = f"share {self.shard.index}/{self.shard.count}"
        state = "done" if self.interrupted is None else "not done"
        if self.merged is not None:  # which knows, besides, what the others have skipped
            return f"{name} {state}"
        if not others:
            return f"{name} {state}; all patches of the other shares are in the store"
        return f"{name} {state}; {others:,} patches of other shares are not in the store yet"

    def to_json(self) -> dict[str, Any]:
        """Counts, times and settings as JSON types."""
        plan, progress = self.plan, self.progress
        used = self.device_utilisation
        return {
            "format": FORMAT,
            "committed": self.committed,
            "new": plan.new,
            "changed": plan.changed,
            "already_done": plan.done,
            "refreshed": self.refreshed,
            "vanished": len(plan.vanished),
            "pruned": self.pruned,
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
            "converted": dict(progress.converted),
            "maps_smaller_than_pool": self.coarse,
            "computed": progress.done,
            "not_in_store": sum(self.not_in_store.values()),
            "not_in_store_by_share": {str(share): n for share, n in self.not_in_store.items()},
            "seconds": round(self.seconds, 3),
            "patches_per_second": round(progress.done / self.seconds, 2) if progress.done else None,
            "bound_by": progress.bound_by if progress.done else None,
            "seconds_reading": round(progress.reading, 3),
            "seconds_decoding": round(progress.decoding, 3),
            "seconds_waiting_for_decoding": round(progress.waited_for_decoding, 3),
            "seconds_forward": round(progress.forward, 3),
            "seconds_waiting_for_writing": round(progress.waited_for_writing, 3),
            "seconds_writing": round(progress.writing, 3),
            "device_utilisation": None if used is None else round(used, 3),
            "gpu_utilisation_over_time": {
                "seconds_apart": self.gpu_interval,
                "fractions": [round(value, 2) for value in self.gpu_samples],
            },
            "started": self.started.isoformat(timespec="milliseconds"),
            "finished": self.finished.isoformat(timespec="milliseconds"),
            "interrupted": self.interrupted is not None,
            "shard": f"{self.shard.index}/{self.shard.count}",
            "weights_ignored": list(self.weights_ignored),
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            **self.settings,
            **({"merged": self.merged.to_json()} if self.merged is not None else {}),
        }
