"""`featstore probe`: its tables against the head itself, its galleries against the files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from featstore.bags import Bag, collate
from featstore.store import Store
from heads.evaluation.checkpoints import load_best
from heads.evaluation.runs import RunFolder, read_about, read_config
from heads.inspect.curve_tables import area_summary, curve_areas, effect_agreement
from heads.inspect.opened import Wanted, open_run
from heads.inspect.probe_tables import attended_but_neutral, most_for, read_probes
from heads.models.head import Head
from tests.command_line import answer, refused, succeeded
from tests.inspect.projects import CLASSES, pixels_of, project_with, run_of, tiles_of

HEADS = ("hierarchical", "abmil", "mean")
FILES = ("patches.csv", "slices.csv", "stains.csv", "cases.csv", "deletion_insertion.csv",
         "deletion_insertion_areas.csv", "deletion_insertion.png", "alone_by_class.png", "notes.txt",
         "galleries/most_benign.png", "galleries/most_high_grade.png")  # fmt: skip


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "probing" / name, dtype={"case_id": str})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probed runs; not to be changed."""
    made = project_with(tmp_path_factory.mktemp("probed"), *HEADS, "transmil")
    for head in HEADS:
        assert "3 cases, 132 patches" in succeeded(made, "probe", run_of(made, head)).stdout
    return made


@pytest.fixture(params=HEADS)
def run(request: pytest.FixtureRequest, project: Path) -> Path:
    return run_of(project, request.param)


def model_of(run: Path) -> Head:
    folder = RunFolder(run)
    return load_best(folder, read_config(folder), read_about(folder)).eval()


def asked(head: Head, bag: Bag) -> np.ndarray:
    """Class probabilities of a bag, by the head itself."""
    with torch.no_grad():
        return torch.softmax(head(collate([bag])).logits.double(), 1)[0].numpy()


def test_the_files_are_there_under_their_names(run: Path) -> None:
    assert not [name for name in FILES if not (run / "probing" / name).is_file()]
    attends = "mean" not in run.name
    for name in ("attention_effect.csv", "attention_effect.png", "galleries/attended_but_neutral.png"):
        assert (run / "probing" / name).is_file() == attends


def test_every_row_is_what_the_head_says_of_the_patch_and_of_the_case_without_it(
    project: Path, run: Path
) -> None:
    head, store = model_of(run), Store.open(project / "store")
    patches, cases = read(run, "patches.csv"), read(run, "cases.csv").set_index("case_id")
    for case, mine in patches.groupby("case_id"):
        bag = store.bag(str(case))
        whole = asked(head, bag)
        np.testing.assert_allclose(
            cases.loc[case, [f"prob_{c}" for c in CLASSES]].astype(float), whole, atol=1e-6
        )
        for i in (0, 5, 21, 43):
            one = np.arange(len(bag)) == i
            row = mine.iloc[i]
            assert row["path"] == store.table(str(case))["path"].iloc[i]
            alone, without = asked(head, bag.take(one)), asked(head, bag.take(~one))
            for c, name in enumerate(CLASSES):
                assert row[f"alone_{name}"] == pytest.approx(alone[c], abs=1e-5)
                assert row[f"without_{name}"] == pytest.approx(without[c], abs=1e-5)
                assert row[f"effect_{name}"] == pytest.approx(whole[c] - without[c], abs=1e-5)


def test_slices_and_stains_are_left_out_as_the_head_would_see_it(project: Path, run: Path) -> None:
    head, store = model_of(run), Store.open(project / "store")
    for name, keys in (("slices.csv", ["stain", "slice_id"]), ("stains.csv", ["stain"])):
        for row in read(run, name).to_dict("records"):
            bag, table = store.bag(row["case_id"]), store.table(row["case_id"])
            kept = ~(table[keys] == [row[key] for key in keys]).all(axis=1).to_numpy()
            without = asked(head, bag.take(kept))
            for c, label in enumerate(CLASSES):
                assert row[f"without_{label}"] == pytest.approx(without[c], abs=1e-5)
            assert row["patches"] == (~kept).sum()


def test_tiles_of_galleries_are_the_files_and_numbers_of_the_table(project: Path, run: Path) -> None:
    known = read(run, "patches.csv").set_index("path")
    for gallery in (run / "probing" / "galleries").glob("*.png"):
        tiles = tiles_of(gallery)
        assert len(tiles) == 6 or "neutral" in gallery.name  # two a case
        values = [tile["values"]["p(high_grade)"] for tile, _ in tiles]
        if "most" in gallery.name:
            assert values == sorted(values, reverse="high_grade" in gallery.name)
        for tile, pixels in tiles:
            np.testing.assert_array_equal(pixels, pixels_of(project, tile["path"]))
            row = known.loc[tile["path"]]
            assert tile["values"]["p(high_grade)"] == pytest.approx(row["alone_high_grade"], rel=1e-6)
            if "attention" in tile["values"]:
                assert tile["values"]["attention"] == pytest.approx(row["effective_attention"], rel=1e-6)


def test_in_place_and_parquet_hold_the_same_as_csv(project: Path) -> None:
    run = run_of(project, "hierarchical")
    csv = read(run, "patches.csv")
    flags = ("--mode", "in_place", "--tables", "parquet", "--no-curves", "--top-n", "4")
    found = answer(project, "probe", run, *flags)
    table = pd.read_parquet(run / "probing" / "patches.parquet")
    assert not (run / "probing" / "patches.csv").exists()  # no folder holds two probings
    assert found["patches"] == len(table) == 132
    assert found["areas"] == []
    assert list(table) == list(csv)
    for name in csv.select_dtypes("number"):
        np.testing.assert_allclose(table[name], csv[name], rtol=1e-6, atol=1e-9)
    tiles = tiles_of(run / "probing" / "galleries" / "most_high_grade.png")
    assert len(tiles) == 4
    by_path = csv.set_index("path")["in_place_high_grade"]
    assert [tile["values"]["p(high_grade)"] for tile, _ in tiles] == pytest.approx(
        [by_path[tile["path"]] for tile, _ in tiles], rel=1e-6
    )
    succeeded(project, "probe", run)  # as it was


