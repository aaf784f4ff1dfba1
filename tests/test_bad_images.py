"""Every kind of picture through the whole command: converted as documented, or refused by name."""

from __future__ import annotations

import io
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.store import Store
from tests import helpers
from tests.command_line import answer, featstore, listing, make_project, refused

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (37, 41, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (37, 41, 1), np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int, depth: int, color: int, interlaced: bool = False) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body)


def png(samples: np.ndarray, depth: int, color: int, interlaced: bool = False) -> bytes:
    """A PNG by hand from (H, W, C) samples of 8 or 16 bits: what Pillow cannot write."""
    height, width = samples.shape[:2]
    raw = samples.astype(">u2" if depth == 16 else np.uint8)
    passes = [raw[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [raw]
    lines = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    head = header(width, height, depth, color, interlaced)
    return head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.rint((rgb.astype(float) * alpha + (255.0 - alpha) * 255) / 255)


def palette() -> tuple[bytes, np.ndarray]:
    """Four colours of which the second is half and the third wholly transparent."""
    colours = np.array([[200, 30, 40], [10, 220, 90], [5, 5, 5], [250, 240, 230]], np.uint8)
    index = RNG.integers(0, 4, (33, 35)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    alpha = np.array([255, 128, 0, 255])[index][..., None]
    data = saved(image, transparency=bytes([255, 128, 0, 255]))
    return data, over_white(colours[index], alpha)


def converted() -> dict[str, tuple[bytes, np.ndarray, str]]:
    """Kind → file, the pixels it stands for, and how the report calls the conversion."""
    wide = RNG.integers(0, 65536, (34, 36, 3))
    grey, deep = RGB[..., :1], wide[..., :1]
    see_through, flat = palette()
    return {
        "rgb": (saved(Image.fromarray(RGB)), RGB, ""),
        "interlaced": (png(RGB, 8, 2, interlaced=True), RGB, ""),
        "grey": (saved(Image.fromarray(grey[..., 0])), grey.repeat(3, 2), "grey"),
        "deep grey": (png(deep, 16, 0), (deep >> 8).repeat(3, 2), "grey, 16-bit to 8-bit"),
        "rgb, 16-bit": (png(wide, 16, 2), wide >> 8, "16-bit to 8-bit"),
        "rgba": (
            saved(Image.fromarray(np.concatenate((RGB, ALPHA), 2))),
            over_white(RGB, ALPHA),
            "alpha over white",
        ),
        "grey with alpha": (
            saved(Image.fromarray(np.concatenate((grey, ALPHA), 2))),
            over_white(grey.repeat(3, 2), ALPHA),
            "grey, alpha over white",
        ),
        "palette": (see_through, flat, "palette with transparency over white"),
        "1 × 1": (saved(Image.fromarray(RGB[:1, :1])), RGB[:1, :1], ""),
    }


def test_what_can_be_converted_is_as_documented(tmp_path: Path) -> None:
    kinds = converted()
    folder = tmp_path / "patches"
    make_project(tmp_path, cases=["1"], patches=1)
    for number, (data, _, _) in enumerate(kinds.values()):
        (folder / helpers.patch_name("9", "match_1", "h&e", number)).write_bytes(data)
    report = answer(tmp_path, "extract")
    assert report["committed"] == len(kinds) + 1
    assert report["skipped"] == []
    assert report["converted"] == {how: 1 for _, _, how in kinds.values() if how}
    store = Store.open(tmp_path / "store")
    table = store.table("9").set_index("patch")
    features = store.bag("9").features
    for number, (kind, (_, pixels, _)) in enumerate(kinds.items()):
        row = table.loc[number]
        assert (row["height"], row["width"]) == pixels.shape[:2], kind
        found = [row["mean_red"], row["mean_green"], row["mean_blue"]]
        assert found == pytest.approx(pixels.mean((0, 1)), abs=0.01), kind
    # The same pixels have the same embedding, however they are stored.
    assert np.array_equal(features[0], features[1])
    assert np.isfinite(features).all()


def cmyk() -> bytes:
    return saved(Image.fromarray(RGB).convert("CMYK"), "JPEG")


REFUSED_BY_HEADER: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "the file is empty (0 bytes)"),
    "HTML": (lambda: b"<!DOCTYPE html>\n<html>404</html>", "is an HTML page"),
    "text": (lambda: b"not here\n", "is a text file"),
    "JPEG": (lambda: saved(Image.fromarray(RGB), "JPEG"), "is a JPEG"),
    "CMYK JPEG": (cmyk, "is a JPEG"),
    "TIFF": (lambda: saved(Image.fromarray(RGB), "TIFF"), "is a TIFF"),
    "GIF": (lambda: saved(Image.fromarray(RGB), "GIF"), "is a GIF"),
    "zeros": (lambda: bytes(5000), "zero bytes (a hole"),
    "20 bytes": (lambda: saved(Image.fromarray(RGB))[:20], "ends after 20 bytes"),
    "no size": (lambda: header(0, 5, 8, 2) + chunk(b"IEND", b""), "a size of 0 × 5 px"),
    "50,000 × 50,000": (
        lambda: header(50_000, 50_000, 8, 2) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""),
        "50,000 × 50,000 = 2,500,000,000 pixels",
    ),
}


