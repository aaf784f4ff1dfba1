"""Nearest patches, one PNG's embedding, and the map of all patches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from PIL import Image
from sklearn.decomposition import PCA

from featstore.errors import ConfigError, FeatstoreError, FingerprintMismatch, ImageError, StoreError
from featstore.extraction import extract
from featstore.store import Slice, Store, StoreWriter
from heads.config import Config
from heads.evaluation.plots import save
from heads.inspect import maps
from heads.inspect import similar as module
from heads.inspect.similar import cohort_mean, embed_png, plot_map, project_2d, similar
from heads.inspect.similar_files import similar_project
from heads.inspect.tables import IDENTITY
from tests import helpers
from tests.extraction.conftest import config_of, make_project
from tests.store.builders import make_slice, make_spec

DIM = 16
CASES, STAINS, SLICES, PATCHES = ("2", "10", "TCGA-AA"), ("h&e", "sox10"), ("s1", "s2"), 20


def write(path: Path, features: Callable[[str, str, str], np.ndarray], **spec: Any) -> Store:
    """A store of float32 features; ``features`` gives those of a case, stain and slice."""
    spec = {"dim": DIM, "stored_dtype": "float32", **spec}
    writer = StoreWriter(path, make_spec(**spec), {"test": True})
    for case in CASES:
        slices = []
        for stain in STAINS:
            for slice_id in SLICES:
                values = features(case, stain, slice_id).astype(spec["stored_dtype"])
                like = make_slice(case, stain, slice_id, list(range(1, len(values) + 1)))
                slices.append(Slice(stain, slice_id, {**like.columns, "features": values}))
        writer.commit(case, slices)
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Embeddings that share a large common part, as those of networks do."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 30, DIM)
    return write(
        tmp_path_factory.mktemp("similar") / "store",
        lambda *key: common + rng.normal(0, 1, (PATCHES, DIM)) * np.linspace(2, 0.2, DIM),
    )


def everything(store: Store) -> tuple[pd.DataFrame, np.ndarray]:
    table = store.table()
    return table, np.concatenate([store.features(case) for case in store.cases()]).astype(np.float64)


def by_hand(store: Store, vector: np.ndarray, metric: str) -> pd.DataFrame:
    """The table with its nearness to a vector, largest first; ties in the table's order."""
    table, features = everything(store)
    if metric == "cosine":
        centred, query = features - features.mean(axis=0), vector - features.mean(axis=0)
        near = centred @ query / np.linalg.norm(centred, axis=1) / np.linalg.norm(query)
    else:
        near = -np.linalg.norm(features - vector, axis=1)
    return table.assign(near=near).sort_values("near", ascending=False, kind="stable")


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("as_path", [True, False])
def test_the_nearest_patches_are_those_by_the_formula(store: Store, metric: Any, as_path: bool) -> None:
    table, features = everything(store)
    for row in (0, 57, 130):
        patch = table.loc[row]
        key = (patch["case_id"], patch["stain"], patch["slice_id"], patch["patch"])
        found = similar(store, patch["path"] if as_path else key, 25, metric)
        wanted = by_hand(store, features[row], metric).drop(index=row).head(25)
        assert found["path"].tolist() == wanted["path"].tolist()
        assert found["rank"].tolist() == list(range(1, 26))
        assert list(found.columns[2:]) == IDENTITY
        column, sign = ("similarity", 1) if metric == "cosine" else ("distance", -1)
        assert np.allclose(sign * found[column], wanted["near"], atol=1e-4)


def test_embeddings_are_centred_by_the_mean_of_all_patches(store: Store) -> None:
    _, features = everything(store)
    assert np.allclose(cohort_mean(store), features.mean(axis=0), rtol=1e-12)
    raw = features[0] @ features[1] / np.linalg.norm(features[0]) / np.linalg.norm(features[1])
    assert raw > 0.99  # without centring everything is alike
    assert similar(store, features[0], 240)["similarity"].min() < -0.5
    again = similar(store, features[0], 5, mean=cohort_mean(store))
    assert again.equals(similar(store, features[0], 5))


