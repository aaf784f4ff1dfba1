from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from heads.evaluation import case_plots, plots
from tests import helpers

PICTURES = {
    "model_loss.png", "model_accuracy.png", "model_auc.png", "loss_terms.png", "learning_rate.png",
    "gradient_norm.png", "attention.png",
}  # fmt: skip
HOSTILE = ["$\\frac{$", "\x1b[31mred\n\ttab", "_hidden", "漢字 \udcff \0", "x" * 300]


def full_history(epochs: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = ["cross_entropy", "loss", *plots.TERMS, "accuracy", "auc", "batch_loss_variance"]
    for level in plots.LEVELS:
        names += [
            f"{kind}_{level}" for kind in ("attention_entropy", "effective_instances", "top1_attention")
        ]
    columns = [f"{part}_{name}" for part in ("train", "val") for name in names]
    columns += ["seconds", "lr", "temperature", "grad_norm"]
    values = {name: rng.uniform(0.1, 0.9, epochs) for name in columns}
    return pd.DataFrame({"epoch": np.arange(1, epochs + 1), **values})


def figures(history: pd.DataFrame) -> dict[str, Figure | None]:
    return dict(plots._history_figures(history))


def figure_of(history: pd.DataFrame, name: str) -> Figure:
    figure = figures(history)[name]
    assert figure is not None
    return figure


def line_data(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata(), float) for line in axes.lines}


def assert_picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24) or []) > 5
        return image


def test_every_picture_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    written = plots.plot_history(full_history(6), folder)
    assert {path.name for path in written} == PICTURES == {path.name for path in folder.iterdir()}
    for path in written:
        assert assert_picture(path).width > 1000


def test_every_column_is_drawn_once_and_seconds_never() -> None:
    history = full_history(5)
    drawn = [
        tuple(np.asarray(line.get_ydata(), float))
        for figure in figures(history).values()
        if figure is not None
        for axes in figure.axes
        for line in axes.lines
        if len(np.asarray(line.get_xdata())) == 5
    ]
    want = [tuple(history[name]) for name in history.columns if name not in ("epoch", "seconds")]
    assert sorted(drawn) == sorted(want)


def test_the_loss_and_its_best_epoch() -> None:
    history = full_history(5)
    history["val_cross_entropy"] = [0.9, np.nan, 0.25, 0.5, 0.25]
    history["val_loss"] = [0.1, 0.5, 0.6, 0.7, 0.8]
    axes = figure_of(history, "model_loss").axes[0]
    data = line_data(axes)
    for label, column in {
        "cross-entropy, training": "train_cross_entropy",
        "cross-entropy, validation": "val_cross_entropy",
        "objective, training": "train_loss",
        "objective, validation": "val_loss",
    }.items():
        np.testing.assert_array_equal(data[label], history[column])
    best = next(line for line in axes.lines if str(line.get_label()) == "best epoch: 3 (0.25)")
    assert list(np.asarray(best.get_xdata())) == [3, 3]
    styles = {str(line.get_label()): (line.get_linestyle(), line.get_linewidth()) for line in axes.lines}
    assert styles["cross-entropy, training"][0] == "-"
    assert styles["cross-entropy, validation"][0] == "--"
    assert styles["objective, validation"][1] < styles["cross-entropy, validation"][1]
    legend = axes.get_legend()
    assert legend is not None
    assert "best epoch: 3 (0.25)" in [text.get_text() for text in legend.get_texts()]


def test_the_epochs_number_counts_not_the_row() -> None:
    history = full_history(3).assign(epoch=[11, 12, 13], val_cross_entropy=[0.3, 0.1, 0.2])
    assert "best epoch: 12 (0.1)" in line_data(figure_of(history, "model_loss").axes[0])


def test_without_validation_nothing_is_best() -> None:
    history = full_history(3)[["epoch", "train_cross_entropy"]]
    assert list(line_data(figure_of(history, "model_loss").axes[0])) == ["cross-entropy, training"]


