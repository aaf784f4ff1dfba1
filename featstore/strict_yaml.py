"""YAML that means what it says: no code, no aliases, no key twice, ids that stay text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from featstore.errors import ConfigError

_MAX_BYTES = 1 << 20
# A point or an exponent makes a number a float; a leading zero makes it text (an id such as 038).
_FLOAT = (
    r"[-+]?((0|[1-9][0-9]*)?\.[0-9]+|(0|[1-9][0-9]*)\.?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)"
)


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of settings.

    Raises:
        ConfigError: The file is missing, unreadable, too large, no YAML, or no mapping.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(
                f"a file of more than {_MAX_BYTES:,} bytes is no config",
                where=str(path),
                fix="name another file, or make one with `featstore init`",
            )
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(
            f"the config cannot be read ({reason})",
            expected="a YAML file in UTF-8",
            where=str(path),
            fix="check the path; `featstore init` makes a featstore.yaml",
        ) from error
    data = parse(text, str(path))
    if data is None:
        return {}
    odd = [key for key in data if not isinstance(key, str)] if isinstance(data, dict) else [data]
    if odd:
        raise ConfigError(
            f"the config has no sections but {type(odd[0]).__name__} {str(odd[0])[:60]!r}",
            expected="sections with keys below them",
            where=str(path),
            fix="mend the file, or make one with `featstore init`",
        )
    sections: dict[str, Any] = data
    return sections


def parse(text: str, where: str) -> Any:
    """Read YAML: no tags, no aliases, no key twice; ``010`` is text, ``1e-4`` is a number.

    Raises:
        ConfigError: The text is no such YAML.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"this is not YAML that can be used here: {problem}",
            where=f"{where}{line}",
            fix="mend the line",
        ) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            f"this is not YAML that can be used here: {error}", where=where, fix="mend it"
        ) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader less what surprises: octal and sexagesimal numbers, yes/no, dates, aliases, tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        if getattr(event, "tag", None) is not None:
            problem = f"tags are not allowed (found {event.tag})"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        # Neither can stand in a path; the surrogates left out here are undecodable bytes of file names.
        if re.search(r"[\0\ud800-\udc7f\udd00-\udfff]", text):
            problem = "a NUL or half a character"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, list):
                problem = "a list or mapping as a key"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        _FLOAT,
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        list(_first.replace("\0", "")) + ([""] if "\0" in _first else []),
    )
