"""The cost model: sums that must come out, and the page that shows them."""

from __future__ import annotations

import numpy as np
import pytest

from tests import helpers
from tests.bench.bench_plan import draw
from tests.bench.plan_model import COHORTS, TABLES, Cohort, epoch_seconds, inodes, table, time_text


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_what_the_model_says(name: str) -> None:
    assert table(name) in (helpers.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert table(name).count("\n") == len(COHORTS) + 1


def test_inodes_of_a_case() -> None:
    """Its folder, and two files a commit."""
    assert inodes(Cohort(1, 100)) == 3
    assert inodes(Cohort(1, 100), shares=4) == 1 + 2 * 4
    assert inodes(Cohort(1, 100), shares=256) == 1 + 2 * 15  # it has no more slices
    assert inodes(Cohort(10, 100_000), rate=100) == 10 * (1 + 2 * 2)  # more than a minute's work
    assert inodes(Cohort(1, 300_000), rate=1e9) == 1 + 2 * 3  # 744 MB


def test_the_epoch_that_was_measured() -> None:
    assert 0.4 < epoch_seconds(Cohort(46, 39_723)) < 0.57
    assert epoch_seconds(Cohort(46, 39_723), 64) < epoch_seconds(Cohort(46, 39_723))
    assert time_text(90) == "1.5 min"


def test_a_drawn_cohort_is_as_large_as_asked() -> None:
    slices = draw(500, 500_000)
    assert abs(slices.patches.sum() / 500_000 - 1) < 0.02
    assert slices.patches.min() >= 1
    assert len(np.unique(slices.case)) == 500
    assert slices.patches.max() > 10 * np.median(slices.patches)
    assert (slices.png_bytes >= 100).all()
