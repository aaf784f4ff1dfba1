"""The YAML that settings are written in: what plain values mean, and what is no config at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.errors import ConfigError
from featstore.strict_yaml import parse, read_file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("038", "038"),
        ("010", "010"),
        ("-007", "-007"),
        ("0", 0),
        ("38", 38),
        ("-4", -4),
        ("0x1f", "0x1f"),
        ("0o17", "0o17"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e5x", "1e5x"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("n", "n"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("h&e", "h&e"),
        ("=", "="),
    ],
)
def test_plain_values_mean_what_a_person_means(text: str, value: object) -> None:
    found = parse(f"key: {text}\n", "f")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("a: 1\nb: 2\na: 3", "the key 'a' stands twice"),
        ("a: {b: 1, b: 1}", "the key 'b' stands twice"),
        ("a: !!python/object/apply:os.system [ls]", "python/object/apply"),
        ("a: !!python/name:os.system", "python/name"),
        ("a: !!set {b, c}", "not YAML that can be used"),
        ("a: !!binary aGk=", "not YAML that can be used"),
        ("a: !!bool maybe", "not YAML that can be used"),
        ("a: !!timestamp soon", "not YAML that can be used"),
        ("a: !!int ''", "not YAML that can be used"),
        ("a: !!int 010", "not YAML that can be used"),
        ("a: !mine 5", "!mine"),
        ("{[a]: b}", "not YAML that can be used"),
        ("? {a: b}\n: c", "not YAML that can be used"),
        ("a: b\0c", "special characters are not allowed"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: [1, 2", "expected"),
        ("a: b: c", "mapping values are not allowed"),
        ("\ta: 1", "cannot start any token"),
        ("[" * 20_000, "not YAML that can be used"),
        ("a: " + "9" * 5000, "5000 digits"),
    ],
)
def test_yaml_that_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match="not YAML that can be used") as error:
        parse(text, "a.yaml")
    assert complaint in str(error.value)
    assert "a.yaml" in error.value.where
    assert error.value.fix


def test_the_line_of_a_mistake_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        parse("a: 1\nb: 2\nc: *x\n", "a.yaml")
    assert error.value.where == "a.yaml, line 3"


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"- a\n- b\n", "list"),
        (b"just text\n", "str"),
        (b"5\n", "int"),
        (b"3838: x\n", "3838"),
        (b"train: \xff\n", "UTF-8"),
        (b"\x00\x01\x02", "special characters"),
        (b"a: b\n" + b"#" * (2 << 20), "more than 1,048,576 bytes"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, data: bytes, complaint: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_file(file)
    assert complaint in str(error.value)
    assert str(file) in error.value.where
    assert error.value.fix


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_config_that_cannot_be_opened(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(tmp_path / "none.yaml" if kind == "missing" else tmp_path)
