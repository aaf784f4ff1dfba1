"""The text of sbatch scripts: exact, and what it does when bash runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from featstore.errors import ConfigError
from heads.cluster.config import SlurmConfig
from heads.cluster.scripts import Job, bare_scripts, main, script
from tests import helpers
from tests.cluster.machine import Machine, make_machine

SCRIPTS = helpers.ROOT / "slurm"
HOSTILE = (
    "plain", "two words", "it's", '"', "$(touch hurt)", "`touch hurt`", "; touch hurt", "a\nb", "-x", "--",
    "%j", "a,b", "*", "~", "\\", "!!", "$HOME", "${X", "é漢", "#", "&&", "|cat", ">hurt", "",
)  # fmt: skip


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


@pytest.mark.parametrize("name", ["extract", "study", "tune", "finetune", "vae"])
def test_the_scripts_are_what_the_generator_writes(name: str) -> None:
    file = SCRIPTS / f"{name}.sbatch"
    assert file.read_text(encoding="utf-8") == bare_scripts()[file.name], (
        "write them anew: python -m heads.cluster.scripts slurm"
    )


def test_there_is_no_other_script_and_the_generator_writes_all(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in SCRIPTS.glob("*.sbatch")}
    assert main([]) == 2


def test_the_exact_text_of_a_task_of_extraction() -> None:
    settings = SlurmConfig(
        time="4:00:00",
        memory="8G",
        cpus=2,
        gpus=1,
        setup=["module load cuda"],
        restarts=3,
        signal_seconds=60,
    )
    made = script(job(words=("extract", "--shard", "auto/4"), tasks="0-3%2", settings=settings))
    assert made == (Path(__file__).parent / "golden" / "extract.sbatch").read_text(encoding="utf-8")


def test_the_exact_text_of_fine_tuning_on_two_nodes() -> None:
    words = ("finetune", "--project", "/a b", "--as", "x")
    settings = SlurmConfig(nodes=2, gpus=4)
    launcher = ("apptainer", "exec", "lab one.sif", "/opt/bin/featstore")
    made = script(
        job(step="finetune", name="featstore-finetune", words=words, settings=settings, launcher=launcher)
    )
    assert made == (Path(__file__).parent / "golden" / "finetune.sbatch").read_text(encoding="utf-8")


@pytest.mark.parametrize("step", ["extract", "study", "tune"])
def test_a_bare_script_runs_its_command_and_the_words_behind_it_win(machine: Machine, step: str) -> None:
    done = machine.run(bare_scripts()[f"{step}.sbatch"], "--task", "auto/9", *HOSTILE, array="4")
    assert done.returncode == 0, done.stdout + done.stderr
    (words,) = machine.calls("featstore")
    expected = {
        "extract": ["extract", "--shard", "auto/8"],
        "study": ["train-head", "--folds", "5", "--seeds", "10", "--as", "slurm_7", "--task", "auto/50"],
        "tune": ["tune", "--as", "slurm_7"],
    }
    assert words == [*expected[step], "--task", "auto/9", *HOSTILE]


def test_fine_tuning_starts_a_torchrun_a_node(machine: Machine) -> None:
    done = machine.run(bare_scripts()["finetune.sbatch"], "a run", "--gpu", SLURM_GPUS_ON_NODE=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (words,) = machine.calls("torchrun")
    assert shlex.join(words) == (
        "--nnodes 2 --nproc-per-node 2 --master-addr 10.0.0.1 --master-port 20007 --no-python "
        "featstore finetune --as slurm_7 'a run' --gpu"
    )
    assert machine.calls("environment") == [["1", "1"]]  # rank of the node; 3 cores, 2 processes
    (words,) = machine.calls("srun")
    assert words[:3] == ["--ntasks-per-node=1", "--cpus-per-task=3", "--kill-on-bad-exit=0"]


def test_the_vae_runs_once(machine: Machine) -> None:
    assert machine.run(bare_scripts()["vae.sbatch"], "--gpu").returncode == 0
    assert machine.calls("featstore") == [["train-vae", "--as", "slurm_7", "--gpu"]]


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")), max_size=4))
@hypothesis_settings(max_examples=20)
def test_no_word_is_read_by_a_shell(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    folder = tmp_path_factory.mktemp("shell")
    machine = make_machine(folder / "machine", "featstore")
    words = [*words, *HOSTILE]
    before = set(machine.folder.iterdir())
    done = machine.run(script(job(words=tuple(words))), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.calls("featstore") == [words + words]
    assert {path.name for path in set(machine.folder.iterdir()) - before} == {"slurm_script", "calls"}


def test_the_command_itself_is_quoted(machine: Machine) -> None:
    odd = machine.folder / "a $(touch hurt) 'b"
    odd.mkdir()
    featstore = odd / "featstore"
    (machine.folder / "bin" / "featstore").rename(featstore)
    assert machine.run(script(job(launcher=(str(featstore),)))).returncode == 0
    assert machine.calls("featstore") == [["extract"]]


def test_fine_tuning_needs_a_torchrun_beside_featstore() -> None:
    with pytest.raises(ConfigError, match="calls it by torchrun"):
        script(job(step="finetune", launcher=("python", "-m", "cli")))


def test_outside_of_slurm_it_says_what_it_is_for(machine: Machine) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "extract.sbatch")],
        env=machine.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "sbatch" in done.stderr
    assert machine.calls("featstore") == []


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        (["false"], "failed with code 1: false"),
        (["echo first", "no_such_command cuda", "true"], "failed with code 127: no_such_command cuda"),
        (["f() { (exit 3); }", "f"], "failed with code 3"),
        (["source nowhere.sh"], "failed with code 1: source nowhere.sh"),
    ],
)
def test_a_set_up_line_that_fails_ends_the_job(machine: Machine, setup: list[str], says: str) -> None:
    done = machine.run(script(job(settings=SlurmConfig(setup=setup))))
    assert done.returncode == 1
    assert says in done.stdout
    assert machine.calls("featstore") == []


def test_set_up_lines_are_shell_and_may_be_sloppy(machine: Machine) -> None:
    """As those of conda and modules are: unset variables, failures within functions, words of their own."""
    setup = [
        "module() { false; echo loaded \"$1\"; }",
        "module cuda",
        'echo "unset: $NOT_SET, words: $#"',
        "false || true",
        "if false; then",
        "  echo never",
        "fi",
        "set -- other words",
        "set -e",
        "export FROM_SETUP='two words'",
    ]  # fmt: skip
    done = machine.run(
        script(job(settings=SlurmConfig(setup=setup))), "mine", FAKE='echo "got $FROM_SETUP"; exit 4'
    )
    assert done.returncode == 4
    assert [line for line in done.stdout.splitlines() if line] == [
        "loaded cuda", "unset: , words: 0", "got two words",
    ]  # fmt: skip
    assert machine.calls("featstore") == [["extract", "mine"]]


@pytest.mark.parametrize("way", ["beside", "named", "relative"])
def test_a_site_file_is_read_by_the_bare_scripts(machine: Machine, way: str) -> None:
    name = "featstore_site.sh" if way == "beside" else "my site.sh"
    (machine.folder / name).write_text('[ -z "$1" ]\nexport SITE=here\n')
    given = {"named": str(machine.folder / name), "relative": name}
    environment = {"FEATSTORE_SITE": given[way]} if way in given else {}
    done = machine.run(
        bare_scripts()["extract.sbatch"], "--word", array="0", FAKE="echo site $SITE", **environment
    )
    assert "site here" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("broken", ["false\ntrue\n", None])
def test_a_site_file_that_fails_ends_the_job(machine: Machine, broken: str | None) -> None:
    site = machine.folder / "site.sh"
    if broken:
        site.write_text(broken)
    done = machine.run(bare_scripts()["extract.sbatch"], array="0", FEATSTORE_SITE=site)
    assert done.returncode == 1
    assert "a line of the set-up has failed" in done.stdout
    assert machine.calls("featstore") == []


def test_threads_are_those_of_the_task(machine: Machine) -> None:
    done = machine.run(script(job()), FAKE="echo threads $OMP_NUM_THREADS", OMP_NUM_THREADS=77)
    assert "threads 3" in done.stdout


def test_the_code_of_featstore_is_the_jobs(machine: Machine) -> None:
    for code in (0, 1, 2, 137):
        assert machine.run(script(job()), FAKE=f"exit {code}").returncode == code


def test_bash_finds_no_fault_in_any_script() -> None:
    texts = [*bare_scripts().values(), script(replace(job(), step="finetune"))]
    for text in texts:
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_generator_is_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "heads.cluster.scripts", str(tmp_path)],
        cwd=helpers.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path / "extract.sbatch") in done.stdout
