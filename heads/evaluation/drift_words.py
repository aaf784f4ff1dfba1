"""What a comparison of two stores found, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from heads.evaluation.drift import Drift
from heads.evaluation.metrics import Estimate

SHARES = {
    "cases": "between cases",
    "stains": "between stains",
    "cases_within_stains": "between cases, within stains",
    "classes": "between classes",
}
OVERLAPS = {"all": "of all patches", "other_cases": "of other cases"}
_ROWS = 12  # stains and classes that the text lists; the files have all
_NEAR, _SOME = 0.95, 0.6  # from where on a measure that is 1 for equal embeddings is called high, middling


def numbers(drift: Drift) -> dict[str, Any]:
    """Everything but the patches, as JSON types."""
    pairing = drift.pairing
    stores = {
        letter: {
            "path": str(store.path),
            "backbone": store.spec.backbone,
            "weights_sha256": store.spec.weights_sha256,
            "dim": store.spec.dim,
            "fingerprint": store.spec.plain.fingerprint,
            "only_here": out.to_json(),
        }
        for letter, store, out in (("a", drift.a, pairing.only_a), ("b", drift.b, pairing.only_b))
    }
    return {
        **stores,
        "same_store": drift.same_store,
        "differences": drift.a.spec.differences(drift.b.spec),
        "patches": len(pairing),
        "cases": len(pairing.cases),
        "changed_files": pairing.changed.to_json() if pairing.hashed else None,
        "medians": {name: drift.median(name) for name in drift.patches},
        "undefined_cosines": drift.undefined if drift.has_cosine else None,
        "cka": [vars(each) for each in drift.alignment],
        "neighbours": {name: vars(each) for name, each in drift.neighbours.items()},
        "pairs": len(drift.pairs),
        "pair_rank_correlation": drift.pair_correlation,
        "variance": {name: {"a": a, "b": b} for name, (a, b) in shares(drift).items()},
        "groups": drift.groups.to_dict("records"),
        "seed": drift.seed,
    }


def shares(drift: Drift) -> dict[str, tuple[float, float]]:
    """Shares of variance, in A and in B, of what is defined in both."""
    both = {name: (drift.variance[0][name], drift.variance[1][name]) for name in SHARES}
    return {name: pair for name, pair in both.items() if not any(map(math.isnan, pair))}


def lines(drift: Drift) -> list[str]:
    """The measures as text, one a line."""
    return [*_stores(drift), *_cosines(drift), *_geometry(drift), *_variance(drift)]


def _stores(drift: Drift) -> list[str]:
    pairing, found = drift.pairing, []
    for letter, store in (("A", drift.a), ("B", drift.b)):
        spec = store.spec
        weights = spec.weights_sha256[:12]
        found.append(f"{letter}  {store.path}: {spec.backbone}, weights {weights}, {spec.dim} features")
    if drift.same_store:
        found.append("A and B are the same store")
    elif not (different := drift.a.spec.differences(drift.b.spec)):
        found.append("made alike: the same fingerprint")
    else:
        # The digests stand above, and in drift.json whole.
        found += [f"   {line}" for line in different if not line.startswith("weights_sha256")]
    found.append(f"{len(pairing):,} patches of {_count(len(pairing.cases), 'case')} are in both")
    for out, text in (
        (pairing.only_a, "only in A"),
        (pairing.only_b, "only in B"),
        (pairing.changed, "left out: their files were not the same bytes"),
    ):
        if out.patches:
            named = f"{'; '.join(out.examples[:2])}{'; …' if out.patches > 2 else ''}"
            found.append(f"   {out.patches:,} of {_count(len(out.cases), 'case')} {text} ({named})")
    if not pairing.hashed:
        found.append("   imported embeddings: whether the images were the same is not known")
    return found


def _cosines(drift: Drift) -> list[str]:
    if not drift.has_cosine:
        dims = f"{drift.a.spec.dim} and {drift.b.spec.dim} features"
        return ["", f"cosine of A with B: undefined, the stores have {dims}"]
    found = ["", f"{'cosine of A with B':34}{'patches':>10}{'raw':>8}{'centred':>9}   5% to 95%, centred"]
    found.append(
        f"{'  all, median':34}{len(drift.pairing):>10,}{_number(drift.median('cosine'), 8)}"
        f"{_number(drift.median('cosine_centred'), 9)}"
    )
    for kind in ("stain", "class"):
        rows = drift.groups[(drift.groups[kind] != "") & (drift.groups["case_id"] == "")]
        for row in rows.head(_ROWS).to_dict("records"):
            spread = [_number(row[f"cosine_centred_{q}"]).strip() for q in ("q05", "q95")]
            found.append(
                f"  {kind + ' ' + row[kind]:32}{row['patches']:>10,}{_number(row['cosine_median'], 8)}"
                f"{_number(row['cosine_centred_median'], 9)}   {spread[0]} to {spread[1]}"
            )
        if len(rows) > _ROWS:
            found.append(f"  … {len(rows) - _ROWS} more in groups.csv")
    if drift.undefined:
        found.append(f"  {drift.undefined:,} patches lie at the mean or at 0: no direction, not counted")
    return found


def _geometry(drift: Drift) -> list[str]:
    found = ["", f"{'linear CKA':34}{'patches':>10}{'':8}{'plain':>9}{'debiased':>11}"]
    for each in drift.alignment[: _ROWS + 1]:
        name = "all" if each.stain is None else f"stain {each.stain}"
        found.append(
            f"  {name:32}{each.patches:>10,}{'':8}{_number(each.linear, 9)}{_number(each.debiased, 11)}"
        )
    left = len(drift.pairing.stains) + 1 - min(len(drift.alignment), _ROWS + 1)
    if left:
        found.append(f"  … {left} more: drift.json has those of the most patches")
    for name, overlap in drift.neighbours.items():
        what = f"{overlap.k} nearest {OVERLAPS[name]}, same in both"
        if math.isnan(overlap.overlap):
            found.append(f"{what}: undefined, there are too few")
            continue
        found.append(
            f"{what:44}{overlap.overlap:8.1%}   by chance {overlap.chance:.2%}, "
            f"Jaccard {overlap.jaccard:.3f}, {overlap.queries:,} patches among {overlap.sampled:,}"
        )
    correlation = drift.pair_correlation
    found.append(f"{'rank correlation of cosines between patches':44}{_number(correlation, 8)}")
    return found


def _variance(drift: Drift) -> list[str]:
    known = shares(drift)
    if not known:
        return []
    found = ["", f"{'share of variance':44}{'A':>8}{'B':>9}"]
    return found + [f"  {SHARES[name]:42}{a:8.1%}{b:9.1%}" for name, (a, b) in known.items()]


def reading(drift: Drift, auc: tuple[float | None, float | None, Estimate] | None = None) -> str:
    """One paragraph on what the numbers mean.

    Args:
        drift: What was found.
        auc: The test AUC of the same head on A and on B, and their difference; None if not asked.
    """
    if drift.same_store:
        return "A and B are the same store: nothing has drifted, and every measure is as good as it can be."
    said = [*_of_directions(drift), *_of_geometry(drift), *_of_variance(drift)]
    if auc is not None:
        said.append(_of_auc(*auc))
    said.append("None of this says by itself which embeddings are better.")
    return " ".join(said)


def _of_directions(drift: Drift) -> list[str]:
    if not drift.has_cosine:
        return ["A and B have different numbers of features, so that single embeddings cannot be compared."]
    centred = drift.median("cosine_centred")
    if math.isnan(centred):
        return ["Embeddings that are all the same have no direction to compare."]
    moved = "hardly moved" if centred >= _NEAR else "moved" if centred >= _SOME else "moved far"
    return [
        f"Single embeddings have {moved}: half of the patches have a centred cosine above "
        + (f"{centred:.2f}." if centred < 0.995 else f"1 − {max(1 - centred, 0):.1e}.")
    ]


def _of_geometry(drift: Drift) -> list[str]:
    whole, overlap = drift.alignment[0], drift.neighbours["all"]
    said = []
    if not math.isnan(whole.debiased):
        cka = whole.debiased
        alike = "nearly the same" if cka >= _NEAR else "similar" if cka >= _SOME else "different"
        told = f"debiased CKA {cka:.2f}"
        inside = [each.debiased for each in drift.alignment[1:] if not math.isnan(each.debiased)]
        if len(inside) > 1:
            told += f"; within a stain {min(inside):.2f} to {max(inside):.2f}"
        said.append(f"What lies near what along the largest directions is {alike} ({told}).")
        centred = drift.median("cosine_centred")
        if cka >= _NEAR and centred < _SOME:
            said.append("That fits a rotation: no head loses by it, but each has to be trained anew.")
    if not math.isnan(overlap.overlap):
        same = overlap.overlap * overlap.k
        said.append(
            f"Of a patch's {overlap.k} nearest {same:.1f} are the same in both "
            f"(by chance: {overlap.chance * overlap.k:.2f})."
        )
    return said


def _of_variance(drift: Drift) -> list[str]:
    known = shares(drift)
    parts = [
        f"{SHARES[name]} {known[name][0]:.0%} in A, {known[name][1]:.0%} in B"
        for name in SHARES
        if name in known
    ]
    return [f"Shares of variance: {'; '.join(parts)}."] if parts else []


def _of_auc(a: float | None, b: float | None, difference: Estimate) -> str:
    if a is None or b is None or difference.value is None:
        return "The head's test AUC is undefined: a class is missing among the test cases."
    said = f"The same head reaches a test AUC of {a:.3f} on A and {b:.3f} on B, {difference.value:+.3f}"
    if difference.low is None or difference.high is None:
        return f"{said}, without an interval."
    interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
    if difference.low <= 0 <= difference.high:
        return f"{said}; its interval {interval} holds 0, so these test cases do not tell which is better."
    better = "B" if difference.value > 0 else "A"
    return (
        f"{said}; its interval {interval} lies on the side of {better}, on these test cases and this split."
    )


def _number(value: float, width: int = 0) -> str:
    return f"{'–' if math.isnan(value) else f'{value:.3f}':>{width}}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def strict(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON types without NaN: null in their place."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: one(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [one(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: one(value) for name, value in values.items()}
