"""What is searched over: which settings, in which bounds, and which of them each head reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from featstore.errors import ConfigError
from featstore.settings import leaves, unknown_key
from heads.config import Config, own_settings, unused_settings
from heads.models.head import Head
from heads.tuning.checks import built, check_rates, check_trained, check_value
from heads.tuning.config import Choices, Range
from heads.tuning.dimensions import Dimension, make_dimension
from heads.tuning.given import laid_over

HEAD = "head.name"
_FIXED = {
    "train": ("seed", "load_splits", "fold", "device", "memory_gb", "processes", "plot_every"),
    "head": ("plugin",),
}
_DEFAULTS: dict[str, Range | Choices] = {
    "train.lr": Range(low=1e-6, high=1e-2, log=True),
    "train.weight_decay": Range(low=1e-6, high=1e-1, log=True),
    "head.dropout": Range(low=0.1, high=0.7),
    "head.projector_dropout": Range(low=0.1, high=0.7),
    "head.attention_dropout": Range(low=0.1, high=0.7),
    "head.classifier_dropout": Range(low=0.1, high=0.7),
    "head.l1_ratio": Range(low=0.0, high=1.0),
    "head.path_end": Range(low=1e-4, high=1e-1, log=True),
    "train.use_class_weights": Choices(choices=[False, True]),
    "train.reg_weight_entropy": Range(low=1e-5, high=1e-1, log=True),
    "train.reg_weight_l2": Range(low=1e-6, high=1e-2, log=True),
    "train.reg_weight_confidence": Range(low=1e-5, high=1e-1, log=True),
}
_APART = ("head.projector_dropout", "head.attention_dropout", "head.classifier_dropout")
_ON_ATTENTION = ("train.reg_weight_entropy", "train.reg_entropy_", "train.reg_weight_l", "train.reg_level_")
_ON_SCORES = ("train.reg_weight_confidence", "train.reg_confidence_")
# Settings that mean something only beside certain values of others.
_NEEDS: dict[str, Callable[[Config], bool]] = {
    "train.scheduler_patience": lambda config: config.train.scheduler == "plateau",
    "train.scheduler_factor": lambda config: config.train.scheduler == "plateau",
    "train.min_lr": lambda config: config.train.scheduler != "none",
    "train.weight_decay_alpha": lambda config: config.train.weight_decay_mode == "adaptive",
    "train.class_weights": lambda config: config.train.use_class_weights,
    "train.bag_size": lambda config: config.train.sampling != "all",
    "train.reg_entropy_form": lambda config: bool(config.train.reg_weight_entropy),
    "train.reg_entropy_mode": lambda config: bool(config.train.reg_weight_entropy),
    "train.reg_entropy_normalize": lambda config: bool(config.train.reg_weight_entropy),
    "train.reg_confidence_target": lambda config: bool(config.train.reg_weight_confidence),
}


@dataclass(frozen=True)
class Space:
    """The settings that are searched over.

    Attributes:
        base: The project's settings, with ``auto`` where it is left to the head.
        heads: To choose among; one: no choice.
        dimensions: Those that others depend on first.
        read: By head, the paths of the dimensions that it reads.
        solved: The heads whose epochs are a path of penalties, not of learning.
    """

    base: Config
    heads: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    read: Mapping[str, frozenset[str]]
    solved: frozenset[str]

    @property
    def paths(self) -> list[str]:
        """Every parameter that a trial may have."""
        return [HEAD] * (len(self.heads) > 1) + [each.path for each in self.dimensions]

    @property
    def most_epochs(self) -> int:
        """The longest that a training can be."""
        own = [each.probes for each in self.dimensions if each.path == "train.epochs"]
        return int(max(own[0])) if own else self.base.train.epochs

    def suggest(self, trial: optuna.Trial) -> None:
        """Draw a value of every dimension that the drawn head reads and that has an effect."""
        params: dict[str, Any] = {HEAD: self.heads[0]}
        if len(self.heads) > 1:
            params[HEAD] = trial.suggest_categorical(HEAD, self.heads)
        for each in self.dimensions:
            if each.path in self.read[params[HEAD]] and self._acts(each.path, params):
                params[each.path] = each.suggest(trial)

    def _acts(self, path: str, params: Mapping[str, Any]) -> bool:
        needs = _NEEDS.get(path)
        return needs is None or needs(laid_over(self.base, params))

    def settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a trial's parameters stand for, the head included."""
        values = {each.path: each for each in self.dimensions}
        found = {name: values[name].value(v) if name in values else v for name, v in stored.items()}
        return {HEAD: self.heads[0], **found}

    def config(self, stored: Mapping[str, Any]) -> Config:
        """The resolved settings of a trial.

        Raises:
            ConfigError: They do not go together.
        """
        return laid_over(self.base, self.settings(stored))