def test_a_patch_is_left_out_of_its_own_neighbours_and_a_vector_is_not(store: Store) -> None:
    table, features = everything(store)
    assert table["path"].iloc[3] not in similar(store, table["path"].iloc[3], 240)["path"].tolist()
    first = similar(store, features[3], 240)
    assert len(first) == 240
    assert first["path"].iloc[0] == table["path"].iloc[3]
    assert first["similarity"].iloc[0] == pytest.approx(1, abs=1e-5)


def test_the_choices_narrow_what_is_compared(store: Store) -> None:
    table, features = everything(store)
    patch, ranked = table.iloc[100], by_hand(store, features[100], "cosine").drop(index=100)
    path = patch["path"]
    for settings, wanted in (
        ({"exclude_case": True}, ranked[ranked["case_id"] != patch["case_id"]]),
        ({"exclude_case": "2"}, ranked[ranked["case_id"] != "2"]),
        ({"stain": "sox10"}, ranked[ranked["stain"] == "sox10"]),
        ({"per_case": 2}, ranked.groupby("case_id", sort=False).head(2)),
        (
            {"per_case": 3, "stain": "h&e", "exclude_case": True},
            ranked[(ranked["stain"] == "h&e") & (ranked["case_id"] != patch["case_id"])]
            .groupby("case_id", sort=False)
            .head(3),
        ),
    ):
        found = similar(store, path, 30, **settings)  # type: ignore[arg-type]
        assert found["path"].tolist() == wanted["path"].head(30).tolist()


