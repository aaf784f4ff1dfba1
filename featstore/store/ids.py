"""Case, stain and slice ids as path components that cannot leave the store.

A component is readable, short, unique even where a file system ignores case,
and valid on every common file system. The true id stands in the record.
"""

from __future__ import annotations

import hashlib
from urllib.parse import quote

from featstore.errors import StoreError

_MAX_LENGTH = 80
# Windows gives these names to devices, whatever the suffix.
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}


def component(text: str) -> str:
    """The path component (or HDF5 group name) that stands for an id.

    Lower-case ids of letters, digits, ``-``, ``_``, ``.`` and ``&`` stay as they
    are. Everything else is percent-encoded, and where upper case, length or a
    reserved name could make two ids meet, a hash of the id is appended after ``~``.

    Args:
        text: Any id without a NUL, which HDF5's attributes cannot hold.

    Returns:
        A component of at most 97 ASCII characters; different ids give different ones.

    Raises:
        StoreError: The id is empty, holds a NUL, or is not valid Unicode.
    """
    if not text:
        raise StoreError("an empty id", expected="a case, stain or slice id of at least one character")
    if "\0" in text:
        raise StoreError(f"the id {text!r} holds a NUL", fix="rename the case, stain or slice")
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise StoreError(f"the id {text!r} is not valid Unicode", fix="rename the file") from error
    safe = quote(raw, safe="&").replace("~", "%7E")
    if safe.startswith("."):
        safe = "%2E" + safe[1:]
    if safe.endswith("."):
        safe = safe[:-1] + "%2E"
    # The escapes' upper-case digits never tell two ids apart, so they don't count.
    plain = safe == safe.lower() or text == text.lower()
    if plain and len(safe) <= _MAX_LENGTH and safe.split(".")[0] not in _RESERVED:
        return safe
    return f"{safe[:_MAX_LENGTH]}~{hashlib.sha256(raw).hexdigest()[:16]}"
