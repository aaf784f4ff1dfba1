"""Which settings somebody gave, and those of a trial laid over them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from featstore.settings import Layers, leaves
from heads.config import Config, resolved
from heads.project import MACHINE

# Settings that decide on what is trained, besides those of head, training and runs. Not those of the
# split: it is written down.
_DATA = (
    "store.path",
    "labels.file",
    "labels.case_column",
    "labels.class_column",
    "classes",
    "exclude",
    "groups",
    "stains",
    "patches.normalize_cases",
    "patches.normalize_slices",
)
_COURSE = ("head", "train")  # the sections of what is tuned
_PLACES = ("path", "suffix")  # settings of `runs` that say where a run is


def given_settings(config: Config) -> list[str]:
    """The settings that somebody gave, and by which a training is had again.

    Those of head, training and runs, and those that say what is trained on; not those of a machine or of a
    place of runs.
    """
    found = []
    for leaf in leaves(Config):
        holder = getattr(config, leaf.section) if leaf.section else config
        course = leaf.section in ("head", "train", "runs") and leaf.key not in (
            *MACHINE,
            *(_PLACES if leaf.section == "runs" else ()),
        )
        if leaf.key in holder.model_fields_set and (course or leaf.path in _DATA):
            found.append(leaf.path)
    return found


def value_of(config: Config, path: str) -> Any:
    """What a setting is.

    Args:
        config: The settings.
        path: ``section.key``, or ``key`` at the top level.
    """
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def with_given(config: Config, paths: Collection[str]) -> Config:
    """The same settings, of which those of head and training count as given that are named.

    Args:
        config: As read from a file that holds every setting.
        paths: Those that somebody gave.
    """
    own = {
        name: {path.partition(".")[2] for path in paths if path.startswith(f"{name}.")} for name in _COURSE
    }
    sections = {name: _remembered(getattr(config, name), keys) for name, keys in own.items()}
    return config.model_copy(update=sections)


def laid_over(config: Config, params: Mapping[str, Any]) -> Config:
    """The config with these settings, resolved; given are those that were given there, and these.

    Args:
        config: Resolved or not: what is ``auto`` stays with the head.
        params: Settings by their path.

    Raises:
        ConfigError: A setting does not take its value; the dimension is named.
    """
    layers = Layers()
    layers.add(Config, config.model_dump(), "featstore.yaml")
    given = {name: set(getattr(config, name).model_fields_set) for name in _COURSE}
    for path, value in params.items():
        section, _, key = path.partition(".")
        layers.add(Config, {section: {key: value}}, f"tune.space.{path}")
        given[section].add(key)
    built = layers.build(Config)  # for which every setting was given: some are judged by whether they were
    sections = {name: _remembered(getattr(built, name), keys) for name, keys in given.items()}
    return resolved(built.model_copy(update=sections))


def _remembered(section: BaseModel, keys: Collection[str]) -> BaseModel:
    """The same section, of which these settings count as given, and no others."""
    return section.model_construct(_fields_set=set(keys), **dict(section))
