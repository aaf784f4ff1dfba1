from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from featstore.cohort import Caps, Labels, Scan, build_table, check_cohort, scan
from featstore.config import ImagesConfig, PatchesConfig

RGB = ImagesConfig()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Cases 1 to 3 in two stains, case 3 in one; a file that is no image; an odd name."""
    tmp_path = tmp_path / "patches"
    tmp_path.mkdir()
    random = np.random.default_rng(0)
    for case in (1, 2, 3):
        for stain in ("h&e", "melan")[: 1 if case == 3 else 2]:
            for patch in range(4):
                pixels = random.integers(0, 255, (20 if patch == 0 else 40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / f"case_0{case}_match_1_{stain}_patch{patch}.png")
    (tmp_path / "case_1_match_1_h&e_patch9.png").write_bytes(b"not a PNG")
    (tmp_path / "=cmd.png").touch()
    return tmp_path


def found(folder: Path) -> Scan:
    return scan(folder, PatchesConfig(on_unparsed="skip"), exclude=["77"])


LABELS = Labels(["benign", "high"], {"1": 0, "4": 1}, {"2": "0"}, {"case": {"04": "4"}})


def test_the_report_says_everything(folder: Path) -> None:
    report = check_cohort(found(folder), LABELS, {"1": "g", "9": "g"}, RGB)
    data = report.to_json()
    assert (data["patches"], data["cases"], data["slices"]) == (21, 3, 5)
    assert data["classes"] == {
        "benign": {"cases": 1, "slices": 2, "patches": 9},
        "high": {"cases": 0, "slices": 0, "patches": 0},
    }
    assert data["per_case"]["2"]["class"] is None
    assert data["per_case"]["1"]["stains"]["h&e"] == {"slices": 1, "patches": 5}
    left = data["left_out"]
    assert left["cases_without_label"] == ["3"]
    assert left["labels_without_patches"] == ["4"]
    assert left["unmapped"] == {"2": "0"}
    assert left["unknown_exclusions"] == ["77"]
    assert left["grouped_without_patches"] == ["9"]
    assert data["normalized"]["case"] == {"01": "1", "02": "2", "03": "3", "04": "4"}
    assert data["merged"]["case"] == {"1": ["01", "1"]}
    assert data["unparsed"]["by_reason"] == {"does not start with 'case_'": 1}
    assert data["sizes"] == {
        "patches": 20,
        "min_side": 20,
        "median_side": 40.0,
        "max_side": 40,
        "not_square": 0.25,
        "below_32": 5,
    }
    assert data["sample"]["decoded"] == 20
    assert data["sample"]["failed"] == 1
    assert set(data["colors"]) == {"h&e", "melan"}
    for word in (
        "without a label: 3",
        "without patches: 4",
        "exclusions",
        "decoded",
        "could not be read",
        "'high'",
    ):
        assert any(word in warning for warning in report.warnings), word
    text = report.to_text()
    for word in ("benign", "01 → 1", "01 = 1", "2 (0)", "25% not square"):
        assert word in text, word


def test_without_labels_every_case_counts(folder: Path) -> None:
    data = check_cohort(found(folder), None, None, RGB).to_json()
    assert data["classes"]["all"] == {"cases": 3, "slices": 5, "patches": 21}
    assert data["missing_stains"] == {"3": ["melan"]}
    assert data["left_out"]["cases_without_label"] == []


def test_saved_files(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "report"
    report = check_cohort(found(folder), LABELS, None, RGB, caps=Caps(2, 1, 3))
    report.save(target)
    assert {p.name for p in target.iterdir()} == {
        "report.json",
        "report.txt",
        "unparsed.csv",
        "contact_sheet.png",
    }
    assert json.loads((target / "report.json").read_text(encoding="utf-8")) == report.to_json()
    with (target / "unparsed.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], ["'=cmd.png", "does not start with 'case_'"]]
    (folder / "=cmd.png").unlink()
    check_cohort(found(folder), LABELS, None, RGB).save(target)
    assert not (target / "unparsed.csv").exists()


def test_the_sample_is_small_and_repeatable(folder: Path) -> None:
    reports = [check_cohort(found(folder), None, None, RGB, sample=6, seed=1) for _ in range(2)]
    assert reports[0].to_json() == reports[1].to_json()
    sample = reports[0].data["sample"]
    assert sample["decoded"] + sample["failed"] == 6


def test_a_huge_image_is_not_decoded(folder: Path) -> None:
    data = check_cohort(found(folder), None, None, ImagesConfig(max_pixels=1000)).to_json()
    assert data["sample"]["decoded"] == 5
    assert data["sample"]["failed"] == 16


def test_what_cannot_be_a_patch_is_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a good header and a gigabyte behind it, one that is no PNG, and a late pipe."""
    names = [f"case_1_match_1_h&e_patch{n}.png" for n in (7, 8, 9)]
    good = (folder / "case_01_match_1_h&e_patch1.png").read_bytes()
    for name in names:
        (folder / name).write_bytes(good)
    found_before = found(folder)
    os.truncate(folder / names[0], 1 << 30)
    (folder / names[1]).write_bytes(b"no PNG" * 1000)
    (folder / names[2]).unlink()
    os.mkfifo(folder / names[2])
    read: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    sample = check_cohort(found_before, None, None, RGB).data["sample"]
    assert sample["failed"] == 3
    assert not set(names) & set(read)
    text = "\n".join(sample["failures"])
    for word in ("1,073,741,824 bytes", "a text file", "not a regular file"):
        assert word in text, word


