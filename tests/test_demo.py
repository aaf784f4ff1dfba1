from __future__ import annotations

import csv
import json
import re
import socket
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from featstore import demo, demo_tissue
from featstore.config import FeatstoreConfig
from featstore.errors import FeatstoreError
from tests import helpers

NAME = re.compile(r"case_(\d+)_(match_1|unmatched_1)_(h&e|melan|sox10)_patch([1-9]\d*)\.png")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoCohort:
    """The demo project, written with the network cut."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the demo used the network")

    with pytest.MonkeyPatch.context() as patched:
        for name in ("socket", "create_connection", "getaddrinfo"):
            patched.setattr(socket, name, refuse)
        written = demo.write_demo_project(tmp_path_factory.mktemp("demo") / "project")
    return written


@pytest.fixture(scope="module")
def rows(cohort: demo.DemoCohort) -> list[dict[str, str]]:
    return read(cohort.folder / "planted.csv")


@pytest.fixture(scope="module")
def labels(cohort: demo.DemoCohort) -> dict[str, str]:
    return {row["Case"]: row["Class"] for row in read(cohort.folder / "labels.csv")}


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_table_names_every_file(cohort: demo.DemoCohort, rows: list[dict[str, str]]) -> None:
    on_disk = {p.relative_to(cohort.folder / "patches").as_posix() for p in cohort.folder.rglob("*.png")}
    assert {row["path"] for row in rows} == on_disk
    assert len(rows) == len(on_disk) == cohort.n_patches == len(cohort.paths)
    assert all(path.is_file() for path in cohort.paths)
    assert 1800 <= cohort.n_patches <= 2200
    for row in rows:
        match = NAME.fullmatch(Path(row["path"]).name)
        assert match is not None
        assert match.groups() == (row["case_id"], row["slice_id"], row["stain"], row["patch"])


def test_classes_are_about_balanced_and_use_both_codes(
    cohort: demo.DemoCohort, labels: dict[str, str], rows: list[dict[str, str]]
) -> None:
    counts = Counter(labels.values())
    assert counts["1"] == demo.N_BENIGN
    assert counts["3"] + counts["4"] == demo.N_HIGH_GRADE
    assert min(counts["3"], counts["4"]) > 0
    assert set(labels) == {row["case_id"] for row in rows}
    assert cohort.n_cases == len(labels) == 44


def test_patch_numbers_run_from_one_and_some_pass_ten(rows: list[dict[str, str]]) -> None:
    slices = defaultdict(list)
    for row in rows:
        slices[row["case_id"], row["stain"], row["slice_id"]].append(int(row["patch"]))
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in slices.values())
    assert sum(len(numbers) >= 10 for numbers in slices.values()) > 20


def test_five_cases_lack_one_stain(rows: list[dict[str, str]], labels: dict[str, str]) -> None:
    stains = defaultdict(set)
    for row in rows:
        stains[row["case_id"]].add(row["stain"])
    lacking = [case for case, present in stains.items() if len(present) == 2]
    assert len(lacking) == 5
    assert {labels[case] == "1" for case in lacking} == {True, False}
    assert all(len(present) in (2, 3) for present in stains.values())


def test_sizes_vary_and_some_squares_are_turned(cohort: demo.DemoCohort) -> None:
    sizes, black_corners = [], 0
    for path in cohort.paths[:300]:
        with Image.open(path) as image:
            assert image.mode == "RGB"
            sizes.append(image.size)
            black_corners += image.getpixel((0, 0)) == (0, 0, 0)
    assert all(48 <= side <= 128 for size in sizes for side in size)
    assert len(set(sizes)) > 150
    assert 0.2 < np.mean([width != height for width, height in sizes]) < 0.6
    assert 5 < black_corners < 60


def test_planted_only_in_some_patches_of_some_slices_of_high_grade(
    rows: list[dict[str, str]], labels: dict[str, str]
) -> None:
    slices = defaultdict(list)
    for row in rows:
        slices[row["case_id"], row["stain"], row["slice_id"]].append(int(row["planted"]))
    stains = defaultdict(set)
    for (case, stain, _), planted in slices.items():
        if any(planted):
            stains[case].add(stain)
            assert 0 < sum(planted) < len(planted)
    assert set(stains) == {case for case, code in labels.items() if code != "1"}
    assert all(len(found) == 2 for found in stains.values())


def test_the_class_changes_nothing_but_planted_patches(cohort: demo.DemoCohort, tmp_path: Path) -> None:
    cases = demo._draw_cases(np.random.default_rng([demo.VERSION, 0]))
    case = next(case for case in cases if case.code != "1")
    written = list(demo._write_case(tmp_path, replace(case, code="1"), demo_tissue.load_tissue(), 0))
    originals = {r["path"]: r for r in read(cohort.folder / "planted.csv") if r["case_id"] == case.case_id}
    assert {row[0] for row in written} == set(originals)
    for path, row in originals.items():
        same = (cohort.folder / "patches" / path).read_bytes() == (tmp_path / "patches" / path).read_bytes()
        assert same == (row["planted"] == "0")


def test_colours_of_other_patches_do_not_tell_the_classes_apart(
    cohort: demo.DemoCohort, rows: list[dict[str, str]], labels: dict[str, str]
) -> None:
    of_case = defaultdict(list)
    for row in rows:
        if row["planted"] == "0":
            with Image.open(cohort.folder / "patches" / row["path"]) as image:
                pixels = np.asarray(image.resize((16, 16)), np.float32).reshape(-1, 3)
            of_case[row["case_id"], row["stain"]].append([*pixels.mean(0), *pixels.std(0)])
    for stain in demo.STAINS:
        benign, high = (
            np.array(
                [
                    np.mean(v, 0)
                    for (c, s), v in of_case.items()
                    if s == stain and (labels[c] == "1") == is_1
                ]
            )
            for is_1 in (True, False)
        )
        error = np.sqrt(benign.var(0, ddof=1) / len(benign) + high.var(0, ddof=1) / len(high))
        assert (np.abs(benign.mean(0) - high.mean(0)) < 3.5 * error).all()


def test_same_seed_same_bytes(cohort: demo.DemoCohort, tmp_path: Path) -> None:
    tissue = demo_tissue.load_tissue()
    cases = demo._draw_cases(np.random.default_rng([demo.VERSION, 0]))
    for case in (cases[0], cases[-1]):
        for row in demo._write_case(tmp_path, case, tissue, 0):
            assert (tmp_path / "patches" / row[0]).read_bytes() == (
                cohort.folder / "patches" / row[0]
            ).read_bytes()
    assert demo._draw_cases(np.random.default_rng([demo.VERSION, 1])) != cases


def test_written_again_it_stays_as_it_is(cohort: demo.DemoCohort) -> None:
    config = cohort.folder / "featstore.yaml"
    before = config.read_text(encoding="utf-8")
    config.write_text(before + "# mine\n", encoding="utf-8")
    stamps = {path: path.stat().st_mtime_ns for path in cohort.folder.rglob("*")}
    assert demo.write_demo_project(cohort.folder) == cohort
    assert {path: path.stat().st_mtime_ns for path in cohort.folder.rglob("*")} == stamps
    config.write_text(before, encoding="utf-8")


def test_another_seed_is_refused(cohort: demo.DemoCohort) -> None:
    with pytest.raises(FeatstoreError, match="already holds the demo cohort of seed 0"):
        demo.make_demo_cohort(cohort.folder, seed=1)


@pytest.mark.parametrize("name", ["patches/mine.png", "demo.json", "notes.txt"])
def test_a_folder_with_something_else_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(FeatstoreError, match="already holds something") as caught:
        demo.write_demo_project(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("", encoding="utf-8")
    with pytest.raises(FeatstoreError, match="already holds something"):
        demo.write_demo_project(tmp_path / "demo")


def test_an_unfinished_demo_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N_BENIGN", 3)
    monkeypatch.setattr(demo, "N_HIGH_GRADE", 2)
    whole = demo.make_demo_cohort(tmp_path)
    marker = json.loads((tmp_path / demo.MARKER).read_text(encoding="utf-8"))
    (tmp_path / demo.MARKER).write_text(json.dumps({**marker, "complete": False}), encoding="utf-8")
    (tmp_path / "planted.csv").unlink()
    whole.paths[0].unlink()
    assert demo.make_demo_cohort(tmp_path) == whole
    assert whole.paths[0].is_file()


def test_config_is_accepted(cohort: demo.DemoCohort) -> None:
    text = (cohort.folder / "featstore.yaml").read_text(encoding="utf-8")
    config = FeatstoreConfig(**yaml.safe_load(text))
    assert config.classes == {"benign": ["1"], "high_grade": ["3", "4"]}
    assert config.backbone.weights == "random:0"
    assert config.backbone.resize == 64
    assert "planted" in text
    assert "overlap" in text


def test_missing_image_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_tissue, "find_spec", lambda _name: None)
    with pytest.raises(FeatstoreError, match="tissue image") as caught:
        demo.make_demo_cohort(tmp_path / "new")
    assert "pip install" in caught.value.fix
    assert not (tmp_path / "new").exists()


def test_noise_cohort(tmp_path: Path) -> None:
    files = helpers.make_cohort(tmp_path / "patches", cases=2, patches=3, size=20)
    assert len(files) == 2 * 3 * 2 * 3
    assert all(NAME.fullmatch(file.name) for file in files)
    assert len({file.read_bytes() for file in files}) == len(files)
    again = helpers.make_cohort(tmp_path / "again", cases=["1", "2"], patches=3, size=20)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]
    assert read(helpers.write_labels(tmp_path, {"1": 1, "2": 3}))[1] == {"Case": "2", "Class": "3"}


def test_multistain_tiles(tmp_path: Path, shared_data: Path) -> None:
    files = helpers.tile_multistain(shared_data / "multistain", tmp_path, size=300)
    assert len({file.name.split("_")[1] for file in files}) == 3
    stains = {file.name.split("_")[4] for file in files}
    assert stains == {"h&e", *helpers.MULTISTAIN_STAINS}
    with Image.open(files[0]) as image:
        assert image.size == (300, 300)
