"""Imports that are repeated, changed, stopped and killed: what is there is right, the rest follows."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.config import FeatstoreConfig
from featstore.interop import source as sources
from featstore.interop.clam import Clam
from featstore.interop.project import import_project
from featstore.interop.source import ImportProblem
from featstore.interop.vectors import Vectors
from featstore.settings import Layers
from featstore.store import Store, files
from featstore.store.records import read_manifest
from featstore.store.verify import verify
from featstore.strict_yaml import read_file
from heads.config import Config
from tests.command_line import listing
from tests.extraction.zygote import killing_steps
from tests.interop.builders import (
    Arrays,
    corners_of,
    features_of,
    save_pt,
    square,
    write_clam,
    write_rows,
    write_slideflow,
    write_stamp,
    write_table,
    write_torchmil,
    write_trident,
    write_vectors,
)
from tests.interop.projects import alone, assert_same, geometry_of, imported, rows_of, table_of

FEATURES = features_of()
both_formats = pytest.mark.parametrize("file_format", ["hdf5", "zarr"])


def write_any_table(folder: Path, features: Arrays) -> Path:
    return write_table(folder / "bags.csv", features, dict.fromkeys(features, 1))


def write_some_vectors(folder: Path, features: Arrays) -> Path:
    return write_vectors(folder, {(name, "h&e", name): x for name, x in features.items()})


WRITERS: dict[str, Callable[[Path, Arrays], Path]] = {
    "clam": write_clam,
    "trident": write_trident,
    "stamp": write_stamp,
    "slideflow": write_slideflow,
    "torchmil": write_torchmil,
    "table": write_any_table,
    "vectors": write_some_vectors,
}
every_layout = pytest.mark.parametrize("name", WRITERS)


def written(name: str, folder: Path, features: Arrays = FEATURES) -> Path:
    """The folder, or the file, to import."""
    folder.mkdir(exist_ok=True)
    return WRITERS[name](folder, features)


def store_of(project: Path) -> dict[str, bytes | None]:
    return listing(project / "store")


# Again


@every_layout
@both_formats
def test_a_second_import_reads_no_embeddings_and_changes_nothing(
    tmp_path: Path, name: str, file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"store": {"format": file_format}}
    source = written(name, tmp_path / "in")
    imported(tmp_path / "p", source, settings)
    before = store_of(tmp_path / "p")
    assert any(str(path).endswith(".zarr.zip" if file_format == "zarr" else ".h5") for path in before)

    def read(*args: object) -> None:
        raise AssertionError("a bag was read that the store has")

    monkeypatch.setattr(sources.Source, "read", read)
    monkeypatch.setattr(Vectors, "read", read)
    report = imported(tmp_path / "p", source, settings)
    assert (report.bags, report.patches, report.already) == (0, 0, 3)
    assert "3 bags were there already" in report.to_text()
    assert store_of(tmp_path / "p") == before


@pytest.mark.parametrize("name", ["clam", "torchmil", "slideflow"])
def test_a_second_import_with_a_patch_size_adds_geometry_and_a_third_nothing(
    tmp_path: Path, name: str
) -> None:
    source = written(name, tmp_path / "in")
    imported(tmp_path / "p", source)
    report = imported(tmp_path / "p", source, patch_size=512.0)
    assert (report.bags, report.already) == (3, 0)
    for slide, corners in corners_of(FEATURES).items():
        np.testing.assert_array_equal(geometry_of(tmp_path / "p", slide), square(corners, 512))
    assert_same(rows_of(tmp_path / "p"), alone(FEATURES), "float32")
    before = store_of(tmp_path / "p")
    for again in ({"patch_size": 512.0}, {}):
        assert imported(tmp_path / "p", source, **again).already == 3
        assert store_of(tmp_path / "p") == before
    assert verify(tmp_path / "p" / "store", "full").damage == []


def test_a_second_import_with_mpp_places_what_stamp_measured(tmp_path: Path) -> None:
    source = written("stamp", tmp_path / "in")
    imported(tmp_path / "p", source)
    assert imported(tmp_path / "p", source, mpp=0.5).bags == 3
    for slide, corners in corners_of(FEATURES).items():
        np.testing.assert_array_equal(geometry_of(tmp_path / "p", slide), square(corners, 512))


@every_layout
@pytest.mark.parametrize("rows", [3, 1, 7], ids=["as many rows", "fewer rows", "more rows"])
def test_a_changed_file_is_imported_anew_and_leaves_none_of_its_old_rows(
    tmp_path: Path, name: str, rows: int
) -> None:
    imported(tmp_path / "p", written(name, tmp_path / "in"))
    changed = {**FEATURES, "s1": features_of({"s1": rows}, seed=9)["s1"]}
    shutil.rmtree(tmp_path / "in")
    source = written(name, tmp_path / "in", changed)
    touched(tmp_path / "in")
    report = imported(tmp_path / "p", source)
    assert report.bags == 3
    found = rows_of(tmp_path / "p")
    if name == "vectors" and rows == 1:
        # As in an extraction, a patch whose file is gone stays.
        np.testing.assert_array_equal(found["s1", "h&e", "s1"][0], changed["s1"][0])
        np.testing.assert_array_equal(found["s1", "h&e", "s1"][1:], FEATURES["s1"][1:])
    else:
        assert_same(found, alone(changed), "float32")
    assert verify(tmp_path / "p" / "store", "full").damage == []
    assert imported(tmp_path / "p", source).already == 3


def touched(folder: Path) -> None:
    """Files that were written again within a tick of the clock still have another time."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(1, 1))


