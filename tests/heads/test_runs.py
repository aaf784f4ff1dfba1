"""Run folders: made exclusively, found again, and checkpoints that are read with suspicion."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from featstore.cohort.tables import write_csv
from featstore.errors import FeatstoreError
from featstore.files import replacing
from heads.config import Config, HeadConfig, RunsConfig, SubCases, TrainConfig, resolved
from heads.evaluation.checkpoints import identity_of, load_best, load_state, load_weights, save_state
from heads.evaluation.plots import save
from heads.evaluation.runs import (
    RunError,
    RunFolder,
    create_run,
    find_run,
    read_about,
    read_config,
    write_config,
    write_json,
    write_text,
)
from heads.models.head import build_head
from heads.training.course import Progress

NOW = datetime(2026, 3, 4, 5, 6, 7)
NAME = "run_20260304_050607"
SMALL = Config(head=HeadConfig(embed_dim=4, attention_hidden=3), train=TrainConfig(epochs=2))
DIM = 5
ABOUT = {
    "dim": DIM,
    "class_names": ["benign", "high_grade"],
    "labels": {"1": 0, "2": 1},
    "store": {"fingerprint": "abc"},
}


def state_of(weights: dict[str, torch.Tensor], epoch: int) -> dict[str, Any]:
    """All that a state holds."""
    rest: dict[str, Any] = {"ema": None, "scheduler": None, "class_weights": None}
    rest |= {"optimizer": {}, "scaler": {}, "progress": vars(Progress(epoch=epoch))}
    return {"head": weights, "best": weights, **rest}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of one epoch, as it lies on disk."""
    run = create_run(tmp_path / "runs", None)
    write_config(run.config, SMALL)
    write_json(run.about, ABOUT)
    weights = build_head(SMALL.head, DIM, 2, seed=3).state_dict()
    save_state(run, state_of(weights, 1), identity_of(SMALL, ABOUT))
    return run


def refuses(error: pytest.ExceptionInfo[RunError], *says: object) -> None:
    """A RunError that says what was found, expected, where and what to do."""
    text = str(error.value)
    for part in ("expected: ", "where: ", "to do: ", *map(str, says)):
        assert part in text


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_two_runs_in_the_same_second_get_two_folders(tmp_path: Path) -> None:
    made = [create_run(tmp_path / "deep" / "runs", None, NOW).path for _ in range(3)]
    assert [path.name for path in made] == [NAME, f"{NAME}-2", f"{NAME}-3"]
    assert all((path / "checkpoints").is_dir() for path in made)
    assert create_run(tmp_path / "deep" / "runs", "seed_1", NOW).path.name == f"{NAME}_seed_1"
    assert create_run(tmp_path / "deep" / "runs", "seed_1", NOW).path.name == f"{NAME}_seed_1-2"


def _make_runs(folder: Path, barrier: Any, answer: Any) -> None:
    barrier.wait()
    answer.put([create_run(folder, None, NOW).path.name for _ in range(40)])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # importing torch anew takes seconds
    barrier, answer = context.Barrier(3), context.Queue()
    children = [context.Process(target=_make_runs, args=(tmp_path, barrier, answer)) for _ in range(3)]
    for child in children:
        child.start()
    names = [name for _ in children for name in answer.get(timeout=60)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(names) == 120
    assert set(names) == {path.name for path in tmp_path.iterdir()}


def test_the_newest_finished_run_is_found(tmp_path: Path) -> None:
    runs = []
    for day in (9, 10, 10, 11):
        run = create_run(tmp_path, None, NOW.replace(day=day))
        write_json(run.about, ABOUT)
        runs.append(run)
    for run in runs[:3]:
        write_json(run.results, {})
    (tmp_path / "run_99999999_000000").mkdir()  # by somebody else
    assert find_run(tmp_path, None) == runs[2]
    assert runs[2].path.name.endswith("-2")
    assert find_run(tmp_path, None, finished=False) == runs[3]
    assert find_run(tmp_path, Path(runs[3].path.name)) == runs[3]
    assert find_run(tmp_path, runs[0].path) == runs[0]


def test_no_run_is_told_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        find_run(tmp_path / "runs", None)
    refuses(error, f"no finished run in {tmp_path / 'runs'}", "featstore train-head")
    unfinished = create_run(tmp_path / "runs", None)
    write_json(unfinished.about, ABOUT)
    with pytest.raises(RunError) as error:
        find_run(tmp_path / "runs", None)
    refuses(error, "but 1 unfinished", "--resume")
    with pytest.raises(RunError) as error:
        find_run(tmp_path / "runs", Path("run_1"))
    refuses(error, "run_1 is no run", tmp_path / "runs")


def test_a_resolved_config_comes_back_as_it_was(run: RunFolder) -> None:
    config = resolved(
        Config(
            classes={"no": ["01", "1e3"], "yes": ["2"]},
            exclude=["007"],
            groups={"a": ["1", "2"]},
            head=HeadConfig(name="dual_stream", options={"x": [1, {"y": None}]}, temperature_end=0.1 + 0.2),
            train=TrainConfig(
                lr=1e-6,
                weight_decay=2.3e-05,
                patience=None,
                class_weights={"no": 1.0, "yes": 2.53},
                reg_weight_l2={"patch": 1e-9},
                sub_cases=SubCases(n=2, by="slice", classes=["yes"]),
            ),
            runs=RunsConfig(suffix="1e5"),
        )
    )
    assert config.train.batch_size == 4
    write_config(run.config, config)
    again = read_config(run)
    assert again == config
    assert resolved(again) == again


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"null", b"\xff", b'{"dim": 3}'])
def test_a_damaged_description(run: RunFolder, content: bytes | None) -> None:
    run.about.unlink()
    if content is not None:
        run.about.write_bytes(content)
    with pytest.raises(RunError) as error:
        read_about(run)
    refuses(error, run.about)


