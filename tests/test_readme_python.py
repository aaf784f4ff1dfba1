"""The README's Python, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from featstore.store import StoreWriter
from tests.store.builders import make_slice, make_spec

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path / "store", make_spec(), {})
    for case in ("3", "8"):
        writer.commit(case, [make_slice(case, "h&e", "match_1", list(range(1, 44)))])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found: dict = {}
    for block in blocks:
        exec(block, found)
    store, batch = found["store"], found["batch"]
    assert store.cases() == ["3", "8"]
    assert np.array_equal(store.take("3", [0, 17, 40]), found["bag"].features[[0, 17, 40]])
    assert found["cohort"].resident.shape == (86, found["bag"].features.shape[1])
    assert batch.labels.tolist() == [0, 1]
    assert batch.slice_offsets.tolist() == [0, 43, 86]
