"""The objective of a batch, against loops over stains and slices in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from featstore.bags import Bag, collate
from featstore.errors import ConfigError
from heads.config import TrainConfig
from heads.models.head import Head, build_head
from heads.models.outputs import HeadOutput
from heads.training import losses
from heads.training.losses import register_loss
from heads.training.objective import Objective, Terms, make_class_weights
from tests.heads.bags import make_bag
from tests.heads.planted import HEADS, PLAIN, make_config

DIM, CLASSES = 6, 3
WEIGHTS = np.array([0.5, 1.0, 2.5])


def bags() -> list[Bag]:
    rng = np.random.default_rng(4)
    lone = make_bag(rng, "lone", (1,), DIM, 2, slices=(1, 1), patches=(1, 1))
    return [make_bag(rng, "a", (0, 1, 2), DIM, 1), lone, make_bag(rng, "b", (0, 2), DIM, 0)]


def make_head(name: str) -> Head:
    head = build_head(make_config(name).head, DIM, CLASSES, seed=1)
    for parameter in head.parameters():
        parameter.data.mul_(2)
    return head.double()


def objective(name: str, head: Head, weights: bool = True, **train: object) -> Objective:
    return Objective(make_config(name, **train).train, head, torch.from_numpy(WEIGHTS) if weights else None)


def segments(name: str, output: HeadOutput, asked: list[Bag]) -> list[dict[str, list[np.ndarray]]]:
    """For every case, the attention logits of every level, segment by segment."""
    z = {level: attention.logits.detach().numpy().tolist() for level, attention in output.attention.items()}
    cases = []
    for bag in asked:

        def take(level: str, size: int) -> np.ndarray:
            taken, z[level] = z[level][:size], z[level][size:]
            return np.array(taken)

        if name != "hierarchical":
            cases.append({"patch": [take("patch", len(bag))]})
            continue
        cases.append(
            {
                "patch": [take("patch", size) for size in bag.slice_sizes],
                "slice": [take("slice", size) for size in bag.stain_sizes],
                "stain": [take("stain", len(bag.stains))],
            }
        )
    assert not any(rest for level, rest in z.items() if level != "selection")
    return cases


def spread_term(scores: np.ndarray, form: str) -> float:
    return float((np.ptp(scores) - 2.0) ** 2 if form == "squared" else -np.ptp(scores))


def mean_term(term: Callable[[np.ndarray], float], z: np.ndarray) -> float:
    """A segment's term; where a head has logits or scores by class, the mean over classes."""
    return float(np.mean([term(each) for each in z.reshape(len(z), -1).T]))


def entropy_term(z: np.ndarray, form: str, mode: str, normalize: bool) -> float:
    if len(z) == 1:
        return 0.0
    a = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    h, most = -(a * np.log(a)).sum(), np.log(len(z))
    if normalize:
        h, most = h / most, 1.0
    if form == "linear":
        return -h if mode == "max" else h
    return (most - h) ** 2 if mode == "max" else h**2


FORMS = [
    ("squared", "max", False),
    ("squared", "min", True),
    ("linear", "max", True),
    ("linear", "min", False),
]


@pytest.mark.parametrize(("form", "mode", "normalize"), FORMS)
@pytest.mark.parametrize("name", [name for name in HEADS if name not in PLAIN])
def test_the_total_equals_its_formula(name: str, form: str, mode: str, normalize: bool) -> None:
    flat = name != "hierarchical"
    scored = make_head(name).scores_instances
    given = {
        "reg_weight_entropy": {"patch": 0.3} if flat else {"patch": 0.3, "slice": 0.2, "stain": 0.7},
        "reg_weight_l1": 0.05 if flat else {"stain": 0.4},
        "reg_weight_l2": 0.02 if flat else {"patch": 0.1, "slice": 0.2},
        "reg_weight_confidence": 0.6 if scored else 0.0,
        "reg_confidence_target": 2.0 if form == "squared" else None,
    }
    head, asked = make_head(name), bags()
    mine = objective(
        name,
        head,
        label_smoothing=0.1,
        reg_entropy_form=form,
        reg_entropy_mode=mode,
        reg_entropy_normalize=normalize,
        reg_level_decay=0.5,
        reg_epoch_decay=0.9,
        **given,
    )
    batch = collate(asked)
    output = head(batch)
    found = mine(output, batch, epoch=3)
    cases = segments(name, output, asked)
    scores = None if output.instance_scores is None else output.instance_scores.detach().numpy()
    logits = output.logits.detach().numpy()
    weight = {n: v if isinstance(v, dict) else dict.fromkeys(cases[0], v) for n, v in given.items() if v}
    want, start = 0.0, 0
    for bag, levels, z in zip(asked, cases, logits, strict=True):
        log = z - np.log(np.exp(z).sum())
        case = WEIGHTS[bag.label] * (0.9 * -log[bag.label] + 0.1 * -log.mean())
        for i, (level, members) in enumerate(levels.items()):
            decay = 0.5**i * 0.9**3
            e = [mean_term(lambda z: entropy_term(z, form, mode, normalize), m) for m in members]
            case += decay * weight["reg_weight_entropy"].get(level, 0) * np.mean(e)
            for norm, power in (("reg_weight_l1", 1), ("reg_weight_l2", 2)):
                norms = [mean_term(lambda z: (np.abs(z) ** power).sum(), m) for m in members]  # noqa: B023
                each = [n if len(m) > 1 else 0.0 for n, m in zip(norms, members, strict=True)]
                case += decay * weight[norm].get(level, 0) * np.mean(each)
        if scores is not None and len(bag) > 1:
            mine_ = scores[start : start + len(bag)]
            case += 0.6 * 0.9**3 * mean_term(lambda s: spread_term(s, form), mine_)
        start += len(bag)
        want += case / 3
    own = 0.0 if found.aux_loss is None else found.aux_loss.item()  # test_flat_heads.py has its formulas
    assert (own > 0) == (name in ("dsmil", "clam_sb"))
    assert found.total(3).item() == pytest.approx(want + own, rel=1e-9)
    assert set(found.penalties) == {"entropy_penalty", "elastic_net_penalty"} | (
        {"confidence_penalty"} if scored else set()
    )
    plain = mine(output, batch, epoch=0).penalties["entropy_penalty"]
    np.testing.assert_allclose(found.penalties["entropy_penalty"].detach(), 0.9**3 * plain.detach())


