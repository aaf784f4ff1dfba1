"""The embedding store: immutable parts, made visible by commit records (see `format`)."""

from featstore.store.format import Slice
from featstore.store.store import Store
from featstore.store.writer import StoreWriter

__all__ = ["Slice", "Store", "StoreWriter"]
