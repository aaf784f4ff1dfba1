"""A warm process that forks: each child runs one extraction and may be killed anywhere in it.

Started once a session by the fixture `zygote`; speaks JSON lines on stdin and stdout. It has
imported everything but computed nothing, so its children start in milliseconds and no thread
pool of PyTorch is cut in half by the fork.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

STEPS = ("open", "write", "fsync", "link", "unlink", "mkdir")
# Network file systems tell of a full disk or a lost server when a file is closed.
FALLIBLE = (*STEPS, "close")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Steps:
    """Stands in for ``os`` in `featstore.store.files`: notes the calls that writing is made of.

    Args:
        names: The calls that count as steps.
        around: Called in place of every step with its number, from 1, and the real call.

    Attributes:
        done: The names of the steps so far; ``write!`` is one that was made to fail.
    """

    def __init__(self, names: tuple[str, ...], around: Callable[[int, Callable[[], Any]], Any]) -> None:
        self.done: list[str] = []
        self._names = names
        self._around = around

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self._names:
            return real

        def step(*arguments: Any, **named: Any) -> Any:
            self.done.append(name)
            return self._around(len(self.done), partial(real, *arguments, **named))

        return step


def failing_steps(at: int | None, name: str, lasting: bool = False) -> Steps:
    """Let the step of this number fail, as if the kernel had said so.

    Args:
        at: The number, from 1; None: every step succeeds.
        name: Of the error, such as ``EIO``.
        lasting: Every later step fails, too.
    """
    code = getattr(errno, name)

    def around(number: int, call: Callable[[], Any]) -> Any:
        if at is None or number < at or (number > at and not lasting):
            return call()
        if steps.done[number - 1] == "close":  # a file is closed even where closing it fails
            call()
        steps.done[number - 1] += "!"
        raise OSError(code, os.strerror(code))

    steps = Steps(FALLIBLE, around)
    return steps


def fatal_step(done: list[str]) -> int | None:
    """The index of the failed step that must end a run: a file that cannot be removed is but litter."""
    return next((i for i, step in enumerate(done) if step.endswith("!") and step != "unlink!"), None)


def is_given_up(done: list[str]) -> bool:
    """Whether nothing was tried again after the fatal step: files were only closed and removed."""
    fatal = fatal_step(done)
    return fatal is None or {step.rstrip("!") for step in done[fatal + 1 :]} <= {"close", "unlink"}


def killing_steps(at: int, after: bool) -> Steps:
    """Kill this process before or after the step of this number."""

    def around(number: int, call: Callable[[], Any]) -> Any:
        if number == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return Steps(STEPS, around)


def main() -> None:
    import torch

    import featstore.extraction
    import featstore.settings  # noqa: F401
    import heads.config  # noqa: F401
    from featstore.backbones import timm_models  # noqa: F401

    torch.set_num_threads(1)
    import timm  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        jobs = json.loads(line)
        started = time.monotonic()
        children = []
        for job in jobs:
            # An exception in what Python does after a fork would be ignored, and leave locks locked.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            child = os.fork()
            if child == 0:
                _run(job)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            children.append((child, job))
        for child, job in children:
            if "kill_after" in job:
                time.sleep(max(0.0, job["kill_after"] - (time.monotonic() - started)))
                os.kill(child, getattr(signal, job.get("signal", "SIGKILL")))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), flush=True)


def _run(job: dict[str, Any]) -> None:
    from featstore.store import files

    steps = None
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        from featstore.extraction import extract
        from featstore.settings import Layers
        from featstore.strict_yaml import read_file
        from heads.config import Config

        project = Path(job["project"])
        layers = Layers()
        layers.add(Config, read_file(project / "featstore.yaml"), "featstore.yaml")
        for section, values in job.get("settings", {}).items():
            layers.add(Config, {section: values}, "the test")
        _let_decoding_kill(job)
        _let_memory_run_out(job)
        if "kill_at" in job:
            files.os = steps = killing_steps(job["kill_at"], job["after"])  # type: ignore[assignment]
        if "error" in job:
            files.os = steps = failing_steps(  # type: ignore[assignment]
                job["fail_at"], job["error"], job.get("lasting", False)
            )
        report = extract(layers.build(Config), project, observe=_observe(job))
        answer = report.to_json()
        code = 0 if report.interrupted is None else 128 + report.interrupted
    except KeyboardInterrupt:
        answer, code = {"error": "KeyboardInterrupt"}, 128 + signal.SIGINT
    except BaseException as error:
        answer, code = {"error": f"{type(error).__name__}: {error}"}, 3
    if steps is not None:
        answer["steps"] = steps.done
    Path(job["answer"]).write_text(json.dumps(answer))
    os._exit(code)


def _let_decoding_kill(job: dict[str, Any]) -> None:
    """Let the decoder take the whole process with it at the file ``dies_of``, as broken C code does."""
    if "dies_of" not in job:
        return
    import ctypes
    import resource

    from featstore.extraction import loading

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    real = loading.decode

    def decode(data: bytes, name: str, *arguments: Any) -> Any:
        if name == job["dies_of"]:
            if job["signal"] == "SIGSEGV":
                ctypes.string_at(0)
            os.kill(os.getpid(), getattr(signal, job["signal"]))
        return real(data, name, *arguments)

    loading.decode = decode


def _let_memory_run_out(job: dict[str, Any]) -> None:
    """Let the forward pass of this number, from 1, fail for want of memory, in the words of ``words``."""
    if job.get("no_memory_at") is None:
        return
    import torch

    from featstore.extraction.pytorch import TorchEmbedder

    real, passes = TorchEmbedder._forward, [0]

    def forward(self: TorchEmbedder, pixels: Any) -> Any:
        passes[0] += 1
        if passes[0] == job["no_memory_at"]:
            raise (RuntimeError if "allocate" in job["words"] else torch.OutOfMemoryError)(job["words"])
        return real(self, pixels)

    TorchEmbedder._forward = forward  # type: ignore[method-assign]


def _observe(job: dict[str, Any]) -> Any:
    batches = [0]

    def observe(progress: object) -> None:
        _limit_files(job)
        batches[0] += 1
        if batches[0] == job.get("signal_at"):
            os.kill(os.getpid(), getattr(signal, job["signal"]))

    return observe


def _limit_files(job: dict[str, Any]) -> None:
    """Let every write beyond a size fail, as on a disk that is full."""
    if "file_size_limit" in job:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size_limit"], job["file_size_limit"]))


if __name__ == "__main__":
    main()
