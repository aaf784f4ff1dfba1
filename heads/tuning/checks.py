"""Whether a head can be trained by the ends of a dimension: looked at before the first trial."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from featstore.errors import ConfigError, FeatstoreError
from heads.config import Config
from heads.models.head import Head, build_head
from heads.training.objective import Objective, make_class_weights
from heads.training.optimizer import check_solvable, make_optimizer, make_scheduler
from heads.tuning.dimensions import Dimension
from heads.tuning.given import laid_over

_RATES = ("train.scheduler", "train.lr", "train.min_lr")  # which of these go together only all can tell


def built(config: Config, dim: int, class_names: Sequence[str], where: str) -> Head:
    """The head of a config.

    Args:
        config: Resolved.
        dim: D, the number of features.
        class_names: In config order.
        where: Which setting of tuning is blamed.

    Raises:
        ConfigError: There is no such head, or it cannot be built so.
    """
    try:
        return build_head(config.head, dim, len(class_names))
    except FeatstoreError as error:
        raise _blamed(error, where) from error


def check_trained(head: Head, config: Config, class_names: Sequence[str]) -> None:
    """Raises ConfigError if penalties, loss or class weights do not suit a head; arguments as `built`."""
    Objective(config.train, head, None)
    make_class_weights(config.train, range(len(class_names)), class_names)
    check_solvable(head, config.train)


def check_value(config: Config, dim: int, class_names: Sequence[str], where: str) -> None:
    """Whether a head can be built and trained by a value of a dimension; arguments as `built`.

    Raises:
        ConfigError: It cannot.
    """
    head = built(config, dim, class_names, where)
    try:
        check_trained(head, config, class_names)
    except FeatstoreError as error:
        raise _blamed(error, where) from error


def check_rates(head: Head, config: Config, dimensions: Sequence[Dimension]) -> None:
    """Whether the lowest learning rate is below the first, whatever of them is drawn.

    Args:
        head: Whose rates they are.
        config: Of that head, resolved.
        dimensions: Those that it reads.

    Raises:
        ConfigError: Some that may be drawn do not go together.
    """
    drawn = [each for each in dimensions if each.path in _RATES]
    if head.solved or not drawn:
        return
    for values in itertools.product(*(each.probes for each in drawn)):
        params = {each.path: value for each, value in zip(drawn, values, strict=True)}
        train = laid_over(config, params).train
        try:
            make_scheduler(make_optimizer(head, train), train)
        except ConfigError as error:
            where = ", ".join(f"tune.space.{each.path}" for each in drawn if each.path != _RATES[0])
            raise _blamed(error, where or f"tune.space.{drawn[0].path}") from error


def _blamed(error: FeatstoreError, where: str) -> ConfigError:
    return ConfigError(error.found, expected=error.expected, where=where, fix="choose other values")
