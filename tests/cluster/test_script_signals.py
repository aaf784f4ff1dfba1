"""Scripts that are told to stop: when time is nearly up, by a cancelling user, or by SLURM itself."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from heads.cluster.config import SlurmConfig
from heads.cluster.scripts import Job, script
from tests.cluster.machine import Machine, make_machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path / "machine")


def job(**changes: object) -> Job:
    given = {
        "step": "extract",
        "name": "featstore-extract",
        "words": ("extract",),
        "settings": SlurmConfig(),
    }
    return Job(**{**given, **changes})  # type: ignore[arg-type]


# What featstore does when it is told to stop: it saves, and ends with 143.
SAVING = "trap 'sleep 0.3; echo saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done"


def interrupt(
    machine: Machine, text: str, *signals: signal.Signals, array: str | None = None, **environment: str
) -> tuple[int, str]:
    """Run a script, send it signals once featstore is ready; its code and what it said."""
    file = machine.folder / "slurm_script"
    file.write_text(text)
    variables = machine.environment | machine.variables(array) | {"FAKE": SAVING} | environment
    with open(machine.folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["bash", str(file)], env=variables, cwd=machine.folder, stdout=log, stderr=log
        )
    said = machine.folder / "log"
    while "ready" not in said.read_text():
        assert process.poll() is None, said.read_text()
        time.sleep(0.02)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    code = process.wait(30)
    return code, said.read_text()


def requeued(machine: Machine) -> list[str]:
    return [words[1] for words in machine.calls("scontrol") if words[0] == "requeue"]


@pytest.mark.parametrize("array", [None, "3"])
def test_when_its_time_is_nearly_up_a_job_saves_and_goes_back_into_the_queue(
    machine: Machine, array: str | None
) -> None:
    code, said = interrupt(machine, script(job()), signal.SIGUSR1, array=array)
    assert code == 143
    assert "saved" in said
    assert said.rstrip().endswith("back in the queue")
    # By the array's number: a task's own may be that of the whole array.
    assert requeued(machine) == ["7" if array is None else "7_3"]


@pytest.mark.parametrize(
    ("signals", "reason", "expected"),
    [
        ((signal.SIGTERM,), "None", []),  # scancel, or preemption after which SLURM requeues by itself
        ((signal.SIGUSR1, signal.SIGTERM), "None", []),  # cancelled while it was saving
        ((signal.SIGTERM,), "TimeLimit", ["7"]),  # the end of its time
        ((signal.SIGUSR1, signal.SIGTERM), "TimeLimit", ["7"]),  # while it was saving
        ((signal.SIGUSR1, signal.SIGUSR1), "None", ["7"]),
    ],
)  # fmt: skip
def test_a_job_that_was_told_to_stop_saves_and_stays_away(
    machine: Machine, signals: tuple[signal.Signals, ...], reason: str, expected: list[str]
) -> None:
    code, said = interrupt(machine, script(job()), *signals, REASON=reason)
    assert code == 143
    assert "saved" in said
    assert requeued(machine) == expected


def test_a_job_that_ends_all_the_same_is_not_run_again(machine: Machine) -> None:
    for ends in (0, 1):
        fake = SAVING.replace("exit 143", f"exit {ends}")
        code, _ = interrupt(machine, script(job()), signal.SIGUSR1, FAKE=fake)
        assert code == ends
    assert requeued(machine) == []


def test_there_is_an_end_to_going_back(machine: Machine) -> None:
    text = script(job(settings=SlurmConfig(restarts=3)))
    code, said = interrupt(machine, text, signal.SIGUSR1, SLURM_RESTART_COUNT="3")
    assert (code, requeued(machine)) == (143, [])
    assert "restarted 3 times already" in said
    interrupt(machine, text, signal.SIGUSR1, SLURM_RESTART_COUNT="2")
    assert requeued(machine) == ["7"]


def test_a_refused_requeue_is_told(machine: Machine) -> None:
    code, said = interrupt(machine, script(job()), signal.SIGUSR1, SCONTROL_CODE="1")
    assert code == 143
    assert "SLURM did not take it back" in said


def test_a_signal_during_the_set_up_is_not_lost(machine: Machine) -> None:
    text = script(job(settings=SlurmConfig(setup=["echo ready", "sleep 0.5"])))
    code, _ = interrupt(machine, text, signal.SIGUSR1)
    assert code == 143
    assert machine.calls("featstore") == []
    assert requeued(machine) == ["7"]


def test_fine_tuning_is_told_to_stop_by_slurm(machine: Machine) -> None:
    """srun would kill its tasks; SLURM hands the signal on to them, on all nodes."""
    text = script(job(step="finetune", words=("finetune",)))
    text = text.replace('--signal=TERM "$SLURM_JOB_ID"', '"$SLURM_JOB_ID"; kill "$featstore"')
    assert text != script(job(step="finetune", words=("finetune",)))
    code, _ = interrupt(machine, text, signal.SIGUSR1)
    assert code == 143
    assert machine.calls("scancel") == [["7"]]
    assert requeued(machine) == ["7"]