def test_only_the_changed_bag_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written("clam", tmp_path / "in")
    imported(tmp_path / "p", source)
    os.utime(source / "h5_files" / "s2.h5", ns=(1, 1))
    read, real = [], Clam.read
    monkeypatch.setattr(Clam, "read", lambda self, entry: read.append(entry.name) or real(self, entry))
    report = imported(tmp_path / "p", source)
    assert (read, report.bags, report.already) == (["s2"], 1, 2)
    assert_same(rows_of(tmp_path / "p"), alone(FEATURES), "float32")


def test_new_bags_join_those_that_are_there(tmp_path: Path) -> None:
    imported(tmp_path / "p", written("clam", tmp_path / "in", {"s1": FEATURES["s1"]}))
    written("clam", tmp_path / "in", {name: x for name, x in FEATURES.items() if name != "s1"})
    report = imported(tmp_path / "p", tmp_path / "in")
    assert (report.bags, report.already) == (2, 1)
    assert_same(rows_of(tmp_path / "p"), alone(FEATURES), "float32")


def test_a_vanished_vector_stays_and_is_not_looked_for_again(tmp_path: Path) -> None:
    source = written("vectors", tmp_path / "in")
    imported(tmp_path / "p", source)
    (source / "case_s10_s10_h&e_patch3.pt").unlink()
    before = store_of(tmp_path / "p")
    assert imported(tmp_path / "p", source).already == 3
    assert store_of(tmp_path / "p") == before


def test_a_new_vector_of_a_known_slice_is_added(tmp_path: Path) -> None:
    source = written("vectors", tmp_path / "in")
    imported(tmp_path / "p", source)
    save_pt(source / "case_s2_s2_h&e_patch7.pt", np.arange(6, dtype=np.float32))
    assert imported(tmp_path / "p", source).bags == 1
    table = table_of(tmp_path / "p", "s2")
    assert table["patch"].tolist() == [1, 7]
    found = rows_of(tmp_path / "p")["s2", "h&e", "s2"]
    np.testing.assert_array_equal(found, [*FEATURES["s2"], np.arange(6)])


def test_files_that_cannot_be_opened_are_named_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bad = written("vectors", tmp_path / "in"), "case_s2_s2_h&e_patch1.pt"
    real = Vectors._read_file

    def denied(self: Vectors, name: str) -> Any:
        if name == bad:
            raise PermissionError(13, "Permission denied", str(self.root / name))
        return real(self, name)

    monkeypatch.setattr(Vectors, "_read_file", denied)
    report = imported(tmp_path / "p", source, on_bad="skip")
    assert report.skipped == [(bad, "the file cannot be read (Permission denied)")]
    assert len(rows_of(tmp_path / "p")) == 2


def test_a_part_is_closed_at_its_size_and_a_case_may_have_several(tmp_path: Path) -> None:
    big = {f"s{i}": np.full((300, 500), i, np.float32) for i in range(6)}  # 0.6 MB each
    rows = [("slide", "case"), *((name, "A") for name in big)]
    (tmp_path / "map.csv").write_text("\n".join(map(",".join, rows)))
    settings = {"extract": {"part_mb": 1}}
    imported(tmp_path / "p", written("clam", tmp_path / "in", big), settings, map=str(tmp_path / "map.csv"))
    assert len(Store.open(tmp_path / "p" / "store").record("A").parts) == 3
    assert_same(rows_of(tmp_path / "p"), {("A", "h&e", s): x for s, x in big.items()}, "float32")


# The project folder


