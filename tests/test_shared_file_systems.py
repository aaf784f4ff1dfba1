"""What commands ask of a shared file system: no folder listed twice, no file looked at for nothing.

Commands run in a process that notes every file that it opens, every folder that it lists and every look
at a file, by hooks in Python; and, where `strace` may be used, by the kernel's own account as well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from featstore.config import StoreConfig
from featstore.store import Store
from heads.cohort import describe, load_bags
from tests import helpers
from tests.command_line import make_project
from tests.heads.planted import CASES, LABELS, NAMES, SPLIT, make_config, make_planted_project

WATCH = r"""
import contextlib, json, os, sys, threading
import h5py
seen, root, last = [], sys.argv[1], threading.local()
def note(call, path):
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root):
        seen.append((call, os.fspath(path)))
def hook(event, arguments):
    if event == "open" and not (arguments[2] or 0) & os.O_DIRECTORY:
        path, mode, _ = arguments
        # A file that open() opens by os.open, as its `opener`, is told twice.
        told, last.path = mode is None and getattr(last, "path", None) == path, mode and path
        if not told:
            note("open", path)
    elif event in ("os.listdir", "os.scandir"):
        note("list", arguments[0])
def noting(look):
    return lambda path, *rest, **options: (note("stat", path), look(path, *rest, **options))[1]
class File(h5py.File):
    def __init__(self, name, *rest, **options):
        note("open", name)
        super().__init__(name, *rest, **options)
def mark(name):
    with contextlib.suppress(OSError):
        open(f"{root}/mark {name}")
sys.addaudithook(hook)
os.stat, os.lstat, h5py.File = noting(os.stat), noting(os.lstat), File
"""
TRAIN = r"""
from pathlib import Path
import heads.project
from heads.config import Config
def train(name, memory, scratch=None, evaluate=False):
    head = {"name": "hierarchical", "embed_dim": 8, "attention_hidden": 6}
    train = {"device": "cpu", "load_splits": "split.npz", "epochs": 2, "memory_gb": memory}
    labels = {"labels": {"file": "labels.csv"}, "classes": {"benign": ["0"], "malignant": ["1"]}}
    config = Config.model_validate({**labels, "head": head, "train": train, "store": {"scratch": scratch}})
    def load(*arguments, **options):
        found = loads(*arguments, **options)
        mark(f"{name}: epochs")
        return found
    heads.project.load_bags = load
    def observe(progress, epochs):
        if progress.epoch == epochs:
            mark(f"{name}: evaluation")
            if not evaluate:
                raise StopIteration
    mark(f"{name}: loading")
    with contextlib.suppress(StopIteration):
        heads.project.train_project(config, Path(root) / "project", observe=observe)
loads = heads.project.load_bags
train("resident", "auto", evaluate=True)
train("streamed", 0.0)
train("copied", 0.0, root + "/disk")
"""
EXTRACT = r"""
from pathlib import Path
from featstore.config import FeatstoreConfig
from featstore.project import extract_project
settings = json.loads(Path(root, "project", "featstore.yaml").read_text())
for name, share in (("first", "0/2"), ("second", "1/2"), ("again", "0/2")):
    settings["extract"].update(shard=share, runtime="torch")
    mark(name)
    extract_project(FeatstoreConfig.model_validate(settings), Path(root) / "project")
"""


class Event(NamedTuple):
    """One call below the watched folder: ``open``, ``list`` or ``stat``, in a part of the job."""

    part: str
    call: str
    path: str


Account = list[Event]


STRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-s", "4096", "-e", "trace=%file")


def strace_works() -> bool:
    """Whether there is one that may trace: not in every container, and older ones are too slow."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run([*STRACE, "-o", os.devnull, "true"], capture_output=True).returncode == 0


def watched(root: Path, script: str) -> dict[str, Account]:
    """A script's calls below a folder, by who noted them; it runs in a process of its own."""
    own, log = root.with_name("seen.json"), root.with_name("strace.log")
    ending = f"\nopen({str(own)!r}, 'w').write(json.dumps(seen))\n"
    command = [sys.executable, "-c", WATCH + script + ending, str(root)]
    if strace_works():
        command = [*STRACE, "-o", str(log), *command]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {"hooks": in_parts(root, json.loads(own.read_text()))}
    if log.is_file():
        found["strace"] = in_parts(root, kernel_calls(root, log))
    return found


