"""CSV files that people keep in spreadsheets: reading them strictly, writing them safely."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from featstore.errors import CohortError, escape_controls
from featstore.files import replacing

_SEPARATORS = ",;\t"
_FORMULA_STARTS = ("=", "+", "-", "@")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


class Table:
    """A CSV's header and, streamed, its rows.

    Args:
        path: The file; UTF-8 (with or without BOM); comma, semicolon or tab.
        key: The config key or option that named it, for messages.

    Attributes:
        columns: The header's names, without surrounding blanks.

    Raises:
        CohortError: The file is missing, empty, binary, or not UTF-8.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        text = _read_text(path, key)
        header = text[:100_000].strip().partition("\n")[0]
        separator = max(_SEPARATORS, key=header.count)
        self._reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        first = next(self._lines(), None)
        if first is None:
            raise CohortError(
                f"{path} is empty",
                expected="a header line and rows",
                where=key,
                fix=f"save the table again as CSV (UTF-8), or name another as {key}",
            )
        self.columns = [name.strip() for name in first[1]]

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        try:
            for row in self._reader:
                if any(cell.strip() for cell in row):
                    yield self._reader.line_num, row
        except csv.Error as error:
            raise CohortError(
                f"{self.path} is not a readable CSV: {error}",
                where=f"{self.key}, line {self._reader.line_num}",
                fix="save the table again as CSV (UTF-8)",
            ) from error

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells (blanks stripped) of each row, once.

        Raises:
            CohortError: A row has more or fewer cells than the header.
        """
        width = len(self.columns)
        for line, row in self._lines():
            if len(row) != width:
                raise CohortError(
                    f"{self.path} has {len(row)} cells in line {line}",
                    expected=f"{width} cells, as in its header ({', '.join(self.columns)})",
                    where=self.key,
                    fix="mend that line (quote cells that hold the separator)",
                )
            yield line, [cell.strip() for cell in row]

    def column(self, name: str, *, fix: str, ignore_case: bool = False) -> int:
        """Index of a column.

        Args:
            name: The name wanted.
            fix: What the user can do where it is missing.
            ignore_case: Whether `Case` serves for `case`.

        Raises:
            CohortError: No column, or more than one, has this name.
        """
        names = [c.casefold() for c in self.columns] if ignore_case else self.columns
        wanted = name.casefold() if ignore_case else name
        if names.count(wanted) == 1:
            return names.index(wanted)
        if wanted in names:
            raise CohortError(
                f"{self.path} has two columns named '{name}'", where=self.key, fix="rename one"
            )
        folded = {c.casefold(): c for c in self.columns}
        near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.4)
        hint = f" (nearest: '{folded[near[0]]}')" if near else ""
        raise CohortError(
            f"{self.path} has no column '{name}'{hint}",
            expected=f"'{name}' among its columns: {', '.join(self.columns)}",
            where=self.key,
            fix=fix,
        )


def _read_text(path: Path, key: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CohortError(
            f"{path} cannot be read: {error.strerror or error}",
            expected="a CSV file",
            where=key,
            fix=f"check the path given as {key}",
        ) from error
    fix = "save it as CSV (UTF-8), in Excel 'CSV UTF-8 (comma delimited)'"
    if b"\0" in data:
        raise CohortError(f"{path} is binary, not a CSV", expected="text in UTF-8", where=key, fix=fix)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CohortError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}",
            expected="text in UTF-8",
            where=key,
            fix=fix,
        ) from error


def printable(text: str) -> str:
    """The text with control characters and the undecodable bytes of a file name spelt out.

    So it can be written as UTF-8, and shown on a terminal.
    """
    return escape_controls(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def safe_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: text starting with = + - @ gets a quote.

    Plain numbers, such as a class -1, stay as they are.
    """
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return "'" + value if value.lstrip("\t\r\n ").startswith(_FORMULA_STARTS) else value


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows that people will open in a spreadsheet.

    Args:
        path: The file, replaced as a whole if it exists.
        columns: The header.
        rows: Cells, in the header's order.
    """
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([safe_cell(cell) for cell in row] for row in rows)
