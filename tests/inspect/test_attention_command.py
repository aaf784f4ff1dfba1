"""`featstore attention`: its files, and that numbers, pictures and files belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import heads.inspect.attention_files as attention_files
from featstore.bags import collate
from featstore.store import Store
from heads.evaluation.checkpoints import load_best
from heads.evaluation.runs import RunFolder, held, read_about, read_config
from heads.inspect.attention_plots import patch_figure, slice_figure, stain_figure
from heads.inspect.case_files import draw_case, selected_patches, slice_names
from heads.inspect.drawing import draw_all
from heads.inspect.opened import Wanted, open_run
from heads.inspect.pictures import PatchImages
from heads.inspect.probe_tables import read_probes
from heads.inspect.tables import AttentionTables
from tests.command_line import answer, refused, succeeded
from tests.inspect.projects import PATCHES, drawing_nothing, pixels_of, project_with, run_of, tiles_of

ATTENDING = ("hierarchical", "dual_stream", "dsmil")
TABLES = (
    "attention_summary.txt", "stain_attention_distribution.png", "effective_attention.csv",
    "slice_attention.csv", "stain_attention.csv", "case_attention.csv",
    "slice_attention_equality.csv", "slice_attention_equality_misclassified.csv",
    "top_effective_patches_per_case_5.0pct.csv", "top_effective_patches_per_case_summary_5.0pct.txt",
    "plots/patch_attention_selected_slices.csv", "notes.txt",
)  # fmt: skip
IDS = ["case_id", "stain", "slice_id", "patch", "path"]


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name, dtype={"case_id": str})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of heads with and without attention, looked into; not to be changed."""
    made = project_with(tmp_path_factory.mktemp("looked"), *ATTENDING, "mean")
    for head in ATTENDING:
        said = succeeded(made, "attention", run_of(made, head)).stdout
        assert "3 cases, 132 patches" in said
        assert "note" not in said
    return made


@pytest.fixture(params=ATTENDING)
def analysis(request: pytest.FixtureRequest, project: Path) -> Path:
    return run_of(project, request.param) / "attention_analysis"


def cases_of(analysis: Path) -> list[str]:
    return read(analysis, "case_attention.csv")["case_id"].tolist()


def test_every_file_of_the_specification_is_there_under_its_name(analysis: Path) -> None:
    assert not [name for name in TABLES if not (analysis / name).is_file()]
    for case in cases_of(analysis):
        for end in ("top", "bottom"):
            assert (analysis / f"case_effective_patches/case_{case}_{end}_patches.png").is_file()
            of_slices = list(analysis.glob(f"patch_attention/case_{case}_*_slice*_{end}_patches.png"))
            assert len(of_slices) == 2  # of the most and the least attended slice
        assert (analysis / f"plots/effective_patch_attn_distro_case_{case}.png").is_file()
        assert (analysis / f"slice_attention/slice_attn_rankplot_case_{case}.png").is_file()
        for kind in ("attention", "plain"):
            assert len(list(analysis.glob(f"overlays/case_{case}_*_{kind}.jpg"))) == 4


def test_effective_attention_sums_to_one_in_every_case_and_table(analysis: Path) -> None:
    patches, slices = read(analysis, "effective_attention.csv"), read(analysis, "slice_attention.csv")
    stains = read(analysis, "stain_attention.csv")
    for frame, column in ((patches, "effective_attention"), (slices, "effective_attention"),
                          (stains, "stain_attention"), (stains, "uniform")):  # fmt: skip
        np.testing.assert_allclose(frame.groupby("case_id")[column].sum(), 1, atol=2e-6)
    for column in ("slice_attention", "uniform"):
        np.testing.assert_allclose(slices.groupby(["case_id", "stain"])[column].sum(), 1, atol=2e-6)
    summed = patches.groupby(["case_id", "stain", "slice_id"])["effective_attention"].sum()
    told = slices.set_index(["case_id", "stain", "slice_id"])["effective_attention"]
    np.testing.assert_allclose(summed[told.index], told, atol=1e-9)


