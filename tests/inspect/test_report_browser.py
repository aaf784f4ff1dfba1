"""The report as a reader meets it, in a real browser without a network."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from featstore.cohort.names import natural_sorted
from heads.inspect.report.content import Report
from heads.inspect.report.page import anchor, write_report
from tests.inspect.browser import launched, offline, opened
from tests.inspect.reports import HOSTILE, PLAIN, make_report

pytestmark = pytest.mark.browser

IDS = natural_sorted((*HOSTILE, *PLAIN))
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """Of a desk; tests share it, and have pages of their own."""
    with offline(browser) as found:
        yield found


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, report: Report) -> Path:
    path = tmp_path_factory.mktemp("report") / "report of 50%.html"
    write_report(report, path)
    return path


@pytest.fixture
def page(context: Any, file: Path) -> Iterator[Any]:
    with opened(context, file) as found:
        yield found


def listed(page: Any) -> list[str]:
    """The ids that the table shows, from top to bottom."""
    found = page.locator("table.cases tbody tr:not([hidden])").evaluate_all(
        "rows => rows.map(r => r.dataset.case)"
    )
    return list(found)


def sort(page: Any, name: str) -> None:
    page.locator("table.cases thead button", has_text=name).first.click()


def shown(page: Any) -> list[str]:
    """The cases whose pages can be seen."""
    found = page.locator("article.case:visible").evaluate_all("all => all.map(a => a.dataset.case)")
    return list(found)


def wide(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))


SORTED: dict[str, Callable[[Any], Any]] = {
    "case": lambda case: IDS.index(case.case_id),
    "result": lambda case: case.verdict,
    "true class": lambda case: ("benign", "high_grade").index(case.true_class),
    "p(true class)": lambda case: case.probabilities[case.true_class],
    "patches": lambda case: case.patches or 10**9,  # what has none stands last
}


def until(page: Any, script: str, arg: object = None) -> None:
    """Wait until a script says true; asked from outside: by its policy the page evaluates nothing."""
    for _ in range(500):
        if page.evaluate(script, arg):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {script}")


@pytest.mark.parametrize("name", SORTED)
def test_the_table_sorts_by_every_kind_of_column(page: Any, report: Report, name: str) -> None:
    by_id = {case.case_id: case for case in report.cases}
    assert listed(page) == IDS
    if name == "case":
        sort(page, "result")  # so that the first click on it is an ascending one
    sort(page, name)
    rising = [SORTED[name](by_id[case]) for case in listed(page)]
    assert rising == sorted(rising)
    heading = page.locator("table.cases thead th", has_text=name).first
    assert heading.get_attribute("aria-sort") == "ascending"
    assert page.locator('thead th[aria-sort="ascending"]').count() == 1
    sort(page, name)
    falling = [SORTED[name](by_id[case]) for case in listed(page)]
    if name == "patches":
        assert (falling[0], falling[-1]) == (33, 10**9)
    else:
        assert falling == sorted(falling, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"


def test_sorting_by_the_keyboard(page: Any) -> None:
    page.locator("table.cases thead button").first.focus()
    page.keyboard.press("Enter")
    assert listed(page) == IDS[::-1]


def test_filters_narrow_the_table_and_say_how_many_are_left(page: Any, report: Report) -> None:
    page.get_by_label("Find").fill("SCRIPT alert")
    assert listed(page) == ["<script>alert(1)</script>", "javascript:alert(4)"]
    assert page.locator("#count").inner_text() == "2 of 15 cases"
    page.get_by_role("button", name="Show all").click()
    until(page, "document.getElementById('count').textContent === '15 of 15 cases'")
    page.locator("select[name=verdict]").select_option("wrong")
    wrong = [case for case in IDS if not {c.case_id: c for c in report.cases}[case].correct]
    assert 0 < len(wrong) < 15
    assert listed(page) == wrong
    page.locator("select[name=verdict]").select_option("")
    page.locator("select[name=class]").select_option("high_grade")
    assert len(listed(page)) == sum(case.true_class == "high_grade" for case in report.cases)


def test_next_and_previous_follow_the_table_as_it_is_sorted_and_filtered(page: Any) -> None:
    page.locator("select[name=class]").select_option("benign")
    sort(page, "p(true class)")
    order = listed(page)
    page.locator("table.cases tbody tr:not([hidden]) a").nth(1).click()
    assert shown(page) == [order[1]]
    assert page.locator("article.open .position").inner_text() == f"2 of {len(order)}"
    for key, place in (("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("k", 0), ("k", 0)):
        page.keyboard.press(key)
        until(page, "id => document.querySelector('article.open').dataset.case === id", arg=order[place])
    assert page.locator("article.open .previous").get_attribute("aria-disabled") == "true"
    page.locator("article.open .next").click()
    assert shown(page) == [order[1]]
    page.locator("article.open .previous").click()
    assert shown(page) == [order[0]]
    page.keyboard.press("Escape")
    page.wait_for_selector("#overview:visible")
    assert shown(page) == []
    assert listed(page) == order  # neither sorting nor filter is lost
    assert page.evaluate("document.activeElement.closest('tr').dataset.case") == order[0]


def test_a_case_that_the_filter_hides_has_neighbours_too(page: Any) -> None:
    page.get_by_label("Find").fill("high_grade")
    left = listed(page)
    hidden = next(case for case in IDS if case not in left and IDS.index(case) > IDS.index(left[0]))
    page.evaluate("id => { location.hash = '#case=' + encodeURIComponent(id) }", hidden)
    page.wait_for_selector("article.open")
    assert page.locator("article.open .position").inner_text() == "not in the filtered table"
    page.keyboard.press("j")
    expected = next(case for case in IDS[IDS.index(hidden) :] if case in left)
    until(page, "id => document.querySelector('article.open').dataset.case === id", arg=expected)


def test_back_title_and_scroll(page: Any) -> None:
    title = page.title()
    link = page.locator("table.cases tbody a", has_text="38")
    link.scroll_into_view_if_needed()
    before = page.evaluate("window.scrollY")
    assert before > 100
    link.click()
    assert page.title() == f"Case 38 · {title}"
    assert page.evaluate("window.scrollY") == 0
    assert page.evaluate("document.activeElement.textContent").startswith("Case 38")
    page.keyboard.press("j")
    page.go_back()
    assert shown(page) == ["38"]
    page.go_back()
    assert page.title() == title
    assert shown(page) == []
    assert page.evaluate("window.scrollY") == pytest.approx(before, abs=1)
    assert link.is_visible()


def test_keys_do_nothing_while_somebody_types_or_looks_at_a_picture(page: Any) -> None:
    page.get_by_label("Find").fill("")
    page.keyboard.type("jk")
    assert page.get_by_label("Find").input_value() == "jk"
    assert "#" not in page.url
    page.evaluate("location.hash = '#case=2'")
    page.wait_for_selector("article.open")
    page.locator("article.open button.zoom").first.click()
    page.keyboard.press("j")
    assert page.evaluate("document.getElementById('zoom').open")
    assert shown(page) == ["2"]
    page.keyboard.press("Control+k")
    page.keyboard.press("Escape")  # closes the picture, not the case
    page.evaluate(
        "() => { const field = document.createElement('input');"
        " document.querySelector('article.open').append(field); field.focus() }"
    )
    page.keyboard.type("jk")
    assert page.locator("article.open input").input_value() == "jk"
    assert not page.evaluate("document.getElementById('zoom').open")
    assert shown(page) == ["2"]


def test_a_deep_link_opens_any_case_and_its_id_is_only_text(context: Any, file: Path) -> None:
    with opened(context, file) as page:
        for place, case in enumerate(HOSTILE):
            if place < 3:
                page.goto("about:blank")  # else the fragment alone changes, and nothing is loaded
            page.goto(f"{file.as_uri()}#{anchor(case)}")
            assert shown(page) == [case]
            assert page.locator("article.open h2").inner_text().startswith(f"Case {case}")
            assert page.locator("article.open script, article.open b").count() == 0
            page.keyboard.press("Escape")
            page.wait_for_selector("#overview:visible")
            assert page.locator("table.cases tbody a", has_text=case).first.inner_text() == case


def test_a_link_that_somebody_typed_without_encoding_it(page: Any) -> None:
    page.evaluate("location.hash = '#case=Müller 東京 🔬'")
    page.wait_for_selector("article.open")
    assert shown(page) == ["Müller 東京 🔬"]
    page.evaluate("location.hash = '#case=50% & more'")  # a bare % is no encoding: no error, but no case
    page.wait_for_selector("#notice:visible")
    assert shown(page) == []


def test_a_link_to_a_case_that_is_not_there_says_so(context: Any, file: Path) -> None:
    with opened(context, file, "#case=%3Cimg%20src%3Dx%3E") as page:
        assert page.locator("#notice").inner_text() == "There is no case <img src=x> in this report."
        assert shown(page) == []
        page.evaluate("location.hash = '#training'")
        page.wait_for_selector("#notice", state="hidden")
        assert page.evaluate("window.scrollY") > 100


def test_nothing_is_wider_than_a_phone(browser: Any, file: Path) -> None:
    with (
        offline(browser, viewport=PHONE, is_mobile=True, has_touch=True) as phone,
        opened(phone, file) as page,
    ):
        assert wide(page) == PHONE["width"]
        for case in ("38", '"><img src=x onerror=alert(2)>'):
            page.evaluate("id => { location.hash = '#case=' + encodeURIComponent(id) }", case)
            until(page, "id => document.querySelector('article.open')?.dataset.case === id", arg=case)
            assert wide(page) == PHONE["width"]


LACKING = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const named = (e) => e.textContent.trim() || e.ariaLabel || e.querySelector("[alt], [aria-label]");
  return [
    ...all("img:not([alt]), img[alt='']"),
    ...all("svg[role=img]").filter((e) => !e.getAttribute("aria-label")),
    ...all("svg:not([role=img]):not([aria-hidden=true])"),
    ...all("th:not([scope])"),
    ...all("table").filter((e) => !e.tHead),
    ...all("input, select").filter((e) => !e.labels.length),
    ...all("button, a[href]").filter((e) => !named(e)),
    ...all("[role=region]:not([aria-label])"),
  ].map((e) => e.outerHTML.slice(0, 200));
}"""


