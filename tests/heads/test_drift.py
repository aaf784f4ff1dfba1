"""Two stores compared: every measure against NumPy, and what must not change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.errors import ConfigError, StoreDamaged, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store import Slice, Store, StoreWriter
from heads.evaluation import drift_plots, drift_sums, neighbours
from heads.evaluation.drift import Drift, compare_stores
from heads.evaluation.drift_plots import plot_drift
from heads.evaluation.drift_words import lines, numbers, reading
from heads.evaluation.metrics import Estimate
from tests.heads.drift_in_numpy import by_brute_force, cka_of_grams, debiased_of_grams, eta
from tests.store.builders import make_slice, make_spec

DIM = 6
Key = tuple[str, str, str]
Features = dict[Key, np.ndarray]
LABELS = {"2": "benign", "10": "malignant"}


def draw(seed: int = 0, dim: int = DIM) -> Features:
    """Three cases of two stains, with what all share, a part by stain and one by case; of unequal sizes."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 20, dim)
    stains = {stain: rng.normal(0, 1, dim) for stain in ("h&e", "sox10")}
    found = {}
    for i, case in enumerate(("2", "10", "TCGA-AA")):
        of_case = rng.normal(0, 1, dim)
        for stain, of_stain in stains.items():
            for j, name in enumerate(("match_2", "match_10")):
                own = rng.normal(0, 1, (5 + 2 * i + j, dim))
                found[case, stain, name] = common + of_case + of_stain + own
    return found


def write(
    path: Path,
    features: Features,
    order: Sequence[str] = ("2", "10", "TCGA-AA"),
    versions: dict[Key, int] | None = None,
    spec: EmbeddingSpec | None = None,
    patches: dict[Key, list[int]] | None = None,
) -> Store:
    """A store of float32 features, patches numbered from 1 or as given; `versions` are of the files."""
    dim = next(iter(features.values())).shape[1]
    spec = spec or make_spec(dim=dim, stored_dtype="float32")
    writer = StoreWriter(path, spec, {"test": True})
    for case in order:
        slices = []
        for key, values in features.items():
            if key[0] == case:
                numbered = (patches or {}).get(key) or list(range(1, len(values) + 1))
                like = make_slice(*key, numbered, (versions or {}).get(key, 0))
                columns = {**like.columns, "features": values.astype(spec.stored_dtype)}
                slices.append(Slice(key[1], key[2], columns))
        writer.commit(case, slices)
    return Store.open(path)


