"""Arrays in NumPy's own files, never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from featstore.interop.source import ImportProblem


def load_numpy(path: Path, member: str | None = None, mapped: bool = False) -> NDArray[Any]:
    """An array from a .npy file, or a member of a .npz file; never a pickle.

    Raises:
        ImportProblem: The file cannot be read, or holds Python objects.
    """
    try:
        if mapped:
            return np.lib.format.open_memmap(path, mode="r")
        with open(path, "rb") as raw:
            found = np.load(raw, allow_pickle=False)
            if isinstance(found, NpzFile):
                if member is None:
                    raise ValueError("it is an .npz file, not an .npy file")
                found = found[member]
            elif member is not None:
                raise ValueError("it is an .npy file, not an .npz file")
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds no array")
        return found
    except Exception as error:  # what numpy raises depends on where the bytes stop making sense
        raise ImportProblem(
            f"the file cannot be read as an array ({error})",
            expected="an array of numbers, as NumPy saves it without pickle",
            where=str(path),
            fix="save it again, or leave it out with --on-bad skip",
        ) from error
