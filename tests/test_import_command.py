"""import and export as typed, and trainings on what was imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import heads.evaluation.results
from featstore.config import ImportConfig
from featstore.store import Store, StoreWriter
from tests import helpers
from tests.command_line import answer, featstore, refused, succeeded
from tests.interop.builders import (
    features_of,
    write_clam,
    write_rows,
    write_table,
    write_torchmil,
    write_trident,
)
from tests.interop.projects import alone, assert_same, rows_of, table_of
from tests.store.builders import make_slice, make_spec

FEATURES = features_of()
SMALL = (
    "--embed-dim",
    "8",
    "--attention-hidden",
    "4",
    "--epochs",
    "3",
    "--device",
    "cpu",
    "--resamples",
    "20",
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes far longer than these trainings."""
    for name in ("plot_history", "plot_confusion", "plot_deviation"):
        monkeypatch.setattr(heads.evaluation.results, name, lambda *args: [])


def planted(cases: int = 20, dim: int = 6) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Bags of two classes; some rows of class 1 stand out."""
    rng = np.random.default_rng(0)
    labels = {str(i): i % 2 for i in range(1, cases + 1)}
    bags = {}
    for case, label in labels.items():
        x = rng.normal(size=(int(rng.integers(4, 12)), dim))
        x[: len(x) // 3 + 1, :2] += 4 * label
        bags[case] = x.astype(np.float16).astype(np.float32)
    return bags, labels


def trained(project: Path) -> dict[str, object]:
    return answer(project, "train-head", "--model", "dual_stream", *SMALL)


def test_a_folder_is_imported_where_nothing_was(tmp_path: Path) -> None:
    write_trident(tmp_path / "in", FEATURES)
    said = succeeded(tmp_path, "import", "in").stdout
    for part in (
        "9 patches of 3 bags imported from trident",
        "6 features as float32",
        "wrote ",
        "train-head",
    ):
        assert part in said
    assert_same(rows_of(tmp_path), alone(FEATURES), "float32")
    assert (tmp_path / "featstore.yaml").is_file()
    assert "imported:trident:uni_v1" in succeeded(tmp_path, "info").stdout
    assert "no damage" in succeeded(tmp_path, "verify", "--full").stdout.lower()
    assert "3 bags were there already" in succeeded(tmp_path, "import", "in").stdout


def test_every_flag_does_what_it_says(tmp_path: Path) -> None:
    write_clam(tmp_path / "in", {**FEATURES, "bad": np.full((1, 6), np.nan, np.float32)})
    write_rows(tmp_path / "map.csv", [["slide", "case"], *[[s, "A"] for s in (*FEATURES, "bad")]])
    flags = ("--from", "clam", "--map", "map.csv", "--default-stain", "sox-10", "--encoder", "uni")
    more = (
        "--precision",
        "float16",
        "--patch-size",
        "256",
        "--on-bad",
        "skip",
        "--store",
        "s",
        "--store-format",
        "zarr",
    )
    found = answer(tmp_path, "import", "in", *flags, *more)
    assert (found["backbone"], found["stored_dtype"], found["bags"]) == ("imported:clam:uni", "float16", 3)
    assert [entry["path"] for entry in found["skipped"]] == ["h5_files/bad.h5"]
    table = Store.open(tmp_path / "s").table()
    assert set(table["stain"]) == {"sox10"}
    assert (table["x1"] - table["x0"]).eq(256).all()
    assert list((tmp_path / "s").rglob("*.zarr.zip"))
    with (tmp_path / "reports" / "import" / "skipped.csv").open() as file:
        assert file.readline().strip() == "path,reason"
        assert file.readline().startswith("h5_files/bad.h5,")


def test_a_project_far_away_may_be_named(tmp_path: Path) -> None:
    write_clam(tmp_path / "in", FEATURES)
    (tmp_path / "p").mkdir()
    succeeded(tmp_path, "import", "in", "--project", "p")
    assert_same(rows_of(tmp_path / "p"), alone(FEATURES), "float32")


def test_the_settings_of_the_project_hold_also_for_the_next_import(tmp_path: Path) -> None:
    write_clam(tmp_path / "in", FEATURES)
    succeeded(tmp_path, "import", "in", "--encoder", "uni", "--patch-size", "256")
    assert answer(tmp_path, "import", "in")["already_done"] == 3


def test_help_lists_the_formats_and_the_flags(tmp_path: Path) -> None:
    said = " ".join(succeeded(tmp_path, "import", "--help").stdout.split())
    assert "auto | clam | trident | stamp | slideflow | torchmil | table | vectors" in said
    for name in ImportConfig.model_fields:
        assert ("--from" if name == "source_format" else f"--{name.replace('_', '-')}") in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("gone",), ("featstore import: there is nothing at this path", "gone")),
        (("in", "--from", "camelyon"), ("camelyon", "trident")),
        (("in", "--precision", "float8"), ("float8",)),
        (("in", "--patch-size", "-1"), ("patch_size",)),
        (("in", "--map", "gone.csv"), ("gone.csv cannot be read", "--map")),
        (("in", "--from", "stamp"), ("there are no bags", "in")),
        (("in/h5_files/s1.h5",), ("no layout that is known", "s1.h5")),
    ],
)
def test_an_import_that_cannot_be_done_says_why_and_leaves_nothing(
    tmp_path: Path, args: tuple[str, ...], says: tuple[str, ...]
) -> None:
    write_clam(tmp_path / "in", FEATURES)
    refused(tmp_path, "import", *args, says=says, to_do="--from" not in args and "--precision" not in args)


def test_a_second_encoder_is_refused_with_another_store_as_the_way_out(tmp_path: Path) -> None:
    write_trident(tmp_path / "a", FEATURES, "uni_v1")
    write_trident(tmp_path / "b", FEATURES, "virchow")
    succeeded(tmp_path, "import", "a")
    refused(tmp_path, "import", "b", says=("uni_v1 there", "--store-path"))
    succeeded(tmp_path, "import", "b", "--store-path", "other")
    assert_same(rows_of(tmp_path), alone(FEATURES), "float32")


def test_an_imported_project_has_nothing_to_extract_or_check(tmp_path: Path) -> None:
    write_trident(tmp_path / "a", FEATURES, "uni_v1")
    succeeded(tmp_path, "import", "a")
    refused(tmp_path, "extract", says=("imported (imported:trident:uni_v1)", "--store-path"))
    refused(tmp_path, "check", says=("no patches to check", "featstore info"))
    assert "another tool made the embeddings" in succeeded(tmp_path, "info").stdout
    succeeded(tmp_path, "verify", "--full")


# Training


def committed_directly(project: Path, bags: Mapping[str, np.ndarray], spec: object) -> None:
    """The same numbers, without an import."""
    writer = StoreWriter(project / "store", spec, {})  # type: ignore[arg-type]
    for case, x in bags.items():
        made = make_slice(case, "h&e", case, list(range(len(x))))
        columns = {**made.columns, "features": x, "quality": np.full((len(x), 8), np.nan, np.float32)}
        writer.commit(case, [type(made)("h&e", case, columns)])


def test_imported_bags_train_like_the_same_numbers_committed_directly(tmp_path: Path) -> None:
    bags, labels = planted()
    for name in ("imported", "direct"):
        (tmp_path / name).mkdir()
    write_table(tmp_path / "bags.csv", bags, labels)
    said = succeeded(tmp_path / "imported", "import", "../bags.csv").stdout
    assert "labels.csv" in said
    direct = tmp_path / "direct"
    committed_directly(direct, bags, make_spec(dim=6, stored_dtype="float32"))
    helpers.write_labels(direct, labels)
    (direct / "featstore.yaml").write_text(json.dumps({"labels": {"file": "labels.csv"}}))
    stores = [Store.open(tmp_path / name / "store") for name in ("imported", "direct")]
    assert stores[0].cases() == stores[1].cases() == list(bags)
    for case in bags:
        here, there = (store.bag(case) for store in stores)
        np.testing.assert_array_equal(here.features, there.features)
        for name in ("rows", "patches", "slice_sizes", "stain_sizes", "stain_ids"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
        assert (here.slices, here.stains) == (there.slices, there.stains)
    histories = []
    for name in ("imported", "direct"):
        assert "splits" in succeeded(tmp_path / name, "split", "--folds", "5").stdout
        trained(tmp_path / name)
        (run,) = (tmp_path / name / "runs").glob("run_*")
        history = next(run.rglob("history.csv"))
        histories.append(pd.read_csv(history).drop(columns="seconds"))
    pd.testing.assert_frame_equal(*histories)


def test_what_torchmil_wrote_trains_without_a_word_more(tmp_path: Path) -> None:
    bags, labels = planted()
    write_torchmil(tmp_path / "in", bags, labels)
    succeeded(tmp_path, "import", "in", "--patch-size", "256")
    trained(tmp_path)
    assert len(list((tmp_path / "runs").glob("run_*"))) == 1


def test_musk_is_imported_and_trained_as_it_is_passed_around(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "mil" / "musk1.csv"
    found = answer(tmp_path, "import", file)
    frame = pd.read_csv(file, dtype={"bag_id": str})
    assert (found["bags"], found["patches"]) == (frame["bag_id"].nunique(), len(frame)) == (92, 476)
    store = Store.open(tmp_path / "store")
    for case, rows in frame.groupby("bag_id"):
        wanted = rows[[f"f{i}" for i in range(166)]].to_numpy(np.float32)
        np.testing.assert_array_equal(store.bag(str(case)).features, wanted)
    labels = pd.read_csv(tmp_path / "labels.csv", dtype=str).set_index("Case")["Class"]
    assert labels.to_dict() == frame.groupby("bag_id")["bag_label"].first().astype(str).to_dict()
    trained(tmp_path)


# Export


def test_an_export_as_typed_and_back(tmp_path: Path) -> None:
    bags, labels = planted()
    write_torchmil(tmp_path / "in", bags, labels)
    project, back = tmp_path / "project", tmp_path / "back"
    project.mkdir()
    back.mkdir()
    succeeded(project, "import", "../in", "--patch-size", "256")
    said = succeeded(project, "export", "../out", "--folds", "5").stdout
    for part in ("in 20 bags written to", "dataset.csv: 20 bags with a label", "5 splits"):
        assert part in said
    succeeded(back, "import", "../out", "--map", "../out/bags.csv", "--patch-size", "256")
    assert_same(rows_of(back), rows_of(project), "float32")
    columns = [f"{axis}{i}" for i in range(4) for axis in "xy"]
    pd.testing.assert_frame_equal(*(table_of(folder)[columns] for folder in (project, back)))
    refused(project, "export", "../out", says=("not empty", "out"))
    refused(project, "export", "new", "--by", "stain", says=("slice or case",), to_do=False)


def test_an_export_needs_a_store(tmp_path: Path) -> None:
    (tmp_path / "featstore.yaml").write_text("")
    assert "store" in refused(tmp_path, "export", "out")


@pytest.mark.slow
def test_an_import_told_to_stop_says_so_and_ends_as_the_signal_would(tmp_path: Path) -> None:
    """A real process, as typed; what it leaves goes on with the same command."""
    write_clam(tmp_path / "in", {f"s{i}": np.full((4, 6), i, np.float32) for i in range(40)})
    code = (
        "import os, signal, sys\n"
        "from featstore.store import StoreWriter\n"
        "real = StoreWriter.commit\n"
        "def commit(self, case, slices):\n"
        "    real(self, case, slices)\n"
        "    if case == 's3': os.kill(os.getpid(), signal.SIGTERM)\n"
        "StoreWriter.commit = commit\n"
        "import cli\n"
        "sys.argv[1:] = ['import', 'in', '--json']\n"
        "cli.app()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(helpers.ROOT)},
        check=False,
    )
    assert done.returncode == 128 + 15, done.stderr
    assert json.loads(done.stdout)["interrupted"] is True
    there = json.loads(done.stdout)["bags"]
    assert 0 < there < 40
    found = answer(tmp_path, "import", "in")
    assert (found["already_done"], found["bags"]) == (there, 40 - there)
    assert featstore(tmp_path, "verify", "--full").exit_code == 0
