"""Training held against its limit: bare matrix products, and a Python loop over slices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from featstore.bags import Bag, BagBatch
from featstore.cohort.splits import Split
from featstore.process import keep_freed_memory
from featstore.resident import CaseBags, case_of_row, memory_budget
from heads.config import Config, HeadConfig, TrainConfig, resolved
from heads.models.head import build_head
from heads.models.hierarchical import Hierarchical
from heads.training.data import standardized_once
from heads.training.loop import Training
from heads.training.optimizer import choose_amp

DIM, CLASSES = 1024, 2
STAINS, SLICES = 3, 5
LARGE, SMALL = 500, 20  # patches a slice
# A lab's cohort: 46 of 77 cases are trained on, with 39,723 patches in about 15 slices a case.
LAB_TRAIN, LAB_OTHER, LAB_PATCHES = 46, 31, 39_723


@dataclass(frozen=True)
class TrainBench:
    """Medians over rounds, in seconds; ratios are medians of the rounds' ratios.

    Attributes:
        step_seconds: Forward and backward pass of one case of 3 × 5 × 500 patches, float32.
        floor_seconds: Its matrix products alone.
        step_over_floor: The first over the second.
        small_step_seconds: Eight cases of 3 × 5 × 20 patches, packed.
        loop_seconds: The same, slice by slice in Python.
        small_floor_seconds: Their matrix products alone.
        above_floor: (packed − floor) / (loop − floor).
        epoch_seconds: A training epoch at the lab's size, in the precision that is the default here.
        precision: Which that is: ``bf16`` or ``off``.
        epoch_seconds_float32: The same epoch in float32.
        epoch_floor_seconds_float32: Its matrix products alone.
        epoch_seconds_bf16: The same epoch with bf16 autocast.
        epoch_floor_seconds_bf16: Its matrix products in bf16.
        validation_seconds: The 31 other cases, in the default's precision.
        device: Where.
        threads: On a CPU.
    """

    step_seconds: float
    floor_seconds: float
    step_over_floor: float
    small_step_seconds: float
    loop_seconds: float
    small_floor_seconds: float
    above_floor: float
    epoch_seconds: float
    precision: str
    epoch_seconds_float32: float
    epoch_floor_seconds_float32: float
    epoch_seconds_bf16: float
    epoch_floor_seconds_bf16: float
    validation_seconds: float
    device: str
    threads: int

    def to_text(self) -> str:
        """A line a measure."""

        def ms(seconds: float) -> str:
            return f"{1e3 * seconds:.1f} ms"

        return (
            f"hierarchical, {DIM} features, on {self.device} ({self.threads} threads); medians\n"
            f"step, 1 × {STAINS} × {SLICES} × {LARGE}   {ms(self.step_seconds)}   "
            f"matrix products {ms(self.floor_seconds)}   ratio {self.step_over_floor:.2f}\n"
            f"step, 8 × {STAINS} × {SLICES} × {SMALL}    {ms(self.small_step_seconds)}   "
            f"matrix products {ms(self.small_floor_seconds)}   slice by slice {ms(self.loop_seconds)}   "
            f"above the floor {self.above_floor:.2f} of the loop's\n"
            f"epoch, {LAB_TRAIN} cases, {LAB_PATCHES:,} patches\n"
            f"  float32  {self.epoch_seconds_float32:.3f} s   matrix products "
            f"{self.epoch_floor_seconds_float32:.3f} s\n"
            f"  bf16     {self.epoch_seconds_bf16:.3f} s   matrix products "
            f"{self.epoch_floor_seconds_bf16:.3f} s\n"
            f"  default here: train.amp {self.precision}\n"
            f"validation of {LAB_OTHER} cases, so too  {self.validation_seconds:.3f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return dict(vars(self))


def bench_train(device: str = "auto", rounds: int = 7) -> TrainBench:
    """Measure steps and epochs of the hierarchical head on made-up embeddings.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        rounds: Everything that is compared is measured once in each, in turn.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    where = torch.device(name)
    if where.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    large = _steps(MadeUpCases([LARGE * STAINS * SLICES], where), where)
    small = _steps(MadeUpCases([SMALL * STAINS * SLICES] * 8, where), where)
    small["loop"] = _by_slice(MadeUpCases([SMALL * STAINS * SLICES] * 8, where), where)
    epochs = _epochs(where)
    timed = [take_turns(each, where, rounds) for each in (large, small, epochs)]
    step, packed, epoch = timed
    ratio = [a / b for a, b in zip(step["step"], step["floor"], strict=True)]
    above = [
        (a - f) / (b - f) for a, b, f in zip(packed["step"], packed["loop"], packed["floor"], strict=True)
    ]
    median = statistics.median
    return TrainBench(
        step_seconds=median(step["step"]),
        floor_seconds=median(step["floor"]),
        step_over_floor=median(ratio),
        small_step_seconds=median(packed["step"]),
        loop_seconds=median(packed["loop"]),
        small_floor_seconds=median(packed["floor"]),
        above_floor=median(above),
        epoch_seconds=median(epoch[choose_amp("auto", where)]),
        precision=choose_amp("auto", where),
        epoch_seconds_float32=median(epoch["off"]),
        epoch_floor_seconds_float32=median(epoch["off floor"]),
        epoch_seconds_bf16=median(epoch["bf16"]),
        epoch_floor_seconds_bf16=median(epoch["bf16 floor"]),
        validation_seconds=median(epoch["validation"]),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
    )


