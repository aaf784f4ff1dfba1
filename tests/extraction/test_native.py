"""Patches at their own sizes: the same features as one alone, and sizes that cannot be computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featstore.backbones import Backbone, build_backbone, normalize
from featstore.config import BackboneConfig, ImagesConfig
from featstore.errors import BackboneError, FingerprintMismatch, ImageError
from featstore.extraction.committer import Committer
from featstore.extraction.forward import make_embedder
from featstore.extraction.schedule import Schedule, affordable_pixels, plan_schedule
from featstore.images import Preprocessing, decode
from featstore.store import Store
from tests import helpers
from tests.extraction.conftest import TINY, contents, make_project
from tests.extraction.test_extract import run

# Heights and widths: squares, upright, lying, odd ones, some of them shared by several patches.
SIZES = [
    (64, 64),
    (40, 90),
    (33, 47),
    (64, 64),
    (90, 40),
    (129, 57),
    (64, 64),
    (40, 90),
    (32, 32),
    (97, 97),
]
has_bf16 = pytest.mark.skipif(
    not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(), reason="a CPU without bfloat16"
)
NATIVE = {"backbone__resize": "native"}


def rewrite(project: Path, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[str]:
    """Give a project's patches these sizes, in turn; returns their names in order."""
    rng = np.random.default_rng(seed)
    files = sorted((project / "patches").iterdir())
    for i, file in enumerate(files):
        height, width = sizes[i % len(sizes)]
        picture = helpers.noise_patch(rng, max(height, width)).crop((0, 0, width, height))
        picture.save(file, compress_level=1)
    return [file.name for file in files]


def make_native(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES, cases: int = 2) -> Path:
    project = make_project(folder, cases=cases, stains=("h&e",), slices=1, patches=len(sizes), size=32)
    rewrite(project, sizes)
    return project


def features_by_path(store: Path) -> dict[str, np.ndarray]:
    view = Store.open(store)
    table = view.table()
    return {
        path: x
        for case in view.cases()
        for path, x in zip(
            table.loc[view.bag(case).rows, "path"], view.bag(case).features.copy(), strict=True
        )
    }


def decoded(project: Path, path: str) -> np.ndarray:
    return decode((project / "patches" / path).read_bytes(), path, "rgb", 10**9).pixels


