"""Deletion and insertion curves against the head on bags of which patches were taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featstore.bags import Bag, collate
from heads.inspect.curves import FRACTIONS, area, curves
from heads.models import head as head_module
from heads.models.config import AttentionConfig
from heads.models.head import Head
from tests.heads.bags import make_bag
from tests.inspect.brute_force import (
    CLASSES,
    DIM,
    DUAL_STREAM,
    EVERY,
    Variant,
    make_cases,
    make_head,
    named,
    say,
    schedule_of,
)
from tests.inspect.test_probing import Mine

SOME = [variant for variant in EVERY if variant not in DUAL_STREAM[1:-1]]


def make_order(bag: Bag) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).permutation(len(bag)))


def case(patches: tuple[int, int] = (4, 9)) -> Bag:
    return make_bag(np.random.default_rng(3), dim=DIM, patches=patches)


def in_bags(head: Head, bag: Bag, order: np.ndarray, fractions: tuple[float, ...]) -> torch.Tensor:
    rank = np.argsort(order)
    sizes = [int(np.floor(f * len(bag) + 0.5)) for f in fractions]
    lines = [
        [say(head, bag, rank >= min(k, len(bag) - 1)) for k in sizes],
        [say(head, bag, rank < max(k, 1)) for k in sizes],
    ]
    return torch.stack([torch.stack(line) for line in lines])


@pytest.mark.parametrize("variant", SOME, ids=named)
def test_curves_equal_the_head_on_what_is_left(variant: Variant) -> None:
    head, bag = make_head(variant), case()
    found = curves(head, collate([bag]), make_order(bag), **schedule_of(head))
    want = in_bags(head, bag, make_order(bag).numpy(), FRACTIONS)
    assert found.shape == (2, len(FRACTIONS), CLASSES)
    torch.testing.assert_close(torch.softmax(found, -1), torch.softmax(want, -1), rtol=0, atol=1e-5)


def test_a_head_derived_from_ours_is_asked_itself() -> None:
    torch.manual_seed(0)
    head, bag = Mine(DIM, CLASSES, AttentionConfig(embed_dim=8, attention_hidden=6)).eval(), case()
    found = curves(head, collate([bag]), make_order(bag))
    torch.testing.assert_close(found, in_bags(head, bag, make_order(bag).numpy(), FRACTIONS))


@pytest.mark.parametrize("variant", SOME, ids=named)
def test_curves_begin_and_end_with_the_case_and_with_one_patch(variant: Variant) -> None:
    head, bag = make_head(variant), case()
    order = make_order(bag)
    first, last = (say(head, bag, np.arange(len(bag)) == int(order[i])) for i in (0, -1))
    whole = say(head, bag, np.ones(len(bag), bool))
    deletion, insertion = curves(head, collate([bag]), order, (0.0, 1.0), **schedule_of(head))
    torch.testing.assert_close(deletion, torch.stack((whole, last)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(insertion, torch.stack((first, whole)), rtol=1e-5, atol=1e-5)


def test_a_case_of_one_patch_stays_what_it_is() -> None:
    head, bag = make_head(("hierarchical", {})), make_cases(1)[0]
    found = curves(head, collate([bag]), torch.tensor([0]))
    torch.testing.assert_close(found, say(head, bag, np.ones(1, bool)).expand_as(found))


def test_a_patch_goes_through_the_projector_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    given = head_module.project
    monkeypatch.setattr(head_module, "project", lambda x, *rest: (rows.append(len(x)), given(x, *rest))[1])
    bag = case()
    orders = torch.stack([make_order(bag), make_order(bag).flip(0)])
    found = curves(make_head(("hierarchical", {})), collate([bag]), orders)
    assert rows == [len(bag)]
    for order, each in zip(orders, found, strict=True):
        expected = curves(make_head(("hierarchical", {})), collate([bag]), order)
        torch.testing.assert_close(each, expected)


def test_taking_the_maximum_of_all_features_first_lowers_what_is_left() -> None:
    """With positive weights, a maximum can only fall as patches go, and rise as they come."""
    head, bag = make_head(("max", {})), case()
    head.classifier.weight.data.abs_()  # type: ignore[union-attr, operator]
    deletion, insertion = curves(head, collate([bag]), make_order(bag))
    assert (deletion.diff(dim=0) <= 1e-6).all()
    assert (insertion.diff(dim=0) >= -1e-6).all()
    assert (deletion[-1] < deletion[0]).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": collate(make_cases(2))}, "one case"),
        ({"orders": torch.tensor([0, 0, 1])}, "each of the"),
        ({"orders": torch.zeros(2, len(case()), dtype=torch.int64)}, "each of the"),
        ({"fractions": (0.0, 1.5)}, "from 0 to 1"),
    ],
)
def test_what_is_no_curve_is_refused(change: dict, said: str) -> None:
    bag = case()
    given = {"batch": collate([bag]), "orders": make_order(bag), "fractions": (0.5,), **change}
    with pytest.raises(ValueError, match=said):
        curves(make_head(("mean", {})), **given)


def test_the_area_is_that_under_the_lines_between() -> None:
    assert area([0, 0.5, 1], [1, 1, 0]) == 0.75
    assert area((0.0, 0.1, 1.0), torch.tensor([0.5, 0.5, 0.5])) == pytest.approx(0.5)
