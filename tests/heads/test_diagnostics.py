"""What is logged of an epoch, against NumPy and scikit-learn; and how dual_stream's selection sharpens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from featstore.bags import BagBatch, collate
from featstore.resident import CaseBags
from heads.config import Config
from heads.evaluation.predict import predict
from heads.models.head import Head, build_head
from heads.models.outputs import Attention, HeadOutput
from heads.training.diagnostics import EpochLog
from heads.training.objective import Objective, Terms
from tests.heads.bags import make_bag
from tests.heads.planted import BOTH, HEADS, PLAIN, SPLIT, make_bags, make_config, trained

DIM, CLASSES = 6, 3


def batches(count: int = 7, size: int = 2, seed: int = 0) -> list[BagBatch]:
    rng = np.random.default_rng(seed)
    stains = [(0, 1, 2), (1,), (0, 2)]
    bags = [make_bag(rng, str(i), stains[i % 3], DIM, label=i % CLASSES) for i in range(count)]
    return [collate(bags[start : start + size]) for start in range(0, count, size)]


def ready(name: str, **train: object) -> tuple[Config, Head, Objective]:
    penalties = {} if name in PLAIN else {"reg_weight_entropy": 0.3, "reg_weight_l2": 0.2}
    config = make_config(name, label_smoothing=0.1, **penalties, **train)
    head = build_head(config.head, DIM, CLASSES, seed=3)
    for parameter in head.parameters():
        parameter.data.mul_(3)  # attention that is far from even
    return config, head, Objective(config.train, head, torch.tensor([0.5, 1.0, 2.0]))


def log_of(head: Head, objective: Objective, asked: list[BagBatch]) -> tuple[EpochLog, list, list]:
    log, outputs, terms = EpochLog(), [], []
    for batch in asked:
        outputs.append(head(batch))
        terms.append(objective(outputs[-1], batch))
        log.add(outputs[-1], batch, terms[-1])
    return log, outputs, terms


def array(tensors: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensor.detach().double().numpy() for tensor in tensors])


@pytest.mark.parametrize("name", HEADS)
def test_losses_accuracy_and_auc_are_those_of_the_cases(name: str) -> None:
    _, head, objective = ready(name)
    asked = batches()
    log, outputs, terms = log_of(head, objective, asked)
    found = log.summary(2)
    logits, labels = array([o.logits for o in outputs]), array([b.labels for b in asked]).astype(int)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    losses = array([t.loss for t in terms])
    named = set() if name in PLAIN else {"entropy_penalty", "elastic_net_penalty"}
    named |= {"confidence_penalty"} if name == BOTH[1] else set()
    assert {key for key in found if key.endswith("_penalty")} == named
    each = losses.copy()
    for key in named:
        values = array([t.penalties[key] for t in terms])
        assert found[key] == pytest.approx(values.mean(), rel=1e-6)
        each += values
    own = [
        t.aux_loss.item()
        for t, batch in zip(terms, asked, strict=True)
        for _ in batch.case_ids
        if t.aux_loss is not None
    ]
    assert bool(own) == ("aux_loss" in found) == (name in ("dsmil", "clam_sb"))
    each += own or 0.0
    assert found["cross_entropy"] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["loss"] == pytest.approx(each.mean(), rel=1e-6)
    assert found["accuracy"] == (p.argmax(1) == labels).mean()
    assert found["auc"] == pytest.approx(roc_auc_score(labels, p, multi_class="ovr"))
    whole = [losses[start : start + 2].mean() for start in range(0, 7, 2)]  # the last batch has one case
    assert len(losses) == 7
    assert found["batch_loss_variance"] == pytest.approx(np.var(whole), rel=1e-5)
    assert log.summary(3)["batch_loss_variance"] == pytest.approx(
        np.var([losses[start : start + 3].mean() for start in range(0, 7, 3)]), rel=1e-5
    )


@pytest.mark.parametrize("name", [*BOTH, "gated_abmil", "clam_sb", "dsmil", "transmil"])
def test_the_sharpness_of_every_level_is_a_mean_over_its_segments(name: str) -> None:
    _, head, objective = ready(name)
    asked = batches()
    log, outputs, _ = log_of(head, objective, asked)
    found = log.summary(2)
    several = {BOTH[0]: ("patch", "slice", "stain"), BOTH[1]: ("selection", "patch")}
    levels = several.get(name, ("patch",))
    assert {key.rpartition("_")[2] for key in found if key.startswith("top1")} == set(levels)
    for level in levels:
        h, top = [], []
        for output in outputs:
            attention = output.attention[level]
            for a in np.split(attention.weights.detach().double().numpy(), attention.offsets[1:-1]):
                for column in a.reshape(len(a), -1).T:
                    assert column.sum() == pytest.approx(1, abs=1e-6)
                    some = column[column > 0]
                    h.append(-(some * np.log(some)).sum())
                    top.append(column.max())
        assert found[f"attention_entropy_{level}"] == pytest.approx(np.mean(h), rel=1e-4, abs=1e-6)
        assert found[f"effective_instances_{level}"] == pytest.approx(np.mean(np.exp(h)), rel=1e-4)
        assert found[f"top1_attention_{level}"] == pytest.approx(np.mean(top), rel=1e-5)
        assert found[f"effective_instances_{level}"] >= 1


@pytest.mark.parametrize("name", HEADS)
def test_nothing_that_is_logged_holds_a_computation_graph(name: str) -> None:
    _, head, objective = ready(name)
    log, outputs, _ = log_of(head, objective, batches())
    assert outputs[0].logits.requires_grad

    def tensors(value: object) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        inner = vars(value).values() if held is None and hasattr(value, "__dict__") else held or ()
        return [tensor for each in inner for tensor in tensors(each)]

    kept = tensors(log)
    assert len(kept) >= (3 if name in PLAIN else 6) * len(outputs)
    assert not [tensor for tensor in kept if tensor.requires_grad or tensor.grad_fn is not None]
    assert all(isinstance(value, float) for value in log.summary(2).values())


def test_a_loss_that_the_head_adds_is_a_term() -> None:
    asked, log = batches(), EpochLog()
    for i, batch in enumerate(asked):
        output = HeadOutput(torch.zeros(len(batch), CLASSES), aux_loss=torch.tensor(float(i)))
        log.add(output, batch, Terms(torch.ones(len(batch)), {}, output.aux_loss))
    found = log.summary(2)
    want = (0 * 2 + 1 * 2 + 2 * 2 + 3 * 1) / 7
    assert found["aux_loss"] == pytest.approx(want)
    assert found["loss"] == pytest.approx(1 + want)
    assert found["accuracy"] == pytest.approx(3 / 7)  # of even logits, the first class


def test_what_is_not_defined_is_no_number() -> None:
    (batch,) = batches(count=1)
    log = EpochLog()
    log.add(HeadOutput(torch.zeros(1, CLASSES)), batch, Terms(torch.tensor([2.0]), {}, None))
    found = log.summary(4)
    assert np.isnan(found.pop("auc"))
    assert found.pop("log_loss") == pytest.approx(np.log(CLASSES))
    assert found == {"loss": 2.0, "cross_entropy": 2.0, "accuracy": 1.0, "batch_loss_variance": 0.0}


def test_attention_of_known_sharpness() -> None:
    (batch,) = batches(count=1)
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 0.0, 7.0])
    weights = torch.tensor([0.25] * 4 + [1.0, 0.0] + [1.0])
    attention = Attention(weights, logits, torch.tensor([0, 4, 6, 7]))
    log = EpochLog()
    terms = Terms(torch.tensor([2.0]), {}, None)
    log.add(HeadOutput(torch.zeros(1, CLASSES), {"patch": attention}), batch, terms)
    found = log.summary(1)
    assert found["effective_instances_patch"] == pytest.approx((4 + 1 + 1) / 3)
    assert found["attention_entropy_patch"] == pytest.approx(np.log(4) / 3)
    assert found["top1_attention_patch"] == pytest.approx((0.25 + 1 + 1) / 3)


def selections(bags: CaseBags, end: float) -> tuple[list[float], list[float]]:
    """Effective instances of every epoch, and the range of every training case's scores after them."""
    head = {"temperature_start": 10.0, "temperature_end": end}
    settings = {"epochs": 20, "lr": 0.01, "patience": None, "sampling": "all", "reg_weight_confidence": 0.1}
    config = make_config("dual_stream", head, **settings)
    training, ranges = trained(bags, config), list[float]()

    def observe(batch: BagBatch, output: HeadOutput) -> None:
        assert output.instance_scores is not None
        cases = np.split(output.instance_scores.numpy(), batch.case_patch_offsets[1:-1])
        ranges.extend(float(np.ptp(scores)) for scores in cases if len(scores) > 1)

    predict(training.head, bags, SPLIT.train, config.train, observe=observe)
    return [row["train_effective_instances_selection"] for row in training.progress.history], ranges


def test_the_selection_sharpens_as_its_temperature_falls(tmp_path: Path) -> None:
    bags = make_bags(tmp_path / "store")
    (constant, _), (default, ranges), (cold, _) = (selections(bags, end) for end in (10.0, 1.0, 0.2))
    assert constant[0] == pytest.approx(default[0], rel=1e-6) == pytest.approx(cold[0], rel=1e-6)
    assert constant[-1] > 0.98 * constant[0]
    # Scores that differ by 2 weigh e² to 1 at the temperature 1: no needle, but clearly not even.
    assert default[-1] < 0.95 * default[0]
    assert cold[-1] < 0.4 * cold[0]
    assert len(ranges) == len(SPLIT.train) - 1
    assert max(ranges) > 2.0
    assert np.median(ranges) == pytest.approx(2.0, abs=0.3)
