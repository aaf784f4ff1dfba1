"""Settings as a YAML file that `--config` takes, and that reads back as the same settings."""

from __future__ import annotations

from pathlib import Path

import yaml

from featstore.errors import ConfigError
from featstore.files import replacing
from featstore.strict_yaml import parse
from heads.config import Config


def write_config(path: Path, config: Config) -> None:
    """Write all settings, those that nobody gave too, aside and move them into place."""
    with replacing(path) as aside:
        aside.write_bytes(config_text(config).encode())


def config_text(config: Config, only_given: bool = False) -> str:
    """Settings as YAML.

    Args:
        config: The settings.
        only_given: Leave out those that nobody gave.
    """
    content = config.model_dump(exclude_unset=only_given)
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our own reader would take for something else, such as ``1e3``."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        plain = parse(text, "") == text
    except ConfigError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