def test_a_folder_becomes_a_project_whose_settings_are_those_of_the_import(tmp_path: Path) -> None:
    source = write_torchmil(tmp_path / "in", FEATURES, {"s1": 0, "s2": 1, "s10": 1})
    report = imported(tmp_path / "p", source, {"exclude": ["s2"]}, patch_size=256.0)
    assert (tmp_path / "p" / "labels.csv").read_text().split() == ["Case,Class", "s1,0", "s10,1"]
    layers = Layers()
    layers.add(Config, read_file(tmp_path / "p" / "featstore.yaml"), "featstore.yaml")
    config = layers.build(Config)
    assert (config.labels.file, config.labels.case_column) == ("labels.csv", "Case")
    assert (config.exclude, config.imports.patch_size) == (["s2"], 256.0)
    assert any("featstore.yaml; next: featstore train-head" in note for note in report.notes)
    saved = json.loads((tmp_path / "p" / "reports" / "import" / "report.json").read_text())
    assert saved == report.to_json()


def test_labels_and_settings_that_are_there_are_never_overwritten(tmp_path: Path) -> None:
    source = write_torchmil(tmp_path / "in", FEATURES, {"s1": 0, "s2": 1, "s10": 1})
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "labels.csv").write_text("mine")
    (tmp_path / "p" / "featstore.yaml").write_text("# mine")
    report = imported(tmp_path / "p", source)
    assert (tmp_path / "p" / "labels.csv").read_text() == "mine"
    assert (tmp_path / "p" / "featstore.yaml").read_text() == "# mine"
    assert any("not written: there is a" in note for note in report.notes)


def test_labels_that_are_named_keep_their_file_to_themselves(tmp_path: Path) -> None:
    source = write_torchmil(tmp_path / "in", FEATURES, {"s1": 0, "s2": 1, "s10": 1})
    imported(tmp_path / "p", source, {"labels": {"file": "own.csv"}})
    assert not (tmp_path / "p" / "labels.csv").exists()


# Stopped and killed


def in_a_process(
    project: Path,
    source: Path,
    file_format: str,
    prepare: Callable[[], Any] | None = None,
    stop_at: int = 0,
) -> int:
    """Import in a forked child; its exit code, negative for a signal."""
    project.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            if prepare is not None:
                files.os = prepare()  # type: ignore[assignment]

            def observe(done: int, total: int) -> None:
                if done == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)

            config = FeatstoreConfig.model_validate({"store": {"format": file_format}})
            report = import_project(config, project, source, observe)
            code = 0 if report.interrupted is None else 128 + report.interrupted
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_goes_on(project: Path, source: Path, file_format: str) -> int:
    """What is committed is right; the same import again does just the rest. How many were there."""
    there = {}
    if read_manifest(project / "store") is not None:
        there = rows_of(project)
        assert verify(project / "store", "full").damage == []
        assert_same(there, {key: x for key, x in alone(FEATURES).items() if key in there}, "float32")
    report = imported(project, source, {"store": {"format": file_format}})
    assert (report.already, report.bags) == (len(there), 3 - len(there))
    assert_same(rows_of(project), alone(FEATURES), "float32")
    assert verify(project / "store", "full").damage == []
    return len(there)


def kill_at_steps(tmp_path: Path, name: str, file_format: str, stride: int) -> set[int]:
    source = written(name, tmp_path / "in")
    seen, step = set(), 1
    while True:
        project = tmp_path / f"p{step}"
        code = in_a_process(project, source, file_format, lambda: killing_steps(step, step % 2 == 0))  # noqa: B023
        if code == 0:
            assert step > 40
            return seen
        assert code == -signal.SIGKILL
        seen.add(assert_goes_on(project, source, file_format))
        shutil.rmtree(project)
        step += stride


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("name", "file_format"), [("clam", "hdf5"), ("vectors", "zarr")])
def test_killed_anywhere_an_import_goes_on(tmp_path: Path, name: str, file_format: str) -> None:
    assert len(kill_at_steps(tmp_path, name, file_format, 17)) > 1


@pytest.mark.slow
@both_formats
@every_layout
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_every_step_an_import_goes_on(tmp_path: Path, name: str, file_format: str) -> None:
    assert kill_at_steps(tmp_path, name, file_format, 1) == {0, 1, 2, 3}


@both_formats
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("stop_at", [1, 2])
def test_told_to_stop_an_import_ends_between_two_bags(
    tmp_path: Path, file_format: str, stop_at: int
) -> None:
    source = written("clam", tmp_path / "in")
    code = in_a_process(tmp_path / "p", source, file_format, stop_at=stop_at)
    assert code == 128 + signal.SIGTERM
    saved = json.loads((tmp_path / "p" / "reports" / "import" / "report.json").read_text())
    assert (saved["interrupted"], saved["bags"]) == (True, stop_at)
    assert assert_goes_on(tmp_path / "p", source, file_format) == stop_at