def moved(features: Features, seed: int = 9) -> Features:
    """The same patches after something has changed: another mean, noise, less of the old."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 5, next(iter(features.values())).shape[1])
    return {key: 0.7 * each + shift + rng.normal(0, 0.5, each.shape) for key, each in features.items()}


def stacked(features: Features) -> np.ndarray:
    """All patches in natural order, float64 of what float32 holds."""
    order = [
        (c, s, n) for c in ("2", "10", "TCGA-AA") for s in ("h&e", "sox10") for n in ("match_2", "match_10")
    ]
    return (
        np.concatenate([features[key] for key in order if key in features]).astype(np.float32).astype(float)
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    folder = tmp_path_factory.mktemp("drift")
    return write(folder / "a", draw()), write(folder / "b", moved(draw()))


def test_every_number_of_a_patch_is_that_of_the_formula(pair: tuple[Store, Store]) -> None:
    found = compare_stores(*pair, labels=LABELS)
    a, b = stacked(draw()), stacked(moved(draw()))

    def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)

    wanted = {
        "cosine": cosine(a, b),
        "cosine_centred": cosine(a - a.mean(axis=0), b - b.mean(axis=0)),
        "norm_a": np.linalg.norm(a, axis=1),
        "norm_b": np.linalg.norm(b, axis=1),
        "relative_change": np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1),
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(found.patches[name], values, rtol=1e-5, atol=2e-6)
    table = pd.concat(found.tables(), ignore_index=True)
    whole = pair[0].table().reset_index(drop=True)
    for name in ("case_id", "stain", "slice_id", "patch", "path"):
        assert table[name].tolist() == whole[name].tolist()
    assert table["case_id"].drop_duplicates().tolist() == ["2", "10", "TCGA-AA"]
    np.testing.assert_array_equal(table["cosine"], found.patches["cosine"])
    for by in ("stain", "case_id"):
        for name, mine in table.groupby(by):
            alone = [column for column in ("stain", "case_id", "class") if column != by]
            rows = found.groups[(found.groups[by] == name) & (found.groups[alone] == "").all(axis=1)]
            assert rows["patches"].tolist() == [len(mine)]
            for column in ("cosine", "cosine_centred"):
                values = mine[column].astype(float)
                got = (
                    rows[[f"{column}_{q}" for q in ("mean", "q05", "median", "q95")]].iloc[0].astype(float)
                )
                np.testing.assert_allclose(
                    got, [values.mean(), *np.quantile(values, [0.05, 0.5, 0.95])], rtol=1e-5
                )
    classes = found.groups[found.groups["class"] != ""]
    sizes = table.groupby(table["case_id"].map(LABELS)).size()
    assert dict(zip(classes["class"], classes["patches"], strict=True)) == sizes.to_dict()
    both = found.groups[(found.groups["stain"] != "") & (found.groups["case_id"] != "")]
    assert len(both) == 6
    assert both["patches"].sum() == len(table)


def test_the_measures_of_two_stores_are_those_of_their_embeddings(pair: tuple[Store, Store]) -> None:
    found = compare_stores(*pair, neighbours=5, labels=LABELS)
    a, b = (each - each.mean(axis=0) for each in (stacked(draw()), stacked(moved(draw()))))
    table = pair[0].table().reset_index(drop=True)
    assert [each.stain for each in found.alignment] == [None, "h&e", "sox10"]
    for each in found.alignment:
        mine = np.ones(len(a), bool) if each.stain is None else (table["stain"] == each.stain).to_numpy()
        assert each.patches == mine.sum()
        assert each.linear == pytest.approx(cka_of_grams(a[mine], b[mine]), abs=1e-5)
        assert each.debiased == pytest.approx(debiased_of_grams(a[mine], b[mine]), abs=1e-4)
    cases = pd.factorize(table["case_id"])[0].tolist()
    for name, groups in (("all", None), ("other_cases", cases)):
        shares, jaccard, chance = by_brute_force(a, b, 5, groups)
        overlap = found.neighbours[name]
        assert overlap.overlap == pytest.approx(np.mean(shares))
        assert overlap.jaccard == pytest.approx(np.mean(jaccard))
        assert overlap.chance == pytest.approx(np.mean(chance))
    for values, share in zip((a, b), found.variance, strict=True):
        assert share["cases"] == pytest.approx(eta(values, np.array(cases)), rel=1e-4)
        assert share["stains"] == pytest.approx(eta(values, pd.factorize(table["stain"])[0]), rel=1e-4)
        known = table["case_id"].isin(list(LABELS)).to_numpy()
        of_class = pd.factorize(table["case_id"][known])[0]  # a case a class
        assert share["classes"] == pytest.approx(eta(values[known], of_class), rel=1e-4)


def same(a: Drift, b: Drift, exactly: bool = True) -> None:
    """Two comparisons agree in everything."""
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    for name in a.patches:
        np.testing.assert_allclose(a.patches[name], b.patches[name], **tolerance)
    pd.testing.assert_frame_equal(a.groups, b.groups, check_exact=exactly, rtol=1e-4)
    assert [vars(each) for each in a.alignment] == [
        {
            **vars(each),
            "linear": pytest.approx(each.linear, abs=1e-5),
            "debiased": pytest.approx(each.debiased, abs=1e-4),
        }
        for each in b.alignment
    ]
    assert {n: vars(o) for n, o in a.neighbours.items()} == {n: vars(o) for n, o in b.neighbours.items()}
    for one, other in zip(a.variance, b.variance, strict=True):
        assert one == pytest.approx(other, nan_ok=True, rel=1e-4)


def test_the_order_in_which_cases_were_written_changes_nothing(
    pair: tuple[Store, Store], tmp_path: Path
) -> None:
    turned = dict(reversed(list(moved(draw()).items())))
    other = write(tmp_path / "b", turned, order=("TCGA-AA", "2", "10"))
    same(compare_stores(*pair), compare_stores(pair[0], other))


def test_how_much_is_read_at_once_changes_nothing(
    pair: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = compare_stores(*pair, labels=LABELS)
    monkeypatch.setattr(drift_sums, "_BLOCK", 4)
    monkeypatch.setattr(drift_sums, "_PENDING", 11)
    monkeypatch.setattr(neighbours, "_CELLS", 100)
    same(compare_stores(*pair, labels=LABELS), wanted, exactly=False)


def test_stains_beyond_the_memory_for_their_sums_count_in_the_whole(
    pair: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = compare_stores(*pair)
    monkeypatch.setattr(drift_sums, "_MOMENTS_BYTES", 1)
    found = compare_stores(*pair)
    assert [each.stain for each in found.alignment] == [None, "h&e"]
    assert found.alignment[0].linear == pytest.approx(wanted.alignment[0].linear, abs=1e-6)
    assert found.alignment[0].patches == wanted.alignment[0].patches
    assert any("drift.json" in line for line in lines(found))


def test_turning_b_leaves_the_geometry_and_changes_the_cosine(
    pair: tuple[Store, Store], tmp_path: Path
) -> None:
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(DIM, DIM)))[0]
    turned = {key: 2 * values @ turn for key, values in moved(draw()).items()}
    before, after = compare_stores(*pair), compare_stores(pair[0], write(tmp_path / "b", turned))
    for one, other in zip(before.alignment, after.alignment, strict=True):
        assert other.linear == pytest.approx(one.linear, abs=1e-5)
        assert other.debiased == pytest.approx(one.debiased, abs=1e-4)
    assert after.neighbours == before.neighbours
    assert after.pair_correlation == pytest.approx(before.pair_correlation, abs=1e-3)
    assert after.variance[1] == pytest.approx(before.variance[1], nan_ok=True, rel=1e-4)
    assert after.median("cosine_centred") < before.median("cosine_centred") - 0.1


def test_swapping_the_stores_swaps_what_is_of_each(pair: tuple[Store, Store]) -> None:
    one, other = compare_stores(*pair), compare_stores(*pair[::-1])
    np.testing.assert_allclose(one.patches["cosine_centred"], other.patches["cosine_centred"], atol=1e-6)
    np.testing.assert_array_equal(one.patches["norm_a"], other.patches["norm_b"])
    assert one.variance == (
        pytest.approx(other.variance[1], nan_ok=True),
        pytest.approx(other.variance[0], nan_ok=True),
    )
    assert one.neighbours == other.neighbours


def test_a_store_and_itself_are_equal_in_everything(pair: tuple[Store, Store]) -> None:
    found = compare_stores(pair[0], pair[0])
    assert found.same_store
    for name in ("cosine", "cosine_centred"):
        np.testing.assert_allclose(found.patches[name], 1, atol=1e-6)
    assert not found.patches["relative_change"].any()
    assert all(each.linear == pytest.approx(1) == each.debiased for each in found.alignment)
    assert all(each.overlap == each.jaccard == 1 for each in found.neighbours.values())
    assert found.pair_correlation == pytest.approx(1)
    assert "same store" in reading(found)


def test_only_what_both_have_of_the_same_files_is_compared(tmp_path: Path) -> None:
    a, b = draw(), moved(draw())
    gone = ("10", "h&e", "match_2")
    del a[gone]
    b[gone] = b[gone]
    b["2", "sox10", "match_10"] = b["2", "sox10", "match_10"][:4]
    for key in [key for key in b if key[0] == "TCGA-AA"]:
        del b[key]
    changed = ("2", "h&e", "match_2")
    first = write(tmp_path / "a", a)
    other = write(tmp_path / "b", b, order=("2", "10"), versions={changed: 1})
    found = compare_stores(first, other)
    pairing = found.pairing
    size = {key: len(values) for key, values in draw().items()}
    of_third = sum(size[key] for key in size if key[0] == "TCGA-AA")
    assert pairing.only_a.cases == {"2": 2, "TCGA-AA": of_third}
    assert pairing.only_a.examples[:2] == [
        "case 2, sox10, match_10, patch 5", "case 2, sox10, match_10, patch 6"
    ]  # fmt: skip
    assert pairing.only_a.examples[2] == "case TCGA-AA, h&e, match_2, patch 1"
    assert pairing.only_b.cases == {"10": size[gone]}
    assert pairing.changed.cases == {"2": size[changed]}
    kept = {key: values for key, values in a.items() if key in b and key != changed}
    kept["2", "sox10", "match_10"] = kept["2", "sox10", "match_10"][:4]
    assert len(pairing) == sum(map(len, kept.values())) == len(found.patches["norm_a"])
    np.testing.assert_allclose(found.patches["norm_a"], np.linalg.norm(stacked(kept), axis=1), rtol=1e-6)
    told = "\n".join(lines(found))
    assert f"{of_third + 2} of 2 cases only in A" in told
    assert f"{size[changed]} of 1 case left out: their files were not the same bytes" in told
    assert numbers(found)["b"]["only_here"]["patches"] == size[gone]


def test_patches_are_matched_by_their_numbers(pair: tuple[Store, Store], tmp_path: Path) -> None:
    b = moved(draw())
    gone = {("10", "h&e", "match_10"): [0, 2], ("2", "sox10", "match_2"): [1]}
    fewer = {key: np.delete(values, gone.get(key, []), axis=0) for key, values in b.items()}
    patches = {key: np.delete(np.arange(1, len(b[key]) + 1), gone[key]).tolist() for key in gone}
    found = compare_stores(pair[0], write(tmp_path / "b", fewer, patches=patches))
    assert found.pairing.only_a.examples == [
        "case 2, sox10, match_2, patch 2",
        "case 10, h&e, match_10, patch 1",
        "case 10, h&e, match_10, patch 3",
    ]
    assert found.pairing.only_b.patches == found.pairing.changed.patches == 0
    a = {key: np.delete(values, gone.get(key, []), axis=0) for key, values in draw().items()}
    np.testing.assert_allclose(found.patches["norm_a"], np.linalg.norm(stacked(a), axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.patches["norm_b"], np.linalg.norm(stacked(fewer), axis=1), rtol=1e-6)
    turned = compare_stores(found.b, pair[0])  # the gaps on the other side
    np.testing.assert_allclose(turned.patches["cosine"], found.patches["cosine"], atol=1e-6)


def test_of_imported_stores_ids_alone_decide(pair: tuple[Store, Store], tmp_path: Path) -> None:
    spec = EmbeddingSpec.imported("clam", "uni", DIM, "float32")
    every = dict.fromkeys(draw(), 1)
    other = write(tmp_path / "b", moved(draw()), versions=every, spec=spec)
    found = compare_stores(pair[0], other)
    assert len(found.pairing) == sum(map(len, draw().values()))
    assert not found.pairing.hashed
    assert any("not known" in line for line in lines(found))
    assert numbers(found)["changed_files"] is None
    with pytest.raises(StoreError, match="files of other bytes"):
        compare_stores(pair[0], write(tmp_path / "c", moved(draw()), versions=every))


def test_stores_of_different_dims_have_no_cosine_and_all_the_rest(
    pair: tuple[Store, Store], tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    wide = {key: np.c_[values, rng.normal(size=(len(values), 3))] for key, values in moved(draw()).items()}
    found = compare_stores(pair[0], write(tmp_path / "b", wide))
    for name in ("cosine", "cosine_centred", "relative_change"):
        assert np.isnan(found.patches[name]).all()
    a, b = stacked(draw()), stacked(wide)
    assert found.alignment[0].linear == pytest.approx(cka_of_grams(a, b), abs=1e-5)
    assert found.neighbours["all"].overlap > found.neighbours["all"].chance
    assert any("undefined, the stores have 6 and 9 features" in line for line in lines(found))
    assert "numbers of features" in reading(found)
    old = [tmp_path / name for name in ("cosine_by_stain.png", "cosine_by_case.png")]
    for path in old:
        path.touch()
    drawn = plot_drift(found, tmp_path)
    assert [path.name for path in drawn] == ["measures.png", "pairs.png", "norms.png"]
    assert not any(path.exists() for path in old)


def test_patches_without_a_direction_are_counted_and_left_out_of_the_means(
    pair: tuple[Store, Store], tmp_path: Path
) -> None:
    zero = moved(draw())
    zero["2", "h&e", "match_2"] = np.zeros_like(zero["2", "h&e", "match_2"])
    found = compare_stores(pair[0], write(tmp_path / "b", zero))
    assert found.undefined == 5
    assert np.isnan(found.patches["cosine"]).sum() == 5
    assert not found.groups["cosine_mean"].isna().any()
    assert any("5 patches lie" in line for line in lines(found))


def test_the_sample_depends_on_its_seed_alone(pair: tuple[Store, Store]) -> None:
    first, again, other = (compare_stores(*pair, sample=40, seed=seed) for seed in (1, 1, 2))
    assert first.neighbours["all"].sampled == 40
    np.testing.assert_array_equal(first.pairs, again.pairs)
    assert not np.array_equal(first.pairs, other.pairs)
    assert compare_stores(*pair, sample=None).neighbours["all"].sampled == len(first.pairing)


def test_one_case_of_one_stain_and_two_patches_is_enough(tmp_path: Path) -> None:
    few = {("2", "h&e", "match_2"): draw()["2", "h&e", "match_2"][:2]}
    a = write(tmp_path / "a", few, order=("2",))
    b = write(tmp_path / "b", {key: -values for key, values in few.items()}, order=("2",))
    found = compare_stores(a, b)
    assert found.median("cosine_centred") == pytest.approx(-1)
    assert found.alignment[0].linear == pytest.approx(1)
    assert math.isnan(found.alignment[0].debiased)
    assert found.neighbours["other_cases"].queries == 0
    assert any("undefined, there are too few" in line for line in lines(found))
    assert reading(found)
    assert len(plot_drift(found, tmp_path)) == 5


def test_what_cannot_be_compared_is_refused(pair: tuple[Store, Store], tmp_path: Path) -> None:
    elsewhere = {("77", "h&e", "match_2"): np.ones((3, DIM))}
    with pytest.raises(StoreError, match="no patch in common") as error:
        compare_stores(pair[0], write(tmp_path / "b", elsewhere, order=("77",)))
    assert "B has case 77, h&e, match_2, patch 1" in error.value.where
    renamed = {(case, f"{stain}!", name): values for (case, stain, name), values in draw().items()}
    with pytest.raises(StoreError, match="no patch in common"):
        compare_stores(pair[0], write(tmp_path / "c", renamed))
    broken = draw()
    broken["10", "h&e", "match_2"] = np.full_like(broken["10", "h&e", "match_2"], np.nan)
    with pytest.raises(StoreError, match="case 10 has embeddings that are not finite"):
        compare_stores(pair[0], write(tmp_path / "d", broken))
    for wrong in ({"neighbours": 0}, {"sample": 1}):
        with pytest.raises(ConfigError, match=r"is [01]"):
            compare_stores(*pair, **wrong)


def test_a_damaged_case_is_told_as_the_store_tells_it(pair: tuple[Store, Store], tmp_path: Path) -> None:
    store = write(tmp_path / "b", moved(draw()))
    (part, *_) = store.folder("10").glob("*.h5")
    part.unlink()
    with pytest.raises(StoreDamaged):
        compare_stores(pair[0], Store.open(tmp_path / "b"))


def test_the_reading_claims_no_more_than_the_numbers(pair: tuple[Store, Store]) -> None:
    found = compare_stores(*pair)
    said = reading(found, (0.8, 0.9, Estimate(0.1, -0.1, 0.3)))
    assert "holds 0" in said
    assert "do not tell" in said
    assert "side of B" in reading(found, (0.8, 0.9, Estimate(0.1, 0.05, 0.3)))
    assert "side of A" in reading(found, (0.9, 0.8, Estimate(-0.1, -0.3, -0.05)))
    assert "without an interval" in reading(found, (0.9, 0.8, Estimate(-0.1, None, None, "none")))
    assert "class is missing" in reading(found, (None, None, Estimate(None, None, None, "none")))
    assert said.endswith("None of this says by itself which embeddings are better.")


def test_pictures_show_at_most_so_many_cases_and_survive_strange_names(
    pair: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_plots, "MOST_CASES", 2)
    shown: list[Any] = []
    monkeypatch.setattr(drift_plots, "save", lambda figure, path: shown.append(figure))
    found = compare_stores(*pair)
    stains = ["_$x^{$", "_"]
    found = replace(found, pairing=replace(found.pairing, stains=stains))
    plot_drift(found, tmp_path, (0.7, 0.8))
    by_stain, by_case = shown[1], shown[2]
    texts = [text.get_text() for text in by_stain.legends[0].get_texts()]
    assert [text.rpartition(" (")[0] for text in texts] == stains
    assert by_case.axes[0].get_title() == "Centred cosine by case: the 2 most drifted of 3 cases"
    medians = found.groups[(found.groups["stain"] == "") & (found.groups["case_id"] != "")]
    least = medians.astype({"cosine_centred_median": float}).nsmallest(2, "cosine_centred_median")
    ticks = [label.get_text() for label in by_case.axes[0].get_xticklabels()]
    assert ticks == least["case_id"].tolist()
