"""What the house promises about itself: who imports whom, what the wheel holds, how long files are."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import helpers

MAX_LINES = 320
FEATSTORE = sorted((helpers.ROOT / "featstore").rglob("*.py"))
HEADS = sorted((helpers.ROOT / "heads").rglob("*.py"))
CLI = [helpers.ROOT / "cli.py"]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside its package, unless it climbs out of it.
            depth = len(file.relative_to(helpers.ROOT).parts) - 1
            outside = node.level > depth
            names = [node.module or ""] if not node.level else ["beyond the package"] * outside
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__"):
                names = [
                    str(arg.value).lstrip(".") for arg in node.args[:1] if isinstance(arg, ast.Constant)
                ]
        for name in names:
            yield node.lineno, name.partition(".")[0]


def offences(files: list[Path], forbidden: set[str]) -> list[str]:
    return [
        f"{file.relative_to(helpers.ROOT)}:{line} imports {name}"
        for file in files
        for line, name in imports(file)
        if name in {*forbidden, "beyond the package"}
    ]


def test_featstore_imports_neither_heads_nor_the_command_line() -> None:
    assert offences(FEATSTORE, {"heads", "cli", "tests"}) == []


def test_heads_do_not_import_the_command_line() -> None:
    assert offences(HEADS, {"cli", "tests"}) == []


@pytest.mark.parametrize(
    "line",
    [
        "import heads",
        "import numpy, heads.config as c",
        "from heads import config",
        "def f():\n    from heads.config import Config",
        "if TYPE_CHECKING:\n    import heads",
        "importlib.import_module('heads.config')",
        "from ... import heads",
    ],
)
def test_the_rule_sees_every_way_to_import(
    tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    file = tmp_path / "featstore" / "sub" / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"from . import a\nfrom .. import b\n{line}\n")
    assert len(offences([file], {"heads"})) == 1


def test_no_file_is_too_long() -> None:
    files = [*FEATSTORE, *HEADS]  # cli.py has a short function a command, and grows with their number
    long = {str(f): n for f in files if (n := len(f.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert long == {}


def test_the_package_alone_imports_neither_torch_nor_pandas() -> None:
    script = (
        "import sys, featstore, heads.config, cli\n"
        "assert featstore.__all__\n"
        "print(*sorted({'torch', 'timm', 'zarr', 'matplotlib', 'pandas', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=helpers.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_every_public_name_can_be_had() -> None:
    import featstore

    for name in featstore.__all__:
        assert getattr(featstore, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = featstore.nothing_like_it


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The built wheel; building it must leave nothing in the repository."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    before = {path.name for path in helpers.ROOT.iterdir()}
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=helpers.ROOT,
        capture_output=True,
        check=True,
    )
    assert {path.name for path in helpers.ROOT.iterdir()} == before
    (file,) = folder.iterdir()
    return zipfile.Path(file)


def test_the_wheel_holds_exactly_what_it_should(wheel: zipfile.Path) -> None:
    names = wheel.root.namelist()
    tops = {name.partition("/")[0] for name in names}
    (info,) = {name for name in tops if name.endswith(".dist-info")}
    assert tops == {"featstore", "heads", "cli.py", info}
    assert info.startswith("featstore-")
    assert {"featstore/py.typed", "heads/py.typed", "featstore/__init__.py"} <= set(names)
    inside = {name for name in names if name.endswith(".py")}
    tracked = {str(file.relative_to(helpers.ROOT)) for file in [*FEATSTORE, *HEADS, *CLI]}
    assert inside == tracked
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_installs_the_command(wheel: zipfile.Path) -> None:
    (entry,) = [name for name in wheel.root.namelist() if name.endswith("entry_points.txt")]
    assert "featstore = cli:app" in wheel.root.read(entry).decode()
