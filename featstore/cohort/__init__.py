"""Folder of patches, labels and groups → a validated cohort, and the report on it."""

from featstore.cohort.check import check_cohort
from featstore.cohort.composition import Caps
from featstore.cohort.labels import Labels, read_groups, read_labels
from featstore.cohort.patches import Scan, build_table, scan
from featstore.cohort.reading import Unparsed
from featstore.cohort.report import CohortReport

__all__ = [
    "Caps",
    "CohortReport",
    "Labels",
    "Scan",
    "Unparsed",
    "build_table",
    "check_cohort",
    "read_groups",
    "read_labels",
    "scan",
]
