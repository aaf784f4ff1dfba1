"""Commands about patches: init, check, extract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.line import COHORT, caps, command, gpu_flag
from featstore.flags import Call
from heads.config import Config

if TYPE_CHECKING:
    from featstore.extraction import ExtractionReport


@command(COHORT, in_project=False)
def init(
    call: Call[Config],
    patches: Path = typer.Argument(..., help="folder of PNG patches"),
    force: bool = typer.Option(False, help="replace an existing featstore.yaml"),
) -> None:
    """Look at a folder of patches and write a commented featstore.yaml."""
    from featstore.project import init_project

    created = init_project(call.config, call.project, patches, force)
    call.answer(created)


@command((*COHORT, "store", "train"))
def check(
    call: Call[Config],
    sample: int = typer.Option(64, min=1, help="patches that are decoded, spread over the stains"),
) -> None:
    """Report on the cohort: what is there, what is left out and why, what looks odd."""
    from featstore.project import REPORTS, check_project

    report = check_project(call.config, call.project, caps(call.config), sample)
    report.save(call.project / REPORTS / "check")
    call.show(
        f"{report.to_text()}\n\nsaved in {call.project / REPORTS / 'check'} (with a contact sheet)",
        report.to_json(),
    )


@command((*COHORT, "store", "backbone", "extract"), presets=gpu_flag("extract"))
def extract(
    call: Call[Config], gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)")
) -> None:
    """Push every patch that the store lacks through the backbone, once."""
    report = extract_with_bar(call)
    call.answer(report)


def extract_with_bar(call: Call[Config]) -> ExtractionReport:
    """Fill the project's store, with a progress bar."""
    from featstore.progress import ExtractionBar
    from featstore.project import extract_project

    with ExtractionBar(call) as bar:
        return extract_project(call.config, call.project, caps(call.config), bar.update, bar.announce)
