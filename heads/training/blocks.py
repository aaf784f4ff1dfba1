"""Which parts of a backbone learn in fine-tuning: its blocks, their parameters, their modes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featstore.errors import ConfigError

BatchNormMode = Literal["frozen", "affine", "train"]

_KEY = "finetune.unfreeze"
# The numbered parts of torchvision's networks; a transition belongs to the dense block that it follows.
_NUMBERED = (re.compile(r"layer(\d+)\."), re.compile(r"(?:features\.)?(?:denseblock|transition)(\d+)\."))


@dataclass(frozen=True)
class Block:
    """A part of a network that is frozen or learns as a whole.

    Attributes:
        name: ``stem``, or the shortest beginning of parameter names that no other block shares.
        parameters: Their names in ``network.named_parameters()``, in its order.
    """

    name: str
    parameters: tuple[str, ...]


def blocks_of(network: nn.Module) -> list[Block]:
    """The blocks of a network, in order from the input to the output; every parameter is in one.

    Args:
        network: Without classifier: torchvision's ResNets and DenseNets are read by their numbered
            parts; models of timm by their own `group_matcher`; of any other network every child with
            parameters is a block (of an only child its children are).

    Returns:
        What stands before the first numbered part is the block ``stem``. Final norms belong to the
        last block: a norm alone would be a block that changes next to nothing.
    """
    aside = tuple(f"{name}." for name in getattr(network, "aside", ()))
    if aside:
        # No part of the features, as the log-variance of a VAE's encoder.
        return [block for block in _blocks_of(network) if not block.parameters[0].startswith(aside)]
    return _blocks_of(network)


def _blocks_of(network: nn.Module) -> list[Block]:
    names = [name for name, _ in network.named_parameters()]
    if found := _timm_groups(network):
        return _named(_joined(network, found), stem=True)
    for pattern in _NUMBERED:
        if found := _numbered(names, pattern):
            return _named(found, stem=True)
    return _named(_joined(network, _children(network)), stem=False)


def _numbered(names: Sequence[str], pattern: re.Pattern[str]) -> list[list[str]]:
    """Parameters by the number in their names; those without one go with what stands before them."""
    groups: dict[int, list[str]] = {0: []}
    number = 0
    for name in names:
        match = pattern.match(name)
        number = int(match[1]) if match else number
        groups.setdefault(number, []).append(name)
    return [group for group in groups.values() if group] if len(groups) > 1 else []


def _timm_groups(network: nn.Module) -> list[list[str]]:
    """Parameters as timm groups them for learning rates by layer; none for other networks."""
    matcher = getattr(network, "group_matcher", None)
    if not callable(matcher):
        return []
    from timm.models import group_parameters

    order = {name: i for i, (name, _) in enumerate(network.named_parameters())}
    try:
        groups = group_parameters(network, matcher(coarse=True))
    except (AssertionError, NotImplementedError):  # timm's RDNet, for one, has fine groups alone
        return []
    return [sorted(group, key=order.__getitem__) for _, group in sorted(groups.items())]


def _children(network: nn.Module, prefix: str = "") -> list[list[str]]:
    """Parameters by the children they belong to; a module's own stand before them."""
    own = [prefix + name for name, _ in network.named_parameters(recurse=False)]
    children = [
        (name, child) for name, child in network.named_children() if any(True for _ in child.parameters())
    ]
    if len(children) == 1 and not own:
        name, child = children[0]
        return _children(child, f"{prefix}{name}.")
    known = {id(parameter): name for name, parameter in network.named_parameters()}
    below = [
        [prefix + known[id(p)] for p in child.parameters() if known[id(p)].startswith(f"{name}.")]
        for name, child in children
    ]
    return [group for group in [own, *below] if group]


def _joined(network: nn.Module, groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups without any matrix, which are norms and scales, go with the group before them."""
    matrices = {name for name, parameter in network.named_parameters() if parameter.ndim > 1}
    joined: list[list[str]] = []
    for group in groups:
        if joined and matrices.isdisjoint(group):
            joined[-1].extend(group)
        else:
            joined.append(list(group))
    return joined


def _named(groups: Sequence[Sequence[str]], stem: bool) -> list[Block]:
    """The groups as blocks, with names."""
    users: dict[str, set[int]] = {}
    for i, group in enumerate(groups):
        for name in group:
            for beginning in _beginnings(name):
                users.setdefault(beginning, set()).add(i)
    blocks = []
    for i, group in enumerate(groups):
        own = (b for b in _beginnings(group[0]) if users[b] == {i})
        blocks.append(Block("stem" if stem and i == 0 else next(own), tuple(group)))
    return blocks


def _beginnings(name: str) -> list[str]:
    """`a.b.weight` → `a`, `a.b`, `a.b.weight`."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def unfreeze(network: nn.Module, what: str, batch_norm: BatchNormMode) -> list[str]:
    """Sets which parameters learn (``requires_grad``); all others are frozen.

    Args:
        network: As for `blocks_of`.
        what: ``last:N`` blocks, ``all``, ``none``, or a regular expression that is searched in the
            names of parameters.
        batch_norm: Of what is chosen, scale and shift of BatchNorm layers learn with ``affine`` and
            ``train``, and stay as they are with ``frozen``.

    Returns:
        The names of the parameters that learn, in the network's order.

    Raises:
        ConfigError: There are fewer blocks than asked for, the expression is invalid, or nothing learns
            though ``what`` is not ``none``.
    """
    blocks = blocks_of(network)
    chosen = _chosen(blocks, what)
    if batch_norm == "frozen":
        frozen = _batch_norm_parameters(network)
        if chosen and chosen <= frozen:
            raise ConfigError(
                f"{what!r} chooses nothing but parameters of BatchNorm layers, and those are frozen",
                expected=_expected(blocks),
                where=_KEY,
                fix="let them learn (batch_norm: affine), or choose more",
            )
        chosen -= frozen
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name, _ in network.named_parameters() if name in chosen]


