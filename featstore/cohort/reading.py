"""Paths → codes: reads names one by one and keeps a few bytes for each."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import (
    Parts,
    id_problem,
    natural_key,
    normalize_case,
    normalize_slice,
    patch_number,
    split_stem,
    stain_lookup,
)
from featstore.cohort.tables import printable
from featstore.config import PatchesConfig
from featstore.errors import CohortError, ConfigError

REQUIRED_GROUPS = {"case", "slice", "stain", "patch"}
POSITION_GROUPS = {"x", "y"}
_REASONS_SHOWN = 10


@dataclass(frozen=True)
class Unparsed:
    """A file whose name could not be read, and why."""

    path: str
    reason: str


@dataclass
class Ids:
    """The ids of one kind: each distinct one once, and a 4-byte code a patch."""

    names: list[str] = field(default_factory=list)
    codes: array[int] = field(default_factory=lambda: array("i"))
    codes_used: dict[str, int] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)

    def code(self, found: str, used: str) -> int:
        """The code of an id, new if it has not been seen; notes how it was spelt."""
        self.found[found] = used
        code = self.codes_used.setdefault(used, len(self.names))
        if code == len(self.names):
            self.names.append(used)
        return code

    def ranks(self, present: NDArray[np.int32]) -> tuple[list[str], NDArray[np.int32]]:
        """The present ids in natural order, and the map from code to place in that order."""
        ordered = sorted((int(code) for code in present), key=lambda code: natural_key(self.names[code]))
        rank = np.zeros(len(self.names), dtype=np.int32)
        rank[ordered] = np.arange(len(ordered), dtype=np.int32)
        return [self.names[code] for code in ordered], rank


class Reader:
    """Collects names; `cases, stains, slices, patch, paths` have one entry a readable name.

    Args:
        patches: Grammar and normalisation.
        stains: Further stains: name → aliases.
        suffix: Of all names.
    """

    def __init__(
        self, patches: PatchesConfig, stains: Mapping[str, Iterable[str]], suffix: str = ".png"
    ) -> None:
        self.suffix = suffix
        self.cases, self.stains, self.slices = Ids(), Ids(), Ids()
        self.patch: array[int] = array("q")
        self.x: array[float] = array("d")
        self.y: array[float] = array("d")
        self.paths: list[str] = []
        self.unparsed: list[Unparsed] = []
        self._config = patches
        self._lookup = stain_lookup(stains)
        self._pattern = compile_pattern(patches.pattern) if patches.pattern is not None else None
        self._whole_path = "/" in (patches.pattern or "")
        self.has_positions = self._pattern is not None and "x" in self._pattern.groupindex
        # Thousands of patches share what stands before their number: it is read once.
        self._seen: dict[object, tuple[int, int, int] | str] = {}

    def add(self, path: str) -> None:
        """Read one path: either a row is added or `unparsed` grows."""
        if not path.isascii() and path.encode("utf-8", "replace").decode("utf-8") != path:
            reason: str | None = "path is not valid UTF-8"
        else:
            reason = self._by_pattern(path) if self._pattern else self._by_grammar(path)
        if reason is None:
            self.paths.append(path)
        else:
            self.unparsed.append(Unparsed(printable(path), reason))

    def refuse(self, paths: Iterable[str], reason: str) -> None:
        """Let `unparsed` grow by paths that are out whatever their names."""
        self.unparsed.extend(Unparsed(printable(path), reason) for path in paths)

    def _by_grammar(self, path: str) -> str | None:
        stem, mark, digits = path[path.rfind("/") + 1 : -len(self.suffix)].rpartition("_patch")
        if not mark:
            return "no patch number" if digits.startswith("case_") else "does not start with 'case_'"
        # The number first: an id is noted only if a patch bears it.
        number = patch_number(digits)
        if isinstance(number, str):
            return number
        codes = self._seen.get(stem)
        if codes is None:
            codes = self._seen[stem] = self._codes(split_stem(stem, self._lookup))
        return self._append(codes, number)

    def _by_pattern(self, path: str) -> str | None:
        assert self._pattern is not None
        match = self._pattern.fullmatch(path if self._whole_path else path[path.rfind("/") + 1 :])
        if match is None:
            return "does not match patches.pattern"
        number = patch_number(match["patch"] or "")
        if isinstance(number, str):
            return number
        x, y = (_finite(match["x"]), _finite(match["y"])) if self.has_positions else (0.0, 0.0)
        if x is None or y is None:
            return "x or y is not a number"
        key = match.group("case", "slice", "stain")
        codes = self._seen.get(key)
        if codes is None:
            codes = self._seen[key] = self._codes(self._groups(*key))
        reason = self._append(codes, number)
        if reason is None and self.has_positions:
            self.x.append(x)
            self.y.append(y)
        return reason

    def _groups(self, case: str | None, slice_id: str | None, stain: str | None) -> Parts | str:
        for kind, text in (("case", case), ("slice", slice_id)):
            problem = id_problem(text or "")
            if problem is not None:
                return f"{kind} id {problem}"
        name = self._lookup.get((stain or "").casefold())
        if name is None:
            return f"unknown stain '{printable(stain or '')}'"
        return Parts(case or "", slice_id or "", name, stain or "")

    def _codes(self, parts: Parts | str) -> tuple[int, int, int] | str:
        if isinstance(parts, str):
            return printable(parts)
        case = normalize_case(parts.case) if self._config.normalize_cases else parts.case
        slice_id = normalize_slice(parts.slice) if self._config.normalize_slices else parts.slice
        return (
            self.cases.code(parts.case, case),
            self.stains.code(parts.stain_found, parts.stain),
            self.slices.code(parts.slice, slice_id),
        )

    def _append(self, codes: tuple[int, int, int] | str, number: int) -> str | None:
        if isinstance(codes, str):
            return codes
        self.cases.codes.append(codes[0])
        self.stains.codes.append(codes[1])
        self.slices.codes.append(codes[2])
        self.patch.append(number)
        return None

    def without_cases(self, cases: Iterable[str]) -> NDArray[np.intp]:
        """Indices of the rows that belong to none of these cases."""
        codes = np.frombuffer(self.cases.codes, dtype=np.int32)
        out = [self.cases.codes_used[case] for case in cases]
        return np.flatnonzero(~np.isin(codes, out))

    def normalized(self) -> dict[str, dict[str, str]]:
        """Kind of id → as found → as used, where they differ."""
        return {
            kind: {found: used for found, used in sorted(ids.found.items()) if found != used}
            for kind, ids in self._kinds().items()
        }

    def merged(self) -> dict[str, dict[str, list[str]]]:
        """Kind of id → as used → its spellings, where one of several had to be changed."""
        result: dict[str, dict[str, list[str]]] = {}
        for kind, ids in self._kinds().items():
            spellings: dict[str, list[str]] = {}
            for found, used in sorted(ids.found.items()):
                spellings.setdefault(used, []).append(found)
            result[kind] = {used: found for used, found in spellings.items() if len(found) > 1}
        return result

    def expectation(self) -> str:
        """What names should look like."""
        known = ", ".join(sorted(set(self._lookup.values()), key=natural_key))
        if self._pattern is not None:
            return f"names that match {self._pattern.pattern} (stains: {known})"
        return f"case_ID_SLICE_STAIN_patchN{self.suffix}, STAIN one of {known}"

    def _kinds(self) -> dict[str, Ids]:
        return {"case": self.cases, "slice": self.slices, "stain": self.stains}


def _finite(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile `patches.pattern` and check its groups.

    Raises:
        ConfigError: It is no regular expression, or its named groups are not
            case, slice, stain, patch and, both or neither, x and y.
    """
    expected = "(?P<case>…), (?P<slice>…), (?P<stain>…), (?P<patch>…), optionally (?P<x>…) and (?P<y>…)"
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"not a regular expression: {error}", expected=expected, where="patches.pattern", fix="mend it"
        ) from error
    groups = set(compiled.groupindex)
    missing, unknown = REQUIRED_GROUPS - groups, groups - REQUIRED_GROUPS - POSITION_GROUPS
    if len(groups & POSITION_GROUPS) == 1:
        missing |= POSITION_GROUPS - groups
    if missing or unknown:
        parts = [
            f"{text} {', '.join(sorted(names))}"
            for text, names in (("lacks the groups", missing), ("has unknown groups", unknown))
            if names
        ]
        raise ConfigError(
            f"the pattern {' and '.join(parts)}", expected=expected, where="patches.pattern", fix="mend it"
        )
    return compiled


