"""Submitting: order, dependencies and words, with a `sbatch` that writes down how it was called."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from featstore.errors import ConfigError, FeatstoreError
from featstore.settings import Layers
from featstore.strict_yaml import read_file
from heads.cluster.checks import time_seconds
from heads.cluster.plan import STEPS, launcher
from heads.cluster.sbatch import SubmitError, clean_environment
from heads.cluster.scripts import Job, script
from heads.cluster.submission import Submission
from heads.cluster.submit import submit_project
from heads.config import Config
from tests.cluster.machine import Machine, make_machine
from tests.command_line import answer, featstore, listing, make_project

SETTINGS: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["0"], "malignant": ["1"]},
    "train": {"epochs": 3},
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = make_machine(tmp_path / "machine")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", made.environment["PATH"])
    return made


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project without a store: all that is submitted lies before it."""
    folder = tmp_path / "my project"
    folder.mkdir()
    return folder


def submit(project: Path, *steps: str, config: dict[str, Any] | None = None, **options: Any) -> Submission:
    return submit_project(Config(**(config or {})), project, steps, **options)


def argv(submission: Submission) -> dict[str, list[str]]:
    return {job.step: list(job.command) for job in submission.jobs}


def waits(submission: Submission) -> dict[str, str]:
    """By step, what it waits for."""
    found = {}
    for job in submission.jobs:
        words = [word for word in job.command if word.startswith("--dependency=")]
        assert ("--kill-on-invalid-dep=yes" in job.command) == bool(words)
        found[job.step] = words[0].partition("=")[2] if words else ""
    return found


def words_of(machine: Machine, submission: Submission, step: str, array: str | None = "0") -> list[str]:
    """How a job's script calls featstore, when bash runs it."""
    (text,) = [job.script for job in submission.jobs if job.step == step]
    machine.forget()
    done = machine.run(text, array=array)
    assert done.returncode == 0, done.stdout + done.stderr
    (words,) = machine.calls("featstore")
    return words


def test_steps_wait_for_what_they_need_among_those_given(machine: Machine, project: Path) -> None:
    slurm = {"slurm": {"command": "featstore"}}
    done = submit(project, *reversed(STEPS), config=slurm, folds=5, seeds=10)
    assert [job.step for job in done.jobs] == list(STEPS)
    assert [job.job for job in done.jobs] == [str(101 + i) for i in range(8)]
    assert waits(done) == {
        "check": "",
        "extract": "afterok:101",
        "verify": "afterok:102",
        "tune": "afterok:103",
        "study": "afterok:103",
        "collect": "afterany:105",
        "finetune": "afterok:106",
        "vae": "afterok:101",
    }
    machine.forget()
    some = submit(project, "study", "extract", config=slurm)
    assert waits(some) == {"extract": "", "study": "afterok:101"}


def test_what_each_job_runs(machine: Machine, project: Path) -> None:
    config = {"slurm": {"command": "featstore", "gpus": 2, "steps": {"extract": {"gpus": 0}}}}
    done = submit(project, *STEPS, config=config, folds=5, seeds=10, name="first")
    folder = done.folder
    assert folder is not None
    assert folder.parent == project / "reports" / "submit"
    assert folder.name.endswith("_first")
    common = ["--project", str(project), "--config", str(folder / "settings.yaml"), "--only-config"]
    study = f"{project}/runs/study_first"
    expected = {
        "check": ["check", *common],
        "extract": ["extract", *common, "--shard", "auto/8"],
        "verify": ["verify", *common],
        "tune": ["tune", *common, "--gpu", "--as", "first"],
        "study": ["train-head", *common, "--gpu", "--as", "first", "--folds", "5", "--seeds", "10",
                  "--task", "auto/10"],
        "collect": ["evaluate", *common, "--study", study],
        "finetune": ["finetune", *common, "--gpu", "--as", "first",
                     f"{study}/trainings/fold_0_seed_42"],
        "vae": ["train-vae", *common, "--gpu", "--as", "first"],
    }  # fmt: skip
    assert {step: words_of(machine, done, step) for step in STEPS} == expected
    arrays = {job.step: job.tasks for job in done.jobs if job.tasks}
    assert arrays == {"extract": "0-7", "tune": "0-7", "study": "0-9"}
    scripts = {job.step: job.script for job in done.jobs}
    for step in STEPS:
        lines = scripts[step].splitlines()
        assert ("#SBATCH --gres=gpu:2" in lines) == (step in ("tune", "study", "finetune", "vae"))
        small = step in ("check", "verify", "collect")
        assert f"#SBATCH --cpus-per-task={1 if small else 4}" in lines


