"""What all shares of one array did, summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from featstore.cohort.tables import printable

SUMMED = ("committed", "computed", "new", "changed", "already_done", "refreshed", "pruned")
TIMES = (
    "seconds_reading",
    "seconds_decoding",
    "seconds_waiting_for_decoding",
    "seconds_forward",
    "seconds_waiting_for_writing",
    "seconds_writing",
)
WHEN = ("started", "finished")


@dataclass(frozen=True)
class MergedReport:
    """What the shares of one array did, as their newest reports say.

    Attributes:
        count: The number of shares N.
        reports: By share, what `ExtractionReport.to_json` gave.
        troubles: (file, reason) of reports that could not be used.
    """

    count: int
    reports: dict[int, dict[str, Any]]
    troubles: list[tuple[str, str]]

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

    @property
    def elapsed(self) -> float:
        """Seconds from the first share's start to the last one's end."""
        times = {name: [datetime.fromisoformat(r[name]) for r in self.reports.values()] for name in WHEN}
        if not self.reports:
            return 0.0
        return max(0.0, (max(times["finished"]) - min(times["started"])).total_seconds())

    @property
    def not_in_store(self) -> dict[int, int]:
        """By share, the patches that the store lacked.

        Of what a share left out only those can know that looked after its end: itself, and the
        shares that ended later. One of these may have seen files that came after it had run.
        """
        found = {}
        for share in range(self.count):
            ended = finished(self.reports[share]) if share in self.reports else None
            seen = [
                report["not_in_store_by_share"].get(str(share), 0)
                for report in self.reports.values()
                if ended is None or finished(report) >= ended
            ]
            # Where a share has not ended, what the others saw can only have become less.
            number = (max if ended is not None else min)(seen, default=0)
            if number:
                found[share] = number
        return found

    def total(self, name: str) -> Any:
        """A number of the reports, summed over the shares."""
        return sum(report[name] for report in self.reports.values())

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Every file left out, with the reason."""
        return [item for _, report in sorted(self.reports.items()) for item in report["skipped"]]

    @property
    def device_utilisation(self) -> float | None:
        """Mean over the shares, weighted with their time; None where nobody knows."""
        known = [r for r in self.reports.values() if r["device_utilisation"] is not None]
        seconds = sum(report["seconds"] for report in known)
        if not seconds:
            return None
        return float(sum(r["device_utilisation"] * r["seconds"] for r in known) / seconds)

    def to_json(self) -> dict[str, Any]:
        """Sums, times and what is missing as JSON types."""
        used, elapsed, computed = self.device_utilisation, self.elapsed, self.total("computed")
        converted: Counter[str] = Counter()
        for report in self.reports.values():
            converted.update(report["converted"])
        return {
            "shares": self.count,
            "complete": self.is_complete,
            "shares_without_report": self.missing,
            "shares_interrupted": self.unfinished,
            "unusable_reports": [{"file": name, "reason": reason} for name, reason in self.troubles],
            **{name: self.total(name) for name in SUMMED},
            "skipped": self.skipped,
            "converted": dict(converted),
            "not_in_store": sum(self.not_in_store.values()),
            "not_in_store_by_share": {str(share): n for share, n in self.not_in_store.items()},
            "seconds_elapsed": round(elapsed, 3),
            "seconds_of_all_shares": round(self.total("seconds"), 3),
            "seconds_of_longest_share": max((r["seconds"] for r in self.reports.values()), default=0.0),
            "patches_per_second": round(computed / elapsed, 2) if computed and elapsed else None,
            **{name: round(self.total(name), 3) for name in TIMES},
            "device_utilisation": None if used is None else round(used, 3),
            "runs": {str(share): self._run(share) for share in sorted(self.reports)},
        }

    def _run(self, share: int) -> dict[str, Any]:
        report = self.reports[share]
        names = ("computed", "seconds", "started", "finished", "device", "compute_dtype", "provenance")
        return {name: report.get(name) for name in names}

    def to_text(self) -> str:
        """What all shares did, in a few lines for a person."""
        ended = self.count - len(self.missing)
        seconds = [report["seconds"] for report in self.reports.values()]
        rate = self.total("computed") / self.elapsed if self.elapsed else 0.0
        lines = [
            f"{ended} of {self.count} shares have reported: {self.total('committed'):,} patches embedded "
            f"and committed in {self.elapsed:,.1f} s ({rate:,.0f} patches/s together; the longest share "
            f"took {max(seconds, default=0.0):,.1f} s, the shortest {min(seconds, default=0.0):,.1f} s)"
        ]
        for shares, what in ((self.missing, "no report yet"), (self.unfinished, "interrupted")):
            if shares:
                lines.append(f"  {what}: share{'s' * (len(shares) > 1)} {_listed(shares)}")
        lines += [f"  not used: {printable(name)}: {printable(why)}" for name, why in self.troubles]
        if self.skipped:
            lines.append(f"  {len(self.skipped):,} files skipped, listed in the shares' skipped_….csv")
        lacking = self.not_in_store
        if lacking:
            by = ", ".join(f"{n:,} of share {share}" for share, n in list(lacking.items())[:8])
            lines.append(
                f"  {sum(lacking.values()):,} patches are not in the store ({by}"
                + (", …" if len(lacking) > 8 else "")
                + "); run these shares again, or `featstore extract` once without --shard"
            )
        elif self.is_complete:
            lines.append("  every patch of the folder is in the store")
        return "\n".join(lines)


def finished(report: dict[str, Any]) -> datetime:
    """When a share came to its end."""
    return datetime.fromisoformat(report["finished"])


def _listed(shares: Sequence[int]) -> str:
    return ", ".join(map(str, shares[:20])) + (", …" if len(shares) > 20 else "")
