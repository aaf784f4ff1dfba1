"""The settings of jobs on a cluster; no torch in this file: `featstore --help` reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from featstore.config import PATH, Section

Step = Literal["check", "extract", "verify", "tune", "study", "collect", "finetune", "vae"]
# One core does, and after an interruption they begin anew: they save nothing to go on with.
SMALL: tuple[Step, ...] = ("check", "verify", "collect")

# As SLURM takes them: minutes, MM:SS, HH:MM:SS, D-HH[:MM[:SS]].
_TIME = r"^(\d+|\d+:\d{1,2}(:\d{1,2})?|\d+-\d{1,2}(:\d{1,2}){0,2})$"
_MEMORY = r"^\d+[KMGT]$"
_Count = Annotated[int, Field(ge=1, le=100_000)]
_Words = Annotated[str, Field(min_length=1)]


def _as_minutes(value: object) -> object:
    """`time: 20` means twenty minutes, as sbatch has it."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Time = Annotated[str, BeforeValidator(_as_minutes), Field(pattern=_TIME)]
Memory = Annotated[str, Field(pattern=_MEMORY)]


class StepConfig(Section):
    """What one step's jobs ask for instead."""

    partition: str | None = None
    qos: str | None = None
    time: Time | None = None
    memory: Memory | None = None
    cpus: _Count | None = None
    gpus: Annotated[int, Field(ge=0, le=64)] | None = None
    sbatch: list[_Words] | None = None


class SlurmConfig(Section):
    """What jobs ask a SLURM cluster for."""

    account: str | None = Field(None, description="account that is charged (sbatch --account)")
    partition: str | None = Field(None, description="partition, or several with commas (--partition)")
    qos: str | None = Field(None, description="quality of service (--qos)")
    time: Time = Field("12:00:00", description="longest time of a task, e.g. 12:00:00 or 1-00 (--time)")
    memory: Memory = Field("16G", description="memory of a task, of a node for fine-tuning (--mem)")
    cpus: _Count = Field(4, description="cores of a task (--cpus-per-task)")
    gpus: int = Field(0, ge=0, le=64, description="GPUs of a task, of a node for fine-tuning; 0: CPU only")
    mail_user: str | None = Field(None, description="whom SLURM writes to (--mail-user)")
    mail_type: str = Field(
        "END,FAIL", pattern=r"^[A-Z_0-9]+(,[A-Z_0-9]+)*$", description="when it does (--mail-type)"
    )
    logs: str = Field("logs", description="folder of what the tasks print", json_schema_extra=PATH)
    setup: list[str] = Field(
        [], description="shell lines before each task, e.g. [module load cuda, conda activate lab]"
    )
    sbatch: list[_Words] = Field(
        [], description="further options of sbatch, a word each, e.g. ['--constraint=a100']"
    )
    command: str = Field(
        "auto", description="how tasks call featstore; auto: this one, or with set-up lines theirs"
    )
    shards: _Count = Field(8, description="tasks of an extraction")
    trainings_per_task: _Count | Literal["auto"] = Field(
        "auto", description="trainings of a study that one task does; auto: about ten minutes' worth"
    )
    tuners: _Count = Field(8, description="tasks of a tuning, all at one study")
    nodes: _Count = Field(1, description="nodes of a fine-tuning")
    at_once: _Count | None = Field(None, description="tasks of an array that run at once; null: all")
    signal_seconds: int = Field(
        120,
        ge=10,
        le=65535,
        description="seconds before its time is up that a task saves, and goes back into the queue",
    )
    restarts: int = Field(
        20,
        ge=0,
        le=1000,
        description="restarts after which a task no longer puts itself back; SLURM's own count too",
    )
    steps: dict[Step, StepConfig] = Field(
        {}, description="other values for a step: {extract: {gpus: 1, time: 4:00:00}}"
    )

    def of(self, step: Step) -> SlurmConfig:
        """These settings with a step's own values in their place."""
        own: dict[str, Any] = {}
        if step in self.steps:
            given = self.steps[step]
            own = {name: getattr(given, name) for name in given.model_fields_set}
            own = {name: value for name, value in own.items() if value is not None}
        return self.model_copy(update=own)
