"""The trainings of a study, one after the other or in several processes that share the threads."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from featstore.errors import first_line
from featstore.process import die_with_parent, stop_on_signal
from featstore.resident import CaseBags
from featstore.store import Store
from heads.cohort import describe, labels_of, load_bags
from heads.config import Config
from heads.evaluation.runs import RunError, read_about
from heads.evaluation.studies import Status, Study, clear_training, record_failure
from heads.evaluation.study_results import checked_status
from heads.models.head import load_plugin
from heads.run import begin, prepare, restore, train_run
from heads.training.course import Progress, TrainingError

# Numbers read in all epochs of all trainings: with fewer, starting processes takes longer than it saves.
_WORTH_IT = 10**9
_POLL_SECONDS = 0.2  # how long a signal may go unnoticed while other processes train


@dataclass(frozen=True)
class Outcome:
    """How one training ended, a line about it, and what was remarked on the way."""

    fold: int
    seed: int
    status: Status
    text: str
    remarks: tuple[str, ...] = ()

    def to_text(self) -> str:
        """One line."""
        return f"fold {self.fold} seed {self.seed}: {self.text}"


def train_one(
    study: Study,
    bags: CaseBags,
    fold: int,
    seed: int,
    received: Sequence[int],
    observe: Callable[[Progress, int], None] = lambda progress, epochs: None,
) -> Outcome:
    """One training of a study, by the code of a single run; whatever goes wrong is recorded.

    Args:
        study: The study, its config that of this machine.
        bags: The cases of all folds.
        fold: Which split, from 0.
        seed: Of the training.
        received: Signals, looked at between epochs.
        observe: Called after every epoch.
    """
    try:
        with study.folder.training_held(fold, seed):
            # Looked at again: another process may have been at it since it was given out.
            status = checked_status(study, fold, seed)
            if status == "finished":
                return Outcome(fold, seed, status, "finished by another process")
            return _train_one(study, bags, fold, seed, status, received, observe)
    except RunError as error:  # whatever goes wrong in a training is recorded in it, and not raised
        return Outcome(fold, seed, "interrupted", f"left alone: {first_line(error)}")


def _train_one(
    study: Study,
    bags: CaseBags,
    fold: int,
    seed: int,
    status: Status,
    received: Sequence[int],
    observe: Callable[[Progress, int], None],
) -> Outcome:
    folder, config, remarks = study.folder, study.config_of(fold, seed), list[str]()
    try:
        split, run = study.split_of(fold), folder.training(fold, seed)
        if status == "interrupted":
            about = read_about(run)
        else:
            if status == "damaged":
                remarks.append(f"fold {fold} seed {seed}: its files were damaged; it is trained anew")
            run = clear_training(folder, fold, seed)
            labels = labels_of(split, study.about["labels"])
            about = describe(bags, study.about["class_names"], labels, split)
        training = prepare(config, about, bags, split)
        if status == "interrupted":
            restore(training, run, config, about)
        else:
            begin(run, config, about, split)
        done = train_run(run, training, config, about, received, remarks.append, observe)
    except Exception as error:  # a plugin's or torch's too: the other trainings go on
        line = record_failure(folder, fold, seed, error)
        return Outcome(fold, seed, "failed", f"failed: {line}", tuple(remarks))
    progress = training.progress
    if done.interrupted is not None:
        text = f"interrupted after {progress.epoch} epochs"
        return Outcome(fold, seed, "interrupted", text, tuple(remarks))
    seconds = sum(row["seconds"] for row in progress.history)
    text = f"best epoch {progress.best_epoch} of {progress.epoch}, "
    text += f"validation loss {progress.best_val_loss:.4f}, {seconds:.1f} s"
    return Outcome(fold, seed, "finished", text, tuple(remarks))


def train_in_turn(
    study: Study,
    bags: CaseBags,
    todo: Sequence[tuple[int, int]],
    received: Sequence[int],
    show: Callable[[Outcome], None],
) -> None:
    """Train one after the other in this process, until done or told to stop."""
    for fold, seed in todo:
        if received:
            return
        outcome = train_one(study, bags, fold, seed, received)
        if outcome.status == "failed" and bags.device.type == "cuda":
            torch.cuda.empty_cache()  # what ran out of memory must not starve the next
        show(outcome)


@dataclass
class _Worker:
    """A process, what it is told and says, and what it is at."""

    process: BaseProcess
    link: Connection
    task: tuple[int, int] | None = None
    served: bool = False


@dataclass
class _Crowd:
    """The workers of a study."""

    study: Study
    project: Path
    threads: int
    memory: int
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> None:
        """One worker more."""
        context = torch.multiprocessing.get_context("spawn")  # a fork would share OpenMP's threads
        mine, theirs = context.Pipe()
        arguments = (theirs, self.study, self.project, self.threads, self.memory)
        process = context.Process(target=_work, args=arguments, daemon=True)
        with _threads_of_children(self.threads):
            process.start()
        theirs.close()  # so that the end of the worker is the end of the pipe
        self.workers.append(_Worker(process, mine))

    def ready(self) -> list[_Worker]:
        """Those that have something to say, or have ended."""
        found = wait([worker.link for worker in self.workers], _POLL_SECONDS)
        return [worker for worker in self.workers if worker.link in found]

    def stop(self) -> None:
        """Tell all to save and end."""
        for worker in self.workers:
            if worker.process.is_alive():
                worker.process.terminate()


def train_in_processes(
    study: Study,
    project: Path,
    count: int,
    memory: int,
    todo: Sequence[tuple[int, int]],
    received: Sequence[int],
    show: Callable[[Outcome], None],
) -> None:
    """Train in ``count`` processes, until done or told to stop.

    A process that dies fails the training that it was at; another takes its place.

    Args:
        study: The study.
        project: The folder that relative paths start from.
        count: Processes; each gets its share of this one's threads.
        memory: Bytes that the embeddings may take in each.
        todo: Fold and seed of what is to be trained.
        received: Signals, passed on to the processes.
        show: Called after every training.

    Raises:
        TrainingError: A process cannot begin.
    """
    crowd = _Crowd(study, project, max(1, torch.get_num_threads() // count), memory)
    left, stopped = [*todo], False
    try:
        for _ in range(min(count, len(left))):
            crowd.start()
        while crowd.workers:
            if received and not stopped:
                crowd.stop()
                stopped = True
            for worker in crowd.ready():
                try:
                    message = worker.link.recv()
                except EOFError:
                    message = _ended(crowd, worker, bool(received))
                    if message is not None and left and not received:
                        crowd.start()
                if isinstance(message, Outcome):
                    show(message)
                if worker in crowd.workers:
                    worker.task = left.pop(0) if left and not received else None
                    with contextlib.suppress(OSError):  # it has died: told by the end of the pipe
                        worker.link.send(worker.task)
                    worker.served = True
    finally:
        for worker in crowd.workers:
            worker.process.kill()


def _ended(crowd: _Crowd, worker: _Worker, stopped: bool) -> Outcome | None:
    """What the end of a process means: nothing, or that a training failed."""
    crowd.workers.remove(worker)
    worker.process.join()
    if worker.task is None and (worker.served or stopped):
        return None
    number = worker.process.exitcode or 0
    died = f"signal {signal.Signals(-number).name}" if number < 0 else f"exit code {number}"
    if worker.task is None:
        raise TrainingError(
            f"a process for trainings ended before it began ({died})",
            expected="processes that can read the store; what they said stands above",
            where="train.processes",
            fix="--processes 1, then featstore train-head --resume STUDY",
        )
    if stopped:
        return None
    fold, seed = worker.task
    why = "; the system kills what takes too much memory: --processes 1" if died.endswith("KILL") else ""
    error = TrainingError(f"the process ended by {died}{why}")
    line = record_failure(crowd.study.folder, fold, seed, error)
    return Outcome(fold, seed, "failed", f"failed: {line}")


@contextlib.contextmanager
def _threads_of_children(count: int) -> Iterator[None]:
    """How many threads the libraries of a process started now take: most ask when they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _work(link: Connection, study: Study, project: Path, threads: int, memory: int) -> None:
    """A process's life: ask for a training, do it, say how it ended; None means that there is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the parent passes it on
    parent = os.getppid()
    die_with_parent()

    def watch(progress: Progress, epochs: int) -> None:
        if os.getppid() != parent:  # it was killed, and somebody may resume the study
            os._exit(1)

    torch.set_num_threads(threads)
    with stop_on_signal() as received:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        load_plugin(project / study.config.head.plugin if study.config.head.plugin else None)
        store = Store.open(project / study.config.store.path)
        fingerprint: Any = study.about["store"]["fingerprint"]
        here = study.config.train.model_copy(update={"memory_gb": memory / 1e9})
        config = study.config.model_copy(update={"train": here})  # of the run folders, the study's own
        bags = load_bags(config, store, study.about["labels"], lambda text: None, fingerprint)
        message: Outcome | None = None
        while not received:
            link.send(message)
            task = link.recv()
            if task is None:
                return
            message = train_one(study, bags, task[0], task[1], received, observe=watch)
        link.send(message)


def process_count(config: Config, bags: CaseBags, trainings: int, memory: int) -> int:
    """How many processes the trainings of a study are shared out to.

    Args:
        config: Resolved.
        bags: The cohort, loaded.
        trainings: How many there are to do.
        memory: Bytes that the embeddings may take in all.
    """
    asked = config.train.processes
    if asked != "auto":
        return min(int(asked), trainings)
    if bags.device.type != "cpu" or bags.resident is None:
        return 1
    if bags.resident.numel() * config.train.epochs * trainings < _WORTH_IT:
        return 1
    return max(1, min(torch.get_num_threads(), trainings, memory // max(1, bags.bytes)))
