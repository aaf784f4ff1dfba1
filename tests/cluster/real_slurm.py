"""A real SLURM on this machine: two nodes, n1 and n2, in a temporary folder, with ports of their own.

Nothing of it is in /etc, and no other SLURM of the machine is touched: every command is told by
SLURM_CONF where this one is, and munge listens on a socket in the folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests import helpers

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "munged", "mungekey")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
_SLURM = """\
ClusterName=featstore
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as its old credential lives: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,defer_batch
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=8000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs.

    Attributes:
        folder: Its configuration, state and logs.
        environment: With which its commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """What a command of SLURM prints; it must succeed."""
        done = subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> list[dict[str, str]]:
        """All jobs and tasks that SLURM remembers, as `scontrol show job` describes them."""
        lines = self.run("scontrol", "show", "job", "--oneliner", "--all").splitlines()
        found = [
            dict(pair.partition("=")[::2] for pair in line.split(" ") if "=" in pair) for line in lines
        ]
        return [job for job in found if "JobId" in job]

    def states(self, job: str) -> list[str]:
        """The states of a job, of all tasks of an array, or of one (`ARRAY_TASK`)."""
        array, _, number = job.partition("_")
        tasks = [each for each in self.jobs() if array in (each["JobId"], each.get("ArrayJobId"))]
        tasks = [each for each in tasks if number in ("", each.get("ArrayTaskId"))]
        return [task["JobState"] for task in tasks]

    def wait(self, jobs: Sequence[str], seconds: float = 240, logs: Path | None = None) -> None:
        """Wait until these jobs are completed; fails with all that there is to see, also in ``logs``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = [each for job in jobs for each in self.states(job)]
            if found and all(each in ENDED for each in found):
                assert set(found) == {"COMPLETED"}, f"{found}\n{self.seen(logs)}"
                return
            time.sleep(0.5)
        pytest.fail(f"jobs {jobs} have not ended after {seconds:.0f} s\n{self.seen(logs)}")

    def seen(self, logs: Path | None = None) -> str:
        """The queue, and the ends of all logs: for the message of a test that fails."""
        shown = [self.run("squeue", "--all", "--states=all"), self.run("sinfo", "--Node")]
        files = [*self.folder.glob("*.log"), *(logs.rglob("*") if logs else [])]
        for file in sorted(file for file in files if file.is_file()):
            text = file.read_text(encoding="utf-8", errors="replace")
            shown.append(f"--- {file}\n{text[-2500:]}")
        return "\n".join(shown)


@contextmanager
def running(cpus: int = 2) -> Iterator[Slurm]:
    """A SLURM of two nodes, alone on this machine; skips where there is none and none can be had.

    Args:
        cpus: Cores that each node believes to have.
    """
    install()
    with open(Path(tempfile.gettempdir()) / f"featstore-test-slurm-{os.getuid()}.lock", "a") as lock:
        _lock(lock)
        # Short: a socket's path must be.
        folder = Path(tempfile.mkdtemp(prefix="fs-slurm-"))
        started: list[subprocess.Popen[bytes]] = []
        try:
            yield _start(folder, cpus, started)
        finally:
            _stop(folder, started)
            shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[str], seconds: float = 600) -> None:
    """Wait until no other SLURM of these tests runs on this machine; skips if that takes too long."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                pytest.skip(f"another SLURM of these tests runs on this machine: {file.name} is locked")
            time.sleep(0.5)


def install() -> None:
    """Have SLURM and munge; skips where they are missing and cannot be installed."""
    missing = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"no {missing[0]}: install slurm-wlm and munge")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
        try:
            done = subprocess.run(
                ["apt-get", "--quiet", *words],
                env=environment,
                capture_output=True,
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"no {missing[0]}, and apt-get {words[0]} took more than two minutes")
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            pytest.skip(f"no {missing[0]}, and apt-get {words[0]} failed: {said[-1] if said else ''}")
    missing = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"no {missing[0]}, and the package slurm-wlm does not bring it")


def _start(folder: Path, cpus: int, started: list[subprocess.Popen[bytes]]) -> Slurm:
    """Start munge, the controller and both nodes, all in the foreground of processes of ours."""
    folder.chmod(0o755)
    for name in ("state", "spool-n1", "spool-n2", "munge"):
        (folder / name).mkdir(mode=0o755)
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    environment = {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_"))
    }
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    text = _SLURM.format(
        host=socket.gethostname().partition(".")[0],
        ports=_free_ports(3),
        folder=folder,
        user=user,
        cpus=cpus,
    )
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    slurm = Slurm(folder, environment)
    key = folder / "munge" / "key"
    slurm.run("mungekey", "--create", f"--keyfile={key}")
    _daemon(slurm, started, "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge/pid",
            f"--seed-file={folder}/munge/seed", f"--log-file={folder}/munge/log")  # fmt: skip
    _until(slurm, lambda: (folder / "munge.socket").exists(), "munge listens")
    _daemon(slurm, started, "slurmctld", "-D")
    for node in ("n1", "n2"):
        _daemon(slurm, started, "slurmd", "-D", "-N", node)
    _until(slurm, lambda: _idle(slurm) == 2, "both nodes are idle")
    return slurm


def _daemon(slurm: Slurm, started: list[subprocess.Popen[bytes]], *words: str) -> None:
    with open(slurm.folder / f"{words[0]}-{words[-1]}.out".replace("/", "_")[-100:], "wb") as out:
        started.append(
            subprocess.Popen(
                words,
                env=slurm.environment,
                cwd=helpers.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        )


def _idle(slurm: Slurm) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"],
        env=slurm.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout.split().count("idle")


def _until(slurm: Slurm, happened: Callable[[], bool], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            files = [file for file in slurm.folder.glob("*.*") if file.is_file()]
            logs = "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)
            pytest.fail(f"SLURM has not started ({what}) after {seconds:.0f} s\n{logs}")
        time.sleep(0.2)


def _stop(folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """End all of it: jobs first, then the daemons, and whatever of their jobs is still there."""
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    for signal_ in (["--signal=KILL", "--full"], []):
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                ["scancel", "--user", str(os.getuid()), *signal_],
                env=environment, timeout=20, capture_output=True, check=False,
            )  # fmt: skip
    for process in reversed(started):
        process.terminate()
    for process in reversed(started):
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in _strays(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _strays(folder: Path) -> list[int]:
    """Processes that still know this cluster: what its jobs left."""
    wanted = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(process.name) != os.getpid() and wanted in (process / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(process.name))
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
