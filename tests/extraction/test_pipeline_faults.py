"""What may go wrong while a pass runs: decoders that fail or die, files that change, disks that stall.

The run ends with a message or goes on as it was told; what was computed is committed, the same command
completes the store, and nothing waits for ever.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.errors import FeatstoreError, ImageError
from featstore.extraction import committer as committing
from featstore.extraction import extract, loading, pipeline
from featstore.extraction.pytorch import TorchEmbedder
from featstore.store import StoreWriter, files
from featstore.store.records import read_manifest
from featstore.store.verify import verify
from tests import command_line, helpers
from tests.extraction.conftest import Contents, Zygote, config_of, contents, make_project
from tests.extraction.test_extract import run
from tests.extraction.zygote import Steps

CASES, PATCHES, BATCH, WORKERS = 3, 12, 4, 2
TOTAL = CASES * PATCHES
FIRST, MIDDLE, LAST = 0, TOTAL // 2 + 1, TOTAL - 1


# Pipes that somebody waited for.
held_up: list[Path] = []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents]:
    """A project, and what an undisturbed run makes of it."""
    project = make_project(
        tmp_path_factory.mktemp("reference"), cases=CASES, stains=("h&e",), slices=1, patches=PATCHES
    )
    assert run(project).committed == TOTAL
    return project, contents(project / "store")


@pytest.fixture
def project(reference: tuple[Path, Contents], tmp_path: Path) -> Iterator[Path]:
    """A copy without a store; at the end no thread of a run may be left."""
    ignored = shutil.ignore_patterns("store", "reports")
    yield shutil.copytree(reference[0], tmp_path / "project", ignore=ignored)
    assert [thread.name for thread in threading.enumerate() if "featstore" in thread.name] == []
    assert held_up == []


@pytest.fixture
def whole(reference: tuple[Path, Contents]) -> Contents:
    return reference[1]


def names(project: Path) -> list[str]:
    """The patches in the order of the patch table."""
    table = [(i, n) for i in range(1, CASES + 1) for n in range(1, PATCHES + 1)]
    return [helpers.patch_name(str(case), "match_1", "h&e", patch) for case, patch in table]


def committed(project: Path, whole: Contents) -> int:
    """How many embeddings are committed: nothing but those of an undisturbed run, undamaged."""
    if read_manifest(project / "store") is None:
        return 0
    found = contents(project / "store")
    assert found.items() <= whole.items()
    assert verify(project / "store", "full").damage == []
    return len(found)


def complete(project: Path, whole: Contents, missing: int) -> None:
    """The same command computes just what is missing."""
    assert run(project).committed == missing
    assert contents(project / "store") == whole


# Decoders


class CodecError(Exception):
    """What some library might raise."""


class Vanishing(BaseException):
    """Not even an Exception."""


ERRORS: dict[str, tuple[BaseException, type[BaseException], str]] = {
    "memory": (MemoryError(), FeatstoreError, "memory ran out while {} was read and decoded"),
    "library": (CodecError("row 7"), ImageError, "{}: the decoder failed (CodecError: row 7)"),
    "exit": (SystemExit(0), FeatstoreError, "the decoder gave up on {} (SystemExit)"),
    "base": (Vanishing(), FeatstoreError, "the decoder gave up on {} (Vanishing)"),
    "interrupt": (KeyboardInterrupt(), KeyboardInterrupt, ""),
}


def let_decoding_raise(patch: pytest.MonkeyPatch, victim: str, error: BaseException) -> None:
    real = loading.decode

    def decode(data: bytes, name: str, *arguments: Any) -> Any:
        if name == victim:
            raise error
        return real(data, name, *arguments)

    patch.setattr(loading, "decode", decode)


IN_SHORT = {
    ("memory", FIRST),
    ("memory", LAST),
    ("library", MIDDLE),
    ("exit", MIDDLE),
    ("interrupt", MIDDLE),
}


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        pytest.param(kind, at, marks=() if (kind, at) in IN_SHORT else pytest.mark.slow)
        for kind in ERRORS
        for at in (FIRST, MIDDLE, LAST)
    ],
)
def test_an_error_in_a_decoding_thread_ends_the_run_and_loses_nothing(
    project: Path, whole: Contents, monkeypatch: pytest.MonkeyPatch, kind: str, at: int
) -> None:
    raised, expected, says = ERRORS[kind]
    victim = names(project)[at]
    # What is no fault of the file ends the run even where bad images are skipped.
    policy = "stop" if expected is ImageError else "skip"
    with monkeypatch.context() as patch:
        let_decoding_raise(patch, victim, raised)
        with pytest.raises(expected) as told:
            run(project, images__on_bad_image=policy)
    assert type(told.value) is expected
    assert says.format(victim) in str(told.value)
    # Those before a bad image are computed, too; other errors cost the batch that they fall into.
    found = committed(project, whole)
    assert found == (at if expected is ImageError else at // BATCH * BATCH)
    complete(project, whole, TOTAL - found)


def test_an_error_of_a_decoding_library_can_be_skipped(
    project: Path, whole: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = names(project)[MIDDLE]
    with monkeypatch.context() as patch:
        let_decoding_raise(patch, victim, CodecError("row 7"))
        report = run(project, images__on_bad_image="skip")
    assert report.skipped == [(victim, "the decoder failed (CodecError: row 7)")]
    assert committed(project, whole) == TOTAL - 1


def test_memory_that_runs_out_while_writing_is_told_as_that(
    project: Path, whole: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: Any, **named: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", no_memory)
        result = command_line.featstore(project, "extract")
    assert result.exit_code == 2
    assert "memory ran out while embeddings were being written" in result.stderr
    assert "\n  to do: " in result.stderr
    complete(project, whole, TOTAL)


@pytest.mark.parametrize("kind", ["memory", pytest.param("exit", marks=pytest.mark.slow)])
def test_the_command_says_so_and_ends_with_two(
    project: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    raised, _, says = ERRORS[kind]
    victim = names(project)[MIDDLE]
    let_decoding_raise(monkeypatch, victim, raised)
    result = command_line.featstore(project, "extract")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"featstore extract: {says.format(victim)}\n")
    assert "\n  to do: " in result.stderr


@pytest.mark.parametrize(
    ("name", "at"),
    [
        pytest.param(name, at, marks=() if name == "SIGSEGV" and at else pytest.mark.slow)
        for name in ("SIGSEGV", "SIGKILL")
        for at in (FIRST, MIDDLE, LAST)
    ],
)
def test_a_decoder_that_takes_the_process_with_it_costs_what_was_not_committed(
    zygote: Zygote, project: Path, whole: Contents, name: str, at: int
) -> None:
    codes, _, _ = zygote.run({"project": project, "dies_of": names(project)[at], "signal": name})
    assert codes == [-getattr(signal, name)]
    found = committed(project, whole)
    assert found % PATCHES == 0  # whole cases
    assert found <= at
    codes, reports, _ = zygote.run({"project": project})
    assert codes == [0], reports
    assert reports[0]["committed"] == TOTAL - found
    assert contents(project / "store") == whole


# Files that change between the look at their headers and their reading


def another_size(file: Path) -> None:
    helpers.noise_patch(np.random.default_rng(9), 72).save(file)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)

    def let_go() -> None:
        with suppress(OSError):
            os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
            held_up.append(file)

    # Whoever waits for a writer to the pipe fails its test, but does not hang it.
    timer = threading.Timer(20, let_go)
    timer.daemon = True
    timer.start()


def replace_by_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def fail_to_open(file: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "vanishes": (Path.unlink, "No such file or directory"),
    "is emptied": (lambda file: os.truncate(file, 0), "the file is empty"),
    "shrinks": (lambda file: os.truncate(file, file.stat().st_size - 20), "the file is cut off"),
    "becomes a folder": (replace_by_folder, "Is a directory"),
    "becomes a pipe": (replace_by_pipe, "not a regular file any more"),
    "becomes a device": (replace_by_device, "not a regular file any more"),
    "cannot be read": (fail_to_open, "Input/output error"),
}
# Of equal sizes several patches share a forward pass, and one of another size is no longer with them.
NATIVE = {"backbone__resize": "native"}
NATIVE_FAULTS = FAULTS | {"gets another size": (another_size, "72 × 72 px now")}


def change_when_opened(
    patch: pytest.MonkeyPatch, project: Path, changes: dict[str, Callable[[Path], None]]
) -> None:
    real = loading.open_at_once

    def opened(path: str, flags: int) -> int:
        change = changes.pop(Path(path).name, None)
        if change is not None:
            change(Path(path))
        return real(path, flags)

    patch.setattr(loading, "open_at_once", opened)


def restore(project: Path, reference: tuple[Path, Contents], victim: str) -> None:
    file = project / "patches" / victim
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)
    shutil.copy2(reference[0] / "patches" / victim, file)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name in ("vanishes", "becomes a pipe") else pytest.mark.slow)
        for name in FAULTS  # the others are in the next test
    ],
)
def test_a_file_that_changes_before_it_is_read_stops_the_run_by_name(
    reference: tuple[Path, Contents], project: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    change, says = FAULTS[fault]
    victim = names(project)[MIDDLE]
    with monkeypatch.context() as patch:
        change_when_opened(patch, project, {victim: change})
        with pytest.raises(ImageError) as told:
            run(project)
    assert says in str(told.value)
    assert victim in str(told.value)
    assert told.value.fix
    assert committed(project, reference[1]) == MIDDLE
    restore(project, reference, victim)
    complete(project, reference[1], TOTAL - MIDDLE)


@pytest.mark.parametrize("settings", [{}, NATIVE], ids=["one size", "native"])
def test_files_that_change_before_they_are_read_are_skipped_by_name(
    reference: tuple[Path, Contents],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    faults = NATIVE_FAULTS if settings else FAULTS
    expected = reference[1]
    if settings:
        run(project, **settings, store__path="undisturbed")
        expected = contents(project / "undisturbed")
    victims = dict(zip(names(project)[::4], faults, strict=False))  # the first among them
    assert len(victims) == len(faults)
    with monkeypatch.context() as patch:
        change_when_opened(patch, project, {name: faults[fault][0] for name, fault in victims.items()})
        report = run(project, **settings, images__on_bad_image="skip")
    assert report.committed == TOTAL - len(faults)
    reasons = dict(report.skipped)
    assert reasons.keys() == victims.keys()
    for victim, fault in victims.items():
        assert faults[fault][1] in reasons[victim]
        restore(project, reference, victim)
    assert contents(project / "store").items() <= expected.items()
    assert run(project, **settings).committed == len(faults)
    assert contents(project / "store") == expected


def test_a_patch_that_is_replaced_is_embedded_as_it_is_when_it_is_read(
    project: Path, whole: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = names(project)[MIDDLE]
    with monkeypatch.context() as patch:
        change_when_opened(patch, project, {victim: another_size})
        assert run(project).committed == TOTAL
    found = contents(project / "store")
    assert {key for key in whole if found[key] != whole[key]} == {
        ("2", "h&e", "match_1", MIDDLE % PATCHES + 1)
    }
    # What is recorded of the file is what it was then, and nothing is left to do.
    assert len(run(project).plan.pending) == 0


def test_a_file_that_grows_while_it_is_read_is_read_as_long_as_it_was_and_looked_at_again(
    project: Path, whole: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = names(project)[MIDDLE]
    real, files_read = loading.check_size, []

    def growing(size: int, most: int, name: str) -> None:
        if name == victim and not files_read:
            files_read.append(name)
            with (project / "patches" / name).open("ab") as file:
                file.write(bytes(1 << 20))
        real(size, most, name)

    monkeypatch.setattr(loading, "check_size", growing)
    assert run(project).committed == TOTAL
    assert contents(project / "store") == whole
    assert files_read == [victim]
    report = run(project)
    assert (report.plan.changed, report.committed) == (1, 1)


# Disks that stall


class Stall:
    """Holds one call up until nothing else has moved for a while, and notes what has by then.

    Args:
        signals: Are then sent to this process, one after the other.

    Attributes:
        moved: How often each kind of step was made.
        at_standstill: The same when nothing moved any more.
        seconds: For how long nothing moved.
    """

    def __init__(self, *signals: int) -> None:
        self.moved: Counter[str] = Counter()
        self.at_standstill: Counter[str] = Counter()
        self.seconds = 0.0
        self._signals = signals
        self._computing = 0.0
        self._lock = threading.Lock()

    def move(self, name: str, count: int = 1) -> None:
        with self._lock:
            self.moved[name] += count

    def computed(self, patches: int, seconds: float) -> None:
        self.move("computed", patches)
        self._computing += seconds

    def hold(self) -> None:
        if self.seconds:
            return  # a later run, or a later call of this one
        for number in (None, *self._signals):
            if number is not None:
                os.kill(os.getpid(), number)
            # Longer than all the computing so far: what the run is bound by is then no question.
            self._wait_for_standstill(0.2 + 2 * self._computing)
            if number is None:
                self.at_standstill = self.moved.copy()
            else:
                assert self.at_standstill == self.moved, "nothing new is begun after a signal"

    def _wait_for_standstill(self, quiet: float) -> None:
        seen: Counter[str] | None = None
        while seen != self.moved:
            seen = self.moved.copy()
            started = time.monotonic()
            time.sleep(quiet)
            self.seconds += time.monotonic() - started


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stall]:
    """Prepare a stall of reading one file, or of the writer's first fsync."""
    # Small patches would all go into the window of pixels.
    monkeypatch.setattr(pipeline, "_PIXELS_AHEAD", 0)
    monkeypatch.setattr(committing, "_QUEUED", 2 * BATCH)

    def prepare(*signals: int, reading: str | None = None) -> Stall:
        stall = Stall(*signals)
        check_size, decode, call = loading.check_size, loading.decode, TorchEmbedder.__call__

        def begin_reading(size: int, most: int, name: str) -> None:
            stall.move("begun")
            if name == reading:
                stall.hold()
            check_size(size, most, name)

        def decode_and_note(*arguments: Any) -> Any:
            decoded = decode(*arguments)
            stall.move("decoded")
            return decoded

        def compute(self: TorchEmbedder, pixels: np.ndarray) -> Any:
            started = time.monotonic()
            features = call(self, pixels)
            stall.computed(len(pixels), time.monotonic() - started)
            return features

        def write(number: int, step: Callable[[], Any]) -> Any:
            if threading.current_thread().name == "featstore-committer":
                stall.hold()
            return step()

        monkeypatch.setattr(loading, "check_size", begin_reading)
        monkeypatch.setattr(loading, "decode", decode_and_note)
        monkeypatch.setattr(TorchEmbedder, "__call__", compute)
        if reading is None:
            monkeypatch.setattr(files, "os", Steps(("fsync",), write))
        return stall

    return prepare


