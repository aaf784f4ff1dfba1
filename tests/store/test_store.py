import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore.errors import FingerprintMismatch, StoreDamaged, StoreError
from featstore.store import Store, StoreWriter, files
from featstore.store.parts import encode as encode_part
from featstore.store.parts import open_part
from featstore.store.records import highest_record
from tests.store.builders import DIM, feature, make_slice, make_spec

pytestmark = pytest.mark.filterwarnings("error")


def contents(path: Path) -> dict[tuple[str, str, str, int], bytes]:
    store = Store.open(path)
    table = store.table()
    found = {}
    for case in store.cases():
        bag = store.bag(case)
        rows = table.loc[bag.rows]
        assert (rows["case_id"] == case).all()
        assert (rows["patch"].to_numpy() == bag.patches).all()
        for row, values in zip(rows.itertuples(), bag.features, strict=True):
            found[case, row.stain, row.slice_id, row.patch] = values.tobytes()
    return found


def expected(case: str, stain: str, slice_id: str, patches: list[int], version: int = 0) -> dict:
    return {
        (case, stain, slice_id, p): feature(case, stain, slice_id, p, version).tobytes() for p in patches
    }


def test_bags_come_back_in_natural_order_with_their_files(writer: StoreWriter) -> None:
    writer.commit("10", [make_slice("10", "h&e", "match_1", [3])])
    writer.commit(
        "2",
        [
            make_slice("2", "sox10", "match_10", [1, 2]),
            make_slice("2", "sox10", "match_2", [5]),
            make_slice("2", "h&e", "match_1", [2, 10, 11]),
        ],
    )
    store = Store.open(writer.path)
    assert store.cases() == ["2", "10"]
    bag = store.bag("2")
    assert bag.stains == ("h&e", "sox10")
    assert bag.slices == ("match_1", "match_2", "match_10")
    assert bag.patches.tolist() == [2, 10, 11, 5, 1, 2]
    assert bag.slice_sizes.tolist() == [3, 1, 2]
    assert bag.stain_sizes.tolist() == [1, 2]
    assert bag.stain_ids.tolist() == [0, 1]
    assert bag.rows.tolist() == list(range(6))
    assert store.bag("10").rows.tolist() == [6]
    table = store.table()
    assert table.loc[4, "path"] == "2_sox10_match_10_1_v0"
    assert table.loc[6, "path"] == "10_h&e_match_1_3_v0"
    assert store.table("10").index.tolist() == [6]
    assert (
        contents(writer.path)[("2", "sox10", "match_2", 5)] == feature("2", "sox10", "match_2", 5).tobytes()
    )


def test_a_slice_may_grow_and_a_row_be_superseded(writer: StoreWriter) -> None:
    writer.commit("a", [make_slice("a", "x", "s", [1, 3, 5]), make_slice("a", "y", "s", [1])])
    before = Store.open(writer.path)
    old = before.bag("a").features.copy()
    writer.commit("a", [make_slice("a", "x", "s", [2, 3], version=1)])
    want = (
        expected("a", "x", "s", [1, 5]) | expected("a", "x", "s", [2, 3], 1) | expected("a", "y", "s", [1])
    )
    assert contents(writer.path) == want
    # The reader that was there before sees what it saw.
    assert np.array_equal(before.bag("a").features, old)
    assert before.table()["patch"].tolist() == [1, 3, 5, 1]


def test_the_same_bytes_computed_twice_keep_the_first(writer: StoreWriter) -> None:
    writer.commit("a", [make_slice("a", "x", "s", [1, 2])])
    first = highest_record(writer.path / "cases" / "a")
    writer.commit("a", [make_slice("a", "x", "s", [1, 2])])
    assert highest_record(writer.path / "cases" / "a") == first
    assert len(_parts(writer.path)) == 1
    writer.commit("a", [make_slice("a", "x", "s", [2, 3])])
    record = Store.open(writer.path).record("a")
    assert [[group.live for group in part.groups] for part in record.parts] == [["1-2"], ["3"]]


