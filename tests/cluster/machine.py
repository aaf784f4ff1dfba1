"""A machine without SLURM on which scripts run: commands that write down how they were called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Each call becomes a line of JSON. What `featstore` does is told by $FAKE: shell text.
_RECORDER = """\
#!{python}
import json, os, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
_THEN = {
    "scontrol": """\
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n1\\nn2")
elif sys.argv[1:3] == ["show", "node"]:
    print("NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=n1 Port=6818")
elif sys.argv[1:3] == ["show", "job"]:
    print("JobId=7 JobState=COMPLETING Reason=" + os.environ.get("REASON", "None") + " Dependency=(null)")
sys.exit(int(os.environ.get("SCONTROL_CODE", "0")) if sys.argv[1] == "requeue" else 0)
""",
    "featstore": "os.execvp('bash', ['bash', '-c', os.environ.get('FAKE', 'exit 0')])\n",
    "srun": """\
os.environ["SLURM_NODEID"] = "1"
words = sys.argv[1:]
os.execvp("bash", words[words.index("bash"):])
""",
    "torchrun": """\
with open({calls!r}, "a") as file:
    found = [os.environ[name] for name in ("PET_NODE_RANK", "OMP_NUM_THREADS")]
    file.write(json.dumps(["environment", *found]) + "\\n")
words = sys.argv[sys.argv.index("--no-python") + 1:]
os.execvp(words[0], words)
""",
    "scancel": "",
    "sbatch": """\
if os.environ.get("SBATCH_FAILS_AT") and os.environ["SBATCH_FAILS_AT"] in sys.argv[-1]:
    print("sbatch: error: Batch job submission failed: Invalid account", file=sys.stderr)
    sys.exit(1)
print(100 + sum(1 for line in open({calls!r}) if '"sbatch"' in line))
""",
}


@dataclass(frozen=True)
class Machine:
    """Its commands, and what they wrote down."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """In which its commands come first; no variable of a job around the tests."""
        mine = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "FEATSTORE_"))
        }
        return {**mine, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def calls(self, command: str) -> list[list[str]]:
        """The words of every call of a command."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [words for name, *words in map(json.loads, lines) if name == command]

    def forget(self) -> None:
        """Forget all calls."""
        (self.folder / "calls").unlink(missing_ok=True)

    def run(
        self, text: str, *words: str, array: str | None = None, **environment: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a script as slurmd would: its text from another file, in a folder, with SLURM's variables."""
        script = self.folder / "slurm_script"
        script.write_text(text, encoding="utf-8", errors="surrogateescape")
        given = {name: str(value) for name, value in environment.items()}
        return subprocess.run(
            ["bash", str(script), *words],
            env={**self.environment, **self.variables(array), **given},
            cwd=self.folder, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def variables(self, array: str | None = None) -> dict[str, str]:
        """What SLURM sets for a job, or a task of an array."""
        found = {
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
        }
        if array is not None:
            found |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": array}
        return found


def make_machine(folder: Path, *commands: str) -> Machine:
    """A machine that has these commands; all by default."""
    (folder / "bin").mkdir(parents=True)
    calls = str(folder / "calls")
    for name in commands or tuple(_THEN):
        text = _RECORDER.format(python=sys.executable, calls=calls) + _THEN[name].replace(
            "{calls!r}", repr(calls)
        )
        file = folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    return Machine(folder)
