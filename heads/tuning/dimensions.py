"""One setting that is searched over: its values, and how they are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import optuna

from featstore.errors import ConfigError
from heads.tuning.config import Choices, Range

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Dimension:
    """A setting and its values: between two bounds, or out of ``choices``.

    Attributes:
        path: ``section.key``.
        low: The least value; of choices 0.
        high: The largest value.
        log: Whether drawn evenly in the logarithm.
        step: Between neighbouring values; None: any value.
        whole: Whether values are whole numbers.
        choices: The values to choose among; empty where there are bounds.
    """

    path: str
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all: every choice, or both ends."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value, as the sampler proposes it."""
        if self.choices:
            return self.value(trial.suggest_categorical(self.path, [_scalar(c) for c in self.choices]))
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.path, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(self.path, self.low, self.high, step=self.step, log=self.log)

    def value(self, stored: Any) -> Any:
        """The value that a trial's parameter stands for."""
        for choice in self.choices:
            if _same(_scalar(choice), stored):
                return choice
        return stored


def make_dimension(path: str, given: Range | Choices, whole: bool) -> Dimension:
    """A dimension out of what ``tune.space`` says of it.

    Args:
        path: ``section.key``.
        given: Bounds or choices.
        whole: Whether the setting takes whole numbers alone.

    Raises:
        ConfigError: The bounds make no sense.
    """
    if isinstance(given, Choices):
        stored = [json.dumps(each) for each in given.choices]
        if len(set(stored)) < len(stored) or len({_scalar(each) for each in given.choices}) < len(stored):
            raise _wrong(path, f"choices {given.choices} holds a value twice", "values that differ")
        return Dimension(path, choices=tuple(given.choices))
    low, high, step = given.low, given.high, given.step
    if low > high:
        raise _wrong(path, f"low {low:g} is above high {high:g}", "low ≤ high")
    if given.log and low <= 0:
        raise _wrong(path, f"log is true, and low is {low:g}", "low above 0 where log is true")
    if given.log and step is not None:
        raise _wrong(path, "log and step at once", "one of them")
    if step is not None and step <= 0:
        raise _wrong(path, f"step is {step:g}", "a step above 0")
    if whole and step is not None and not isinstance(step, int):
        raise _wrong(path, f"step is {step:g}, but the setting takes whole numbers", "a whole step")
    if step is not None:  # the last value that is reached; in decimals, as 0.1 + 0.2 is not 0.3
        exact = [Decimal(str(each)) for each in (low, high, step)]
        high = type(high)(exact[0] + (exact[1] - exact[0]) // exact[2] * exact[2])
    kind = int if whole else float
    return Dimension(path, kind(low), kind(high), given.log, step, whole)


def _wrong(path: str, found: str, expected: str) -> ConfigError:
    return ConfigError(found, expected=expected, where=f"tune.space.{path}", fix="mend this dimension")


def _scalar(value: Any) -> Scalar:
    """What Optuna stores of a choice: lists and mappings as JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | Mapping) else value


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
