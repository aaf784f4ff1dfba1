"""What `featstore bench extract` found, as numbers and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# What a setting must gain before it is worth telling: less is noise.
_WORTH_TELLING = 1.05


@dataclass(frozen=True)
class Alternative:
    """Another setting, held against the present one.

    Attributes:
        setting: As it stands in `featstore.yaml`.
        times_as_fast: Of decoding alone or of the backbone alone, whichever it concerns: median of rounds.
        least: Least of the rounds.
        what: ``decoding`` or ``backbone``.
        note: What else it changes; may be empty.
    """

    setting: str
    times_as_fast: float
    least: float
    what: str
    note: str

    @property
    def is_better(self) -> bool:
        """Whether it gains more than noise does."""
        return self.times_as_fast >= _WORTH_TELLING and self.least > 1


@dataclass(frozen=True)
class ExtractBench:
    """Rates in patches per second: medians over rounds in which all three are measured in turn.

    Attributes:
        decode_rate: Reading, decoding and resizing alone, on all cores.
        model_rate: Forward passes alone, pixels already in memory.
        pipeline_rate: The whole extraction into a temporary store.
        limit: Where decoding and backbone share the cores, 1 / (1/model + 1/decode);
            beside a GPU, the slower of the two.
        fraction_of_limit: Median of pipeline_rate / limit, round by round.
        fractions: All of them.
        rounds: How many rounds.
        patches: Patches a round.
        settings: Device, runtime, precision, batch size, decoding threads, PyTorch's threads.
        alternatives: Other settings that were tried.
        untried: What might help and could not be tried here.
    """

    decode_rate: float
    model_rate: float
    pipeline_rate: float
    limit: float
    fraction_of_limit: float
    rounds: int
    patches: int
    settings: dict[str, Any]
    fractions: tuple[float, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    untried: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        found = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}
        better = [alternative.setting for alternative in self.alternatives if alternative.is_better]
        return {**found, "better_settings": better}

    def to_text(self) -> str:
        """A few lines for a person."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{self.patches:,} patches, {self.rounds} rounds ({settings})\n"
            f"  decoding alone   {self.decode_rate:>9,.1f} patches/s\n"
            f"  backbone alone   {self.model_rate:>9,.1f} patches/s\n"
            f"  limit of both    {self.limit:>9,.1f} patches/s\n"
            f"  extraction       {self.pipeline_rate:>9,.1f} patches/s, "
            f"{self.fraction_of_limit:.2f} of the limit{self._rounds()}"
            + "".join(f"\n{line}" for line in self._advice())
        )

    def _rounds(self) -> str:
        """Each rate is a median of its own, so that their ratio is another number."""
        if not self.fractions:
            return ""
        return f" (round by round {min(self.fractions):.2f} to {max(self.fractions):.2f})"

    def _advice(self) -> list[str]:
        tried = sorted(self.alternatives, key=lambda other: -other.times_as_fast)
        lines = [
            f"better: {other.setting} ({other.what} {other.times_as_fast:.2f} × as fast"
            + (f"; {other.note})" if other.note else ")")
            for other in tried
            if other.is_better
        ]
        others = [f"{other.setting} {other.times_as_fast:.2f} ×" for other in tried if not other.is_better]
        if others:
            lines.append(f"no better: {', '.join(others)}")
        return [*lines, *(f"not tried: {text}" for text in self.untried)]