def test_what_is_absent_or_undefined_is_not_written(tmp_path: Path) -> None:
    history = full_history(4)[["epoch", "train_accuracy", "val_auc", "train_loss", "temperature"]]
    history = history.assign(val_auc=np.nan, train_loss=[np.inf, None, np.nan, -np.inf], unheard_of="text")
    (tmp_path / "model_auc.png").write_bytes(b"of an earlier training")
    (tmp_path / "other.png").write_bytes(b"not ours")
    written = plots.plot_history(history, tmp_path)
    assert {path.name for path in written} == {"model_accuracy.png", "learning_rate.png"}
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model_accuracy.png", "learning_rate.png", "other.png"}
    assert plots.plot_history(history[["epoch"]], tmp_path / "empty") == []
    assert plots.plot_history(full_history(0), tmp_path / "none") == []


def test_absent_terms_and_levels_leave_no_trace() -> None:
    history = full_history(4)
    gone = [c for c in history if "confidence" in c or c.endswith(("_stain", "_selection"))]
    history = history.drop(columns=gone).assign(val_aux_loss=np.nan)
    terms = figure_of(history, "loss_terms").axes
    labels = [axes.get_ylabel() for axes in terms]
    assert labels == ["entropy penalty", "elastic net penalty", "aux loss"]
    assert list(line_data(terms[2])) == ["training"]
    figure = figure_of(history, "attention")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [
        f"{level}, {part}" for level in ("patch", "slice") for part in ("training", "validation")
    ]


def test_a_level_has_one_colour_and_a_part_one_style() -> None:
    for axes in figure_of(full_history(4), "attention").axes:
        lines = {str(line.get_label()): line for line in axes.lines}
        assert len({to_hex(line.get_color()) for line in lines.values()}) == 4
        assert len({line.get_marker() for line in lines.values()}) == 4
        for level in plots.LEVELS:
            solid, dashed = lines[f"{level}, training"], lines[f"{level}, validation"]
            assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
            assert solid.get_color() == dashed.get_color() == solid.get_markerfacecolor()
            assert dashed.get_markerfacecolor() == "white"


def test_learning_rate_is_logarithmic_and_temperature_has_its_own_axis() -> None:
    history = full_history(4)
    left, right = figure_of(history, "learning_rate").axes
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    np.testing.assert_array_equal(line_data(right)["temperature"], history["temperature"])
    legend = left.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["learning rate", "temperature"]
    assert len(figure_of(history.drop(columns="temperature"), "learning_rate").axes) == 1
    (alone,) = figure_of(history.drop(columns="lr"), "learning_rate").axes
    assert list(line_data(alone)) == ["temperature"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 51, 2], "log"),
        ([1, 49, 2], "linear"),
        ([0, 99, 2], "linear"),
        ([-1, 99, 2], "linear"),
        ([1, np.inf, 2], "linear"),
    ],
)
def test_wide_positive_values_are_logarithmic(values: list[float], scale: str) -> None:
    axes = figure_of(full_history(3).assign(grad_norm=values), "gradient_norm").axes[0]
    assert axes.get_yscale() == scale


def test_one_epoch_has_markers_and_one_tick(tmp_path: Path) -> None:
    history = full_history(1).assign(lr=0.0)
    for path in plots.plot_history(history, tmp_path):
        assert_picture(path)
    axes = figure_of(history, "model_accuracy").axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    for line in axes.lines:
        assert line.get_markevery() == [0]
        assert line.get_marker() not in ("", "None")


def test_of_many_epochs_only_those_between_gaps_are_marked() -> None:
    auc = np.full(100, 0.5)
    auc[[0, 10, 12, 98]] = np.nan
    history = full_history(100).assign(val_auc=auc)
    train, val = figure_of(history, "model_auc").axes[0].lines
    assert train.get_markevery() == []
    assert val.get_markevery() == [11, 99]


