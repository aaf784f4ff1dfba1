"""The one command line that all commands register with, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from featstore.flags import CommandLine
from heads.config import Config

COHORT = ("patches", "images", "labels", "")

_line = CommandLine(
    Config, "Embeddings of pathology patches, computed once, kept in a store that can be trusted."
)
app, command = _line.app, _line.command


def gpu_flag(section: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What `--gpu` stands for on a command that is about this section."""
    return lambda own: {section: {"device": "cuda"}} if own["gpu"] else {}


def caps(config: Config) -> Any:
    """The limits of training whose effect the cohort's report tells."""
    from featstore.cohort import Caps

    train = config.train
    return Caps(train.per_slice_cap, train.max_slices_per_stain, train.epochs)
