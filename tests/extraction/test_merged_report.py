"""The sum of an array of shares: of all their runs, and of nothing twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.extraction import ExtractionReport
from featstore.extraction.report_files import merge_reports, save_report, withdraw_report
from featstore.extraction.shards import (
    Shard,
)
from tests.extraction.conftest import make_project
from tests.extraction.test_report import at, report, run, run_name, with_skipped


def ran(
    share: int, start: float, done: int, before: int = 0, *, count: int = 2, left: int = 0, **fields: Any
) -> ExtractionReport:
    """The report of a run of ten seconds.

    Args:
        share: Of ``count``.
        start: When it began, in seconds.
        done: How many patches it committed.
        before: How many of its share the store had when it began.
        left: How many of its share the store lacked at its end; it was interrupted if there are any.
        count: The number of shares.
        fields: Of the report.
    """
    found = report(share, count, done, started=at(start), finished=at(start + 10))
    found = replace(found, plan=replace(found.plan, done=before, new=done + left))
    left_over = {"not_in_store": {share: left} if left else {}, "interrupted": 15 if left else None}
    return replace(found, **(left_over | fields))


DAY = 86_400


def test_an_interrupted_first_run_counts_and_the_night_does_not(tmp_path: Path) -> None:
    save_report(ran(0, 0, 100), tmp_path)
    first = ran(1, 5, 60, left=40)
    save_report(replace(first, progress=replace(first.progress, busy=2.0)), tmp_path)
    assert merge_reports(tmp_path).elapsed == 15
    merged = save_report(ran(1, DAY, 40, before=60), tmp_path)
    assert merged is not None
    body = merged.to_json()
    assert (body["committed"], body["computed"], body["seconds_forward"]) == (200, 200, 15.0)
    assert (body["converted"], body["seconds_of_all_shares"]) == ({"palette": 6}, 30.0)
    assert (body["seconds_elapsed"], body["patches_per_second"]) == (25.0, 8.0)
    assert (body["seconds_of_longest_share"], body["device_utilisation"]) == (20.0, 0.4)
    # What a share's first run found: the second one's 40 new patches are among its 100.
    assert (body["new"], body["already_done"]) == (200, 0)
    assert [each["started"][:10] for each in body["earlier_runs"]["1"]] == ["2030-01-01"]
    text = merged.to_text()
    assert (
        "200 patches embedded and committed in 25.0 s (8 patches/s together; the longest share took 20"
        in text
    )
    assert "from 2030-01-01 12:00:00 to 2030-01-02 12:00:10 UTC; for 86,385.0 s of that time" in text
    assert "everything was in the store, are counted in: 1 of share 1" in text


def test_a_share_that_is_submitted_again_with_the_others_has_done_its_part(tmp_path: Path) -> None:
    save_report(ran(0, 0, 100, not_in_store={1: 40}), tmp_path)
    save_report(ran(1, -1, 60, left=40), tmp_path)
    save_report(ran(0, DAY, 0, before=100, not_in_store={1: 40}), tmp_path)
    merged = save_report(ran(1, DAY, 40, before=60), tmp_path)
    assert merged is not None
    assert (merged.total("committed"), merged.elapsed) == (200, 21)


LACKED = ran(0, 0, 7, not_in_store={1: 9})


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        pytest.param([], 60, id="nothing before"),
        pytest.param([ran(1, 1, 8, left=9, count=3)], 60, id="another count"),
        pytest.param([ran(0, 0, 7, left=9, fingerprint="g")], 60, id="another make"),
        pytest.param([ran(0, 0, 7, left=9)], 67, id="interrupted"),
        pytest.param([ran(0, 0, 7, left=9), ran(0, 20, 2, before=7, left=7)], 69, id="twice"),
        pytest.param([ran(0, 0, 7, interrupted=15)], 67, id="interrupted after the last patch"),
        pytest.param([ran(0, 0, 7, left=9), ran(1, 20, 8, count=1)], 60, id="done without --shard"),
        pytest.param([ran(0, 0, 7, left=9), ran(1, 5, 8)], 60, id="all was in the store"),
        pytest.param([ran(1, 5, 8), ran(0, 6, 7, left=9)], 60, id="begun before all was in the store"),
        pytest.param([ran(1, 5, 8), ran(0, 20, 7, left=9)], 67, id="files that came later"),
        pytest.param(
            [LACKED, with_skipped(ran(1, 5, 8, not_in_store={1: 1}), "b")], 60, id="all but skipped"
        ),
        pytest.param([LACKED, ran(1, 5, 8, not_in_store={1: 1})], 75, id="all but one"),
        pytest.param([LACKED, ran(1, 5, 8, not_in_store={0: 1})], 60, id="all but skipped now"),
        pytest.param([ran(0, 0, 17, left=1), ran(1, 0, 21, left=1)], 60, id="a store since removed"),
        pytest.param([ran(0, 0, 17, left=1), ran(1, 0, 20, left=1)], 80, id="one share's removed"),
        pytest.param([ran(0, 0, 15, left=9), ran(0, 20, 3, left=7)], 63, id="a store removed between"),
        pytest.param([ran(0, 300, 7, left=9)], 60, id="a clock that is ahead"),
    ],
)
def test_runs_since_the_store_last_had_everything_are_the_same_array(
    tmp_path: Path, before: list[ExtractionReport], expected: int
) -> None:
    for each in before:
        if each.shard.count == 1:
            each = replace(each, shard=Shard())
        save_report(each, tmp_path)
    save_report(with_skipped(ran(0, 100, 30, before=16), "a"), tmp_path)
    merged = save_report(ran(1, 101, 30, before=20), tmp_path)
    assert merged is not None
    assert merged.troubles == []
    assert merged.total("committed") == expected
    assert merged.to_json() == merge_reports(tmp_path, 2).to_json()


# Shares that run at the same time: how many patches each does at most, and in how many seconds.
WAVE = st.dictionaries(st.integers(0, 2), st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.lists(WAVE, max_size=6))
def test_all_runs_of_an_array_together_have_done_all(
    sizes: tuple[int, int, int], waves: list[dict[int, tuple[int, int]]]
) -> None:
    stored, saved = [0, 0, 0], []
    with TemporaryDirectory() as name:
        folder = Path(name)
        for number, wave in enumerate([*waves, {0: (9, 1), 1: (9, 2), 2: (9, 3)}]):
            before = list(stored)
            if number == len(waves):  # only those that have not come to their end
                known = merge_reports(folder, 3) if saved else None
                wave = {i: wave[i] for i in wave if known is None or i in known.missing + known.unfinished}
            for share in wave:
                withdraw_report(Shard(share, 3), folder)
            order = sorted(wave.items(), key=lambda item: item[1][1])
            for place, (share, (most, whole_seconds)) in enumerate(order):
                seconds = whole_seconds + place / 8  # one after another
                done = min(most, sizes[share] - stored[share])
                stored[share] += done
                lacking = {i: n - stored[i] for i, n in enumerate(sizes) if n > stored[i]}
                found = ran(share, 20 * number, done, before[share], count=3, not_in_store=lacking)
                found = replace(
                    found,
                    plan=replace(found.plan, new=sizes[share] - before[share]),
                    interrupted=15 if share in lacking else None,
                    finished=at(20 * number + seconds),
                    seconds=seconds,
                )
                save_report(found, folder)
                saved.append(found)
        merged = merge_reports(folder)
    assert stored == list(sizes)
    assert (merged.is_complete, merged.troubles, merged.left_to_do) == (True, [], {})
    # Where each share has been run once more after the store had everything, that array had nothing to do.
    whole = min(each.finished for each in saved if not each.not_in_store)
    newest = {each.shard: each for each in saved}.values()
    expected = 0 if min(each.started for each in newest) >= whole else sum(sizes)
    assert merged.total("committed") == merged.total("new") == expected
    span = max(each.finished for each in saved) - min(each.started for each in saved)
    assert merged.elapsed <= span.total_seconds()
    assert merged.elapsed >= max((each.finished - each.started).total_seconds() for each in newest)


def garble(data: bytes) -> bytes:
    return data[:-20]


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (run_name(1, at(0)), garble, "not JSON"),
        (run_name(1, at(0)), lambda data: b"[" * 100_000, "recursion"),
        (run_name(1, at(0)), lambda data: data.replace(b'"1/2"', b'"2/2"'), "the report of share 2/2"),
        (run_name(1, at(0)), lambda data: data.replace(b'"1/2"', b"12"), "the report of share 12"),
        (run_name(1, at(0)), lambda data: data.replace(b'"committed": 60', b'"committed": "60"'), "other"),
        (run_name(1, at(0)), lambda data: data.replace(b'"vanished"', b'"gone"'), "vanished"),
        (run_name(9, at(0)), lambda data: data, "the report of another run"),
        ("copy of " + run_name(1, at(0)), lambda data: data, "its name is not a run's"),
    ],
)
def test_damaged_and_foreign_files_among_the_runs_are_named(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], says: str
) -> None:
    save_report(ran(1, 0, 60, left=40), tmp_path)
    kept = tmp_path / "runs" / f"{run_name(1, at(0))}.json"
    data = kept.read_bytes()
    kept.unlink()
    (kept.parent / f"{name}.json").write_bytes(damage(data))
    (kept.parent / ".0123.tmp").write_bytes(b"")
    (kept.parent / f"._{name}.json").write_bytes(b"")
    (kept.parent / "notes.txt").write_bytes(b"")
    save_report(ran(0, DAY, 100), tmp_path)
    merged = save_report(ran(1, DAY, 40, before=60), tmp_path)
    assert merged is not None
    ((file, reason),) = merged.troubles
    assert (file, merged.total("committed")) == (f"runs/{name}.json", 140)
    assert says in reason
    assert f"not used: {file}" in merged.to_text()


def test_a_folder_of_runs_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    save_report(ran(0, 0, 0), tmp_path)
    assert merge_reports(tmp_path).troubles == []  # it is made by the first run that does something
    (tmp_path / "runs").write_text("")
    assert merge_reports(tmp_path).troubles[0][0] == "runs"


def test_files_of_runs_before_the_array_stay_closed(tmp_path: Path) -> None:
    save_report(ran(0, 0, 100), tmp_path)
    for month in range(1, 10):
        (tmp_path / "runs" / f"2029{month:02}01T000000Z_00000000.json").write_text("?")
    save_report(ran(1, DAY, 30, before=60), tmp_path)
    merged = save_report(ran(0, DAY, 0, before=100), tmp_path)
    assert merged is not None
    assert (merged.total("committed"), merged.troubles) == (30, [])
    # Nor is one read again that a share's own report says already.
    (tmp_path / "runs" / f"{run_name(1, at(DAY))}.json").write_text("?")
    assert merge_reports(tmp_path).troubles == []
    (tmp_path / "runs" / f"{run_name(0, at(0))}.json").unlink()  # what says where the array begins
    merged = merge_reports(tmp_path)
    assert len(merged.troubles) == 9
    assert merged.to_text().count("not used: runs/") == 8
    assert "not used: 1 more" in merged.to_text()


def test_a_share_that_is_stopped_and_goes_on_is_counted_whole(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=3, stains=("h&e",), slices=4, patches=4)
    asked: list[int] = []

    def stop_soon(progress: Any) -> None:
        asked.append(progress.done)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGTERM)

    first = run(project, stop_soon, shard="1/2")
    assert first.interrupted == signal.SIGTERM
    other = run(project, shard="0/2")
    assert other.merged is not None
    assert "interrupted: share 1" in other.to_text()
    last = run(project, shard="1/2")
    assert min(first.committed, last.committed) > 0
    body = last.to_json()["merged"]
    assert (body["committed"], body["new"], body["left_to_do"]) == (48, 48, 0)
    assert set(body["earlier_runs"]) == {"1"}


def test_files_that_are_skipped_for_good_do_not_call_for_another_run(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=3, patches=3)
    for path in sorted((project / "patches").iterdir())[::5]:
        path.write_bytes(path.read_bytes()[:-200])
    for _ in range(2):
        texts = [
            run(project, shard=f"{share}/2", images={"on_bad_image": "skip"}).to_text() for share in (0, 1)
        ]
    assert "every patch of the folder is in the store but for the 4 files that were skipped" in texts[1]
    assert "share 1/2 done\n" in texts[1]
    body = json.loads((project / "reports" / "extract" / "report_all_of_2.json").read_text())
    assert (body["not_in_store"], body["left_to_do"], len(body["skipped"])) == (4, 0, 4)
    (project / "patches" / body["skipped"][0]["path"]).unlink()
    again = run(project, shard="0/2", images={"on_bad_image": "skip"}).to_json()["merged"]
    assert (again["not_in_store"], again["left_to_do"]) == (3, 0)