def doomed(case: str, stain: str, slice_id: str, patches: list[int], version: int = 0) -> dict:
    """What `drop` is told: the rows, and the files they were made from."""
    digests = make_slice(case, stain, slice_id, patches, version).columns["source_sha256"]
    return {(stain, slice_id, p): d.tobytes() for p, d in zip(patches, digests, strict=True)}


def test_dropping_hides_rows_and_a_part_without_rows_disappears(writer: StoreWriter) -> None:
    writer.commit("a", [make_slice("a", "x", "s", [1, 2])])
    writer.commit("a", [make_slice("a", "y", "s", [1])])
    assert writer.drop("a", doomed("a", "y", "s", [1]) | doomed("a", "x", "s", [2, 99])) == 2
    assert contents(writer.path) == expected("a", "x", "s", [1])
    assert len(Store.open(writer.path).record("a").parts) == 1
    assert writer.drop("a", doomed("a", "x", "s", [1])) == 1
    assert Store.open(writer.path).cases() == []
    assert len(Store.open(writer.path).table()) == 0
    with pytest.raises(StoreError, match="no case 'a'"):
        Store.open(writer.path).bag("a")
    assert writer.drop("never", doomed("never", "x", "s", [1])) == 0


def test_a_row_that_was_made_anew_meanwhile_is_not_dropped(writer: StoreWriter) -> None:
    writer.commit("a", [make_slice("a", "x", "s", [1])])
    stale = doomed("a", "x", "s", [1])
    writer.commit("a", [make_slice("a", "x", "s", [1], version=1)])
    assert writer.drop("a", stale) == 0
    assert contents(writer.path) == expected("a", "x", "s", [1], version=1)


