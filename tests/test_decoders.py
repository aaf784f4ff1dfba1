"""libdeflate and libspng against Pillow: the same pixels, the same refusals, less memory."""

import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore import decoders
from featstore.errors import ImageError
from featstore.images import decode, decoder_name
from featstore.png import PngHeader, checked_chunks, file_of, read_header
from tests.test_images import CHANNELS, ROOM, chunk, png

imagecodecs = pytest.importorskip("imagecodecs")

KINDS = [0, 2, 3, 6]  # grey, RGB, palette, RGB + alpha
PALETTE = bytes(range(256)) * 3
fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def without(monkeypatch):
    """Decodes as where imagecodecs is not installed."""

    def run(data):
        with monkeypatch.context() as patch:
            patch.setattr(decoders, "_codecs", lambda: None)
            return outcome(data)

    return run


@pytest.fixture(params=["whole", "strips", "steps"])
def way(request, monkeypatch):
    """All rows at once; in strips of some rows; inflated in steps as for giants."""
    if request.param != "whole":
        monkeypatch.setattr(decoders, "STRIP_BYTES", 70)
    if request.param == "steps":
        monkeypatch.setattr(decoders, "WHOLE_BYTES", 0)
        monkeypatch.setattr(decoders, "STEP_BYTES", 7)
    return request.param


def outcome(data):
    """Pixels, or the reason for the refusal."""
    try:
        found = decode(data, "a.png", "rgb", ROOM)
    except ImageError as error:
        return str(error)
    return found.pixels.tolist(), found.converted


def fast(data):
    """What libdeflate and libspng make of the pixel data, without Pillow to fall back on."""
    chunks = checked_chunks(data, "a.png")
    return decoders._with_libspng(imagecodecs, read_header(data, "a.png", ROOM), chunks)


