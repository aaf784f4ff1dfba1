"""From two runs or studies to a report of where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import natural_key
from heads.evaluation.compare import LESS_IS_BETTER, Comparison, Contender, compare
from heads.evaluation.studies import counted
from heads.evaluation.study_results import called
from heads.inspect.report.content import CaseLink, CasePage, Cell, Opinion, Report, Section, Table
from heads.inspect.report.curves import Scores, calibration_chart, precision_recall_charts, roc_charts
from heads.inspect.report.spread_charts import pair_chart
from heads.inspect.report.words import MEANINGS

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]  # of A and of B, (N,) each
Rights = tuple[NDArray[np.bool_], NDArray[np.bool_]]
MOST = 30  # cases in the table of largest differences
OF_SEEDS = (
    "Of a study with several seeds, each metric is the mean over the seeds, as in `featstore compare`; "
    "curves and cases are of the mean probability over the seeds."
)


def read_comparison(
    a: Contender, b: Contender, cases: Sequence[CasePage] = (), resamples: int = 2000
) -> Report:
    """The report of where two runs or studies differ, on the test cases that both have.

    Args:
        a: The first, from `read_contender`.
        b: The second.
        cases: Pages of cases that both have, with pictures.
        resamples: Of the bootstrap intervals.

    Raises:
        FeatstoreError: They have other classes, other labels, or no case in common.
    """
    found = compare(a, b, resamples)
    shared = sorted(a.labels.keys() & b.labels.keys(), key=natural_key)
    first, second = mean_scores(a, shared, "A"), mean_scores(b, shared, "B")
    names = a.class_names
    right = first.called == first.labels, second.called == second.labels
    every = np.arange(len(shared))
    own = first.probabilities[every, first.labels], second.probabilities[every, first.labels]
    both = [first, second]
    sections = (
        Section("metrics", "Metrics", _INTERVAL, (), (_metrics_table(found),)),
        Section(
            "differences",
            "Where they differ",
            charts=(pair_chart(shared, first.labels, *own, right, names),),
            tables=(
                _one_right(shared, first.labels, own, right, names),
                _largest(shared, first.labels, own, names),
            ),
        ),
        Section(
            "curves",
            "How good, and how sure",
            charts=(
                *roc_charts(both, names),
                *precision_recall_charts(both, names),
                calibration_chart(both),
            ),
        ),
    )
    seeds = len(a.seeds) > 1 or len(b.seeds) > 1
    report = Report(
        title=f"{a.path.name} and {b.path.name}",
        kind="comparison",
        created=f"{datetime.now():%Y-%m-%d %H:%M}",
        verdict=_verdict(found, right),
        provenance={
            "A": f"{a.path.name}: {a.kind}",
            "B": f"{b.path.name}: {b.kind}",
            "classes": ", ".join(names),
            "cases": f"{len(shared)} that both have",
        },
        class_names=names,
        sections=sections,
        cases=_pages(shared, both, own, names),
        notes=(OF_SEEDS,) if seeds else (),
        warnings=_left_out(found),
    )
    return report.with_cases(cases)


_INTERVAL = (
    "A − B with its 95% interval, from resampling the cases, the same for both. Where the interval lies on "
    "one side of 0, the difference is unlikely to be chance alone."
)


def mean_scores(side: Contender, cases: Sequence[str], name: str) -> Scores:
    """The mean probability over the seeds of these cases, and what it is called."""
    ps, thresholds = [], []
    for each in side.seeds:
        place = {case: i for i, case in enumerate(each.case_ids)}
        index = [place[case] for case in cases]
        ps.append(each.probabilities[index])
        if each.threshold is not None:
            thresholds.append(each.threshold[index])
    p = np.mean(ps, axis=0)
    threshold = np.mean(thresholds, axis=0) if thresholds else None
    labels = np.array([side.labels[case] for case in cases], np.int64)
    return Scores(name, labels, p, called(p, threshold))


def _metrics_table(found: Comparison) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for row in found.rows:
        label = MEANINGS[row.metric][0] + (" (less is better)" if row.metric in LESS_IS_BETTER else "")
        each = row.difference
        rows.append(
            (
                label,
                row.a,
                row.b,
                each.value,
                each.low,
                each.high,
                _apart(each.low, each.high) or each.reason,
            )
        )
    columns = ("metric", "A", "B", "A − B", "from", "to", "")
    return Table("Metrics of A and B", columns, tuple(rows))


def _apart(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return "differs" if low > 0 or high < 0 else "0 is within the interval"


def _verdict(found: Comparison, right: Rights) -> tuple[str, ...]:
    """Who is better, and by how much it could be chance."""
    counts = [int(each.sum()) for each in right]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    said = [
        f"Of {counted(found.cases, 'case')} A calls {counts[0]} right and B {counts[1]}; "
        f"only A is right in {only[0]}, only B in {only[1]}."
    ]
    auc = next(row for row in found.rows if row.metric == "auc")
    each = auc.difference
    if auc.a is None or auc.b is None or each.value is None:
        said.append(f"AUC is undefined: {each.reason}.")
    elif each.low is None or each.high is None:
        said.append(f"AUC: A {auc.a:.3f}, B {auc.b:.3f} ({each.reason}).")
    else:
        clear = each.low > 0 or each.high < 0
        what = "unlikely to be chance alone" if clear else "which may be chance"
        said.append(
            f"AUC: A {auc.a:.3f}, B {auc.b:.3f}, difference {each.value:+.3f} "
            f"(95% interval {each.low:+.3f} to {each.high:+.3f}), {what}."
        )
    return tuple(said)


def _left_out(found: Comparison) -> tuple[str, ...]:
    notes = [
        f"{counted(n, 'case')} only in {letter}: left out."
        for n, letter in zip(found.only, "AB", strict=True)
        if n
    ]
    for letter, each in (("A", found.a), ("B", found.b)):
        if each.left_out:
            seeds = ", ".join(map(str, each.left_out))
            notes.append(f"{letter} is without the seeds that lack a fold: {seeds}.")
    return tuple(notes)


def _order(cases: Sequence[str], own: Pair) -> list[int]:
    """The largest difference first; of equals in natural order."""
    size = np.abs(own[0] - own[1])
    return sorted(range(len(cases)), key=lambda i: (-float(size[i]), natural_key(cases[i])))


def _row(
    i: int,
    cases: Sequence[str],
    labels: NDArray[np.int64],
    own: Pair,
    names: Sequence[str],
) -> tuple[Cell, ...]:
    a, b = float(own[0][i]), float(own[1][i])
    return CaseLink(cases[i]), names[labels[i]], a, b, a - b


_COLUMNS = ("case", "true class", "A: p(true class)", "B: p(true class)", "A − B")


def _one_right(
    cases: Sequence[str],
    labels: NDArray[np.int64],
    own: Pair,
    right: Rights,
    names: Sequence[str],
) -> Table:
    rows = [
        (*_row(i, cases, labels, own, names), "only A right" if right[0][i] else "only B right")
        for i in _order(cases, own)
        if right[0][i] != right[1][i]
    ]
    note = "" if rows else "There is no case that one calls right and the other wrong."
    said = "The cases in which one is right and the other wrong, the largest difference first."
    return Table("Right in one only", (*_COLUMNS, ""), tuple(rows), said, note)


def _largest(
    cases: Sequence[str],
    labels: NDArray[np.int64],
    own: Pair,
    names: Sequence[str],
) -> Table:
    rows = [_row(i, cases, labels, own, names) for i in _order(cases, own)[:MOST]]
    title = "Every case by its difference" if len(rows) == len(cases) else f"The {MOST} largest differences"
    return Table(title, _COLUMNS, tuple(rows))


def _pages(
    cases: Sequence[str], both: Sequence[Scores], own: Pair, names: Sequence[str]
) -> tuple[CasePage, ...]:
    pages = []
    for i, case in enumerate(cases):
        true = int(both[0].labels[i])
        opinions = tuple(
            Opinion(
                each.name,
                names[each.called[i]],
                dict(zip(names, each.probabilities[i].tolist(), strict=True)),
                bool(each.called[i] == true),
            )
            for each in both
        )
        first, (a, b) = opinions[0], (float(each[i]) for each in own)
        columns = {"A: p(true)": a, "B: p(true)": b, "A − B": a - b}
        pages.append(
            CasePage(
                case,
                names[true],
                first.predicted_class,
                first.probabilities,
                first.correct,
                opinions=opinions,
                columns=columns,
            )
        )
    return tuple(pages)
