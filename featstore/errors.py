"""Errors that a user can act on: what was found, what was expected, where, and what to do."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # C0 but for the newline, DEL, and C1


def escape_controls(text: str) -> str:
    """The text with control characters spelt out (`\\x1b`), newlines excepted.

    Names of files and cells of tables come from others: printed raw, an escape sequence in
    them could recolour, overwrite or retitle the reader's terminal.
    """
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class FeatstoreError(Exception):
    """A problem that the user can mend; shown as a message, never as a traceback.

    Args:
        found: What is wrong, in a sentence.
        expected: What would have been right.
        where: The file, key, record or option concerned.
        fix: The command or the change that mends it.

    Attributes:
        exit_code: What the command line returns: 2 for wrong usage or input,
            1 where the answer is bad (damage found, a training that failed).
    """

    exit_code = 2

    def __init__(self, found: str, *, expected: str = "", where: str = "", fix: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        parts = [self.found]
        for label, text in (("expected", self.expected), ("where", self.where), ("to do", self.fix)):
            if text:
                parts.append(f"  {label}: {text}")
        return escape_controls("\n".join(parts))


class ConfigError(FeatstoreError):
    """An unknown key, a wrong type or a value out of range in the configuration."""


class CohortError(FeatstoreError):
    """Patches, labels or groups that cannot be read unambiguously."""


class ImageError(FeatstoreError):
    """A patch whose pixels cannot be had, or not without guessing."""

    def reason(self, path: str) -> str:
        """What is wrong, for a list in which the file's path stands beside it."""
        return self.found.removeprefix(path).lstrip(": ")


class BackboneError(FeatstoreError):
    """A backbone or its weights cannot be built as asked."""


class StoreError(FeatstoreError):
    """The embedding store cannot be used as asked."""


class FingerprintMismatch(StoreError):
    """Embeddings of two different makes were about to meet in one store."""


class StoreDamaged(StoreError):
    """A file that the store's newest records name is missing or is not what was written."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
