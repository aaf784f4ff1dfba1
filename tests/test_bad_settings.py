"""Settings that cannot be used, hostile YAML among them: told with code 2, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import helpers
from tests.command_line import (
    all_refuse,
    make_project,
    refused,
    write_config,
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    helpers.write_labels(tmp_path, {"1": "1", "2": "3"})
    return make_project(tmp_path, {"labels": {"file": "labels.csv"}})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exclude": ["../1"]}, ("'../1' contains '..'", "exclude")),
        ({"exclude": ["1\0"]}, ("a NUL", "line 1")),
        ({"exclude": [1, 2]}, ("no patches are left", "exclude")),
        ({"groups": {"a": [".."]}}, ("'..' contains '..'", "groups.a")),
        ({"groups": {"a": ["1\0"]}}, ("a NUL", "line 1")),
        ({"groups": {"..": ["1"]}}, ("group id '..'", "groups")),
        ({"groups": {"a": ["1"], "b": ["01"]}}, ("case 1 is in two groups", "groups")),
        ({"groups": "none.csv"}, ("none.csv cannot be read", "groups")),
        ({"classes": {"..": [1]}}, ("class id '..'", "classes")),
        ({"classes": {"a": [1], "b": [1]}}, ("'1' is mapped to two classes", "classes.b")),
        ({"classes": {"a": []}}, ("class 'a' has no raw codes", "classes.a")),
        ({"stains": {"../x": ["y"]}}, ("'../x' contains '..'", "stains")),
        ({"stains": {"x": ["he"]}}, ("alias 'he' stands for two stains", "stains.x")),
        ({"patches": {"geometry": "none.csv"}}, ("none.csv cannot be read", "patches.geometry")),
        ({"patches": {"foldr": "x"}}, ("'patches.foldr'", "patches.folder")),
        ({"trian": {"epochs": 3}}, ("'trian'", "train")),
        ({"train": {"epochs": "many"}}, ("train.epochs is 'many'", "integer")),
        ({"train": {"epochs": -1}}, ("train.epochs is -1", "greater than or equal to 1")),
        ({"images": {"channel_order": "gbr"}}, ("images.channel_order is 'gbr'", "'rgb' or 'bgr'")),
    ],
)
def test_settings_of_no_use(project: Path, settings: dict[str, Any], says: tuple[str, ...]) -> None:
    write_config(project, {"labels": {"file": "labels.csv"}}, settings)
    all_refuse(project, says=says)


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ({"name": "densnet121"}, "densenet121"),
        ({"name": "timm:no_such_model"}, "no_such_model"),
        ({"weights": "none.pth"}, "'none.pth' does not exist"),
        ({"weights": "random:x"}, "random:x"),
        ({"pool": 99}, "backbone.pool is 99"),
    ],
)
def test_backbones_of_no_use(project: Path, backbone: dict[str, Any], says: str) -> None:
    write_config(project, {"backbone": backbone})
    refused(project, "extract", says=(says,))


HOSTILE = {
    "python tag": (b"exclude: !!python/object/apply:os.mkdir [boom]\n", "python/object/apply"),
    "other tag": (b"patches: {normalize_cases: !!bool maybe}\n", "not YAML that can be used"),
    "billion laughs": (
        b"a: &a [x, x]\n"
        + b"".join(b"%c: &%c [*%c, *%c]\n" % (n, n, n - 1, n - 1) for n in range(98, 110)),
        "aliases are not allowed",
    ),
    "2 MB": (b"exclude: [" + b"1, " * 700_000 + b"1]\n", "more than 1,048,576 bytes"),
    "binary": (bytes(range(256)), "UTF-8"),
    "NUL": (b"patches: {folder: patches\0}\n", "special characters"),
    "NUL, escaped": (b'patches: {folder: "patches\\0"}\n', ""),
    "NUL in the store's path": (b'store: {path: "a\\0"}\n', ""),
    "half a character": (b'patches: {folder: "\\ud800"}\n', ""),
    "a list as a key": (b"{[a]: b}\n", "not YAML that can be used"),
    "deep": (b"[" * 2_000, "not YAML that can be used"),
    "a list": (b"- patches\n", "list"),
}


@pytest.mark.parametrize(("text", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml(project: Path, text: bytes, says: str) -> None:
    (project / "featstore.yaml").write_bytes(text)
    all_refuse(project, says=(says,))
    assert "featstore.yaml" in refused(project, "extract")
