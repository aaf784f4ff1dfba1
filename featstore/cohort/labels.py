"""Labels and groups: who belongs to which class, and which cases must never be parted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featstore.cohort.names import check_id, integral, natural_sorted, normalize_case
from featstore.cohort.tables import Table
from featstore.config import LabelsConfig
from featstore.errors import CohortError, ConfigError

_LINES_SHOWN = 10


@dataclass(frozen=True)
class Labels:
    """Each case's class.

    Attributes:
        class_names: In the config's order; without `classes`, the raw values in natural order.
        by_case: Case id → index into `class_names`.
        unmapped: Case id → raw value that no class stands for; these cases leave the cohort.
        normalized: Kind (`case`, `class`) → as found → as used.
        repeated: Cases with several rows that agree.
    """

    class_names: list[str]
    by_case: dict[str, int]
    unmapped: dict[str, str] = field(default_factory=dict)
    normalized: dict[str, dict[str, str]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    @property
    def known(self) -> set[str]:
        """All cases in the table, those of unmapped classes too."""
        return {*self.by_case, *self.unmapped}


def read_labels(
    labels: LabelsConfig, classes: Mapping[str, Sequence[str]], base: Path, normalize_cases: bool
) -> Labels:
    """Read the table of labels.

    Args:
        labels: File (relative to `base`) and column names.
        classes: Class name → raw codes; empty: every raw value is a class of its own.
        base: The project folder.
        normalize_cases: Whether `038` is `38` (and a spreadsheet's `38.0` too).

    Returns:
        The classes by case.

    Raises:
        CohortError: The file cannot be read, or a case has no class or two.
        ConfigError: No file is named, or a raw code belongs to two classes.
    """
    if labels.file is None:
        raise ConfigError(
            "no table of labels is named",
            expected="a CSV with a column of case ids and one of classes",
            where="labels.file",
            fix="--labels FILE, or labels: {file: FILE} in featstore.yaml",
        )
    codes = _class_codes(classes)
    table = Table(base / labels.file, "labels.file")
    raw, lines, normalized, repeated = _read_cases(table, labels, normalize_cases)
    if not raw:
        raise CohortError(
            f"{table.path} has a header but no rows",
            expected="one row a case",
            where="labels.file",
            fix="add a row for each case, or name another table: --labels FILE",
        )
    if codes:
        names = list(classes)
        index = {code: names.index(name) for code, name in codes.items()}
    else:
        names = natural_sorted(raw.values())
        index = {name: i for i, name in enumerate(names)}
        for case, value in raw.items():
            check_id(value, "class", f"{table.path}, line {lines[case]}")
    return Labels(
        class_names=names,
        by_case={case: index[value] for case, value in raw.items() if value in index},
        unmapped={case: value for case, value in raw.items() if value not in index},
        normalized=normalized,
        repeated=repeated,
    )


def read_domains(labels: LabelsConfig, base: Path, normalize_cases: bool) -> dict[str, str]:
    """Read where each case was made (a scanner, a hospital): the column `domain` of the table of labels.

    Args:
        labels: File (relative to `base`) and column names.
        base: The project folder.
        normalize_cases: Whether `038` is `38`.

    Returns:
        Case id → domain, of the cases that have one; empty without such a column.

    Raises:
        CohortError: The file cannot be read, a domain is not usable, or a case has two.
    """
    if labels.file is None:
        return {}
    table = Table(base / labels.file, "labels.file")
    if "domain" not in {column.casefold() for column in table.columns}:
        return {}
    case_at = table.column(labels.case_column, fix="name the column of case ids with --case-column NAME")
    domain_at = table.column("domain", fix="rename one", ignore_case=True)
    domains: dict[str, str] = {}
    for line, cells in table.rows():
        found, domain = cells[case_at], cells[domain_at]
        if not found or not domain:
            continue
        where = f"{table.path}, line {line}"
        check_id(domain, "domain", where)
        case = _case_id(found, where, normalize_cases)
        if domains.setdefault(case, domain) != domain:
            raise CohortError(
                f"{table.path} gives case {case} two domains, '{domains[case]}' and '{domain}'",
                expected="one domain a case; patches' own stand in a column domain of patches.geometry",
                where=f"labels.file, line {line}",
                fix="remove the wrong row",
            )
    return domains


def _class_codes(classes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Raw code → class name."""
    codes: dict[str, str] = {}
    for name, raw_codes in classes.items():
        check_id(name, "class", "classes")
        if not raw_codes:
            raise ConfigError(
                f"class '{name}' has no raw codes", where=f"classes.{name}", fix=f"classes: {{{name}: [1]}}"
            )
        for raw in raw_codes:
            code = integral(raw.strip())
            other = codes.setdefault(code, name)
            if other != name:
                raise ConfigError(
                    f"the raw code '{code}' is mapped to two classes, '{other}' and '{name}'",
                    expected="each raw code under one class",
                    where=f"classes.{name}",
                    fix=f"remove it from '{other}' or from '{name}'",
                )
    return codes


def _read_cases(
    table: Table, labels: LabelsConfig, normalize_cases: bool
) -> tuple[dict[str, str], dict[str, int], dict[str, dict[str, str]], list[str]]:
    """Raw class and line of each case, what was normalised, and who was repeated."""
    case_at = table.column(labels.case_column, fix="name the column of case ids with --case-column NAME")
    class_at = table.column(labels.class_column, fix="name the column of classes with --class-column NAME")
    raw: dict[str, str] = {}
    lines: dict[str, int] = {}
    repeated: list[str] = []
    normalized: dict[str, dict[str, str]] = {"case": {}, "class": {}}
    blank: list[int] = []
    conflicts: list[str] = []
    for line, cells in table.rows():
        found, value = cells[case_at], integral(cells[class_at])
        if not found or not value:
            blank.append(line)
            continue
        case = _case_id(found, f"{table.path}, line {line}", normalize_cases)
        if case != found:
            normalized["case"][found] = case
        if value != cells[class_at]:
            normalized["class"][cells[class_at]] = value
        if case not in raw:
            raw[case], lines[case] = value, line
        elif raw[case] == value:
            repeated.append(case)
        else:
            conflicts.append(f"case {case}: '{raw[case]}' in line {lines[case]}, '{value}' in line {line}")
    if blank:
        raise CohortError(
            f"{table.path} has rows without case id or class, in {_lines(blank)}",
            expected=f"'{labels.case_column}' and '{labels.class_column}' filled in every row",
            where="labels.file",
            fix="fill them, or remove those lines (cases without a label are reported, not an error)",
        )
    if conflicts:
        raise CohortError(
            f"{table.path} gives cases two different classes:\n    "
            + "\n    ".join(conflicts[:_LINES_SHOWN]),
            expected="one class a case" + (" (038 and 38 are one case)" if normalize_cases else ""),
            where="labels.file",
            fix="remove the wrong row"
            + ("; if 038 and 38 are two cases, --no-normalize-cases" if normalize_cases else ""),
        )
    return raw, lines, normalized, natural_sorted(repeated)


def _case_id(found: str, where: str, normalize_cases: bool) -> str:
    check_id(found, "case", where)
    return normalize_case(integral(found)) if normalize_cases else found


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:_LINES_SHOWN])
    more = f" and {len(numbers) - _LINES_SHOWN} more" if len(numbers) > _LINES_SHOWN else ""
    return f"line{'s' if len(numbers) > 1 else ''} {shown}{more}"


