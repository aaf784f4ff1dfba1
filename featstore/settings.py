"""Laying settings together: `featstore.yaml`, files over it, `--set` and flags, in this order."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from featstore.errors import ConfigError
from featstore.strict_yaml import parse

PROJECT_FILE = "featstore.yaml"
# A section has at most one of these, and the section's name alone stands for it.
_PRINCIPAL = ("name", "path", "file", "folder")
C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True)
class Leaf:
    """One setting: ``section.key``, or just ``key`` at the top level."""

    section: str
    key: str
    info: FieldInfo

    @property
    def path(self) -> str:
        """``section.key``."""
        return f"{self.section}.{self.key}" if self.section else self.key

    @property
    def is_flag(self) -> bool:
        """Whether it is on or off."""
        return self.info.annotation is bool

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, which must not be read as YAML."""
        return self.info.annotation in (str, str | None)

    @property
    def is_path(self) -> bool:
        """Whether it names a file or folder."""
        return self._path_kind is True

    def names(self, path: Path) -> bool:
        """Whether it means this path; some name a file, or something else altogether (`imagenet`)."""
        if self._path_kind != "perhaps":
            return self.is_path
        extra = self.info.json_schema_extra
        holds = extra.get("holds") if isinstance(extra, dict) else None
        return path.is_file() or (isinstance(holds, str) and (path / holds).is_file())

    @property
    def alias(self) -> str | None:
        """A second name of its flag, as `model` of ``head.name``."""
        extra = self.info.json_schema_extra
        alias = extra.get("alias") if isinstance(extra, dict) else None
        return alias if isinstance(alias, str) else None

    @property
    def _path_kind(self) -> object:
        extra = self.info.json_schema_extra
        return extra.get("path") if isinstance(extra, dict) else None


def leaves(model: type[BaseModel]) -> Iterator[Leaf]:
    """Every setting of a config, in the order of its definition."""
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for key, inner in section.model_fields.items():
                yield Leaf(name, key, inner)
        else:
            yield Leaf("", name, info)


def flag_names(model: type[BaseModel], own: Sequence[str] = ()) -> dict[str, list[str]]:
    """The flags of every setting, by its path; the first one is the name that `--help` shows.

    ``--section-key`` always works; ``--key`` where no other section has this key; ``--section``
    for the setting that says what or where a section is about (``--backbone``, ``--labels``,
    ``--store``, ``--patches``).

    Args:
        model: The config.
        own: The sections that a command is about: if just one of them has a key, ``--key`` means
            this one (``train-head --seed``), whatever other sections have.
    """
    found = list(leaves(model))
    count = Counter(leaf.key for leaf in found)
    here = Counter(leaf.key for leaf in found if leaf.section in own)
    names = {}
    for leaf in found:
        mine = here[leaf.key] == 1 and leaf.section in own
        flags = [leaf.key] if mine or count[leaf.key] == 1 else []
        if leaf.section:
            flags.append(f"{leaf.section}-{leaf.key}")
            if leaf.key in _PRINCIPAL:
                flags.insert(0, leaf.section)
        if leaf.alias:
            flags.insert(0, leaf.alias)
        names[leaf.path] = ["--" + flag.replace("_", "-") for flag in flags]
    return names