def file(color, size, stream, pieces=1):
    """An 8-bit file around a zlib stream; every chunk's checksum is right."""
    header = PngHeader(size[1], size[0], 8, color, False)
    palette = [chunk(b"PLTE", PALETTE)] if color == 3 else []
    step = max(1, -(-len(stream) // pieces))
    cut = [stream[i : i + step] for i in range(0, len(stream), step)] or [b""]
    return file_of(header, palette + [chunk(b"IDAT", part) for part in cut])


def filtered_rows(color, size, seed):
    """Random bytes under random filters: each is somebody's picture."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (size[0], 1 + size[1] * CHANNELS[color]), np.uint8)
    rows[:, 0] = rng.integers(0, 5, size[0])
    return rows.tobytes()


SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))
SEEDS = st.integers(0, 2**32 - 1)


@fuzz
@given(
    st.sampled_from(KINDS), SIZES, SEEDS, st.integers(0, 9), st.sampled_from([9, 12, 15]), st.integers(1, 9)
)
def test_every_filter_gives_the_pixels_of_pillow(way, without, color, size, seed, level, window, pieces):
    packer = zlib.compressobj(level, wbits=window)
    stream = packer.compress(filtered_rows(color, size, seed)) + packer.flush()
    data = file(color, size, stream, pieces)
    found = fast(data)
    assert found is not None
    assert found.shape == (*size, CHANNELS[color])[: 2 if CHANNELS[color] == 1 else 3]
    with_it = outcome(data)
    assert not isinstance(with_it, str)
    assert with_it == without(data)


def _far_distance():
    """A stream that refers further back than the window that it declares."""
    packer = zlib.compressobj(9, wbits=15)
    random = np.random.default_rng(0).integers(0, 256, 2_000, np.uint8).tobytes()
    rows = b"\0" + random + random + bytes(2_000)
    stream = bytearray(packer.compress(rows) + packer.flush())
    stream[0] = 0x08  # a window of 256 bytes
    stream[1] = 31 - (stream[0] << 8) % 31
    return (1, 6_000), bytes(stream)


ROWS = filtered_rows(2, (6, 7), 0)
GOOD = zlib.compress(ROWS)
DAMAGED = {
    "a filter that PNG does not have": ((6, 7), zlib.compress(b"\5" + ROWS[1:])),
    "a bad filter in the last row": ((6, 7), zlib.compress(ROWS[:-22] + b"\xff" + ROWS[-21:])),
    "a row too many": ((6, 7), zlib.compress(ROWS + ROWS[-22:])),
    "a byte too many": ((6, 7), zlib.compress(ROWS + b"x")),
    "a row too few": ((6, 7), zlib.compress(ROWS[:-22])),
    "a byte too few": ((6, 7), zlib.compress(ROWS[:-1])),
    "a black end that is missing": ((6, 7), zlib.compress(ROWS[:-22] + bytes(21))),
    "a wrong checksum of the stream": ((6, 7), GOOD[:-1] + bytes([GOOD[-1] ^ 1])),
    "no checksum of the stream": ((6, 7), GOOD[:-4]),
    "half a stream": ((6, 7), GOOD[: len(GOOD) // 2]),
    "no stream": ((6, 7), b""),
    "no pixels": ((6, 7), zlib.compress(b"")),
    "bytes after the stream": ((6, 7), GOOD + b"more"),
    "a second stream": ((6, 7), GOOD + GOOD),
    "no zlib header": ((6, 7), GOOD[2:]),
    "another method": ((6, 7), bytes([GOOD[0] ^ 1]) + GOOD[1:]),
    "a distance beyond the window of the stream": _far_distance(),
    "a bomb": ((6, 7), zlib.compress(ROWS + bytes(10**7))),
}


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_behind_right_checksums_ends_as_with_pillow(way, without, kind, pieces):
    size, stream = DAMAGED[kind]
    color = 0 if size[0] == 1 else 2
    data = file(color, size, stream, pieces)
    assert outcome(data) == without(data)


@pytest.mark.parametrize("kind", [k for k in DAMAGED if "stream" not in k or "wrong" in k])
def test_the_fast_decoder_by_itself_takes_nothing_that_is_not_in_order(way, kind):
    """Also what Pillow lets pass, such as bytes too many: it is left to it."""
    size, stream = DAMAGED[kind]
    color = 0 if size[0] == 1 else 2
    assert fast(file(color, size, stream)) is None
    assert fast(file(2, (6, 7), GOOD)) is not None


@fuzz
@given(st.sampled_from(KINDS), SIZES, SEEDS, st.data())
def test_flipped_bits_behind_right_checksums_end_as_with_pillow(way, without, color, size, seed, source):
    stream = bytearray(zlib.compress(filtered_rows(color, size, seed)))
    for bit in source.draw(st.lists(st.integers(0, 8 * len(stream) - 1), max_size=3, unique=True)):
        stream[bit // 8] ^= 1 << bit % 8
    data = file(color, size, bytes(stream[: source.draw(st.integers(0, len(stream)))]))
    assert outcome(data) == without(data)


@fuzz
@given(st.sampled_from(KINDS), SIZES, SEEDS, st.data())
def test_rows_under_any_byte_for_a_filter_end_as_with_pillow(way, without, color, size, seed, source):
    rows = np.frombuffer(filtered_rows(color, size, seed), np.uint8).reshape(size[0], -1).copy()
    rows[source.draw(st.integers(0, size[0] - 1)), 0] = source.draw(st.integers(0, 255))
    data = file(color, size, zlib.compress(rows.tobytes()))
    assert outcome(data) == without(data)


@pytest.mark.parametrize(
    ("color", "depth", "interlaced"),
    [
        (0, 1, False),
        (0, 4, False),
        (4, 8, False),
        (2, 16, False),
        (6, 16, False),
        (2, 8, True),
        (0, 8, True),
    ],
)
def test_kinds_that_are_left_to_pillow(color, depth, interlaced):
    """One pixel wide, some have just as many bytes as a kind that is taken, in another order."""
    samples = np.arange(9 * CHANNELS[color]).reshape(9, 1, -1) % 2**depth
    assert fast(png(samples, color, depth, interlaced)) is None


def test_common_kinds_never_reach_pillow(way, monkeypatch):
    monkeypatch.setattr(decoders, "_with_pillow", lambda *_: pytest.fail("Pillow was asked"))
    for color in KINDS:
        decode(file(color, (9, 8), zlib.compress(filtered_rows(color, (9, 8), 1))), "a.png", "rgb", ROOM)
    key = [(b"tRNS", bytes(6))]
    assert decode(png(np.zeros((4, 5, 3), int), 2, 8, extra=key), "a.png", "rgb", ROOM).pixels.all()


def test_rows_longer_than_a_strip_and_than_a_stored_block(without):
    for size in ((3, 100_000), (700, 300)):
        data = file(2, size, zlib.compress(filtered_rows(2, size, 2), 1))
        assert fast(data) is not None
        assert outcome(data) == without(data)


def test_where_imagecodecs_is_not_installed_pillow_decodes(monkeypatch):
    assert "libspng" in decoder_name()
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    decoders._codecs.cache_clear()
    try:
        assert decoder_name().startswith("Pillow ")
        assert not isinstance(outcome(file(2, (6, 7), GOOD)), str)
    finally:
        decoders._codecs.cache_clear()


@pytest.mark.parametrize("part", ["deflate_decode", "spng_decode"])
def test_other_threads_run_while_a_patch_is_decoded(part):
    """With so long a turn, nobody else runs unless the decoder itself gives way."""
    size = (1500, 1500)
    rows = filtered_rows(2, size, 0)
    header = PngHeader(size[1], size[0], 8, 2, False)
    data = {
        "deflate_decode": zlib.compress(rows, 1),
        "spng_decode": decoders._stored_file(imagecodecs, header, rows),
    }[part]
    work = getattr(imagecodecs, part)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        assert any(_seen_running(lambda: work(data)) for _ in range(30))
    finally:
        sys.setswitchinterval(before)


def _seen_running(work):
    started, ended = threading.Event(), []

    def run():
        started.set()
        work()
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    seen = not ended
    thread.join()
    return seen


MEMORY = """
import sys
from pathlib import Path
from featstore.images import decode, decoder_name
decoder_name()
data = Path(sys.argv[1]).read_bytes()
def peak():  # not getrusage, which starts from the peak of whoever started this process
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
before = peak()
pixels = decode(data, "a.png", "rgb", 10**8).pixels
assert pixels[-1].any()
print(peak() - before - pixels.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("side", [3600, pytest.param(7576, marks=pytest.mark.slow)])
def test_a_giant_takes_its_file_its_pixels_and_little_more(tmp_path, side):
    """Of 7,576 px: 164 MiB of pixels. Pillow alone takes two and a half times as much on top."""
    tissue = _tissue_like(side)
    packed = zlib.compressobj(1)
    rows = np.concatenate([np.ones((side, 1), np.uint8), tissue.reshape(side, -1)], 1)
    stream = packed.compress(rows) + packed.flush()
    (tmp_path / "giant.png").write_bytes(file(2, (side, side), stream, 50))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "giant.png")]
    more = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert more < 16 << 20


def _tissue_like(side):
    """(side, side, 3) filtered differences of a noisy texture: they compress as those of tissue do."""
    noise = np.random.default_rng(0).normal(0, 4, (side, 3 * 1024)).astype(np.int8).view(np.uint8)
    return np.tile(noise, (1, -(-side // 1024)))[:, : 3 * side].reshape(side, side, 3)


def test_a_file_of_stored_rows_is_one_that_anybody_reads():
    size = (200, 300)
    rows = filtered_rows(2, size, 4)
    data = decoders._stored_file(imagecodecs, PngHeader(300, 200, 8, 2, False), rows)
    np.testing.assert_array_equal(
        decode(data, "a.png", "rgb", ROOM).pixels,
        decode(file(2, size, zlib.compress(rows)), "a.png", "rgb", ROOM).pixels,
    )
    assert struct.unpack(">I", data[33:37])[0] == data.index(b"IEND") - 4 - 4 - 41
