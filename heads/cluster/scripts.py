"""The text of sbatch scripts: what all jobs have in common, and in what they differ.

Pure functions: nothing is read, written or submitted here. `python -m heads.cluster.scripts FOLDER`
writes those that run as they are, with `sbatch` alone.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import ConfigError
from heads.cluster import shell
from heads.cluster.config import SMALL, SlurmConfig, Step

# torchrun has one code for all that goes wrong.
_INTERRUPTED = {True: '[ "$code" -ne 0 ]', False: '{ [ "$code" -eq 143 ] || [ "$code" -eq 130 ]; }'}
_PER_GPU = "${SLURM_GPUS_ON_NODE:-1}"

_SUMMARIES: dict[Step, str] = {
    "check": "featstore check: the report on the cohort",
    "extract": "featstore extract: an array, each task a share of the patches, all into one store",
    "verify": "featstore verify: look for damage in the store",
    "tune": "featstore tune: an array of workers at one search; each goes on until all trials are done",
    "study": "featstore train-head: a study of many trainings, an array, each task a share of them",
    "collect": "featstore evaluate --study: tables and pictures of a study",
    "finetune": "featstore finetune: one training, on all GPUs of all nodes",
    "vae": "featstore train-vae: one training",
}


@dataclass(frozen=True)
class Job:
    """What one step's script is made of.

    Attributes:
        step: Which step.
        name: As the queue shows it.
        words: Of featstore: the command and its options.
        settings: What it asks for (`SlurmConfig.of`): time, memory, cores, signal, restarts, set-up.
        tasks: Of an array, as ``--array`` takes them; None: a single job.
        launcher: How featstore is called, a word each.
        shell: Further words of featstore, as shell text; they may hold SLURM's variables.
        output: Pattern of the log file; None where `sbatch` is told.
        usage: Lines of comment for those who read the script.
        site: Whether a site file takes the place of set-up lines.
    """

    step: Step
    name: str
    words: tuple[str, ...]
    settings: SlurmConfig
    tasks: str | None = None
    launcher: tuple[str, ...] = ("featstore",)
    shell: str = ""
    output: str | None = None
    usage: tuple[str, ...] = ()
    site: bool = False


def script(job: Job) -> str:
    """The text of a job's script.

    Raises:
        ConfigError: It is to run under torchrun, and is called in a way that has no place for that.
    """
    many = job.step == "finetune"
    processes = _PER_GPU if job.site else str(max(1, job.settings.gpus))
    comments = "".join(f"#{' ' * bool(line)}{line}\n" for line in (_SUMMARIES[job.step], *job.usage))
    small = job.step in SMALL
    body = shell.SHELL.format(
        signals=shell.SIGNALS_SMALL if small else shell.SIGNALS,
        traps=shell.TRAPS_SMALL.format(step=job.step) if small else _traps(job.settings),
        stop=_stop(many),
        depth=2 if job.site else 1,
        setup=shell.SITE if job.site else "\n".join(job.settings.setup),
        environment=shell.ON_NODES.format(processes=processes, seconds=job.settings.signal_seconds)
        if many
        else shell.ONE_PROCESS,
        command=_command(job, many),
        at_end="" if small else shell.AT_END.format(interrupted=_INTERRUPTED[many]),
    )
    return f"#!/bin/bash\n{comments}{_directives(job)}\n{body}"


def _directives(job: Job) -> str:
    """The ``#SBATCH`` lines: numbers and names that are checked, nothing that a shell or SLURM expands."""
    settings = job.settings
    options = {
        "job-name": job.name,
        "output": job.output,
        "time": settings.time,
        "mem": settings.memory,
        "cpus-per-task": str(settings.cpus),
        "gres": f"gpu:{job.settings.gpus}" if job.settings.gpus else None,
        "nodes": str(settings.nodes) if job.step == "finetune" else None,
        "ntasks-per-node": "1" if job.step == "finetune" else None,
        "array": job.tasks,
        "signal": None if job.step in SMALL else f"B:USR1@{settings.signal_seconds}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}\n" for name, value in options.items() if value is not None]
    return "".join([*lines, "#SBATCH --requeue\n"])