@dataclass
class Layers:
    """Settings laid over one another; the last word wins, and every word knows where it was said."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def add(self, model: type[BaseModel], data: Mapping[str, Any], origin: str) -> None:
        """Lay ``data`` (as read from YAML) over what is there: section by section, key by key."""
        sections = {leaf.section for leaf in leaves(model)} - {""}
        for name, value in data.items():
            if name in sections and value is None:  # `train:` with nothing below it
                continue
            if name in sections and isinstance(value, Mapping):
                held = self.values.setdefault(name, {})
                if not isinstance(held, dict):  # no section, as `build` is going to tell
                    continue
                held.update(value)
                self.origins.update({f"{name}.{key}": origin for key in value})
            else:
                self.values[name] = value
                self.origins[name] = origin

    def build(self, model: type[C]) -> C:
        """Check everything and make the config.

        Raises:
            ConfigError: An unknown key, a wrong type or a value out of range.
        """
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            raise self._explain(model, error.errors()) from error

    def _explain(self, model: type[BaseModel], problems: Sequence[Any]) -> ConfigError:
        problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
        known = {leaf.path: leaf for leaf in leaves(model)}
        location = [str(part) for part in problem["loc"]]
        path = next((p for p in (".".join(location[:2]), location[0]) if p in known), ".".join(location))
        origin = self.origins.get(path, self.origins.get(location[0], "the defaults"))
        if problem["type"] == "extra_forbidden" and (
            path not in known or len(location) <= path.count(".") + 1
        ):
            return unknown_key(model, path, origin)
        if problem["type"] == "extra_forbidden":
            return _unknown_within(known[path], problems, origin)
        value: Any = self.values
        depth = path.count(".") + 1
        for name in location[:depth]:
            value = value.get(name)
        # A setting of several types fails once for each of them.
        reasons = [
            p["msg"] for p in problems if [str(part) for part in p["loc"]][:depth] == location[:depth]
        ]
        expected = "; or ".join(dict.fromkeys(_plain(reason) for reason in reasons))
        if path in known and known[path].info.description:
            expected += f" ({known[path].info.description})"
        return ConfigError(
            f"{path} is {value!r}", expected=expected, where=origin, fix=f"give {path} another value"
        )


def _unknown_within(leaf: Leaf, problems: Sequence[Any], origin: str) -> ConfigError:
    """The error for a key that does not exist within a setting's value.

    A value of several forms fails once for each of them: the form with the fewest problems is meant.
    """
    depth = leaf.path.count(".") + 1
    forms: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems:
        place = tuple(str(part) for part in problem["loc"])
        if ".".join(place[:depth]) == leaf.path and len(place) > depth:
            forms.setdefault(place[:-1], []).append(problem)
    place, meant = min(forms.items(), key=lambda form: len(form[1]))
    within = ".".join(part for part in place if not part[:1].isupper())
    words = {"extra_forbidden": "no such key", "missing": "is missing"}
    said = [f"{p['loc'][-1]}: {words.get(p['type'], _plain(p['msg']))}" for p in meant]
    return ConfigError(
        f"{within} cannot be read: {'; '.join(said)}",
        expected=leaf.info.description or "other keys",
        where=origin,
        fix=f"mend what stands below {within}",
    )


def unknown_key(model: type[BaseModel], path: str, origin: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    known = [leaf.path for leaf in leaves(model)]
    if path in {leaf.section for leaf in leaves(model)}:
        keys = [leaf.path for leaf in leaves(model) if leaf.section == path]
        return ConfigError(
            f"{path!r} is a section, not a setting",
            expected=f"one of {', '.join(keys)}",
            where=origin,
            fix=f"write {keys[0]}",
        )
    if path in known:  # written as one key, `patches.folder: x`
        section, _, key = path.partition(".")
        return ConfigError(
            f"there is no setting {path!r} at the top level",
            expected=f"{key} below the section {section}",
            where=origin,
            fix=f"write `{section}:` and, indented on the next line, `{key}: …`",
        )
    if "." not in path:
        known += sorted({leaf.section for leaf in leaves(model)} - {""})
    nearest = nearest_name(path, known)
    if nearest and "." not in path:  # without a section any section's key may be meant
        key = nearest.rpartition(".")[2]
        nearest = " or ".join(name for name in known if name.rpartition(".")[2] == key)
    return ConfigError(
        f"there is no setting {path!r}",
        expected=f"perhaps {nearest}" if nearest else "one of the settings of `featstore extract --help`",
        where=origin,
        fix=f"write {nearest}" if nearest else "remove it",
    )


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name most like this one, by the whole path or by its last part."""
    wanted = name.replace("-", "_").lower()
    whole = difflib.get_close_matches(wanted, known, 1, 0.6)
    tails = {path.rpartition(".")[2]: path for path in known}
    tail = difflib.get_close_matches(wanted.rpartition(".")[2], list(tails), 1, 0.6)
    if whole and tail:
        rank = difflib.SequenceMatcher
        best_tail = tails[tail[0]]
        by_tail = rank(None, wanted.rpartition(".")[2], tail[0]).ratio()
        return best_tail if by_tail >= rank(None, wanted, whole[0]).ratio() else whole[0]
    return whole[0] if whole else tails[tail[0]] if tail else None


def parse_assignment(text: str, model: type[BaseModel]) -> dict[str, Any]:
    """``section.key=value`` of ``--set`` as a nested mapping.

    Raises:
        ConfigError: There is no ``=``, or no such setting.
    """
    path, equals, value = text.partition("=")
    path = path.strip().replace("-", "_")
    if not equals:
        raise ConfigError(
            f"--set {text!r}", expected="--set section.key=value", where="--set", fix="give it a value"
        )
    known = {leaf.path: leaf for leaf in leaves(model)}
    if path not in known:
        raise unknown_key(model, path, f"--set {text}")
    return nest(known[path], value, f"--set {text}")


def nest(leaf: Leaf, value: str, origin: str) -> dict[str, Any]:
    """A setting given as text, as it would stand in a file."""
    parsed = value if leaf.is_text and value != "null" else parse(value, origin)
    return {leaf.section: {leaf.key: parsed}} if leaf.section else {leaf.key: parsed}


def find_project(start: Path) -> Path | None:
    """The nearest folder, from ``start`` upwards, that has a `featstore.yaml`."""
    start = start.absolute()
    return next((folder for folder in (start, *start.parents) if (folder / PROJECT_FILE).is_file()), None)


def _plain(message: str) -> str:
    message = re.sub(r"a valid dictionary or instance of \w+", "a section with keys below it", message)
    return re.sub(r"^Input should be ", "", message).replace("valid dictionary", "mapping of names")
