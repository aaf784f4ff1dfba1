"""How settings are laid over one another, which flags there are, and which values are refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import ConfigError
from featstore.settings import (
    Layers,
    find_project,
    flag_names,
    leaves,
    parse,
    parse_assignment,
)
from featstore.strict_yaml import read_file
from heads.config import Config
from tests import command_line


def build(*layers: dict[str, Any]) -> Config:
    stack = Layers()
    for number, data in enumerate(layers):
        stack.add(Config, data, f"layer {number}")
    return stack.build(Config)


@pytest.mark.parametrize("text", ["", "# only a remark\n", "train:\n", "train: {}\npatches:\n", "\ufeff"])
def test_what_is_empty_means_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "featstore.yaml").write_text(text, encoding="utf-8")
    assert build(read_file(tmp_path / "featstore.yaml")) == Config()


def test_sections_are_merged_key_by_key_and_other_settings_replaced() -> None:
    below = {"train": {"epochs": 3, "per_slice_cap": 9}, "exclude": [1], "classes": {"a": [1]}}
    found = build(below, {"train": {"epochs": 4}, "exclude": 2, "classes": {"b": [2]}}, {"train": None})
    assert (found.train.epochs, found.train.per_slice_cap) == (4, 9)
    assert (found.exclude, found.classes) == (["2"], {"b": ["2"]})


def test_order_of_the_layers(tmp_path: Path) -> None:
    """Defaults < featstore.yaml < --config < --set < flags, whatever their order on the line."""
    project = command_line.make_project(tmp_path, {"train": {"per_slice_cap": 11, "epochs": 11}})
    (tmp_path / "over.yaml").write_text("train: {per_slice_cap: 12}\n")
    steps: list[tuple[tuple[str, ...], int]] = [
        ((), 11),
        (("--config", "over.yaml"), 12),
        (("--set", "train.per_slice_cap=13", "--config", "over.yaml"), 13),
        (("--set", "train.per_slice_cap=13", "--set", "train.per_slice_cap=14"), 14),
        (
            ("--per-slice-cap", "15", "--set", "train.per-slice-cap=13", "--config", "over.yaml"),
            15,
        ),
    ]
    for flags, want in steps:
        result = command_line.succeeded(project, "check", "--json", *flags)
        caps = json.loads(result.stdout)["caps"]
        assert (caps["per_slice_cap"], caps["epochs"]) == (want, 11)
    (project / "featstore.yaml").write_text("{}")
    result = command_line.succeeded(project, "check", "--json")
    assert json.loads(result.stdout)["caps"]["per_slice_cap"] == Config().train.per_slice_cap


def test_only_config_takes_the_place_of_featstore_yaml(tmp_path: Path) -> None:
    project = command_line.make_project(tmp_path / "project", {"train": {"per_slice_cap": 11}})
    below = project / "below"
    below.mkdir()
    whole = json.loads((project / "featstore.yaml").read_text()) | {"train": {"epochs": 12}}
    (below / "only.yaml").write_text(json.dumps(whole))

    def caps(*flags: str) -> tuple[Any, Any]:
        words = ("check", "--json", "--config", "only.yaml", "--only-config", *flags)
        found = json.loads(command_line.succeeded(below, *words).stdout)["caps"]
        return found["per_slice_cap"], found["epochs"]

    default = Config().train.per_slice_cap
    assert default != 11
    assert caps() == (default, 12)  # in the project that is found, as ever
    assert caps("--set", "train.per_slice_cap=13") == (13, 12)
    (project / "featstore.yaml").write_text("trian: {epochs: 3}")
    assert caps() == (default, 12)
    (project / "featstore.yaml").unlink()
    assert caps("--project", "..") == (default, 12)
    command_line.refused(below, "check", "--project", "..", "--only-config", says=("without --config",))


@pytest.mark.parametrize(
    ("data", "found", "nearest"),
    [
        ({"bacbone": {"name": "x"}}, "'bacbone'", "backbone"),
        ({"backbone": {"nmae": "x"}}, "'backbone.nmae'", "backbone.name"),
        ({"train": {"epoch": 3}}, "'train.epoch'", "train.epochs"),
        ({"extract": {"batchsize": 3}}, "'extract.batchsize'", "extract.batch_size"),
        ({"train": {"per_slice_caps": 3}}, "'train.per_slice_caps'", "train.per_slice_cap"),
        ({"per_slice_cap": 3}, "'per_slice_cap'", "train.per_slice_cap"),
        ({"class": {"a": 1}}, "'class'", "classes"),
        ({"imges": None}, "'imges'", "images"),
    ],
)
def test_unknown_names_come_with_the_nearest(data: dict[str, Any], found: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match="there is no setting") as error:
        build({}, data)
    assert found in error.value.found
    assert nearest in error.value.expected.split()
    assert error.value.where == "layer 1"
    assert error.value.fix


def test_a_setting_that_is_spelt_with_a_point_is_not_told_to_be_spelt_like_that() -> None:
    with pytest.raises(ConfigError) as error:
        build({"patches.folder": "x"})
    assert error.value.fix != "write patches.folder"
    assert "patches" in error.value.expected


def test_a_name_like_no_other_has_no_hint() -> None:
    with pytest.raises(ConfigError) as error:
        build({"qqqqqqqq": 1})
    assert "perhaps" not in error.value.expected
    assert error.value.fix


@pytest.mark.parametrize("text", ["batchsize=3", "extract.batchsize=3", "extract-batchsize=3"])
def test_set_knows_the_nearest_name_too(text: str) -> None:
    with pytest.raises(ConfigError, match="there is no setting") as error:
        parse_assignment(text, Config)
    assert "extract.batch_size" in error.value.expected


def test_set_without_a_value() -> None:
    with pytest.raises(ConfigError) as error:
        parse_assignment("train.epochs", Config)
    assert "section.key=value" in error.value.expected


def test_set_reads_yaml_except_for_text() -> None:
    assert parse_assignment("train.epochs=5", Config) == {"train": {"epochs": 5}}
    assert parse_assignment("patches.folder=038: #a", Config) == {"patches": {"folder": "038: #a"}}
    assert parse_assignment("labels.file=null", Config) == {"labels": {"file": None}}
    assert parse_assignment("exclude=[038, 2]", Config) == {"exclude": ["038", 2]}
    assert parse_assignment("classes={a: [1]}", Config) == {"classes": {"a": [1]}}


@pytest.mark.parametrize(
    ("data", "path", "expected"),
    [
        ({"train": {"epochs": 0}}, "train.epochs is 0", "greater than or equal to 1"),
        ({"train": {"epochs": "3"}}, "train.epochs is '3'", "integer"),
        ({"train": {"epochs": 3.0}}, "train.epochs is 3.0", "integer"),
        ({"train": {"epochs": True}}, "train.epochs is True", "integer"),
        ({"backbone": {"pool": 17}}, "backbone.pool is 17", "less than or equal to 16"),
        ({"backbone": {"resize": 4}}, "backbone.resize is 4", "greater than or equal to 8; or 'model'"),
        ({"backbone": {"final_relu": "yes"}}, "final_relu is 'yes'", "boolean"),
        ({"images": {"channel_order": "RGB"}}, "channel_order is 'RGB'", "'rgb' or 'bgr'"),
        ({"extract": {"device": "gpu"}}, "extract.device is 'gpu'", "cuda"),
        ({"extract": {"shard": "1/0"}}, "extract.shard is '1/0'", "I/N"),
        ({"extract": {"part_seconds": 0}}, "extract.part_seconds is 0", "greater than 0"),
        ({"extract": {"part_seconds": float("nan")}}, "part_seconds is nan", "finite"),
        ({"labels": {"file": 5}}, "labels.file is 5", "string"),
        ({"patches": "here"}, "patches is 'here'", "section with keys"),
        ({"patches": ["here"]}, "patches is ['here']", "section with keys"),
        ({"exclude": [1.5]}, "exclude is [1.5]", "quotes"),
        ({"exclude": [True]}, "exclude is [True]", "string"),
        ({"classes": {"a": {"b": 1}}}, "classes is", "list"),
        ({"groups": 5}, "groups is 5", "string; or a mapping"),
        ({"classes": [1]}, "classes is [1]", "mapping of names"),
    ],
)
def test_wrong_types_and_ranges(data: dict[str, Any], path: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        build({"train": {"per_slice_cap": 7}}, data)
    assert path in error.value.found
    assert expected in error.value.expected
    assert error.value.where == "layer 1"
    assert error.value.fix


@pytest.mark.parametrize("below", ["here", ["here"], 5])
def test_a_wrong_section_is_told_also_under_a_flag(below: object) -> None:
    with pytest.raises(ConfigError, match="patches is"):
        build({"patches": below}, {"patches": {"pattern": "x"}})


@pytest.mark.parametrize(
    "text",
    [
        r'patches: {folder: "a\0b"}',
        r'labels: {file: "\0"}',
        r'store: {path: "a\ud800"}',
        r'groups: "a\0"',
        r'backbone: {weights: "a\0.pth"}',
    ],
)
def test_paths_that_no_system_takes_are_refused_as_settings(text: str) -> None:
    with pytest.raises(ConfigError):
        build(parse(text, "f"))


def test_every_setting_has_flags_of_its_own() -> None:
    names = flag_names(Config)
    found = list(leaves(Config))
    assert list(names) == [leaf.path for leaf in found]
    assert all(names.values())
    uses = Counter(flag for flags in names.values() for flag in flags)
    assert {flag for flag, count in uses.items() if count > 1} == set()
    for leaf in found:
        full = f"{leaf.section}-{leaf.key}" if leaf.section else leaf.key
        assert "--" + full.replace("_", "-") in names[leaf.path]
    assert "--backbone" in names["backbone.name"]
    assert "--labels" in names["labels.file"]
    assert "--store" in names["store.path"]


def test_a_leaf_name_of_two_sections_is_spelt_with_its_section() -> None:
    from pydantic import BaseModel

    class One(BaseModel):
        steps: int = 1
        only: int = 1

    class Two(BaseModel):
        steps: int = 1

    class Both(BaseModel):
        one: One = One()
        two: Two = Two()

    assert flag_names(Both) == {
        "one.steps": ["--one-steps"],
        "one.only": ["--only", "--one-only"],
        "two.steps": ["--two-steps"],
    }


def test_the_project_is_found_from_below(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "featstore.yaml").touch()
    assert find_project(deep) == find_project(tmp_path) == tmp_path
    (tmp_path / "a" / "featstore.yaml").mkdir()  # a folder of this name is no project
    assert find_project(deep) == tmp_path
    (deep / "featstore.yaml").touch()
    assert find_project(deep) == deep


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"slurm": {"steps": {"extract": {"gpu": 1}}}}, "slurm.steps.extract cannot be read: gpu: no such"),
        ({"tune": {"space": {"train.lr": {"lo": 0, "high": 1}}}}, "low: is missing; lo: no such key"),
        ({"tune": {"space": {"train.lr": {"choices": []}}}}, "choices: List should have at least 1 item"),
        ({"train": {"sub_cases": {"m": 2}}}, "train.sub_cases cannot be read: n: is missing; m: no such"),
    ],
)
def test_a_wrong_key_within_a_setting_is_named_where_it_stands(given: dict[str, Any], says: str) -> None:
    layers = Layers()
    layers.add(Config, given, "featstore.yaml")
    with pytest.raises(ConfigError, match=re.escape(says)):
        layers.build(Config)