@pytest.mark.parametrize("head", ATTENDING)
def test_attention_is_the_heads_own_patch_by_patch(project: Path, head: str) -> None:
    run = RunFolder(run_of(project, head))
    config = read_config(run)
    model = load_best(run, config, read_about(run)).eval()
    found = read(run.path / "attention_analysis", "effective_attention.csv")
    store = Store.open(project / "store")
    for case, mine in found.groupby("case_id"):
        with torch.no_grad():
            output = model(collate([store.bag(str(case))]), **model.schedule(1, 2))
        weights = {name: each.weights.double().numpy() for name, each in output.attention.items()}
        if head == "hierarchical":
            stain, slices = np.repeat(weights["stain"], 2), weights["slice"]
            expected = weights["patch"] * np.repeat(stain * slices, PATCHES)
        else:
            expected = weights["patch"].reshape(len(mine), -1).mean(axis=1)
        np.testing.assert_allclose(mine["effective_attention"], expected, atol=1e-6)
        assert mine["path"].tolist() == store.table(str(case))["path"].tolist()


def test_every_tile_shows_the_file_that_its_row_names_with_that_rows_numbers(
    project: Path, analysis: Path
) -> None:
    known = read(analysis, "effective_attention.csv").set_index("path")
    size = known.groupby("case_id")["effective_attention"].size()
    seen = set()
    for gallery in [*analysis.glob("*/case_*_patches.png")]:
        order = [tile["values"]["attention"] for tile, _ in tiles_of(gallery)]
        assert order == sorted(order, reverse="top_patches" in gallery.name)
        for tile, pixels in tiles_of(gallery):
            row = known.loc[tile["path"]]
            seen.add(row["patch"])
            assert not tile["scaled"]
            np.testing.assert_array_equal(pixels, pixels_of(project, tile["path"]))
            assert tile["values"]["attention"] == pytest.approx(row["effective_attention"], rel=1e-12)
            share = row["effective_attention"] * size[row["case_id"]]
            assert tile["values"]["× equal share"] == pytest.approx(share, rel=1e-12)
            assert f"case_{row['case_id']}_" in gallery.name
    assert {2, 10} <= seen  # names that sort differently as text and as numbers


def test_the_rows_of_the_selected_slices_are_those_of_their_galleries(analysis: Path) -> None:
    rows = read(analysis, "plots/patch_attention_selected_slices.csv")
    for (name, end), mine in rows.groupby(["name", "end"]):
        tiles = tiles_of(analysis / "patch_attention" / f"{name}_{end}_patches.png")
        assert [tile["path"] for tile, _ in tiles] == mine["path"].tolist()
        assert mine["rank"].tolist() == [1, 2, 3, 4, 5]
    slices = read(analysis, "slice_attention.csv")
    for case, mine in rows.groupby("case_id"):
        of_case = slices[slices["case_id"] == case].set_index(["stain", "slice_id"])["effective_attention"]
        for which, ends in (("most", of_case.idxmax()), ("least", of_case.idxmin())):
            chosen = mine[mine["slice"] == which][["stain", "slice_id"]].drop_duplicates()
            assert [tuple(row) for row in chosen.to_numpy().tolist()] == [ends]


def test_the_top_five_percent_are_the_most_attended_and_are_told_with_their_files(analysis: Path) -> None:
    patches, top = read(analysis, "effective_attention.csv"), read(analysis, TABLES[8])
    for case, mine in top.groupby("case_id"):
        of_case = patches[patches["case_id"] == case].nlargest(3, "effective_attention")  # 5 % of 44, up
        assert mine["path"].tolist() == of_case["path"].tolist()
        assert mine["rank"].tolist() == [1, 2, 3]
        np.testing.assert_allclose(mine["cumulative"], of_case["effective_attention"].cumsum(), rtol=1e-12)
        np.testing.assert_allclose(mine["times_equal"], 44 * of_case["effective_attention"], rtol=1e-12)
    text = (analysis / TABLES[9]).read_text()
    assert "5 % most attended" in text
    assert all(f"case {case}: 3 of 44 patches" in text for case in cases_of(analysis))