def test_several_vectors_have_a_block_each(store: Store) -> None:
    _, features = everything(store)
    found = similar(store, features[[5, 9]], 4)
    assert found["query"].tolist() == [0] * 4 + [1] * 4
    for q, row in enumerate((5, 9)):
        mine = found[found["query"] == q].drop(columns="query").reset_index(drop=True)
        assert mine.equals(similar(store, features[row], 4))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_embeddings_come_in_the_tables_order(
    tmp_path: Path, metric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    kinds = rng.normal(0, 1, (3, 100))
    equal = write(tmp_path / "store", lambda *key: kinds[np.arange(37) % 3], dim=100)
    monkeypatch.setattr(module, "_BLOCK", 10)  # so that equal rows stand at every place in a block
    found = similar(equal, kinds[0], 10_000, metric)
    table, features = everything(equal)
    order = by_hand(equal, kinds[0].astype(np.float32), metric)
    same = np.flatnonzero((features == features[0]).all(axis=1))
    assert found["path"].head(len(same)).tolist() == table["path"].iloc[same].tolist()
    assert len(set(found.iloc[:, 1].tolist())) == 3
    assert set(found["path"]) == set(order["path"])


def test_what_lies_at_the_mean_is_like_nothing(tmp_path: Path) -> None:
    values = np.concatenate([np.eye(DIM)[:2], -np.eye(DIM)[:2], np.zeros((1, DIM))])
    found = similar(write(tmp_path / "store", lambda *key: values), np.eye(DIM)[0], 100)
    assert found["similarity"].value_counts().to_dict() == {1.0: 12, 0.0: 36, -1.0: 12}


@pytest.mark.parametrize(
    ("query", "settings", "error", "says"),
    [
        ("nothing.png", {}, StoreError, "no patch is called nothing.png"),
        (("2", "h&e", "s1", 99), {}, StoreError, "no patch 99 of slice s1, h&e, case 2"),
        (("9", "h&e", "s1", 1), {}, StoreError, "no patch 1 of slice s1, h&e, case 9"),
        (np.zeros(DIM), {"exclude_case": True}, ConfigError, "a vector, which is of no case"),
        (np.zeros(DIM), {"stain": "giemsa"}, StoreError, "no stain 'giemsa'"),
        (np.zeros(DIM), {"k": 0}, ConfigError, "k is 0"),
        (np.zeros(DIM), {"per_case": 0}, ConfigError, "per_case is 0"),
        (np.zeros(DIM), {"metric": "manhattan"}, ConfigError, "unknown metric"),
        (np.zeros(DIM + 1), {}, ValueError, "shape"),
        (np.full(DIM, np.nan), {}, ValueError, "finite"),
    ],
)
def test_what_cannot_be_asked_is_told(
    store: Store, query: Any, settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        similar(store, query, **settings)


def renamed(name: str) -> Callable[..., Any]:
    def make(case: str, stain: str, slice_id: str, patches: list[int]) -> Slice:
        found = make_slice(case, stain, slice_id, patches)
        paths = [f"{case}/{stain}/{name}{patch}.png".encode() for patch in patches]
        return Slice(stain, slice_id, {**found.columns, "source_name": np.array(paths)})

    return make


def test_a_bare_file_name_serves_where_only_one_patch_has_it(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", make_spec(), {"test": True})
    for case, name in (("1", "a"), ("2", "a"), ("3", "only")):
        writer.commit(case, [renamed(name)(case, "h&e", "s1", [1, 2, 3])])
    found = Store.open(tmp_path / "store")
    assert similar(found, "only2.png", 8)["path"].tolist().count("3/h&e/only2.png") == 0
    assert similar(found, "only2.png", 8).equals(similar(found, Path("3/h&e/only2.png"), 8))
    with pytest.raises(StoreError, match=r"2 patches of the store are called a1\.png"):
        similar(found, "a1.png")
    with pytest.raises(StoreError) as error:
        similar(found, "b1.png")
    assert error.value.fix == "check the path, or name a PNG file to have it embedded"


def test_patches_of_one_name_in_two_folders_have_files_of_their_own(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", make_spec(), {"test": True})
    for case, name in (("1", "a"), ("2", "a"), ("3", "only")):
        writer.commit(case, [renamed(name)(case, "h&e", "s1", [1, 2, 3])])
    queries = ("1/h&e/a1.png", "2/h&e/a1.png", "3/h&e/only1.png")
    written = [similar_project(Config(), tmp_path, query).files[0].name for query in queries]
    assert len(set(written)) == 3
    assert written[2] == "nearest_only1.csv"


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: similar(store, np.zeros(DIM)),
        lambda store: similar(store, np.zeros(DIM), metric="euclidean"),
        lambda store: similar(store, np.zeros(DIM), mean=np.zeros(DIM)),
        cohort_mean,
        project_2d,
    ],
)
def test_embeddings_that_are_not_finite_are_told(tmp_path: Path, ask: Callable[[Store], Any]) -> None:
    values = np.ones((3, DIM))
    values[1, 2] = np.inf
    store = write(tmp_path / "store", lambda case, *key: values if case == "10" else np.ones((2, DIM)))
    with pytest.raises(StoreError, match="case 10 has embeddings that are not finite"):
        ask(store)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(
        tmp_path_factory.mktemp("embed") / "p", cases=2, stains=("h&e", "sox10"), slices=1, patches=3
    )
    extract(config_of(folder), folder)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_png_of_the_store_is_embedded_as_it_was(project: Path, tmp_path: Path, dtype: str) -> None:
    config = config_of(project, extract__dtype=dtype, store__path=str(tmp_path / "store"))
    extract(config, project)
    store = Store.open(tmp_path / "store")
    table, features = everything(store)
    assert len(table) == 12
    # What extract says now does not matter: the store's own dtypes do.
    asked = config_of(project, extract__dtype="float16", extract__compile=True)
    for row in (0, 7):
        vector = embed_png(project / "patches" / table["path"].iloc[row], store, asked, project)
        assert vector.dtype == np.dtype(dtype)
        assert np.array_equal(vector.astype(np.float64), features[row])
        assert similar(store, vector, 1)["path"].tolist() == [table["path"].iloc[row]]


def test_a_file_of_swapped_colours_is_read_as_such(project: Path, tmp_path: Path) -> None:
    store, config = Store.open(project / "store"), config_of(project)
    file = sorted((project / "patches").glob("*.png"))[0]
    Image.fromarray(np.asarray(Image.open(file))[..., ::-1].copy()).save(tmp_path / "swapped.png")
    wanted = embed_png(file, store, config, project)
    assert np.array_equal(embed_png(tmp_path / "swapped.png", store, config, project, "bgr"), wanted)
    assert not np.array_equal(embed_png(tmp_path / "swapped.png", store, config, project), wanted)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"backbone__weights": "random:1"}, "weights_sha256"),
        ({"backbone__resize": 64}, "resize: 64 here, 32 there"),
        (
            {"backbone__pool": 1, "backbone__name": "timm:test_vit", "backbone__resize": "model"},
            "backbone:",
        ),
    ],
)
def test_other_weights_or_preprocessing_than_the_stores_are_refused(
    project: Path, settings: dict[str, Any], says: str
) -> None:
    file = sorted((project / "patches").glob("*.png"))[0]
    with pytest.raises(FingerprintMismatch) as error:
        embed_png(file, Store.open(project / "store"), config_of(project, **settings), project)
    assert says in error.value.found


def test_imported_features_and_files_that_are_no_patches_are_refused(project: Path, tmp_path: Path) -> None:
    imported = write(tmp_path / "store", lambda *key: np.ones((2, DIM)), backbone="imported:clam")
    with pytest.raises(StoreError, match="imported"):
        embed_png(tmp_path / "a.png", imported, config_of(project), project)
    store = Store.open(project / "store")
    (tmp_path / "a.png").write_text("no image")
    for name in ("a.png", "gone.png"):
        with pytest.raises(ImageError):
            embed_png(tmp_path / name, store, config_of(project), project)


def test_at_native_sizes_a_patch_that_extraction_would_skip_is_refused(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p", cases=1, stains=("h&e",), slices=1, patches=2, size=48)
    extract(config_of(project, backbone__resize="native"), project)
    rng = np.random.default_rng(0)
    helpers.noise_patch(rng, 31).save(tmp_path / "small.png")
    store, config = Store.open(project / "store"), config_of(project, backbone__resize="native")
    with pytest.raises(ImageError, match="below 32 px"):
        embed_png(tmp_path / "small.png", store, config, project)
    helpers.noise_patch(rng, 80).save(tmp_path / "large.png")
    few = config_of(project, backbone__resize="native", extract__native_pixels=5000)
    with pytest.raises(ImageError, match="80 × 80 px are more than 5,000 pixels") as error:
        embed_png(tmp_path / "large.png", store, few, project)
    assert "on-bad-image" not in str(error.value)
    path = store.table()["path"].iloc[1]
    vector = embed_png(project / "patches" / path, store, config, project)
    assert np.array_equal(vector, store.features("1")[1])


def test_the_map_is_that_of_scikit_learn(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_BLOCK", 7)
    found = project_2d(store)
    table, features = everything(store)
    pca = PCA(2, svd_solver="full").fit(features)
    places = pca.transform(features)
    for column, place, loadings in zip(("pc1", "pc2"), places.T, pca.components_, strict=True):
        sign = np.sign(loadings[np.abs(loadings).argmax()])
        assert np.allclose(found[column], sign * place, atol=1e-8)
    assert np.allclose(found.attrs[maps.EXPLAINED], pca.explained_variance_ratio_, rtol=1e-9)
    assert found[IDENTITY].equals(table[IDENTITY])


def test_the_map_of_some_cases_is_fitted_on_them(store: Store) -> None:
    found = project_2d(store, ["TCGA-AA", "2"])
    assert list(dict.fromkeys(found["case_id"])) == ["TCGA-AA", "2"]
    features = np.concatenate([store.features("TCGA-AA"), store.features("2")]).astype(float)
    assert np.allclose(np.abs(found["pc1"]), np.abs(PCA(1).fit_transform(features)[:, 0]), atol=1e-6)
    assert found.index.tolist() == [*store.outline("TCGA-AA").rows, *store.outline("2").rows]
    with pytest.raises(StoreError):
        project_2d(store, ["nobody"])


@pytest.mark.parametrize(("n", "dim"), [(1, 16), (3, 1), (1, 1)])
def test_few_patches_or_dimensions_have_a_map_too(tmp_path: Path, n: int, dim: int) -> None:
    values = np.arange(n * dim, dtype=float).reshape(n, dim)
    found = project_2d(write(tmp_path / "store", lambda *key: values, dim=dim))
    assert np.isfinite(found[["pc1", "pc2"]]).all(axis=None)
    assert sum(found.attrs[maps.EXPLAINED]) == pytest.approx(1 if n > 1 else 0)
    save(plot_map(found), tmp_path / "map.png")


def map_of(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(n, 2)), columns=["pc1", "pc2"])
    table["stain"] = np.array(["h&e", "melan", "sox10"])[np.arange(n) % 3]
    table["class"] = [f"class {i % 11}" for i in range(n)]
    table["times_equal"] = rng.gamma(0.2, 1, n)
    table.loc[:3, "times_equal"] = 0.0
    return table


@pytest.mark.parametrize("n", [30, 50_000])
@pytest.mark.parametrize("color_by", ["stain", "class", "attention"])
def test_a_drawn_map_has_every_patch_or_evenly_chosen_ones(n: int, color_by: Any, tmp_path: Path) -> None:
    figure = plot_map(map_of(n), color_by)
    drawn = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    places = np.concatenate([np.asarray(c.get_offsets()) for c in drawn])
    wanted = map_of(n).iloc[np.linspace(0, n - 1, min(n, maps.MOST_POINTS)).round().astype(int)]
    assert sorted(places[:, 0]) == sorted(wanted["pc1"])
    assert all(c.get_rasterized() for c in drawn)
    title = figure.axes[0].get_title()
    assert title.endswith("30 patches" if n == 30 else "20,000 of 50,000 patches, evenly chosen")
    save(figure, tmp_path / "map.png")


def test_the_legend_counts_all_patches() -> None:
    legend = plot_map(map_of(50_000), "stain").legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "h&e (16,667)", "melan (16,667)", "sox10 (16,666)",
    ]  # fmt: skip
    legend = plot_map(map_of(110), "class").legends[0]
    assert [text.get_text() for text in legend.get_texts()][-1] == "6 others (60)"


