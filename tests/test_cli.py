"""The command line as typed: answers, exit codes, and what is read and written where."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featstore import __version__
from featstore.settings import flag_names, leaves
from featstore.store import Store
from heads.config import Config
from tests import helpers
from tests.command_line import TINY_FLAGS, answer, featstore, listing, make_project, refused, succeeded

HEAVY = ("torch", "torchvision", "timm", "zarr", "matplotlib", "pandas", "h5py")
COMMANDS = ("init", "check", "extract", "info", "bench", "demo")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose store is full; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("cli"), cases=3, stains=("h&e", "sox10"))
    succeeded(project, "extract")
    return project


@pytest.fixture
def project(extracted: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(extracted, tmp_path / "project"))


def test_help_lists_the_commands_imports_little_and_writes_nothing(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.argv = ['featstore', *sys.argv[1:]]\nimport cli\n"
        "try:\n    cli.app()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    for args in (["--help"], ["extract", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(helpers.ROOT), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.strip() == "[]"
        assert list(tmp_path.iterdir()) == []
        if args == ["--help"]:
            assert [name for name in COMMANDS if re.search(rf"^\W*{name} ", done.stdout, re.M)] == list(
                COMMANDS
            )


def test_the_file_itself_is_the_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, helpers.ROOT / "cli.py", "info"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "no featstore.yaml" in done.stderr
    assert "featstore init" in done.stderr


def test_version(tmp_path: Path) -> None:
    assert succeeded(tmp_path, "--version").stdout == f"featstore {__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("extract", "--no-such-flag"),
        ("extract", "--resize"),
        ("check", "--sample", "0"),
        ("check", "--sample", "many"),
        ("check", "--bar"),
        ("init",),
        ("extract", "surplus"),
        ("--set", "train.epochs=3"),
    ],
)
def test_wrong_usage_ends_with_2(extracted: Path, args: tuple[str, ...]) -> None:
    refused(extracted, *args, to_do=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_every_setting(tmp_path: Path, command: str) -> None:
    shown = succeeded(tmp_path, command, "--help").output
    assert "--project" in shown
    assert "--json" in shown
    names = flag_names(Config)
    words: list[str] = []
    for leaf in leaves(Config):
        for flag in names[leaf.path]:
            words += [flag, "--no-" + flag[2:]] if leaf.is_flag else [flag, "text"]
    # Read before --help is, which then ends it: nothing is run.
    assert succeeded(tmp_path, command, *words, "--help").output == shown
    assert list(tmp_path.iterdir()) == []


def test_a_folder_elsewhere_and_a_project_elsewhere(tmp_path: Path) -> None:
    helpers.make_cohort(tmp_path / "data", cases=1, stains=("h&e",), slices=1)
    helpers.write_labels(tmp_path, {"1": "1"})
    (tmp_path / "work").mkdir()
    succeeded(tmp_path, "init", "data", "--labels", "labels.csv", "--project", "work", *TINY_FLAGS)
    assert not (tmp_path / "featstore.yaml").exists()
    assert answer(tmp_path, "extract", "--project", "work")["committed"] == 5
    assert (tmp_path / "work" / "store").is_dir()
    assert answer(tmp_path / "work", "check")["classes"]["class_1"]["patches"] == 5
    (tmp_path / "work" / "deep" / "er").mkdir(parents=True)
    for folder in (tmp_path / "work", tmp_path / "work" / "deep" / "er"):
        assert answer(folder, "info")["patches"] == 5
    refused(tmp_path, "info", says=("no featstore.yaml", "--project"))
    refused(tmp_path, "info", "--project", "none", says=("no featstore.yaml", "none"))


def test_flags_that_name_files_start_from_the_current_folder(project: Path) -> None:
    below = project / "below"
    below.mkdir()
    helpers.write_labels(below, {"1": "a", "2": "b"})
    (below / "groups.csv").write_text("case,group\n1,g\n2,g\n")
    found = answer(below, "check", "--labels", "labels.csv")
    assert list(found["classes"]) == ["a", "b"]
    assert answer(below, "info", "--store", "../store")["patches"] == 30
    assert answer(below, "check", "--groups", "groups.csv")["left_out"]["groups"] == 1
    # What a file says starts from the project folder, whoever reads it.
    (below / "over.yaml").write_text("labels: {file: below/labels.csv}")
    assert list(answer(below, "check", "--config", "over.yaml")["classes"]) == ["a", "b"]
    # A setting can be taken back by a flag there too.
    assert list(answer(below, "check", "--config", "over.yaml", "--labels", "null")["classes"]) != [
        "a",
        "b",
    ]


def test_weights_given_as_a_flag_start_from_the_current_folder(project: Path) -> None:
    import timm

    below = project / "below"
    below.mkdir()
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), below / "mine.pth")
    found = answer(below, "extract", "--weights", "mine.pth", "--store", "store")
    assert (found["committed"], (below / "store").is_dir()) == (30, True)


def test_underscores_and_section_names_are_the_same_flags(project: Path) -> None:
    for flags in (
        ("--per_slice_cap", "5"),
        ("--per-slice-cap", "5"),
        ("--train_per-slice-cap=5",),
        ("--set", "train.per-slice-cap=5"),
    ):
        assert answer(project, "check", *flags)["caps"]["per_slice_cap"] == 5
    assert answer(project, "check", "--no_normalize_cases")["patches"] == 30


def test_text_and_json_of_extract_info_and_check(project: Path) -> None:
    shutil.rmtree(project / "store")
    first = succeeded(project, "extract")
    assert "30 new, 0 changed, 0 done already" in first.stdout
    assert "30 patches embedded and committed" in first.stdout
    report = json.loads((project / "reports" / "extract" / "report.json").read_text())
    assert report["committed"] == 30
    shown = succeeded(project, "info").stdout
    for part in ("30 patches of 3 cases in 6 slices", "timm:test_resnet", "h&e", "sox10"):
        assert part in shown
    facts = answer(project, "info")
    assert (facts["cases"], facts["slices"], facts["patches"]) == (3, 6, 30)
    assert facts["stains"]["sox10"] == {"cases": 3, "slices": 3, "patches": 15}
    assert facts["fingerprint"] == Store.open(project / "store").spec.fingerprint
    assert "Quality" in succeeded(project, "check").stdout
    found = answer(project, "check")
    assert (found["patches"], found["quality"]["patches"]) == (30, 30)
    assert (project / "reports" / "check" / "contact_sheet.png").is_file()


def test_a_second_extract_has_nothing_to_do(project: Path) -> None:
    before = listing(project / "store")
    assert "nothing left to do" in succeeded(project, "extract").stdout
    found = answer(project, "extract")
    assert (found["committed"], found["already_done"]) == (0, 30)
    assert listing(project / "store") == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_insisting_on_a_gpu_where_there_is_none(project: Path) -> None:
    refused(project, "extract", "--gpu", says=("no GPU", "CUDA devices", "without --gpu"))
    shutil.rmtree(project / "store")
    refused(project, "extract", "--device", "cuda:7", says=("no GPU 'cuda:7'",))
    for device in ("cuda:128", "cuda:99999999999999999999"):  # beyond what PyTorch reads rightly
        refused(project, "extract", "--device", device, says=(device,))


def test_prune_drops_what_has_vanished(project: Path) -> None:
    gone = project / "patches" / helpers.patch_name("2", "match_1", "h&e", 3)
    gone.unlink()
    shown = succeeded(project, "extract").stdout
    assert "1 embeddings are of patches that have vanished" in shown
    assert gone.name in shown
    assert gone.name in (project / "reports" / "extract" / "vanished.csv").read_text(encoding="utf-8")
    assert answer(project, "info")["patches"] == 30
    assert answer(project, "extract", "--prune")["pruned"] == 1
    assert answer(project, "info")["patches"] == 29


def test_shards_share_the_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(project / "store")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    refused(project, "extract", "--shard", "2/2", says=("0/2 to 1/2",))
    refused(project, "extract", "--shard", "2", says=("extract.shard is '2'", "I/N"))
    refused(project, "extract", "--shard", "auto/2", says=("SLURM_ARRAY_TASK_ID",))
    first = answer(project, "extract", "--shard", "0/2")["committed"]
    assert 0 < first < 30
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert answer(project, "extract", "--shard", "auto/2")["committed"] == 30 - first
    assert answer(project, "extract")["committed"] == 0
    names = {path.name for path in (project / "reports" / "extract").glob("report_*.json")}
    assert "report_0_of_2.json" in names


def test_a_damaged_store_ends_with_1(project: Path) -> None:
    record = project / "store" / "cases" / "2" / "000001.json"
    record.write_bytes(record.read_bytes().replace(b'"rows":5', b'"rows":4'))
    result = featstore(project, "info")
    assert result.exit_code == 1
    assert str(record.relative_to(project)) in result.stderr
    assert "to do:" in result.stderr


def test_the_demo_ends_with_two_runs_and_the_rank_of_planted_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    import pandas as pd
    from sklearn.metrics import roc_auc_score

    from featstore import demo
    from tests import helpers

    def small(folder: Path) -> SimpleNamespace:
        make_project(folder, {"labels": {"file": "labels.csv"}}, cases=10, slices=2, patches=4)
        helpers.write_labels(folder, {str(n): n % 2 for n in range(1, 11)})
        paths = sorted(path.name for path in (folder / "patches").iterdir())
        planted = [int("patch2" in path and int(path.split("_")[1]) % 2) for path in paths]
        pd.DataFrame({"path": paths, "planted": planted}).to_csv(folder / "planted.csv", index=False)
        return SimpleNamespace(n_patches=80, n_cases=10)

    monkeypatch.setattr(demo, "write_demo_project", small)
    found = answer(tmp_path, "demo", "here")
    assert found["store"]["patches"] == 80
    assert [Path(run["run"]).name.split("_", 3)[3] for run in found["runs"]] == [
        "hierarchical",
        "dual_stream",
    ]
    for run in found["runs"]:
        attention = pd.read_csv(Path(run["run"]) / "attention_analysis" / "patch_attention.csv")
        attention["planted"] = attention["path"].str.contains("patch2") & (attention["case_id"] % 2 == 1)
        cases = [case for _, case in attention.groupby("case_id") if case["planted"].any()]
        aucs = [roc_auc_score(case["planted"], case["effective_attention"]) for case in cases]
        top = [case.nlargest(2, "effective_attention")["planted"].sum() for case in cases]
        want = (len(cases), 2 * len(cases), pytest.approx(sum(aucs) / len(aucs)), sum(top))
        planted = run["planted"]
        assert (planted["cases"], planted["planted"], planted["auc"], planted["found"]) == want
        assert run["planted_alone"]["cases"] == planted["cases"]
        assert 0 <= run["planted_alone"]["auc"] <= 1
    assert Path(found["report"]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    text = succeeded(tmp_path, "demo", "there").stdout
    assert "planted patches by effective attention: AUC" in text
    assert "planted patches by what each patch says alone: AUC" in text
    assert "featstore train-head" in text
