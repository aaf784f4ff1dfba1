"""Charts of a model's cases: who was taken for what, and how far each is from right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heads.evaluation.plots import Floats, Ints
from heads.inspect.report.content import Chart
from heads.inspect.report.svg import (
    DASHED,
    INK,
    MUTED,
    QUARTERS,
    ROW,
    TOP,
    Axes,
    box,
    color,
    cross,
    drawing,
    legend,
    line,
    linked,
    marker,
    short,
    text,
)

NAMED = 70  # up to so many cases have their names below them
CELL = 84
WIDE = 420  # pixels from which on a chart has a row of its own

CONFUSION = "Rows: what the cases are. Columns: what they were called. Off the diagonal are the mistakes."
DEVIATION = (
    "How far each case is from being called right with certainty: 0 is sure and right, 1 sure and wrong. "
    "A cross marks the cases called wrong; click on one for its page."
)


def confusion_chart(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Chart:
    """Counts, and the share of the true class.

    Args:
        matrix: (C, C), how many cases of the row's true class got the column's class.
        class_names: In config order.
    """
    counts = np.asarray(matrix)
    names = [short(name, 14) for name in class_names]
    cell = CELL if len(names) <= 4 else 60
    left, top, parts = 118, 48, []
    side = cell * len(names)
    total = counts.sum(axis=1)
    for (row, column), count in np.ndenumerate(counts):
        share = count / total[row] if total[row] else 0.0
        x, y = left + cell * column, top + cell * row
        parts.append(box(x + 1, y + 1, cell - 2, cell - 2, _shade(share)))
        ink = "#ffffff" if share > 0.55 else INK
        parts.append(text(x + cell / 2, y + cell / 2 + 2, str(count), "middle", 20, ink))
        percent = f"{share:.0%}" if total[row] else "–"
        parts.append(text(x + cell / 2, y + cell / 2 + 20, percent, "middle", 11, ink))
    for place, name in enumerate(names):
        middle = cell * (place + 0.5)
        parts.append(text(left + middle, top - 8, name, "middle", 12 if cell == CELL else 10))
        parts.append(text(left - 10, top + middle + 4, name, "end", 12))
    parts.append(text(left + side / 2, 18, "called", "middle", 12, MUTED))
    parts.append(text(14, top + side / 2, "true class", "middle", 12, MUTED, turn=-90))
    said = "; ".join(
        f"{count} of {class_names[r]} called {class_names[c]}" for (r, c), count in np.ndenumerate(counts)
    )
    label = f"Confusion matrix of {counts.sum()} cases. {said}"
    return Chart("Confusion matrix", drawing(left + side + 14, top + side + 12, label, parts), CONFUSION)


def _shade(share: float) -> str:
    """White to dark blue."""
    low, high = (245, 247, 250), (0, 84, 133)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


@dataclass(frozen=True)
class Columns:
    """Where the cases stand along x: by class, with some air between classes."""

    axes: Axes
    width: float
    height: float
    places: tuple[float, ...]


def columns_of(
    case_ids: Sequence[str], labels: Sequence[int], title: str, y_label: str
) -> tuple[Columns, list[str]]:
    """Axes of cases in their present order, and their parts; names below where there is room."""
    n = len(case_ids)
    step = float(np.clip(1000 / max(n, 1), 13 if n <= NAMED else 5, 30))
    left, tall, place = 62.0, 240.0, 0.0
    places = []
    for i in range(n):
        place += step * (1.0 if i == 0 or labels[i] == labels[i - 1] else 2.2)
        places.append(left + place - step / 2)
    width = max(place + step / 2, 300.0)
    axes = Axes(left, TOP, width, tall, y_limits=(-0.03, 1.05))
    named = n <= NAMED
    below = 12 + 6.2 * max((min(len(case), 16) for case in case_ids), default=0) if named else 6
    parts = axes.frame("", y_label, x_ticks=[], y_ticks=QUARTERS)
    bottom = TOP + tall
    if named:
        parts += [
            text(x + 4, bottom + 10, short(case, 16), "end", 11, MUTED, turn=-90)
            for x, case in zip(places, case_ids, strict=True)
        ]
    parts.append(text(left + width / 2, bottom + below + 16, title, "middle", 12, MUTED))
    return Columns(axes, left + width + 12, bottom + below + 22, tuple(places)), parts


def deviation_chart(
    case_ids: Sequence[str],
    labels: Ints,
    probabilities: Floats,
    called: Ints,
    class_names: Sequence[str],
    threshold: float | None = None,
) -> Chart:
    """1 − p of the true class for every case, by class and in rising order.

    Args:
        case_ids: N names.
        labels: (N,) true class indices.
        probabilities: (N, C).
        called: (N,) predicted class indices.
        class_names: In config order.
        threshold: Of two classes, the probability of the second from which on it is called.
    """
    deviation = 1 - probabilities[np.arange(len(labels)), labels]
    order = np.lexsort((deviation, labels))
    ids, mine = [case_ids[i] for i in order], [int(labels[i]) for i in order]
    columns, parts = columns_of(ids, mine, "cases, by true class", "1 − p(true class)")
    axes = columns.axes
    if len(class_names) == 2:
        for c in sorted(set(mine)):
            limit = 0.5 if threshold is None else (threshold, 1 - threshold)[c]
            there = [x for x, label in zip(columns.places, mine, strict=True) if label == c]
            reach = [(there[0] - 10, axes.y(limit)), (there[-1] + 10, axes.y(limit))]
            parts.append(line(reach, MUTED, 1.2, DASHED))
    size = 5.0 if len(ids) <= NAMED else 3.0
    for i, x, c in zip(order, columns.places, mine, strict=True):
        y = axes.y(float(deviation[i]))
        wrong = called[i] != labels[i]
        shapes = line([(x, axes.y(0)), (x, y)], color(c), 1.4) + marker(c, x, y, size)
        shapes += cross(x, y, size + 2.5) if wrong else ""
        said = f"case {case_ids[i]}: {class_names[c]}, called {class_names[called[i]]}"
        parts.append(linked(case_ids[i], f"{said}, 1 − p = {deviation[i]:.3f}", shapes))
    rows = _class_rows(mine, [bool(called[i] != labels[i]) for i in order], class_names)
    if any(called != labels):
        rows.append((cross(0, 0, 5), "called wrong"))
    parts += legend(axes.left, columns.height + 12, rows)
    wrong_count = int((called != labels).sum())
    label = f"Deviation from the true class of {len(ids)} cases, {wrong_count} of them called wrong"
    height = columns.height + 10 + ROW * len(rows)
    return Chart(
        "Deviation from the true class",
        drawing(columns.width, height, label, parts),
        DEVIATION,
        wide=columns.width > WIDE,
    )


def _class_rows(
    labels: Sequence[int], wrong: Sequence[bool], class_names: Sequence[str]
) -> list[tuple[str, str]]:
    rows = []
    for c in sorted(set(labels)):
        mine = [bad for label, bad in zip(labels, wrong, strict=True) if label == c]
        rows.append((marker(c, 0, 0, 5), f"{short(class_names[c])}: {sum(mine)} of {len(mine)} wrong"))
    return rows
