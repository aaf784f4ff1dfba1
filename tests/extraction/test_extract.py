"""What extraction computes, what it leaves alone, and what it says."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featstore.backbones import build_backbone, normalize
from featstore.config import BackboneConfig
from featstore.errors import ConfigError, FeatstoreError, FingerprintMismatch, ImageError, StoreError
from featstore.extraction import ExtractionReport, extract
from featstore.extraction.forward import choose_compute_dtype
from featstore.extraction.pytorch import TorchEmbedder
from featstore.settings import Layers
from featstore.store import Store
from featstore.strict_yaml import read_file
from heads.config import Config
from tests import helpers
from tests.extraction.conftest import TINY, contents, make_project


def run(project: Path, **settings: object) -> ExtractionReport:
    layers = Layers()
    layers.add(Config, read_file(project / "featstore.yaml"), "featstore.yaml")
    for path, value in settings.items():
        section, _, key = path.partition("__")
        layers.add(Config, {section: {key: value}}, "the test")
    return extract(layers.build(Config), project)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path, cases=3, stains=("h&e", "sox10"), slices=2, patches=11)


def parts(project: Path) -> set[str]:
    return {path.name for path in project.glob("store/cases/*/*.h5")}


def patch_file(project: Path, case: str, slice_id: str, stain: str, patch: int) -> Path:
    return project / "patches" / helpers.patch_name(case, slice_id, stain, patch)


def test_embeddings_equal_the_plain_forward_pass_of_their_files(project: Path) -> None:
    report = run(project)
    assert report.committed == 3 * 2 * 2 * 11
    backbone = build_backbone(BackboneConfig(**TINY), project)
    store = Store.open(project / "store")
    table = store.table()
    assert table["patch"].tolist()[:11] == list(range(1, 12))  # 2 before 10
    for case in store.cases():
        bag = store.bag(case)
        for row in range(0, len(bag), 7):
            file = project / "patches" / table.loc[bag.rows[row], "path"]
            pixels = np.asarray(Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
            if backbone.preprocessing.interpolation == "bilinear":
                pixels = np.asarray(
                    Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
                )
            x = normalize(
                torch.from_numpy(pixels[None].copy()),
                backbone.preprocessing.mean,
                backbone.preprocessing.std,
                torch.float32,
            )
            want = backbone.module(x)[0].numpy()
            assert np.allclose(bag.features[row], want, atol=2e-3, rtol=2e-3)


def test_quality_columns_come_from_the_file_as_it_is(project: Path) -> None:
    run(project)
    row = Store.open(project / "store").table().iloc[5]
    pixels = np.asarray(Image.open(project / "patches" / row["path"]).convert("RGB"))
    assert (row["height"], row["width"]) == pixels.shape[:2]
    assert row["mean_green"] == pytest.approx(pixels[:, :, 1].mean(), abs=1e-3)


def test_nothing_left_to_do(project: Path) -> None:
    run(project)
    before = parts(project)
    report = run(project)
    assert (report.committed, report.plan.done, len(report.plan.pending)) == (0, 132, 0)
    assert "nothing left to do" in report.to_text()
    assert parts(project) == before


def test_only_what_is_new_or_changed_is_computed(project: Path) -> None:
    run(project)
    before, old_parts = contents(project / "store"), parts(project)
    reader = Store.open(project / "store")
    old_bag = reader.bag("2").features.copy()

    source = patch_file(project, "1", "match_1", "h&e", 3)
    added = patch_file(project, "2", "match_1", "h&e", 99)
    added.write_bytes(patch_file(project, "2", "match_1", "h&e", 1).read_bytes())
    new_slice = patch_file(project, "2", "unmatched_7", "sox10", 1)
    new_slice.write_bytes(added.read_bytes())
    new_case = patch_file(project, "77", "match_1", "h&e", 1)
    new_case.write_bytes(added.read_bytes())
    changed = patch_file(project, "2", "match_1", "h&e", 5)
    changed.write_bytes(source.read_bytes())
    touched = patch_file(project, "3", "match_1", "h&e", 5)
    os.utime(touched, (1, 1))

    report = run(project)
    assert (report.plan.new, report.plan.changed, report.refreshed) == (3, 1, 1)
    assert report.committed == 4
    assert old_parts < parts(project)
    # One part for each of the two cases, one for the touched file's new time stamp.
    assert len(parts(project)) == len(old_parts) + 3
    assert len(run(project).plan.stale) == 0
    after = contents(project / "store")
    assert after.keys() - before.keys() == {
        ("2", "h&e", "match_1", 99),
        ("2", "sox10", "unmatched_7", 1),
        ("77", "h&e", "match_1", 1),
    }
    assert {key for key in before if before[key] != after[key]} == {("2", "h&e", "match_1", 5)}
    assert after["2", "h&e", "match_1", 5] == before["1", "h&e", "match_1", 3]
    assert after["2", "h&e", "match_1", 99] == before["2", "h&e", "match_1", 1]
    # A reader that was there before sees the old state, whole.
    assert np.array_equal(reader.bag("2").features, old_bag)
    assert len(reader.table()) == 132


def test_a_vanished_patch_is_listed_and_stays_until_pruned(project: Path) -> None:
    run(project)
    gone = patch_file(project, "1", "match_1", "h&e", 10)
    gone.unlink()
    report = run(project)
    assert report.plan.vanished["path"].tolist() == [gone.name]
    assert ("1", "h&e", "match_1", 10) in contents(project / "store")
    assert run(project, extract__prune=True).pruned == 1
    assert ("1", "h&e", "match_1", 10) not in contents(project / "store")
    assert len(run(project).plan.vanished) == 0


def test_an_excluded_case_is_not_pruned(project: Path) -> None:
    run(project)
    layers = Layers()
    layers.add(Config, read_file(project / "featstore.yaml"), "featstore.yaml")
    layers.add(Config, {"exclude": [2], "extract": {"prune": True}}, "the test")
    assert extract(layers.build(Config), project).pruned == 0
    assert Store.open(project / "store").cases() == ["1", "2", "3"]


def test_a_moved_file_keeps_its_embedding_and_is_found_where_it_is(project: Path) -> None:
    run(project)
    before = contents(project / "store")
    file = patch_file(project, "1", "match_1", "h&e", 10)
    (project / "patches" / "deeper").mkdir()
    file.rename(project / "patches" / "deeper" / file.name)
    report = run(project)
    assert (report.committed, report.refreshed, len(report.plan.vanished)) == (0, 1, 0)
    assert contents(project / "store") == before
    table = Store.open(project / "store").table()
    assert all((project / "patches" / path).is_file() for path in table["path"])
    assert run(project).refreshed == 0


def test_positions_that_come_later_are_noted_without_computing(project: Path) -> None:
    run(project)
    before = contents(project / "store")
    names = sorted(path.name for path in (project / "patches").iterdir())
    for shift in (0, 5):  # first none were known, then they are corrected
        rows = "\n".join(f"{name},{i + shift},{2 * i},10,20" for i, name in enumerate(names))
        (project / "geometry.csv").write_text("path,x,y,width,height\n" + rows + "\n")
        report = run(project, patches__geometry="geometry.csv")
        assert (report.committed, report.refreshed) == (0, 132)
        table = Store.open(project / "store").table().set_index("path")
        assert table.loc[names[3], ["x0", "y0", "x2", "y2"]].tolist() == [3.0 + shift, 6, 13 + shift, 26]
    assert run(project, patches__geometry="geometry.csv").refreshed == 0
    assert run(project).refreshed == 0  # a folder without positions takes none away
    assert contents(project / "store") == before


def test_pruning_refuses_what_looks_like_a_mishap(project: Path) -> None:
    run(project)
    away = project / "away"
    (project / "patches").rename(away)
    (project / "patches").mkdir()
    kept = patch_file(project, "1", "match_1", "h&e", 1)
    kept.write_bytes((away / kept.name).read_bytes())
    patch_file(project, "9", "match_1", "h&e", 1).write_bytes(kept.read_bytes())
    with pytest.raises(StoreError, match="131 of 132 embeddings would be dropped"):
        run(project, extract__prune=True)
    # It is said before any work: the new case has not been embedded.
    assert "9" not in Store.open(project / "store").cases()
    patch_file(project, "9", "match_1", "h&e", 1).unlink()
    for file in away.iterdir():
        if "case_3" not in file.name:
            file.rename(project / "patches" / file.name)
    (project / "patches" / "other_disk").symlink_to(project / "not_mounted")
    with pytest.raises(StoreError, match=r"1 links lead nowhere \(other_disk"):
        run(project, extract__prune=True)
    assert len(contents(project / "store")) == 132
    (project / "patches" / "other_disk").unlink()
    assert run(project, extract__prune=True).pruned == 44


def test_every_forward_pass_has_the_same_number_of_patches() -> None:
    """Kernels are chosen by shape: with one shape, what is left to do changes no bit."""
    backbone = build_backbone(BackboneConfig(**TINY), Path())
    seen = []

    class Counting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return backbone.module(x)

    embedder = TorchEmbedder(
        replace(backbone, module=Counting()), torch.device("cpu"), "float32", "float32", 8
    )
    for count in (8, 3, 1, 20):
        assert len(embedder(np.zeros((count, 32, 32, 3), np.uint8)).result()) == count
    assert set(seen) == {8}


def test_another_backbone_is_refused_and_nothing_changes(project: Path) -> None:
    run(project)
    before = contents(project / "store")
    with pytest.raises(FingerprintMismatch, match="weights_sha256"):
        run(project, backbone__weights="random:1")
    assert contents(project / "store") == before


def test_a_header_that_cannot_be_used_stops_before_anything_is_written(project: Path) -> None:
    bad = patch_file(project, "1", "match_1", "h&e", 2)
    bad.write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError, match="1 of 132 files") as error:
        run(project)
    assert bad.name in str(error.value)
    assert not (project / "store").exists()


def test_skipping_lists_what_it_skipped(project: Path) -> None:
    patch_file(project, "1", "match_1", "h&e", 2).write_bytes(b"")
    late = patch_file(project, "3", "match_1", "h&e", 2)
    late.write_bytes(late.read_bytes()[:-30])  # its header is fine
    report = run(project, images__on_bad_image="skip")
    assert report.committed == 130
    assert {path for path, _ in report.skipped} == {
        helpers.patch_name("1", "match_1", "h&e", 2),
        helpers.patch_name("3", "match_1", "h&e", 2),
    }
    assert "2 files skipped" in report.to_text()


def test_a_damaged_file_stops_the_run_and_loses_nothing(project: Path) -> None:
    bad = patch_file(project, "2", "match_1", "h&e", 2)
    bad.write_bytes(bad.read_bytes()[:-30])
    with pytest.raises(ImageError, match=r"case_2_match_1"):
        run(project)
    found = contents(project / "store")
    assert len(found) == 44 + 1  # case 1, and patch 1 of case 2
    bad.write_bytes(patch_file(project, "2", "match_1", "h&e", 3).read_bytes())
    assert run(project).committed == 132 - len(found)


def test_conversions_are_counted(project: Path) -> None:
    Image.new("L", (40, 40), 77).save(patch_file(project, "1", "match_1", "h&e", 1))
    assert run(project).progress.converted == {"grey": 1}


class _Hungry(torch.nn.Module):
    """A backbone that has memory for four patches at a time."""

    def __init__(self, module: torch.nn.Module, limit: int) -> None:
        super().__init__()
        self.module, self.limit = module, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.module(x)


@pytest.mark.parametrize(("limit", "batch_size", "halved"), [(4, 4, 2), (1, 1, 4)])
def test_when_memory_runs_out_the_batch_is_halved_and_the_run_goes_on(
    limit: int, batch_size: int, halved: int
) -> None:
    backbone = build_backbone(BackboneConfig(**TINY), Path())
    pixels = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    plain = TorchEmbedder(backbone, torch.device("cpu"), "float32", "float32", 16)(pixels).result()
    hungry = TorchEmbedder(
        replace(backbone, module=_Hungry(backbone.module, limit)),
        torch.device("cpu"),
        "float32",
        "float32",
        16,
    )
    assert np.allclose(hungry(pixels).result(), plain, atol=1e-5)
    assert (hungry.batch_size, hungry.halved) == (batch_size, halved)


def test_memory_for_not_even_one_patch_is_an_error() -> None:
    backbone = build_backbone(BackboneConfig(**TINY), Path())
    hungry = TorchEmbedder(
        replace(backbone, module=_Hungry(backbone.module, 0)), torch.device("cpu"), "float32", "float32", 4
    )
    with pytest.raises(FeatstoreError, match="too little memory"):
        hungry(np.zeros((2, 32, 32, 3), np.uint8))


def test_what_is_left_to_do_does_not_change_the_bits(project: Path) -> None:
    run(project)
    whole = contents(project / "store")
    for file in sorted((project / "patches").iterdir())[::3]:
        file.rename(file.with_suffix(".later"))
    run(project, store__path="again")
    for file in (project / "patches").glob("*.later"):
        file.rename(file.with_suffix(".png"))
    run(project, store__path="again")
    assert contents(project / "again") == whole


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_embeddings_that_do_not_fit_are_an_error_that_names_the_way_out(
    project: Path, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TorchEmbedder._forward
    monkeypatch.setattr(
        TorchEmbedder,
        "_forward",
        lambda self, pixels: (forward(self, pixels).float() * scale + scale).half(),
    )
    with pytest.raises(FeatstoreError) as error:
        run(project)
    assert "case_1_match_1_h&e_patch1.png" in str(error.value)
    assert ("extract.dtype" if scale == 1e6 else "not finite") in str(error.value)
    assert contents(project / "store") == {}


def test_auto_precision_keeps_that_of_the_store() -> None:
    cpu = torch.device("cpu")
    assert choose_compute_dtype("auto", cpu, "float32") == "float32"
    assert choose_compute_dtype("bf16", cpu, "float32") == "bfloat16"
    assert choose_compute_dtype("auto", cpu, None) in ("float32", "bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said_before_anything_else(project: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        run(project, extract__device="cuda")
    assert not (project / "store").exists()


def test_geometry_goes_into_the_store(project: Path) -> None:
    names = [path.name for path in (project / "patches").iterdir()]
    rows = "\n".join(f"{name},{i},{2 * i},10,20" for i, name in enumerate(names))
    (project / "geometry.csv").write_text("path,x,y,width,height\n" + rows + "\n")
    run(project, patches__geometry="geometry.csv")
    table = Store.open(project / "store").table().set_index("path")
    assert table.loc[names[3], ["x0", "y0", "x2", "y2"]].tolist() == [3.0, 6.0, 13.0, 26.0]


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(project: Path) -> None:
    run(project, extract__device="cpu", store__path="cpu")
    run(project, extract__device="cuda", store__path="gpu")
    cpu, gpu = contents(project / "cpu"), contents(project / "gpu")
    assert cpu.keys() == gpu.keys()
    for key in cpu:
        a, b = np.frombuffer(cpu[key], np.float16), np.frombuffer(gpu[key], np.float16)
        assert np.allclose(a, b, atol=1e-2)
