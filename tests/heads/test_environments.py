"""Labelled images by environment: where they come from, who is drawn, what is refused."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import CohortError, ConfigError
from heads.config import Config
from heads.training.environments import (
    ImageBatches,
    LabelledImages,
    check_environments,
    project_environments,
    read_environments,
    split_each,
)
from heads.training.labelled_images import subset
from tests import helpers
from tests.heads.labelled import CLASSES, ENVIRONMENTS, SIZE, make_environments, picture, small


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environments(tmp_path_factory.mktemp("root"))


def without_split(remarks: list[str]) -> list[str]:
    """Of cohorts too small to be split this is said as well."""
    return [remark for remark in remarks if "no split can be made" not in remark]


def told(root: Path, **options: Any) -> tuple[LabelledImages, list[str]]:
    remarks: list[str] = []
    return read_environments(root, options.get("subset_size"), 0, remarks.append), remarks


# Folders


def test_folders_are_read_in_natural_order(made: Path) -> None:
    images, remarks = told(made)
    assert without_split(remarks) == []
    assert (images.environments, images.classes) == (ENVIRONMENTS, CLASSES)
    assert len(images) == 24
    names = [p.relative_to(made).as_posix() for p in images.paths]
    assert names[:4] == [
        "lab 2/benign/i0.png",
        "lab 2/benign/i1.JPG",
        "lab 2/benign/i2.jpeg",
        "lab 2/melanoma/i0.png",
    ]
    for path, environment, label in zip(images.paths, images.environment, images.label, strict=True):
        assert path.parent.name == images.classes[label]
        assert path.parent.parent.name == images.environments[environment]
    check_environments(images)


def test_some_of_them(made: Path) -> None:
    whole, _ = told(made)
    some = whole.take(np.array([20, 3]))
    assert some.paths == (whole.paths[20], whole.paths[3])
    assert (some.environments, some.classes) == (whole.environments, whole.classes)
    assert some.environment.tolist() == [1, 0]
    by_mask = whole.take(whole.label == 1)
    assert set(by_mask.label.tolist()) == {1}
    assert len(by_mask) == 14
    assert len(whole.take(np.array([], np.int64))) == 0


def test_what_is_no_image_is_told(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a" / "x" / "deeper").mkdir(parents=True)
    (root / "b" / "x").mkdir(parents=True)
    (root / "b" / "y").mkdir()
    picture(0).save(root / "a" / "x" / "1.png")
    picture(0).save(root / "b" / "x" / "1.png")
    picture(0).save(root / "a" / "stray.png")
    (root / "a" / "x" / "notes.txt").write_text("")
    (root / "a" / "x" / "scan.tif").write_text("")
    (root / ".DS_Store").write_text("")
    (root / "b" / "x" / "gone.png").symlink_to(root / "nowhere.png")
    images, remarks = told(root)
    assert len(images) == 2
    assert len(remarks) == 3
    assert "1 images take no part" in remarks[0]
    assert str(root / "a") in remarks[0]
    assert remarks[1].endswith("1 .png, 1 .tif, 1 .txt, 1 folders in those of classes, 1 hidden")
    assert remarks[2].endswith(str(root / "b" / "y"))


def layout(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".png"):
            picture(0, 8).save(root / file)
        else:
            (root / file).mkdir()
    return root


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "is empty"),
        (("1.png", "2.png"), "2 images lie in .* itself"),
        (("x/1.png", "y/2.png"), r"1 images lie in .*x, .* is it ROOT/CLASS/\*"),
        (("a/x/deep/1.png", "a/y/deep/1.png"), "there are folders below .*ENVIRONMENT/CLASS"),
        (("a/x", "b/x"), r"no images in the 2 folders of .* \(a, b\)"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_environments(layout(tmp_path, *files), None, 0)
    assert "ROOT/ENVIRONMENT/CLASS" in caught.value.expected


def test_a_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        read_environments(tmp_path / "missing", None, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        read_environments(tmp_path / "file", None, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    layout(tmp_path, "a/x/1.png")
    (tmp_path / "a" / "x").chmod(0)
    try:
        with pytest.raises(ConfigError, match="cannot be read"):
            read_environments(tmp_path, None, 0)
    finally:
        (tmp_path / "a" / "x").chmod(0o700)


# Subsets


@settings(max_examples=60)
@given(
    kinds=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=60),
    size=st.integers(1, 25),
    seed=st.integers(0, 99),
)
def test_a_subset_has_so_many_of_each_environment_by_class(
    kinds: list[tuple[int, int]], size: int, seed: int
) -> None:
    images = small([e for e, _ in kinds], [c for _, c in kinds])
    some = subset(images, size, seed)
    assert some.paths == subset(images, size, seed).paths
    numbers = [int(path.stem) for path in some.paths]
    assert numbers == sorted(set(numbers))
    for each in range(3):
        whole = Counter(images.label[images.environment == each].tolist())
        found = Counter(some.label[some.environment == each].tolist())
        total = sum(whole.values())
        assert sum(found.values()) == min(size, total)
        for label, count in whole.items():
            # As near to its share as whole numbers allow, but for the one image that each class has.
            assert 0 <= found[label] <= count
            if size >= len(whole):
                assert found[label] >= 1
                assert found[label] < count * min(1, size / total) + 2


def test_another_seed_is_another_subset(made: Path) -> None:
    subsets = {read_environments(made, 5, seed).paths for seed in range(5)}
    assert len(subsets) > 1
    assert read_environments(made, 1000, 0).paths == read_environments(made, None, 0).paths


# What suits leave-one-environment-out


def test_environments_need_the_same_classes() -> None:
    check_environments(small([0, 0, 1, 1], [0, 1, 1, 0]))
    check_environments(
        small([0, 0, 1, 1], [0, 1, 1, 0]).take(np.array([0, 1]))
    )  # the other one has no images
    with pytest.raises(ConfigError, match=r"e1 has images of 1 class only \(c1\)") as caught:
        check_environments(small([0, 0, 1], [0, 1, 1]))
    assert "e0: c0, c1; e1: c1" in caught.value.expected
    with pytest.raises(ConfigError, match="do not have the same classes") as caught:
        check_environments(small([0, 0, 1, 1], [0, 1, 1, 2]))
    assert "e0: c0, c1; e1: c1, c2" in caught.value.expected
    with pytest.raises(ConfigError, match="of 2 classes only"):
        check_environments(small([0, 0, 1, 1], [0, 1, 1, 0]), 3)
    with pytest.raises(ConfigError, match="there are no images"):
        check_environments(small([], []))


# Validation images


@settings(max_examples=60)
@given(
    kinds=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=50),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_a_share_of_every_class_of_every_environment(
    kinds: list[tuple[int, int]], share: float, seed: int
) -> None:
    images = small([e for e, _ in kinds], [c for _, c in kinds])
    train, val = split_each(images, share, seed)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(kinds)))
    for kind, count in Counter(kinds).items():
        kept = sum(kinds[i] == kind for i in val.tolist())
        assert kept == (0 if count == 1 else min(max(1, round(share * count)), count - 1))
    again = split_each(images, share, seed)
    assert np.array_equal(train, again[0])
    assert np.array_equal(val, again[1])


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=60
    ),
    seed=st.integers(0, 99),
)
def test_what_belongs_together_is_not_parted(rows: list[tuple[int, int, int]], seed: int) -> None:
    group = [7 * g for _, _, g in rows]
    images = small([e for e, _, _ in rows], [c for _, c, _ in rows], group)
    train, val = split_each(images, 0.3, seed)
    assert not {group[i] for i in train.tolist()} & {group[i] for i in val.tolist()}
    assert len(train) + len(val) == len(rows)


def test_whole_cases_are_kept_by_class_and_environment() -> None:
    # 4 cases of 5 images of each class of each environment; all have an image in the first environment.
    environment, label, group = [], [], []
    for case, (e, c) in enumerate(itertools.product([0, 1], [0, 1] * 4)):
        environment += [e] * 4 + [0]
        label += [c] * 5
        group += [case] * 5
    images = small(environment, label, group)
    splits = [split_each(images, 0.25, seed)[1] for seed in range(5)]
    for val in splits:
        cases = {group[i] for i in val.tolist()}
        assert len(val) == 5 * len(cases)
        found = Counter((case // 8, case % 2) for case in cases)
        assert found == dict.fromkeys(itertools.product([0, 1], [0, 1]), 1)
    assert len({val.tobytes() for val in splits}) > 1


# A project's patches


def project(folder: Path, labels: str, geometry: str | None = None, **sections: Any) -> Config:
    helpers.make_cohort(folder / "patches", cases=4, stains=("h&e",), slices=1, patches=3, size=16)
    (folder / "labels.csv").write_text(labels)
    patches = {"folder": "patches"}
    if geometry is not None:
        (folder / "geometry.csv").write_text(geometry)
        patches["geometry"] = "geometry.csv"
    values = {"patches": patches, "labels": {"file": "labels.csv"}, "classes": {"no": ["0"], "yes": ["1"]}}
    return Config.model_validate({**values, **sections})


BY_CASE = "Case,Class,Domain\n1,0,south\n002,1,south\n3,1,north\n4,0,north\n9,0,north\n"


def positions(rows: dict[str, str]) -> str:
    lines = [f"{path},0,0,{domain}" for path, domain in rows.items()]
    return "\n".join(["path,x,y,domain", *lines]) + "\n"


def test_the_domain_of_a_case(tmp_path: Path) -> None:
    config = project(tmp_path, BY_CASE, images={"channel_order": "bgr", "max_pixels": 5000})
    remarks: list[str] = []
    images = project_environments(config, tmp_path, None, 0, remarks.append)
    assert without_split(remarks) == []
    assert images.environments == ("north", "south")
    assert images.classes == ("no", "yes")
    assert images.environment.tolist() == [1] * 6 + [0] * 6
    assert images.label.tolist() == [0] * 3 + [1] * 6 + [0] * 3
    assert images.group is not None
    assert images.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert (images.channel_order, images.max_pixels) == ("bgr", 5000)
    assert all(path.is_file() for path in images.paths)
    assert len(project_environments(config, tmp_path, 2, 0, remarks.append)) == 4
    with ImageBatches(images, SIZE, 1, 0) as batches:
        assert batches.batch(np.arange(12)).shape == (12, 3, SIZE, SIZE)


def test_the_domain_of_a_patch_comes_first(tmp_path: Path) -> None:
    names = {
        f"case_1_match_1_h&e_patch{i}.png": domain for i, domain in ((1, "west"), (2, ""), (3, "west"))
    }
    images = project_environments(project(tmp_path, BY_CASE, positions(names)), tmp_path, None, 0)
    assert images.environments == ("north", "south", "west")
    assert images.environment.tolist()[:3] == [2, 1, 2]
    alone = "Case,Class\n1,0\n2,1\n3,1\n4,0\n"
    (tmp_path / "labels.csv").write_text(alone)
    remarks: list[str] = []
    images = project_environments(
        project(tmp_path, alone, positions(names)), tmp_path, None, 0, remarks.append
    )
    assert len(images) == 2
    assert images.environments == ("west",)
    assert without_split(remarks) == [
        "warning: 10 patches have no domain and take no part, of cases 1, 2, 3, 4"
    ]


def test_groups_stay_together_and_who_takes_no_part_is_told(tmp_path: Path) -> None:
    labels = "Case,Class,domain\n1,0,south\n2,1,south\n3,1,north\n4,7,north\n"
    config = project(tmp_path, labels, groups={"twins": ["1", "3"]})
    remarks: list[str] = []
    images = project_environments(config, tmp_path, None, 0, remarks.append)
    assert without_split(remarks) == ["warning: 1 cases have no label and take no part: 4"]
    assert images.group is not None
    assert images.group.tolist() == [0] * 3 + [1] * 3 + [0] * 3


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("Case,Class\n1,0\n2,1\n", ConfigError, "from which environment"),
        ("Case,Class,domain\n1,0,a\n1,0,b\n2,1,a\n", CohortError, "case 1 two domains, 'a' and 'b'"),
        ("Case,Class,domain\n1,0,a/b\n2,1,a\n", CohortError, "slash"),
        ("Case,Class,domain\n8,0,a\n9,1,a\n", ConfigError, "both a label and a domain"),
        ("Case,Class,domain\n1,0,\n2,1,\n", ConfigError, "from which environment"),
        ("Case,Class,domain,Domain\n1,0,a,a\n2,1,a,a\n", CohortError, "two columns named 'domain'"),
    ],
)
def test_domains_that_cannot_be_used(tmp_path: Path, labels: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        project_environments(project(tmp_path, labels), tmp_path, None, 0)


def test_positions_may_carry_domains(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="slash"):
        project_environments(
            project(tmp_path, BY_CASE, positions({"case_1_match_1_h&e_patch1.png": "a/b"})),
            tmp_path,
            None,
            0,
        )


# Real photographs


@pytest.mark.shared_data
def test_fundus_photographs_by_camera(tmp_path: Path) -> None:
    data = helpers.shared_data()
    if data is None:
        pytest.skip("no shared data")
    for n, file in enumerate(sorted((data / "fundus").glob("*.jpg"))[:24]):
        folder = tmp_path / f"camera {n % 2}" / f"grade {n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).symlink_to(file)
    images = read_environments(tmp_path, None, 0)
    check_environments(images)
    train, val = split_each(images, 0.25, 0)
    assert (len(train), len(val)) == (18, 6)
    with ImageBatches(images, 64, 2, 1 << 24) as batches:
        for chosen in itertools.islice(batches.endless(train, 6, 0), 4):
            assert Counter(images.environment[chosen].tolist()) == {0: 3, 1: 3}
            assert batches.batch(chosen).float().std() > 1
