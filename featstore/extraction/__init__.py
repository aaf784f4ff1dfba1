"""Patch table × backbone → store."""

from featstore.extraction.pipeline import Progress
from featstore.extraction.plan import Plan
from featstore.extraction.report import ExtractionReport
from featstore.extraction.run import extract

__all__ = ["ExtractionReport", "Plan", "Progress", "extract"]
