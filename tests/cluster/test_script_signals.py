"""Scripts that are told to stop: when time is nearly up, by a cancelling user, or by SLURM itself."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
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


# What featstore does when it is told to stop: it saves, and ends with 143; here once it was told $TIMES.
SAVING = """
times=0
trap 'times=$((times + 1)); echo "told $times"' TERM
echo ready
for i in {1..2400}; do  # after a test that failed it is not to run for ever
  if [ "$times" -ge "$TIMES" ]; then break; fi
  sleep 0.05
done
echo saved
exit 143
"""


def start(machine: Machine, text: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a script; it is there once featstore is ready."""
    file = machine.folder / "slurm_script"
    file.write_text(text)
    with open(machine.folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["bash", str(file)], env=machine.environment | environment, cwd=machine.folder,
            stdout=log, stderr=log,
        )  # fmt: skip
    until(machine, process, lambda: "ready" in said_by(machine))
    return process


def said_by(machine: Machine) -> str:
    return (machine.folder / "log").read_text()


def until(machine: Machine, process: subprocess.Popen[bytes], happened: Callable[[], object]) -> None:
    """Wait until something has happened, or the script has ended."""
    end = time.monotonic() + 60
    while process.poll() is None and not happened():
        assert time.monotonic() < end, said_by(machine)
        time.sleep(0.02)


def interrupt(
    machine: Machine, text: str, *signals: signal.Signals, array: str | None = None, **environment: str
) -> tuple[int, str]:
    """Run a script, send it signals once featstore is ready; its code and what it said."""
    given = {"FAKE": SAVING, "TIMES": str(len(signals))}
    process = start(machine, text, **machine.variables(array) | given | environment)
    for number, each in enumerate(signals, 1):
        process.send_signal(each)
        until(machine, process, lambda told=f"told {number}": told in said_by(machine))  # type: ignore[misc]
    return process.wait(60), said_by(machine)


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


# As if nobody had told it: in a long epoch, or writing pictures.
DEAF = """
trap 'echo heard' TERM
echo ready
for i in {1..2400}; do if [ -e killed ]; then break; fi; sleep 0.05; done
exit "${CODE:-143}"
"""


def soon(**changes: object) -> str:
    """A script whose time is so nearly up that it puts itself back after one second."""
    settings = SlurmConfig().model_copy(update={"signal_seconds": 2, **changes})
    return script(job(settings=settings))


def test_a_job_that_has_not_ended_shortly_before_its_time_is_up_is_put_back(machine: Machine) -> None:
    process = start(machine, soon(), **machine.variables("3"), FAKE=DEAF)
    process.send_signal(signal.SIGUSR1)
    until(machine, process, lambda: requeued(machine))
    assert requeued(machine) == ["7_3"]
    process.send_signal(signal.SIGTERM)  # as SLURM does with a job that is put back
    until(machine, process, lambda: said_by(machine).count("heard") == 2)
    (machine.folder / "killed").touch()
    assert process.wait(60) == 143
    assert requeued(machine) == ["7_3"]  # not once more
    assert "not stopped in time (what was saved last counts), and back in the queue" in said_by(machine)


def test_what_is_put_back_at_the_last_moment_counts_as_a_restart_too(machine: Machine) -> None:
    given = {**machine.variables(), "FAKE": DEAF, "SLURM_RESTART_COUNT": "3"}
    process = start(machine, soon(restarts=3), **given)
    process.send_signal(signal.SIGUSR1)
    until(machine, process, lambda: "restarted 3 times already" in said_by(machine))
    (machine.folder / "killed").touch()
    assert process.wait(60) == 143
    assert requeued(machine) == []


def test_a_job_cancelled_while_it_saves_is_not_put_back_at_the_last_moment(machine: Machine) -> None:
    process = start(machine, soon(), **machine.variables(), FAKE=DEAF)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    time.sleep(3)  # three times as long as until the last moment
    (machine.folder / "killed").touch()
    assert process.wait(60) == 143
    assert "told to stop" in said_by(machine)
    assert requeued(machine) == []


def test_nothing_of_the_job_is_left_running(machine: Machine) -> None:
    """What waits for the last moment ends with the script: whatever runs holds its output open."""
    file = machine.folder / "slurm_script"
    file.write_text(script(job()))  # the last moment comes after 110 seconds
    given = machine.environment | machine.variables() | {"FAKE": SAVING, "TIMES": "1"}
    process = subprocess.Popen(["bash", str(file)], env=given, cwd=machine.folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while b"ready" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert said.decode().rstrip().endswith("back in the queue")


@pytest.mark.parametrize("step", ["check", "verify", "collect"])
def test_a_step_that_would_begin_anew_is_not_put_back(machine: Machine, step: str) -> None:
    text = script(job(step=step, words=(step,)))
    assert "--signal" not in text  # it works to the end of its time
    code, said = interrupt(machine, text, signal.SIGTERM, REASON="TimeLimit")
    assert (code, requeued(machine)) == (143, [])
    assert f"the time was too short, and {step} would begin anew" in said
    machine.forget()
    code, said = interrupt(machine, text, signal.SIGTERM)
    assert (code, requeued(machine)) == (143, [])
    assert "too short" not in said
