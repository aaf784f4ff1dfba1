"""What is said of a part that is not what its record promises, whatever its file format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featstore.errors import StoreDamaged, StoreError


def damaged(path: Path, found: str, expected: str = "") -> StoreDamaged:
    """The error for a part that is not what its record says."""
    return StoreDamaged(
        found,
        expected=expected,
        where=str(path),
        fix="restore this file from a backup, or run featstore repair --apply "
        "and then featstore extract (or import)",
    )


@contextmanager
def opening(path: Path, size: int, kind: str) -> Iterator[None]:
    """Check a part's size, and tell by name whatever goes wrong while it is opened.

    Args:
        path: The part file.
        size: The number of bytes that the record promises.
        kind: Its file format, in words.

    Raises:
        StoreDamaged: The file is missing, has another size, or is not of its format.
        StoreError: The file may not be read.
    """
    try:
        found = path.stat().st_size
        if found != size:
            raise damaged(path, f"a part has {found} bytes", f"{size} bytes, as its record says")
        yield
    except FileNotFoundError as error:
        raise damaged(path, "a part that the newest record names is missing") from error
    except PermissionError as error:
        raise StoreError(
            "a part may not be read", where=str(path), fix="give yourself permission to read it"
        ) from error
    except (OSError, ValueError) as error:
        raise damaged(path, f"a part is no readable {kind} file ({error})") from error
