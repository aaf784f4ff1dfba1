"""The heads that take a case as one bag: against their papers' formulas, bag by bag, in plain NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn import functional

from featstore.bags import Bag, BagBatch, collate
from featstore.resident import CaseBags
from heads.config import DsmilConfig
from heads.evaluation.predict import predict
from heads.models.clam import instance_loss
from heads.models.dsmil import DSMIL
from heads.models.head import Head, build_head
from heads.models.outputs import Attention, HeadOutput, effective_attention
from heads.models.pooling import segment_argmax, segment_rank
from heads.training.objective import Objective
from tests.heads.bags import make_bag
from tests.heads.in_numpy import Weights, cross_entropy, linear, pool, project, softmax, weights
from tests.heads.planted import FLAT, LABELS, ORDERED, SPLIT, make_bags, make_config, make_training, trained

DIM = 6
EXACT = {"rtol": 1e-10, "atol": 1e-12}
Said = dict[str, np.ndarray]


def bags(classes: int = 3) -> list[Bag]:
    """One with many patches, one with a single patch, one with two, one with a few."""
    rng = np.random.default_rng(4)
    one = {"stains": (1,), "slices": (1, 1)}
    return [
        make_bag(rng, "many", (0, 1, 2), DIM, classes - 1, patches=(6, 9)),
        make_bag(rng, "lone", dim=DIM, label=1, patches=(1, 1), **one),
        make_bag(rng, "two", dim=DIM, label=0, patches=(2, 2), **one),
        make_bag(rng, "few", dim=DIM, label=1 % classes, patches=(5, 5), **one),
    ]


def make_head(name: str, classes: int = 3, **settings: object) -> Head:
    head = build_head(make_config(name, settings).head, DIM, classes, seed=1)
    for parameter in head.parameters():
        parameter.data.mul_(2)  # attention that is far from even
    head.standardize.mean.copy_(torch.linspace(-1, 1, DIM))
    head.standardize.std.copy_(torch.linspace(0.5, 2, DIM))
    return head.double()


def by_bag(values: torch.Tensor, batch: BagBatch) -> list[np.ndarray]:
    return np.split(values.detach().numpy(), batch.case_patch_offsets[1:-1])


# The formulas


def attention_in_numpy(w: Weights, h: np.ndarray, gated: bool) -> Said:
    z, a = pool(w, "pool", h, gated)
    return {"logits": linear(w, "classifier", z), "attention": a}


def dsmil_in_numpy(w: Weights, h: np.ndarray) -> Said:
    s, q, v = linear(w, "score", h), linear(w, "query", h), linear(w, "value", h)
    kernel = w["classifier.weight"].reshape(s.shape[1], s.shape[1], -1)
    z, attention = w["classifier.bias"].copy(), []
    for c in range(s.shape[1]):
        a = softmax(q @ q[s[:, c].argmax()] / np.sqrt(q.shape[1]))
        attention.append(a)
        z += kernel[:, c] @ (a @ v)
    return {"logits": z, "attention": np.stack(attention, 1), "scores": s, "aux_logits": s.max(axis=0)}


def clam_in_numpy(w: Weights, h: np.ndarray) -> Said:
    both = linear(w, "instance_classifiers", h)
    classes = both.shape[1] // 2
    return {**attention_in_numpy(w, h, True), "scores": both[:, classes:] - both[:, :classes]}


FORMULAS = {
    "abmil": lambda w, h: attention_in_numpy(w, h, False),
    "gated_abmil": lambda w, h: attention_in_numpy(w, h, True),
    "dsmil": dsmil_in_numpy,
    "clam_sb": clam_in_numpy,
    "mean": lambda w, h: {"logits": linear(w, "classifier", h.mean(axis=0))},
    "max": lambda w, h: {"logits": linear(w, "classifier", h.max(axis=0))},
}


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", [name for name in FLAT if name != "transmil"])  # see test_transmil.py
def test_a_head_equals_its_formula(name: str, classes: int) -> None:
    head, batch = make_head(name, classes), collate(bags(classes))
    output, w = head(batch), weights(head)
    found: dict[str, Any] = {"logits": output.logits.detach().numpy()}
    if output.attention:
        found["attention"] = by_bag(output.attention["patch"].weights, batch)
    if output.instance_scores is not None:
        found["scores"] = by_bag(output.instance_scores, batch)
    if output.aux_logits is not None:
        found["aux_logits"] = output.aux_logits.detach().numpy()
    for i, bag in enumerate(bags(classes)):
        want = FORMULAS[name](w, project(w, bag.features))
        assert want.keys() == found.keys()
        for key, value in want.items():
            assert_allclose(found[key][i], value, **EXACT, err_msg=f"{key} of {bag.case_id}")


@pytest.mark.parametrize("name", [name for name in FLAT if name not in ORDERED])
def test_patches_have_no_order_in_a_case(name: str) -> None:
    head, bag = make_head(name), bags()[0]
    order = np.random.default_rng(2).permutation(len(bag))
    plain, moved = head(collate([bag])), head(collate([replace(bag, features=bag.features[order])]))
    assert_allclose(moved.logits.detach(), plain.logits.detach(), **EXACT)
    for level, attention in plain.attention.items():
        assert_allclose(moved.attention[level].weights.detach(), attention.weights.detach()[order], **EXACT)
    if plain.instance_scores is not None and moved.instance_scores is not None:
        assert_allclose(moved.instance_scores.detach(), plain.instance_scores.detach()[order], **EXACT)


def test_the_effective_attention_of_attention_per_class_is_its_mean() -> None:
    batch = collate(bags())
    output = make_head("dsmil")(batch)
    found = effective_attention(output, batch)
    assert found is not None
    assert_allclose(
        found.detach(), output.attention["patch"].weights.detach().numpy().mean(axis=1), **EXACT
    )


def test_the_first_largest_and_the_ranks_of_segments() -> None:
    values = torch.tensor([1.0, 3.0, 3.0, 2.0, -5.0, float("nan"), float("nan"), 7.0])
    offsets = torch.tensor([0, 4, 5, 7, 8])
    assert segment_argmax(values, offsets).tolist()[:2] == [1, 4]
    assert segment_argmax(values, offsets).tolist()[2] in (5, 6)  # whichever, but one of its own
    both = segment_argmax(torch.stack((values, -values), 1), offsets)
    assert both[:, 0].tolist() == segment_argmax(values, offsets).tolist()
    assert both[[0, 1, 3], 1].tolist() == [0, 4, 7]
    assert segment_rank(values, offsets).tolist() == [3, 0, 1, 2, 0, 0, 1, 0]


# What is learned from


def objective(
    head: Head, name: str, class_weights: list[float] | None = None, **train: object
) -> Objective:
    given = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    return Objective(make_config(name, **train).train, head, given)


def test_dsmil_learns_from_both_of_its_streams_alike() -> None:
    head, batch, weight = make_head("dsmil"), collate(bags()), [0.5, 1.0, 2.5]
    output = head(batch)
    found = objective(head, "dsmil", weight, label_smoothing=0.1)(output, batch)
    w, streams = weights(head), np.zeros(2)
    for bag in bags():
        said = dsmil_in_numpy(w, project(w, bag.features))
        each = [cross_entropy(said[key], bag.label, 0.1) for key in ("logits", "aux_logits")]
        streams += weight[bag.label] * np.array(each) / len(batch)
    assert found.loss.mean().item() == pytest.approx(streams[0], rel=1e-10)
    assert found.total(len(batch)).item() == pytest.approx(2 * streams.mean(), rel=1e-10)


def instance_loss_in_numpy(a: np.ndarray, both: np.ndarray, label: int, k: int, subtyping: bool) -> float:
    """As the authors have it: cross-entropies of two logits a class and patch, (N, C, 2)."""
    k = min(k, len(a) // 2)
    if k == 0:
        return 0.0
    order = np.argsort(-a)
    evidence, none = order[:k], order[-k:]
    total = 0.0
    for c in range(both.shape[1]):
        if c == label:
            asked = [(i, 1) for i in evidence] + [(i, 0) for i in none]
        elif subtyping:
            asked = [(i, 0) for i in evidence]
        else:
            continue
        total += np.mean([cross_entropy(both[i, c], target) for i, target in asked])
    return total / both.shape[1] if subtyping else total


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("classes", [2, 3])
def test_clam_learns_from_the_patches_it_attends_to_most_and_least(
    k: int, subtyping: bool, classes: int
) -> None:
    share, weight = 0.7, [0.5, 2.5, 1.0][:classes]
    head = make_head("clam_sb", classes, k_sample=k, subtyping=subtyping, bag_weight=share)
    batch = collate(bags(classes))
    found = objective(head, "clam_sb", weight)(head(batch), batch)
    w, bag_loss, own = weights(head), 0.0, 0.0
    for bag in bags(classes):
        h = project(w, bag.features)
        said = clam_in_numpy(w, h)
        both = linear(w, "instance_classifiers", h).reshape(len(h), 2, classes).transpose(0, 2, 1)
        each = instance_loss_in_numpy(said["attention"], both, bag.label, k, subtyping)
        assert (each == 0) == (bag.case_id == "lone")
        bag_loss += weight[bag.label] * cross_entropy(said["logits"], bag.label) / len(batch)
        own += weight[bag.label] * each / len(batch)
    assert found.loss.mean().item() == pytest.approx(bag_loss, rel=1e-10)
    whole = share * bag_loss + (1 - share) * own  # as in the paper
    assert share * found.total(len(batch)).item() == pytest.approx(whole, rel=1e-10)


def test_the_instance_loss_teaches_the_projector_but_not_the_attention() -> None:
    head, batch = make_head("clam_sb"), collate(bags())
    loss = head.auxiliary_loss(head(batch), batch.labels)
    assert loss is not None
    loss.sum().backward()
    taught = {
        name.split(".")[0] for name, p in head.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert taught == {"projector", "instance_classifiers"}


@pytest.mark.parametrize("subtyping", [False, True])
def test_the_gradient_of_the_instance_loss_is_right(subtyping: bool) -> None:
    logits, offsets = torch.tensor([0.3, 2.0, -1.0, 0.5, 7.0, 1.5]), torch.tensor([0, 4, 5, 6])
    attention = Attention(logits, logits, offsets)
    scores = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 0, 1])
    assert torch.autograd.gradcheck(lambda s: instance_loss(attention, s, labels, 2, subtyping), (scores,))


@pytest.mark.parametrize("name", FLAT)
def test_a_case_of_one_patch_is_learned_from(name: str) -> None:
    head, batch = make_head(name), collate([bags()[1]])
    output = head(batch)
    for attention in output.attention.values():
        assert torch.equal(attention.weights, torch.ones_like(attention.weights))
    total = objective(head, name)(output, batch).total(1)
    total.backward()
    gradients = [p.grad for p in head.parameters() if p.grad is not None]
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", FLAT)
def test_half_precision_gives_finite_losses_and_gradients(name: str) -> None:
    head, batch = make_head(name).float(), collate(bags())
    large = replace(batch, features=(100 * batch.features).half())
    with torch.autocast("cpu", torch.bfloat16):
        output = head(large)
    total = objective(head, name)(output, large).total(len(batch))
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


# Labels


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> CaseBags:
    return make_bags(tmp_path_factory.mktemp("flat") / "store")


class Curious:
    """Notes what a head is shown, and when."""

    def __init__(self, head: Head) -> None:
        self.forwards, self.asked = list[BagBatch](), list[tuple[bool, list[int]]]()
        forward, own = head.forward, head.auxiliary_loss

        def watched(batch: BagBatch, **schedule: float) -> HeadOutput:
            self.forwards.append(batch)
            return forward(batch, **schedule)

        def loss(output: HeadOutput, labels: torch.Tensor) -> torch.Tensor | None:
            self.asked.append((head.training, labels.tolist()))
            return own(output, labels)

        head.forward, head.auxiliary_loss = watched, loss  # type: ignore[method-assign]


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_labels_reach_a_head_in_training_alone_and_its_forward_never(cohort: CaseBags, ema: float) -> None:
    config = make_config("clam_sb", epochs=2, batch_size=4, patience=None, ema_decay=ema)
    training = make_training(cohort, config)
    curious = Curious(training.head)
    training.run()
    assert len(curious.asked) == 2 * len(SPLIT.train) / 4
    assert all(learning for learning, _ in curious.asked)
    assert sum(sum(labels) for _, labels in curious.asked) == 2 * sum(LABELS[c] for c in SPLIT.train)
    predict(training.head, cohort, SPLIT.test, config.train)
    assert len(curious.asked) == 2 * len(SPLIT.train) / 4
    assert len(curious.forwards) > len(curious.asked)
    assert [batch.labels for batch in curious.forwards] == [None] * len(curious.forwards)
    first = training.progress.history[0]
    assert first["train_aux_loss"] > 0
    assert "val_aux_loss" not in first
    assert first["train_loss"] == pytest.approx(first["train_cross_entropy"] + first["train_aux_loss"])


# Learning


@pytest.mark.parametrize("name", FLAT)
def test_the_planted_signal_is_learned(cohort: CaseBags, name: str) -> None:
    training = trained(cohort, make_config(name, epochs=15, lr=0.01, patience=None))
    first, last = training.progress.history[0], training.progress.history[-1]
    assert last["train_cross_entropy"] < 0.5 * first["train_cross_entropy"]
    found = predict(training.head, cohort, SPLIT.test, training.config)
    assert found.probabilities.argmax(1).tolist() == [LABELS[case] for case in SPLIT.test]


# torchmil on equal weights


@pytest.fixture(scope="module")
def torchmil() -> Any:
    """Its models; importing them takes seconds."""
    pytest.importorskip("torchmil")
    import torchmil.models
    import torchmil.nn

    return torchmil


def same(theirs: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    theirs = getattr(theirs, "module", theirs)  # their LazyLinear holds a Linear
    theirs.weight.data = weight.detach().clone()
    if theirs.bias is not None:
        theirs.bias.data = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias.detach()


def equal_pool(theirs: Any, pool: Any) -> None:
    """Theirs has no bias before the softmax, where it has no effect."""
    same(theirs.fc1, pool.value.weight, pool.value.bias)
    same(theirs.fc2, pool.weight.weight)
    if pool.gate is not None:
        same(theirs.fc_gated, pool.gate.weight, pool.gate.bias)


def embedded(head: Head, bag: Bag) -> torch.Tensor:
    return head.embed(collate([bag])).detach()[None]  # type: ignore[operator, no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("bag", bags(2), ids=lambda bag: bag.case_id)
@pytest.mark.parametrize("name", ["abmil", "gated_abmil"])
def test_abmil_equals_torchmil(torchmil: Any, name: str, bag: Bag) -> None:
    head = make_head(name, 2)
    theirs = torchmil.models.ABMIL((8,), att_dim=6, gated=name == "gated_abmil").double()
    equal_pool(theirs.pool, head.pool)
    same(theirs.classifier, head.classifier.weight[1:], head.classifier.bias[1:])
    logit, raw = theirs(embedded(head, bag), return_att=True)
    ours = head(collate([bag]))
    assert_allclose(ours.logits[0, 1].detach(), logit[0].detach(), **EXACT)
    assert_allclose(ours.attention["patch"].weights.detach(), raw[0].softmax(0).detach(), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("bag", bags(2), ids=lambda bag: bag.case_id)
@pytest.mark.parametrize("name", ["mean", "max"])
def test_mean_and_max_equal_torchmil(torchmil: Any, name: str, bag: Bag) -> None:
    head, pools = make_head(name), {"mean": torchmil.nn.MeanPool, "max": torchmil.nn.MaxPool}
    want = pools[name]()(embedded(head, bag))
    assert_allclose(head(collate([bag])).logits.detach(), head.classifier(want).detach(), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("bag", bags(2), ids=lambda bag: bag.case_id)
def test_a_class_of_dsmil_equals_torchmil(torchmil: Any, bag: Bag) -> None:
    """Theirs has one class and attends to h itself."""
    config = DsmilConfig(embed_dim=8, attention_dim=6, dropout=0)
    head = DSMIL(DIM, 3, config).double()
    torch.nn.init.eye_(head.value.weight)
    torch.nn.init.zeros_(head.value.bias)
    ours = head(collate([bag]))
    kernel = head.classifier.weight.reshape(3, 3, 8).detach()
    parts = torch.zeros(3, dtype=torch.float64)
    for c in range(3):
        theirs = torchmil.models.DSMIL((8,), att_dim=6).double()
        same(theirs.q_nn, head.query.weight, head.query.bias)
        same(theirs.inst_classifier, head.score.weight[c : c + 1], head.score.bias[c : c + 1])
        for i in range(3):
            same(theirs.bag_classifier, kernel[i, c][None])
            logit, a, s = theirs(embedded(head, bag), return_att=True, return_inst_pred=True)
            parts[i] += logit.item()
        assert_allclose(ours.attention["patch"].weights[:, c].detach(), a[0, :, 0].detach(), **EXACT)
        assert_allclose(ours.instance_scores[:, c].detach(), s[0].detach(), **EXACT)
    assert_allclose(ours.logits[0].detach(), parts + head.classifier.bias.detach(), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 1])
def test_clams_instance_loss_equals_torchmil(torchmil: Any, label: int) -> None:
    """Theirs is always with subtyping, sums where the authors average, and needs 2k patches."""
    head = make_head("clam_sb", 2, k_sample=3, subtyping=True, bag_weight=0.5)
    theirs = torchmil.models.CLAM_SB((8,), att_dim=6, k_sample=3, gated=True).double()
    del theirs.inst_loss_fn
    theirs.inst_loss_fn = lambda z, target: functional.cross_entropy(z, target[:, 0].long())
    equal_pool(theirs.pool, head.pool)
    same(theirs.classifier, head.classifier.weight[1:], head.classifier.bias[1:])
    for c, own in enumerate(theirs.inst_classifiers):
        same(own, head.instance_classifiers.weight[c::2], head.instance_classifiers.bias[c::2])
    bag = bags(2)[0]
    logit, raw, h = theirs(embedded(head, bag), return_att=True, return_emb=True)
    want = theirs.compute_inst_loss(raw, h, torch.tensor([label]))
    output = head(collate([bag]))
    assert_allclose(output.logits[0, 1].detach(), logit[0].detach(), **EXACT)
    found = head.auxiliary_loss(output, torch.tensor([label]))
    assert found is not None
    assert found.item() == pytest.approx(want.item() / 2, rel=1e-6)  # theirs goes through float32
