"""Weights: read without running code, matched by name and shape, or made from a seed; digested."""

from __future__ import annotations

import hashlib
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from featstore.errors import BackboneError

State = Mapping[str, torch.Tensor]

CHOICES = "imagenet | random:SEED | path of a .safetensors, .pth, .pt or .bin file"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIX_PART = re.compile(r"(?:module|model|backbone|encoder|network|net|\d+)\.")
_CLASSIFIER = re.compile(
    r"(?:classifier|fc|fc_\d+|head|head_dist|last_linear)\.(?:[\w.]*\.)?(?:weight|bias)$"
)
# torchvision's published DenseNets are older than its rule against dots in module names.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")
_COUNTER = "num_batches_tracked"


def load_into(
    network: nn.Module, weights: str, base: Path, name: str, pretrained: Callable[[], Path]
) -> tuple[str, ...]:
    """Fills a network's parameters and buffers as ``backbone.weights`` says.

    Args:
        network: The feature extractor, on the CPU, with its library's own names.
        weights: ``imagenet[:TAG]``, ``random:SEED``, or a path.
        base: Folder that a relative path starts from.
        name: Of the backbone, for errors.
        pretrained: Gives the file of the published weights; called for ``imagenet`` only.

    Returns:
        Names in the file that belong to nothing in the network, classifiers aside.

    Raises:
        BackboneError: The file is missing, unreadable, not finite, or of another network.
    """
    if weights == "random" or weights.startswith("random:"):
        init_random(network, parse_seed(weights))
        return ()
    published = weights == "imagenet" or weights.startswith("imagenet:")
    path = pretrained() if published else local_path(weights, base)
    return match_into(network, read_state(path), str(path), name)


def parse_seed(weights: str) -> int:
    """The seed in ``random:SEED``.

    Raises:
        BackboneError: It is no whole number from 0 to 2⁶³ − 1.
    """
    text = weights.partition(":")[2]
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:
        raise BackboneError(
            f"{weights!r} has no usable seed",
            expected="random:SEED with a whole number from 0, e.g. random:0",
            where="backbone.weights",
            fix="set backbone.weights: random:0",
        )
    return int(text)


def local_path(weights: str, base: Path) -> Path:
    """The file that a path in ``backbone.weights`` means.

    Raises:
        BackboneError: There is none.
    """
    path = base / Path(weights).expanduser()
    if not path.is_file():
        raise BackboneError(
            f"the weights file {weights!r} {'is a folder' if path.is_dir() else 'does not exist'}",
            expected=CHOICES,
            where=str(path.resolve()),
            fix="correct backbone.weights (--weights PATH)",
        )
    return path


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict; never runs code from the file.

    Wrapping dictionaries (``state_dict``, ``model_state_dict``, ``model``) are opened.

    Args:
        path: A ``.safetensors`` file, or one that `torch.save` wrote.

    Raises:
        BackboneError: The file is damaged, holds more than tensors, or holds none.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path, device="cpu"))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            "the weights file holds Python objects, or is no weights file; it was not opened any further, "
            "because such a file can run code",
            expected="a state dict (names and tensors)",
            where=str(path),
            fix="where it was made: torch.save(model.state_dict(), 'weights.pth')",
        ) from error
    except Exception as error:  # the readers raise whatever they trip over in a damaged file
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        raise BackboneError(
            f"the weights file cannot be read: {reason}",
            expected="a complete .safetensors or torch file",
            where=str(path),
            fix="copy or download it again",
        ) from error
    while isinstance(content, Mapping) and (
        inner := next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
    ):
        content = inner
    state = content if isinstance(content, Mapping) else {}
    tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise BackboneError(
            f"the weights file holds no tensors by name, but a {type(content).__name__}",
            expected="a state dict",
            where=str(path),
            fix="where it was made: torch.save(model.state_dict(), 'weights.pth')",
        )
    return tensors


