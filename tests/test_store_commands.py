"""verify, repair, gc and rm as typed, on a store that `extract` has filled."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest

from featstore.store import Store, maintenance
from tests.command_line import answer, featstore, listing, make_project, refused, succeeded
from tests.extraction.conftest import contents
from tests.store.damage import age, flip, part_of, record_of

COMMANDS = ("verify", "repair", "gc", "rm")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("commands"), cases=3, stains=("h&e", "sox10"))
    succeeded(project, "extract")
    return project


@pytest.fixture
def project(extracted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(extracted, tmp_path / "project"))


def test_a_whole_store(project: Path) -> None:
    before = listing(project)
    for flags in ((), ("--quick",), ("--full",), ("--subset", "0/1")):
        assert "no damage" in succeeded(project, "verify", *flags).stdout
    assert "nothing to repair" in succeeded(project, "repair", "--apply").stdout
    assert "nothing that was needed no more for 24 hours" in succeeded(project, "gc", "--apply").stdout
    found = answer(project, "verify", "--quick")
    assert (found["ok"], found["cases"], found["damage"], found["notes"]) == (True, 3, [], [])
    assert listing(project) == before
    told = succeeded(project, "info").stdout
    assert "health       every record and part is there" in told
    assert "(just now)" in told


def test_damage_is_told_repaired_and_computed_again(project: Path) -> None:
    store = project / "store"
    before = contents(store)
    flip(part_of(store, "2"), part_of(store, "2").stat().st_size // 3)
    part_of(store, "3").unlink()
    assert "DAMAGED: 1 findings" in succeeded(project, "info").stdout
    result = featstore(project, "verify", "--full", "--csv", "found.csv")
    assert result.exit_code == 1
    assert "DAMAGE" in result.stdout
    assert "to do: featstore repair" in result.stdout
    with (project / "found.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) >= 3
    planned = featstore(project, "repair")
    assert planned.exit_code == 1
    assert "featstore repair --apply" in planned.stdout
    done = answer(project, "repair", "--apply")
    assert (len(done["repairs"]), done["left"]) == (2, [])
    # Just these two cases: 2 stains, 1 slice, 5 patches each.
    assert answer(project, "extract")["committed"] == 20
    assert contents(store) == before
    assert answer(project, "verify", "--full")["ok"]


def test_a_damaged_record_stops_readers_until_it_is_repaired(project: Path) -> None:
    before = contents(project / "store")
    flip(record_of(project / "store", "1"), 99)
    for command in ("info", "extract"):
        result = featstore(project, command)
        assert result.exit_code == 1
        assert "featstore repair" in result.stderr
    succeeded(project, "repair", "--quick", "--apply")
    assert answer(project, "extract")["committed"] == 10
    assert contents(project / "store") == before


def test_a_lost_description_is_made_anew(project: Path) -> None:
    manifest = project / "store" / "featstore.json"
    good, before = manifest.read_bytes(), contents(project / "store")
    manifest.unlink()
    for command in ("info", "gc", "extract"):
        result = featstore(project, command)
        assert result.exit_code in (1, 2)
        assert manifest.name in result.stderr
    result = featstore(project, "verify")
    assert result.exit_code == 1
    assert "featstore.json: the store's description (featstore.json) is missing" in result.stdout
    assert "`featstore repair --apply` makes it anew from 3 parts" in result.stdout
    planned = featstore(project, "repair")
    assert planned.exit_code == 1
    assert "featstore.json would be made anew from 3 parts" in planned.stdout
    assert not manifest.exists()
    assert answer(project, "repair", "--apply")["description"]["parts"] == 3
    assert manifest.read_bytes() == good
    flip(manifest, 200)
    assert "featstore.json was made anew" in succeeded(project, "repair", "--apply").stdout
    assert (manifest.read_bytes(), contents(project / "store")) == (good, before)
    assert answer(project, "extract")["committed"] == 0
    for part in (project / "store").glob("cases/*/*.h5"):
        part.unlink()
    manifest.unlink()
    files = listing(project)
    result = featstore(project, "repair", "--apply")
    assert result.exit_code == 1
    assert "cannot be made anew" in result.stdout
    assert listing(project) == files


def test_rm(project: Path) -> None:
    before = contents(project / "store")
    files = listing(project)
    assert "would be removed" in succeeded(project, "rm", "--stain", "sox10", "--case", "2").stdout
    assert listing(project) == files
    removed = answer(project, "rm", "--stain", "sox10", "--case", "2", "--case", "3", "--apply")
    assert (removed["cases"], removed["slices"], removed["patches"]) == (2, 2, 10)
    assert len(contents(project / "store")) == len(before) - 10
    assert answer(project, "extract")["committed"] == 10
    assert contents(project / "store") == before
    refused(project, "rm", "--stain", "he", "--apply", says=("no stain: 'he'; did you mean 'h&e'?",))
    refused(project, "rm", "--case", "7", says=("no case: '7'",))
    refused(project, "rm", "--slice", "match1", "--apply", says=("did you mean 'match_1'",))
    refused(project, "rm", "--apply", says=("nothing is chosen", "--case ID"), to_do=False)


def test_gc(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "_changed", lambda found: found.st_mtime)
    before = {key: value for key, value in contents(project / "store").items() if key[1] != "sox10"}
    succeeded(project, "rm", "--stain", "sox10", "--apply")
    assert "nothing" in succeeded(project, "gc", "--apply").stdout
    age(project / "store", 3 * 3600)
    assert "would be removed" in succeeded(project, "gc", "--grace", "2").stdout
    counts = answer(project, "gc", "--grace", "2", "--apply")["files"]
    assert counts == {"part": 0, "old record": 3, "unfinished file": 0, "quarantined file": 0}
    assert contents(project / "store") == before
    succeeded(project, "rm", "--stain", "h&e", "--apply")
    age(project / "store", 3 * 3600)
    assert answer(project, "gc", "--grace", "2", "--apply")["files"]["part"] == 3
    assert Store.open(project / "store").cases() == []
    assert answer(project, "extract")["committed"] == 30


def test_wrong_usage(project: Path) -> None:
    refused(project, "verify", "--quick", "--full", says=("--quick and --full",), to_do=False)
    refused(project, "verify", "--subset", "3/3", says=("0/7",), to_do=False)
    refused(project, "gc", "--grace", "-1", to_do=False)
    for command in COMMANDS:
        more = ("--case", "1") if command == "rm" else ()
        refused(project, command, "--store", "nowhere", *more, says=("no embedding store", "nowhere"))


def test_a_store_under_hostile_names(tmp_path: Path) -> None:
    hostile = "=1+1\x1b[31m"
    project = make_project(tmp_path, cases=1)
    succeeded(project, "extract")
    (project / "store" / "cases" / "1" / hostile).write_text("")
    shown = succeeded(project, "verify", "--csv", "found.csv").stdout
    assert "\\x1b[31m" in shown
    assert "\x1b" not in shown
    assert answer(project, "verify")["notes"][0]["kind"] == "foreign"


def test_a_bar_where_someone_looks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cases" not in featstore(project, "verify").stderr
    monkeypatch.setitem(os.environ, "FORCE_COLOR", "1")
    assert "cases" in featstore(project, "verify").stderr
