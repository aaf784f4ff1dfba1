from __future__ import annotations

import pytest
import torch

from heads.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.26, 0.9])
@pytest.mark.parametrize("shape", [(401, 307), (100_003,)])
def test_it_drops_the_right_share_and_keeps_the_mean(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape, dtype=torch.float64)
    y = Dropout(p)(x)
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * error)
    assert y[y != 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=1e-4 / (1 - p))]
    # The rounding of p is made good exactly: the kept value and the share drawn for belong together.
    assert y.max().item() * (1 - round(p * 65536) / 65536) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("shape", [(8, 16), (40, 60), (601, 700)], ids=["few", "more", "many"])
def test_it_keeps_the_right_share_in_either_order_in_memory(
    shape: tuple[int, int], by_column: bool
) -> None:
    torch.manual_seed(3)
    dropout, device = Dropout(0.1), torch.device("cpu")
    drawn = [dropout.kept(shape, torch.float32, device, by_column) for _ in range(40)]
    assert {kept.shape for kept in drawn} == {shape}
    assert all(kept.t().is_contiguous() == by_column for kept in drawn)
    kept = torch.stack(drawn)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    error = (0.1 * 0.9 / kept.numel()) ** 0.5
    assert kept.mean().item() == pytest.approx(0.9, abs=5 * error)


def test_rows_and_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(1)
    kept = (Dropout(0.5)(torch.ones(64, 4096)) != 0).double() - 0.5
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(4, 1)):
        assert abs((kept * other).mean().item()) < 0.25 * 5 / (64 * 4096) ** 0.5


def test_the_gradient_passes_where_values_do_and_the_seed_decides() -> None:
    dropout, x = Dropout(0.3), torch.randn(50, 40, requires_grad=True)
    torch.manual_seed(2)
    y = dropout(x)
    y.sum().backward()
    torch.manual_seed(2)
    assert torch.equal(dropout(x), y)
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, dropout(torch.ones(50, 40)).max()))
    assert not torch.equal(dropout(x), y)


def test_nothing_is_dropped_in_evaluation_or_at_zero() -> None:
    x = torch.randn(5, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert Dropout(0.3)(x.bfloat16()).dtype == torch.bfloat16