def match_into(network: nn.Module, state: State, where: str, name: str) -> tuple[str, ...]:
    """Copies tensors into a network, matching them by name and shape, never by position.

    Of the prefixes that wrappers leave on names (``module.``, ``model.``, …) the one is taken
    under which most tensors match. Files may also be of the network's only child with
    parameters: KimiaNet's ``module.model.0.conv0.weight`` is DenseNet's ``features.conv0.weight``.

    Args:
        network: On the CPU.
        state: The file's tensors.
        where: The file, for errors.
        name: Of the backbone, for errors.

    Returns:
        Names in the file that were not used, classifiers aside.

    Raises:
        BackboneError: A parameter or running statistic is missing, of another shape, or not finite.
    """
    state = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    own = network.state_dict()
    needed = [key for key in own if not key.endswith(_COUNTER)]

    # (what stands before the file's names, what its names lack of the network's)
    def named(key: str, layout: tuple[str, str]) -> str:
        return layout[0] + key.removeprefix(layout[1])

    def fits(key: str, layout: tuple[str, str]) -> bool:
        found = state.get(named(key, layout))
        return (
            found is not None
            and found.shape == own[key].shape
            and found.is_floating_point() == own[key].is_floating_point()
        )

    prefixes = sorted({p for key in state for p in _prefixes(key)}, key=lambda p: (len(p), p))
    child = needed[0].partition(".")[0] + "."
    lacking = ["", child] if all(key.startswith(child) for key in needed) else [""]
    layouts = [(prefix, part) for prefix in prefixes for part in lacking]
    layout = max(layouts, key=lambda each: sum(fits(key, each) for key in needed))
    bad = {key: named(key, layout) for key in needed if not fits(key, layout)}
    if bad:
        _refuse_match(bad, state, own, where, name, len(needed))
    network.load_state_dict({key: state.get(named(key, layout), own[key]) for key in own})
    broken = [key for key, value in network.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise BackboneError(
            f"{len(broken)} of {len(needed)} tensors hold NaN or infinity, e.g. {broken[0]}",
            expected="finite weights",
            where=where,
            fix="use an earlier checkpoint",
        )
    used = {named(key, layout) for key in own}
    return tuple(
        key
        for key in sorted(state)
        if key not in used and not key.endswith(_COUNTER) and not _CLASSIFIER.match(_bare(key))
    )


def _prefixes(key: str) -> list[str]:
    """``""`` and every longer run of wrappers' names that a key begins with."""
    found, end = [""], 0
    while part := _PREFIX_PART.match(key, end):
        end = part.end()
        found.append(key[:end])
    return found


def _bare(key: str) -> str:
    return key[len(_prefixes(key)[-1]) :]


def _refuse_match(
    bad: Mapping[str, str], state: State, own: State, where: str, name: str, total: int
) -> None:
    missing = [key for key in bad if bad[key] not in state]
    lines = []
    if missing:
        lines.append(f"{len(missing)} of {total} missing, e.g. {', '.join(missing[:3])}")
    other = [key for key in bad if bad[key] in state]
    if other:
        key = other[0]
        found, expected = tuple(state[bad[key]].shape), tuple(own[key].shape)
        lines.append(f"{len(other)} of another shape or kind, e.g. {key}: {found}, expected {expected}")
    raise BackboneError(
        f"the weights do not fit {name}: {'; '.join(lines)}",
        expected=f"all {total} parameters and running statistics of {name}, such as {next(iter(own))}",
        where=f"{where} (holds {len(state)} tensors, such as {', '.join(sorted(state)[:3])})",
        fix="is backbone.name the network that these weights were trained for?",
    )


@torch.no_grad()
def init_random(network: nn.Module, seed: int) -> None:
    """Fills a network with weights that depend on the seed and the parameters' names alone.

    Uniform numbers from NumPy's PCG64, scaled to Kaiming's variance (gain √2 for
    convolutions, 1 for linear layers): no transcendental functions, so the same bits on
    every machine and with every torch version, which torch's normal deviates are not.
    Norm layers are set to the identity.
    """
    for key, parameter in network.named_parameters():
        parent, _, leaf = key.rpartition(".")
        owner = network.get_submodule(parent)
        affine = isinstance(owner, nn.modules.conv._ConvNd | nn.Linear)
        if parameter.ndim >= 2:
            bound = 0.02 * 3**0.5
            if affine:
                gain = 2.0 if parameter.ndim > 2 else 1.0
                bound = (3.0 * gain / parameter[0].numel()) ** 0.5
            generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
            uniform = generator.random(parameter.shape, np.float32) * np.float32(2) - np.float32(1)
            parameter.copy_(torch.from_numpy(uniform * np.float32(bound)))
        elif affine and leaf == "bias":
            parameter.zero_()
        elif "norm" in type(owner).__name__.lower():
            parameter.fill_(1.0 if leaf == "weight" else 0.0)


def state_sha256(module: nn.Module) -> str:
    """Digest of a module's parameters and persistent buffers.

    Names in sorted order, each with dtype, shape and bytes (little-endian, row-major);
    BatchNorm's batch counters are left out: they never reach a feature.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if key.endswith(_COUNTER):
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
