"""Features that other tools made, in and out of the store: one file a foreign format.

Every format is a `source.Source`: it lists its bags without reading them, then reads one at a
time. `importing` writes them into a store, and knows no format.
"""

from featstore.interop.importing import import_bags
from featstore.interop.registry import FORMATS, open_source
from featstore.interop.report import ImportReport

__all__ = ["FORMATS", "ImportReport", "import_bags", "open_source"]
