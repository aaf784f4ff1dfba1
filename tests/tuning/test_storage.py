"""Where trials are kept: appended by one at a time, readable whatever a killed worker leaves behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from featstore.errors import ConfigError
from heads.config import Config
from heads.evaluation.runs import RunError
from heads.tuning.config import TuneConfig
from heads.tuning.folder import TuneFolder, Tuning
from heads.tuning.locks import JournalLock, exclusive
from heads.tuning.pruners import make_pruner
from heads.tuning.space import Space, make_space
from heads.tuning.storage import open_storage, open_study, propose, quiet
from tests import helpers

HOLDER = """
import os, signal, sys, time
from pathlib import Path
from heads.tuning.locks import JournalLock
lock = JournalLock(Path(sys.argv[1]))
lock.acquire()
with open(sys.argv[1], "ab") as journal:
    journal.write(b'{"op_code":4,"study_')
print("holds", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quiet():
        yield


def tuning_in(folder: Path, **tune: Any) -> tuple[Tuning, Space]:
    config = Config(tune=TuneConfig.model_validate({"startup_trials": 3, **tune}))
    about = {"dim": 4, "class_names": ["a", "b"], "id": "x", "folds": [0], "inner": {"0": []}}
    return Tuning(TuneFolder(folder), config, about), make_space(config, 4, ["a", "b"])


def study_in(folder: Path, **tune: Any) -> tuple[optuna.Study, Space, TuneConfig]:
    tuning, space = tuning_in(folder, **tune)
    return open_study(tuning, open_storage(tuning), 0, space), space, tuning.config.tune


def test_a_lock_of_a_killed_process_stops_nobody(tmp_path: Path) -> None:
    study, space, tune = study_in(tmp_path)
    study.add_trial(propose(study, space, tune, 0))
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    command = [sys.executable, "-c", HOLDER, str(journal)]
    with subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "holds\n"
            waiting = threading.Thread(target=lambda: study.add_trial(propose(study, space, tune, 0)))
            waiting.start()
            time.sleep(0.3)
            alive = waiting.is_alive()
        finally:
            holder.send_signal(signal.SIGKILL)
        assert alive  # it waits for the living
        waiting.join(timeout=20)  # Optuna's own locks would take 30 s
        assert not waiting.is_alive()
    # The half line that it left is gone, what stood before is not, and the journal can be read anew.
    assert journal.read_bytes().startswith(whole)
    again, _, _ = study_in(tmp_path)
    assert [trial.number for trial in again.trials] == [0, 1]


def test_a_torn_line_is_cut_off_whatever_its_length(tmp_path: Path) -> None:
    journal, lock = tmp_path / "journal.log", JournalLock(tmp_path / "journal.log")
    for content in (b"", b'{"a":1}\n', b'{"a":1}\n' * 3):
        for torn in (b"", b"x", b"y" * 70_000, b"z" * 200_000):
            journal.write_bytes(content + torn)
            lock.acquire()
            lock.release()
            assert journal.read_bytes() == content


def test_without_the_lock_optuna_cannot_read_a_torn_journal(tmp_path: Path) -> None:
    """Why the lock mends: should Optuna do so one day, this fails, and the lock may forget it."""
    backend = JournalFileBackend(str(tmp_path / "journal.log"))
    optuna.create_study(storage=JournalStorage(backend), study_name="a")
    with open(tmp_path / "journal.log", "ab") as file:
        file.write(b'{"op_code":4,"study_')
    backend.append_logs([{"op_code": 0, "worker_id": "w", "study_name": "b", "directions": [1]}])
    backend.append_logs([{"op_code": 0, "worker_id": "w", "study_name": "c", "directions": [1]}])
    with pytest.raises(ValueError, match=r"Expecting|delimiter"):
        JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(RunError, match="cannot lock files") as raised, exclusive(tmp_path / "x"):
        pass
    assert "runs-path" in str(raised.value)


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    study_in(tmp_path)
    (tmp_path / "journal.log").write_bytes(b"not json\n{}\n")
    with pytest.raises(RunError, match=r"journal cannot be read"):
        study_in(tmp_path)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_proposals_depend_on_trials_seed_and_number_alone(tmp_path: Path, sampler: Any) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        study, space, tune = study_in(tmp_path / name, sampler=sampler, search_seed=seed)
        for number in range(8):
            if name == "b":  # as by a worker that has only just come
                study, space, tune = study_in(tmp_path / name, sampler=sampler, search_seed=seed)
            proposed = propose(study, space, tune, 0)
            assert proposed.params == propose(study, space, tune, 0).params  # asking changes nothing
            assert len(study.trials) == number
            study.add_trial(proposed)
            study.tell(number, proposed.params["train.lr"])
        found.append([trial.params for trial in study.trials])
    assert found[0] == found[1] != found[2]
    assert len({params["train.lr"] for params in found[0]}) == 8
    study, space, tune = study_in(tmp_path / "a", sampler=sampler, search_seed=1)
    assert propose(study, space, tune, 0).params != propose(study, space, tune, 1).params


def test_trials_at_work_are_kept_away_from(tmp_path: Path) -> None:
    """The constant liar: eight workers that ask at once do not all get the same place."""
    study, space, tune = study_in(tmp_path)
    for number in range(12):
        trial = propose(study, space, tune, 0)
        study.add_trial(trial)
        study.tell(number, trial.params["train.lr"])
    asked = []
    for _ in range(8):
        trial = propose(study, space, tune, 0)
        assert trial.state == TrialState.RUNNING
        study.add_trial(trial)
        asked.append(trial.params["train.lr"])
    assert len(set(asked)) == 8
    assert max(asked) / min(asked) > 2


def test_who_prunes(tmp_path: Path) -> None:
    def kind(**tune: Any) -> str:
        return type(make_pruner(TuneConfig.model_validate(tune), 30)).__name__

    assert kind() == "MedianOfEnds"
    assert kind(pruner="hyperband") == "HyperbandPruner"
    assert kind(pruner="none") == "NopPruner"
    assert kind(pruner="hyperband", warmup_epochs=30) == "NopPruner"  # there is no epoch left to save


def test_a_database_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    for url in ("nonsense", "sqlite:////no/such/folder/x.db", "postgresql+nothing://x/y"):
        with pytest.raises(ConfigError, match="database cannot be used") as raised:
            study_in(tmp_path, storage=url)
        assert "tune.storage" in str(raised.value)


def test_two_tunings_in_one_database_do_not_meet(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    for name in ("a", "b"):
        study, space, tune = study_in(tmp_path / name, storage=url)
        assert not study.trials
        study.add_trial(propose(study, space, tune, 0))
    assert len(study_in(tmp_path / "a", storage=url)[0].trials) == 1
    assert os.path.exists(tmp_path / "trials.db")
