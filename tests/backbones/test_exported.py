"""Backbones that were trained here: written, read, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.backbones import Backbone, build_backbone
from featstore.backbones.exported import DESCRIPTION, export_again, export_backbone, is_export
from featstore.config import BackboneConfig
from featstore.errors import BackboneError
from tests.command_line import answer, featstore, make_project, refused, succeeded

TINY = BackboneConfig(name="timm:test_resnet", weights="random:0", resize=64, pool=2)


def tuned(config: BackboneConfig = TINY, base: Path = Path(), by: float = 0.01) -> Backbone:
    """A backbone whose weights have changed since it was built."""
    backbone = build_backbone(config, base)
    with torch.no_grad():
        for parameter in backbone.network.parameters():
            parameter.add_(by * torch.ones_like(parameter))
    return backbone


def exported(folder: Path, config: BackboneConfig = TINY) -> tuple[Path, Backbone]:
    backbone = tuned(config)
    return export_again(folder, backbone, config, Path(), {"run": "a"}).parent, backbone


@pytest.mark.parametrize(
    "config",
    [TINY, BackboneConfig(name="resnet50", weights="random:1", resize=64),
     BackboneConfig(name="densenet121", weights="random:1", resize=64, final_relu=False)],
    ids=lambda config: config.name,
)  # fmt: skip
def test_what_is_read_computes_what_was_written(tmp_path: Path, config: BackboneConfig) -> None:
    folder, backbone = exported(tmp_path / "out", config)
    # Resize, pool, relu and weights are the export's, whatever the settings say.
    found = build_backbone(BackboneConfig(name="out", weights="random:9", pool=3), tmp_path)
    x = torch.randn(3, 3, found.preprocessing.size, found.preprocessing.size)
    assert torch.equal(found.module(x), backbone.module(x))
    assert (found.preprocessing, found.dim, found.pool, found.final_relu) == (
        backbone.preprocessing, backbone.dim, backbone.pool, backbone.final_relu
    )  # fmt: skip
    assert build_backbone(BackboneConfig(name=str(folder / DESCRIPTION)), Path("/")).dim == backbone.dim
    before = build_backbone(config, Path())
    specs = [b.spec("rgb", "float32", "float16") for b in (before, found)]
    assert specs[0].fingerprint != specs[1].fingerprint
    assert not any(p.requires_grad for p in found.module.parameters())


def test_of_an_exported_one_another_can_be_made(tmp_path: Path) -> None:
    exported(tmp_path / "first")
    config = BackboneConfig(name="first")
    backbone = tuned(config, tmp_path, 0.02)
    export_again(tmp_path / "second", backbone, config, tmp_path, {})
    found = build_backbone(BackboneConfig(name="second"), tmp_path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(found.module(x), backbone.module(x))


def test_a_new_one_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path / "out")
    export_again(folder, tuned(by=0.5), TINY, Path(), {})
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert len(list(folder.iterdir())) == 2
    build_backbone(BackboneConfig(name="out"), tmp_path)


def edited(folder: Path, **changes: Any) -> None:
    file = folder / DESCRIPTION
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def flip(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "are not those that were written"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "are missing"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x"), "cannot be read"),
        (lambda folder: edited(folder, format="featstore backbone 9"), "'featstore backbone 9'"),
        (lambda folder: edited(folder, kind="strange"), "'strange'"),
        (lambda folder: edited(folder, description={}), "not what was written"),
        (lambda folder: edited(folder, description_sha256=None), "not what was written"),
        (lambda folder: (folder / DESCRIPTION).write_text("{"), "cannot be used"),
        (lambda folder: (folder / DESCRIPTION).write_text("[]"), "cannot be used"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_refused(tmp_path: Path, damage: Any, says: str) -> None:
    folder, _ = exported(tmp_path / "out")
    damage(folder)
    with pytest.raises(BackboneError, match=says):
        build_backbone(BackboneConfig(name="out"), tmp_path)


def test_a_name_outside_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path / "out")
    (weights,) = folder.glob("*.safetensors")
    weights.rename(tmp_path / weights.name)
    edited(folder, weights=f"../{weights.name}")
    with pytest.raises(BackboneError, match="are missing"):
        build_backbone(BackboneConfig(name="out"), tmp_path)


def test_a_folder_without_a_backbone_is_refused_and_a_librarys_name_wins(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="no exported backbone in 'empty'"):
        build_backbone(BackboneConfig(name="empty"), tmp_path)
    exported(tmp_path / "resnet50")
    assert is_export(tmp_path / "resnet50")
    found = build_backbone(BackboneConfig(name="resnet50", weights="random:0", resize=64), tmp_path)
    assert found.dim == 2048
    with pytest.raises(BackboneError, match="the folder of an exported one"):
        build_backbone(BackboneConfig(name="nothing"), tmp_path)


def test_extract_caches_with_it_under_a_new_fingerprint(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", patches=3)
    exported(tmp_path / "out")
    succeeded(project, "extract")
    # As a flag, a path starts from the folder that one stands in.
    succeeded(tmp_path, "extract", "--project", "project", "--backbone", "out", "--store", "project/tuned")
    old, new = (answer(project, "info", "--store", store) for store in ("store", "tuned"))
    assert old["fingerprint"] != new["fingerprint"]
    message = refused(tmp_path, "extract", "--project", "project", "--backbone", "out")
    assert "fingerprint" in message or "weights" in message


def test_whatever_is_no_kind_of_ours_can_be_registered(tmp_path: Path) -> None:
    export_backbone(tmp_path / "out", "nobody's", torch.nn.Linear(2, 2), {})
    result = featstore(make_project(tmp_path / "p"), "extract", "--backbone", tmp_path / "out")
    assert result.exit_code == 2
    assert "finetuned" in result.stderr