# What a second import must not do


def test_a_bag_that_another_map_places_elsewhere_is_refused(tmp_path: Path) -> None:
    source = write_clam(tmp_path / "in", FEATURES)
    old = write_rows(tmp_path / "old.csv", [["slide_id", "case_id"], *[[slide, "A"] for slide in FEATURES]])
    new = write_rows(tmp_path / "new.csv", [["slide_id", "case_id"], *[[slide, "B"] for slide in FEATURES]])
    imported(tmp_path / "p", source, map=str(old))
    before = rows_of(tmp_path / "p")
    with pytest.raises(ImportProblem, match="is in the store already, as slice s1 of stain h&e in case A"):
        imported(tmp_path / "p", source, map=str(new))
    with pytest.raises(ImportProblem, match="in the store already"):
        imported(tmp_path / "p", source)
    assert_same(rows_of(tmp_path / "p"), before, "float32")


def test_a_bag_of_a_table_that_another_map_places_elsewhere_is_refused(tmp_path: Path) -> None:
    table = written("table", tmp_path / "in")
    imported(tmp_path / "p", table)
    rows = [["slide_id", "case_id"], *[[slide, "B"] for slide in FEATURES]]
    with pytest.raises(ImportProblem, match="in the store already"):
        imported(tmp_path / "p", table, map=str(write_rows(tmp_path / "map.csv", rows)))


def test_a_shorter_bag_replaces_the_longer_one_in_one_record(tmp_path: Path) -> None:
    source = write_clam(tmp_path / "in", {"s1": np.ones((9, 4), np.float32)})
    imported(tmp_path / "p", source)
    (source / "h5_files" / "s1.h5").unlink()
    write_clam(source, {"s1": np.full((4, 4), 2, np.float32)})
    report = imported(tmp_path / "p", source)
    assert report.replaced == 9
    assert "9 embeddings that were there of these bags were replaced" in report.to_text()
    store = Store.open(tmp_path / "p" / "store")
    assert store.bag("s1").features.tolist() == [[2.0] * 4] * 4
    assert store.record("s1").sequence == 2


@pytest.mark.parametrize("name", ["slideflow", "torchmil"])
def test_coordinates_that_were_mended_are_taken_over(tmp_path: Path, name: str) -> None:
    source = written(name, tmp_path / "in")
    imported(tmp_path / "p", source)
    for path in [*source.glob("*.index.npz"), *source.glob("coords/*.npy")]:
        if path.suffix == ".npz":
            np.savez(path, np.load(path)["arr_0"] + 1000)
        else:
            np.save(path, np.load(path) + 1000)
    before = Store.open(tmp_path / "p" / "store").table()
    assert imported(tmp_path / "p", source).bags == 3
    after = Store.open(tmp_path / "p" / "store").table()
    assert (after["coord_x"].to_numpy() == before["coord_x"].to_numpy() + 1000).all()
    assert imported(tmp_path / "p", source).already == 3


def test_a_table_that_changes_while_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = written("table", tmp_path / "in")
    listed = sources.Source.entry

    def later(self: Any, *args: Any) -> Any:
        table.write_text(table.read_text() + "\n")
        return listed(self, *args)

    monkeypatch.setattr(sources.Source, "entry", later)
    with pytest.raises(ImportProblem, match="changes while it is being read"):
        imported(tmp_path / "p", table)


def test_labels_that_changed_are_told_and_left(tmp_path: Path) -> None:
    source = write_torchmil(tmp_path / "in", FEATURES, {"s1": 0, "s2": 1, "s10": 1})
    imported(tmp_path / "p", source)
    labels = (tmp_path / "p" / "labels.csv").read_text()
    np.save(source / "labels" / "s1.npy", np.array([1]))
    notes = " ".join(imported(tmp_path / "p", source, {"labels": {"file": "labels.csv"}}).notes)
    assert "labels.csv has another class for 1 cases whose labels came along (s1)" in notes
    assert (tmp_path / "p" / "labels.csv").read_text() == labels


def test_an_import_that_can_use_nothing_is_an_error(tmp_path: Path) -> None:
    source = write_clam(tmp_path / "in", {"s1": np.full((3, 4), np.nan, np.float32)})
    with pytest.raises(ImportProblem, match="no bag could be used"):
        imported(tmp_path / "p", source, on_bad="skip")
    assert not (tmp_path / "p" / "featstore.yaml").exists()
