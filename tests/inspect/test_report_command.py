"""`featstore report`: its pages show the patches and numbers that the tables have."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heads.evaluation.runs import RunFolder, read_config
from heads.inspect.attention import read_attention
from heads.inspect.opened import Wanted, open_run
from heads.inspect.probe_tables import read_probes
from heads.inspect.report.making import look
from tests.command_line import answer, refused, succeeded
from tests.inspect.projects import pixels_of, project_with, run_of

HEADS = ("hierarchical", "abmil", "mean")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = project_with(tmp_path_factory.mktemp("reported"), *HEADS)
    flags = ("--folds", "3", "--seeds", "1", "--epochs", "1", "--model", "abmil", "--split-path", "nowhere")
    succeeded(made, "train-head", *flags)
    return made


def page_of(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8")


@pytest.mark.parametrize("head", ["hierarchical", "abmil"])
def test_a_cases_page_shows_files_and_numbers_of_the_tables(project: Path, head: str) -> None:
    run = run_of(project, head)
    opened = open_run(read_config(RunFolder(run)), project, Wanted(run))
    attention, probes = read_attention(opened), read_probes(opened)
    assert attention is not None
    known = probes.patches.set_index("path")
    pages = look(
        read_config(RunFolder(run)), project, run, lambda text: None, lambda done, total: None
    ).pages
    assert [page.case_id for page in pages] == list(opened.cases)
    for page, tables in zip(pages, attention.each(), strict=True):
        assert sum(stain.attention for stain in page.attention) == pytest.approx(1, abs=1e-6)
        slices = iter(tables.slices.to_dict("records"))
        for stain in page.attention:
            assert sum(member.attention for member in stain.members) == pytest.approx(1, abs=1e-6)
            for member in stain.members:
                row = next(slices)
                assert (member.name, member.patches) == (row["slice_id"], row["patches"])
                assert (member.attention, member.uniform) == (row["slice_attention"], row["uniform"])
                mine = (probes.slices["case_id"] == page.case_id) & (probes.slices["stain"] == stain.name)
                effect = probes.slices[mine].set_index("slice_id").loc[member.name, "effect_high_grade"]
                assert member.effect == pytest.approx({"high_grade": effect, "benign": -effect})
        assert len(page.overlays) == 4
        for tile in (tile for gallery in page.galleries for tile in gallery.tiles):
            row = known.loc[tile.file]
            assert row["case_id"] == page.case_id
            assert tile.values["attention"] == pytest.approx(row["effective_attention"])
            assert tile.values["alone p(high_grade)"] == pytest.approx(row["alone_high_grade"])
            assert tile.values["adds to p(high_grade)"] == pytest.approx(row["effect_high_grade"])
            assert tile.picture is not None
            shown = np.asarray(Image.open(io.BytesIO(tile.picture.jpeg)).convert("RGB"), np.float64)
            file = pixels_of(project, tile.file).astype(np.float64)
            assert shown.shape == file.shape
            # A JPEG of noise is off by some levels; any other patch's by thirty and more.
            others = [np.abs(shown - pixels_of(project, other)).mean() for other in known.index[:40:7]]
            assert (
                np.abs(shown - file).mean()
                < 15
                < min(o for o, p in zip(others, known.index[:40:7], strict=True) if p != tile.file)
            )


def test_the_page_of_a_run_holds_its_cases_pictures_and_no_links_outwards(project: Path) -> None:
    found = answer(project, "report", run_of(project, "hierarchical"))
    page = page_of(found["path"])
    assert found["cases"] == 3
    assert not found["notes"]
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert "http://" not in page.replace("http://www.w3.org", "")
    pictures = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) >= 3 * 4
    Image.open(io.BytesIO(base64.b64decode(pictures[0]))).load()


def test_a_head_without_attention_has_a_page_that_says_so(project: Path) -> None:
    found = answer(project, "report", run_of(project, "mean"))
    assert any("mean has no attention" in note for note in found["notes"])
    assert "Most for high_grade, alone" in page_of(found["path"])


def test_missing_patches_and_a_missing_store_leave_a_note_in_their_place(
    project: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    run = run_of(copy, "hierarchical")
    for path in (copy / "patches").glob("*h&e*"):
        path.unlink()
    assert "file missing" in page_of(answer(copy, "report", run)["path"])
    shutil.rmtree(copy / "patches")
    found = answer(copy, "report", run)
    assert any("there is no folder of patches" in note for note in found["notes"])
    shutil.rmtree(copy / "store")
    found = answer(copy, "report", run)
    assert any("could not be looked at" in note for note in found["notes"])
    assert found["cases"] == 3
    assert "AUC" in page_of(found["path"])


def test_a_study_and_a_pair_have_pages_too(project: Path, tmp_path: Path) -> None:
    (study,) = (project / "runs").glob("study_*")
    found = answer(project, "report", study)
    assert found["cases"] == 15
    assert any("seed 42" in note for note in found["notes"])
    assert Path(found["path"]) == study / "report.html"
    pair = answer(
        project, "report", run_of(project, "abmil"), run_of(project, "mean"), "--out", tmp_path / "p.html"
    )
    assert pair["cases"] == 3
    assert page_of(tmp_path / "p.html").count("abmil") > 1
    plain = answer(project, "report", study, "--no-pictures", "--out", tmp_path / "plain.html")
    assert plain["bytes"] < found["bytes"] / 3


def test_what_is_no_run_is_refused_before_any_work(project: Path) -> None:
    refused(project, "report", "nothing", says=("nothing is no run and no study",))
    refused(project, "report", run_of(project, "mean"), "nothing", says=("nothing is no run and no study",))


def test_a_test_set_of_one_class_has_a_report(project: Path, tmp_path: Path) -> None:
    copy = Path(
        shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("runs", "splits"))
    )
    ids = [str(i) for i in range(1, 16)]
    benign = [case for case in ids if "1133"[int(case) % 4] == "1"]
    rest = [case for case in ids if case not in benign[:3]]
    np.savez(
        copy / "one.npz",
        train_cases=np.array(rest[:8], np.int64),
        val_cases=np.array(rest[8:], np.int64),
        test_cases=np.array(benign[:3], np.int64),
    )
    succeeded(copy, "train-head", "--model", "abmil", "--load-splits", "one.npz")
    found = answer(copy, "report")
    assert found["cases"] == 3
    assert "undefined" in page_of(found["path"])
    assert answer(copy, "attention")["cases"] == 3
    assert answer(copy, "probe")["cases"] == 3