@pytest.mark.parametrize("name", [name for name in HEADS if name not in PLAIN])
def test_one_weight_stands_for_all_levels(name: str) -> None:
    head, batch = make_head(name), collate(bags())
    output = head(batch)
    levels = dict.fromkeys(head.levels, 0.3)
    one, each = (objective(name, head, reg_weight_entropy=w, reg_weight_l1=w) for w in (0.3, levels))
    assert one(output, batch).total(3).item() == each(output, batch).total(3).item()


def test_the_parts_of_a_step_add_up() -> None:
    terms = Terms(torch.tensor([1.0, 2.0]), {"a": torch.tensor([0.5, 0.1])}, torch.tensor(4.0))
    assert terms.total(2).item() == pytest.approx(3.6 / 2 + 4)
    assert terms.total(8).item() == pytest.approx(3.6 / 8 + 4 * 2 / 8)
    assert Terms(torch.tensor([1.0, 2.0]), {}, None).total(4).item() == pytest.approx(0.75)


@pytest.mark.parametrize("name", HEADS)
def test_class_weights_do_not_cancel_out(name: str) -> None:
    head, asked = make_head(name), bags()
    mine, plain = objective(name, head), objective(name, head, weights=False)
    whole = mine(head(collate(asked)), collate(asked)).loss
    for bag, loss in zip(asked, whole, strict=True):
        alone = collate([bag])
        output = head(alone)
        ratio = mine(output, alone).loss / plain(output, alone).loss
        assert ratio.item() == pytest.approx(WEIGHTS[bag.label])
        assert mine(output, alone).loss.item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        (
            "dual_stream",
            {"reg_weight_entropy": {"slice": 0.1}},
            "reg_weight_entropy names the level 'slice'",
        ),
        ("dual_stream", {"reg_weight_l1": {"stain": 0.1}}, "reg_weight_l1 names the level 'stain'"),
        ("dual_stream", {"reg_weight_l2": {"stain": 0.1}}, "reg_weight_l2 names the level 'stain'"),
        ("hierarchical", {"reg_weight_confidence": 0.1}, "has no instance scores"),
        ("hierarchical", {"loss": "focal"}, "there is no loss 'focal'"),
    ],
)
def test_a_penalty_that_does_not_suit_the_head_is_an_error(name: str, given: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        objective(name, make_head(name), **given)
    assert error.value.exit_code == 2
    assert error.value.where.startswith("train.")


class NoAttention(Head):
    pass


def test_a_head_without_attention_takes_no_penalty_on_it() -> None:
    with pytest.raises(ConfigError, match="has no attention"):
        Objective(TrainConfig(reg_weight_entropy=0.1), NoAttention(DIM), None)
    Objective(TrainConfig(reg_weight_entropy=0.0), NoAttention(DIM), None)


def test_a_loss_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))

    @register_loss("squared")
    def squared(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        return (logits.gather(1, labels[:, None])[:, 0] - 1).square() + smoothing

    head, batch = make_head("hierarchical"), collate(bags())
    output = head(batch)
    found = objective("hierarchical", head, loss="squared", label_smoothing=0.25)(output, batch).loss
    z = output.logits.detach().numpy()[np.arange(3), batch.labels]
    np.testing.assert_allclose(found.detach().numpy(), WEIGHTS[batch.labels] * ((z - 1) ** 2 + 0.25))


def test_class_weights_by_order_by_name_and_balanced() -> None:
    names, labels = ("b", "a", "c"), [0, 0, 1, 1, 1, 2]

    def made(given: object) -> list[float] | None:
        weights = make_class_weights(
            TrainConfig(use_class_weights=True, class_weights=given), labels, names
        )  # type: ignore[arg-type]
        return None if weights is None else weights.tolist()

    assert made([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert made({"a": 1.0, "b": 2.0, "c": 3.0}) == [2.0, 1.0, 3.0]
    assert made("balanced") == pytest.approx([1.0, 6 / 9, 2.0])
    assert make_class_weights(TrainConfig(class_weights=[1.0]), labels, names) is None
    for wrong in ([1.0, 2.0], {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0, "x": 1.0}):
        with pytest.raises(ConfigError, match="class_weights is"):
            made(wrong)


def test_a_batch_without_labels_has_no_loss() -> None:
    head = make_head("hierarchical")
    batch = collate([make_bag(np.random.default_rng(0), dim=DIM, label=None)])
    with pytest.raises(ValueError, match="without labels"):
        objective("hierarchical", head)(head(batch), batch)
