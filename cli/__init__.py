"""The command line: parse, build the config, call one function, show the result."""

from __future__ import annotations

import typer

# `featstore --help` lists the commands in the order of these imports.
# isort: off
from cli import cohort as cohort
from cli import store as store
from cli import training as training
from cli import demo as demo
from cli.line import app
# isort: on

__all__ = ["app"]


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="print the version")) -> None:
    if version:
        from featstore import __version__

        print(f"featstore {__version__}")
        raise typer.Exit
