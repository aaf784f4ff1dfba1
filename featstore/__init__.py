"""PNG patches to frozen embeddings, embeddings to bags."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.bags import Bag
    from featstore.errors import FeatstoreError
    from featstore.resident import CaseBags
    from featstore.spec import EmbeddingSpec
    from featstore.store import Store

__version__ = "0.1.0"

__all__ = ["Bag", "CaseBags", "EmbeddingSpec", "FeatstoreError", "Store", "__version__"]

_HOMES = {
    "Bag": "featstore.bags",
    "CaseBags": "featstore.resident",
    "EmbeddingSpec": "featstore.spec",
    "FeatstoreError": "featstore.errors",
    "Store": "featstore.store",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `featstore --help` waits for neither pandas nor h5py.
    if name not in _HOMES:
        raise AttributeError(f"module 'featstore' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
