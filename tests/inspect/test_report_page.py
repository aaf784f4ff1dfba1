"""The report's HTML: nothing of it can run or be fetched, every picture once, every number as it is."""

from __future__ import annotations

import base64
import hashlib
import random
import re
from collections import Counter
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from featstore.cohort.names import natural_sorted
from heads.evaluation.metrics import evaluate
from heads.inspect.report.case_charts import confusion_chart, deviation_chart
from heads.inspect.report.content import NO_PICTURES, CaseLink, Gallery, Picture, Report, Section, Table
from heads.inspect.report.curves import (
    Scores,
    calibration_chart,
    precision_recall,
    precision_recall_charts,
    reliability,
    roc_charts,
)
from heads.inspect.report.page import anchor, case_table, digits, fine, render, signed, write_report
from heads.inspect.report.spread_charts import CaseSpread, pair_chart, stability_chart
from heads.inspect.report.svg import round_ticks
from heads.inspect.report.training_charts import split_chart, training_charts
from tests.inspect.reports import HOSTILE, NAMES, PLAIN, make_report, scores, tile, with_pictures

MEGABYTE = 1_000_000
VOID = {"meta", "link", "img", "input"}


class Elements(HTMLParser):
    """All elements with their attributes, the text of headings, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and "h2" in self.open:
            self.headings[-1] += data


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return render(report)


@pytest.fixture(scope="module")
def elements(text: str) -> Elements:
    return Elements(text)


def test_hostile_ids_stay_text(elements: Elements, text: str) -> None:
    assert elements.open == []
    assert Counter(tag for tag, _ in elements.found)["script"] == 1
    assert not {tag for tag, _ in elements.found} & {"b", "iframe", "object", "embed", "base"}
    assert [name for _, attributes in elements.found for name in attributes if name.startswith("on")] == []
    assert "style" not in {name for _, attributes in elements.found for name in attributes}
    shown = [heading.removeprefix("Case ").rsplit(" ", 2)[0] for heading in elements.headings]
    assert [each for each in shown if each in (*HOSTILE, *PLAIN)] == natural_sorted((*HOSTILE, *PLAIN))
    assert "49" not in next(each for each in elements.headings if "7 *" in each)


def test_nothing_is_fetched(elements: Elements, text: str) -> None:
    links = [
        value or ""
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert len(links) > 100
    assert [link for link in links if not link.startswith(("data:", "#"))] == []
    without = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", without) is None


def test_every_id_is_there_once_and_every_link_leads_to_one(elements: Elements) -> None:
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert max(Counter(ids).values()) == 1
    assert all(each and not re.search(r"\s", each) for each in ids)
    targets = {attributes.get("href") or "" for tag, attributes in elements.found if tag in ("a", "use")}
    assert {target.removeprefix("#") for target in targets if target} <= set(ids)
    assert {anchor(case) for case in (*HOSTILE, *PLAIN)} <= set(ids)


def test_the_policy_allows_this_script_and_style_and_nothing_else(elements: Elements, text: str) -> None:
    (policy,) = (a["content"] or "" for _, a in elements.found if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_picture_is_in_the_file_once(report: Report, text: str, elements: Elements) -> None:
    pictures = [p for case in report.cases for p in case.overlays]
    tiles = [t.picture for case in report.cases for g in case.galleries for t in g.tiles if t.picture]
    for picture in (*pictures, *tiles):
        assert text.count(base64.b64encode(picture.jpeg).decode()) == 1
    shown = [a for tag, a in elements.found if tag in ("img", "use")]
    assert len(shown) == len(pictures) + len(tiles)


def test_a_case_without_pictures_says_so(report: Report, text: str) -> None:
    assert report.cases[-1].notes == (NO_PICTURES,)
    assert text.count(NO_PICTURES) == 1
    assert text.count("the file is gone") == len(report.cases) - 1
    assert "There are none." in text


def test_the_page_is_the_same_each_time_and_written_as_a_whole(
    report: Report, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")
    assert write_report(report, path) == path.stat().st_size == len(text.encode())
    assert path.read_text(encoding="utf-8") == text
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_names_of_files_that_are_no_text_do_not_stop_it(report: Report) -> None:
    strange = replace(tile("38", 0), file="patch\udcff\x1b[31m\x00.png")
    page = replace(report.cases[0], galleries=(Gallery("odd", "", (strange,)),))
    made = render(replace(report, cases=(page,)))
    assert "patch\\udcff\\x1b[31m\\x00.png" in made


def test_a_hundred_cases_with_pictures_stay_below_25_megabytes() -> None:
    """Six overlays of 700 × 700 and twenty patches of 112 × 112 a case, of the bytes that those have."""
    rng = random.Random(0)

    def picture(size: int, side: int) -> Picture:
        return Picture(
            rng.randbytes(size), "Case 38, h&e, slice match_1: attention", side, side, "h&e · match_1"
        )

    report = make_report([str(i) for i in range(100)], pictures=False)
    pages = []
    for case in report.cases:
        tiles = [replace(tile(case.case_id, k), picture=picture(3_000, 112)) for k in range(5)]
        full = with_pictures(case)
        galleries = tuple(
            Gallery(
                f"Gallery {k}",
                "The patches that count most.",
                tuple(replace(t, picture=picture(3_000, 112)) for t in tiles),
            )
            for k in range(4)
        )
        pages.append(
            replace(full, overlays=tuple(picture(18_000, 700) for _ in range(6)), galleries=galleries)
        )
    size = len(render(report.with_cases(pages)).encode())
    assert 20 * MEGABYTE < size < 25 * MEGABYTE


def test_the_table_of_cases_is_in_natural_order_and_sorts_by_whole_numbers(report: Report) -> None:
    table = case_table(report)
    assert [row.page.case_id for row in table.rows] == natural_sorted((*HOSTILE, *PLAIN))
    assert (table.rows[0].before, table.rows[-1].after) == (None, None)
    assert [row.after for row in table.rows[:-1]] == [row.page.case_id for row in table.rows[1:]]
    names = [column.name for column in table.columns]
    assert names[:6] == ["case", "result", "true class", "called", "p(true class)", "p(high_grade)"]
    for row in table.rows:
        p = row.page.probabilities
        assert row.cells[2] == (p[row.page.true_class],) * 2
        assert row.cells[3] == (p["high_grade"],) * 2
    assert all(len(row.cells) == len(table.columns) - 2 for row in table.rows)


def test_given_pages_cannot_contradict_the_files(report: Report) -> None:
    own = report.cases[0]
    lie = replace(
        own, probabilities={"benign": 0.5, "high_grade": 0.5}, correct=not own.correct, patches=77
    )
    merged = report.with_cases([lie]).cases[0]
    assert (merged.probabilities, merged.correct, merged.patches) == (own.probabilities, own.correct, 77)
    assert report.with_cases([replace(own, case_id="nobody"), lie]).cases[0] == merged
    with pytest.raises(ValueError, match="two pages of one case"):
        report.with_cases([own, own])


@pytest.mark.parametrize(
    ("value", "plain", "finer"),
    [
        (3, "3", "3"),
        (0.8125, "0.812", "0.812"),
        (-0.25, "-0.250", "-0.250"),
        (1 / 640, "0.002", "0.0016"),
        (0.0000421, "<0.001", "<0.0001"),
        (-0.0001, ">-0.001", "-0.0001"),
        (-0.00001, ">-0.001", ">-0.0001"),
        (0.0, "0.000", "0.000"),
        (float("nan"), "–", "–"),
    ],
)
def test_numbers_have_the_same_decimals(value: float, plain: str, finer: str) -> None:
    assert (digits(value), fine(value)) == (plain, finer)


def test_changes_have_a_sign_unless_there_is_none() -> None:
    values = (0.25, -0.0123, -0.0001, 0.0, float("nan"))
    assert [signed(value) for value in values] == ["+0.250", "-0.012", "0.000", "0.000", "–"]


def test_tables_link_cases_and_mark_what_is_missing(report: Report) -> None:
    table = Table(
        "A table", ("case", "p", ""), ((CaseLink("a b"), 0.25, None), (CaseLink("<i>"), None, "&"))
    )
    made = render(replace(report, sections=(Section("extra", "Extra", tables=(table,)),), cases=()))
    assert '<a href="#case=a%20b">a b</a>' in made
    assert '<a href="#case=%3Ci%3E">&lt;i&gt;</a>' in made
    assert '<th scope="col" class="number">p</th>' in made
    assert '<td class="number">–</td>' in made


def test_what_is_no_svg_is_not_shown_unescaped(report: Report) -> None:
    page = replace(report.cases[0], charts=("<script>alert(1)</script>",))
    with pytest.raises(ValueError, match="must be SVG"):
        render(replace(report, cases=(page,)))


@pytest.mark.parametrize("classes", [2, 3])
def test_curves_say_the_numbers_of_the_metrics(classes: int) -> None:
    names = ("a", "b", "<c>")[:classes]
    found = scores([str(i) for i in range(40)], classes, seed=3)
    metrics = evaluate(found.labels, found.probabilities, names, resamples=0)
    (roc_chart,), (pr_chart,) = roc_charts([found], names), precision_recall_charts([found], names)
    shown = [float(value) for value in re.findall(r"AUC ([\d.]+)</text>", roc_chart.svg)]
    assert np.mean(shown) == pytest.approx(metrics.auc.value, abs=0.001)
    shown = [float(value) for value in re.findall(r"AP ([\d.]+)</text>", pr_chart.svg)]
    assert np.mean(shown) == pytest.approx(metrics.average_precision.value, abs=0.001)
    assert len(shown) == (1 if classes == 2 else 3)
    assert "<c>" not in roc_chart.svg + pr_chart.svg


def test_the_area_below_the_precision_recall_steps_is_the_average_precision() -> None:
    rng = np.random.default_rng(5)
    positive, score = rng.random(50) < 0.4, rng.integers(0, 12, 50) / 12
    recall, precision = precision_recall(positive, score)
    area = float((np.diff(recall) * precision[1:]).sum())
    assert area == pytest.approx(average_precision_score(positive, score))


def test_the_calibration_bins_add_up_to_the_ece() -> None:
    found = scores([str(i) for i in range(60)], seed=4)
    count, mean, right = reliability(found)
    metrics = evaluate(found.labels, found.probabilities, NAMES, resamples=0)
    assert (count * np.abs(right - mean)).sum() / 60 == pytest.approx(metrics.ece.value)
    svg = calibration_chart([found], {"": ": ECE 0.123"}).svg
    bars = [int(value) for value in re.findall(r'font-size="10"[^>]*>(\d+)</text>', svg)]
    assert bars == count[count > 0].tolist()
    assert "ECE 0.123" in svg


def test_one_class_alone_gives_a_note_in_place_of_a_curve() -> None:
    labels, p = np.zeros(4, np.int64), np.tile([0.7, 0.3], (4, 1))
    only = Scores("", labels, p, p.argmax(axis=1))
    for chart in (*roc_charts([only], NAMES), *precision_recall_charts([only], NAMES)):
        assert chart.svg == ""
        assert chart.note == "There is no curve: every test case is of class benign, and a curve needs two."
    assert "4 of 4" not in confusion_chart([[4, 0], [0, 0]], NAMES).svg
    assert "–</text>" in confusion_chart([[4, 0], [0, 0]], NAMES).svg  # no share of a class without cases


def test_many_seeds_are_grey_and_the_ensemble_stands_out() -> None:
    every = [replace(scores(PLAIN, seed=k), name=f"seed {k}") for k in range(9)]
    (chart,) = roc_charts([*every, replace(every[0], name="ensemble", bold=True)], NAMES)
    assert "9 seeds: AUC " in chart.svg
    assert "ensemble: AUC " in chart.svg
    assert "seed 3" not in re.sub(r'aria-label="[^"]*"|<title>.*?</title>', "", chart.svg)


@pytest.mark.parametrize("threshold", [None, 0.15])
def test_a_deviation_chart_says_of_every_case_how_far_it_is_from_right(threshold: float | None) -> None:
    ids = [f"<{i}>" for i in range(12)]
    found = scores(ids, seed=2)
    called = found.called if threshold is None else (found.probabilities[:, 1] >= threshold).astype(int)
    chart = deviation_chart(ids, found.labels, found.probabilities, called, NAMES, threshold)
    for i, case in enumerate(ids):
        off = 1 - found.probabilities[i, found.labels[i]]
        said = (
            f"case {escape(case)}: {NAMES[found.labels[i]]}, called {NAMES[called[i]]}, 1 − p = {off:.3f}"
        )
        assert f"<title>{said}</title>" in chart.svg
    wrong = int((called != found.labels).sum())
    assert 0 < wrong < 12
    assert chart.svg.count("M-5 -5L5 5") == 1  # the cross of the legend
    assert chart.svg.count("<path") == wrong + 1
    mine = [int((called != found.labels)[found.labels == c].sum()) for c in (0, 1)]
    assert [
        f"benign: {mine[0]} of 6 wrong" in chart.svg,
        f"high_grade: {mine[1]} of 6 wrong" in chart.svg,
    ] == [True] * 2


def test_a_pair_chart_places_every_case_and_rings_those_that_one_alone_calls_right() -> None:
    a, b = np.array([0.9, 0.4, 0.2]), np.array([0.8, 0.7, 0.1])
    chart = pair_chart(["x", "y", "z"], np.array([0, 0, 0]), a, b, (a > 0.5, b > 0.5), NAMES)
    drawn = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5"', chart.svg)
    at = np.array(drawn, float)
    assert np.corrcoef(at[:, 0], a)[0, 1] == pytest.approx(1, abs=1e-4)
    assert np.corrcoef(at[:, 1], b)[0, 1] == pytest.approx(-1, abs=1e-4)  # up is less
    rings = re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="9"', chart.svg)
    assert rings == [drawn[1][0]]
    assert "one right, the other wrong: 1" in chart.svg


def test_training_curves_skip_gaps_and_mark_the_best_epoch() -> None:
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "train_cross_entropy": [100.0, 1.0, 0.01],
            "val_cross_entropy": [0.9, np.nan, 0.5],
            "val_accuracy": [0.5, 0.5, 1.0],
        }
    )
    loss, accuracy, auc = training_charts(history, best_epoch=3)
    lines = [
        points.split()
        for points in re.findall(r'<polyline points="([^"]+)"[^>]*stroke-width="2"', loss.svg)
    ]
    assert [len(points) for points in lines if len(points) > 1 and points[0][:2] != "-1"] == [3, 2]
    x, y = np.array([point.split(",") for point in lines[0]], float).T
    assert np.diff(x) == pytest.approx(np.diff(x)[0])
    assert np.diff(y) == pytest.approx(np.diff(y)[0], abs=0.2)  # ten thousandfold apart: logarithmic
    assert "best epoch: 3" in loss.svg
    assert "training" not in re.sub(r"<title>.*?</title>", "", accuracy.svg)
    assert auc.note == "The run's history has no AUC."


def test_a_chart_by_split_has_a_point_a_training_and_the_lower_median() -> None:
    chart = split_chart({0: [0.5, 0.75, 1.0, 0.6], 1: [], 2: [0.8]}, "AUC")
    assert chart.svg.count("<circle") == 5
    assert "fold 0: 0.500 to 1.000; fold 2: 0.800 to 0.800" in chart.svg
    median = re.findall(r'<polyline points="([\d.]+),([\d.]+) [^"]+"[^>]*stroke-width="2.4"', chart.svg)
    points = [float(y) for y in re.findall(r'cy="([\d.]+)"', chart.svg)]
    assert float(median[0][1]) == sorted(points[:4], reverse=True)[1]
    assert split_chart({0: []}, "AUC").note == "AUC is undefined in every training."


def test_every_case_of_a_stability_chart_leads_to_its_page_and_charts_stay_small() -> None:
    cases = [CaseSpread(f"case {i}", i % 2, (0.2, 0.4, 0.9), i % 3) for i in range(100)]
    chart = stability_chart(cases, NAMES)
    assert chart.wide
    assert chart.svg.count("<a href=") == 100
    assert '<a href="#case=case%2042" tabindex="-1">' in chart.svg
    assert "wrong in every training: 34" in chart.svg
    assert len(chart.svg) < 80_000


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.5, 19.5, False, [5, 10, 15]),
        (0.003, 0.8, True, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert round_ticks(low, high, log=log) == pytest.approx(expected)
