"""Reports on the disk: one a run, one a share, and one of all shares together."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from featstore.cohort.tables import write_csv
from featstore.errors import ConfigError
from featstore.extraction.merged_report import (
    DONE,
    PLANNED,
    TIMES,
    WHEN,
    MergedReport,
    count_skipped,
    finished,
    started,
)
from featstore.extraction.report import FORMAT, ExtractionReport
from featstore.extraction.shards import Shard
from featstore.files import replacing

RUNS = "runs"
_NAME = re.compile(r"report_(0|[1-9][0-9]{0,8})_of_([1-9][0-9]{0,8})\.json")
_SHARE = re.compile(r"(0|[1-9][0-9]{0,8})/([1-9][0-9]{0,8})")
# The time at which a run began, so that the newest come last, and something unique.
_RUN = re.compile(r"[0-9]{8}T[0-9]{6}Z_[0-9a-f]{8}\.json")
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def save_report(report: ExtractionReport, folder: Path) -> MergedReport | None:
    """Write a run's report, its lists of files and, if it is the last of its array, that of all shares.

    Args:
        report: What was done.
        folder: Made where missing.

    Returns:
        The report of all shares, once each of them has written its own; None before that, and
        where there is one share.
    """
    suffix = _suffix(report.shard)
    folder.mkdir(parents=True, exist_ok=True)
    body = report.to_json()
    if report.progress.done or report.refreshed or report.pruned:
        # `report.json` is the newest run's, which may have had nothing to do. These stay: the parts
        # of the store name the run that has made them.
        (folder / RUNS).mkdir(exist_ok=True)
        _write(folder / RUNS / f"{report.provenance['run']}.json", body)
    write_csv(folder / f"skipped{suffix}.csv", ["path", "reason"], report.skipped)
    columns = ["case_id", "stain", "slice_id", "patch", "path"]
    vanished = report.plan.vanished[columns].itertuples(index=False)
    write_csv(folder / f"vanished{suffix}.csv", columns, [tuple(row) for row in vanished])
    # Last, since it says that the share has come to its end.
    _write(folder / f"report{suffix}.json", body)
    # An array of N shares would read N² reports if each of them read all that there are.
    if report.shard.count == 1 or not _all_have_ended(report.shard.count, folder):
        return None
    merged = merge_reports(folder, report.shard.count)
    if merged.missing:
        return None
    # Two shares that end together both find all reports, and write the same.
    _write(_merged_path(folder, merged.count), merged.to_json())
    return merged


def withdraw_report(shard: Shard, folder: Path) -> None:
    """Remove a share's report of an earlier run, so that a share that is killed has none."""
    (folder / f"report{_suffix(shard)}.json").unlink(missing_ok=True)
    _merged_path(folder, shard.count).unlink(missing_ok=True)


def merge_reports(folder: Path, count: int | None = None) -> MergedReport:
    """Sum the reports of an array's shares, and of their earlier runs of the same array.

    Args:
        folder: ``reports/extract`` of a project.
        count: The number of shares N; None: that of the newest report.

    Returns:
        The sum. Files that cannot be used are listed in it; their shares count as missing.

    Raises:
        ConfigError: There is no report of a share here.
    """
    good: dict[tuple[int, int], dict[str, Any]] = {}
    bad: list[tuple[int, str, str]] = []
    for path in sorted(folder.glob("report_*_of_*.json")):
        name = _NAME.fullmatch(path.name)
        if name is None or (count is not None and int(name[2]) != count):
            continue
        shard = Shard(int(name[1]), int(name[2]))
        try:
            good[shard.count, shard.index] = _read(path, shard)[0]
        except _UNUSABLE as error:
            bad.append((shard.count, path.name, str(error) or "not a report"))
    if not good and not bad:
        raise ConfigError(
            "there is no report of a share here",
            expected="report_0_of_N.json …, which `featstore extract --shard I/N` writes at its end",
            where=str(folder),
            fix="wait until a share has ended",
        )
    newest = max(good, key=lambda key: finished(good[key]), default=None)
    if count is None:
        count = newest[0] if newest is not None else bad[0][0]
    troubles = [(name, reason) for of, name, reason in bad if of == count]
    reports = {}
    for (of, share), report in sorted(good.items()):
        if of != count:
            continue
        if newest is not None and report["fingerprint"] != good[newest]["fingerprint"]:
            troubles.append((f"report_{share}_of_{of}.json", "its embeddings are of another make"))
        else:
            reports[share] = report
    earlier, more = _earlier_runs(folder / RUNS, count, reports) if reports else ({}, [])
    return MergedReport(count, reports, troubles + more, earlier)