def test_what_is_written(machine: Machine, project: Path) -> None:
    done = submit(project, "check", "extract", config={"slurm": {"logs": "out put"}})
    assert done.folder is not None
    assert {file.name for file in done.folder.iterdir()} == {
        "check.sbatch", "extract.sbatch", "settings.yaml", "submission.json",
    }  # fmt: skip
    assert (project / "out put").is_dir()
    written = json.loads((done.folder / "submission.json").read_text())
    assert [job["job"] for job in written["jobs"]] == ["101", "102"]
    assert [job["command"] for job in written["jobs"]] == [list(job.command) for job in done.jobs]
    assert machine.calls("sbatch") == [list(job.command[1:]) for job in done.jobs]
    for job in done.jobs:
        assert Path(job.command[-1]).read_text() == job.script
    assert f"--output={project}/out put/extract-%A_%a.log" in done.jobs[1].command
    assert f"--output={project}/out put/check-%j.log" in done.jobs[0].command
    text = done.to_text()
    assert "scancel 101 102" in text
    assert "tasks 0-7" in text
    assert json.loads(json.dumps(done.to_json()))["jobs"][0]["job"] == "101"


def test_two_submissions_in_one_second_get_a_folder_each(machine: Machine, project: Path) -> None:
    config = {"slurm": {"command": "featstore"}}
    made = [submit(project, "study", "finetune", config=config) for _ in range(3)]
    assert len({done.folder for done in made}) == 3
    for done in made:
        assert done.folder is not None
        assert words_of(machine, done, "study")[6:8] == ["--as", done.folder.name]
        assert f"study_{done.folder.name}" in words_of(machine, done, "finetune")[-1]


def test_a_dry_run_writes_nothing_and_shows_all(machine: Machine, project: Path) -> None:
    before = listing(project)
    done = submit(project, "extract", "study", dry_run=True)
    assert listing(project) == before
    assert machine.calls("sbatch") == []
    text = done.to_text()
    assert "'--dependency=afterok:<id of extract>'" in text
    for job in done.jobs:
        assert job.script in text
        assert shlex.split(job.line) == list(job.command)
    assert "nothing was submitted or written" in text
    assert "PATH" not in text.splitlines()[-1]


