"""A warm process that forks: each child runs one extraction and may be killed anywhere in it.

Started once a session by the fixture `zygote`; speaks JSON lines on stdin and stdout. It has
imported everything but computed nothing, so its children start in milliseconds and no thread
pool of PyTorch is cut in half by the fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEPS = ("open", "write", "fsync", "link", "unlink", "mkdir")


def main() -> None:
    import torch

    import featstore.extraction  # noqa: F401
    from featstore.backbones import timm_models  # noqa: F401

    torch.set_num_threads(1)
    import timm  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        jobs = json.loads(line)
        started = time.monotonic()
        children = []
        for job in jobs:
            child = os.fork()
            if child == 0:
                _run(job)
            children.append((child, job))
        for child, job in children:
            if "kill_after" in job:
                time.sleep(max(0.0, job["kill_after"] - (time.monotonic() - started)))
                os.kill(child, getattr(signal, job.get("signal", "SIGKILL")))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), flush=True)


def _run(job: dict[str, Any]) -> None:
    try:
        from featstore.extraction import extract
        from featstore.settings import Layers
        from featstore.strict_yaml import read_file
        from heads.config import Config

        project = Path(job["project"])
        layers = Layers()
        layers.add(Config, read_file(project / "featstore.yaml"), "featstore.yaml")
        for section, values in job.get("settings", {}).items():
            layers.add(Config, {section: values}, "the test")
        _count_steps(job)
        report = extract(layers.build(Config), project, observe=_observe(job))
        Path(job["answer"]).write_text(json.dumps(report.to_json()))
        os._exit(0 if report.interrupted is None else 128 + report.interrupted)
    except BaseException as error:
        Path(job["answer"]).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        os._exit(3)


def _observe(job: dict[str, Any]) -> Any:
    def observe(progress: object) -> None:
        _limit_files(job)
        time.sleep(job.get("pause", 0.0))

    return observe


def _limit_files(job: dict[str, Any]) -> None:
    """Let every write beyond a size fail, as on a disk that is full."""
    if "file_size_limit" in job:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size_limit"], job["file_size_limit"]))


def _count_steps(job: dict[str, Any]) -> None:
    """Kill this process at the n-th system call that the store's writing is made of."""
    from featstore.store import files

    at, after, left = job.get("kill_at"), job.get("after", False), [0]

    class Counting:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in STEPS:
                return real

            def step(*arguments: Any, **named: Any) -> Any:
                left[0] += 1
                last = left[0] == at
                if last and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*arguments, **named)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return step

    if at is not None:
        files.os = Counting()  # type: ignore[assignment]


if __name__ == "__main__":
    main()
