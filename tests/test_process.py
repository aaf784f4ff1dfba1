"""What a scheduler gave: cores and memory, out of the environment, cgroups of both versions, and /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore import process
from featstore.process import cgroup_memory, scheduled_memory, usable_cores, used_memory
from featstore.resident import free_memory, memory_budget

GIB = 1 << 30


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scheduler and no torchrun, wherever the tests run."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name == "LOCAL_WORLD_SIZE":
            monkeypatch.delenv(name)


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine on which nobody is bound to anything."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    return 64


def given(monkeypatch: pytest.MonkeyPatch, **names: object) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


def test_cores_are_those_of_the_affinity(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"SLURM_CPUS_PER_TASK": 8}, 8),
        ({"SLURM_CPUS_PER_TASK": 8, "SLURM_CPUS_ON_NODE": 32}, 8),
        ({"SLURM_CPUS_PER_TASK": 128}, 64),  # more than it is bound to
        ({"SLURM_CPUS_ON_NODE": 16}, 16),
        ({"SLURM_CPUS_ON_NODE": 16, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 4),
        ({"SLURM_CPUS_ON_NODE": 2, "SLURM_STEP_TASKS_PER_NODE": "4"}, 1),
        # Each of the tasks of srun has its own cores; the processes of one torchrun share them.
        ({"SLURM_CPUS_PER_TASK": 8, "SLURM_STEP_TASKS_PER_NODE": "4"}, 8),
        ({"SLURM_CPUS_PER_TASK": 8, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"SLURM_CPUS_PER_TASK": 8, "LOCAL_WORLD_SIZE": 4}, 8),  # as a script of srun's tasks may set it
        ({"LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "x"}, 16),
        ({"LOCAL_WORLD_SIZE": 100, "TORCHELASTIC_RUN_ID": "x"}, 1),
    ],
)
def test_cores_that_slurm_and_torchrun_leave(
    cores: int, monkeypatch: pytest.MonkeyPatch, names: dict[str, object], expected: int
) -> None:
    given(monkeypatch, **names)
    assert usable_cores() == expected


BAD = ["", "0", "-3", "many", "8.5", "1e3", "9" * 40, "4(x2", "²", " "]


@pytest.mark.parametrize("bad", BAD)
def test_nonsense_in_the_environment_is_passed_over(
    cores: int, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    for name in (
        "SLURM_CPUS_PER_TASK",
        "SLURM_CPUS_ON_NODE",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_MEM_PER_NODE",
        "SLURM_MEM_PER_CPU",
        "SLURM_MEM_PER_GPU",
        "SLURM_GPUS_ON_NODE",
        "LOCAL_WORLD_SIZE",
    ):
        monkeypatch.setenv(name, bad)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert usable_cores() == cores
    assert scheduled_memory() is None
    assert free_memory() > 0


@pytest.mark.parametrize(
    ("names", "gib"),
    [
        ({"SLURM_MEM_PER_NODE": 8 << 10}, 8),
        ({"SLURM_MEM_PER_NODE": 8 << 10, "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, 4),
        (
            {"SLURM_MEM_PER_NODE": 8 << 10, "SLURM_STEP_TASKS_PER_NODE": "2"}
            | {"LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"},
            2,
        ),
        ({"SLURM_MEM_PER_CPU": 1 << 10, "SLURM_CPUS_ON_NODE": 6}, 6),
        ({"SLURM_MEM_PER_CPU": 1 << 10, "SLURM_CPUS_PER_TASK": 5}, 5),
        ({"SLURM_MEM_PER_CPU": 1 << 10}, 1),
        ({"SLURM_MEM_PER_GPU": 3 << 10, "SLURM_GPUS_ON_NODE": 2}, 6),
    ],
)
def test_memory_that_slurm_promised(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, object], gib: float
) -> None:
    given(monkeypatch, **names)
    monkeypatch.setattr(process, "used_memory", lambda: 1000)
    assert scheduled_memory() == gib * GIB - 1000


def test_what_is_used_counts_against_what_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself, and those that it started and they started."""
    held = np.ones(100 << 20, np.uint8)  # touched, so that it is there
    mine = used_memory()
    assert mine > held.nbytes
    script = (
        "import subprocess, sys\n"
        "held = b'x' * (50 << 20)\n"
        "inner = 'held = b\"x\" * (50 << 20); print(1, flush=True); input()'\n"
        "child = subprocess.Popen([sys.executable, '-c', inner], stdin=0)\n"
        "child.wait()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"1\n"
        with_children = used_memory()
        child.stdin.close()
    assert with_children - mine > 90 << 20
    given(monkeypatch, SLURM_MEM_PER_NODE=2 << 10)
    assert 0 < memory_budget("auto", torch.device("cpu")) * 2 <= 2 * GIB - held.nbytes
    given(monkeypatch, SLURM_MEM_PER_NODE=50)
    assert free_memory() == 0


def test_pages_of_files_are_not_used_memory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 << 20))
    before = used_memory()
    mapped = np.memmap(file, np.uint8, "r")
    assert int(mapped.max()) == 0  # all of it is in memory now
    assert used_memory() - before < 32 << 20