def _traps(settings: SlurmConfig) -> str:
    """What happens when the time is nearly up, of a step that can go on where it was."""
    seconds = settings.signal_seconds
    return shell.TRAPS.format(restarts=settings.restarts, net=max(seconds - 10, -(-seconds // 2)))


def _stop(many: bool) -> str:
    if many:  # srun does not hand a TERM on to its tasks, but kills them
        return '  if [ -n "$featstore" ]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi'
    return '  if [ -n "$featstore" ]; then kill -TERM "$featstore" 2>/dev/null; fi'


def _command(job: Job, many: bool) -> str:
    """The line that starts featstore; the words of ``sbatch SCRIPT …`` follow its own, and win."""
    words = shlex.join(job.words) + (f" {job.shell}" if job.shell else "")
    if not many:
        return f'  {shlex.join(job.launcher)} {words} "$@" &'
    *before, last = job.launcher
    torchrun = shlex.join([*before, str(Path(last).with_name("torchrun"))])
    if Path(last).name != "featstore":
        raise ConfigError(
            f"slurm.command is {shlex.join(job.launcher)!r}, and fine-tuning calls it by torchrun",
            expected="a command that ends with featstore, which has torchrun beside it",
            where="slurm.command",
            fix="slurm.command: featstore, with set-up lines that put it on PATH",
        )
    return (
        f'  "${{on_nodes[@]}}" {torchrun} "${{rendezvous[@]}}" --no-python \\\n'
        f'    {shlex.quote(last)} {words} "$@" &'
    )


def bare_scripts() -> dict[str, str]:
    """The scripts that run without `featstore submit`, by their file's name."""
    array = "slurm_$SLURM_ARRAY_JOB_ID"
    single = '--as "slurm_$SLURM_JOB_ID"'
    log = "%x-%A_%a.log"
    jobs = [
        _bare(
            "extract", ("extract", "--shard", "auto/8"), "0-7", "", log,
            "sbatch slurm/extract.sbatch                                          # 8 tasks",
            "sbatch --gres=gpu:1 slurm/extract.sbatch --gpu",
            "sbatch --array=0-31 slurm/extract.sbatch --shard auto/32             # 32 tasks",
        ),
        _bare(
            "study", ("train-head",), "0-49", f'--folds 5 --seeds 10 --as "{array}" --task auto/50', log,
            "sbatch slurm/study.sbatch                                            # 5 folds, 10 seeds",
            "sbatch --array=0-9 slurm/study.sbatch --task auto/10                 # 5 trainings a task",
            "featstore evaluate --study study_slurm_ID        # when all have ended; ID: what sbatch said",
            "sbatch --array=3,17 slurm/study.sbatch --as slurm_ID                 # these tasks once more",
        ),
        _bare(
            "tune", ("tune",), "0-7", f'--as "{array}"', log,
            "sbatch slurm/tune.sbatch                                             # 8 workers",
            "sbatch slurm/tune.sbatch --as slurm_ID           # 8 more at the same search",
        ),
        _bare(
            "finetune", ("finetune",), None, single, "%x-%j.log",
            "sbatch slurm/finetune.sbatch RUN",
            "sbatch --nodes=2 --gres=gpu:4 slurm/finetune.sbatch RUN --gpu        # 8 GPUs",
        ),
        _bare(
            "vae", ("train-vae",), None, single, "%x-%j.log",
            "sbatch --gres=gpu:1 slurm/vae.sbatch --gpu --data-dir ROOT",
        ),
    ]  # fmt: skip
    return {f"{job.step}.sbatch": script(job) for job in jobs}


def _bare(
    step: Step, words: tuple[str, ...], tasks: str | None, shell: str, output: str, *examples: str
) -> Job:
    usage = (
        "In the project's folder, with options of sbatch before the script, of featstore behind it:",
        "",
        *(f"  {line}" for line in examples),
        "",
        "A file featstore_site.sh there is read first, or $FEATSTORE_SITE; see README.md beside this file.",
    )
    return Job(
        step, f"{step}-featstore", words, SlurmConfig(), tasks,
        shell=shell, output=output, usage=usage, site=True,
    )  # fmt: skip


def write_scripts(folder: Path) -> list[Path]:
    """Write the bare scripts into a folder."""
    texts = bare_scripts()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def main(words: Sequence[str]) -> int:
    """`python -m heads.cluster.scripts FOLDER`."""
    if len(words) != 1:
        print("python -m heads.cluster.scripts FOLDER", file=sys.stderr)
        return 2
    for path in write_scripts(Path(words[0])):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
