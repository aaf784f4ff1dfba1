"""A store of which some cases are read from a copy."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import ArrayLike, NDArray

from featstore.errors import StoreDamaged
from featstore.store.format import CASES, Record
from featstore.store.ids import component
from featstore.store.records import read_record
from featstore.store.store import Store


class CopiedStore(Store):
    """A store whose embeddings of some cases are read from a copy; everything else is the store's own.

    Path, fingerprint, rows and digest are those of the store, as it was when it was opened.

    Args:
        store: The store.
        copy: The folder of the copy.
        cases: Those that the copy holds.

    Attributes:
        original: The store, read from its own folder alone.
        copy: The folder of the copy.
    """

    def __init__(self, store: Store, copy: Path, cases: Collection[str]) -> None:
        super().__init__(store.path, store.spec, store._newest)
        self.original, self.copy = store, copy
        self._copied = frozenset(map(component, cases))
        self._listed = store._listed
        self._records, self._layouts = store._records, store._layouts

    def folder(self, case_id: str) -> Path:
        """The folder of a case's records and parts: the copy's, where it has the case."""
        return self._root(component(case_id)) / CASES / component(case_id)

    def features(self, case_id: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """As `Store.features`."""
        with self._telling():
            return super().features(case_id, out)

    def views(self, case_id: str) -> NDArray[Any]:
        """As `Store.views`."""
        with self._telling():
            return super().views(case_id)

    def take(self, case_id: str, index: ArrayLike) -> NDArray[Any]:
        """As `Store.take`."""
        with self._telling():
            return super().take(case_id, index)

    def _frame(self, case_id: str | None, columns: list[str], unpack: Any) -> pd.DataFrame:
        with self._telling():
            return super()._frame(case_id, columns, unpack)

    def _read(self, name: str) -> Record:
        with self._telling():
            record = read_record(self._root(name), name, self._newest[name], self.spec)
        return self._records.put(record.case_id, record)

    def _root(self, name: str) -> Path:
        return self.copy if name in self._copied else self.path

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Of damage in the copy, what mends it: no backup, and no repair of the store."""
        try:
            yield
        except StoreDamaged as error:
            if not error.where.startswith(f"{self.copy}{os.sep}"):
                raise
            raise StoreDamaged(
                f"{error.found} (in the copy on this machine's disk)",
                expected=error.expected,
                where=error.where,
                fix=f"remove the folder {self.copy}: the next run makes it anew from {self.path}",
            ) from error
