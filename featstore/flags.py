"""Commands whose flags are the settings: every field of a config, on every command.

Typer does the parsing; this says which flags there are and lays the config together. It knows
no particular config: `cli.py` hands over the whole one, heads and training included.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import typer
from pydantic import BaseModel
from typer.core import TyperGroup
from typer.models import OptionInfo

from featstore import settings
from featstore.errors import ConfigError, FeatstoreError
from featstore.strict_yaml import read_file

C = TypeVar("C", bound=BaseModel)


class Report(Protocol):
    """What a command has to say."""

    def to_text(self) -> str:
        """For a person."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""


class Commands(TyperGroup):
    """Commands in the order of their definition."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands."""
        return list(self.commands)


def canonical(args: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[str]:
    """Command-line words with every flag under its one name.

    ``--per_slice_cap`` becomes ``--per-slice-cap``, ``--extract-batch-size`` ``--batch-size``.

    Args:
        args: The words as typed; those after ``--`` are left alone.
        names: The flags of every setting, the name to be used first (`settings.flag_names`).
    """
    first = {flag: flags[0] for flags in names.values() for flag in flags}
    first |= {f"--no-{flag[2:]}": f"--no-{name[2:]}" for flag, name in first.items()}
    end = list(args).index("--") if "--" in args else len(args)

    def one(text: str) -> str:
        name, equals, value = text.partition("=")
        name = name.replace("_", "-")
        return first.get(name, name) + equals + value if text.startswith("--") else text

    return [one(text) if i < end else text for i, text in enumerate(args)]


@dataclass(frozen=True)
class Call(Generic[C]):
    """What every command is given: settings, project folder, and how to answer."""

    config: C
    project: Path
    as_json: bool

    def show(self, text: str, data: dict[str, Any]) -> None:
        """Print the answer, for a person or as JSON."""
        if self.as_json:
            text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
        # Names of files need not be UTF-8: their other bytes are spelt out.
        print(text.encode("utf-8", "backslashreplace").decode("utf-8"))

    def answer(self, report: Report) -> None:
        """Print a report; the exit code is its own, or the signal's that ended the work early."""
        self.show(report.to_text(), report.to_json())
        interrupted = getattr(report, "interrupted", None)
        if interrupted is not None:
            raise typer.Exit(128 + interrupted)
        if code := getattr(report, "exit_code", 0):
            raise typer.Exit(code)

    def tell(self, text: str) -> None:
        """Print a remark that is no part of the answer."""
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)