def read_groups(
    groups: str | Mapping[str, Sequence[str]] | None, base: Path, normalize_cases: bool
) -> dict[str, str]:
    """Read which cases belong together.

    Args:
        groups: A CSV (relative to `base`) with columns `case,group`, or group → cases, or None.
        base: The project folder.
        normalize_cases: Whether `038` is `38`.

    Returns:
        Case id → group name. A case not named is a group of its own.

    Raises:
        CohortError: A case is in two groups, or an id is not usable.
    """
    pairs: list[tuple[str, str, str]] = []
    if isinstance(groups, str):
        table = Table(base / groups, "groups")
        fix = "name its columns case,group"
        case_at = table.column("case", fix=fix, ignore_case=True)
        group_at = table.column("group", fix=fix, ignore_case=True)
        pairs = [
            (cells[case_at], cells[group_at], f"{table.path}, line {line}") for line, cells in table.rows()
        ]
    elif groups is not None:
        pairs = [(case, name, f"groups.{name}") for name, cases in groups.items() for case in cases]
    result: dict[str, str] = {}
    places: dict[str, str] = {}
    for found, name, where in pairs:
        check_id(name, "group", where)
        case = _case_id(found, where, normalize_cases)
        if result.setdefault(case, name) != name:
            raise CohortError(
                f"case {case} is in two groups, '{result[case]}' ({places[case]}) and '{name}' ({where})",
                expected="each case in one group",
                where="groups",
                fix="merge the two groups, or remove the case from one",
            )
        places.setdefault(case, where)
    return result
