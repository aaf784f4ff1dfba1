"""Writing `featstore.yaml`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from featstore.config import FeatstoreConfig
from featstore.settings import Leaf, leaves

_HEADER = """\
# A featstore project. In this folder every command works as typed:
#   featstore check      what is in the cohort, what is left out and why
#   featstore extract    every patch through the backbone, once
#   featstore info       what the store holds
# Lines that start with '#' show the defaults. Every setting is also a flag
# (--batch-size 32) and can be set with --set section.key=value.
"""


def document(config: FeatstoreConfig, classes: Mapping[str, Sequence[str]] | None = None) -> str:
    """`featstore.yaml`: every setting with its meaning; those that have their default are commented out.

    Args:
        config: The settings.
        classes: In place of the config's, if there are any.
    """
    lines = [_HEADER]
    section = ""
    for leaf in leaves(type(config)):
        if leaf.section != section:
            section = leaf.section
            lines.append(f"\n{section}:" if section else "")
        holder: Any = getattr(config, leaf.section) if leaf.section else config
        value = getattr(holder, leaf.key)
        if leaf.path == "classes" and classes:
            value = classes
        lines.append(_line(leaf, value))
    return "\n".join(lines) + "\n"


def _line(leaf: Leaf, value: Any) -> str:
    indent = "  " if leaf.section else ""
    off = "# " if value == leaf.info.get_default() and leaf.path != "patches.folder" else ""
    # YAML takes what does not print only as an escape.
    text = json.dumps(value, ensure_ascii=False)
    shown = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    return f"{indent}# {leaf.info.description}\n{indent}{off}{leaf.key}: {shown}"
