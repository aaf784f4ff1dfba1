"""What all shares of one array did, summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from featstore.cohort.tables import printable

DONE = ("committed", "computed", "refreshed", "pruned")
# What a run finds at its start. A later run finds what an earlier one has left or done: no sum of both.
PLANNED = ("new", "changed", "already_done")
TIMES = (
    "seconds_reading",
    "seconds_decoding",
    "seconds_waiting_for_decoding",
    "seconds_forward",
    "seconds_waiting_for_writing",
    "seconds_writing",
)
WHEN = ("started", "finished")
# Of the time from the first start to the last end; where less was spent running, a person is told.
_MOSTLY = 0.9
_SHOWN = 8


@dataclass(frozen=True)
class MergedReport:
    """What the shares of one array did, as the reports of its runs say.

    Attributes:
        count: The number of shares N.
        reports: By share, what `ExtractionReport.to_json` gave in its newest run.
        troubles: (file, reason) of reports that could not be used.
        earlier: By share, the same of its earlier runs of this array, oldest first; only of shares that
            are in ``reports``. What they did counts, what they found missing or unusable does not.
    """

    count: int
    reports: dict[int, dict[str, Any]]
    troubles: list[tuple[str, str]]
    earlier: Mapping[int, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """The shares without a report: not begun, still running, or killed."""
        return [share for share in range(self.count) if share not in self.reports]

    @property
    def unfinished(self) -> list[int]:
        """The shares that were interrupted."""
        return [share for share, report in sorted(self.reports.items()) if report["interrupted"]]

    @property
    def is_complete(self) -> bool:
        """Whether every share has come to its end."""
        return not self.missing and not self.unfinished

    def runs_of(self, share: int) -> list[dict[str, Any]]:
        """The reports of a share's runs of this array, oldest first."""
        return [*self.earlier.get(share, []), self.reports[share]]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The reports of all runs of this array."""
        return [run for share in sorted(self.reports) for run in self.runs_of(share)]

    @property
    def elapsed(self) -> float:
        """Seconds in which at least one share was running.

        A share that is run again on another day does not make the night between the two working time.
        """
        return running_seconds((started(run), finished(run)) for run in self.runs)

    @property
    def span(self) -> tuple[datetime, datetime] | None:
        """The first start and the last end, in UTC; None where no share has reported."""
        if not self.reports:
            return None
        first, last = min(map(started, self.runs)), max(map(finished, self.runs))
        return first.astimezone(UTC), max(first, last).astimezone(UTC)

    @property
    def not_in_store(self) -> dict[int, int]:
        """By share, the patches that the store lacked, skipped files among them.

        Of what a share left out only those can know that looked after its end: itself, and the
        shares that came to look later. One of these may have seen files that came after it had run.
        """
        found = {}
        ends = {share: finished(report) for share, report in self.reports.items()}
        # A report's seconds are over when its run looks for what is missing, which may take a while.
        looked = {i: started(r) + timedelta(seconds=r["seconds"]) for i, r in self.reports.items()}
        for share in range(self.count):
            ended = ends.get(share)
            seen = [
                report["not_in_store_by_share"].get(str(share), 0)
                for other, report in self.reports.items()
                if ended is None or other == share or looked[other] >= ended
            ]
            # Where a share has not ended, what the others saw can only have become less.
            number = (max if ended is not None else min)(seen, default=0)
            if number:
                found[share] = number
        return found

    @property
    def left_to_do(self) -> dict[int, int]:
        """By share, the patches that the store lacked and that running the share again can add.

        The files that the share has skipped are not among them: they would be skipped again.
        """
        left = {share: n - count_skipped(self.reports.get(share)) for share, n in self.not_in_store.items()}
        return {share: number for share, number in left.items() if number > 0}

    def total(self, name: str) -> Any:
        """A number of the reports, summed over all runs; of `PLANNED`, over each share's first run."""
        if name in PLANNED:
            return sum(self.runs_of(share)[0][name] for share in self.reports)
        return sum(run[name] for run in self.runs)

    @property
    def seconds_by_share(self) -> dict[int, float]:
        """By share, the wall time of its runs in seconds."""
        return {share: sum(run["seconds"] for run in self.runs_of(share)) for share in self.reports}

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Every file that was left out in the end, with the reason."""
        return [item for _, report in sorted(self.reports.items()) for item in report["skipped"]]

    @property
    def device_utilisation(self) -> float | None:
        """Mean over the runs, weighted with their time; None where nobody knows."""
        known = [run for run in self.runs if run["device_utilisation"] is not None]
        seconds = sum(report["seconds"] for report in known)
        if not seconds:
            return None
        return float(sum(r["device_utilisation"] * r["seconds"] for r in known) / seconds)

    def to_json(self) -> dict[str, Any]:
        """Sums, times and what is missing as JSON types."""
        used, elapsed, computed = self.device_utilisation, self.elapsed, self.total("computed")
        converted: Counter[str] = Counter()
        for run in self.runs:
            converted.update(run["converted"])
        lacking, left, span = self.not_in_store, self.left_to_do, self.span
        return {
            "shares": self.count,
            "complete": self.is_complete,
            "shares_without_report": self.missing,
            "shares_interrupted": self.unfinished,
            "unusable_reports": [{"file": name, "reason": reason} for name, reason in self.troubles],
            **{name: self.total(name) for name in (*DONE, *PLANNED)},
            "skipped": self.skipped,
            "converted": dict(converted),
            "not_in_store": sum(lacking.values()),
            "not_in_store_by_share": {str(share): n for share, n in lacking.items()},
            "left_to_do": sum(left.values()),
            "left_to_do_by_share": {str(share): n for share, n in left.items()},
            "started": None if span is None else span[0].isoformat(timespec="milliseconds"),
            "finished": None if span is None else span[1].isoformat(timespec="milliseconds"),
            "seconds_elapsed": round(elapsed, 3),
            "seconds_of_all_shares": round(self.total("seconds"), 3),
            "seconds_of_longest_share": round(max(self.seconds_by_share.values(), default=0.0), 3),
            "patches_per_second": round(computed / elapsed, 2) if computed and elapsed else None,
            **{name: round(self.total(name), 3) for name in TIMES},
            "device_utilisation": None if used is None else round(used, 3),
            "runs": {str(share): _in_short(self.reports[share]) for share in sorted(self.reports)},
            "earlier_runs": {
                str(share): list(map(_in_short, runs)) for share, runs in self.earlier.items()
            },
        }

    def to_text(self) -> str:
        """What all shares did, in a few lines for a person."""
        ended, elapsed = self.count - len(self.missing), self.elapsed
        seconds = self.seconds_by_share.values()
        rate = self.total("computed") / elapsed if elapsed else 0.0
        lines = [
            f"{ended} of {self.count} shares have reported: {self.total('committed'):,} patches embedded "
            f"and committed in {elapsed:,.1f} s ({rate:,.0f} patches/s together; the longest share "
            f"took {max(seconds, default=0.0):,.1f} s, the shortest {min(seconds, default=0.0):,.1f} s)"
        ]
        if self.span is not None and elapsed < _MOSTLY * (whole := _seconds_between(*self.span)):
            first, last = (f"{when:%Y-%m-%d %H:%M:%S}" for when in self.span)
            idle = f"{whole - elapsed:,.1f} s"
            lines.append(f"  from {first} to {last} UTC; for {idle} of that time no share was running")
        if self.earlier:
            by = _counts({share: len(runs) for share, runs in self.earlier.items()})
            lines.append(f"  earlier runs, before everything was in the store, are counted in: {by}")
        for shares, what in ((self.missing, "no report yet"), (self.unfinished, "interrupted")):
            if shares:
                lines.append(f"  {what}: share{'s' * (len(shares) > 1)} {_listed(shares)}")
        lines += [
            f"  not used: {printable(name)}: {printable(why)}" for name, why in self.troubles[:_SHOWN]
        ]
        if len(self.troubles) > _SHOWN:
            lines.append(f"  not used: {len(self.troubles) - _SHOWN:,} more")
        if self.skipped:
            lines.append(f"  {len(self.skipped):,} files skipped, listed in the shares' skipped_….csv")
        return "\n".join([*lines, *self._whole_folder()])

    def _whole_folder(self) -> list[str]:
        """Whether the store has every patch, and what to do where it has not."""
        left = self.left_to_do
        skipped = sum(self.not_in_store.values()) - sum(left.values())
        files = "1 file that was skipped" if skipped == 1 else f"{skipped:,} files that were skipped"
        if left:
            beside = f", besides {files}" if skipped else ""
            return [
                f"  {sum(left.values()):,} patches are not in the store ({_counts(left)}){beside}; "
                "run these shares again, or `featstore extract` once without --shard"
            ]
        if not self.is_complete:
            return []
        return [
            "  every patch of the folder is in the store" + (f" but for the {files}" if skipped else "")
        ]


def running_seconds(intervals: Iterable[tuple[datetime, datetime]]) -> float:
    """How long at least one of several runs was under way.

    Args:
        intervals: (start, end) of each, in any order; one that ends before it starts, by a clock that
            was set back, has no length.

    Returns:
        The length of their union in seconds.
    """
    covered, reached = timedelta(), None
    for start, end in sorted(intervals):
        covered += max(timedelta(), end - (start if reached is None else max(start, reached)))
        reached = end if reached is None else max(end, reached)
    return covered.total_seconds()


def started(report: dict[str, Any]) -> datetime:
    """When a run began."""
    return datetime.fromisoformat(report["started"])


def finished(report: dict[str, Any]) -> datetime:
    """When a run came to its end."""
    return datetime.fromisoformat(report["finished"])


def count_skipped(report: dict[str, Any] | None) -> int:
    """How many files a run left out; none where there is no report."""
    return len({item["path"] for item in report["skipped"]}) if report is not None else 0


def _in_short(report: dict[str, Any]) -> dict[str, Any]:
    names = ("computed", "seconds", "started", "finished", "device", "compute_dtype", "provenance")
    return {name: report.get(name) for name in names}


def _seconds_between(first: datetime, last: datetime) -> float:
    return (last - first).total_seconds()


def _counts(by_share: Mapping[int, int]) -> str:
    shown = ", ".join(f"{n:,} of share {share}" for share, n in list(by_share.items())[:_SHOWN])
    return shown + (", …" if len(by_share) > _SHOWN else "")


def _listed(shares: Sequence[int]) -> str:
    return ", ".join(map(str, shares[:20])) + (", …" if len(shares) > 20 else "")
