"""Who embeds what: shares balanced by work, and a table of them that is only ever added to."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction import shards
from featstore.extraction.shards import (
    Shard,
    balance,
    forward_bytes,
    hashed_share,
    parse_shard,
    share_of_patches,
)
from featstore.extraction.share_table import Home, Key, read_pages, table_folder
from featstore.store import files
from tests import helpers
from tests.extraction.conftest import Zygote, contents, make_project

# Case, slice, patch → size in bytes.
Cohort = dict[tuple[int, int, int], int]
COHORTS = st.dictionaries(
    st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 4)), st.integers(60, 90_000), max_size=25
)


def frame(cohort: Iterable[tuple[int, int, int]]) -> pd.DataFrame:
    rows = [(str(case), "h&e", f"match_{number}", patch) for case, number, patch in cohort]
    return pd.DataFrame(rows, columns=["case_id", "stain", "slice_id", "patch"])


def start(cohort: Cohort, count: int, folder: Path) -> dict[tuple[int, int, int], int]:
    """The share of every patch, as a process sees it that starts now."""
    sizes = np.array(list(cohort.values()), np.int64)
    found = share_of_patches(frame(cohort), count, folder, lambda: sizes)
    return dict(zip(cohort, found.tolist(), strict=True))


def slices(*work: int) -> dict[Key, int]:
    return {("1", "h&e", f"match_{i}"): each for i, each in enumerate(work)}


def loads(homes: Iterable[Home], count: int) -> list[int]:
    return [sum(home.work for home in homes if home.share == share) for share in range(count)]


def test_the_largest_slices_are_given_out_first() -> None:
    # 8 | 5, then 5 + 4, then 8 + 3, then 2 to the 9: in the order given it would be 2 + 8 + 4 | 3 + 5.
    work = slices(2, 3, 8, 5, 4)
    homes = balance(work, 2, {})
    assert [homes[key].share for key in work] == [1, 0, 0, 1, 1]
    assert loads(homes.values(), 2) == [11, 11]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60), st.integers(2, 9))
def test_no_share_has_more_than_the_mean_and_one_slice(work: list[int], count: int) -> None:
    found = loads(balance(slices(*work), count, {}).values(), count)
    assert sum(found) == sum(work)
    assert max(found) <= sum(work) / count + max(work)


def test_shares_of_the_labs_sizes_are_equal() -> None:
    rng = np.random.default_rng(0)
    patches = rng.lognormal(np.log(40), 1.0, 1000)
    work = slices(*(patches * rng.lognormal(np.log(80e3), 0.8, 1000)).astype(int).tolist())
    found = loads(balance(work, 8, {}).values(), 8)
    by_hash = loads([Home(hashed_share(key, 8), each) for key, each in work.items()], 8)
    assert max(found) < 1.001 * np.mean(found)
    assert max(by_hash) > 1.1 * np.mean(by_hash)


def test_new_slices_are_balanced_among_themselves_whatever_has_been_done() -> None:
    old = {("0", "h&e", "match_1"): Home(0, 10**9)}
    assert loads(balance(slices(5, 5, 5, 5), 2, old).values(), 2) == [10, 10]
    # Where that leaves a choice, the share that had less takes it.
    (home,) = balance(slices(5), 2, old).values()
    assert home.share == 1


@pytest.mark.parametrize(
    ("device", "resize", "expected"),
    [
        ("cuda", 224, 0),
        ("cpu", "native", 0),
        ("cpu", "native32", 0),
        ("cpu", 224, 1_200_000),
        ("cpu", "model", 1_200_000),
        ("cpu", 448, 4_800_000),
    ],
)
def test_a_forward_pass_counts_where_it_is_what_takes_long(
    device: str, resize: int | str, expected: int
) -> None:
    assert forward_bytes(device, resize) == expected


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), COHORTS)
def test_what_was_there_at_the_first_start_is_embedded_once_or_its_share_did_not_end(
    data: st.DataObject, count: int, cohort: Cohort
) -> None:
    embedded: Counter[tuple[int, int, int]] = Counter()
    homes: dict[tuple[int, int, int], int] = {}
    first, ended = set(cohort), set()
    with TemporaryDirectory() as folder:
        # Shares run in any order, some never, some twice; files come in between.
        for share in data.draw(st.lists(st.integers(0, count - 1), max_size=6), "shares"):
            found = start(cohort, count, Path(folder))
            # A patch has one share for ever, and so has its slice.
            assert all(homes.setdefault(patch, home) == home for patch, home in found.items())
            of_slice: dict[tuple[int, int], int] = {}
            assert all(of_slice.setdefault(p[:2], home) == home for p, home in homes.items())
            mine = [patch for patch, home in found.items() if home == share and not embedded[patch]]
            killed_after = data.draw(st.none() | st.integers(0, len(mine)), "killed after")
            embedded.update(mine[:killed_after])
            if killed_after is None:
                ended.add(share)
            cohort = data.draw(COHORTS, "new files") | cohort
    assert set(embedded.values()) <= {1}
    assert {homes.get(patch) for patch in first if not embedded[patch]}.isdisjoint(ended)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 4), st.lists(COHORTS, min_size=2, max_size=4))
def test_processes_that_start_at_the_same_time_agree(
    data: st.DataObject, count: int, cohorts: list[Cohort]
) -> None:
    waiting, found = cohorts[1:], []
    publish = shards.publish_page

    def publish_after_another(*arguments: Any) -> bool | None:
        if waiting and data.draw(st.booleans(), "another process comes first"):
            found.append(start(waiting.pop(), count, arguments[0].parent))
        return publish(*arguments)

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_turn", lambda folder: contextlib.nullcontext())  # no locks there
        patch.setattr(shards, "publish_page", publish_after_another)
        found.append(start(cohorts[0], count, Path(folder)))
        homes: dict[tuple[int, int], int] = {}
        for one in found:
            assert all(homes.setdefault(key[:2], share) == share for key, share in one.items())


def test_of_shares_that_start_at_the_same_time_one_looks_at_the_files(tmp_path: Path) -> None:
    table = frame((case, number, 1) for case in range(3) for number in range(2))
    asked: list[int] = []

    def work() -> NDArray[np.int64]:
        asked.append(1)
        time.sleep(0.3)  # the others come meanwhile
        return np.ones(len(table), np.int64)

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(share_of_patches, table, 2, tmp_path, work) for _ in range(4)]
        shares = [each.result() for each in found]
    assert len(asked) == 1
    assert all(np.array_equal(each, shares[0]) for each in shares)


def test_the_number_of_shares_has_a_table_of_its_own(tmp_path: Path) -> None:
    cohort = {(case, number, 1): 100 for case in range(6) for number in range(4)}
    assert set(start(cohort, 2, tmp_path).values()) == {0, 1}
    assert set(start(cohort, 3, tmp_path).values()) == {0, 1, 2}
    assert set(start(cohort, 1, tmp_path).values()) == {0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shares_of_2", "shares_of_3"]


def test_sizes_are_asked_for_only_where_there_are_new_slices(tmp_path: Path) -> None:
    cohort = {(case, 1, 1): 100 for case in range(6)}
    start(cohort, 2, tmp_path)
    table = frame(cohort)
    assert len(share_of_patches(table, 2, tmp_path, lambda: pytest.fail("asked"))) == 6
    assert read_pages(table_folder(tmp_path, 2), 2)[1] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"h&e"', b'"h&f"', 1),
        lambda data: b"[]",
        lambda data: b'{"sha256": "x"}',
        lambda data: b"\xff",
        lambda data: b"[" * 100_000,
        lambda data: data.replace(b"shares 1", b"shares 2"),
    ],
)
def test_a_damaged_table_ends_the_run_instead_of_moving_slices(tmp_path: Path, damage: Any) -> None:
    cohort = {(case, 1, 1): 100 for case in range(6)}
    start(cohort, 2, tmp_path)
    page = tmp_path / "shares_of_2" / "000001.json"
    page.write_bytes(damage(page.read_bytes()))
    with pytest.raises(FeatstoreError, match="table of shares cannot be used") as raised:
        start(cohort, 2, tmp_path)
    assert str(page) in raised.value.where
    assert "shares_of_2" in raised.value.fix


def test_without_hard_links_a_slices_name_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Unsupported", source, None, target)

    cohort = {(case, number, 1): 100 for case in range(6) for number in range(4)}
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "link", refuse)
        found = start(cohort, 3, tmp_path)
    assert found == {p: hashed_share((str(p[0]), "h&e", f"match_{p[1]}"), 3) for p in cohort}
    assert [path.name for path in table_folder(tmp_path, 3).iterdir()] == [".lock"]
    # Any other failure to write ends the run: some shares may follow a table that others cannot see.
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(FeatstoreError, match="could not write"):
        start(cohort, 3, tmp_path)


def test_a_page_that_stays_unseen_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_PATIENCE", 0.0)
    monkeypatch.setattr(shards, "publish_page", lambda *arguments: False)
    with pytest.raises(FeatstoreError, match="cannot be read here"):
        start({(1, 1, 1): 100}, 2, tmp_path)


def shard_job(project: Path, share: int, count: int, **fields: Any) -> dict[str, Any]:
    return {"project": project, "settings": {"extract": {"shard": f"{share}/{count}"}}, **fields}


def stored_by_share(project: Path, count: int) -> Counter[int]:
    """How many patches of each share the store has."""
    homes = read_pages(project / "reports" / "extract" / f"shares_of_{count}", count)[0]
    return Counter(
        homes[case, stain, slice_id].share for case, stain, slice_id, _ in contents(project / "store")
    )


def test_files_that_come_between_the_starts_move_no_slice(zygote: Zygote, tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=3, stains=("h&e", "sox10"), slices=2, patches=4)
    helpers.make_cohort(project / "patches", cases=["9"], stains=("h&e",), slices=1, patches=9, size=90)
    _, (first,), _ = zygote.run(shard_job(project, 2, 3))
    assert first["committed"] > 0
    assert first["not_in_store"] == 3 * 2 * 2 * 4 + 9 - first["committed"]
    assert "2" not in first["not_in_store_by_share"]
    # A large case comes, before and behind the others; what share 2 has of it is told by those after it.
    helpers.make_cohort(
        project / "patches", cases=["0", "99"], stains=("h&e",), slices=3, patches=8, size=120
    )
    codes, reports, _ = zygote.run(shard_job(project, 0, 3), shard_job(project, 1, 3))
    assert codes == [0, 0], reports
    _, (last,), _ = zygote.run(shard_job(project, 1, 3))
    total = 3 * 2 * 2 * 4 + 9 + 2 * 3 * 8
    assert sum(report["committed"] for report in (first, *reports)) == len(contents(project / "store"))
    assert (last["committed"], last["not_in_store"]) == (0, total - len(contents(project / "store")))
    assert set(last["not_in_store_by_share"]) == {"2"}
    assert last["not_in_store"] == 16  # two of the six new slices: nothing that was there at first
    _, (rest,), _ = zygote.run({"project": project})
    assert (rest["committed"], rest["not_in_store"]) == (16, 0)


@pytest.mark.parametrize("step", [2, 9, pytest.param(40, id="in a commit")])
def test_a_share_that_is_killed_is_told_by_the_others_and_goes_on(
    zygote: Zygote, tmp_path: Path, step: int
) -> None:
    project = make_project(tmp_path, cases=3, stains=("h&e", "sox10"), slices=2, patches=4)
    codes, _, _ = zygote.run(shard_job(project, 0, 2, kill_at=step, after=True))
    assert codes == [-9]
    codes, (other,), _ = zygote.run(shard_job(project, 1, 2))
    assert codes == [0]
    found = stored_by_share(project, 2)
    assert found[1] == other["committed"] > 0
    assert other["not_in_store_by_share"] == {"0": 48 - found[0] - found[1]}
    codes, (again,), _ = zygote.run(shard_job(project, 0, 2))
    assert codes == [0]
    assert (again["not_in_store"], len(contents(project / "store"))) == (0, 48)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_starts_kills_and_growth(zygote: Zygote, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    project = make_project(tmp_path, cases=3, stains=("h&e", "sox10"), slices=2, patches=4, seed=seed)
    first = {path.name for path in (project / "patches").iterdir()}
    count, ended, reports = int(rng.integers(2, 5)), set(), []
    while len(ended) < count:
        together = rng.choice(count, int(rng.integers(1, count + 1)), replace=False).tolist()
        fates = [
            {"kill_at": int(rng.integers(1, 90)), "after": True} if rng.random() < 0.4 else {}
            for _ in together
        ]
        jobs = [shard_job(project, i, count, **fate) for i, fate in zip(together, fates, strict=True)]
        codes, answers, _ = zygote.run(*jobs)
        assert set(codes) <= {0, -9}, answers
        ended |= {i for i, code in zip(together, codes, strict=True) if code == 0}
        reports = answers
        size = int(rng.integers(40, 120))
        case = str(rng.integers(1, 30))
        if rng.random() < 0.7 and not list((project / "patches").glob(f"case_{case}_*")):
            helpers.make_cohort(project / "patches", [case], ("melan",), 2, int(rng.integers(1, 9)), size)
    found = {helpers.patch_name(*(key[0], key[2], key[1]), key[3]) for key in contents(project / "store")}
    assert first <= found
    _, (rest,), _ = zygote.run({"project": project})
    assert rest["not_in_store"] == 0, reports
    assert len(contents(project / "store")) == len(list((project / "patches").iterdir()))


def test_shares_are_written_as_index_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_shard(None) == Shard(0, 1)
    assert parse_shard("2/4") == Shard(2, 4)
    with pytest.raises(ConfigError, match="no share 4 of 4"):
        parse_shard("4/4")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(ConfigError, match="array"):
        parse_shard("auto/4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert parse_shard("auto/4") == Shard(3, 4)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    monkeypatch.setenv("SGE_TASK_ID", "undefined")  # SGE, outside an array
    monkeypatch.setenv("LSB_JOBINDEX", "0")  # LSF, outside an array
    with pytest.raises(ConfigError, match="array"):
        parse_shard("auto/4")
    monkeypatch.setenv("SGE_TASK_ID", "4")  # SGE counts from 1
    assert parse_shard("auto/4") == Shard(3, 4)
