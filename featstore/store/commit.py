"""The next record of a case, however it came about."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from featstore.store import files
from featstore.store.format import Part, Record, encode_record, record_name
from featstore.store.records import require_own_folder


def publish_next(folder: Path, case_id: str, fingerprint: str, current: int, parts: Sequence[Part]) -> bool:
    """Commit a case's next state, by the exclusive link that every writer commits by.

    The number is always the one after the newest: with a gap, a writer that commits the number in
    between would believe its rows to be live.

    Args:
        folder: The case's folder.
        case_id: The case.
        fingerprint: The store's.
        current: The number of the newest record, which ``parts`` was made from; 0 where there is none.
        parts: What is live from now on.

    Returns:
        False if another writer came first; nothing has changed then.

    Raises:
        StoreDamaged: The folder is only a link to one.
        StoreError: The record could not be written.
    """
    require_own_folder(folder)
    if not current:
        # Whoever made the case's folder may have been killed before it was durable.
        files.sync_folder(folder.parent)
        files.sync_folder(folder.parent.parent)
    record = Record(
        case_id=case_id,
        sequence=current + 1,
        fingerprint=fingerprint,
        created=now(),
        writer=f"{platform.node()}:{os.getpid()}",
        parts=tuple(parts),
    )
    return files.publish(folder / record_name(record.sequence), encode_record(record))


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
