"""Fine-tuning on a GPU: the gradient of a CPU, mixed precision, and a host that does not wait."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from heads.training.finetune import FineTuning
from heads.training.live import LiveBackbone
from tests.heads.finetuned import SPLIT, Cached, make_cached, make_finetuning, numbers

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cached:
    return make_cached(tmp_path_factory.mktemp("cached"))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 means float32: not TF32, which rounds to 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(cached: Cached, amp: str = "off", **settings: object) -> FineTuning:
    return make_finetuning(cached, "abmil", device="cuda", amp=amp, augment=False, epochs=1, **settings)


def test_a_gpu_trains_as_a_cpu_does(cached: Cached) -> None:
    cpu = make_finetuning(cached, "abmil", augment=False, epochs=1)
    gpu = on_gpu(cached)
    cpu.run()
    gpu.run()
    assert gpu.bags.device.type == "cuda"
    mine, theirs = (torch.stack([loss.cpu() for *_, loss, _ in t.take_steps()]) for t in (gpu, cpu))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns(cached: Cached, amp: str) -> None:
    training = on_gpu(cached, amp)
    before = numbers({k: v.cpu().clone() for k, v in training.model.state_dict().items()})
    training.run()
    assert (numbers({k: v.cpu() for k, v in training.model.state_dict().items()}) != before).any()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in four_dimensional(training.live))


def four_dimensional(live: LiveBackbone) -> list[torch.Tensor]:
    return [p for p in live.module.parameters() if p.ndim == 4]


@pytest.mark.parametrize("chunk", [3, 1000])
def test_in_a_step_the_host_waits_for_nothing(cached: Cached, chunk: int) -> None:
    training = on_gpu(cached, "bf16", chunk=chunk)
    step = [training.bags.outlines[case] for case in SPLIT.train[:2]]
    for check in (False, True):  # the first one compiles, copies constants, and may wait
        plan = training.plan(step)
        asked = (c for _, sight in plan for c in sight.requests())
        with closing(training.bags.pixels.read(asked)) as pixels:
            torch.cuda.set_sync_debug_mode("error" if check else "default")
            try:
                _, loss = training.accumulate(plan, 2, pixels)
                training.update(loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_it_goes_on_within_an_epoch(cached: Cached) -> None:
    first = on_gpu(cached)
    received: list[int] = []
    first.run(stop=received, after_step=lambda training: received.append(15))
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = on_gpu(cached)
    second.load_state(torch.load(file, weights_only=True))
    second.run()
    assert second.finished
    assert second.progress.history[0]["grad_norm"] > 0
