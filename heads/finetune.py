"""`featstore finetune`: from a run and its backbone to a fine-tuned backbone, in a run folder of its own.

The folder is a run's: results, curves and checkpoints have the same names. Its head belongs to the
embeddings of its own backbone, which is exported beside it: once they are cached, `evaluate`,
`attention`, `probe` and `report` take the folder like any run's.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from featstore.backbones.exported import export_again
from featstore.backbones.weights import state_sha256
from featstore.process import stop_on_signal
from featstore.spec import EmbeddingSpec
from heads.config import Config
from heads.evaluation.checkpoints import identity_of, load_state, save_state
from heads.evaluation.named import AlreadyDone, already_done, check_not_both, named_folder
from heads.evaluation.results import evaluate_heads, write_results
from heads.evaluation.runs import (
    RunError,
    RunFolder,
    find_run,
    held,
    history_frame,
    make_run,
    new_folder,
    read_about,
    write_json,
)
from heads.finetune_result import FineTuned
from heads.finetune_start import Start, open_resumed, open_start
from heads.finetune_states import Saver, check_state
from heads.run import begin
from heads.training.blocks import describe
from heads.training.course import Progress
from heads.training.finetune import FineTuning
from heads.training.finetune_model import memory_for
from heads.training.ranks import Ranks, joined

BACKBONE = "backbone"  # folder of the export, in the run's


def finetune_project(
    config: Config,
    project: Path,
    wanted: Path | None = None,
    resume: Path | None = None,
    finish: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    observe: Callable[[Progress, int], None] = lambda progress, epochs: None,
    watch: Callable[[int, int], None] = lambda step, steps: None,
    name: str | None = None,
) -> FineTuned | AlreadyDone | None:
    """Fine-tune a run's backbone and head end to end, evaluate them, and export the backbone.

    Under ``torchrun`` all processes call this; the first alone writes and tells.

    Args:
        config: The project's settings; head, loss and split are the run's.
        project: The folder that relative paths start from.
        wanted: The run to start from; the newest finished one by default.
        resume: A fine-tuning to go on with, by its own settings.
        finish: Of ``resume``: train no further; evaluate and export its best epoch so far.
        tell: Called with remarks.
        observe: Called after every epoch with the progress and the number of epochs.
        watch: Called after every step with its number and the number of steps in an epoch.
        name: Of the new folder: begun if it is not there, gone on with if it is.

    Returns:
        What was done, or that all was done before; None in all processes but the first.

    Raises:
        FeatstoreError: Whatever stands in the way; TrainingError if the training itself fails.
    """
    runs = project / config.runs.path
    with ExitStack() as holding:
        ranks, device = holding.enter_context(joined(config.finetune.device))
        config = config.model_copy(
            update={"finetune": config.finetune.model_copy(update={"device": device})}
        )
        if not ranks.first:
            tell, observe, watch = _quiet, _quiet, _quiet
        check_not_both(resume, name)
        named = None if name is None else RunFolder(named_folder(runs, "finetune", name))
        if named is not None:
            if ranks.first:
                holding.enter_context(held(make_run(named).path))
            # The first one looks, for all: another would see what the first has just begun.
            done, begun = ranks.from_first((named.finished, _state_path(named).is_file()))
            if done:
                return already_done(named.path) if ranks.first else None
            resume = named.path if begun else None
        if resume is not None:
            run = find_run(runs, resume, finished=False)
            if ranks.first and named is None:
                holding.enter_context(held(run.path))
            start = open_resumed(config, project, run, ranks, tell)
            training = start.training
            training.load_state(load_state(_state_path(run), start.identity, check_state))
            tell(f"going on with {run.path} after {training.steps_done} steps")
        else:
            start = open_start(config, project, wanted, ranks, tell)
            training = start.training
            if ranks.first:
                made = named or RunFolder(new_folder(runs, "finetune", config.runs.suffix))
                if named is None:
                    holding.enter_context(held(make_run(made).path))
                _begin(made, start, project)
                tell(_announcement(made, start, ranks))
            run = RunFolder(ranks.from_first(made.path if ranks.first else Path()))
        holding.enter_context(start.pixels)
        interrupted = None
        if finish:
            _check_finishable(run, training)
        else:
            interrupted = _train(run, start, ranks, tell, observe, watch)
        changed = sorted({path for found in ranks.gather(start.pixels.changed) for path in found})
        if not ranks.first:
            return None
        if interrupted is not None:
            _tell_changed(changed, tell)
            return FineTuned(run, None, interrupted, training.steps_done)
        with memory_for("to evaluate", training.bags.device):
            return _finish(run, start, project, changed, tell)


def _train(
    run: RunFolder,
    start: Start,
    ranks: Ranks,
    tell: Callable[[str], None],
    observe: Callable[[Progress, int], None],
    watch: Callable[[int, int], None],
) -> int | None:
    """Train to the end; the signal that ended it before, if one did."""
    training = start.training
    with stop_on_signal() as received:
        saver = Saver(run, _state_path(run), start.identity, start.settings, ranks, observe, watch)
        if not training.steps_done:
            loss = training.before()
            if ranks.first:
                about = read_about(run)
                about["finetuned"]["val_loss_before"] = loss
                write_json(run.about, about)
            tell(f"validation loss before any step: {loss:.4f}")
        saver.save(training)  # so that one that is killed at once can be resumed too
        training.run(saver.after_epoch, received, saver.after_step)
        saver.save(training)
        if training.finished:
            return None
        return received[0] if received else signal.SIGTERM  # another process was told to stop


def _check_finishable(run: RunFolder, training: FineTuning) -> None:
    if not training.best:
        raise RunError(
            "no epoch has been finished yet: there is nothing to evaluate",
            expected="a best epoch",
            where=str(run.path),
            fix=f"featstore finetune --resume {run.path}",
        )


def _quiet(*said: object) -> None:
    """What processes other than the first have to say."""


def _state_path(run: RunFolder) -> Path:
    return run.path / "checkpoints" / "finetune.pth"


def _begin(run: RunFolder, start: Start, project: Path) -> None:
    """Write into a new folder what is trained on what."""
    export = _relative(run.path / BACKBONE, project)
    backbone = start.config.backbone.model_copy(update={"name": export})
    store = start.config.store.model_copy(update={"path": f"store_{run.path.name}"})
    own = start.config.model_copy(update={"backbone": backbone, "store": store})
    about = start.about | {"store": {**start.about["store"], "path": store.path, "digest": ""}}
    begin(run, own, about, start.split)


def _relative(path: Path, project: Path) -> str:
    try:
        return str(path.absolute().relative_to(project.absolute()))
    except ValueError:
        return str(path.absolute())


def _announcement(run: RunFolder, start: Start, ranks: Ranks) -> str:
    training, settings = start.training, start.settings
    learns = describe(start.backbone.network, training.names) if training.names else "nothing of it"
    head = "its head does not learn" if settings.freeze_head else f"head {start.config.head.name}"
    each = (
        "all patches"
        if settings.patches_per_case is None
        else f"{settings.patches_per_case} {settings.sampling} patches"
    )
    together = f", {ranks.count} processes" if ranks.count > 1 else ""
    return (
        f"{run.path}: from {start.source}; of {start.backbone.name} learns {learns}; {head}; "
        f"{each} a case and epoch, {training.live.chunk} at once; {training.bags.device}, "
        f"{training.config.amp if training.config.amp != 'off' else 'float32'}{together}\n"
        f"should it be interrupted: featstore finetune --resume {run.path.name}"
    )


def _tell_changed(changed: Sequence[str], tell: Callable[[str], None]) -> None:
    if changed:
        some = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
        tell(f"warning: {len(changed)} patches are no longer the files that were embedded: {some}")


def _finish(
    run: RunFolder, start: Start, project: Path, changed: Sequence[str], tell: Callable[[str], None]
) -> FineTuned:
    """Evaluate the best and the last epoch from pixels, export the best one's backbone, write results."""
    training = start.training
    last = training.kept_model
    best = last if training.progress.best_epoch == training.progress.epoch else copy.deepcopy(last)
    best.load_state_dict(training.best)
    models = {"best": best, "last": last}
    cases = {"train": start.split.train, "val": start.split.val, "test": start.split.test}
    own = start.config.model_copy(update={"train": training.config})
    tell(f"evaluating on {len(start.split.test)} test cases, with all their patches")
    done, attention = evaluate_heads(
        run,
        {name: model.head for name, model in models.items()},
        {name: training.bags.by(model.backbone) for name, model in models.items()},
        own,
        cases,
        start.about["class_names"],
        vars(training.progress),
        training.class_weights,
    )
    changed = sorted({*changed, *start.pixels.changed})
    _tell_changed(changed, tell)
    about = read_about(run)
    before, best_loss = about["finetuned"].get("val_loss_before"), training.progress.best_val_loss
    if before is not None and best_loss >= before:
        tell(
            f"warning: no epoch was better than the model that it began with: validation loss "
            f"{best_loss:.4f}, before any step {before:.4f}"
        )
    training.model.load_state_dict(training.best)
    export, spec = _export(run, start, project)
    about["store"] |= {"fingerprint": spec.fingerprint, "spec": asdict(spec)}
    about["finetuned"]["changed_files"] = len(changed)
    write_json(run.about, about)
    _save_head(run, training, own, about)
    write_results(done, own, history_frame(training.progress.history), attention)
    return FineTuned(
        run,
        done,
        None,
        training.steps_done,
        _relative(export.parent, project),
        about["store"]["path"],
        spec.fingerprint,
        len(changed),
    )


