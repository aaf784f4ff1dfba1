"""What a fine-tuning starts from: a run, its head, the backbone of its store, and the patches' files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from featstore import __version__
from featstore.backbones import Backbone, build_backbone
from featstore.backbones.exported import DESCRIPTION, read_export
from featstore.cohort.splits import Split
from featstore.config import BackboneConfig
from featstore.errors import BackboneError, ConfigError, FingerprintMismatch
from featstore.extraction.forward import choose_device
from featstore.patch_pixels import PatchPixels
from featstore.process import keep_freed_memory, usable_cores
from featstore.spec import EmbeddingSpec
from featstore.store import Store
from heads.cohort import check_fingerprint, load_bags
from heads.config import Config
from heads.evaluation.checkpoints import identity_of, load_best_of, load_state
from heads.evaluation.runs import RunError, RunFolder, find_run, read_about, read_config, read_own_split
from heads.models.head import Head, build_head, load_plugin
from heads.project import MACHINE, own_config, plugin_of, refuse_imported
from heads.training.finetune import FineTuning
from heads.training.finetune_config import FinetuneConfig
from heads.training.finetune_data import attention_of
from heads.training.finetune_model import training_config
from heads.training.live import LiveBackbone, choose_chunk
from heads.training.live_bags import LiveBags
from heads.training.optimizer import Amp, choose_amp
from heads.training.ranks import Ranks

_SMALLEST_IN_BF16 = 32  # px


@dataclass(frozen=True)
class Start:
    """A fine-tuning that has not begun, and what it is of.

    Attributes:
        source: The run that it starts from, as it is shown.
        config: That run's, with the section ``finetune`` of now; store and backbone are the cache's.
        settings: The section ``finetune``, with what ``auto`` stands for.
        about: What the new `run.json` says.
        split: The run's.
        backbone: Trained in place.
        backbone_config: What it was built by.
        spec: Of the cached embeddings.
        pixels: The patches' files.
        training: The training.
        identity: What its checkpoint belongs to.
    """

    source: str
    config: Config
    settings: FinetuneConfig
    about: dict[str, Any]
    split: Split
    backbone: Backbone
    backbone_config: BackboneConfig
    spec: EmbeddingSpec
    pixels: PatchPixels
    training: FineTuning
    identity: dict[str, Any]


def open_start(
    config: Config, project: Path, wanted: Path | None, ranks: Ranks, tell: Callable[[str], None]
) -> Start:
    """Everything that a new fine-tuning needs; nothing is written.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        wanted: The run; the newest finished one by default.
        ranks: The processes that train together.
        tell: Called with remarks.

    Raises:
        FeatstoreError: Run, store, backbone or patches cannot be used.
    """
    run = find_run(project / config.runs.path, wanted)
    about = read_about(run)
    refuse_imported(run, about)
    if "finetuned" in about and not run.finished:
        raise RunError(
            f"{run.path.name} is a fine-tuning that is not finished",
            expected="a finished run",
            where=str(run.path),
            fix=f"featstore finetune --resume {run.path.name}",
        )
    if "finetuned" in about and not (project / read_config(run).store.path).exists():
        raise RunError(
            f"{run.path.name} is a fine-tuning whose embeddings are not cached yet",
            expected="a run whose store is there",
            where=str(run.path),
            fix=f"featstore extract --backbone {run.path / 'backbone'} --store "
            f"{read_config(run).store.path}; or go on with it: featstore finetune --resume RUN",
        )
    own = _here(own_config(config, run, tell), config)
    load_plugin(plugin_of(own, project))
    identity = identity_of(own, about)
    head = load_best_of(run, own, about, load_state(run.last, identity), tell).float()
    origin = {"run": run.path.name, "store": dict(about["store"])}
    described = about | {"finetuned": origin, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    described["versions"] = {**about["versions"], "featstore": __version__, "torch": torch.__version__}
    spec = Store.open(project / own.store.path).spec
    exported = _trained_here(spec.weights_sha256, project / own.runs.path)
    candidates = [own.backbone, *exported, config.backbone]
    return _prepare(own, project, run, described, identity, head, candidates, ranks, tell)


def open_resumed(
    config: Config, project: Path, run: RunFolder, ranks: Ranks, tell: Callable[[str], None]
) -> Start:
    """Everything that a fine-tuning needs to go on; arguments and errors as `open_start`.

    Args:
        config: The project's settings, of which place and device count.
        project: The folder that relative paths start from.
        run: Of the fine-tuning.
        ranks: The processes that train together.
        tell: Called with remarks.
    """
    about = read_about(run)
    if "finetuned" not in about:
        raise RunError(
            f"{run.path.name} is no fine-tuning",
            expected="a folder that `featstore finetune` wrote",
            where=str(run.path),
            fix=f"featstore finetune {run.path} starts one from it; featstore train-head --resume goes on "
            "with a run",
        )
    if run.finished:
        raise RunError(
            f"{run.path.name} is finished",
            expected="a fine-tuning that was interrupted",
            where=str(run.path),
            fix="start another: featstore finetune RUN",
        )
    mine, origin = own_config(config, run, tell, ("head", "runs", "finetune")), about["finetuned"]
    machine = {n: getattr(config.finetune, n) for n in MACHINE if n in FinetuneConfig.model_fields}
    mine = _here(mine, config.model_copy(update={"finetune": mine.finetune.model_copy(update=machine)}))
    try:
        store = mine.store.model_copy(update={"path": str(origin["store"]["path"])})
        backbone, about = BackboneConfig(**origin["backbone"]), about | {"store": dict(origin["store"])}
        origin["store"]["fingerprint"], origin["run"]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"run.json does not say what was fine-tuned ({type(error).__name__}: {error})",
            expected="a file as `featstore finetune` wrote it",
            where=str(run.about),
            fix="bring the file back, or start anew: featstore finetune RUN",
        ) from error
    mine = mine.model_copy(update={"store": store, "backbone": backbone})
    load_plugin(plugin_of(mine, project))
    head = build_head(mine.head, int(about["dim"]), len(about["class_names"]))
    return _prepare(mine, project, run, about, identity_of(mine, about), head, [backbone], ranks, tell)


def _here(own: Config, config: Config) -> Config:
    """The run's settings in this place: where patches are, and how fine-tuning goes."""
    place = {"patches": config.patches, "images": config.images, "finetune": config.finetune}
    return own.model_copy(update=place)


