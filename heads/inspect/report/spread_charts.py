"""Charts of cases over several trainings, and by two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import natural_key
from heads.evaluation.plots import Floats, Ints
from heads.inspect.report.case_charts import WIDE, columns_of
from heads.inspect.report.content import Chart
from heads.inspect.report.svg import (
    DASHED,
    DOTTED,
    GRID,
    INK,
    LEFT,
    MUTED,
    PALE,
    QUARTERS,
    ROW,
    TOP,
    Axes,
    cross,
    drawing,
    legend,
    line,
    linked,
    marker,
    short,
    text,
)

STABILITY = (
    "Each column is a case, each point what one training gave its true class; the bar is the median. "
    "Tall columns depend on chance in training. A cross marks cases that no training called right."
)
PAIRS = (
    "Each point is a case: the probability of its true class by A and by B. Above the diagonal B is surer "
    "of the truth, below it A. Ringed: one of the two is right and the other wrong."
)


@dataclass(frozen=True)
class CaseSpread:
    """A case over the trainings of a study.

    Attributes:
        case_id: Its id.
        label: True class index.
        values: The probability of its true class, a value a training.
        right: How many trainings called it right.
    """

    case_id: str
    label: int
    values: tuple[float, ...]
    right: int


def stability_chart(cases: Sequence[CaseSpread], class_names: Sequence[str]) -> Chart:
    """Every case's probability of its true class over the trainings, by class and median."""
    order = sorted(cases, key=lambda c: (c.label, float(np.median(c.values)), natural_key(c.case_id)))
    labels = [case.label for case in order]
    columns, parts = columns_of(
        [c.case_id for c in order], labels, "cases, by true class and median", "p(true class)"
    )
    axes = columns.axes
    if len(class_names) == 2:
        parts.append(
            line([(axes.left, axes.y(0.5)), (columns.width - 12, axes.y(0.5))], MUTED, 1.2, DASHED)
        )
    for case, x in zip(order, columns.places, strict=True):
        low, middle, high = min(case.values), float(np.median(case.values)), max(case.values)
        shapes = line([(x, axes.y(low)), (x, axes.y(high))], PALE, 1.2)
        size = 2.6 if len(case.values) <= 12 else 1.6
        shapes += "".join(marker(case.label, x, axes.y(value), size) for value in case.values)
        shapes += line([(x - 5, axes.y(middle)), (x + 5, axes.y(middle))], INK, 2.2)
        if not case.right:
            shapes += cross(x, axes.y(-0.03) + 0.0, 4)
        said = (
            f"case {case.case_id}: {class_names[case.label]}, right in {case.right} of {len(case.values)}"
        )
        parts.append(linked(case.case_id, f"{said}, median {middle:.3f}, {low:.3f} to {high:.3f}", shapes))
    rows = [
        (marker(c, 0, 0, 4), f"{short(class_names[c])}: {labels.count(c)} cases")
        for c in sorted(set(labels))
    ]
    never = sum(not case.right for case in order)
    if never:
        rows.append((cross(0, 0, 4), f"wrong in every training: {never}"))
    parts += legend(axes.left, columns.height + 12, rows)
    label = f"Probability of the true class of {len(order)} cases over the trainings; {never} never right"
    picture = drawing(columns.width, columns.height + 10 + ROW * len(rows), label, parts)
    return Chart("Each case over the trainings", picture, STABILITY, wide=columns.width > WIDE)


def case_strip(case: CaseSpread, ensemble: float) -> str:
    """SVG of one case's probabilities over the trainings, on one line; the mean marked."""
    axes = Axes(14, 8, 330, 22)
    parts = [line([(axes.x(0), 30), (axes.x(1), 30)], MUTED)]
    for tick in QUARTERS:
        parts.append(line([(axes.x(tick), 8), (axes.x(tick), 34)], GRID))
        parts.append(text(axes.x(tick), 47, f"{tick:g}", "middle", 11, MUTED))
    parts += [marker(case.label, axes.x(value), 19, 3.5) for value in case.values]
    parts.append(line([(axes.x(ensemble), 8), (axes.x(ensemble), 30)], INK, 2.4))
    parts.append(
        text(179, 64, "p(true class): points are trainings, the bar is their mean", "middle", 11, MUTED)
    )
    said = ", ".join(f"{value:.2f}" for value in sorted(case.values))
    label = f"Probability of the true class over {len(case.values)} trainings, mean {ensemble:.3f}: {said}"
    return drawing(358, 70, label, parts)


def pair_chart(
    case_ids: Sequence[str],
    labels: Ints,
    a: Floats,
    b: Floats,
    right: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    class_names: Sequence[str],
) -> Chart:
    """The probability of each case's true class by A and by B.

    Args:
        case_ids: N names.
        labels: (N,) true class indices.
        a: (N,) by A.
        b: (N,) by B.
        right: Whether A, and whether B calls each right.
        class_names: In config order.
    """
    axes = Axes(LEFT, TOP, 330, 330, x_limits=(-0.02, 1.02), y_limits=(-0.02, 1.02))
    parts = axes.frame("A: p(true class)", "B: p(true class)", QUARTERS, QUARTERS)
    parts.append(line(axes.points((0, 1), (0, 1)), MUTED, 1, DOTTED))
    if len(class_names) == 2:
        for ends in (((0.5, 0.5), (0, 1)), ((0, 1), (0.5, 0.5))):
            parts.append(line(axes.points(*ends), MUTED, 1, DASHED))
    apart = right[0] != right[1]
    for i, case in enumerate(case_ids):
        x, y = axes.x(float(a[i])), axes.y(float(b[i]))
        shapes = marker(int(labels[i]), x, y, 4.5)
        if apart[i]:
            shapes += (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{INK}" stroke-width="1.6"/>'
            )
        said = f"case {case}: {class_names[labels[i]]}, A {a[i]:.3f}, B {b[i]:.3f}"
        parts.append(linked(case, said, shapes))
    rows = [(marker(c, 0, 0, 5), short(class_names[c])) for c in sorted({int(c) for c in labels})]
    if apart.any():
        ring = f'<circle r="7" fill="none" stroke="{INK}" stroke-width="1.6"/>'
        rows.append((ring, f"one right, the other wrong: {int(apart.sum())}"))
    parts += legend(LEFT, 400, rows)
    label = f"Probability of the true class by A and by B, {len(case_ids)} cases"
    return Chart("Case by case", drawing(400, 400 + ROW * len(rows), label, parts), PAIRS)