def test_without_slurm_a_dry_run_explains_itself(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = submit(project, "extract", dry_run=True)
    assert done.exit_code == 0
    assert "there is no sbatch on PATH" in done.to_text()
    assert "slurm/" in done.to_text()
    with pytest.raises(ConfigError, match="there is no sbatch on PATH") as refused:
        submit(project, "extract")
    assert "--dry-run" in refused.value.fix
    assert listing(project) == {}


def test_a_job_that_is_refused_names_those_that_were_not(
    machine: Machine, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_FAILS_AT", "verify.sbatch")
    with pytest.raises(SubmitError, match="Invalid account") as refused:
        submit(project, "check", "extract", "verify")
    assert refused.value.exit_code == 1
    assert "scancel 101 102" in refused.value.fix
    (file,) = project.glob("reports/submit/*/submission.json")
    assert [job["job"] for job in json.loads(file.read_text())["jobs"]] == ["101", "102"]


@pytest.mark.parametrize(
    ("steps", "options", "says"),
    [
        ((), {}, "no step"),
        (("extract", "extarct"), {}, "there is no step 'extarct'"),
        (("extract", "extract"), {}, "named 2 times"),
        (("extract",), {"folds": 5}, "--folds 5 without the step study"),
        (("extract",), {"run": Path("x")}, "--run x without the step finetune"),
        (("collect",), {}, "collect without the step study"),
        (("study",), {"seeds": 0}, "--seeds is 0"),
        (("study",), {"folds": 1}, "--folds is 1"),
        (("study", "collect"), {"resume": Path("nowhere")}, "nowhere is no study"),
        (("study",), {"resume": Path("x"), "seeds": 2}, "--folds or --seeds with --resume"),
        (("finetune",), {}, "there is no finished run"),
        (("finetune",), {"run": Path("-x")}, "-x is no run"),
        (("extract",), {"name": "a b"}, "--as is 'a b'"),
        (("extract",), {"name": "../x"}, "--as is"),
        (("extract",), {"name": "x" * 65}, "at most 64"),
        (("tune",), {"name": "tune_"}, "--as is 'tune_'"),
        (("study",), {"name": "b", "resume": Path("study_a")}, "--resume study_a and --as b at once"),
    ],
)  # fmt: skip
def test_what_cannot_be_submitted_is_refused_before_anything_is_written(
    machine: Machine, project: Path, steps: tuple[str, ...], options: dict[str, Any], says: str
) -> None:
    before = listing(project)
    with pytest.raises(FeatstoreError) as refused:
        submit(project, *steps, **options)
    assert says in str(refused.value)
    assert listing(project) == before
    assert machine.calls("sbatch") == []


@pytest.mark.parametrize(
    ("slurm", "says"),
    [
        ({"account": "a\nb"}, "line break"),
        ({"sbatch": ["a100"]}, "slurm.sbatch"),
        ({"command": "a 'b"}, "slurm.command"),
        ({"command": "   "}, "slurm.command"),
        ({"logs": "back\\slash"}, "backslash"),
        ({"logs": "new\nline"}, "line break"),
        ({"time": "3"}, r"time of 3 \(180 s\), and is told to stop 120 s before"),
        ({"steps": {"extract": {"time": "0-0:3:1"}}, "signal_seconds": 121}, "0-0:3:1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_handed_on_are_refused(
    machine: Machine, project: Path, slurm: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        submit(project, "extract", config={"slurm": slurm})
    assert listing(project) == {}


@pytest.mark.parametrize(("name", "says"), [(b"two\nlines", "line break"), (b"caf\xe9", "not UTF-8")])
def test_a_project_in_a_folder_that_no_script_can_name_is_refused(
    machine: Machine, tmp_path: Path, name: bytes, says: str
) -> None:
    odd = tmp_path / os.fsdecode(name)
    odd.mkdir()
    with pytest.raises(ConfigError, match=says):
        submit(odd, "check")
    assert listing(odd) == {}


def test_a_run_that_no_script_can_name_is_refused(machine: Machine, project: Path) -> None:
    run = project / os.fsdecode(b"caf\xe9")
    run.mkdir()
    (run / "run.json").write_text("{}")
    before = listing(project)
    with pytest.raises(ConfigError, match="not UTF-8"):
        submit(project, "finetune", run=run, config={"slurm": {"command": "featstore"}})
    assert listing(project) == before


@pytest.mark.parametrize("logs", ["taken", "taken/logs"])
def test_logs_in_a_file_are_refused(machine: Machine, project: Path, logs: str) -> None:
    (project / "taken").touch()
    before = listing(project)
    with pytest.raises(ConfigError, match="taken is a file"):
        submit(project, "check", config={"slurm": {"logs": logs}})
    assert listing(project) == before


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("1", 60), ("90", 5400), ("0:30", 60), ("2:00", 120), ("1:02:03", 3780), ("1-00", 86400),
        ("1-2:03", 93780), ("1-02:03:04", 93840), ("0", None), ("0:00", None),
    ],
)  # fmt: skip
def test_times_as_slurm_reads_them(time: str, seconds: int | None) -> None:
    assert time_seconds(time) == seconds


def test_a_short_time_is_refused_only_where_a_job_is_told_to_stop_before(
    machine: Machine, project: Path
) -> None:
    submit(project, "extract", config={"slurm": {"time": "1", "signal_seconds": 20}})
    submit(project, "extract", config={"slurm": {"time": "0"}})
    submit(project, "check", "verify", config={"slurm": {"time": "1"}})


def test_the_options_of_sbatch(machine: Machine, project: Path) -> None:
    slurm = {
        "account": "lab",
        "partition": "a,b",
        "qos": "q",
        "mail_user": "x@y.org",
        "sbatch": ["--constraint", "a100"],
        "at_once": 2,
        "steps": {
            "extract": {
                "partition": "gpu",
                "time": "1-00",
                "memory": "64G",
                "cpus": 8,
                "sbatch": ["--exclusive"],
            },
            "verify": {"cpus": 2},
        },
    }
    done = submit(project, "extract", "verify", config={"slurm": slurm})
    extract, verify = argv(done)["extract"], argv(done)["verify"]
    assert extract[1:-1] == [
        "--parsable", f"--chdir={project}", f"--output={project}/logs/extract-%A_%a.log", "--account=lab",
        "--partition=gpu", "--qos=q", "--mail-user=x@y.org", "--mail-type=END,FAIL", "--exclusive",
    ]  # fmt: skip
    assert "--partition=a,b" in verify
    assert verify[verify.index("--constraint") + 1] == "a100"
    lines = done.jobs[0].script.splitlines()
    for line in ("--time=1-00", "--mem=64G", "--cpus-per-task=8", "--array=0-7%2", "--requeue"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --cpus-per-task=2" in done.jobs[1].script


def directives(text: str) -> list[str]:
    """All that SLURM reads of a script."""
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


NASTY = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
SHELL = st.sampled_from(
    ["$(touch hurt)", "`touch hurt`", "it's", '"', "; touch hurt", "-x y", "%j%%", "a,b"]
)


@given(NASTY | SHELL, NASTY | SHELL, (NASTY | SHELL).filter(lambda text: "/" not in text))
@hypothesis_settings(max_examples=15)
def test_hostile_values_reach_no_shell(
    tmp_path_factory: pytest.TempPathFactory, account: str, mail: str, folder: str
) -> None:
    where = tmp_path_factory.mktemp("hostile")
    if folder.strip(".") == "" or "\\" in folder:
        return
    project = where / folder
    project.mkdir()
    machine = make_machine(where / "machine", "sbatch", "featstore")
    slurm = {
        "account": account,
        "partition": account,
        "mail_user": mail,
        "logs": folder,
        "command": "featstore",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", machine.environment["PATH"])
        done = submit(project, "extract", config={"slurm": slurm})
    (job,) = done.jobs
    (called,) = machine.calls("sbatch")
    assert called == list(job.command[1:])
    assert f"--account={account}" in called
    assert f"--mail-user={mail}" in called
    assert f"--chdir={project}" in called
    assert f"--output={str(project / folder).replace('%', '%%')}/extract-%A_%a.log" in called
    plain = script(Job("extract", "extract-featstore", ("extract",), Config().slurm, "0-7"))
    assert directives(job.script) == directives(plain)
    # The line that is shown, when a shell reads it, calls the same.
    machine.forget()
    subprocess.run(["bash", "-c", job.line], env=machine.environment, check=True, stdout=subprocess.DEVNULL)
    assert machine.calls("sbatch") == [called]
    settings = ["--config", f"{done.folder}/settings.yaml", "--only-config"]
    assert words_of(machine, done, "extract")[:6] == ["extract", "--project", str(project), *settings]
    assert not list(where.rglob("hurt"))


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**slurm: Any) -> tuple[str, ...]:
        return launcher(Config(slurm=slurm).slurm)

    (auto,) = of()
    assert Path(auto).is_absolute()
    assert of(setup=["module load x"]) == ("featstore",)
    assert of(command="apptainer exec 'my lab.sif' featstore") == (
        "apptainer", "exec", "my lab.sif", "featstore",
    )  # fmt: skip


def test_the_environment_of_a_job_around_it_is_not_handed_on() -> None:
    inside = {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "1", "SLURM_CONF": "/c", "PATH": "p"}
    assert clean_environment(inside) == {"SLURM_CONF": "/c", "PATH": "p"}
    outside = {"SBATCH_TIMELIMIT": "1", "SBATCH_ACCOUNT": "lab", "SLURM_CLUSTERS": "c"}
    assert clean_environment(outside) == {"SBATCH_ACCOUNT": "lab", "SLURM_CLUSTERS": "c"}


def test_jobs_see_the_settings_of_now_whatever_is_written_later(machine: Machine, project: Path) -> None:
    config = Config(**SETTINGS, head={"name": "abmil", "options": {}})
    done = submit_project(config, project, ["extract"])
    assert done.folder is not None
    layers = Layers()
    layers.add(Config, read_file(done.folder / "settings.yaml"), "settings.yaml")
    found = layers.build(Config)
    assert found == config
    # What was not given is not given now either: some keys mean something by being named.
    assert found.model_dump(exclude_unset=True) == config.model_dump(exclude_unset=True)


def test_jobs_do_not_read_what_is_written_into_featstore_yaml_later(
    machine: Machine, project: Path
) -> None:
    make_project(project, {"slurm": {"command": "featstore"}})
    before = answer(project, "check")
    jobs = answer(project, "submit", "check")["jobs"]
    (project / "featstore.yaml").write_text("trian: {epochs: 3}\n")
    assert featstore(project, "check").exit_code == 2
    done = machine.run(
        jobs[0]["script"] if "script" in jobs[0] else Path(jobs[0]["command"][-1]).read_text()
    )
    assert done.returncode == 0, done.stdout
    (words,) = machine.calls("featstore")
    assert answer(project.parent, *words)["patches"] == before["patches"]
