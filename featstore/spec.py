"""What makes two embeddings comparable: the backbone, its weights, preprocessing and dtypes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from featstore.errors import StoreError
from featstore.lazy import cached_property

IMPORTED = "imported:"
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class EmbeddingSpec:
    """Everything that an embedding's value depends on, besides the patch itself.

    Two embeddings may be compared, and may share a store, exactly when their
    fingerprints are equal. Library versions, batch size and machine are
    recorded with every part, but are no part of the fingerprint.

    Attributes:
        backbone: The name as configured, e.g. ``densenet121`` or ``timm:NAME``; ``imported:FORMAT``
            or ``imported:FORMAT:ENCODER`` where another tool made the embeddings.
        weights_sha256: Digest of the state dict's names, dtypes, shapes and values.
        resize: Side in pixels of the square that the whole patch is resized to; with a crop, of
            the shorter side before it; ``native`` or ``native32`` where patches keep their own;
            0 where it is not known.
        crop: Side of the centre crop in pixels; None for none.
        interpolation: ``bilinear``, ``bicubic``, …, the model's own.
        resize_implementation: Which code resizes; results differ in the last bits.
        channel_order: ``rgb`` or ``bgr``, as the PNG files were written.
        color_policy: How grey, palette, alpha and 16-bit files become RGB.
        mean: Per-channel mean of the normalisation, on a 0 to 1 scale.
        std: Per-channel deviation of the normalisation.
        pool: The feature map is averaged over a ``pool`` × ``pool`` grid.
        final_relu: Whether DenseNet's last ReLU is applied; None for other models.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16`` (autocast).
        stored_dtype: ``float16`` or ``float32``.
        runtime: What computes the forward pass (``torch``).
        dim: Number of features D.
        views: Views a patch V: the plain one and V − 1 augmented ones.
        view_seed: Seed of the augmented views; 0 where there are none.
        view_policy: What they are; empty where there are none.
    """

    backbone: str
    weights_sha256: str
    resize: int | str
    crop: int | None
    interpolation: str
    resize_implementation: str
    channel_order: str
    color_policy: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: int
    final_relu: bool | None
    compute_dtype: str
    stored_dtype: str
    runtime: str
    dim: int
    views: int = 1
    view_seed: int = 0
    view_policy: str = ""

    @classmethod
    def imported(cls, source: str, encoder: str | None, dim: int, dtype: str) -> EmbeddingSpec:
        """What is known of embeddings that another tool made.

        Args:
            source: The foreign format's name.
            encoder: What made them, if that is known.
            dim: Number of features D.
            dtype: As they are stored, ``float16`` or ``float32``.
        """
        return cls(
            backbone=f"{IMPORTED}{source}" + (f":{encoder}" if encoder else ""),
            weights_sha256=_UNKNOWN,
            resize=0,
            crop=None,
            interpolation=_UNKNOWN,
            resize_implementation=_UNKNOWN,
            channel_order=_UNKNOWN,
            color_policy=_UNKNOWN,
            mean=(),
            std=(),
            pool=1,
            final_relu=None,
            compute_dtype=_UNKNOWN,
            stored_dtype=dtype,
            runtime=_UNKNOWN,
            dim=dim,
        )

    def with_views(self, count: int, seed: int, policy: str) -> EmbeddingSpec:
        """The same with augmented views beside the plain one."""
        return self if count == 1 else replace(self, views=count, view_seed=seed, view_policy=policy)

    def rows(self) -> dict[str, tuple[int, ...]]:
        """Shape of a row of the columns that hold embeddings: ``features`` and, with views, ``views``."""
        plain: dict[str, tuple[int, ...]] = {"features": (self.dim,)}
        return plain if self.views == 1 else {**plain, "views": (self.views - 1, self.dim)}

    @property
    def plain(self) -> EmbeddingSpec:
        """The same without augmented views: what the plain one's embeddings depend on."""
        return replace(self, views=1, view_seed=0, view_policy="")

    @property
    def is_imported(self) -> bool:
        """Whether another tool made the embeddings, so that no patch can be embedded likewise."""
        return self.backbone.startswith(IMPORTED)

    @cached_property
    def fingerprint(self) -> str:
        """The first 32 hexadecimal digits of the sha256 of the canonical JSON form.

        A field that a later version adds has a default, which stands for what was the case before
        it; at its default it is left out, so that older stores keep their fingerprint.
        """
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types, without those that a later version added and that say nothing new."""
        kept = {f.name: f.default for f in fields(self)}
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in found.items() if kept[k] is MISSING or v != kept[k]}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> EmbeddingSpec:
        """The inverse of `to_json`.

        Raises:
            StoreError: A field is missing, or one is unknown and says something.
        """
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        unknown = {name for name in set(data) - {f.name for f in fields(cls)} if data[name] is not None}
        if unknown or not needed <= set(data):
            raise StoreError(
                f"the embedding description has the fields {sorted(data)}",
                expected=f"{sorted(needed)}",
                where=where,
                fix="read it with the featstore version that wrote it",
            )
        data = {name: data[name] for name in data if name in {f.name for f in fields(cls)}}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def differences(self, other: EmbeddingSpec) -> list[str]:
        """One line for each field in which ``self`` and ``other`` differ."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{k}: {mine[k]} here, {theirs[k]} there" for k in mine if mine[k] != theirs[k]]
