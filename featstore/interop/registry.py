"""Which foreign formats there are, and which one a folder is in."""

from __future__ import annotations

import os
from pathlib import Path

from featstore.interop import hdf5_files
from featstore.interop.clam import Clam
from featstore.interop.slideflow import Slideflow
from featstore.interop.source import ImportProblem, Options, Source, files_named
from featstore.interop.stamp import Stamp
from featstore.interop.table import Table
from featstore.interop.torchmil import Torchmil
from featstore.interop.trident import Trident
from featstore.interop.vectors import Vectors

FORMATS: dict[str, type[Source]] = {
    kind.format: kind for kind in (Clam, Trident, Stamp, Slideflow, Torchmil, Table, Vectors)
}


def open_source(path: Path, format_name: str, options: Options) -> Source:
    """A folder or file in a foreign format.

    Args:
        path: The folder or file.
        format_name: One of `FORMATS`, or ``auto``: the one that it seems to be in.
        options: What the files do not say.

    Raises:
        ImportProblem: There is nothing, it is in no known layout, or in several.
    """
    if format_name != "auto" and format_name not in FORMATS:
        raise ImportProblem(
            f"there is no format {format_name!r}",
            expected=f"auto, {', '.join(FORMATS)}",
            where="--from",
            fix="leave out --from, and the format is recognised",
        )
    if not path.exists():
        raise ImportProblem(
            "there is nothing at this path",
            expected="a folder or a table of features",
            where=str(path),
            fix="check the path",
        )
    path = Path(os.path.abspath(path))  # formats look at a folder's own name, and "." has none
    if format_name != "auto":
        kind = FORMATS[format_name]
        if path.is_dir() == (kind is Table):
            raise ImportProblem(
                f"this is a {'folder' if path.is_dir() else 'file'}",
                expected=kind.layout,
                where=str(path),
                fix="name the right path, or another format: --from FORMAT",
            )
        return kind(path, options)
    possible = [kind for kind in FORMATS.values() if kind is Table or path.is_dir()]
    fitting = [kind for kind in possible if kind.looks_right(path)]
    layouts = "\n    ".join(f"{kind.format}: {kind.layout}" for kind in FORMATS.values())
    if len(fitting) != 1:
        damaged = files_named(path, ".h5") if path.is_dir() and not fitting else []
        if damaged and hdf5_files.first_readable(damaged) is None:
            with hdf5_files.opened(damaged[0]):  # says what is wrong with it
                pass
        found = " and ".join(kind.format for kind in fitting)
        raise ImportProblem(
            f"the layout could be that of {found}" if fitting else "this is no layout that is known",
            expected=f"one of\n    {layouts}",
            where=str(path),
            fix="say which with --from FORMAT, or name the folder that holds the files",
        )
    return fitting[0](path, options)
