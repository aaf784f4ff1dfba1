"""Reports for tests: cases with pictures and hostile ids, without a run behind them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from heads.evaluation.metrics import evaluate
from heads.inspect.report.case_charts import confusion_chart, deviation_chart
from heads.inspect.report.content import (
    CasePage,
    Gallery,
    Member,
    Picture,
    Report,
    Section,
    Tile,
)
from heads.inspect.report.curves import Scores, calibration_chart, roc_charts
from heads.inspect.report.reading import pages_of
from heads.inspect.report.words import metrics_of, verdict

NAMES = ("benign", "high_grade")
STAINS = ("h&e", "melan", "sox10")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><b>bold",
    "'; alert(3) //",
    "50% & more %2F %zz",
    "Müller 東京 🔬",
    "__proto__",
    "{{ 7 * 7 }}",
    "-->",
    "javascript:alert(4)",
)
# Natural order is neither that of the list nor that of plain text.
PLAIN = ("10", "2", "38", "case 1", "B-7")


def a_jpeg(seed: int, width: int, height: int, smooth: int = 8, quality: int = 70) -> bytes:
    """Blurred noise, about as large as a tissue of this size."""
    rng = np.random.default_rng(abs(seed))
    small = rng.integers(
        90, 255, size=(max(height // smooth, 1), max(width // smooth, 1), 3), dtype=np.uint8
    )
    file = io.BytesIO()
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def scores(ids: Sequence[str], classes: int = 2, seed: int = 0) -> Scores:
    """Probabilities that are mostly right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(len(ids)) % classes
    logits = rng.normal(size=(len(ids), classes)) + 1.2 * np.eye(classes)[labels]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Scores("", labels, p, p.argmax(axis=1))


def seed_of(case: str) -> int:
    """So that two cases have different pictures."""
    return zlib.crc32(case.encode())


def tile(case: str, number: int, pixels: int = 48) -> Tile:
    """A patch with its picture."""
    picture = Picture(
        a_jpeg(number + seed_of(case), pixels, pixels), f"patch {number} of case {case}", pixels, pixels
    )
    values = {"attention": 0.25 / (number + 1), "alone p(high_grade)": 0.5}
    return Tile(
        picture, f"case_{case}_match_1_h&e_patch{number}.png", f"h&e · match_1 · patch {number}", values
    )


def with_pictures(page: CasePage, overlays: int = 2, tiles: int = 3) -> CasePage:
    """A page with everything that a page can have; the first tile is in both galleries."""
    case = page.case_id
    shown = tuple(tile(case, k) for k in range(tiles))
    lost = Tile(
        None, f"case_{case}_lost.png", "melan · match_2 · patch 9", {"attention": 0.001}, "the file is gone"
    )
    slices = (
        Member("match_1", 12, 0.7, 0.5, {"benign": 0.02, "high_grade": -0.02}),
        Member("match_2", 9, 0.3, 0.5, None),
    )
    return CasePage(
        case, page.true_class, page.predicted_class, page.probabilities, page.correct, 33, 3, STAINS[:2],
        tuple(
            Picture(a_jpeg(k - seed_of(case), 160, 120), f"slice {k} of {case}", 160, 120, f"match_{k}")
            for k in range(overlays)
        ),
        (
            Gallery("Most attention", "The patches that count most.", (*shown, lost)),
            Gallery("Alone most high_grade", "", shown[:1]),
            Gallery("Neutral", "Patches that say nothing.", (), "There are none."),
        ),
        (
            Member("h&e", 21, 0.8, 0.5, {"benign": 0.1, "high_grade": -0.1}, slices),
            Member("melan", 12, 0.2, 0.5, None),
        ),
        details={"effective patches": "4.1 of 33"},
    )  # fmt: skip


def make_report(ids: Sequence[str] = (*HOSTILE, *PLAIN), pictures: bool = True) -> Report:
    """A run's report; every page but the last has pictures."""
    found = scores(ids)
    metrics = metrics_of(evaluate(found.labels, found.probabilities, NAMES, resamples=50).to_json())
    matrix = np.zeros((2, 2), int)
    np.add.at(matrix, (found.labels, found.called), 1)
    right = int((found.labels == found.called).sum())
    curves = Section(
        "curves",
        "How good, and how sure",
        charts=(
            confusion_chart(matrix.tolist(), NAMES),
            *roc_charts([found], NAMES),
            calibration_chart([found]),
            deviation_chart(ids, found.labels, found.probabilities, found.called, NAMES),
        ),
    )
    report = Report(
        title="run_20260304_050607",
        kind="run",
        created="2026-03-04 05:06",
        verdict=verdict(metrics, found.labels.tolist(), right, NAMES),
        provenance={"head": "hierarchical", "backbone": "densenet121"},
        class_names=NAMES,
        metrics=metrics,
        sections=(curves, Section("training", "Training", notes=("Nothing is known of it.",))),
        cases=pages_of(ids, found, NAMES),
    )
    return report.with_cases([with_pictures(page) for page in report.cases[:-1]]) if pictures else report
