"""Pixels decoded ahead of who reads them: which, how many, and what becomes of the threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from featstore.augmentation import Augmentation, augment
from featstore.config import ImagesConfig
from featstore.errors import FeatstoreError, ImageError
from featstore.extraction import loading
from featstore.images import Preprocessing, decode
from featstore.patch_pixels import Chunk, PatchPixels
from featstore.store import Store
from tests import helpers
from tests.extraction.conftest import make_project
from tests.extraction.test_extract import run

HALF = (0.5, 0.5, 0.5)
FIXED = Preprocessing(32, None, "bilinear", HALF, HALF)
NATIVE = Preprocessing("native", None, "bilinear", HALF, HALF)
NATIVE32 = Preprocessing("native32", None, "bilinear", HALF, HALF)
CROPPED = Preprocessing(36, 32, "bicubic", HALF, HALF)
SIZES = [(40, 40), (33, 47), (40, 40), (64, 40), (33, 47), (40, 40), (40, 40), (64, 40)]
PATCH = 3 * 32 * 32  # bytes, with fixed sizes
IMAGES = ImagesConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("pixels"), np.random.default_rng(0)
    for i in range(24):
        height, width = SIZES[i % len(SIZES)]
        picture = helpers.noise_patch(rng, 64).crop((0, 0, width, height))
        picture.save(root / f"p{i}.png", compress_level=1)
    return root


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and "featstore-pixels" in t.name]
    assert left == []


def table(first: int = 0, count: int = 24) -> pd.DataFrame:
    sizes = np.array([SIZES[i % len(SIZES)] for i in range(count)], np.float32)
    columns = {"path": [f"p{i}.png" for i in range(count)], "height": sizes[:, 0], "width": sizes[:, 1]}
    return pd.DataFrame(columns, index=pd.RangeIndex(first, first + count))


def reader(folder: Path, preprocessing: Preprocessing = FIXED, **options: object) -> PatchPixels:
    settings = {"threads": 3, "ahead": 1 << 20, **options}
    return PatchPixels(table(), folder, IMAGES, preprocessing, **settings)  # type: ignore[arg-type]


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def one_by_one(folder: Path, preprocessing: Preprocessing, number: int) -> np.ndarray:
    raw = loading.read(folder, f"p{number}.png", IMAGES.max_pixels)
    return loading.load(raw, "", preprocessing, "rgb", IMAGES.max_pixels).pixels[0]


@pytest.mark.parametrize("preprocessing", [FIXED, NATIVE, NATIVE32, CROPPED], ids=lambda p: str(p.resize))
@pytest.mark.parametrize("ahead", [0, 1 << 20])
def test_plain_pixels_are_those_that_extraction_feeds_the_backbone(
    folder: Path, preprocessing: Preprocessing, ahead: int
) -> None:
    chunks = [rows(0, 2, 6), rows(4, 1), rows(3), rows(5, 0, 8, 10, 13, 14)]
    with reader(folder, preprocessing, ahead=ahead) as pixels:
        found = list(pixels.read(map(Chunk, chunks)))
        assert len(found) == len(chunks)
        for numbers, block in zip(chunks, found, strict=True):
            expected = np.stack([one_by_one(folder, preprocessing, number) for number in numbers.tolist()])
            assert np.array_equal(block, expected)
            assert block.dtype == np.uint8
            assert block.flags.c_contiguous
            assert block.flags.writeable
            assert [block.shape[1:3]] * len(block) == [tuple(s) for s in pixels.size_of(numbers).tolist()]
        assert pixels.seconds > 0
        assert pixels.changed == set()


def test_a_table_of_some_cases_keeps_its_rows(folder: Path) -> None:
    with PatchPixels(table(first=100), folder, IMAGES, FIXED, 2) as pixels:
        (found,) = pixels.read([Chunk(rows(107, 100))])
        expected = [one_by_one(folder, FIXED, 7), one_by_one(folder, FIXED, 0)]
        assert np.array_equal(found, np.stack(expected))
        with pytest.raises(IndexError, match=r"\[5, 124\]"):
            pixels.size_of(rows(110, 5, 124))


def test_no_patches_are_no_patches(folder: Path) -> None:
    with reader(folder) as pixels:
        (found,) = pixels.read([Chunk(rows())])
        assert found.shape == (0, 32, 32, 3)
        assert list(pixels.read([])) == []
        assert pixels.size_of(rows()).shape == (0, 2)
    with reader(folder, NATIVE) as pixels:
        assert pixels.size_of(rows()).shape == (0, 2)


def test_channels_are_swapped_as_in_extraction(folder: Path) -> None:
    with PatchPixels(table(), folder, ImagesConfig(channel_order="bgr"), FIXED, 1) as pixels:
        (found,) = pixels.read([Chunk(rows(3))])
    assert np.array_equal(found[0], one_by_one(folder, FIXED, 3)[..., ::-1])


# Chance


@pytest.mark.parametrize("preprocessing", [FIXED, NATIVE], ids=["fixed", "native"])
def test_a_variant_depends_on_seed_and_row_alone(folder: Path, preprocessing: Preprocessing) -> None:
    same = rows(0, 2, 5, 6, 8, 10, 13, 14, 16, 18)  # of one size
    with reader(folder, preprocessing, threads=3) as pixels:
        (whole,) = pixels.read([Chunk(same, Augmentation(), (7, 1))])
    with reader(folder, preprocessing, threads=1, ahead=0) as pixels:
        pieces = [Chunk(piece, Augmentation(), (7, 1)) for piece in np.array_split(same[::-1], 4)]
        again = np.concatenate(list(pixels.read(pieces)))[::-1]
        (other,) = pixels.read([Chunk(same, Augmentation(), (7, 2))])
    assert np.array_equal(whole, again)
    assert (whole != other).any(axis=(1, 2, 3)).all()
    decoded = decode((folder / "p5.png").read_bytes(), "", "rgb", 10**6).pixels
    by_hand = augment(decoded, preprocessing, Augmentation(), np.random.default_rng([7, 1, 5]))
    assert np.array_equal(whole[2], by_hand)


# How far ahead


class Asked:
    """Chunks of two patches, and how many of them were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0

    def __iter__(self) -> Iterator[Chunk]:
        for i in range(self.count):
            self.asked += 1
            yield Chunk(rows(2 * i, 2 * i + 1))


