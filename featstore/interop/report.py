"""Where imported bags go, and what an import did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featstore.spec import EmbeddingSpec

Skipped = list[tuple[str, str]]


@dataclass(frozen=True)
class Target:
    """Where imported bags go, and how.

    Attributes:
        path: The store's folder.
        file_format: Of new parts, ``hdf5`` or ``zarr``.
        part_bytes: A part is closed at about this size; a slice is never cut.
        precision: ``float16``, ``float32``, or ``keep``: float16 where all bags have it.
        encoder: What made the features; None: what the source says.
        skip_bad: Leave out bags that cannot be used, and list them, instead of stopping.
        exclude: Cases that are left out.
    """

    path: Path
    file_format: str = "hdf5"
    part_bytes: int = 256 << 20
    precision: str = "keep"
    encoder: str | None = None
    skip_bad: bool = False
    exclude: frozenset[str] = frozenset()


@dataclass
class ImportReport:
    """What an import did.

    Attributes:
        format: The foreign format.
        spec: What is known of the embeddings.
        store: The store's folder.
        bags: Bags committed now.
        patches: Embeddings committed now.
        already: Bags that the store had from the same files.
        replaced: Embeddings that the store had of the same bags, from other files or otherwise placed.
        excluded: Bags of excluded cases.
        skipped: (file, reason) of every bag left out.
        notes: What a person should know.
        labels: Raw class by case, where the source holds classes.
        seconds: Wall time.
        interrupted: The signal that ended the import early; None if it was not.
    """

    format: str
    spec: EmbeddingSpec
    store: Path
    bags: int = 0
    patches: int = 0
    already: int = 0
    replaced: int = 0
    excluded: int = 0
    skipped: Skipped = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: int | None = None

    def to_text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.patches:,} patches of {self.bags:,} bags imported from {self.format} in "
            f"{self.seconds:,.1f} s ({self.patches / max(self.seconds, 1e-9):,.0f} patches/s); "
            f"{self.spec.dim} features as {self.spec.stored_dtype}"
        ]
        if self.already:
            lines.append(f"{self.already:,} bags were there already, from the same files")
        if self.replaced:
            lines.append(f"{self.replaced:,} embeddings that were there of these bags were replaced")
        if self.excluded:
            lines.append(f"{self.excluded:,} bags of excluded cases were left out")
        if self.skipped:
            lines.append(f"{len(self.skipped):,} bags skipped:")
            lines += [f"  {path}: {reason}" for path, reason in self.skipped[:5]]
        lines += [f"note: {note}" for note in self.notes]
        if self.interrupted is not None:
            lines.append("interrupted; the same command goes on from here")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {
            "format": self.format,
            "store": str(self.store),
            "fingerprint": self.spec.fingerprint,
            "backbone": self.spec.backbone,
            "dim": self.spec.dim,
            "stored_dtype": self.spec.stored_dtype,
            "bags": self.bags,
            "patches": self.patches,
            "already_done": self.already,
            "replaced": self.replaced,
            "excluded": self.excluded,
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted is not None,
        }