def test_broken_links_and_odd_names_are_reported(folder: Path) -> None:
    (folder / "gone\033.png").symlink_to(folder / "nowhere")
    (folder / "again").symlink_to(folder)
    (folder / "x\033[31m").mkdir()
    (folder / "x\033[31m" / "case_8_match_1_h&e_patch1.png").write_bytes(b"no PNG")
    report = check_cohort(found(folder), None, None, RGB)
    assert report.data["links_skipped"] == ["again", r"gone\x1b.png"]
    assert report.data["broken_links"] == [r"gone\x1b.png"]
    assert r"links that lead nowhere: gone\x1b.png" in report.warnings
    assert any(r"x\x1b[31m/case_8" in failure for failure in report.data["sample"]["failures"])
    assert "\033" not in "".join([report.to_text(), *report.warnings])


def test_saving_replaces_whole_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers, and other processes that save, have either the old file or the new one."""
    target, names = tmp_path / "out", ("report.json", "report.txt", "unparsed.csv", "contact_sheet.png")
    check_cohort(found(folder), None, None, RGB).save(target)
    (tmp_path / "kept").mkdir()
    for name in names:
        (tmp_path / "kept" / name).hardlink_to(target / name)
    before = {name: (target / name).read_bytes() for name in names}
    (folder / "=more.png").touch()
    report = check_cohort(found(folder), LABELS, None, RGB, sample=4)
    report.save(target)
    for name in names:
        assert (tmp_path / "kept" / name).read_bytes() == before[name], name
        assert (target / name).read_bytes() != before[name], name

    def fail(image: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    whole = (target / "contact_sheet.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        report.save(target)
    assert (target / "contact_sheet.png").read_bytes() == whole
    assert sorted(p.name for p in target.iterdir()) == sorted(names)


def test_caps_in_numbers() -> None:
    paths = [
        f"case_1_match_{s}_h&e_patch{n}.png" for s, size in ((1, 10), (2, 4), (3, 2)) for n in range(size)
    ]
    table = Scan(
        table=build_table([*paths, "case_2_match_1_h&e_patch1.png"], PatchesConfig()).table,
        folder=Path("/nowhere"),
    )
    labels = Labels(["a", "b"], {"1": 0, "2": 1})
    caps = check_cohort(table, labels, None, RGB, caps=Caps(4, 2, 3)).data["caps"]
    assert caps["by_class"]["a"] == {
        "slices_above_cap": 1,
        "patches_never_drawn": pytest.approx(10 * 0.6**3, abs=0.05),
        "pairs_above_max_slices": 1,
        "slices_unused": 1,
        "patches_in_unused_slices": pytest.approx(16 / 3, abs=0.05),
    }
    assert caps["by_class"]["b"]["patches_never_drawn"] == 0
    free = check_cohort(table, labels, None, RGB, caps=Caps()).data["caps"]
    assert free["by_class"]["a"]["patches_never_drawn"] == 0
    assert free["by_class"]["a"]["slices_unused"] == 0


def test_the_expectation_agrees_with_a_simulation() -> None:
    random = np.random.default_rng(0)
    drawn = [np.unique([random.permutation(10)[:4] for _ in range(3)]).size for _ in range(4000)]
    assert 10 - np.mean(drawn) == pytest.approx(10 * 0.6**3, abs=0.08)


def test_quality(folder: Path) -> None:
    quality = pd.DataFrame(
        {
            "path": ["ok", "blank", "black", "blurred", "pale"],
            "width": [100, 50, 50, 50, 20],
            "height": [50, 50, 50, 50, 50],
            "mean_red": [150, 240, 5, 150, 220],
            "mean_green": [100, 240, 5, 100, 220],
            "mean_blue": [150, 240, 5, 150, 225],
            "entropy": [6, 1.5, 0.2, 5, 4.7],
            "tissue_fraction": [0.8, 0, 0, 0.7, 0],
            "sharpness": [900, 1, 0, 5, 700],
        }
    )
    report = check_cohort(found(folder), None, None, RGB, quality=quality)
    result = report.data["quality"]
    assert {k: result[k] for k in ("blank", "black", "blurred")} == {"blank": 1, "black": 1, "blurred": 1}
    assert result["blank_examples"] == ["blank"]
    assert report.data["sizes"]["below_32"] == 1
    assert "1 blank, 1 black, 1 blurred of 5" in report.to_text()
    assert (
        check_cohort(found(folder), None, None, RGB, quality=quality[["entropy"]]).data["quality"]["blank"]
        == 0
    )


def test_swapped_colours_are_warned_of(tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    tissue = data.immunohistochemistry()
    for i in range(6):
        Image.fromarray(tissue[i * 60 : i * 60 + 150, :150, ::-1]).save(
            tmp_path / f"case_1_match_1_sox10_patch{i}.png"
        )
    report = check_cohort(scan(tmp_path, PatchesConfig()), None, None, RGB)
    assert any("swapped in sox10" in w and "--channel-order bgr" in w for w in report.warnings)
    mended = check_cohort(scan(tmp_path, PatchesConfig()), None, None, ImagesConfig(channel_order="bgr"))
    assert not any("swapped" in w for w in mended.warnings)