def _prepare(
    own: Config,
    project: Path,
    run: RunFolder,
    about: dict[str, Any],
    identity: dict[str, Any],
    head: Head,
    candidates: list[BackboneConfig],
    ranks: Ranks,
    tell: Callable[[str], None],
) -> Start:
    settings = own.finetune
    device = choose_device(settings.device, "finetune.device")
    if device.type == "cpu":
        keep_freed_memory()
    store = Store.open(project / own.store.path)
    spec = store.spec.plain
    _check_patches(store, project, own)
    check_fingerprint(store, about["store"]["fingerprint"])
    backbone, built_by = _backbone_of(store, candidates, project)
    settings = settings.model_copy(update={"amp": _precision(settings, backbone, device)})
    train, split = training_config(own.train, settings), read_own_split(run, about)
    attention = None
    if settings.sampling == "attended" and settings.patches_per_case is not None:
        cached = load_bags(own, store, about["labels"], tell, about["store"]["fingerprint"])
        attention = attention_of(head, cached, split.train, own.train)
    threads = usable_cores() if settings.workers == "auto" else settings.workers
    images = own.images.model_copy(update={"channel_order": spec.channel_order})
    pixels = PatchPixels(
        store.table(),
        project / own.patches.folder,
        images,
        backbone.preprocessing,
        threads,
        digests=_digests(store, about["labels"]),
    )
    chunk = choose_chunk(settings.chunk, device, backbone.preprocessing.size)
    live = LiveBackbone(backbone, device, settings.amp, chunk, 2 if settings.batch_norm == "train" else 1)
    bags = LiveBags(store, about["labels"], live, pixels)
    training = FineTuning(
        head, backbone, bags, split, train, settings, about["class_names"], ranks, attention
    )
    about["finetuned"]["backbone"] = built_by.model_dump()
    identity = {**identity, "unfreeze": settings.unfreeze, "batch_norm": settings.batch_norm}
    config = own.model_copy(update={"train": train, "finetune": settings, "backbone": built_by})
    return Start(
        about["finetuned"]["run"],
        config,
        settings,
        about,
        split,
        backbone,
        built_by,
        spec,
        pixels,
        training,
        identity,
    )