def observed_run(project: Path) -> tuple[Any, list[tuple[str, int]]]:
    """A run's report, and what its bar showed: what it was bound by, and how far it was."""
    shown: list[tuple[str, int]] = []
    report = extract(
        config_of(project),
        project,
        observe=lambda progress: shown.append((progress.bound_by, progress.done)),
    )
    return report, shown


def test_while_one_file_cannot_be_read_the_others_are_up_to_a_bound(
    project: Path, whole: Contents, stalled: Callable[..., Stall]
) -> None:
    at = BATCH + 1
    stall = stalled(reading=names(project)[at])
    report, shown = observed_run(project)
    then = stall.at_standstill
    # Whole batches before it are computed, and its own is not begun.
    assert then["computed"] == BATCH
    # Others are decoded and read meanwhile, but not all: pixels, then files, each so far ahead.
    assert BATCH + at < then["decoded"] < then["computed"] + BATCH + 2 * BATCH + 2 * WORKERS
    assert then["decoded"] < then["begun"] <= then["decoded"] + 1 + 2 * WORKERS + 8
    assert then["begun"] < TOTAL
    # It is told as waiting for decoding, as soon as it is over.
    progress = report.progress
    assert progress.waited_for_decoding > 0.9 * stall.seconds > progress.forward
    assert (shown[1], report.to_json()["bound_by"]) == (("decoding", 2 * BATCH), "decoding")
    assert progress.reading > 0.9 * stall.seconds
    assert report.committed == TOTAL
    assert committed(project, whole) == TOTAL