def flipped() -> bytes:
    data = bytearray(saved(Image.fromarray(RGB)))
    data[len(data) // 2] ^= 1
    return bytes(data)


REFUSED_LATER: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: saved(Image.fromarray(RGB))[:-40], "the file is cut off"),
    "without its end": (lambda: saved(Image.fromarray(RGB))[:-12], "without its end chunk"),
    "one bit flipped": (flipped, "wrong checksum"),
    "too few rows": (
        lambda: header(41, 50, 8, 2) + png(RGB, 8, 2)[33:],  # every checksum is right
        "pixel data end early",
    ),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path, cases=3, patches=4)


def spoil(project: Path, data: bytes) -> str:
    name = helpers.patch_name("2", "match_1", "h&e", 3)
    (project / "patches" / name).write_bytes(data)
    return name


@pytest.mark.parametrize(("make", "says"), REFUSED_BY_HEADER.values(), ids=REFUSED_BY_HEADER)
def test_refused_from_the_header(project: Path, make: Callable[[], bytes], says: str) -> None:
    name = spoil(project, make())
    refused(project, "extract", says=("1 of 12 files cannot be used", name, says, "--on-bad-image skip"))


@pytest.mark.parametrize(("make", "says"), REFUSED_LATER.values(), ids=REFUSED_LATER)
def test_refused_when_it_is_decoded(project: Path, make: Callable[[], bytes], says: str) -> None:
    name = spoil(project, make())
    result = featstore(project, "extract")
    assert result.exit_code == 2
    for part in (name, says, "\n  to do: "):
        assert part in result.stderr
    if (project / "store").exists():  # what came before it is not lost, and it is not in
        assert name not in set(Store.open(project / "store").table()["path"])


def test_all_of_them_are_named_at_once(project: Path) -> None:
    folder = project / "patches"
    names = [helpers.patch_name("8", "match_1", "h&e", n) for n in range(len(REFUSED_BY_HEADER))]
    for name, (make, _) in zip(names, REFUSED_BY_HEADER.values(), strict=True):
        (folder / name).write_bytes(make())
    message = refused(project, "extract", says=(f"{len(names)} of {12 + len(names)} files",))
    assert sum(name in message for name in names) >= min(10, len(names))


def test_skipped_files_are_listed(project: Path) -> None:
    every = {**REFUSED_BY_HEADER, **REFUSED_LATER}
    names = [helpers.patch_name("2", "match_9", "h&e", n) for n in range(len(every))]
    for name, (make, _) in zip(names, every.values(), strict=True):
        (project / "patches" / name).write_bytes(make())
    report = answer(project, "extract", "--on-bad-image", "skip")
    assert report["committed"] == 12
    reasons = {item["path"]: item["reason"] for item in report["skipped"]}
    assert sorted(reasons) == sorted(names)
    table = (project / "reports" / "extract" / "skipped.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 1 + len(every)
    for name, (_, says) in zip(names, every.values(), strict=True):
        assert says in reasons[name]
        assert any(line.startswith(name) for line in table)
    assert set(Store.open(project / "store").table()["path"]).isdisjoint(names)
    # They are not done: the next run looks at them again, and stops where it may.
    before = listing(project / "store")
    assert featstore(project, "extract").exit_code == 2
    assert listing(project / "store") == before


@pytest.mark.parametrize("command", [("extract",), ("check",), ("extract", "--on-bad-image", "skip")])
def test_a_giant_does_not_fill_the_memory(project: Path, command: tuple[str, ...]) -> None:
    spoil(project, REFUSED_BY_HEADER["50,000 × 50,000"][0]())
    featstore(project, "check")  # what is imported on first use
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        result = featstore(project, *command)
        assert "2,500,000,000 pixels" in result.output
        assert result.exit_code == (2 if command == ("extract",) else 0)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500 << 10  # kB
