"""What `init` writes into `featstore.yaml`, what it leaves alone, and that it is read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from featstore.project_file import document
from featstore.settings import Layers, leaves
from featstore.strict_yaml import parse, read_file
from heads.config import Config
from tests import helpers
from tests.command_line import TINY_FLAGS, answer, featstore, make_project, refused, succeeded


def test_init_writes_every_setting_with_its_meaning(tmp_path: Path) -> None:
    helpers.make_cohort(tmp_path / "patches", cases=2, stains=("h&e",))
    helpers.write_labels(tmp_path, {"1": "1", "2": "3"})
    result = succeeded(
        tmp_path, "init", "patches", "--labels", "labels.csv", *TINY_FLAGS, "--exclude", "[038]"
    )
    assert "featstore extract" in result.stdout
    text = (tmp_path / "featstore.yaml").read_text(encoding="utf-8")
    for leaf in leaves(Config):
        assert leaf.info.description
        meaning = re.escape(leaf.info.description)
        pattern = rf"^ *# {meaning}\n *(# )?{leaf.key}: "
        assert re.search(pattern, text, re.M), leaf.path
    layers = Layers()
    layers.add(Config, read_file(tmp_path / "featstore.yaml"), "")
    config = layers.build(Config)
    assert (config.patches.folder, config.labels.file, config.exclude) == ("patches", "labels.csv", ["038"])
    assert (config.backbone.name, config.backbone.resize) == ("timm:test_resnet", 32)
    assert config.classes == {"class_1": ["1"], "class_3": ["3"]}
    assert "# epochs: 30" in text  # defaults are shown, not fixed
    assert answer(tmp_path, "check")["patches"] == 20


def test_init_keeps_classes_and_leaves_an_existing_config_alone(tmp_path: Path) -> None:
    helpers.make_cohort(tmp_path / "patches", cases=2, stains=("h&e",))
    helpers.write_labels(tmp_path, {"1": "1", "2": "3"})
    flags = ("--labels", "labels.csv", "--classes", "{benign: [1], high_grade: [3, 4]}")
    made = answer(tmp_path, "init", "patches", *flags)
    assert Path(made["config"]) == tmp_path / "featstore.yaml"
    assert list(made["report"]["classes"]) == ["benign", "high_grade"]
    message = refused(tmp_path, "init", "patches", says=("there is a featstore.yaml already", "--force"))
    assert str(tmp_path / "featstore.yaml") in message
    succeeded(tmp_path, "init", "patches", "--force")
    assert "high_grade" not in (tmp_path / "featstore.yaml").read_text(encoding="utf-8")


def test_a_project_folder_that_does_not_exist_is_no_matter_of_permission(tmp_path: Path) -> None:
    helpers.make_cohort(tmp_path / "data", cases=1, stains=("h&e",), slices=1)
    result = featstore(tmp_path, "init", "data", "--project", "new")
    if result.exit_code:
        assert "permission" not in result.stderr
        assert result.exit_code == 2
    else:
        assert (tmp_path / "new" / "featstore.yaml").is_file()


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12) | (
    st.sampled_from(
        ["null", "038", "1e5", "yes", "~", "", "a: b", "# a", "&a", "*a", "!a", '"', "\\n", "ä"]
    )
)
names_of_texts = st.dictionaries(text, st.lists(text, max_size=3), max_size=3)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "patches.folder": text,
    "patches.pattern": st.none() | text,
    "patches.geometry": st.none() | text,
    "patches.on_unparsed": st.sampled_from(["stop", "skip"]),
    "patches.normalize_cases": st.booleans(),
    "images.max_pixels": st.integers(1, 10**12),
    "labels.file": st.none() | text,
    "labels.case_column": text,
    "classes": names_of_texts,
    "exclude": st.lists(text, max_size=4),
    "groups": st.none() | text | names_of_texts,
    "stains": names_of_texts,
    "store.path": text,
    "backbone.resize": st.just("model") | st.integers(8, 4096),
    "extract.batch_size": st.just("auto") | st.integers(1, 10**6),
    "extract.shard": st.none() | st.just("010/12"),
    "extract.part_seconds": st.floats(min_value=1e-9, max_value=1e12),
    "train.per_slice_cap": st.none() | st.integers(1, 10**9),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_what_init_writes_is_read_back(values: dict[str, Any]) -> None:
    data: dict[str, Any] = {}
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        holder = data.setdefault(section, {}) if section else data
        holder[key] = value
    config = Config.model_validate(data)
    text = document(config, {})
    text.encode("utf-8")
    layers = Layers()
    layers.add(Config, parse(text, "featstore.yaml"), "featstore.yaml")
    assert layers.build(Config) == config


def test_split_writes_files_that_hold_every_labelled_case(tmp_path: Path) -> None:
    project = make_project(tmp_path, {"labels": {"file": "labels.csv"}}, cases=12, patches=1, slices=1)
    helpers.write_labels(project, {str(i): str(i % 2) for i in range(1, 14)})  # case 13 has no patches
    shown = answer(project, "split", "--folds", "3")["splits"]
    assert [Path(split["path"]).name for split in shown] == [f"data_splits_0{k}.npz" for k in (1, 2, 3)]
    for split in shown:
        cases = split["train_cases"] + split["val_cases"] + split["test_cases"]
        assert sorted(cases, key=int) == [str(i) for i in range(1, 13)]
    refused(project, "split", says=("already",))
    refused(project, "split", "--split-path", "other", "--folds", "7", says=("class 0 has 6 cases",))
    assert not (project / "other").exists()


def test_labels_of_another_cohort_are_an_error(tmp_path: Path) -> None:
    helpers.make_cohort(tmp_path / "patches", cases=2, patches=1, slices=1)
    helpers.write_labels(tmp_path, {"777": "1", "888": "3"})
    message = refused(tmp_path, "init", "patches", "--labels", "labels.csv", says=("no case has both",))
    assert "777, 888" in message


def test_a_section_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "featstore.yaml").write_text("")
    refused(tmp_path, "check", "--set", "backbone=3", says=("'backbone' is a section", "backbone.name"))