def _earlier_runs(
    folder: Path, count: int, reports: dict[int, dict[str, Any]]
) -> tuple[dict[int, list[dict[str, Any]]], list[tuple[str, str]]]:
    """The runs of an array that came before the newest one of each share.

    An array is submitted again, in whole or in part, until the store has every patch. So the same array
    are all runs with this count and fingerprint that began after the store last had everything, before
    the newest reports: after a run of whatever share that left nothing to do. (No scheduler's number
    says it, since an array that is submitted again has another one. Nor does the share's own end: the
    share that was done on the first day has nothing to do on the second, and still has done its part.)

    Read from the newest back to that run, so that the files of months ago stay closed.

    Args:
        folder: ``reports/extract/runs``; need not be there.
        count: The number of shares N.
        reports: By share, its newest report; not empty.

    Returns:
        By share, its earlier runs, oldest first, and (file, reason) of what could not be used.
    """
    began = min(started(report) for report in reports.values())
    newest = next(iter(reports.values()))
    counted = {report["provenance"]["run"] for report in reports.values()}
    skipped = {str(share): count_skipped(report) for share, report in reports.items()}
    found: dict[int, list[dict[str, Any]]] = {}
    names, troubles = _names_of_runs(folder)
    whole = None
    for name in names:
        if name.removesuffix(".json") in counted:
            continue
        try:
            run, shard = _read(folder / name)
            if f"{run['provenance']['run']}.json" != name:
                raise ValueError("it is the report of another run")
        except _UNUSABLE as error:
            troubles.append((f"{RUNS}/{name}", str(error) or "not a report"))
            continue
        if run["fingerprint"] != newest["fingerprint"]:
            continue
        known = {**(skipped if shard.count == count else {}), str(shard.index): count_skipped(run)}
        if finished(run) <= began and _left_nothing(run, known):
            whole = finished(run)
            break
        if shard.count == count and shard.index in reports:
            found.setdefault(shard.index, []).append(run)
    earlier = {}
    for share in sorted(found):
        runs = [run for run in found[share] if whole is None or started(run) >= whole]
        if chain := _same_store(runs, reports[share]):
            earlier[share] = chain
    return earlier, troubles


def _names_of_runs(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The names of the runs' reports, the newest first, and (file, reason) of what has another name."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".json") and name[0] != "."]
    except FileNotFoundError:  # no run has done anything yet
        return [], []
    except OSError as error:
        return [], [(RUNS, str(error))]
    strange = sorted(name for name in names if not _RUN.fullmatch(name))
    names = sorted(filter(_RUN.fullmatch, names), reverse=True)
    return names, [(f"{RUNS}/{name}", "its name is not a run's") for name in strange]


def _left_nothing(run: dict[str, Any], skipped: dict[str, int]) -> bool:
    """Whether the store had all of the folder at a run's end, but for so many files of each share."""
    lacking = run["not_in_store_by_share"].items()
    return not run["interrupted"] and all(n <= skipped.get(share, 0) for share, n in lacking)


def _same_store(runs: list[dict[str, Any]], newest: dict[str, Any]) -> list[dict[str, Any]]:
    """Those runs of a share whose embeddings its next run has found, oldest first.

    The others committed to a store that was removed since: what they did was done again.
    """
    later, chain = newest, []
    for run in sorted(runs, key=started, reverse=True):
        if started(run) >= started(newest):
            continue
        if later["already_done"] + later["changed"] + later["vanished"] < run["committed"]:
            break
        chain.append(run)
        later = run
    return chain[::-1]


def _read(path: Path, expected: Shard | None = None) -> tuple[dict[str, Any], Shard]:
    """A run's report, and the share that it was.

    Args:
        path: The file.
        expected: The share that its name tells, if it tells one.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is none, or another share's.
    """
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError("it is not JSON in UTF-8: cut short or overwritten") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"it is not a {FORMAT}")
    name = _SHARE.fullmatch(str(body.get("shard")))
    shard = None if name is None else Shard(int(name[1]), int(name[2]))
    if shard is None or shard.index >= shard.count or (expected is not None and shard != expected):
        raise ValueError(f"it is the report of share {body.get('shard')}")
    used = body["device_utilisation"]
    numbers = [body[name] for name in (*DONE, *PLANNED, *TIMES, "vanished", "seconds")]
    numbers += [0 if used is None else used, *body["converted"].values()]
    numbers += body["not_in_store_by_share"].values()
    texts = [body["fingerprint"], body["provenance"]["run"]]
    texts += [item[key] for item in body["skipped"] for key in ("path", "reason")]
    known = all(type(t) is str for t in texts)
    known &= all(type(n) in (int, float) and 0 <= n < 1e15 for n in numbers)
    times = [datetime.fromisoformat(body[name]) for name in WHEN]
    known = known and body["seconds"] < 1e10
    known &= all(t.tzinfo is not None and 2000 <= t.year < 9000 for t in times)
    if not known or type(body["interrupted"]) is not bool:
        raise ValueError("it holds other things than a report's numbers")
    return body, shard


def _all_have_ended(count: int, folder: Path) -> bool:
    """Whether each share has written its report, usable or not."""
    names = {path.name for path in folder.glob("report_*_of_*.json")}
    return all(f"report{_suffix(Shard(share, count))}.json" in names for share in range(count))


def _suffix(shard: Shard) -> str:
    return "" if shard.count == 1 else f"_{shard.index}_of_{shard.count}"


def _merged_path(folder: Path, count: int) -> Path:
    return folder / f"report_all_of_{count}.json"


def _write(path: Path, body: dict[str, Any]) -> None:
    """In one step: another share may be reading."""
    # A name's undecodable bytes become JSON's own escapes.
    text = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
