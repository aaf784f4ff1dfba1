"""The tests of `runtimes.py`, in a process of their own.

A process that has used OpenVINO has its thread pool, and children that are forked from it later crash:
other tests fork.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import helpers

MODULE = Path(__file__).with_name("runtimes.py")


def run_apart(*marks: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *marks, str(MODULE)]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_runtimes_keep_their_promises() -> None:
    assert " passed" in run_apart()


@pytest.mark.slow
def test_the_runtimes_keep_their_promises_with_whole_networks() -> None:
    assert " passed" in run_apart("-m", "slow")