def test_a_head_that_cannot_be_asked_all_of_it_says_why_and_tells_the_rest(project: Path) -> None:
    run = run_of(project, "transmil")
    found = answer(project, "probe", run, "--no-curves")
    assert any("TransMIL" in note and "forward pass" in note for note in found["notes"])
    columns = set(read(run, "patches.csv"))
    assert {"alone_benign", "alone_high_grade", "effective_attention"} <= columns
    assert not any(name.startswith(("effect_", "without_", "in_place_")) for name in columns)
    assert "no pictures of --mode in_place" in json.dumps(
        answer(project, "probe", run, "--mode", "in_place")
    )


def test_what_is_no_mode_format_or_run_is_refused(project: Path) -> None:
    run = run_of(project, "mean")
    refused(project, "probe", run, "--mode", "alnoe", says=("--mode is 'alnoe'", "alone | in_place"))
    refused(project, "probe", run, "--tables", "xlsx", says=("--tables is 'xlsx'", "csv | parquet"))
    refused(project, "probe", "nothing", says=("nothing is no run",))


def test_curves_begin_with_the_whole_case_and_end_with_it(project: Path, run: Path) -> None:
    lines, cases = read(run, "deletion_insertion.csv"), read(run, "cases.csv").set_index("case_id")
    for (case, _), mine in lines.groupby(["case_id", "order"]):
        whole = cases.loc[case, f"prob_{cases.loc[case, 'predicted_label']}"]
        ends = mine.sort_values("fraction").groupby("kind")["probability"].agg(["first", "last"])
        assert ends.loc["deletion", "first"] == pytest.approx(whole, abs=1e-5)
        assert ends.loc["insertion", "last"] == pytest.approx(whole, abs=1e-5)
    orders = set(lines["order"])
    assert orders == {"effect", "alone", "random"} | ({"attention"} if "mean" not in run.name else set())


def test_areas_and_their_intervals_are_those_of_their_cases(run: Path) -> None:
    lines = read(run, "deletion_insertion.csv")
    areas = curve_areas(lines)
    for (case, order), mine in lines.groupby(["case_id", "order"]):
        for kind, part in mine.groupby("kind"):
            x, y = part["fraction"].to_numpy(), part["probability"].to_numpy()
            expected = ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0])
            row = areas[(areas["case_id"] == case) & (areas["order"] == order)]
            assert row[kind].item() == pytest.approx(expected, rel=1e-6)
    summary = area_summary(areas).set_index(["order", "kind"])
    for (order, kind), row in summary.iterrows():
        wide = areas.pivot(index="case_id", columns="order", values=kind)
        assert row["area"] == pytest.approx(wide[order].mean())
        if order == "random":
            assert math.isnan(row["against_random"])
            continue
        assert row["against_random"] == pytest.approx((wide[order] - wide["random"]).mean())
        assert row["low"] <= row["against_random"] <= row["high"]


def test_attention_is_ranked_against_the_size_of_effects(project: Path) -> None:
    run = run_of(project, "abmil")
    opened = open_run(read_config(RunFolder(run)), project, Wanted(run))
    probes = read_probes(opened)
    for row in effect_agreement(probes).to_dict("records"):
        mine = probes.patches[probes.patches["case_id"] == row["case_id"]]
        called = probes.cases.set_index("case_id").loc[row["case_id"], "predicted_label"]
        effect, attention = mine[f"effect_{called}"], mine["effective_attention"]
        assert row["size"] == pytest.approx(attention.corr(effect.abs(), method="spearman"))
        assert row["signed"] == pytest.approx(attention.corr(effect, method="spearman"))


def test_galleries_take_few_of_a_case_and_only_what_is_neutral(project: Path) -> None:
    run = run_of(project, "abmil")
    opened = open_run(read_config(RunFolder(run)), project, Wanted(run))
    probes = read_probes(opened, leave_out=False)
    assert not [name for name in probes.patches if name.startswith(("effect_", "without_"))]
    most = most_for(probes, "benign", n=4, each=1)
    assert most["case_id"].is_unique
    assert most["alone_benign"].iloc[0] == probes.patches["alone_benign"].max()
    neutral = attended_but_neutral(probes, percent=100, n=200, each=100)
    away = (neutral["alone_benign"] - 0.5).abs()
    assert (away < 0.2).all()
    assert away.is_monotonic_increasing
    assert len(neutral) == ((probes.patches["alone_benign"] - 0.5).abs() < 0.2).sum()


def test_pictures_that_are_gone_are_told_and_the_tables_are_written(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("probing")))
    shutil.rmtree(copy / "patches")
    run = run_of(copy, "mean")
    found = answer(copy, "probe", run, "--no-curves")
    assert any("there is no folder of patches" in note for note in found["notes"])
    assert (run / "probing" / "patches.csv").is_file()
    assert "there is no folder of patches" in (run / "probing" / "notes.txt").read_text()


def test_what_patches_change_is_left_out_where_it_is_not_wanted(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("probing")))
    run, columns = run_of(copy, "mean"), set(read(run_of(project, "mean"), "patches.csv"))
    succeeded(copy, "probe", run, "--no-curves", "--no-leave-out")
    left = set(read(run, "patches.csv"))
    assert columns - left == {f"{what}_{name}" for what in ("effect", "without") for name in CLASSES}