def _export(run: RunFolder, start: Start, project: Path) -> tuple[Path, EmbeddingSpec]:
    """Write the backbone; its description's path, and what embeddings made with it are."""
    made_by = {
        "run": run.path.name,
        "from": start.source,
        "best_epoch": start.training.progress.best_epoch,
        "unfreeze": start.settings.unfreeze,
        "learned": describe(start.backbone.network, start.training.names) if start.training.names else "",
        "versions": start.about["versions"],
    }
    path = export_again(run.path / BACKBONE, start.backbone, start.backbone_config, project, made_by)
    old = start.spec
    tuned = replace(start.backbone, weights_sha256=state_sha256(start.backbone.network))
    return path, tuned.spec(old.channel_order, old.compute_dtype, old.stored_dtype, old.runtime)


def _save_head(run: RunFolder, training: FineTuning, config: Config, about: dict[str, Any]) -> None:
    """The best epoch's head, as a run has it: both of its epochs are the best, as the cache is of that."""
    prefix = "head."
    head = {
        name.removeprefix(prefix): value for name, value in training.best.items() if name.startswith(prefix)
    }
    nothing: dict[str, Any] = {"ema": None, "scheduler": None, "optimizer": {}, "scaler": {}}
    weights = training.class_weights
    nothing["class_weights"] = None if weights is None else weights.cpu()
    progress = copy.deepcopy(vars(training.progress))
    save_state(
        run, {"head": head, "best": head, "progress": progress, **nothing}, identity_of(config, about)
    )
