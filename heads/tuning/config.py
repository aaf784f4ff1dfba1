"""The settings of tuning; no torch in this file: `featstore --help` reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from featstore.config import Section, Texts


class Range(Section):
    """Numbers between two bounds, both included; whole ones where the setting takes no others."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None


class Choices(Section):
    """One of some values."""

    choices: list[JsonValue] = Field(min_length=1)


Dimension = Range | Choices


class TuneConfig(Section):
    """How settings are searched for."""

    trials: int = Field(75, ge=1, le=100_000, description="trials, of each outer fold if there are several")
    objective: Literal["val_loss", "val_auc"] = Field(
        "val_loss",
        description="mean over the inner folds: val_loss (log loss, less is better) | val_auc",
    )
    inner_folds: int = Field(
        3,
        ge=1,
        le=20,
        description="folds of the cases that are not tested on; 1: their own training and validation cases",
    )
    heads: Texts = Field([], description="heads to choose among; none: head.name alone")
    space: dict[str, Dimension] | None = Field(
        None,
        description="section.key: {low, high, log, step} or {choices: […]}; null: learning rate, weight "
        "decay, dropouts, class weights and penalties, as far as the head has them",
    )
    sampler: Literal["tpe", "random"] = Field("tpe", description="who proposes: tpe | random")
    startup_trials: int = Field(
        10, ge=1, description="trials drawn at random, and none pruned before as many have ended"
    )
    pruner: Literal["median", "hyperband", "none"] = Field(
        "median", description="who ends hopeless trials: median | hyperband | none"
    )
    warmup_epochs: int = Field(3, ge=0, description="epochs of a trial before it may be pruned")
    storage: str | None = Field(
        None, description="URL of a database for the trials; null: a journal file in the tuning's folder"
    )
    search_seed: int = Field(0, ge=0, lt=2**32, description="seed of the proposals")
    final_seeds: int = Field(
        1, ge=1, le=1000, description="trainings of the winner on the outer split: seed, seed + 1, …"
    )
