"""The trainings of `featstore demo`, held against the patches that it has planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from heads.config import Config
from heads.evaluation.planted import PlantedRank, planted_rank
from heads.evaluation.results import ATTENTION
from heads.project import train_project
from heads.run import TrainedRun

# What `featstore.demo` writes beside the patches.
_PLANTED = "planted.csv"


def demo_training(
    config: Config, project: Path, head: str, tell: Callable[[str], None]
) -> tuple[TrainedRun, PlantedRank | None]:
    """Train one head in the demo's project, and say whether its attention finds what was planted.

    Args:
        config: The demo's settings.
        project: The demo's folder.
        head: The head's name; also the suffix of the run folder.
        tell: Called with remarks.

    Returns:
        The run, and the planted patches' rank; None if the run was interrupted.
    """
    chosen = config.model_copy(
        update={
            "head": config.head.model_copy(update={"name": head}),
            "runs": config.runs.model_copy(update={"suffix": head, "analyze_attention": True}),
        }
    )
    run = train_project(chosen, project, tell=tell)
    if run.interrupted is not None:
        return run, None
    return run, planted_rank(run.run.path / ATTENTION, project / _PLANTED)
