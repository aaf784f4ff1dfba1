"""The demo: its cohort embedded, and its trainings, held against the patches that it has planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from featstore import settings
from featstore.demo import DEMO_NEXT, DEMO_NOTE, write_demo_project
from featstore.extraction import ExtractionReport
from featstore.store import Store
from featstore.store.summary import StoreSummary, summarize
from featstore.strict_yaml import read_file
from heads.config import Config
from heads.evaluation.planted import PlantedRank, planted_rank
from heads.evaluation.results import ATTENTION
from heads.inspect.opened import Wanted, open_run
from heads.inspect.probe_tables import read_probes
from heads.inspect.report.making import report_project
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
    return run, planted_rank(pd.read_csv(run.run.path / ATTENTION), project / _PLANTED)


def demo_probing(config: Config, project: Path, run: Path) -> PlantedRank:
    """Whether what each patch says alone finds what was planted; arguments as `demo_training`."""
    opened = open_run(config, project, Wanted(run))
    called = opened.class_names[-1]
    patches, by = read_probes(opened, leave_out=False).patches, "what each patch says alone"
    return planted_rank(patches, project / _PLANTED, f"alone_{called}", by)


@dataclass
class DemoReport:
    """What the demo made.

    Attributes:
        folder: The project.
        summary: Of its store; None if the extraction was interrupted.
        runs: The trainings, as JSON types.
        report: The page of the last of them.
        interrupted: The signal that ended it early; None if it was not.
    """

    folder: Path
    summary: StoreSummary | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    report: Path | None = None
    interrupted: int | None = None

    def to_text(self) -> str:
        """What to do next."""
        if self.interrupted is not None:
            return f"interrupted; the demo so far is in {self.folder}"
        return f"\nThe folder works like your own will:\n  cd {self.folder}\n{DEMO_NEXT}"

    def to_json(self) -> dict[str, Any]:
        """Store and runs, as JSON types."""
        return {
            "store": None if self.summary is None else self.summary.to_json(),
            "runs": self.runs,
            "report": None if self.report is None else str(self.report),
        }


def run_demo(
    folder: Path,
    extract: Callable[[Config, Path], ExtractionReport],
    tell: Callable[[str], None],
) -> DemoReport:
    """Make a project from real tissue and run the main job on it: extraction, two trainings, a report.

    Args:
        folder: The project, new.
        extract: Fills the store of a project.
        tell: Called with what there is to say on the way.

    Raises:
        FeatstoreError: The folder cannot be made, or a step fails.
    """
    cohort = write_demo_project(folder)
    tell(f"{folder}: {cohort.n_patches:,} patches of {cohort.n_cases} cases\n\n{DEMO_NOTE}\n")
    layers = settings.Layers()
    layers.add(Config, read_file(folder / settings.PROJECT_FILE), str(folder))
    config, project = layers.build(Config), folder.absolute()
    embedded = extract(config, project)
    tell(embedded.to_text())
    done = DemoReport(folder, interrupted=embedded.interrupted)
    if done.interrupted is not None:
        return done
    done.summary = summarize(Store.open(folder / config.store.path))
    tell(f"\n{done.summary.to_text()}")
    for name in ("hierarchical", "dual_stream"):
        tell(f"\nfeatstore train-head --model {name}")
        run, rank = demo_training(config, project, name, tell)
        tell(run.to_text())
        if rank is None:
            done.interrupted = run.interrupted
            return done
        alone = demo_probing(config, project, run.run.path)
        tell(f"  {rank.to_text()}\n  {alone.to_text()}")
        done.runs.append({**run.to_json(), "planted": rank.to_json(), "planted_alone": alone.to_json()})
    tell("\nfeatstore report")
    done.report = report_project(config, project).path
    tell(f"{done.report}: open it in any browser")
    return done