class MadeUpCases(CaseBags):
    """Made-up cases in memory: 3 stains of 5 slices each, sizes given."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.device, self.views, self._views, self._standardized = device, 1, None, False
        self.memory = memory_budget("auto", device)
        self.outlines = {str(i): _outline(i, size, sum(sizes[:i])) for i, size in enumerate(sizes)}
        self._by_row = case_of_row(self.outlines)
        self._start = {case: first for first, case in self._by_row}
        self.resident = torch.randn(sum(sizes), DIM).half().to(device)


def _outline(number: int, size: int, first: int) -> Bag:
    slices = STAINS * SLICES
    sizes = np.full(slices, size // slices) + (np.arange(slices) < size % slices)
    return Bag(
        case_id=str(number),
        features=np.empty((size, 0), np.float16),
        rows=np.arange(first, first + size),
        patches=np.arange(size),
        slices=tuple(map(str, range(slices))),
        slice_sizes=sizes,
        stains=tuple(map(str, range(STAINS))),
        stain_sizes=np.full(STAINS, SLICES),
        stain_ids=np.arange(STAINS),
        label=number % CLASSES,
    )


def _steps(cohort: MadeUpCases, device: torch.device) -> dict[str, Callable[[], object]]:
    head = build_head(HeadConfig(), DIM, CLASSES).to(device).train()
    # Standardised once, as a training does it.
    held = standardized_once(cohort, head, TrainConfig(amp="off"))
    batch = held.batch(list(cohort.outlines.values()))

    def step() -> None:
        head.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(head(batch).logits, _labels(batch))
        torch.autograd.backward(loss)

    return {"step": step, "floor": _floor(batch.features.float())}


def _by_slice(cohort: MadeUpCases, device: torch.device) -> Callable[[], object]:
    """The same head, as it is usually written: a loop over cases, stains and slices."""
    built = build_head(HeadConfig(), DIM, CLASSES).to(device).train()
    assert isinstance(built, Hierarchical)
    head = built
    batch = cohort.batch(list(cohort.outlines.values()))
    ends = batch.slice_offsets.tolist()

    def pool(members: torch.Tensor, level: str) -> torch.Tensor:
        own: Any = head.pools[level]
        weights = torch.softmax(own.weight(own.dropout(torch.tanh(own.value(members)))), dim=0)
        return (weights * members).sum(dim=0)

    def step() -> None:
        head.zero_grad(set_to_none=True)
        logits, number = [], 0
        for _ in range(len(batch)):
            stains = []
            for _ in range(STAINS):
                slices = []
                for _ in range(SLICES):
                    x = batch.features[ends[number] : ends[number + 1]].float()
                    hidden = head.projector_dropout(torch.relu(head.projector(x)))
                    slices.append(pool(hidden, "patch"))
                    number += 1
                stains.append(pool(torch.stack(slices), "slice"))
            case = pool(torch.stack(stains), "stain")
            logits.append(head.classifier(head.classifier_dropout(case)))
        torch.autograd.backward(nn.functional.cross_entropy(torch.stack(logits), _labels(batch)))

    return step


def _floor(x: torch.Tensor) -> Callable[[], object]:
    """The products that no implementation can do without: projector and attention, both ways."""
    config = HeadConfig()
    first = torch.randn(config.embed_dim, DIM).to(x)
    second = torch.randn(config.attention_hidden, config.embed_dim).to(x)

    def products() -> None:
        hidden = x @ first.T
        inner = hidden @ second.T
        inner @ second  # the gradient of `hidden`
        inner.T @ hidden  # of `second`
        hidden.T @ x  # of `first`

    return products


def _epochs(device: torch.device) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(LAB_TRAIN, 8.0))
    sizes = np.maximum(STAINS * SLICES, (share * LAB_PATCHES).astype(int))
    sizes[0] += LAB_PATCHES - sizes.sum()
    other = [LAB_PATCHES // LAB_TRAIN] * LAB_OTHER
    cohort = MadeUpCases([*sizes.tolist(), *other], device)
    cases = list(cohort.outlines)
    split = Split(tuple(cases[:LAB_TRAIN]), tuple(cases[LAB_TRAIN:]), ())
    assert cohort.resident is not None
    found: dict[str, Callable[[], object]] = {}
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        config = resolved(Config(train=TrainConfig(amp=amp)))  # type: ignore[arg-type]
        head = build_head(config.head, DIM, CLASSES)
        training = Training(head, cohort, split, config.train, ("0", "1"))
        features = [cohort.features(case).to(dtype) for case in split.train]
        found[amp] = epoch_of(training)
        found[f"{amp} floor"] = _all([_floor(x) for x in features])
        if amp == choose_amp("auto", device):
            found["validation"] = _validation_of(training, split.val)
    return found


def epoch_of(training: Training) -> Callable[[], object]:
    """An epoch as `featstore train-head` runs it, without its validation."""

    def epoch() -> float:
        log, norms = training.learn(training.data.epoch(0), {})
        return log.summary(1)["loss"] + float(norms[-1])

    return epoch


def _validation_of(training: Training, cases: Sequence[str]) -> Callable[[], object]:
    return lambda: training.validate(cases).summary(1)


def _all(parts: Sequence[Callable[[], object]]) -> Callable[[], object]:
    return lambda: [part() for part in parts]


def _labels(batch: BagBatch) -> torch.Tensor:
    assert batch.labels is not None
    return batch.labels


def take_turns(
    measured: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(rounds + 1):
        for name, run in measured.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds
