"""Where the trials are kept: a journal file or a database, seen alike by all workers of a tuning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from featstore.errors import ConfigError, first_line
from heads.evaluation.runs import RunError
from heads.tuning.config import TuneConfig
from heads.tuning.folder import Tuning
from heads.tuning.locks import JournalLock
from heads.tuning.pruners import make_pruner
from heads.tuning.space import Space

RESULT, ERROR, ADOPTED = "result", "error", "adopted"  # what is noted of a trial besides Optuna's own
_WAIT_SECONDS = 60.0  # for a database that another worker writes to


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from printing: what happens to the trials is told by the workers."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(tuning: Tuning) -> BaseStorage:
    """The journal or the database of a tuning.

    Raises:
        ConfigError: The database cannot be used.
        RunError: The journal cannot be read.
    """
    if tuning.config.tune.storage is not None:
        return open_database(tuning.config.tune.storage)
    path = tuning.folder.journal
    try:
        return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the journal cannot be read: {first_line(error)}",
            expected="the file as the workers wrote it",
            where=str(path),
            fix="bring the file back, or tune again under another name",
        ) from error


def open_database(url: str) -> RDBStorage:
    """The trials of a database.

    Args:
        url: As SQLAlchemy takes it.

    Raises:
        ConfigError: It cannot be used.
    """
    waiting = {"connect_args": {"timeout": _WAIT_SECONDS}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=waiting)
    except Exception as error:  # what is raised depends on the database and its driver
        raise ConfigError(
            f"the database cannot be used: {first_line(error)}",
            expected="a URL as SQLAlchemy takes it, and its driver installed",
            where="tune.storage",
            fix="sqlite:////absolute/path.db, postgresql+psycopg://…; or leave it out, for a journal file",
        ) from error


def open_study(tuning: Tuning, storage: BaseStorage, fold: int, space: Space) -> optuna.Study:
    """The trials of an outer fold, with the pruner; begun if there are none yet, by one worker at a time.

    Args:
        tuning: Whose.
        storage: Of `open_storage`.
        fold: The outer fold.
        space: What is searched over.
    """
    name = f"outer_{fold}"
    if tuning.config.tune.storage is not None:  # a database may hold several tunings
        name = f"{tuning.folder.path.name} {tuning.about['id']} {name}"
    pruner = make_pruner(tuning.config.tune, space.most_epochs)
    sampler = RandomSampler()  # never asked: `propose` draws
    try:
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
    except KeyError:
        return optuna.create_study(
            study_name=name,
            storage=storage,
            sampler=sampler,
            pruner=pruner,
            direction=tuning.direction,
        )


def propose(study: optuna.Study, space: Space, tune: TuneConfig, fold: int) -> FrozenTrial:
    """The study's next trial, whole, and not yet in it.

    It is drawn in memory, among copies of all trials there are: the storage then gets it in one piece, and
    a worker that is killed leaves a trial or none. What is drawn depends on these trials, the seed, the
    outer fold and the trial's number alone.

    Args:
        study: Whose sampler is not used.
        space: What is searched over.
        tune: Who proposes, and its seed.
        fold: The outer fold.
    """
    trials = study.get_trials(deepcopy=False)
    seed = int(np.random.SeedSequence((tune.search_seed, fold, len(trials))).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # constant_liar was one once
        copy = optuna.create_study(
            study_name=study.study_name,
            direction=study.direction,
            sampler=_sampler(tune, seed),
            pruner=study.pruner,
        )
        copy.add_trials(trials)
        trial = copy.ask()
        space.suggest(trial)
    return optuna.trial.create_trial(
        state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions
    )


def _sampler(tune: TuneConfig, seed: int) -> BaseSampler:
    if tune.sampler == "random":
        return RandomSampler(seed=seed)
    # Trials at work count as bad ones: parallel workers then do not all look at the same place.
    return TPESampler(seed=seed, n_startup_trials=tune.startup_trials, constant_liar=True)


def noted(trial: FrozenTrial, name: str, default: Any) -> Any:
    """What a worker has noted of a trial."""
    return trial.user_attrs.get(name, default)