def plainly(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    """What the network itself makes of one image in float32."""
    p = backbone.preprocessing
    with torch.inference_mode():
        x = normalize(torch.from_numpy(pixels[None].copy()), p.mean, p.std, torch.float32)
        return backbone.module(x)[0].numpy()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_native(tmp_path)


@has_bf16
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_in_bfloat16_each_patch_is_as_if_alone_bit_for_bit(
    project: Path, pool: int, batch_size: int
) -> None:
    settings = {"backbone__pool": pool, "extract__amp": "bf16", "extract__batch_size": batch_size}
    rewrite(project, SIZES)
    assert run(project, **NATIVE, **settings).committed == 2 * len(SIZES)
    spec = Store.open(project / "store").spec
    backbone = build_backbone(BackboneConfig(**{**TINY, "resize": "native", "pool": pool}), project)
    alone = make_embedder(
        backbone, torch.device("cpu"), spec.compute_dtype, spec.stored_dtype, 1, spec.runtime, False
    )
    found = features_by_path(project / "store")
    assert {x.shape for x in found.values()} == {(backbone.dim,)}
    for path, x in found.items():
        want = alone(decoded(project, path)[None]).result()[0]
        assert x.tobytes() == want.tobytes(), path


@pytest.mark.parametrize("pool", [1, 2])
def test_in_float32_each_patch_is_as_if_alone(project: Path, pool: int) -> None:
    rewrite(project, SIZES)
    run(project, **NATIVE, backbone__pool=pool, extract__dtype="float32")
    backbone = build_backbone(BackboneConfig(**{**TINY, "resize": "native", "pool": pool}), project)
    found = features_by_path(project / "store")
    assert len(found) == 2 * len(SIZES)
    for path, x in found.items():
        want = plainly(backbone, decoded(project, path))
        assert np.linalg.norm(x - want) <= 1e-6 * np.linalg.norm(want), path


def test_sides_are_rounded_to_multiples_of_32(tmp_path: Path) -> None:
    # Below, just below half-way, half-way, just above, and a side of a few pixels.
    sizes = [(47, 48), (5, 70), (79, 80), (81, 32), (130, 200)]
    rounded = [(32, 64), (32, 64), (64, 96), (96, 32), (128, 192)]
    project = make_native(tmp_path, sizes, cases=1)
    report = run(project, backbone__resize="native32", extract__dtype="float32")
    assert (report.committed, report.progress.skipped) == (len(sizes), [])
    backbone = build_backbone(BackboneConfig(**{**TINY, "resize": "native32"}), project)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    chosen = filters[backbone.preprocessing.interpolation]
    found = features_by_path(project / "store")
    for path, (height, width) in zip(sorted(found), rounded, strict=True):
        pixels = np.asarray(Image.fromarray(decoded(project, path)).resize((width, height), chosen))
        want = plainly(backbone, pixels)
        assert np.linalg.norm(found[path] - want) <= 1e-6 * np.linalg.norm(want), path


@pytest.mark.parametrize(
    ("resize", "size", "want"),
    [
        ("native", (50, 7576), (50, 7576)),
        ("native32", (1, 16), (32, 32)),
        ("native32", (48, 47), (64, 32)),
        ("native32", (79, 7576), (64, 7584)),
        (224, (50, 7576), (224, 224)),
    ],
)
def test_the_size_that_the_backbone_sees(
    resize: int | str, size: tuple[int, int], want: tuple[int, int]
) -> None:
    preprocessing = Preprocessing(resize, None, "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert preprocessing.input_size(*size) == want


def test_what_is_too_small_is_left_out_and_listed(tmp_path: Path) -> None:
    project = make_native(tmp_path, [(64, 64), (31, 200), (32, 32), (200, 8)], cases=1)
    report = run(project, **NATIVE)
    assert report.committed == 2
    names = sorted(file.name for file in (project / "patches").iterdir())
    assert [path for path, _ in report.progress.skipped] == [names[1], names[3]]
    assert "200 × 31 px" in report.progress.skipped[0][1]
    assert "below 32 px" in report.progress.skipped[0][1]
    # Left out again, not forgotten.
    again = run(project, **NATIVE)
    assert (again.committed, len(again.progress.skipped)) == (0, 2)


def test_a_giant_is_refused_with_the_choices_before_anything_is_written(project: Path) -> None:
    names = rewrite(project, [*SIZES[:-1], (160, 150)])
    with pytest.raises(ImageError) as error:
        run(project, **NATIVE, extract__native_pixels=20_000)
    text = str(error.value)
    assert "2 patches are too large" in text
    assert f"{names[9]}: 150 × 160 px" in text
    for choice in ("--native-pixels", "--resize", "--on-bad-image skip"):
        assert choice in text
    assert not (project / "store").exists()
    assert run(project, **NATIVE, extract__native_pixels=24_000).committed == 2 * len(SIZES)


def test_a_giant_may_be_left_out(project: Path) -> None:
    names = rewrite(project, [*SIZES[:-1], (160, 150)])
    report = run(project, **NATIVE, extract__native_pixels=20_000, images__on_bad_image="skip")
    assert report.committed == 2 * len(SIZES) - 2
    assert sorted(path for path, _ in report.progress.skipped) == [names[9], names[19]]
    assert all("20,000 pixels" in reason for _, reason in report.progress.skipped)


def test_the_largest_patch_follows_from_the_memory_unless_it_is_set() -> None:
    assert affordable_pixels(5_000, 1 << 40, "float32") == 5_000
    gigabyte = affordable_pixels("auto", 1 << 30, "bfloat16")
    assert gigabyte // 2 == affordable_pixels("auto", 1 << 30, "float32")
    assert 1_000**2 < gigabyte < 2_000**2


# Feature maps


def planned(project: Path, on_bad: str = "stop", **backbone: object) -> Schedule:
    """The schedule of a project's patches; the tiny network's map has a row for each 32 px begun."""
    made = build_backbone(BackboneConfig(**{**TINY, "resize": "native", **backbone}), project)
    names = sorted(file.name for file in (project / "patches").iterdir())
    images = ImagesConfig.model_validate({"on_bad_image": on_bad})
    return plan_schedule(names, project / "patches", made, images, 10**9)


@pytest.mark.parametrize(("pool", "coarse"), [(1, 0), (2, 1), (3, 3), (4, 4), (5, 5)])
def test_maps_smaller_than_the_grid_are_counted(tmp_path: Path, pool: int, coarse: int) -> None:
    project = make_native(
        tmp_path, [(200, 300), (96, 97), (40, 300), (32, 47), (64, 64), (97, 97)], cases=1
    )
    schedule = planned(project, pool=pool)
    assert schedule.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert (schedule.coarse, schedule.skipped) == (coarse, [])


def test_of_a_map_smaller_than_the_grid_cells_share_rows(tmp_path: Path) -> None:
    """As PyTorch's adaptive pooling has it: one value four times for a map of one pixel."""
    project = make_native(tmp_path, [(32, 32), (64, 96)], cases=1)
    report = run(project, **NATIVE, backbone__pool=2)
    small, large = Store.open(project / "store").bag("1").features.reshape(2, -1, 4)
    assert (small == small[:, :1]).all()
    assert not (large == large[:, :1]).all()
    assert report.to_json()["maps_smaller_than_pool"] == 1
    assert "1 patches have a feature map of fewer rows" in report.to_text()


def test_patches_in_which_maps_vanish_are_refused_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Backbone.map_size

    def vanish(self: Backbone, height: int, width: int) -> tuple[int, int]:
        return real(self, height, width) if min(height, width) > 70 else (0, 0)

    monkeypatch.setattr(Backbone, "map_size", vanish)
    project = make_native(tmp_path, [(70, 300), (71, 71), (31, 90)], cases=1)
    with pytest.raises(ImageError, match="1 patches are too small for timm:test_resnet") as error:
        planned(project)
    assert "patch1.png: 300 × 70 px" in str(error.value)
    assert "at least 71 px" in error.value.expected
    assert "--resize 96" in error.value.fix
    schedule = planned(project, "skip")
    assert schedule.rows.tolist() == [1]
    assert [reason for _, reason in schedule.skipped] == [
        "90 × 31 px: a side is below 32 px",
        "300 × 70 px: a side is below 71 px, too small for timm:test_resnet",
    ]


def test_a_patch_that_changes_its_size_after_the_look_is_a_bad_image(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import featstore.extraction.pipeline as pipeline

    names = [file.name for file in sorted((project / "patches").iterdir())]
    real, victim = pipeline.read, names[0]

    def grow(folder: Path, path: str, most: int) -> pipeline.Raw:
        if path == victim:
            helpers.noise_patch(np.random.default_rng(9), 70).save(folder / path)
        return real(folder, path, most)

    monkeypatch.setattr(pipeline, "read", grow)
    # Of its size there are other patches, with which it can no longer share a forward pass.
    settings = {**NATIVE, "extract__amp": "bf16", "extract__device": "cpu"}
    with pytest.raises(ImageError, match="70 × 70 px"):
        run(project, **settings)
    rewrite(project, SIZES)
    report = run(project, **settings, images__on_bad_image="skip")
    assert [path for path, _ in report.progress.skipped] == [victim]
    monkeypatch.undo()
    assert run(project, **settings).committed == 1
    assert len(contents(project / "store")) == 2 * len(SIZES)


def test_damage_behind_a_good_header_costs_that_patch_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sorted((project / "patches").iterdir())[7]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ImageError, match=file.name):
        run(project, **NATIVE)
    told: list[int] = []
    put = Committer.put
    monkeypatch.setattr(
        Committer, "put", lambda self, batch: (told.extend(batch.failed), put(self, batch))[1]
    )
    report = run(project, **NATIVE, images__on_bad_image="skip")
    assert [path for path, _ in report.progress.skipped] == [file.name]
    assert len(told) == 1  # so that nothing in the writer waits for it
    assert len(contents(project / "store")) == 2 * len(SIZES) - 1


@pytest.mark.parametrize("resize", ["native", "native32"])
def test_a_network_of_one_size_is_refused(project: Path, resize: str) -> None:
    with pytest.raises(BackboneError, match="takes patches of one size only") as error:
        run(project, backbone__name="timm:vit_tiny_patch16_224", backbone__resize=resize)
    assert "resize: model" in str(error.value)
    assert not (project / "store").exists()


def test_a_network_of_multiples_of_its_tokens_is_refused(project: Path) -> None:
    # Made for 160 px, so that it is built to take other sizes than that: multiples of 16.
    with pytest.raises(BackboneError, match="takes patches of one size only"):
        run(project, backbone__name="timm:test_vit", **NATIVE)
    assert not (project / "store").exists()


def test_native_sizes_do_not_go_into_a_store_of_another_size(project: Path) -> None:
    run(project)
    with pytest.raises(FingerprintMismatch, match="resize: native here, 32 there"):
        run(project, **NATIVE)


@pytest.mark.parametrize("amp", ["off", pytest.param("bf16", marks=has_bf16)])
def test_what_was_done_before_changes_no_bit(project: Path, amp: str) -> None:
    run(project, **NATIVE, extract__amp=amp)
    whole = contents(project / "store")
    files = sorted((project / "patches").iterdir())
    parked = project / "parked"
    parked.mkdir()
    for file in files[::3]:
        file.rename(parked / file.name)
    run(project, **NATIVE, extract__amp=amp, store__path="pieces")
    for file in parked.iterdir():
        file.rename(project / "patches" / file.name)
    assert run(project, **NATIVE, extract__amp=amp, store__path="pieces").committed == len(files[::3])
    assert contents(project / "pieces") == whole