def test_those_who_cannot_see_or_point_are_served(page: Any) -> None:
    lacking = page.evaluate(LACKING)
    assert lacking == []
    assert page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    duplicates = page.evaluate(
        "() => { const all = [...document.querySelectorAll('[id]')].map(e => e.id);"
        " return all.filter((id, i) => all.indexOf(id) !== i) }"
    )
    assert duplicates == []


def test_pictures_are_drawn_and_enlarged_those_shown_twice_too(page: Any) -> None:
    page.evaluate("location.hash = '#case=2'")
    page.wait_for_selector("article.open")
    pictures = page.locator("article.open .picture")
    kinds = pictures.evaluate_all("all => all.map(e => e.localName)")
    assert sorted(set(kinds)) == ["img", "svg"]
    for kind in ("img", "svg"):
        pixels = np.asarray(
            Image.open(io.BytesIO(pictures.nth(kinds.index(kind)).screenshot())).convert("L")
        )
        assert pixels.std() > 10  # tissue, not an empty box
    pictures.nth(kinds.index("svg")).click()
    enlarged = page.locator("#zoom .picture")
    assert enlarged.bounding_box()["width"] > 400
    assert page.locator("#zoom .zoom-text").inner_text() == "patch 0 of case 2"
    page.get_by_role("button", name="Close").click()
    assert not page.evaluate("document.getElementById('zoom').open")
    assert page.locator("article.open .missing").inner_text() == "the file is gone"