def unparsed_error(reader: Reader, examples: int) -> CohortError:
    """The error for names that cannot be read: counts by reason, examples, the choices."""
    bad = reader.unparsed
    counts = Counter(item.reason for item in bad).most_common()
    lines = [f"    {n:>7,}  {reason}" for reason, n in counts[:_REASONS_SHOWN]]
    if len(counts) > _REASONS_SHOWN:
        lines.append(f"    {sum(n for _, n in counts[_REASONS_SHOWN:]):>7,}  for other reasons")
    # One example of each reason says more than five of the commonest.
    ordered = sorted(bad, key=lambda item: natural_key(item.path))
    firsts = {item.reason: item.path for item in reversed(ordered)}
    shown = [firsts[reason] for reason, _ in counts[:examples]]
    shown += [item.path for item in ordered if item.path not in shown][: examples - len(shown)]
    lines += [f"    e.g. {path}" for path in shown]
    total = len(bad) + len(reader.paths)
    choices = ["rename the files", "describe other names with --pattern REGEX"]
    if any(reason.startswith("unknown stain") for reason, _ in counts):
        choices.append("name further stains under `stains:` in featstore.yaml")
    if reader.paths:
        choices.append("go on without them with --on-unparsed skip (they are listed in unparsed.csv)")
    return CohortError(
        f"{len(bad):,} of {total:,} file names cannot be read:\n" + "\n".join(lines),
        expected=reader.expectation(),
        where="patches.folder",
        fix="; or ".join(choices),
    )