def make_space(config: Config, dim: int, class_names: Sequence[str]) -> Space:
    """What is to be searched over, every value of it checked.

    Args:
        config: The project's settings, not resolved; plugins are loaded.
        dim: D, the number of features.
        class_names: In config order.

    Raises:
        ConfigError: A dimension makes no sense, is of a setting that must not be tuned, or of one that
            no head reads.
    """
    names = tuple(config.tune.heads) or (config.head.name,)
    if len(set(names)) < len(names):
        raise ConfigError(
            f"tune.heads names a head twice: {', '.join(names)}",
            expected="different heads",
            where="tune.heads",
            fix="leave one of them out",
        )
    heads = {name: built(laid_over(config, {HEAD: name}), dim, class_names, "tune.heads") for name in names}
    for name, head in heads.items():  # else what is wrong with these would be told of a dimension
        check_trained(head, laid_over(config, {HEAD: name}), class_names)
    given = config.tune.space
    if given is None:
        given = _default_space(config, heads)
    dimensions = [_checked(config, path, each) for path, each in given.items()]
    read = {
        name: frozenset(each.path for each in dimensions if _reads(config, name, head, each))
        for name, head in heads.items()
    }
    for each in dimensions:
        readers = [name for name in names if each.path in read[name]]
        if not readers:
            raise _dead(each.path, f"no head of {', '.join(names)} reads it, or it has no effect")
        for name in readers:
            for value in each.probes:
                laid = laid_over(config, {HEAD: name, each.path: value})
                check_value(laid, dim, class_names, f"tune.space.{each.path}")
    if not dimensions and len(names) == 1:
        raise ConfigError(
            "there is nothing to search for",
            expected="a setting at least, or several heads",
            where="tune.space, tune.heads",
            fix="leave out tune.space, for the settings that are usually tuned",
        )
    space = Space(
        config,
        names,
        tuple(sorted(dimensions, key=lambda each: each.path in _NEEDS)),
        read,
        frozenset(name for name, head in heads.items() if head.solved),
    )
    _check_needs(space)
    for name, head in heads.items():
        own = [each for each in dimensions if each.path in read[name]]
        check_rates(head, laid_over(config, {HEAD: name}), own)
    return space


def _checked(config: Config, path: str, given: Range | Choices) -> Dimension:
    """A dimension whose every value, or both ends, the settings take."""
    origin = f"tune.space.{path}"
    known = {leaf.path for leaf in leaves(Config)}
    section, _, key = path.partition(".")
    if path == HEAD:
        raise ConfigError(
            "the head is no setting among others",
            expected="the heads to choose among in tune.heads",
            where=origin,
            fix="tune.heads: [hierarchical, dual_stream]",
        )
    if path not in known:
        raise unknown_key(Config, path, origin)
    if section not in _FIXED or key in _FIXED[section]:
        raise ConfigError(
            f"{path} is not for tuning",
            expected="a setting of head or train that a head learns by; "
            "seeds, splits, places and what judges the test cases stay as they are",
            where=origin,
            fix="leave it out",
        )
    whole = isinstance(given, Range) and not _takes(config, path, (given.low + given.high) / 2)
    if isinstance(given, Range):
        for end in (given.low, given.high):
            laid_over(config, {path: end if whole else float(end)})
    else:
        for value in given.choices:
            laid_over(config, {path: value})
    return make_dimension(path, given, whole)


def _takes(config: Config, path: str, value: float) -> bool:
    """Whether a setting takes this value."""
    try:
        laid_over(config, {path: value})
    except ConfigError:
        return False
    return True


def _reads(config: Config, name: str, head: Head, dimension: Dimension) -> bool:
    """Whether a head reads a setting."""
    path = dimension.path
    if path.startswith(_ON_ATTENTION) and not head.levels:
        return False
    if path.startswith(_ON_SCORES) and not head.scores_instances:
        return False
    # What is unused is told of values that differ from the default: one of the ends does.
    for value in dimension.probes:
        laid = laid_over(config, {HEAD: name, path: value})
        if path in unused_settings(laid.head, laid.train):
            return False
    return True


def _default_space(config: Config, heads: Mapping[str, Head]) -> dict[str, Range | Choices]:
    """What is usually tuned, of all that one of the heads reads; every head then takes its own."""
    found = dict[str, Range | Choices]()
    for path, each in _DEFAULTS.items():
        section, _, key = path.partition(".")
        value = getattr(getattr(config, section), key)
        apart = path in _APART and value is None  # dropout is one for all, unless it is set apart
        by_level = isinstance(value, dict)  # weights by level are somebody's own choice
        twice = path == "train.use_class_weights" and _balanced_twice(config)
        if apart or by_level or twice:
            continue
        readers = [name for name, head in heads.items() if _wanted(config, name, head, path)]
        if readers:
            found[path] = each
    return found


def _wanted(config: Config, name: str, head: Head, path: str) -> bool:
    """Whether a default dimension is one of this head's."""
    own = own_settings(laid_over(config, {HEAD: name}).head)
    if path.startswith("head."):
        # With every dropout set apart nothing is left that the one for all would act on.
        apart = [key for key in own if f"head.{key}" in _APART]
        every = bool(apart) and all(getattr(config.head, key) is not None for key in apart)
        return path.removeprefix("head.") in own and not (path == "head.dropout" and every)
    if path in ("train.lr", "train.weight_decay"):
        return not head.solved
    if path.startswith(_ON_ATTENTION):
        return bool(head.levels)
    return not path.startswith(_ON_SCORES) or head.scores_instances


def _balanced_twice(config: Config) -> bool:
    train = config.train
    return train.case_sampling == "balanced" and train.class_weights == "balanced"


def _check_needs(space: Space) -> None:
    """Raises ConfigError if a dimension can never act, whatever the others are."""
    others = {each.path: each for each in space.dimensions}
    for path in others.keys() & _NEEDS.keys():
        readers = [name for name in space.heads if path in space.read[name]]
        alone = [{HEAD: name} for name in readers]
        with_one = [
            {HEAD: name, other: value}
            for name in readers
            for other in space.read[name] - {path}
            for value in others[other].probes
        ]
        if not any(_NEEDS[path](laid_over(space.base, params)) for params in alone + with_one):
            raise _dead(path, "it has no effect beside the other settings")


def _dead(path: str, why: str) -> ConfigError:
    return ConfigError(
        f"{path} would be searched in vain: {why}",
        expected="settings that change what is learned",
        where=f"tune.space.{path}",
        fix="leave it out, or choose a head that reads it: --model, tune.heads",
    )