class CommandLine(Generic[C]):
    """A Typer application whose commands all take every setting as a flag.

    Args:
        model: The config.
        summary: What `--help` says of the whole.
    """

    def __init__(self, model: type[C], summary: str) -> None:
        names: dict[str, dict[str, list[str]]] = {}
        everywhere = settings.flag_names(model)

        class Canonical(Commands):
            def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
                words = list(sys.argv[1:] if args is None else args)
                command = next((word for word in words if not word.startswith("-")), "")
                known = names.get(command, everywhere)
                return super().main(canonical(words, known), *more, **extra)

        self._names = names
        self.app = typer.Typer(
            cls=Canonical,
            no_args_is_help=True,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            context_settings={"help_option_names": ["-h", "--help"]},
            help=summary,
        )
        self._model = model

    def command(
        self,
        shown: Sequence[str],
        *,
        in_project: bool | None = True,
        presets: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Make a function a command that also takes every setting as a flag.

        Args:
            shown: Sections that the command is about, whose flags `--help` lists; the others work
                all the same, if need be as ``--section-key``.
            in_project: Whether a `featstore.yaml` must be there; None: it is read if it is.
            presets: Settings that the command's own options stand for.

        A command's own option takes its name from a setting that has the same (`train-head --folds`),
        whose flag is then ``--section-key``.
        """

        def register(function: Callable[..., None]) -> Callable[..., None]:
            own = list(inspect.signature(function).parameters.values())[1:]
            own = [p.replace(annotation=_annotations(function)[p.name]) for p in own]
            name = function.__name__.rstrip("_").replace("_", "-")
            options = [p for p in own if isinstance(p.default, OptionInfo)]
            spelt = [p.default.param_decls or [f"--{p.name.replace('_', '-')}"] for p in options]
            taken = {flag for flags in spelt for flag in flags}
            found = settings.flag_names(self._model, shown).items()
            names = {path: [flag for flag in flags if flag not in taken] for path, flags in found}

            def run(**values: Any) -> None:
                mine = {p.name: values[p.name] for p in own}
                try:
                    call = self._call(values, names, in_project, presets(mine) if presets else {})
                    function(call, **mine)
                except FeatstoreError as error:
                    print(f"featstore {name}: {error}", file=sys.stderr)
                    raise typer.Exit(error.exit_code) from error
                except BrokenPipeError:
                    # `featstore info | head`: nobody reads on, and Python must not complain at its end.
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    raise typer.Exit(1) from None
                except OSError as error:
                    where = f"\n  where: {error.filename}" if error.filename else ""
                    print(
                        f"featstore {name}: {error.strerror or error}{where}\n"
                        "  to do: check this path, its permissions and the space on its disk",
                        file=sys.stderr,
                    )
                    raise typer.Exit(2) from error

            self._names[name] = names
            parameters = [*own, *_common(), *self._setting_flags(shown, names)]
            run.__name__, run.__doc__ = function.__name__, function.__doc__
            run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            run.__annotations__ = {p.name: p.annotation for p in parameters}
            self.app.command(name)(run)
            return function

        return register

    def _setting_flags(
        self, shown: Sequence[str], names: Mapping[str, Sequence[str]]
    ) -> list[inspect.Parameter]:
        parameters = []
        for leaf in settings.leaves(self._model):
            flag = names[leaf.path][0]
            spelling = f"{flag}/--no-{flag[2:]}" if leaf.is_flag else flag
            default = "" if leaf.info.default in (None, [], {}) else f" [{leaf.info.default}]"
            option = typer.Option(
                None,
                spelling,
                help=f"{leaf.info.description}{default}",
                hidden=leaf.section not in shown,
                rich_help_panel=f"Settings: {leaf.section or 'cohort'}",
            )
            parameters.append(
                _parameter(
                    leaf.path.replace(".", "__"), bool | None if leaf.is_flag else str | None, option
                )
            )
        return parameters

    def _call(
        self,
        values: dict[str, Any],
        names: Mapping[str, Sequence[str]],
        in_project: bool | None,
        presets: dict[str, Any],
    ) -> Call[C]:
        """The settings: defaults, featstore.yaml, --config, --set, flags; the last word wins."""
        here = Path.cwd()
        layers = settings.Layers()
        project, file = _project(values, in_project, here)
        if file is not None:
            layers.add(self._model, read_file(file), str(file))
        if values["config_file"] is not None:
            layers.add(self._model, read_file(values["config_file"]), str(values["config_file"]))
        for text in values["assignments"] or ():
            layers.add(self._model, settings.parse_assignment(text, self._model), f"--set {text}")
        for leaf in settings.leaves(self._model):
            value, flag = values[leaf.path.replace(".", "__")], names[leaf.path][0]
            if isinstance(value, str):
                if project != here and value != "null":
                    named = here / value
                    if leaf.names(named):
                        value = str(named)
                layers.add(self._model, settings.nest(leaf, value, flag), flag)
            elif value is not None:
                layers.add(self._model, {leaf.section: {leaf.key: value}}, flag)
        layers.add(self._model, presets, "the command")
        return Call(layers.build(self._model), project, values["as_json"])


def _project(values: Mapping[str, Any], in_project: bool | None, here: Path) -> tuple[Path, Path | None]:
    """The project's folder, and its `featstore.yaml` if that is to be read.

    Raises:
        ConfigError: It must be there and is not, or nothing takes its place.
    """
    given = values["project"].absolute() if values["project"] else None
    project = given or (here if in_project is False else settings.find_project(here))
    if values["only_config"]:
        if values["config_file"] is None:
            raise ConfigError(
                "--only-config without --config",
                expected=f"the file that is read in place of {settings.PROJECT_FILE}",
                where="--only-config",
                fix=f"add --config FILE, or leave out --only-config to read {settings.PROJECT_FILE}",
            )
        return project or here, None
    if in_project is not False and project is not None and (project / settings.PROJECT_FILE).is_file():
        return project, project / settings.PROJECT_FILE
    if not in_project:
        return project or here, None
    raise ConfigError(
        f"no {settings.PROJECT_FILE} in {project or here}" + ("" if project else " or its parents"),
        expected="a project folder",
        fix="make one: featstore init PATCHES --labels labels.csv; or name one: --project DIR",
    )


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
            "only_config",
            bool,
            typer.Option(
                False,
                "--only-config",
                help="read --config in place of featstore.yaml",
                rich_help_panel=panel,
            ),
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
