"""Pictures of a β-VAE: what it gives back, what it makes of chance, what its latents mean, its curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from featstore.files import replacing
from heads.evaluation.plots import COLORS, DPI, save
from heads.training.vae import VaeTraining

SHOWN = 8  # images of a part
SPREAD = np.linspace(-3, 3, 7, dtype=np.float32)  # standard deviations of the prior
LATENTS = 6  # that are varied, those in which the shown images differ most
_GAP, _CAPTION = 4, 18
Pictures = NDArray[np.uint8]
Ints = NDArray[np.int64]


def shown_images(chosen: Ints, environment: Ints) -> Ints:
    """Some of these images, evenly spread over them, environment by environment.

    Args:
        chosen: Indices.
        environment: Of every image that there is.
    """
    ordered = chosen[np.argsort(environment[chosen], kind="stable")]
    places = np.linspace(0, len(ordered) - 1, min(SHOWN, len(ordered))).round().astype(int)
    return np.asarray(ordered[places], np.int64)


def write_pictures(training: VaeTraining, folder: Path) -> None:
    """Write ``train.png`` and ``val.png`` (inputs, reconstructions), ``samples.png``, ``traversal.png``.

    Args:
        training: At any step.
        folder: Created if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = training.data
    for part, chosen in (("train", data.train), ("val", data.val)):
        pixels, given_back, means = training.reconstruct(shown_images(chosen, data.images.environment))
        _save(grid([pixels, as_pixels(given_back)], ["input", "reconstruction"]), folder / f"{part}.png")
    rng = np.random.default_rng(training.config.seed)
    drawn = rng.standard_normal((2 * SHOWN, training.config.latent), np.float32)
    made = as_pixels(training.decode(drawn))
    _save(grid([made[:SHOWN], made[SHOWN:]], ["codes drawn from the prior", ""]), folder / "samples.png")
    _save(_traversal(training, means), folder / "traversal.png")


def _traversal(training: VaeTraining, means: NDArray[np.float32]) -> Image.Image:
    """One image's code with one latent at a time set to values of the prior."""
    latents = np.argsort(-means.var(axis=0), kind="stable")[:LATENTS]
    codes = np.repeat(means[:1], len(latents) * len(SPREAD), axis=0)
    for row, latent in enumerate(latents):
        codes[row * len(SPREAD) : (row + 1) * len(SPREAD), latent] = SPREAD
    made = as_pixels(training.decode(codes)).reshape(len(latents), len(SPREAD), *_shape(training))
    span = f"from {SPREAD[0]:g} to {SPREAD[-1]:g}"
    return grid(list(made), [f"latent {latent} {span}" for latent in latents])


def _shape(training: VaeTraining) -> tuple[int, int, int]:
    return training.config.size, training.config.size, 3


def as_pixels(images: NDArray[np.float32]) -> Pictures:
    """Images in [0, 1] as uint8, rounded."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def grid(rows: Sequence[Pictures], captions: Sequence[str]) -> Image.Image:
    """Rows of images with a line of text above each row that has one.

    Args:
        rows: (N, H, W, 3) uint8 each.
        captions: One a row; empty for none.
    """
    height, width = rows[0].shape[1:3]
    tops, top = [], 0
    for caption in captions:
        top += _CAPTION * bool(caption)
        tops.append(top)
        top += height + _GAP
    sheet = Image.new("RGB", (max(map(len, rows)) * (width + _GAP) - _GAP, top - _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, caption, place in zip(rows, captions, tops, strict=True):
        if caption:
            draw.text((2, place - _CAPTION + 2), caption, fill="black", font=font)
        for column, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (column * (width + _GAP), place))
    return sheet


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as aside:
        image.save(aside, format="PNG")


def plot_vae_history(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the curves of a training: losses, KL and w, classification.

    Args:
        history: The rows of its log.
        path: The PNG.
    """
    table = pd.DataFrame(history)
    figure = Figure(figsize=(7.5, 10.0), dpi=DPI, layout="constrained")
    panels: Any = figure.subplots(4, 1, sharex=True)
    names = ("recon_loss", "KLD_loss", "CE", "accuracy")
    labels = ("reconstruction (BCE)", "KL divergence", "cross-entropy", "accuracy")
    for axes, name, label in zip(panels, names, labels, strict=True):
        _draw(axes, table, name)
        axes.set(ylabel=label)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
    right = panels[1].twinx()
    line = right.plot(table["step"], table["w"], color="0.35", linestyle=":", label="w (right)")
    right.set(ylabel="w", ylim=(-0.02, 1.02))
    panels[1].legend(handles=[*panels[1].lines, *line])
    panels[0].legend()
    panels[-1].set(xlabel="step", ylim=(-0.02, 1.02))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save(figure, path)


def _draw(axes: Axes, table: pd.DataFrame, name: str) -> None:
    for part, text, style, (color, marker) in (
        ("", "training", "-", COLORS[0]),
        ("val_", "validation, by the mean code", "--", COLORS[1]),
    ):
        if part + name not in table:
            continue
        found = table[["step", part + name]].dropna()
        marks = marker if len(found) <= 40 else None
        axes.plot(
            found["step"], found[part + name], color=color, linestyle=style, marker=marks,
            markersize=4, linewidth=1.6, label=text,
        )  # fmt: skip
