"""The command line: parse, build the config, call one function, show the result."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from featstore import settings
from featstore.errors import ConfigError, FeatstoreError
from heads.config import Config

if TYPE_CHECKING:
    from featstore.cohort import CohortReport, Scan
    from featstore.extraction import Plan, Progress

COHORT = ("patches", "images", "labels", "")


class Commands(TyperGroup):
    """Commands in the order of their definition; ``--per_slice_cap`` is ``--per-slice-cap``."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands."""
        return list(self.commands)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run a command."""
        return super().main(_dashes(sys.argv[1:] if args is None else args), *more, **extra)


def _dashes(args: Sequence[str]) -> list[str]:
    end = list(args).index("--") if "--" in args else len(args)

    def dashed(text: str) -> str:
        name, equals, value = text.partition("=")
        return name.replace("_", "-") + equals + value if text.startswith("--") else text

    return [dashed(text) if i < end else text for i, text in enumerate(args)]


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Embeddings of pathology patches, computed once, kept in a store that can be trusted.",
)


@dataclass(frozen=True)
class Call:
    """What every command is given: settings, project folder, and how to answer."""

    config: Config
    project: Path
    as_json: bool

    def show(self, text: str, data: dict[str, Any]) -> None:
        """Print the answer, for a person or as JSON."""
        print(json.dumps(data, indent=2, ensure_ascii=False, default=str) if self.as_json else text)

    def tell(self, text: str) -> None:
        """Print a remark that is no part of the answer."""
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)


def command(
    shown: Sequence[str],
    *,
    in_project: bool = True,
    presets: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that also takes every setting as a flag.

    Args:
        shown: Sections whose flags `--help` lists; the others work all the same.
        in_project: Whether a `featstore.yaml` must be there.
        presets: Settings that the command's own options stand for.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[1:]
        own = [p.replace(annotation=_annotations(function)[p.name]) for p in own]

        def run(**values: Any) -> None:
            mine = {p.name: values[p.name] for p in own}
            try:
                call = _call(values, in_project, presets(mine) if presets else {})
                function(call, **mine)
            except FeatstoreError as error:
                print(f"featstore {run.__name__}: {error}", file=sys.stderr)
                raise typer.Exit(error.exit_code) from error
            except OSError as error:
                where = f"\n  where: {error.filename}" if error.filename else ""
                print(f"featstore {run.__name__}: {error.strerror or error}{where}", file=sys.stderr)
                raise typer.Exit(2) from error

        parameters = [*own, *_common(), *_setting_flags(shown)]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(function.__name__)(run)
        return function

    return register


def _annotations(function: Callable[..., None]) -> dict[str, Any]:
    return inspect.get_annotations(function, eval_str=True)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _common() -> list[inspect.Parameter]:
    panel = "Project"
    return [
        _parameter(
            "project",
            Path | None,
            typer.Option(
                None, help="project folder (default: here, or the nearest parent)", rich_help_panel=panel
            ),
        ),
        _parameter(
            "config_file",
            Path | None,
            typer.Option(None, "--config", help="YAML laid over featstore.yaml", rich_help_panel=panel),
        ),
        _parameter(
            "assignments",
            list[str] | None,
            typer.Option(None, "--set", help="section.key=value, any setting", rich_help_panel=panel),
        ),
        _parameter(
            "as_json", bool, typer.Option(False, "--json", help="answer as JSON", rich_help_panel=panel)
        ),
    ]


def _setting_flags(shown: Sequence[str]) -> list[inspect.Parameter]:
    names = settings.flag_names(Config)
    parameters = []
    for leaf in settings.leaves(Config):
        flags = names[leaf.path]
        if leaf.is_flag:
            flags = [f"{flag}/--no-{flag[2:]}" for flag in flags]
        default = "" if leaf.info.default in (None, [], {}) else f" [{leaf.info.default}]"
        option = typer.Option(
            None,
            *flags,
            help=f"{leaf.info.description}{default}",
            hidden=leaf.section not in shown,
            rich_help_panel=f"Settings: {leaf.section or 'cohort'}",
        )
        parameters.append(
            _parameter(leaf.path.replace(".", "__"), bool | None if leaf.is_flag else str | None, option)
        )
    return parameters


def _call(values: dict[str, Any], in_project: bool, presets: dict[str, Any]) -> Call:
    """The settings: defaults, featstore.yaml, --config, --set, flags; the last word wins."""
    here = Path.cwd()
    layers = settings.Layers()
    given = values["project"].absolute() if values["project"] else None
    project = given or (settings.find_project(here) if in_project else here)
    if in_project and project is not None and (project / settings.PROJECT_FILE).is_file():
        path = project / settings.PROJECT_FILE
        layers.add(Config, settings.read_file(path), str(path))
    elif in_project or project is None:
        raise ConfigError(
            f"no {settings.PROJECT_FILE} in {project or here}" + ("" if project else " or its parents"),
            expected="a project folder",
            fix="make one: featstore init PATCHES --labels labels.csv; or name one: --project DIR",
        )
    if values["config_file"] is not None:
        layers.add(Config, settings.read_file(values["config_file"]), str(values["config_file"]))
    for text in values["assignments"] or ():
        layers.add(Config, settings.parse_assignment(text, Config), f"--set {text}")
    names = settings.flag_names(Config)
    for leaf in settings.leaves(Config):
        value, flag = values[leaf.path.replace(".", "__")], names[leaf.path][0]
        if isinstance(value, str):
            if leaf.is_path and project != here:
                value = str(here / value)
            layers.add(Config, settings.nest(leaf, value, flag), flag)
        elif value is not None:
            layers.add(Config, {leaf.section: {leaf.key: value}}, flag)
    layers.add(Config, presets, "the command")
    return Call(layers.build(Config), project, values["as_json"])


@command(COHORT, in_project=False)
def init(
    call: Call,
    patches: Path = typer.Argument(..., help="folder of PNG patches"),
    force: bool = typer.Option(False, help="replace an existing featstore.yaml"),
) -> None:
    """Look at a folder of patches and write a commented featstore.yaml."""
    from featstore.project import init_project

    created = init_project(call.config, call.project, patches, force)
    call.show(created.to_text(), created.to_json())


@command((*COHORT, "store", "train"))
def check(
    call: Call, sample: int = typer.Option(64, min=1, help="patches a stain that are decoded")
) -> None:
    """Report on the cohort: what is there, what is left out and why, what looks odd."""
    from featstore.project import REPORTS, check_project

    report = check_project(call.config, call.project, _caps(call.config), sample)
    report.save(call.project / REPORTS / "check")
    call.show(
        f"{report.to_text()}\n\nsaved in {call.project / REPORTS / 'check'} (with a contact sheet)",
        report.to_json(),
    )


def _gpu(own: dict[str, Any]) -> dict[str, Any]:
    return {"extract": {"device": "cuda"}} if own["gpu"] else {}


@command((*COHORT, "store", "backbone", "extract"), presets=_gpu)
def extract(
    call: Call, gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)")
) -> None:
    """Push every patch that the store lacks through the backbone, once."""
    _extract(call)


def _extract(call: Call) -> None:
    from featstore.project import extract_project

    with _ProgressBar(call) as bar:
        report = extract_project(call.config, call.project, _caps(call.config), bar.update, bar.announce)
    call.show(report.to_text(), report.to_json())
    if report.interrupted is not None:
        raise typer.Exit(128 + report.interrupted)


@command(("store",))
def info(call: Call) -> None:
    """Say what the store holds: cohort, backbone, sizes, stains."""
    from featstore.store import Store
    from featstore.store.summary import summarize

    summary = summarize(Store.open(call.project / call.config.store.path))
    call.show(summary.to_text(), summary.to_json())


@command((*COHORT, "backbone", "extract"), presets=_gpu)
def bench(
    call: Call,
    what: str = typer.Argument("extract", help="what to measure: extract"),
    patches_used: int = typer.Option(
        512, "--sample", min=32, help="patches of the project to measure with"
    ),
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)"),
) -> None:
    """Measure the pipeline against the limit that decoding and backbone set on this machine."""
    from featstore.bench import bench_extract

    if what != "extract":
        raise ConfigError(f"there is no benchmark {what!r}", expected="extract", where="bench")
    result = bench_extract(call.config, call.project, patches_used)
    call.show(result.to_text(), result.to_json())


@command((), in_project=False)
def demo(call: Call, folder: Path = typer.Argument(Path("demo"), help="folder to make")) -> None:
    """Make a project folder from real tissue and run the main job on it."""
    from featstore.demo import DEMO_NOTE, write_demo_project
    from featstore.store import Store
    from featstore.store.summary import summarize

    cohort = write_demo_project(folder)
    call.tell(f"{folder}: {cohort.n_patches:,} patches of {cohort.n_cases} cases\n\n{DEMO_NOTE}\n")
    layers = settings.Layers()
    layers.add(Config, settings.read_file(folder / settings.PROJECT_FILE), str(folder))
    inside = Call(layers.build(Config), folder.absolute(), False)
    _extract(inside)
    summary = summarize(Store.open(folder / inside.config.store.path))
    call.show(
        f"\n{summary.to_text()}\n\nThe folder works like your own will:\n  cd {folder}\n"
        "  featstore check      what is in the cohort, and what looks odd\n"
        "  featstore extract    nothing left to do\n"
        "  featstore info       what the store holds\n"
        "With your own patches: featstore init PATCHES --labels labels.csv",
        summary.to_json(),
    )


def _caps(config: Config) -> Any:
    from featstore.cohort import Caps

    train = config.train
    return Caps(train.per_slice_cap, train.max_slices_per_stain, train.epochs)


class _ProgressBar:
    """A bar with patches/s, the time left and what the run is bound by; plain lines where no one looks."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def announce(self, scan: Scan, plan: Plan, report: CohortReport | None) -> None:
        """Say what is about to be done."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._call.tell(plan.to_text(len(scan.table)))
        for warning in report.warnings if report is not None else ():
            self._call.tell(f"warning: {warning}")
        if not len(plan.pending):
            return
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("bound by {task.fields[bound]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty() and not os.environ.get("FORCE_COLOR"),
        )
        self._task = self._bar.add_task("", total=len(plan.pending), rate="", bound="…")
        self._bar.start()

    def update(self, progress: Progress) -> None:
        """Show how far it is."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=progress.done + len(progress.skipped),
                rate=f"{progress.rate:,.0f} patches/s",
                bound=progress.bound_by,
            )


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="print the version")) -> None:
    if version:
        from featstore import __version__

        print(f"featstore {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    app()
