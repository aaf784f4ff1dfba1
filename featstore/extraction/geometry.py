"""Where a patch lies on its slice: the four corners that the store keeps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.store.format import GEOMETRY_COLUMNS


def corners(table: pd.DataFrame) -> NDArray[np.float64] | None:
    """Four corners of every patch in level-0 pixels, clockwise from the top left.

    Args:
        table: Patches with ``x, y[, width, height]``, with ``x0 … y3``, or with neither.

    Returns:
        (P, 8) float64: x0, y0, …, x3, y3; without width and height the other three
        corners are NaN. None for a table without geometry.
    """
    if set(GEOMETRY_COLUMNS) <= set(table.columns):
        return table[list(GEOMETRY_COLUMNS)].to_numpy(np.float64)
    if not {"x", "y"} <= set(table.columns):
        return None
    x, y = table["x"].to_numpy(np.float64), table["y"].to_numpy(np.float64)
    unknown = np.full(len(table), np.nan)
    w = table["width"].to_numpy(np.float64) if "width" in table.columns else unknown
    h = table["height"].to_numpy(np.float64) if "height" in table.columns else unknown
    return np.column_stack([x, y, x + w, y, x + w, y + h, x, y + h])