def test_without_scripts_everything_can_be_read(browser: Any, file: Path) -> None:
    with offline(browser, java_script_enabled=False) as plain, opened(plain, file) as page:
        assert page.locator("article.case:visible").count() == len(IDS)
        assert not page.locator(".filters").is_visible()
        link = page.locator("table.cases tbody a", has_text="38")
        assert link.get_attribute("href") == "#case=38"
        link.click()
        assert page.locator("article.case:target h2").inner_text().startswith("Case 38")
        page.locator("article.case:target .next").click()
        assert (
            page.locator("article.case:target h2")
            .inner_text()
            .startswith(f"Case {IDS[IDS.index('38') + 1]}")
        )


def test_the_page_forbids_itself_the_network(context: Any, file: Path) -> None:
    with pytest.raises(AssertionError, match="Content Security Policy"), opened(context, file) as page:
        page.evaluate(
            """() => new Promise(done => {
              document.addEventListener("securitypolicyviolation", done, { once: true });
              const image = document.createElement("img");
              image.src = "http://127.0.0.1:9/x.png";
              document.body.append(image);
            })"""
        )


@pytest.mark.parametrize("case", [None, "38"])
def test_paper_gets_the_overview_and_the_case_that_is_open(
    context: Any, file: Path, case: str | None
) -> None:
    with opened(context, file, f"#case={quote(case)}" if case else "") as page:
        page.emulate_media(media="print")
        assert page.locator("#overview").is_visible()
        assert not page.locator(".filters").is_visible()
        assert shown(page) == ([case] if case else [])
        page.emulate_media()
        assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
