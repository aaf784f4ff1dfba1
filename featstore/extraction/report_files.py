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
from featstore.extraction.merged_report import SUMMED, TIMES, WHEN, MergedReport, finished
from featstore.extraction.report import FORMAT, ExtractionReport
from featstore.extraction.shards import Shard
from featstore.store.files import unique_name

RUNS = "runs"
_NAME = re.compile(r"report_(0|[1-9][0-9]{0,8})_of_([1-9][0-9]{0,8})\.json")


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
    if report.shard.count == 1:
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
    """Sum the reports of an array's shares.

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
            good[shard.count, shard.index] = _read(path, shard)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    return MergedReport(count, reports, troubles)


def _read(path: Path, shard: Shard) -> dict[str, Any]:
    """A share's report.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is none, or another share's.
    """
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError("it is not JSON in UTF-8: cut short or overwritten") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"it is not a {FORMAT}")
    if body.get("shard") != f"{shard.index}/{shard.count}" or shard.index >= shard.count:
        raise ValueError(f"it is the report of share {body.get('shard')}")
    used = body["device_utilisation"]
    numbers = [*(body[name] for name in (*SUMMED, *TIMES, "seconds")), 0 if used is None else used]
    numbers += [*body["converted"].values(), *body["not_in_store_by_share"].values()]
    texts = [body["fingerprint"], *(item[key] for item in body["skipped"] for key in ("path", "reason"))]
    known = all(type(t) is str for t in texts)
    known &= all(type(n) in (int, float) and 0 <= n < 1e15 for n in numbers)
    times = [datetime.fromisoformat(body[name]) for name in WHEN]
    if not known or type(body["interrupted"]) is not bool or any(t.tzinfo is None for t in times):
        raise ValueError("it holds other things than a report's numbers")
    return body


def _suffix(shard: Shard) -> str:
    return "" if shard.count == 1 else f"_{shard.index}_of_{shard.count}"


def _merged_path(folder: Path, count: int) -> Path:
    return folder / f"report_all_of_{count}.json"


def _write(path: Path, body: dict[str, Any]) -> None:
    """In one step: another share may be reading."""
    aside = path.with_name(f".{unique_name()}.tmp")
    # A name's undecodable bytes become JSON's own escapes.
    text = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)