def kernel_calls(root: Path, log: Path) -> list[tuple[str, str]]:
    """`open`, `list` and `stat` as strace wrote them down; folders opened to be synced are left out."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        call = re.match(rf'\d+ +(\w+)\([^"]*"({re.escape(str(root))}[^"]*)"(.*)', line)
        if call is None:
            continue
        name, path, rest = call.groups()
        if "stat" in name and name != "statfs":
            found.append(("stat", path))
        elif name in ("open", "openat"):
            if "O_DIRECTORY" not in rest:
                found.append(("open", path))
            elif "O_NONBLOCK" in rest:  # as opendir(3) does
                found.append(("list", path))
    return found


def in_parts(root: Path, calls: list[tuple[str, str]]) -> Account:
    part, found = "", []
    for call, path in calls:
        name = os.path.relpath(path, root)
        if name.startswith("mark "):
            part = name.removeprefix("mark ")
        else:
            found.append(Event(part, call, name))
    return found


def count(account: Account, part: str, call: str, pattern: str) -> Counter[str]:
    """How often each path that fits a pattern was called in a part of the job."""
    return Counter(
        event.path
        for event in account
        if (event.part, event.call) == (part, call) and re.fullmatch(pattern, event.path)
    )


PART, RECORD = r"project/store/cases/[^/]+/\w+\.h5", r"project/store/cases/[^/]+/\d+\.json"
FOLDER, STORE = r"project/store/cases/[^/]+", r"project/(store|patches).*"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Account]:
    root = tmp_path_factory.mktemp("trained") / "root"
    (root / "project").mkdir(parents=True)
    make_planted_project(root / "project")
    return watched(root, TRAIN)


def test_the_kernel_and_the_hooks_agree(trained: dict[str, Account]) -> None:
    if "strace" not in trained:
        pytest.skip("strace is not there, or may not trace")
    for part in ("resident: loading", "streamed: epochs", "copied: loading"):
        for call in ("open", "list"):
            noted = [count(trained[who], part, call, STORE) for who in ("hooks", "strace")]
            assert noted[0] == noted[1]


@pytest.mark.parametrize("name", ["resident", "streamed"])
def test_loading_opens_every_file_once_and_lists_every_folder_once(
    trained: dict[str, Account], name: str
) -> None:
    for account in trained.values():
        part = f"{name}: loading"
        for pattern in (PART, RECORD):
            opened = count(account, part, "open", pattern)
            assert (len(opened), set(opened.values())) == (len(CASES), {1})
        listed = count(account, part, "list", FOLDER)
        assert (len(listed), set(listed.values())) == (len(CASES), {1})
        assert max(count(account, part, "list", r"project/store(/cases)?").values()) == 1
        assert max(count(account, part, "stat", PART).values()) <= 2  # by us, and by HDF5
        assert not count(account, part, "stat", RECORD)
        assert not count(account, part, "open", r"project/patches.*")


@pytest.mark.parametrize("part", ["epochs", "evaluation"])
def test_a_resident_cohort_asks_nothing_more(trained: dict[str, Account], part: str) -> None:
    for account in trained.values():
        for call in ("open", "list", "stat"):
            assert not count(account, f"resident: {part}", call, STORE)


def test_epochs_that_read_open_each_part_once_and_list_nothing(trained: dict[str, Account]) -> None:
    for account in trained.values():
        part = "streamed: epochs"
        opened = count(account, part, "open", PART)
        # Twelve cases are standardised, one is tried first, and two epochs read them and four others.
        assert 2 * 16 <= sum(opened.values()) <= 12 + 1 + 2 * 16
        assert sum(count(account, part, "stat", PART).values()) <= 2 * sum(opened.values())
        for call, pattern in (("list", STORE), ("open", RECORD), ("stat", RECORD), ("stat", FOLDER)):
            assert not count(account, part, call, pattern)


def test_with_a_copy_the_store_is_read_once(trained: dict[str, Account]) -> None:
    for account in trained.values():
        opened = count(account, "copied: loading", "open", PART)
        assert (len(opened), set(opened.values())) == (len(CASES), {1})
        assert max(count(account, "copied: loading", "open", RECORD).values()) <= 2
        listed = count(account, "copied: loading", "list", FOLDER)
        assert (len(listed), set(listed.values())) == (len(CASES), {1})
        assert not [e for e in account if e.part == "copied: epochs" and re.fullmatch(STORE, e.path)]
        assert count(account, "copied: epochs", "open", r"disk/.*\.h5")


def test_a_run_is_a_few_files_whatever_the_cohort(trained: dict[str, Account]) -> None:
    for account in trained.values():
        written = {event.path for event in account if "/runs/" in event.path and event.call == "open"}
        assert 10 <= max(Counter(map(os.path.dirname, written)).values()) <= 60
        assert not [path for path in written if "case" in path]


Extracted = tuple[Path, dict[str, Account]]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Extracted:
    """Two shares of four cases, one after the other, and the first once more."""
    root = tmp_path_factory.mktemp("extracted") / "root"
    (root / "project").mkdir(parents=True)
    make_project(root / "project", cases=4, slices=2, stains=("h&e", "melan"), patches=5)
    patches = root / "project" / "patches"
    for file in list(patches.iterdir()):
        folder = patches / f"c{file.name.split('_')[1]}"
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    return root, watched(root, EXTRACT)


PNG, SAMPLE = r"project/patches/.*\.png", 16  # of the whole cohort, so many are looked at for the report


@pytest.mark.parametrize("share", ["first", "second", "again"])
def test_a_share_scans_the_cohort_once(extracted: Extracted, share: str) -> None:
    for account in extracted[1].values():
        listed = count(account, share, "list", r"project/patches(/[^/]*)?")
        assert len({path.rstrip("/") for path in listed}) == 5
        assert set(listed.values()) == {1}


def test_a_share_opens_its_own_patches_twice_and_no_others(
    extracted: Extracted,
) -> None:
    for account in extracted[1].values():
        own: list[set[str]] = []
        for share in ("first", "second"):
            opened = count(account, share, "open", PNG)
            assert sum(opened.values()) <= 2 * 40 + 2 * SAMPLE  # the header, then all of it
            own.append(set(opened))
        assert len(own[0] | own[1]) == 80
        assert max(map(len, own)) <= 40 + SAMPLE
        assert not count(account, "again", "open", PNG)
        # The first share weighs all patches; the others find the table of shares.
        assert len(count(account, "first", "stat", PNG)) == 80
        assert len(count(account, "second", "stat", PNG)) <= 40 + SAMPLE
        assert len(count(account, "again", "stat", PNG)) == 40


def test_a_share_that_has_nothing_to_do_reads_each_file_of_the_store_once(
    extracted: Extracted,
) -> None:
    for account in extracted[1].values():
        assert max(count(account, "again", "open", PART).values()) == 1
        assert max(count(account, "again", "open", RECORD).values()) <= 2  # before, and for what is lacking
        assert max(count(account, "again", "list", FOLDER).values()) <= 2


def test_folders_of_the_store_hold_few_files(extracted: Extracted) -> None:
    """A part and a record a commit: a case has no more than shares that touched it."""
    store = extracted[0] / "project" / "store"
    assert set(os.listdir(store)) <= {"featstore.json", "cases", "quarantine"}
    for case in Store.open(store).cases():
        names = os.listdir(store / "cases" / case)
        assert len(names) <= 2 * 2
        assert {name.partition(".")[2] for name in names} == {"h5", "json"}


def test_a_cohort_from_a_copy_is_the_same_and_of_the_same_store(tmp_path: Path) -> None:
    make_planted_project(tmp_path)
    store = Store.open(tmp_path / "store")
    config, told = make_config(), list[str]()
    scratch = {"store": StoreConfig(scratch=str(tmp_path / "disk"))}
    bags = load_bags(config, store, LABELS, print)
    copied = load_bags(config.model_copy(update=scratch), store, LABELS, told.append)
    assert told[0].startswith("copying 20 cases")
    assert str(copied.store.folder(CASES[0])).startswith(f"{tmp_path}/disk/")
    assert bags.resident is not None and copied.resident is not None  # noqa: PT018
    assert bags.resident.equal(copied.resident)
    about, of_copy = (describe(each, NAMES, LABELS, SPLIT) for each in (bags, copied))
    assert {**about, "created": ""} == {**of_copy, "created": ""}
