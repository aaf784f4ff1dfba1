"""The settings of heads, training and studies, and the whole config of a project."""

from __future__ import annotations

from pydantic import Field

from featstore.config import FeatstoreConfig, Section


class TrainConfig(Section):
    """How a head is trained."""

    epochs: int = Field(30, ge=1, description="passes over the training cases")
    per_slice_cap: int | None = Field(
        800, ge=1, description="patches of a slice used in an epoch of training, drawn afresh in each"
    )
    max_slices_per_stain: int | None = Field(
        None, ge=1, description="slices of a stain used in training; a choice fixed for the run"
    )


class Config(FeatstoreConfig):
    """Everything that `featstore.yaml` may say."""

    train: TrainConfig = TrainConfig()
