"""Commands that bring their own data or measure: bench, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cli.cohort import extract_with_bar
from cli.line import COHORT, command, gpu_flag
from featstore import settings
from featstore.errors import ConfigError
from featstore.flags import Call
from featstore.strict_yaml import read_file
from heads.config import Config


@command((*COHORT, "backbone", "extract"), in_project=None, presets=gpu_flag("extract"))
def bench(
    call: Call[Config],
    what: str = typer.Argument("extract", help="what to measure: extract (in a project) | train"),
    patches_used: int = typer.Option(
        512, "--sample", min=32, help="extract: patches of the project to measure with"
    ),
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU"),
) -> None:
    """Measure against the limit: decoding and backbone, or the matrix products of a training."""
    result: Any
    if what == "extract":
        from featstore.bench import bench_extract

        result = bench_extract(call.config, call.project, patches_used)
    elif what == "train":
        from heads.bench import bench_train

        result = bench_train("cuda" if gpu else "auto")
    else:
        raise ConfigError(f"there is no benchmark {what!r}", expected="extract | train", where="bench")
    call.answer(result)


@command((), in_project=False)
def demo(call: Call[Config], folder: Path = typer.Argument(Path("demo"), help="folder to make")) -> None:
    """Make a project folder from real tissue and run the main job on it."""
    from featstore.demo import DEMO_NOTE, write_demo_project
    from featstore.store import Store
    from featstore.store.summary import summarize

    cohort = write_demo_project(folder)
    call.tell(f"{folder}: {cohort.n_patches:,} patches of {cohort.n_cases} cases\n\n{DEMO_NOTE}\n")
    layers = settings.Layers()
    layers.add(Config, read_file(folder / settings.PROJECT_FILE), str(folder))
    inside = Call(layers.build(Config), folder.absolute(), call.as_json)
    report = extract_with_bar(inside)
    call.tell(report.to_text())
    if report.interrupted is not None:
        raise typer.Exit(128 + report.interrupted)
    summary = summarize(Store.open(folder / inside.config.store.path))
    call.tell(f"\n{summary.to_text()}")
    runs = [_demo_run(inside, name) for name in ("hierarchical", "dual_stream")]
    call.show(
        f"\nThe folder works like your own will:\n  cd {folder}\n{_DEMO_NEXT}",
        {"store": summary.to_json(), "runs": runs},
    )


_DEMO_NEXT = """\
  featstore check                               what is in the cohort, and what looks odd
  featstore train-head --model dual_stream      another training, another run folder
  featstore evaluate                            the newest run again, from its checkpoints
  featstore split --folds 5                     splits for trainings to share; then train-head --fold 0
With your own patches:
  featstore init PATCHES --labels labels.csv && featstore extract && featstore train-head"""


def _demo_run(call: Call[Config], name: str) -> dict[str, Any]:
    from heads.demo import demo_training

    call.tell(f"\nfeatstore train-head --model {name}")
    run, rank = demo_training(call.config, call.project, name, call.tell)
    call.tell(run.to_text())
    if rank is None:
        raise typer.Exit(128 + (run.interrupted or 0))
    call.tell(f"  {rank.to_text()}")
    return {**run.to_json(), "planted": rank.to_json()}
