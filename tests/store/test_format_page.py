"""The snippets of docs/format.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from featstore.store import StoreWriter
from tests import helpers
from tests.store.builders import DIM, make_slice, make_spec

PAGE = (helpers.ROOT / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("package", "file_format"), [("h5py", "hdf5"), ("zarr", "zarr")])
def test_a_store_is_read_without_featstore(
    package: str,
    file_format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (code,) = [snippet for snippet in snippets if f"import {package}" in snippet]
    assert "featstore" not in code
    writer = StoreWriter(tmp_path / "store", make_spec(), {}, file_format)
    writer.commit("3", [make_slice("3", "h&e", "match_1", [1, 2, 3, 4, 5])])
    writer.commit("3", [make_slice("3", "H E", "__s", [1]), make_slice("3", "h&e", "match_1", [2], 1)])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/format.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        f"h&e match_1 1,3-5 (4, {DIM}) float16",
        f"H E __s 1 (1, {DIM}) float16",
        f"h&e match_1 2 (1, {DIM}) float16",
    ]