def test_a_commit_is_synced_in_the_order_that_makes_it_safe(
    writer: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 cannot see a missing fsync; the order of calls can."""
    calls: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    def kind(path: object) -> str:
        suffix = Path(os.fsdecode(path)).suffix  # type: ignore[arg-type]
        return {".h5": "part", ".zip": "part", ".tmp": "temporary", ".json": "record"}.get(suffix, "folder")

    class Recorder:
        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def open(self, path: object, *more: object) -> int:
            handle = os.open(path, *more)  # type: ignore[arg-type]
            names[handle] = kind(path)
            return handle

        def write(self, handle: int, data: bytes) -> int:
            calls.append(("write", names[handle]))
            return os.write(handle, data)

        def fsync(self, handle: int) -> None:
            calls.append(("fsync", names[handle]))
            os.fsync(handle)

        def link(self, source: object, target: object) -> None:
            calls.append(("link", kind(target)))
            os.link(source, target)  # type: ignore[arg-type]

    writer.commit("a", [make_slice("a", "x", "s", [1])])
    monkeypatch.setattr(files, "os", Recorder())
    writer.commit("a", [make_slice("a", "x", "s", [2])])
    assert calls == [
        ("write", "part"),
        ("fsync", "part"),
        ("fsync", "folder"),
        ("write", "temporary"),
        ("fsync", "temporary"),
        ("fsync", "folder"),
        ("link", "record"),
        ("fsync", "folder"),
    ]
    calls.clear()
    writer.commit("b", [make_slice("b", "x", "s", [1])])
    before_link = calls[: calls.index(("link", "record"))]
    # The case's own folder is new: its entry must be durable before anything is acknowledged.
    assert before_link.count(("fsync", "folder")) >= 4


def test_any_flipped_bit_is_harmless_or_told(writer: StoreWriter) -> None:
    writer.commit("a", [make_slice("a", "x", "s", list(range(30)))])
    whole = contents(writer.path)
    part = _part(writer.path)
    good = part.read_bytes()
    rng, told = np.random.default_rng(0), 0
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        part.write_bytes(bytes(bad))
        try:
            assert contents(writer.path) == whole
        except StoreDamaged:
            told += 1
    assert told > 50


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "1.3"])
def test_older_stores_are_still_read(version: str) -> None:
    """Written by earlier versions of the format (since 1.1: by `golden.py`); never written anew."""
    golden = Path(__file__).parent / "golden" / version
    found = contents(golden)
    assert found == expected("a", "h&e", "match_1", [1, 2, 10]) | expected(
        "B", "sox10", "s", [7], version=1
    )
    table = Store.open(golden).table()
    assert table["path"].tolist() == ["B_sox10_s_7_v1", *(f"a_h&e_match_1_{p}_v0" for p in (1, 2, 10))]
    assert ("coord_x" in table) == (version >= "1.2")
    if "coord_x" in table:
        assert table[["coord_x", "coord_y"]].iloc[0].tolist() == [10.5, 20.25]
        assert table["coord_x"].iloc[1:].isna().all()
    store = Store.open(golden)
    views = store.views("a")
    assert views.shape == (3, 2 if version >= "1.3" else 0, DIM)
    for v in range(views.shape[1]):
        assert np.array_equal(views[:, v], -store.bag("a").features + np.float16(v + 1))


ROWS = st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.sampled_from(["s1", "s2", "s10"]))
STEPS = st.lists(
    st.tuples(st.booleans(), ROWS, st.sets(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 2)),
    max_size=12,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_history_ends_like_a_dictionary_would(
    steps: list, tmp_path_factory: pytest.TempPathFactory, file_format: str
) -> None:
    path = tmp_path_factory.mktemp("history") / "store"
    writer = StoreWriter(path, make_spec(), {}, file_format)
    model: dict = {}
    for is_drop, (case, stain, slice_id), patches, version in steps:
        numbers = sorted(patches)
        if is_drop:
            # Rows of this version alone: what was made anew from other bytes stays.
            writer.drop(case, doomed(case, stain, slice_id, numbers, version))
            gone = expected(case, stain, slice_id, numbers, version)
            model = {key: value for key, value in model.items() if gone.get(key) != value}
        else:
            writer.commit(case, [make_slice(case, stain, slice_id, numbers, version)])
            model |= expected(case, stain, slice_id, numbers, version)
    assert contents(path) == model


def test_a_store_may_hold_parts_of_both_formats(writer: StoreWriter, file_format: str) -> None:
    other = StoreWriter(writer.path, make_spec(), {}, {"hdf5": "zarr", "zarr": "hdf5"}[file_format])
    writer.commit("a", [make_slice("a", "x", "s", [1, 3, 5])])
    other.commit("a", [make_slice("a", "x", "s", [2, 3], version=1), make_slice("a", "x", "long", [1])])
    assert {part.suffix for part in _parts(writer.path)} == {".h5", ".zip"}
    want = expected("a", "x", "s", [1, 5]) | expected("a", "x", "s", [2, 3], 1)
    assert contents(writer.path) == want | expected("a", "x", "long", [1])
    # The same rows again, in the other format: the first ones stay.
    other.commit("a", [make_slice("a", "x", "s", [1, 5])])
    assert len(_parts(writer.path)) == 2
    assert other.drop("a", doomed("a", "x", "s", [5])) == 1
    assert ("a", "x", "s", 5) not in contents(writer.path)


def test_an_unknown_file_format_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no file format 'hdf'") as error:
        encode_part("hdf", [make_slice("a", "x", "s", [1])], {})
    assert error.value.expected == "hdf5 or zarr"
    with pytest.raises(StoreError, match=r"file format that this version does not know \(n5\)"):
        open_part(tmp_path / f"{'0' * 32}.n5", 1)


def test_geometry_is_optional_part_by_part(writer: StoreWriter) -> None:
    located = make_slice("a", "x", "s", [1])
    located.columns["geometry"] = np.arange(8.0).reshape(1, 8)
    writer.commit("a", [located])
    writer.commit("a", [make_slice("a", "x", "s", [2])])
    table = Store.open(writer.path).table()
    assert table["y3"].tolist()[0] == 7.0
    assert np.isnan(table["y3"].tolist()[1])


def test_a_store_of_another_make_is_refused_with_both_sides(writer: StoreWriter) -> None:
    with pytest.raises(FingerprintMismatch, match=r"resize: 64 here, 224 there"):
        StoreWriter(writer.path, make_spec(resize=64), {})


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(StoreError, match=r"thesis\.docx"):
        StoreWriter(tmp_path, make_spec(), {})
    assert os.listdir(tmp_path) == ["thesis.docx"]


def test_wrong_rows_are_refused_before_anything_is_written(writer: StoreWriter) -> None:
    bad = make_slice("a", "x", "s", [1, 2])
    bad.columns["features"] = bad.columns["features"].astype(np.float32)
    with pytest.raises(StoreError, match="dtype float32"):
        writer.commit("a", [bad])
    with pytest.raises(StoreError, match="ascending"):
        writer.commit("a", [make_slice("a", "x", "s", [2, 1])])
    assert Store.open(writer.path).cases() == []


def test_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no embedding store"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="no embedding store"):
        Store.open(tmp_path / "missing")


def test_an_unknown_case(writer: StoreWriter) -> None:
    with pytest.raises(StoreError, match="no case '7'"):
        Store.open(writer.path).bag("7")


def _parts(path: Path) -> list[Path]:
    return [file for file in path.glob("cases/*/*") if file.name.endswith((".h5", ".zarr.zip"))]


def _part(path: Path) -> Path:
    (part,) = _parts(path)
    return part


def test_damage_is_told_with_the_file(writer: StoreWriter) -> None:
    writer.commit("a", [make_slice("a", "x", "s", list(range(200)))])
    part = _part(writer.path)
    whole = part.read_bytes()
    needle = feature("a", "x", "s", 100).tobytes()
    at = whole.index(needle)
    flipped = bytearray(whole)
    flipped[at] ^= 1
    part.write_bytes(bytes(flipped))
    with pytest.raises(StoreDamaged, match="checksum"):
        Store.open(writer.path).bag("a")
    part.write_bytes(whole[:-1])
    with pytest.raises(StoreDamaged, match=f"{len(whole)} bytes"):
        Store.open(writer.path).bag("a")
    part.unlink()
    with pytest.raises(StoreDamaged, match="missing") as error:
        Store.open(writer.path).bag("a")
    assert str(part) in str(error.value)


def test_a_damaged_newest_record_is_never_passed_over(writer: StoreWriter) -> None:
    writer.commit("a", [make_slice("a", "x", "s", [1])])
    writer.commit("a", [make_slice("a", "x", "s", [2])])
    record = writer.path / "cases" / "a" / "000002.json"
    record.write_bytes(record.read_bytes().replace(b'"rows":1', b'"rows":2'))
    with pytest.raises(StoreDamaged, match="sha256"):
        Store.open(writer.path).bag("a")


def test_a_record_copied_from_elsewhere_is_noticed(writer: StoreWriter, tmp_path: Path) -> None:
    other = StoreWriter(tmp_path / "other", make_spec(pool=2), {})
    for each in (writer, other):
        each.commit("a", [make_slice("a", "x", "s", [1])])
    target = writer.path / "cases" / "a" / "000001.json"
    target.write_bytes((other.path / "cases" / "a" / "000001.json").read_bytes())
    with pytest.raises(StoreDamaged, match="another store"):
        Store.open(writer.path).bag("a")


def test_a_file_system_without_hard_links_is_noticed_at_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted", source, None, target)

    monkeypatch.setattr(files.os, "link", refuse)
    with pytest.raises(StoreError, match="no hard links"):
        StoreWriter(tmp_path / "store", make_spec(), {})


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # root may do everything: ask in a child that is not root.
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents:
            if parent.stat().st_uid == 0 and parent != Path("/") and "pytest" in str(parent):
                parent.chmod(0o755)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            try:
                StoreWriter(tmp_path / "store", make_spec(), {})
            except StoreError as error:
                os._exit(0 if "permission" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        tmp_path.chmod(0o555)
        with pytest.raises(StoreError, match="permission"):
            StoreWriter(tmp_path / "store", make_spec(), {})
    assert list(tmp_path.iterdir()) == []


def test_parts_open_in_plain_h5py(tmp_path: Path) -> None:
    import h5py

    writer = StoreWriter(tmp_path / "store", make_spec(), {})
    writer.commit("Case 1", [make_slice("Case 1", "h&e", "match_1", [1, 2])])
    with h5py.File(_part(writer.path)) as file:
        assert file["h&e/match_1/features"].shape == (2, DIM)
        assert file["h&e/match_1/features"].fletcher32
        assert file.attrs["case_id"] == "Case 1"
