"""What all tests share: real data where it is, GPU tests where a GPU is, hypothesis without deadlines."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# The networks of the tests are tiny: several threads only wait for one another, for seconds on a
# busy machine. Set before anything loads OpenMP, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests import helpers

# Shared machines are slow in bursts; the blob lets a failure in CI be replayed elsewhere.
settings.register_profile("featstore", deadline=None, print_blob=True)
settings.load_profile("featstore")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared real data; the test skips where it is absent."""
    folder = helpers.shared_data()
    if folder is None:
        pytest.skip("no shared data: FEATSTORE_SHARED_DATA names no folder, and ../shared/data is absent")
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_openvino_by_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep `runtime: auto` from loading OpenVINO into this process: children forked later would crash."""
    with pytest.MonkeyPatch.context() as patch:
        if not any(Path(str(argument)).name == "runtimes.py" for argument in request.config.args):
            patch.setattr("featstore.extraction.forward.find_spec", lambda name: None)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use shared data, and skip GPU tests where there is no GPU."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared_data)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is false"))


def _has_gpu() -> bool:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old is told by a warning
        return torch.cuda.is_available()
