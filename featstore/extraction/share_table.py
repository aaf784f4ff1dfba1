"""The table of shares: which share of N every slice belongs to, written down once for all shares.

Shares balanced by work depend on all files at once: one file more may move every slice. Tasks of an
array start hours apart, and files come in between. Were each of them to work its share out anew, a
slice could move from a share that has not run into one that has, and nobody would embed it. So the
first process to start publishes its table, exclusively (``link(2)``, as the store's records), and all
others follow it. The table is only ever added to: a process that finds slices without a share gives
them one, balanced among themselves, and publishes that as the table's next page; if another process
was faster, it reads that page and looks again. Hence

- a slice's share, once published, never changes, whatever comes, goes or grows;
- every slice that a process sees has its share before that process begins;
- a cohort that has grown a lot is balanced again, since its new slices are.

N and the slices' names are all of the table's identity. The patches folder is none: it may have another
path on every machine, and there must not be two tables. N has a table of its own for each value.

The table lies in ``reports/extract/shares_of_N/`` of the project folder and not in the store: it is no
part of what the store promises, and a folder that holds strangers cannot become a store. What must
be shared by all shares is therefore the project folder. Where it is not, where its file system has no
hard links (then a slice goes by a hash of its name), or where the table is removed while shares run,
two shares may still disagree. That is why every share counts at its end what the store lacks
(`plan.not_in_store`): the next run of all shares, or one run without ``--shard``, computes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from featstore.errors import FeatstoreError, StoreError
from featstore.store import files

FORMAT = "featstore shares 1"
# Case, stain and slice.
Key = tuple[str, str, str]


class Home(NamedTuple):
    """A slice's share, and its work (bytes) when that was decided."""

    share: int
    work: int


def table_folder(reports: Path, count: int) -> Path:
    """Where the table for this number of shares lies."""
    return reports / f"shares_of_{count}"


def read_pages(folder: Path, count: int) -> tuple[dict[Key, Home], int]:
    """What is published.

    Args:
        folder: `table_folder`.
        count: The number of shares N.

    Returns:
        The home of every slice that has one, and the number of pages.

    Raises:
        FeatstoreError: A page is not what was written.
    """
    homes: dict[Key, Home] = {}
    pages = 0
    # Opened one after another, not listed: a network file system may show an old listing for a while.
    while (data := _read(_page(folder, pages + 1))) is not None:
        for key, home in _decode(data, _page(folder, pages + 1), count).items():
            homes.setdefault(key, home)
        pages += 1
    return homes, pages


def publish_page(folder: Path, count: int, number: int, homes: Mapping[Key, Home]) -> bool | None:
    """Add slices to the table.

    Args:
        folder: `table_folder`; made where missing.
        count: The number of shares N.
        number: Of the page, from 1: one more than have been read.
        homes: Slices that have no share on the pages before it.

    Returns:
        True if they are in the table now; False if another process has published this page
        meanwhile; None if nothing can be published here, since there are no hard links.

    Raises:
        StoreError: The page cannot be written.
    """
    files.make_folder(folder)
    try:
        return files.publish(_page(folder, number), _encode(homes, count))
    except StoreError as error:
        # Only a link has two names.
        if isinstance(error.__cause__, OSError) and error.__cause__.filename2 is not None:
            return None
        raise


def _page(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _encode(homes: Mapping[Key, Home], count: int) -> bytes:
    body = {
        "format": FORMAT,
        "shares": count,
        "made": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "writer": f"{platform.node()}:{os.getpid()}",
        "slices": [[*key, *home] for key, home in homes.items()],
    }
    return json.dumps({**body, "sha256": _digest(body)}).encode() + b"\n"


def _decode(data: bytes, path: Path, count: int) -> dict[Key, Home]:
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        if digest != _digest(body) or (body["format"], body["shares"]) != (FORMAT, count):
            raise ValueError
        return {
            (case, stain, slice_id): Home(share, work)
            for case, stain, slice_id, share, work in body["slices"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "it is not what was written") from error


def _damaged(path: Path, why: str) -> FeatstoreError:
    return FeatstoreError(
        f"the table of shares cannot be used: {why}",
        expected=f"a page as featstore publishes it ({FORMAT})",
        where=str(path),
        fix=f"wait until no share runs, remove the folder {path.parent}, and start all shares again",
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
