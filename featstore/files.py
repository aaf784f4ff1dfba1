"""Writing files so that readers find the old one or the new one whole, whenever the writer is killed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file, which is moved into place when the block ends without an error.

    Args:
        path: The file; an existing one stays as it is until then. What is no file, such as
            ``/dev/stdout``, is written to directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()  # a link stays one
    # A name of the process' own: two that write one file at a time must not write into each other's. On
    # machines that share a folder, two may have the same number.
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield aside
        os.replace(aside, target)
    except OSError as error:
        if error.filename == str(aside):  # a name that nobody gave
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)