@pytest.mark.parametrize(("ahead", "decoded"), [(0, 1), (2 * PATCH, 1), (6 * PATCH, 3), (7 * PATCH, 3)])
def test_as_much_is_decoded_ahead_as_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, decoded: int
) -> None:
    begun: list[int] = []
    real = PatchPixels._begin
    monkeypatch.setattr(
        PatchPixels, "_begin", lambda self, pool, chunk: begun.append(1) or real(self, pool, chunk)
    )
    chunks = Asked(12)
    with reader(folder, ahead=ahead) as pixels, closing(pixels.read(chunks)) as blocks:
        for handed, _ in enumerate(blocks, start=1):
            assert len(begun) == min(12, handed + decoded)
            assert chunks.asked == min(12, len(begun) + 1)
        assert handed == 12


def test_what_is_ahead_is_decoded_while_the_reader_does_other_things(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Semaphore(0)
    real = PatchPixels._fill

    def fill(self: PatchPixels, *given: object) -> object:
        found = real(self, *given)  # type: ignore[arg-type]
        done.release()
        return found

    monkeypatch.setattr(PatchPixels, "_fill", fill)
    with reader(folder, threads=1) as pixels, closing(pixels.read(Asked(3))) as blocks:
        next(blocks)
        assert all(
            done.acquire(timeout=60) for _ in range(3)
        )  # one job a chunk: nobody asked for the others


# Files that are not what they were


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def spoil(folder: Path, how: str) -> None:
    file = folder / "p5.png"
    if how == "gone":
        file.unlink()
    elif how == "damaged":
        file.write_bytes(file.read_bytes()[:-30])
    elif how == "folder":
        file.unlink()
        file.mkdir()
    else:
        Image.new("RGB", (50, 50)).save(file)


@pytest.mark.parametrize("how", ["gone", "damaged", "folder", "of another size"])
@pytest.mark.parametrize("ahead", [0, 1 << 20])
def test_an_unusable_file_is_an_error_at_its_chunk(own: Path, how: str, ahead: int) -> None:
    spoil(own, how)
    with reader(own, NATIVE, ahead=ahead) as pixels:
        blocks = pixels.read(Chunk(rows(i)) for i in range(24))
        for _ in range(5):
            next(blocks)
        with pytest.raises(ImageError, match=r"p5\.png") as caught:
            next(blocks)
        assert caught.value.where == str(own / "p5.png")
        assert "extract --prune" in caught.value.fix
        assert not any("featstore-pixels" in thread.name for thread in threading.enumerate())
        assert next(blocks, None) is None


def test_files_that_changed_are_named(own: Path) -> None:
    digests = {f"p{i}.png": sha256((own / f"p{i}.png").read_bytes()).digest() for i in range(24)}
    del digests["p3.png"]
    for name in ("p2.png", "p3.png", "p9.png"):
        (own / name).write_bytes((own / "p0.png").read_bytes())
    with reader(own, digests=digests) as pixels:
        list(pixels.read([Chunk(rows(0, 1, 2, 3)), Chunk(rows(4))]))
        assert pixels.changed == {"p2.png"}
        (own / "p4.png").write_bytes((own / "p1.png").read_bytes())
        list(pixels.read([Chunk(np.arange(24))] * 2))
        assert pixels.changed == {"p2.png", "p9.png", "p4.png"}


def test_patches_of_several_sizes_in_a_chunk_are_a_mistake(folder: Path) -> None:
    with reader(folder, NATIVE) as pixels, pytest.raises(ValueError, match=r"\[\[33, 47\], \[40, 40\]\]"):
        next(pixels.read([Chunk(rows(0, 1))]))


@pytest.mark.parametrize("where", ["featstore.patch_pixels.np.empty", "featstore.patch_pixels.decoded"])
def test_too_little_memory_is_an_error_of_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*given: object) -> None:
        raise MemoryError

    with reader(folder) as pixels:
        monkeypatch.setattr(where, full)
        with pytest.raises(FeatstoreError, match="memory ran out"):
            next(pixels.read([Chunk(rows(0, 1))]))
        monkeypatch.undo()


