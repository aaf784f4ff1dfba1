"""What every head is, and how a head is made from its name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from featstore.bags import BagBatch
from featstore.config import Section
from featstore.errors import ConfigError
from featstore.settings import nearest_name
from heads.models.config import HeadConfig, ProjectorConfig
from heads.models.dropout import Dropout
from heads.models.outputs import HeadOutput
from heads.models.pooling import wide
from heads.models.projection import project
from heads.models.standardize import Standardize


@dataclass(frozen=True)
class Fit:
    """What `Head.solve` is to minimise, out of a training's settings.

    Attributes:
        class_weights: (C,) of the loss, or None.
        label_smoothing: Of the loss.
        standardize: Whether features are standardised.
        seed: Of whatever the solver draws.
    """

    class_weights: torch.Tensor | None
    label_smoothing: float
    standardize: bool
    seed: int


class Head(nn.Module):
    """A small model that learns on bags of embeddings.

    A subclass is made from ``(dim, classes, config)`` and implements `forward`; it begins with
    ``self.standardize``. `forward` never sees the labels: a batch comes to it without them.

    Args:
        dim: D, the number of features.

    Attributes:
        levels: The attention levels that penalties may act on, patches first.
        scores_instances: Whether the output has instance scores.
        solved: Whether `solve` finds the weights of an epoch, in place of optimiser steps.
        standardize: Mean and deviation of the training cases, as buffers.
        projects_all: Whether features go through `project` alone, which standardises them and rounds
            them to its precision: a training may then do so once, before its first step.
    """

    levels: ClassVar[tuple[str, ...]] = ()
    scores_instances: ClassVar[bool] = False
    solved: ClassVar[bool] = False
    projects_all: bool = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.standardize = Standardize(dim)

    def __call__(self, batch: BagBatch, **schedule: float) -> HeadOutput:
        """`forward` of the batch without its labels."""
        output: HeadOutput = super().__call__(replace(batch, labels=None), **schedule)
        return output

    def forward(self, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify a batch; ``schedule`` is what `schedule` says of the epoch."""
        raise NotImplementedError

    def auxiliary_loss(self, output: HeadOutput, labels: torch.Tensor) -> torch.Tensor | None:
        """What the head learns from the labels beside its logits; asked for in training alone.

        Args:
            output: What `forward` said of B cases.
            labels: (B,) int64.

        Returns:
            (B,), added to the loss of each case and weighted by class as that is; None: nothing.
        """
        return None

    def solve(self, batches: Iterable[BagBatch], fit: Fit, **schedule: float) -> None:
        """Set the weights to what an epoch's training cases give; only of heads that are ``solved``.

        Args:
            batches: The training cases, with labels; read once.
            fit: What is to be minimised.
            schedule: What `schedule` says of the epoch.
        """
        raise NotImplementedError

    def schedule(self, epoch: int, epochs: int) -> dict[str, float]:
        """What changes from epoch to epoch (from 0); evaluation uses the last epoch's."""
        return {}


class ProjectedHead(Head):
    """A head that begins with h = Dropout(ReLU(W x + b)) of every patch x.

    Args:
        dim: D, the number of features.
        config: Width and dropouts.
    """

    projects_all = True

    def __init__(self, dim: int, config: ProjectorConfig) -> None:
        super().__init__(dim)
        self.projector = nn.Linear(dim, config.embed_dim)
        self.projector_dropout = Dropout(config.rate(config.projector_dropout))

    def embed(self, batch: BagBatch) -> torch.Tensor:
        """(ΣP, E) h of every patch."""
        standardize, layer, dropout = self.standardize, self.projector, self.projector_dropout
        return project(batch.features, standardize, layer, dropout, batch.standardized)

    def forward(self, batch: BagBatch, **schedule: float) -> HeadOutput:
        """`classify` of a batch's patches, embedded."""
        return self.classify(self.embed(batch), batch, **schedule)

    def classify(self, members: torch.Tensor, batch: BagBatch, **schedule: float) -> HeadOutput:
        """Classify a batch whose patches are embedded already.

        Args:
            members: (ΣP, E) h of every patch.
            batch: B cases; which patches are theirs, its features are not read.
            schedule: What `schedule` says of the epoch.
        """
        raise NotImplementedError