def _precision(settings: FinetuneConfig, backbone: Backbone, device: torch.device) -> Amp:
    """What ``finetune.amp`` means.

    Raises:
        ConfigError: bf16 is asked for on a CPU with patches so small that its gradients are wrong there.
    """
    # Maps of one cell before the last stride: gradients of oneDNN's 3 × 3 convolutions in bf16 then hold
    # whatever was in memory.
    small = device.type == "cpu" and backbone.preprocessing.size < _SMALLEST_IN_BF16
    if small and settings.amp == "bf16":
        raise ConfigError(
            f"finetune.amp is bf16, with patches of {backbone.preprocessing.size} px on a CPU",
            expected=f"float32 below {_SMALLEST_IN_BF16} px: gradients in bf16 are wrong there",
            where="finetune.amp",
            fix="--amp off",
        )
    return "off" if small and settings.amp == "auto" else choose_amp(settings.amp, device)


def _trained_here(weights_sha256: str, runs: Path) -> list[BackboneConfig]:
    """The backbones that runs of this project have exported, with these weights."""
    found = []
    for path in sorted(runs.glob(f"*/backbone/{DESCRIPTION}")):
        with suppress(BackboneError):  # a damaged one, of another run, is none of ours
            if read_export(path).weights_sha256 == weights_sha256:
                found.append(BackboneConfig(name=str(path.parent.absolute())))
    return found


def _digests(store: Store, cases: Iterable[str]) -> dict[str, bytes]:
    """The sha256 of the cases' files as they were embedded, by path."""
    found: dict[str, bytes] = {}
    for case in cases:
        sources = store.sources(case)
        found |= zip(sources["path"], map(bytes, sources["sha256"]), strict=True)
    return found


def _check_patches(store: Store, project: Path, config: Config) -> None:
    """Raises unless there are pixels to learn from."""
    if store.spec.is_imported:
        raise ConfigError(
            f"the run is on imported features ({store.spec.backbone}): there is no backbone to fine-tune",
            expected="a run on a store that `featstore extract` filled",
            where=str(store.path),
            fix="extract the patches with a backbone, train a head on that store, and fine-tune that run",
        )
    folder = project / config.patches.folder
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder of patches {folder}",
            expected="the PNG files that the store's embeddings are of",
            where="patches.folder",
            fix="mount or bring back the folder, or name it: --patches FOLDER",
        )


def _backbone_of(
    store: Store, candidates: list[BackboneConfig], project: Path
) -> tuple[Backbone, BackboneConfig]:
    """The backbone that made the store's embeddings, out of what the settings and the run name."""
    spec = store.spec.plain
    differences: list[str] = []
    failed: BackboneError | None = None
    for config in {each.model_dump_json(): each for each in candidates}.values():
        try:
            backbone = build_backbone(config, project)
        except BackboneError as error:  # such as weights that are not on this machine: another may do
            failed = failed or error
            continue
        ours = backbone.spec(spec.channel_order, spec.compute_dtype, spec.stored_dtype, spec.runtime)
        if ours.fingerprint == spec.fingerprint:
            return backbone, config
        differences = differences or ours.differences(spec)
    if failed is not None and not differences:
        raise failed
    raise FingerprintMismatch(
        "the settings describe another backbone than that which made the store's embeddings:\n"
        + "\n".join(f"    {line}" for line in differences),
        expected="the backbone, weights and preprocessing that the store was extracted with",
        where=f"backbone; {store.path}",
        fix="set them as `featstore info` shows them",
    )