def test_points_have_their_groups_colour() -> None:
    table = map_of(90)
    figure = plot_map(table, "stain")
    colours = {
        tuple(place): tuple(c.get_facecolor()[0][:3])
        for c in figure.axes[0].collections
        for place in np.asarray(c.get_offsets())  # type: ignore[attr-defined]
    }
    by_stain = {
        s: {colours[tuple(p)] for p in g[["pc1", "pc2"]].to_numpy()} for s, g in table.groupby("stain")
    }
    assert [len(found) for found in by_stain.values()] == [1, 1, 1]
    assert len(set().union(*by_stain.values())) == 3


def test_patches_without_a_class_are_left_out_of_its_map() -> None:
    table = map_of(30)
    table.loc[:9, "class"] = None
    assert plot_map(table, "class").axes[0].get_title() == "Embeddings by class: 20 patches"


def test_the_colours_of_attention_say_what_they_are_multiples_of() -> None:
    points, bar = plot_map(map_of(30), "attention").axes
    (drawn,) = points.collections
    assert bar.get_ylabel() == "× equal share (logarithmic)"
    wanted = np.sort(map_of(30)["times_equal"])
    top = np.asarray(drawn.get_array())[-20:]
    assert np.allclose(top, wanted[-20:])


@pytest.mark.parametrize("values", [0.0, 1.0])
def test_attention_without_a_range_is_drawn(values: float, tmp_path: Path) -> None:
    save(plot_map(map_of(30).assign(times_equal=values), "attention"), tmp_path / "map.png")


@pytest.mark.parametrize("color_by", ["class", "attention", "colour"])
def test_a_column_that_is_not_there_is_told(color_by: Any) -> None:
    table = map_of(30).drop(columns=["class", "times_equal"])
    with pytest.raises(FeatstoreError, match="no values to be coloured by") as error:
        plot_map(table, color_by)
    assert error.value.expected == "stain"