def test_a_missing_config(run: RunFolder) -> None:
    run.config.unlink()
    with pytest.raises(FeatstoreError, match=r"config\.yaml"):
        read_config(run)


def test_state_and_best_weights_come_back_bit_for_bit(run: RunFolder) -> None:
    identity = identity_of(SMALL, ABOUT)
    weights = build_head(SMALL.head, DIM, 2, seed=3).state_dict()
    state = load_state(run.last, identity)
    assert Progress(**state["progress"]) == Progress(epoch=1)
    best = load_best(run, SMALL, ABOUT).state_dict()
    for name, value in weights.items():
        assert torch.equal(state["head"][name], value)
        assert torch.equal(best[name], value)
    assert not [path for path in run.last.parent.iterdir() if path.name.startswith(".")]
    save_state(run, state_of({}, 2), identity)
    assert load_state(run.last, identity)["progress"]["epoch"] == 2
    assert load_file(run.best).keys() == weights.keys()  # nothing better: it stays


class Touch:
    """What unpickling this runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "protocol 2"])
def test_code_in_a_checkpoint_is_refused_and_not_run(run: RunFolder, tmp_path: Path, how: str) -> None:
    trap = tmp_path / "trap"
    content = {"identity": identity_of(SMALL, ABOUT), "head": Touch(trap)}
    if how in ("torch", "legacy"):
        torch.save(content, run.last, _use_new_zipfile_serialization=how == "torch")
    else:
        run.last.write_bytes(pickle.dumps(content, protocol=2 if how == "protocol 2" else None))
    pickled = run.last.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on the pickle's protocol
        with pytest.raises(RunError) as error:
            load_state(run.last, identity_of(SMALL, ABOUT))
    refuses(error, "which can run code", run.last)
    assert not trap.exists()
    if how == "pickle":  # the trap works where nothing is in its way
        pickle.loads(pickled)
        assert trap.exists()
    run.best.write_bytes(pickled)
    with pytest.raises(RunError):
        load_best(run, SMALL, ABOUT)


def damaged(path: Path) -> list[bytes]:
    whole, chance = path.read_bytes(), random.Random(0)
    cut = [whole[: int(len(whole) * share)] for share in (0.0, 0.01, 0.3, 0.7, 0.99)]
    noise = [chance.randbytes(chance.randint(1, 60)) for _ in range(150)]
    legacy = path.with_name("legacy")
    torch.save({"identity": {}}, legacy, _use_new_zipfile_serialization=False)
    old = legacy.read_bytes()
    legacy.unlink()
    return [*cut, b"<html>", *noise, *(old[:n] for n in range(0, len(old), 3))]


@pytest.mark.parametrize("name", ["last", "best"])
def test_truncated_empty_or_garbage_checkpoints(run: RunFolder, name: str) -> None:
    path: Path = getattr(run, name)
    contents = damaged(path)
    path.unlink()
    raised = []
    for content in (None, *contents):
        if content is not None:
            path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch on pickle protocols
                if name == "last":
                    load_state(path, identity_of(SMALL, ABOUT))
                else:
                    load_best(run, SMALL, ABOUT)
            raised.append(("nothing", content))
        except Exception as error:
            told = isinstance(error, RunError) and "checkpoint cannot be read" in str(error)
            if not told or str(path) not in str(error):
                raised.append((repr(error), content))
    assert raised == []


@pytest.mark.parametrize("content", [3, [1], {"head": {}}, {"identity": None}, {"identity": ["head"]}])
def test_a_state_that_is_none(run: RunFolder, content: object) -> None:
    torch.save(content, run.last)
    with pytest.raises(RunError) as error:
        load_state(run.last, identity_of(SMALL, ABOUT))
    refuses(error, run.last)


@pytest.mark.parametrize(
    ("config", "about", "says"),
    [
        ({"head": HeadConfig(name="dual_stream")}, {}, ("'hierarchical'", "head 'dual_stream'")),
        ({"head": HeadConfig(embed_dim=8, attention_hidden=3)}, {}, ("embed_dim is 4", "embed_dim 8")),
        ({}, {"dim": 6}, ("dim is 5", "dim 6")),
        ({}, {"class_names": ["a", "b"]}, ("['benign', 'high_grade']", "['a', 'b']")),
        ({}, {"store": {"fingerprint": "xyz"}}, ("'abc'", "'xyz'")),
    ],
)
def test_a_checkpoint_of_another_training(
    run: RunFolder, config: dict[str, Any], about: dict[str, Any], says: tuple[str, ...]
) -> None:
    other, others = SMALL.model_copy(update=config), {**ABOUT, **about}
    with pytest.raises(RunError) as error:
        load_state(run.last, identity_of(other, others))
    refuses(error, *says, run.last)
    with pytest.raises(RunError) as error:
        load_best(run, other, others)
    refuses(error, *says, run.best)


@pytest.mark.parametrize("what", ["missing", "shape", "surplus"])
def test_weights_that_do_not_fit(run: RunFolder, what: str) -> None:
    weights = load_file(run.best)
    name = "classifier.weight" if "classifier.weight" in weights else sorted(weights)[0]
    shape = tuple(weights[name].shape)
    if what == "missing":
        del weights[name]
    elif what == "shape":
        weights[name] = torch.zeros(1, 2, 3)
    else:
        weights[name + "_2"] = torch.zeros(1)
    says = {"missing": ("missing", shape), "shape": ((1, 2, 3), shape), "surplus": ("no such weight",)}
    before = build_head(SMALL.head, DIM, 2)
    with pytest.raises(RunError) as error:
        load_weights(before, weights, run.best)
    refuses(error, name, *says[what], run.best)
    header = {"featstore": json.dumps(identity_of(SMALL, ABOUT))}
    save_file(weights, run.best, metadata=header)
    with pytest.raises(RunError) as error:
        load_best(run, SMALL, ABOUT)
    refuses(error, name)


@pytest.mark.parametrize("header", [None, {"featstore": "{"}, {"featstore": "[]"}, {"featstore": "{}"}])
def test_weights_that_do_not_say_whose_they_are(run: RunFolder, header: dict[str, str] | None) -> None:
    save_file(load_file(run.best), run.best, metadata=header)
    with pytest.raises(RunError) as error:
        load_best(run, SMALL, ABOUT)
    refuses(error, run.best)
    assert not [name for name in listed(run.path) if ".part" in name]


def _fails(rows: int) -> Iterator[tuple[str]]:
    yield from [("row",)] * rows
    raise OSError(28, "No space left on device")


def _half_a_picture(path: Path) -> None:
    figure = Figure()
    whole = figure.savefig

    def half(file: Path, **how: Any) -> None:
        whole(file, **how)
        raise OSError(28, "No space left on device")

    figure.savefig = half  # type: ignore[method-assign]
    save(figure, path)


def _full_disk(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: _written_half(path, data))
        write_text(path, "new text")


def _written_half(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(28, "No space left on device")


def _long_table(path: Path) -> None:
    write_csv(path, ["a"], _fails(9))


@pytest.mark.parametrize("write", [_long_table, _half_a_picture, _full_disk])
@pytest.mark.parametrize("before", [b"whole", None])
def test_a_file_that_is_not_written_to_the_end_leaves_the_old_one(
    tmp_path: Path, write: Callable[[Path], None], before: bytes | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match="No space"):
        write(path)
    left = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert left == ({"file": before} if before else {})


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "file"
    link.symlink_to(target)
    write_text(link, "text")
    assert (link.readlink(), target.read_text()) == (target, "text")
    with replacing(Path("/dev/null")) as aside:
        assert aside == Path("/dev/null")
    assert Path("/dev/null").is_char_device()