def test_equality_of_slices_is_that_of_its_formula(analysis: Path) -> None:
    slices = read(analysis, "slice_attention.csv")
    for row in read(analysis, "slice_attention_equality.csv").to_dict("records"):
        mine = slices[(slices["case_id"] == row["case_id"]) & (slices["stain"] == row["stain"])]
        a = mine["slice_attention"].to_numpy()
        entropy = -(a * np.log(a)).sum()
        assert row["normalized_entropy"] == pytest.approx(entropy / np.log(2))
        assert row["effective_slices"] == pytest.approx(np.exp(entropy))
        assert row["largest"] == pytest.approx(a.max())
    wrong = read(analysis, "slice_attention_equality_misclassified.csv")
    cases = read(analysis, "case_attention.csv")
    assert set(wrong["case_id"]) == set(cases[cases["correct"] == 0]["case_id"])


def tables_of(analysis: Path) -> AttentionTables:
    frames = [read(analysis, f"{name}_attention.csv") for name in ("case", "effective", "slice", "stain")]
    return AttentionTables(*frames, levels="hierarchical" in str(analysis))


def test_bars_and_points_have_the_tables_values(analysis: Path) -> None:
    tables = tables_of(analysis)
    for each in tables.each():
        case = str(each.cases["case_id"].iloc[0])
        for axes, (_, stain) in zip(
            slice_figure(case, each.slices, each.stains).axes, each.stains.iterrows(), strict=True
        ):
            mine = each.slices[each.slices["stain"] == stain["stain"]]
            heights = [bar.get_height() for bar in axes.patches]
            assert heights == sorted(mine["slice_attention"], reverse=True)
            names = [label.get_text() for label in axes.get_xticklabels()]
            by_name = mine.set_index("slice_id")["slice_attention"]
            assert [by_name[name] for name in names] == heights
        left, right = patch_figure(case, each.patches).axes
        drawn = left.containers  # stacked, a container a stain
        assert sum(bar.get_height() for bars in drawn for bar in bars) == len(each.patches)
        share = right.lines[0].get_ydata()
        np.testing.assert_allclose(np.diff(share), np.sort(each.patches["effective_attention"])[::-1])
    points = [
        y
        for line in stain_figure(tables.stains, tables.cases).axes[0].lines
        if line.get_linestyle() == "None"
        for y in line.get_ydata()
    ]
    assert sorted(points) == sorted(tables.stains["stain_attention"])


def test_a_head_without_attention_says_so_and_writes_nothing(project: Path) -> None:
    said = succeeded(project, "attention", run_of(project, "mean")).stdout
    assert "the head mean has no attention" in said
    assert not (run_of(project, "mean") / "attention_analysis").exists()