def _chosen(blocks: Sequence[Block], what: str) -> set[str]:
    """The names of parameters that ``what`` means."""
    if what in ("all", "none"):
        return {name for block in blocks if what == "all" for name in block.parameters}
    if what.startswith("last:"):
        count = what.removeprefix("last:")
        if not count.isascii() or not count.isdigit() or not 1 <= int(count) <= len(blocks):
            raise _wrong(f"{what!r} does not fit a backbone of {len(blocks)} blocks", blocks)
        return {name for block in blocks[-int(count) :] for name in block.parameters}
    try:
        expression = re.compile(what)
    except re.error as error:
        raise _wrong(f"{what!r} is no regular expression: {error}", blocks) from error
    chosen = {name for block in blocks for name in block.parameters if expression.search(name)}
    if not chosen:
        raise _wrong(f"no parameter of the backbone has a name with {what!r} in it", blocks)
    return chosen


def _wrong(found: str, blocks: Sequence[Block]) -> ConfigError:
    return ConfigError(found, expected=_expected(blocks), where=_KEY, fix="set finetune.unfreeze: last:1")


def _expected(blocks: Sequence[Block]) -> str:
    listed = ", ".join(block.name for block in blocks)
    return (
        f"last:N with N from 1 to {len(blocks)}, all, none, or a regular expression for names of "
        f"parameters; the blocks are {listed}"
    )


def _batch_norm_parameters(network: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters()
    }


def set_mode(network: nn.Module, batch_norm: BatchNormMode) -> None:
    """Puts what learns into train mode, and all else into eval mode; to be called before every epoch.

    A module of which nothing learns stays in eval: dropout or drop-path there would be noise in front
    of what learns, and BatchNorm would move statistics of weights that do not move, away from those
    that the plain backbone is used with. A module without parameters (dropout, drop-path) goes with the
    nearest sibling before it that has some, else with the first behind it, else with its parent;
    BatchNorm does not count there, as it may be frozen in the midst of what learns.

    BatchNorm that learns its scale and shift alone keeps its statistics too: a step sees the patches
    of a case or two, which are far more alike than those that the statistics are of, and evaluation,
    one case at a time, could not reproduce what a batch's own statistics did.

    Args:
        network: As `unfreeze` left it.
        batch_norm: With ``train``, BatchNorm layers that learn use and update statistics of the batch;
            else none does.
    """
    _set_mode(network, any(parameter.requires_grad for parameter in network.parameters()), batch_norm)


def _set_mode(module: nn.Module, learns: bool, batch_norm: BatchNormMode) -> None:
    module.training = learns and (batch_norm == "train" or not isinstance(module, _BatchNorm))
    children = list(module.children())
    own = [_learns(child) for child in children]
    near = [None if isinstance(child, _BatchNorm) else o for child, o in zip(children, own, strict=True)]
    for i, child in enumerate(children):
        evidence = [own[i], *near[:i][::-1], *near[i + 1 :], learns]
        _set_mode(child, next(found for found in evidence if found is not None), batch_norm)


def _learns(module: nn.Module) -> bool | None:
    """Whether any parameter in it learns; None if it has none."""
    found = [parameter.requires_grad for parameter in module.parameters()]
    return any(found) if found else None


def describe(network: nn.Module, names: Iterable[str]) -> str:
    """What learns, in a few words: ``layer4 (15.0 of 23.5 million parameters)``.

    Args:
        network: As for `blocks_of`.
        names: Of the parameters that learn, as `unfreeze` returns them.

    Returns:
        The blocks in which something learns, runs of three or more as ``first to last``.
    """
    learning, blocks = set(names), blocks_of(network)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    runs: list[list[str]] = [[]]
    for block in blocks:
        if learning.isdisjoint(block.parameters):
            runs.append([])
        else:
            runs[-1].append(block.name)
    shown = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs if run)
    part, whole = sum(sizes[name] for name in learning), sum(sizes.values())
    return f"{shown or 'nothing'} ({_millions(part)} of {_millions(whole)} million parameters)"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:.2g}"
