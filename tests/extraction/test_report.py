"""What an extraction says it did: one run, one share, and all shares together."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import ConfigError, ImageError
from featstore.extraction import ExtractionReport, Plan, Progress, report_files, utilisation
from featstore.extraction.merged_report import MergedReport, running_seconds
from featstore.extraction.plan import not_in_store
from featstore.extraction.report_files import merge_reports, save_report, withdraw_report
from featstore.extraction.shards import Shard
from featstore.extraction.utilisation import GpuSampler
from featstore.project import extract_project
from featstore.settings import Layers
from featstore.store import Store
from featstore.strict_yaml import read_file
from heads.config import Config
from tests import helpers
from tests.extraction.conftest import make_project

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def report(share: int = 0, count: int = 1, done: int = 10, **fields: Any) -> ExtractionReport:
    """A report of a share that took ten seconds, five of them in forward passes."""
    none = pd.DataFrame(columns=["case_id", "stain", "slice_id", "patch", "path"])
    plan = Plan(none, done, 0, 0, none, 0, none, [], np.zeros(0, np.int64))
    progress = Progress(
        total=done,
        done=done,
        forward=5.0,
        waited_for_decoding=3.0,
        waited_for_writing=1.0,
        reading=0.5,
        decoding=20.0,
        writing=2.5,
        busy=5.0,
        converted=Counter({"palette": 2}) if done else Counter(),
    )
    whole = ExtractionReport(
        plan=plan,
        progress=progress,
        committed=done,
        refreshed=0,
        pruned=0,
        seconds=10.0,
        settings={"device": "cpu", "compute_dtype": "bfloat16", "batch_size": 16, "batch_size_halved": 0},
        weights_ignored=(),
        interrupted=None,
        shard=Shard(share, count),
        fingerprint="f",
        provenance={"run": run_name(share, fields.get("started", NOON)), "machine": "m"},
        not_in_store={},
        started=NOON,
        finished=NOON + timedelta(seconds=10),
    )
    return replace(whole, **fields)


def run_name(share: int, started: datetime) -> str:
    return f"{started:%Y%m%dT%H%M%SZ}_{share:08x}"


def with_skipped(found: ExtractionReport, *paths: str) -> ExtractionReport:
    return replace(found, plan=replace(found.plan, skipped=[(path, "truncated") for path in paths]))


def at(second: float) -> datetime:
    return NOON + timedelta(seconds=second)


def test_a_report_says_where_the_time_went() -> None:
    text = report().to_text()
    assert "10 patches embedded and committed in 10.0 s (1 patches/s, bound by backbone" in text
    assert "50% forward, 30% waiting for decoding, 10% waiting for the writer" in text
    assert "reading 0.5 s, decoding 20.0 s, writing 2.5 s" in text
    assert "2 patches converted: palette" in text
    body = report().to_json()
    times = {name: body[f"seconds_{name}"] for name in ("reading", "decoding", "forward", "writing")}
    assert times == {"reading": 0.5, "decoding": 20.0, "forward": 5.0, "writing": 2.5}
    assert body["provenance"] == {"run": run_name(0, NOON), "machine": "m"}


@pytest.mark.parametrize(
    ("device", "samples", "expected"),
    [("cpu", (), 0.5), ("cuda:1", (0.5, 1.0), 0.75), ("cuda", (), None)],
)
def test_utilisation_is_time_in_forward_passes_or_what_the_driver_says(
    device: str, samples: tuple[float, ...], expected: float | None
) -> None:
    settings = {**report().settings, "device": device}
    progress = replace(report().progress, busy=5.0 if device == "cpu" else None)
    found = report(settings=settings, gpu_samples=samples, progress=progress)
    assert found.to_json()["device_utilisation"] == expected
    assert ("the GPU was busy 75% of the time" in found.to_text()) == bool(samples)


@pytest.mark.parametrize(
    ("not_in_store", "interrupted", "says"),
    [
        ({}, None, "share 1/4 done; all patches of the other shares are in the store"),
        (
            {0: 1200, 1: 7, 3: 34},
            None,
            "share 1/4 done; 1,234 patches of other shares are not in the store",
        ),
        ({2: 5}, 15, "share 1/4 not done; 5 patches of other shares are not in the store yet"),
    ],
)
def test_a_share_says_what_is_still_missing(
    not_in_store: dict[int, int], interrupted: int | None, says: str
) -> None:
    found = report(1, 4, not_in_store=not_in_store, interrupted=interrupted)
    assert says in found.to_text()
    assert says not in replace(found, shard=Shard()).to_text()
    assert found.to_json()["not_in_store"] == sum(not_in_store.values())


def test_the_last_share_to_end_reports_for_all(tmp_path: Path) -> None:
    assert save_report(with_skipped(report(1, 3, 20), "b.png"), tmp_path) is None
    assert save_report(report(0, 3, started=at(5), finished=at(15)), tmp_path) is None
    assert merge_reports(tmp_path).missing == [2]
    last = with_skipped(report(2, 3, 30, started=at(90), finished=at(100)), "a.png", "c.png")
    merged = save_report(last, tmp_path)
    assert merged is not None
    assert merged.is_complete
    body = merged.to_json()
    assert body == json.loads((tmp_path / "report_all_of_3.json").read_text())
    # From 0 s to 15 s and from 90 s to 100 s.
    assert (body["committed"], body["seconds_elapsed"], body["patches_per_second"]) == (60, 25.0, 2.4)
    assert (body["started"], body["finished"]) == (
        "2030-01-01T12:00:00.000+00:00",
        at(100).isoformat("T", "milliseconds"),
    )
    assert (body["seconds_forward"], body["seconds_of_all_shares"]) == (15.0, 30.0)
    assert (body["converted"], body["device_utilisation"]) == ({"palette": 6}, 0.5)
    assert [item["path"] for item in body["skipped"]] == ["b.png", "a.png", "c.png"]
    assert body["runs"]["2"]["provenance"]["run"] == run_name(2, at(90))
    text = replace(last, merged=merged).to_text()
    assert "3 of 3 shares have reported: 60 patches embedded and committed in 25.0 s (2 patches/s" in text
    assert "from 2030-01-01 12:00:00 to 2030-01-01 12:01:40 UTC; for 75.0 s of that time no share" in text
    assert "every patch of the folder is in the store" in text
    assert "share 2/3 done\n" in text


INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), min_size=1, max_size=8)


@given(INTERVALS, st.randoms())
def test_time_counts_once_while_any_run_is_under_way(lengths: list[tuple[int, int]], random: Any) -> None:
    intervals = [(at(start), at(start + length)) for start, length in lengths]
    found = running_seconds(intervals)
    assert found == len({second for start, length in lengths for second in range(start, start + length)})
    assert max(end - start for start, end in intervals).total_seconds() <= found
    assert found <= (max(end for _, end in intervals) - min(intervals)[0]).total_seconds()
    random.shuffle(intervals)
    assert running_seconds(intervals) == found


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-5, 15)), min_size=1, max_size=5))
def test_a_clock_that_was_set_back_takes_no_time_away(lengths: list[tuple[int, int]]) -> None:
    intervals = [(at(start), at(start + length)) for start, length in lengths]
    forwards = [(start, end) for start, end in intervals if start <= end]
    assert running_seconds(intervals) == running_seconds(forwards)
    reports = {i: report(i, 9, started=a, finished=b).to_json() for i, (a, b) in enumerate(intervals)}
    merged = MergedReport(9, reports, [])
    assert merged.span is not None
    assert merged.elapsed <= (merged.span[1] - merged.span[0]).total_seconds()
    assert "9 shares have reported" in merged.to_text()


def test_shares_without_a_pause_need_no_dates(tmp_path: Path) -> None:
    save_report(report(0, 2), tmp_path)
    merged = save_report(report(1, 2, started=at(11), finished=at(22)), tmp_path)
    assert merged is not None
    assert merged.elapsed == 21
    assert "UTC" not in merged.to_text()


def test_a_share_that_runs_again_has_no_report_until_it_ends(tmp_path: Path) -> None:
    for share in range(2):
        save_report(report(share, 2), tmp_path)
    withdraw_report(Shard(1, 2), tmp_path)
    assert merge_reports(tmp_path).missing == [1]
    assert not (tmp_path / "report_all_of_2.json").exists()
    assert "no report yet: share 1" in merge_reports(tmp_path).to_text()


def test_an_interrupted_share_is_told(tmp_path: Path) -> None:
    save_report(report(0, 2, interrupted=15), tmp_path)
    merged = save_report(report(1, 2, not_in_store={0: 3}), tmp_path)
    assert merged is not None
    assert not merged.is_complete
    assert "interrupted: share 0" in merged.to_text()
    assert "3 patches are not in the store (3 of share 0)" in merged.to_text()


def test_what_a_later_share_finds_missing_counts_and_what_an_earlier_one_saw_does_not(
    tmp_path: Path,
) -> None:
    # Share 1 ran first and saw nothing of the others; files of share 0 came after that had run; share
    # 2, which began before they came, ended last.
    save_report(report(1, 3, not_in_store={0: 10, 2: 30}, finished=at(10)), tmp_path)
    save_report(report(0, 3, not_in_store={0: 1, 2: 30}, finished=at(20)), tmp_path)
    save_report(report(1, 3, not_in_store={0: 6, 2: 30}, started=at(30), finished=at(40)), tmp_path)
    save_report(report(2, 3, not_in_store={0: 1}, started=at(5), finished=at(50)), tmp_path)
    merged = merge_reports(tmp_path, 3)
    assert merged.not_in_store == {0: 6}
    assert "6 patches are not in the store (6 of share 0); run these shares again" in merged.to_text()


@pytest.mark.parametrize(
    ("lacking", "left", "says"),
    [
        ({0: 1}, {}, "every patch of the folder is in the store but for the 1 file that was skipped"),
        (
            {0: 1, 1: 2},
            {},
            "every patch of the folder is in the store but for the 3 files that were skipped",
        ),
        ({1: 1}, {}, "every patch of the folder is in the store but for the 1 file that was skipped"),
        ({}, {}, "every patch of the folder is in the store\n"),  # they replaced files that it has
        ({0: 5, 1: 2}, {0: 4}, "4 patches are not in the store (4 of share 0), besides 3 files that were"),
        ({2: 2}, {2: 2}, "2 patches are not in the store (2 of share 2); run these shares again"),
    ],
)
def test_skipped_files_are_not_told_to_be_run_again(
    tmp_path: Path, lacking: dict[int, int], left: dict[int, int], says: str
) -> None:
    save_report(with_skipped(report(0, 3), "a.png"), tmp_path)
    save_report(with_skipped(report(1, 3), "b.png", "c.png"), tmp_path)
    last = report(2, 3, not_in_store=lacking)
    merged = save_report(last, tmp_path)
    assert merged is not None
    assert says in merged.to_text() + "\n"
    assert "3 files skipped, listed in" in merged.to_text()
    assert "share 2/3 done\n" in replace(last, merged=merged).to_text()
    body = merged.to_json()
    assert (body["not_in_store"], body["left_to_do"]) == (sum(lacking.values()), sum(left.values()))
    for name, expected in (("not_in_store", lacking), ("left_to_do", left)):
        assert body[f"{name}_by_share"] == {str(share): n for share, n in expected.items()}


COUNTS = st.dictionaries(st.integers(0, 3), st.integers(0, 4), max_size=4)


@given(COUNTS, COUNTS)
def test_what_is_left_and_what_is_skipped_are_what_is_missing(
    lacking: dict[int, int], skipped: dict[int, int]
) -> None:
    reports = {
        share: with_skipped(
            report(share, 4, not_in_store=lacking),
            *(f"{share}_{i}.png" for i in range(skipped.get(share, 0))),
        ).to_json()
        for share in range(3)  # the last one has not ended
    }
    merged = MergedReport(4, reports, [])
    assert merged.not_in_store == {share: n for share, n in lacking.items() if n}
    for share, number in lacking.items():
        known = skipped.get(share, 0) if share < 3 else 0
        assert merged.left_to_do.get(share, 0) == max(0, number - known)
    assert set(merged.left_to_do) <= set(merged.not_in_store)


def test_who_looked_before_a_share_had_ended_does_not_know_what_it_left_out(tmp_path: Path) -> None:
    # Share 0 looked from 10 s to 30 s, and share 1 committed its last patches at 20 s.
    save_report(report(0, 2, not_in_store={1: 5}, finished=at(30)), tmp_path)
    merged = save_report(report(1, 2, started=at(12), finished=at(25)), tmp_path)
    assert merged is not None
    assert merged.not_in_store == {}


def change(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | fields).encode()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "not JSON"),
        (lambda data: data[:-30], "not JSON"),
        (lambda data: b"\xff\xfe", "not JSON"),
        (lambda data: b"[1]", "not a featstore extraction report"),
        (lambda data: b"[" * 100_000, "recursion"),
        (change(format="featstore extraction report 2"), "not a featstore extraction report"),
        (change(shard="0/3"), "the report of share 0/3"),
        (change(seconds="long"), "other things"),
        (change(committed=-1), "other things"),
        (change(seconds=float("nan")), "other things"),
        (change(seconds=10**14), "other things"),
        (change(seconds_forward=10**400), "other things"),
        (change(interrupted=0), "other things"),
        (change(skipped=[{"path": 1, "reason": ""}]), "other things"),
        (change(skipped=[{"path": ""}]), "reason"),
        (change(started="yesterday"), "Invalid isoformat"),
        (change(started="2030-01-01T00:00:00"), "other things"),
        (change(started="0001-01-01T00:00:00+14:00"), "other things"),
        (change(provenance={"run": 1}), "other things"),
        (change(converted=[1]), "items|values"),
        (change(fingerprint="another"), "another make"),
    ],
)
def test_a_report_that_cannot_be_used_is_told(
    tmp_path: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    for share in range(3):
        save_report(report(share, 3, finished=at(10 + share)), tmp_path)
    path = tmp_path / "report_1_of_3.json"
    path.write_bytes(damage(path.read_bytes()))
    merged = merge_reports(tmp_path)
    ((name, reason),) = merged.troubles
    assert name == path.name
    assert any(words in reason for words in says.split("|")), reason
    assert merged.missing == [1]
    assert merged.to_json()["committed"] == 20
    assert f"not used: {path.name}" in merged.to_text()


def test_other_files_and_other_arrays_are_no_reports_of_this_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no report of a share"):
        merge_reports(tmp_path)
    for name in ("report_x_of_2.json", "report_all_of_2.json", "report_01_of_2.json", "report.json"):
        (tmp_path / name).write_text("?")
    save_report(report(0, 3), tmp_path)
    save_report(report(1, 2, finished=at(99)), tmp_path)
    assert (merge_reports(tmp_path).count, merge_reports(tmp_path).missing) == (2, [0])
    assert merge_reports(tmp_path, 3).missing == [1, 2]
    assert merge_reports(tmp_path, 3).troubles == []
    (tmp_path / "report_5_of_2.json").write_text(json.dumps(report(5, 2).to_json()))
    assert merge_reports(tmp_path, 2).troubles == [("report_5_of_2.json", "it is the report of share 5/2")]


def test_only_the_last_share_to_end_reads_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(report_files, "merge_reports", lambda *arguments: pytest.fail("reports were read"))
        for share in (2, 0):
            assert save_report(report(share, 3), tmp_path) is None
    assert save_report(report(1, 3), tmp_path) is not None


@given(st.permutations(range(4)), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_the_order_of_ends_changes_no_sum(order: list[int], done: list[int]) -> None:
    with TemporaryDirectory() as folder:
        results = [save_report(report(share, 4, done[share]), Path(folder)) for share in order]
        assert [found is not None for found in results] == [False] * 3 + [True]
        assert results[3] is not None
        assert results[3].to_json()["committed"] == sum(done)


def test_a_folder_whose_name_is_no_unicode_can_be_reported(tmp_path: Path) -> None:
    provenance = {"run": "r", "patches_folder": "/caf\udce9"}
    save_report(report(0, 2, provenance=provenance), tmp_path)
    assert merge_reports(tmp_path).to_json()["runs"]["0"]["provenance"] == provenance


def run(
    project: Path,
    observe: Callable[[Progress], None] = lambda progress: None,
    images: dict[str, Any] | None = None,
    **settings: Any,
) -> ExtractionReport:
    layers = Layers()
    layers.add(Config, read_file(project / "featstore.yaml"), "featstore.yaml")
    layers.add(Config, {"extract": settings, "images": images or {}}, "the test")
    return extract_project(layers.build(Config), project, observe=observe)


def test_the_parts_name_the_run_whose_report_is_kept(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=2, patches=3)
    first = run(project)
    folder = project / "reports" / "extract"
    assert run(project).to_text() == "nothing left to do"
    (kept,) = (folder / "runs").iterdir()
    assert json.loads(kept.read_text()) == first.to_json()
    part = Store.open(project / "store").record("1").parts[0].name
    with h5py.File(project / "store" / "cases" / "1" / part) as file:
        provenance = json.loads(file.attrs["provenance"])
    assert provenance == json.loads(kept.read_text())["provenance"]
    assert kept.stem == provenance["run"]
    assert provenance["shard"] == "0/1"
    assert {"versions", "machine", "device"} <= set(provenance)


def test_shares_of_a_project_end_with_one_report(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=3, patches=3)
    first = run(project, shard="1/2")
    assert first.merged is None
    assert f"{18 - first.committed} patches of other shares are not in the store yet" in first.to_text()
    helpers.make_cohort(project / "patches", cases=["7"], stains=("h&e",), slices=2, patches=2)
    last = run(project, shard="0/2")
    assert "2 patches are not in the store (2 of share 1)" in last.to_text()
    assert last.to_json()["merged"]["committed"] == 20
    assert "every patch of the folder is in the store" in run(project, shard="1/2").to_text()


def test_a_share_that_fails_has_no_report_of_an_earlier_run(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=3, patches=3)
    for share in ("0/2", "1/2"):
        run(project, shard=share)
    folder = project / "reports" / "extract"
    assert merge_reports(folder).is_complete
    for path in (project / "patches").iterdir():  # headers are looked at before the work
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ImageError):
        run(project, shard="1/2")
    assert merge_reports(folder).missing == [1]


def test_patches_that_a_stored_slice_lacks_are_counted(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=2, patches=3)
    table = run(project).plan.pending[["case_id", "stain", "slice_id", "patch"]]
    more = pd.concat([table, table.iloc[[0, 5, 5]].assign(patch=[7, 8, 9])])
    shares = np.array([0] * len(table) + [1, 2, 2])
    assert not_in_store(more, shares, project / "store") == {1: 1, 2: 2}
    assert not_in_store(table, shares[: len(table)], project / "nowhere") == {0: 12}


class Answers:
    """Stands in for `torch.cuda.utilization`; ``asked`` is set after the last answer."""

    def __init__(self, *percent: float | Exception) -> None:
        self.asked = threading.Event()
        self._left = list(percent)

    def __call__(self, device: torch.device) -> float:
        answer = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        if len(self._left) == 1:
            self.asked.set()
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("device", "answers", "expected"),
    [
        ("cuda", (0, 50, 100, RuntimeError("driver lost")), [0.5, 1.0]),
        ("cuda", (ModuleNotFoundError("nvidia-ml-py"),), []),
        ("cpu", (AssertionError("asked on a CPU"),), []),
    ],
)
def test_the_driver_is_asked_while_a_gpu_computes(
    monkeypatch: pytest.MonkeyPatch, device: str, answers: tuple[Any, ...], expected: list[float]
) -> None:
    found = Answers(*answers)
    monkeypatch.setattr(torch.cuda, "utilization", found)
    with GpuSampler(torch.device(device), seconds=0.001) as sampler:
        assert len(answers) == 1 or found.asked.wait(10)
    assert sampler.samples == expected


def test_a_long_run_is_thinned_to_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "_POINTS", 8)
    found = Answers(0, *range(20), RuntimeError("driver lost"))
    monkeypatch.setattr(torch.cuda, "utilization", found)
    with GpuSampler(torch.device("cuda"), seconds=1e-5) as sampler:
        assert found.asked.wait(10)
    # 0 … 7 in pairs; these and 8 … 11 in pairs; these and 12 … 15; these and 16 … 19.
    assert sampler.samples == pytest.approx([0.065, 0.135, 0.165, 0.185])
    assert sampler.interval == pytest.approx(16e-5)