def make_cgroup(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /proc, a folder in which this process belongs to the cgroup of a job's task."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "self" / "cgroup").write_text("0::/slurm/job_1/task_0\n")
    monkeypatch.setattr(process, "_PROC", folder)
    return folder


def test_a_cgroup_of_version_2_and_those_above_it(proc: Path, tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    assert cgroup_memory(mount) == []
    make_cgroup(mount / "slurm" / "job_1" / "task_0", memory__max="max", memory__current=7)
    assert cgroup_memory(mount) == []
    make_cgroup(mount / "slurm" / "job_1", memory__max=9000, memory__current=2000)
    assert cgroup_memory(mount) == [7000]
    make_cgroup(mount / "slurm", memory__max=50_000, memory__high=40_000, memory__current=39_000)
    make_cgroup(mount / "slurm" / "job_2", memory__max=10, memory__current=9)  # somebody else's
    assert cgroup_memory(mount) == [1000, 7000]
    make_cgroup(mount, memory__max=500, memory__current=600)
    assert cgroup_memory(mount) == [-100, 1000, 7000]


def test_pages_of_files_in_a_cgroup_are_free(proc: Path, tmp_path: Path) -> None:
    job = tmp_path / "cgroup" / "slurm" / "job_1"
    make_cgroup(
        job,
        memory__max=9000,
        memory__current=8000,
        memory__stat="anon 500\nfile 7000\nshmem 500\ninactive_file 4000\nactive_file 2500",
    )
    assert cgroup_memory(tmp_path / "cgroup") == [7500]
    make_cgroup(job, memory__stat="inactive_file 9999")  # read a moment later
    assert cgroup_memory(tmp_path / "cgroup") == [9000]
    make_cgroup(job, memory__stat="no\nsuch thing")
    assert cgroup_memory(tmp_path / "cgroup") == [1000]


def test_a_cgroup_of_version_1(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text(
        "9:name=systemd:/x\n4:cpuset,memory:/slurm/uid_7/job_1\n2:cpu:/y\n0::/\n"
    )
    mount = tmp_path / "cgroup"
    own = mount / "memory" / "slurm" / "uid_7" / "job_1"
    make_cgroup(
        own,
        memory__limit_in_bytes=9000,
        memory__usage_in_bytes=8000,
        memory__stat="cache 9\ntotal_inactive_file 3000\ntotal_active_file 1000\ninactive_file 5",
    )
    make_cgroup(mount / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=5)
    assert cgroup_memory(mount) == [2**63 - 4096 - 5, 5000]


@pytest.mark.parametrize("line", ["0::/docker/1234", "0::/../job_9", "0::/", "", "nonsense", "0::/a//./b/"])
def test_in_a_container_only_the_root_may_be_there(proc: Path, tmp_path: Path, line: str) -> None:
    (proc / "self" / "cgroup").write_text(f"{line}\n")
    make_cgroup(tmp_path / "job_9", memory__max=1, memory__current=0)  # outside the mount
    make_cgroup(tmp_path / "cgroup", memory__max=3000, memory__current=1000)
    assert cgroup_memory(tmp_path / "cgroup") == [2000]
    (proc / "self" / "cgroup").unlink()
    assert cgroup_memory(tmp_path / "cgroup") == [2000]


def test_where_only_a_limit_is_known_the_process_itself_counts(
    proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cgroup(tmp_path / "cgroup" / "slurm", memory__max=5000)
    monkeypatch.setattr(process, "used_memory", lambda: 1500)
    assert cgroup_memory(tmp_path / "cgroup") == [3500]


def test_free_memory_is_the_least_of_all_and_shared_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr("featstore.resident._MEMINFO", meminfo)
    monkeypatch.setattr("featstore.resident._CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(process, "used_memory", lambda: 0)
    meminfo.write_text("MemAvailable: 4096 kB\n")
    assert free_memory() == 4 << 20
    make_cgroup(tmp_path / "cgroup", memory__max=3 << 20, memory__current=0)
    assert free_memory() == 3 << 20
    given(monkeypatch, SLURM_MEM_PER_NODE=2)
    assert free_memory() == 2 << 20
    given(monkeypatch, LOCAL_WORLD_SIZE=2, TORCHELASTIC_RUN_ID="x")
    assert free_memory() == 1 << 20
    meminfo.write_text("MemAvailable: 1024 kB\n")
    assert free_memory() == 1 << 19