def test_missing_files_are_named_in_place_of_their_pictures(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    run = run_of(copy, "hierarchical")
    top = read(run / "attention_analysis", TABLES[8])
    gone = top["path"].iloc[0]
    (copy / "patches" / gone).unlink()
    found = answer(copy, "attention", run, "--case", top["case_id"].iloc[0])
    assert any(gone in note and "missing" in note for note in found["notes"])
    case = top["case_id"].iloc[0]
    first, _ = tiles_of(run / f"attention_analysis/case_effective_patches/case_{case}_top_patches.png")[0]
    assert first["path"] == gone
    assert first["note"] == "file missing"
    # The pictures of cases that were not asked for this time are gone: no folder mixes two analyses.
    others = [
        path for path in run.glob("attention_analysis/*/*case_*.*g") if f"case_{case}" not in path.name
    ]
    assert others == []
    shutil.rmtree(copy / "patches")
    found = answer(copy, "attention", run)
    assert any("there is no folder of patches" in note for note in found["notes"])
    assert (run / "attention_analysis" / "effective_attention.csv").is_file()


def test_parts_and_cases_that_are_none_are_refused(project: Path) -> None:
    run = run_of(project, "hierarchical")
    refused(project, "attention", run, "--part", "tset", says=("--part is 'tset'", "test | val | train"))
    own = cases_of(run / "attention_analysis")
    other = next(str(i) for i in range(1, 16) if str(i) not in own)
    refused(project, "attention", run, "--case", other, says=(f"{other!r} is no test case", "--part "))
    refused(project, "attention", run, "--case", "99", says=("'99' is no test case",))
    refused(project, "attention", "nowhere", says=("nowhere is no run",))


def test_other_processes_draw_the_same_pictures(project: Path, tmp_path: Path) -> None:
    analysis = run_of(project, "hierarchical") / "attention_analysis"
    run = analysis.parent
    opened = open_run(read_config(RunFolder(run)), project, Wanted(run))
    images, why = attention_files.patch_images(opened)
    assert not why
    for name in attention_files.FOLDERS:
        (tmp_path / name).mkdir()
    jobs = attention_files.case_jobs(opened, tables_of_ids(analysis), tmp_path, images, None)
    seen: list[tuple[int, int]] = []
    drawn = list(draw_all(draw_case, jobs, 3, lambda done, total: seen.append((done, total)), processes=2))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert pd.concat([each.selected for each in drawn])["path"].tolist() == (
        read(analysis, "plots/patch_attention_selected_slices.csv")["path"].tolist()
    )
    for path in tmp_path.rglob("*patches.png"):
        assert path.read_bytes() == (analysis / path.relative_to(tmp_path)).read_bytes()


def tables_of_ids(analysis: Path) -> AttentionTables:
    """As read, with the rows of the store as index."""
    tables = tables_of(analysis)
    whole = Store.open(analysis.parents[2] / "store").table().set_index("path")
    rows = {path: row for row, path in enumerate(whole.index)}
    tables.patches.index = pd.Index([rows[path] for path in tables.patches["path"]])
    return tables


def test_two_slices_never_meet_in_one_file() -> None:
    slices = pd.DataFrame(
        [("1", "a", "b_slicec"), ("1", "a_sliceb", "c"), ("1", "A", "x"), ("1", "a", "x")],
        columns=["case_id", "stain", "slice_id"],
    )
    assert len({name.lower() for name in slice_names(slices)}) == 4


def test_of_a_case_of_one_slice_there_is_no_least_attended_one() -> None:
    patches = pd.DataFrame({"case_id": "1", "stain": "h&e", "slice_id": "a", "patch": [1], "path": "x"})
    patches["effective_attention"] = 1.0
    slices = patches[["case_id", "stain", "slice_id", "effective_attention"]].assign(name="n")
    found = selected_patches(AttentionTables(pd.DataFrame(), patches, slices, pd.DataFrame(), False), 5)
    assert found["slice"].tolist() == ["most", "most"]
    assert found["end"].tolist() == ["top", "bottom"]


def test_only_patches_that_are_shown_are_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_files: list[str] = []
    whole = PatchImages.read
    monkeypatch.setattr(
        PatchImages, "read", lambda self, path: (read_files.append(path), whole(self, path))[1]
    )
    run = run_of(project, "hierarchical")
    succeeded(project, "attention", run, "--overlays", "0", "--top-n", "2")
    shown = {
        tile["path"]
        for file in run.glob("attention_analysis/*/*_patches.png")
        for tile, _ in tiles_of(file)
    }
    assert set(read_files) == shown
    assert len(shown) < 3 * 12 + 1  # of 132
    read_files.clear()
    succeeded(project, "attention", run, "--overlays", "1", "--top-n", "2")
    assert len(set(read_files) - shown) <= 3 * PATCHES  # one slice a case
    succeeded(project, "attention", run)  # as it was


@pytest.mark.parametrize("threshold", ["argmax", "validation"])
@pytest.mark.parametrize("calibration", ["none", "temperature"])
def test_cases_are_called_as_the_runs_own_results_say(
    project: Path, tmp_path: Path, threshold: str, calibration: str
) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("runs", "*.png")))
    flags = ("--threshold", threshold, "--calibration", calibration, "--model", "abmil", "--seed", "7")
    with drawing_nothing():
        succeeded(copy, "train-head", *flags)
    (run,) = (copy / "runs").iterdir()
    told = pd.read_csv(run / "predictions.csv", dtype={"case_id": str})
    opened = open_run(read_config(RunFolder(run)), copy, Wanted(run))
    tables = attention_files.read_attention(opened)
    assert tables is not None
    found = tables.cases[list(told.columns)]
    pd.testing.assert_frame_equal(found, told, check_dtype=False, atol=1e-5)
    probes = read_probes(opened, leave_out=False).cases[list(told.columns)]
    pd.testing.assert_frame_equal(probes, told, check_dtype=False, atol=1e-5)