class Float32Linear(nn.Linear):
    """A linear layer that stays in float32 under autocast: for what there are few of, or what is ranked.

    A vector a case costs less than rounding its weights, and logits of eight bits would make equals
    of cases, or patches, that are not.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, E) → (N, E')."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(wide(x))


H = TypeVar("H", bound=type[Head])
_HEADS: dict[str, tuple[Callable[[int, int, Any], Head], type[Section]]] = {}


def register_head(name: str, config: type[Section]) -> Callable[[H], H]:
    """Make a head known by a name: ``@register_head("mine", MyConfig)`` above its class.

    Args:
        name: For ``--model``.
        config: Its settings: read from ``head:`` for those of featstore, else from ``head.options``.
    """

    def register(head: H) -> H:
        if name in _HEADS and _HEADS[name][0].__module__ != head.__module__:
            raise ConfigError(
                f"there is a head {name!r} already", where="register_head", fix="choose another name"
            )
        _HEADS[name] = (head, config)
        return head

    return register


def build_head(config: HeadConfig, dim: int, classes: int, seed: int = 0) -> Head:
    """Make a head, with weights drawn from the seed.

    Args:
        config: Name and settings.
        dim: D, the number of features.
        classes: C.
        seed: Of the weights; the global state of torch stays as it is.

    Raises:
        ConfigError: There is no such head, or its settings do not suit it.
    """
    _know_our_own()
    if config.name not in _HEADS:
        nearest = nearest_name(config.name, list(_HEADS))
        raise ConfigError(
            f"there is no head {config.name!r}",
            expected=f"one of {', '.join(_HEADS)}",
            where="head.name (--model)",
            fix=f"write {nearest}" if nearest else "choose one, or register your own: head.plugin",
        )
    build, kind = _HEADS[config.name]
    settings = {
        name: getattr(config, name) for name in kind.model_fields if name in type(config).model_fields
    }
    if config.options and set(kind.model_fields) <= set(type(config).model_fields):
        raise ConfigError(
            f"head.options is set, but {config.name!r} has its settings in `head`",
            where="head.options",
            fix=_instead(next(iter(config.options)), "head.", list(kind.model_fields)),
        )
    try:
        own = kind(**{**settings, **config.options})
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(
            f"head.options does not suit the head {config.name!r}: {problem['msg']}",
            expected=f"settings out of {', '.join(kind.model_fields)}",
            where=f"head.options.{'.'.join(map(str, problem['loc']))}",
            fix=_instead(str(problem["loc"][-1]), "", list(kind.model_fields)),
        ) from error
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.manual_seed(seed)
        return build(dim, classes, own)


def _instead(given: str, prefix: str, fields: list[str]) -> str:
    """What to do about a setting of this name."""
    if given in fields:
        return f"write {prefix}{given} in its place" if prefix else "mend this setting"
    nearest = nearest_name(given, fields)
    return f"write {prefix}{nearest}" if nearest else "leave it out"


def _know_our_own() -> None:
    """Register our own heads: first, so that no plugin can take their names."""
    import heads.models.abmil
    import heads.models.clam
    import heads.models.dsmil
    import heads.models.dual_stream
    import heads.models.hierarchical
    import heads.models.linear
    import heads.models.simple
    import heads.models.transmil  # noqa: F401


def load_plugin(path: Path | None) -> None:
    """Run a Python file that registers heads or losses.

    Raises:
        ConfigError: It is not there, or it fails.
    """
    if path is None:
        return
    _know_our_own()
    name = f"featstore_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("it is no Python file")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and postponed annotations are looked up by the module's name.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise ConfigError(
            f"the plugin cannot be loaded: {type(error).__name__}: {error}",
            expected="a Python file that calls register_head or register_loss",
            where=f"head.plugin: {path}",
            fix="mend the file, or check the path",
        ) from error