# Ends


def test_a_reader_may_stop_early(folder: Path) -> None:
    with reader(folder) as pixels:
        with closing(pixels.read(Asked(12))) as blocks:
            next(blocks)
        assert not any("featstore-pixels" in thread.name for thread in threading.enumerate())
        assert len(list(pixels.read(Asked(12)))) == 12  # and read again


def test_an_interrupt_while_waiting_leaves_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reader(folder) as pixels:
        blocks = pixels.read(Asked(12))
        next(blocks)

        def interrupted(*given: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(PatchPixels, "_finished", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(blocks)
        assert not any("featstore-pixels" in thread.name for thread in threading.enumerate())


def test_after_closing_nothing_is_read(folder: Path) -> None:
    pixels = reader(folder, ahead=0)
    blocks = pixels.read(Asked(12))
    next(blocks)
    pixels.close()
    with pytest.raises(ValueError, match="closed"):
        list(blocks)
    with pytest.raises(ValueError, match="closed"):
        next(pixels.read(Asked(1)))


def test_the_patches_of_a_store(tmp_path: Path) -> None:
    project = make_project(tmp_path, cases=2, stains=("h&e",), slices=2, patches=3)
    run(project)
    store = Store.open(project / "store")
    sources = store.sources()
    digests = dict(zip(sources["path"], map(bytes, sources["sha256"]), strict=True))
    bag = store.outline("2")
    for whole in (store.table(), store.table("2")):
        with PatchPixels(whole, project / "patches", IMAGES, NATIVE, 2, digests=digests) as pixels:
            assert pixels.size_of(bag.rows).tolist() == [[40, 40]] * 6
            (found,) = pixels.read([Chunk(bag.rows)])
            for row, seen in zip(bag.rows.tolist(), found, strict=True):
                file = project / "patches" / store.table()["path"][row]
                assert np.array_equal(seen, np.asarray(Image.open(file)))
            assert not pixels.changed