def test_cells_of_the_confusion_matrix() -> None:
    matrix = np.array([[3, 1, 0], [0, 0, 0], [1, 1, 6]])
    axes = case_plots._confusion_figure(matrix, ["a", "b", "c"]).axes[0]
    cells = {text.get_position(): text for text in axes.texts}
    want = [["3\n75 %", "1\n25 %", "0\n0 %"], ["0\n–"] * 3, ["1\n12 %", "1\n12 %", "6\n75 %"]]
    assert [[cells[(c, r)].get_text() for c in range(3)] for r in range(3)] == want
    assert (cells[(0, 0)].get_color(), cells[(1, 0)].get_color()) == ("black", "white")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert "12 cases" in axes.get_title()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "b", "c"]
    (image,) = axes.images
    assert np.asarray(image.get_array()).tolist() == [[75, 25, 0], [0, 0, 0], [12.5, 12.5, 75]]


def test_deviation_is_one_minus_p_of_the_true_class() -> None:
    true = np.array([1, 0, 2, 0, 1])
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0, 0, 1], [0.9, 0, 0.1], [0.45, 0.5, 0.05]])
    figure = case_plots._deviation_figure(list("abcde"), true, p, ["x", "y", "z"])
    (axes,) = figure.axes
    x, y, z, wrong = axes.lines
    np.testing.assert_allclose(np.sort(np.asarray(x.get_ydata())), [0.1, 0.6])
    np.testing.assert_allclose(np.sort(np.asarray(y.get_ydata())), [0.5, 0.7])
    np.testing.assert_allclose(np.asarray(z.get_ydata()), [0.0])
    np.testing.assert_allclose(np.asarray(wrong.get_ydata()), [0.7])
    ticks = dict(zip(axes.get_xticks(), [t.get_text() for t in axes.get_xticklabels()], strict=True))
    assert list(ticks.values()) == ["d", "b", "e", "a", "c"]
    assert [ticks[place] for place in np.asarray(wrong.get_xdata())] == ["a"]
    assert max(np.asarray(x.get_xdata())) + 1 < min(np.asarray(y.get_xdata()))
    stems = [segment[-1].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert sorted(stems) == sorted([at, h] for line in (x, y, z) for at, h in line.get_xydata().tolist())
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["x: 0 of 2 wrong", "y: 1 of 2 wrong", "z: 0 of 1 wrong", "wrong"]


@pytest.mark.parametrize(
    ("threshold", "wrong", "limits"),
    [(None, ["c"], [0.5]), (0.3, ["b"], [0.3, 0.7]), (0.6, ["c", "d"], [0.6, 0.4])],
)
def test_a_case_is_wrong_by_the_threshold_and_the_lines_show_it(
    threshold: float | None, wrong: list[str], limits: list[float]
) -> None:
    """Class y is called from the threshold on, itself included."""
    of_y = np.array([0.1, 0.3, 0.35, 0.55, 0.9])
    true, p = np.array([0, 0, 1, 1, 1]), np.stack([1 - of_y, of_y], axis=1)
    figure = case_plots._deviation_figure(list("abcde"), true, p, ["x", "y"], threshold)
    (axes,) = figure.axes
    ticks = dict(zip(axes.get_xticks(), [t.get_text() for t in axes.get_xticklabels()], strict=True))
    x, y, crosses, *lines = axes.lines
    assert sorted(ticks[place] for place in np.asarray(crosses.get_xdata())) == wrong
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    counts = [sum(case in wrong for case in cases) for cases in ("ab", "cde")]
    assert texts == [f"x: {counts[0]} of 2 wrong", f"y: {counts[1]} of 3 wrong", "wrong"]
    assert [np.asarray(line.get_ydata()).tolist() for line in lines] == [
        pytest.approx([limit] * 2) for limit in limits
    ]
    if threshold is not None:  # each class has its own line, over its own cases
        for cases, line in zip((x, y), lines, strict=True):
            low, high = np.asarray(line.get_xdata())
            inside = [low < place < high for place in ticks]
            assert inside == [place in np.asarray(cases.get_xdata()) for place in ticks]


def test_a_threshold_where_one_class_has_no_case() -> None:
    figure = case_plots._deviation_figure(["a"], np.array([1]), np.array([[0.4, 0.6]]), ["x", "y"], 0.7)
    assert np.asarray(figure.axes[0].lines[-1].get_ydata()).tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("cases", [1, 2, 40, 41, 200])
def test_few_and_many_cases(tmp_path: Path, cases: int, classes: int) -> None:
    rng = np.random.default_rng(cases)
    p = rng.dirichlet(np.ones(classes), cases)
    true, ids = rng.integers(0, classes, cases), [f"case {i}" for i in range(cases)]
    names = [f"class {c}" for c in range(classes)]
    case_plots.plot_deviation(ids, true, p, names, tmp_path / "a.png")
    assert_picture(tmp_path / "a.png")
    (axes,) = case_plots._deviation_figure(ids, true, p, names).axes
    half = [line for line in axes.lines if np.asarray(line.get_ydata()).tolist() == [0.5, 0.5]]
    assert len(half) == (classes == 2)
    shown = {label.get_text() for label in axes.get_xticklabels()}
    assert shown == (set(ids) if cases <= 40 else set())


def test_hostile_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    n = len(HOSTILE)
    case_plots.plot_confusion(np.eye(n, dtype=np.int64), HOSTILE, tmp_path / "confusion.png")
    even = np.full((n, n), 1 / n)
    case_plots.plot_deviation(HOSTILE, np.arange(n), even, HOSTILE, tmp_path / "deviation.png")
    for name in ("confusion.png", "deviation.png"):
        assert_picture(tmp_path / name)
    figure = case_plots._deviation_figure(HOSTILE, np.arange(n), np.eye(n), HOSTILE)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == [
        "$\\frac{$: 0 of 1 wrong", "\\x1b[31mred\\n\\x09tab: 0 of 1 wrong", "_hidden: 0 of 1 wrong",
    ]  # fmt: skip
    ids = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert max(map(len, ids)) == plots.NAME_LENGTH
    assert len(set(ids)) == n


def test_long_names_keep_both_ends() -> None:
    one, two = (plots.shorten(f"TCGA-AB-1234-01Z-00-DX1-{i}") for i in range(2))
    assert one != two
    assert one.startswith("TCGA-AB-1234")
    assert plots.shorten("n" * plots.NAME_LENGTH) == "n" * plots.NAME_LENGTH


def test_arrays_that_do_not_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"\(2, 3\), 2 class names"):
        case_plots.plot_confusion(np.ones((2, 3), np.int64), ["a", "b"], path)
    with pytest.raises(ValueError, match=r"1 case ids, labels \(2,\)"):
        case_plots.plot_deviation(["1"], np.array([0, 1]), np.eye(2), ["a", "b"], path)
    with pytest.raises(ValueError, match="0 case ids"):
        case_plots.plot_deviation([], np.zeros(0, np.int64), np.zeros((0, 2)), ["a", "b"], path)
    assert not path.exists()


def test_threads_draw_the_same_picture_and_leave_no_filter(tmp_path: Path) -> None:
    before = list(warnings.filters)

    def draw(i: int) -> None:
        case_plots.plot_confusion(np.array([[1, 2], [3, 4]]), ["a", "漢"], tmp_path / f"{i}.png")

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(4)}) == 1
    assert warnings.filters == before


def test_pyplot_is_never_loaded(tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np, pandas as pd\n"
        "from pathlib import Path\n"
        "from heads.evaluation import case_plots, plots\n"
        "folder = Path(sys.argv[1])\n"
        "plots.plot_history(pd.DataFrame({'epoch': [1], 'lr': [0.1]}), folder)\n"
        "case_plots.plot_confusion(np.eye(2, dtype=int), ['a', 'b'], folder / 'c.png')\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
