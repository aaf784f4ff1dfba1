"""Names: the grammar of patch files, ids that are safe to use, stain aliases, natural order.

The default grammar is `case_{case}_{slice}_{stain}_patch{n}.png`. The case id
ends at the first underscore after `case_`; the stain is the last token without
underscores before `_patch{n}`; what lies between is the slice id, which may
hold underscores. Case ids with underscores need `patches.pattern`. A name
that could be read in two ways is not read at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from featstore.errors import CohortError, ConfigError

STAIN_ALIASES: dict[str, list[str]] = {
    "h&e": ["h&e", "he"],
    "melan": ["melan", "melan-a", "mart1"],
    "sox10": ["sox10", "sox-10"],
}
MAX_ID_LENGTH = 200
MAX_PATCH = 2**63 - 1

NaturalKey = tuple[tuple[str | tuple[int, str], ...], str]

_DIGITS = re.compile(r"([0-9]+)")
_SLICE = re.compile(r"(match|unmatched)_?([0-9]+)")
_BURIED_SLICE = re.compile(r".+_(?:match|unmatched)_?[0-9]+")
_COPY = re.compile(r"[0-9]+(?: ?\([0-9]+\)| [0-9]+|(?: -)? [Cc]opy.*)")
_PATCH_INSIDE = re.compile(r"(?:^|_)patch[0-9]")
_INTEGRAL = re.compile(r"([+-]?[0-9]+)\.0+")


class Parts(NamedTuple):
    """Case, slice and canonical stain of a file, as written in its name."""

    case: str
    slice: str
    stain: str
    stain_found: str


def natural_key(text: str) -> NaturalKey:
    """Sort key under which `patch2` comes before `patch10`.

    Args:
        text: Any string.

    Returns:
        A tuple; the keys of any two strings compare, and are equal only for equal strings.
    """
    pieces = _DIGITS.split(text)
    # Numbers compare by length, then digits: int() refuses more than 4,300 digits.
    return tuple(_number(piece) if i % 2 else piece for i, piece in enumerate(pieces)), text


def _number(digits: str) -> tuple[int, str]:
    stripped = digits.lstrip("0")
    return len(stripped), stripped


def natural_sorted(texts: Iterable[str]) -> list[str]:
    """The distinct strings in natural order."""
    return sorted(set(texts), key=natural_key)


def id_problem(text: str) -> str | None:
    """Why a string cannot serve as an id (None if it can).

    Ids become folder names, keys in HDF5 files and cells of tables.
    """
    if not text:
        return "is empty"
    if len(text) > MAX_ID_LENGTH:
        return f"is longer than {MAX_ID_LENGTH} characters"
    if text != text.strip():
        return "starts or ends with a blank"
    if text == "." or ".." in text:
        return "contains '..' or is '.'"
    if "/" in text or "\\" in text:
        return "contains a slash or backslash"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" for c in text):
        return "contains a control character"
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        return "is not valid UTF-8"
    return None


def check_id(text: str, kind: str, where: str) -> None:
    """Raise if a string cannot serve as an id.

    Args:
        text: The id.
        kind: What it identifies: case, slice, stain, group, class.
        where: The file and line, or the config key, that it comes from.

    Raises:
        CohortError: The id is empty, too long, or has characters that are unsafe in paths.
    """
    problem = id_problem(text)
    if problem is not None:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise CohortError(
            f"{kind} id {shown!a} {problem}",
            expected=f"1 to {MAX_ID_LENGTH} printable characters without / \\ or '..'",
            where=where,
            fix="rename it there",
        )


def normalize_case(text: str) -> str:
    """A numeric case id without its leading zeros: `038` → `38`, `000` → `0`."""
    if text.isascii() and text.isdigit():
        return text.lstrip("0") or "0"
    return text


def normalize_slice(text: str) -> str:
    """`unmatched2`, `unmatched_02` → `unmatched_2`; other slice ids stay as they are."""
    match = _SLICE.fullmatch(text)
    return f"{match[1]}_{match[2].lstrip('0') or '0'}" if match else text


def integral(text: str) -> str:
    """`1.0` → `1`: a spreadsheet writes a column of integers with a gap as floats."""
    match = _INTEGRAL.fullmatch(text)
    return match[1] if match else text


def stain_lookup(stains: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Lower-case alias → stain name, for the built-in stains and the config's.

    Args:
        stains: The config's `stains`: name → aliases. A name is its own alias.

    Raises:
        ConfigError: One alias stands for two stains, or a name is not a valid id.
    """
    lookup = {alias: name for name, aliases in STAIN_ALIASES.items() for alias in aliases}
    for name, aliases in stains.items():
        for alias in [name, *aliases]:
            problem = id_problem(alias)
            if problem is not None:
                raise ConfigError(f"stain name {alias!a} {problem}", where="stains", fix="rename it")
            known = lookup.setdefault(alias.casefold(), name)
            if known != name:
                raise ConfigError(
                    f"the alias '{alias}' stands for two stains, '{known}' and '{name}'",
                    expected="each alias under one stain",
                    where=f"stains.{name}",
                    fix=f"remove it there, or give '{known}' its further aliases instead",
                )
    return lookup


def split_stem(stem: str, lookup: Mapping[str, str]) -> Parts | str:
    """Read the part of a file name before `_patch{n}.png` by the default grammar.

    Args:
        stem: For example `case_38_match_1_h&e`.
        lookup: From `stain_lookup`.

    Returns:
        The parts, or the reason why the name is not read.
    """
    if not stem.startswith("case_"):
        return "does not start with 'case_'"
    tokens = stem.split("_")
    stain_found = tokens[-1]
    stain = lookup.get(stain_found.casefold())
    if stain is None:
        return f"unknown stain '{stain_found}'"
    if len(tokens) < 4:
        return "no slice id between case and stain" if len(tokens) == 3 else "no case id"
    if "" in tokens[2:]:
        return "two underscores in a row"
    case, slice_id = tokens[1], "_".join(tokens[2:-1])
    if tokens[-2].casefold() in lookup:
        return "two stains in the name"
    if _PATCH_INSIDE.search(slice_id):
        return "two patch numbers in the name"
    if _BURIED_SLICE.fullmatch(slice_id):
        return "underscore in the case id (needs a pattern)"
    for kind, text in (("case", case), ("slice", slice_id)):
        problem = id_problem(text)
        if problem is not None:
            return f"{kind} id {problem}"
    return Parts(case, slice_id, stain, stain_found)


def patch_number(digits: str) -> int | str:
    """The number after `_patch` (without `.png`), or the reason why it is not read."""
    if digits.isascii() and digits.isdigit():
        # 4,300 digits is where int() itself refuses.
        value = int(digits) if len(digits) < 100 else MAX_PATCH + 1
        return value if value <= MAX_PATCH else "patch number beyond 64 bits"
    if not digits or not ("0" <= digits[0] <= "9"):
        return "no patch number"
    if _COPY.fullmatch(digits):
        return "copy mark after the patch number"
    return "further text after the patch number"