def test_a_file_that_is_another_now_is_not_shown_as_what_was_embedded(
    project: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    run = run_of(copy, "hierarchical")
    top = read(run / "attention_analysis", TABLES[8]).iloc[0]
    Image.new("RGB", (40, 40), "red").save(copy / "patches" / top["path"])
    found = answer(copy, "attention", run, "--case", top["case_id"])
    assert any(top["path"] in note and "changed since it was embedded" in note for note in found["notes"])
    name = f"attention_analysis/case_effective_patches/case_{top['case_id']}_top_patches.png"
    tile, pixels = tiles_of(run / name)[0]
    assert tile["note"] == "file changed since it was embedded"
    assert not (pixels == [255, 0, 0]).all()


def test_cases_that_the_store_has_lost_are_left_out_and_told(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    run = run_of(copy, "dsmil")
    case = cases_of(run / "attention_analysis")[0]
    succeeded(copy, "rm", "--case", case, "--apply")
    found = answer(copy, "attention", run)
    assert found["cases"] == 2
    assert any(f"no longer in the store and are left out: {case}" in note for note in found["notes"])
    assert case in (run / "attention_analysis" / "notes.txt").read_text()


TWO_LEVELS = """
from heads.models.attention_pool import AttentionPool
from heads.models.config import AttentionConfig
from heads.models.head import Float32Linear, ProjectedHead, register_head
from heads.models.outputs import HeadOutput


@register_head("two_levels", AttentionConfig)
class TwoLevels(ProjectedHead):
    levels = ("patch", "slice")

    def __init__(self, dim, classes, config):
        super().__init__(dim, config)
        self.low, self.high = (AttentionPool(config.embed_dim, 8) for _ in range(2))
        self.classifier = Float32Linear(config.embed_dim, classes)

    def forward(self, batch, **schedule):
        slices, patch = self.low(self.embed(batch), batch.slice_offsets)
        cases, high = self.high(slices, batch.stain_offsets[batch.case_offsets])
        return HeadOutput(self.classifier(cases), {"patch": patch, "slice": high})
"""


def test_a_head_of_ones_own_with_two_levels_is_looked_into(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("runs")))
    (copy / "mine.py").write_text(TWO_LEVELS)
    with drawing_nothing():
        succeeded(copy, "train-head", "--plugin", "mine.py", "--model", "two_levels")
    (run,) = (copy / "runs").iterdir()
    for command in ("attention", "probe", "report"):
        assert answer(copy, command, run)["cases"] == 3
    patches = read(run / "attention_analysis", "effective_attention.csv")
    np.testing.assert_allclose(patches.groupby("case_id")["effective_attention"].sum(), 1, atol=1e-5)


def test_one_analysis_at_a_time_and_none_beside_another(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    run = run_of(copy, "dual_stream")
    succeeded(copy, "attention", run, "--part", "val", "--top-percent", "10", "--overlays", "1")
    lists = [path.name for path in (run / "attention_analysis").glob("top_effective*")]
    assert sorted(lists) == [TABLES[8].replace("5.0", "10.0"), TABLES[9].replace("5.0", "10.0")]
    own = set(read(run / "attention_analysis", "case_attention.csv")["case_id"])
    shown = {
        path.name.split("case_")[1].split("_")[0].split(".")[0]
        for path in run.glob("attention_analysis/*/*case_*")
    }
    assert shown == own
    with held(run / "attention_analysis"):
        refused(copy, "attention", run, says=("another process is writing this analysis",))
