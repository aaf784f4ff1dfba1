"""Sets of patch numbers as short text: ``1-50,52``."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreDamaged

_FORM = re.compile(r"\d{1,19}(-\d{1,19})?(,\d{1,19}(-\d{1,19})?)*")


def encode_ranges(numbers: NDArray[np.int64]) -> str:
    """Ascending, distinct, non-negative integers as ``first-last`` spans.

    Args:
        numbers: (N,) int64, strictly ascending, none negative.

    Returns:
        The spans, joined by commas; an empty text for N = 0.
    """
    if len(numbers) == 0:
        return ""
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.concatenate(([0], breaks + 1))]
    lasts = numbers[np.concatenate((breaks, [len(numbers) - 1]))]
    return ",".join(
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
    )


def decode_ranges(text: str, limit: int, where: str) -> NDArray[np.int64]:
    """The inverse of `encode_ranges`.

    Args:
        text: Spans as `encode_ranges` writes them.
        limit: The most numbers that the text may stand for; guards memory.
        where: The file the text comes from, for the error.

    Returns:
        (N,) int64, strictly ascending.

    Raises:
        StoreDamaged: The text is malformed, not ascending, or longer than ``limit``.
    """
    if not text:
        return np.empty(0, np.int64)
    bad = StoreDamaged(f"{text[:60]!r} is no list of at most {limit} patch numbers", where=where)
    if not _FORM.fullmatch(text):
        raise bad
    spans = [(int(a), int(b or a)) for a, _, b in (span.partition("-") for span in text.split(","))]
    previous, total = -1, 0
    for first, last in spans:
        total += last - first + 1
        if first <= previous or last < first or total > limit or last >= 2**63:
            raise bad
        previous = last
    return np.concatenate([np.arange(first, last + 1, dtype=np.int64) for first, last in spans])