def test_while_the_store_cannot_be_written_batches_are_computed_up_to_a_bound(
    project: Path, whole: Contents, stalled: Callable[..., Stall]
) -> None:
    stall = stalled()
    report, shown = observed_run(project)
    then = stall.at_standstill
    # Case 1 waits for its fsync; behind it the queue fills, and one batch more waits for a place.
    assert PATCHES + BATCH < then["computed"] <= PATCHES + 2 * BATCH + BATCH
    assert then["decoded"] < TOTAL
    progress = report.progress
    assert progress.waited_for_writing > 0.9 * stall.seconds > progress.forward
    assert progress.writing > 0.9 * stall.seconds
    assert (shown[-1], report.to_json()["bound_by"]) == (("writing", TOTAL), "writing")
    assert report.committed == TOTAL
    assert committed(project, whole) == TOTAL


@pytest.mark.parametrize("disk", ["reading", "writing"])
def test_sigterm_in_a_stall_ends_the_run_with_all_that_was_computed(
    project: Path, whole: Contents, stalled: Callable[..., Stall], disk: str
) -> None:
    stall = stalled(signal.SIGTERM, reading=names(project)[PATCHES + 1] if disk == "reading" else None)
    report, _ = observed_run(project)
    assert report.interrupted == signal.SIGTERM
    found = committed(project, whole)
    assert PATCHES <= found == report.committed == stall.moved["computed"] < TOTAL
    complete(project, whole, TOTAL - found)


@pytest.mark.parametrize("disk", ["reading", pytest.param("writing", marks=pytest.mark.slow)])
def test_a_second_ctrl_c_in_a_stall_gives_up_the_batch_but_not_what_was_computed(
    project: Path, whole: Contents, stalled: Callable[..., Stall], disk: str
) -> None:
    signals = signal.SIGINT, signal.SIGINT
    stall = stalled(*signals, reading=names(project)[PATCHES + 1] if disk == "reading" else None)
    with suppress(KeyboardInterrupt):
        observed_run(project)
    found = committed(project, whole)
    handed_over = stall.moved["computed"] - (BATCH if disk == "writing" else 0)
    assert PATCHES <= found == handed_over < TOTAL
    complete(project, whole, TOTAL - found)
