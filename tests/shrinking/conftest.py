"""What removes channels: Torch-Pruning's functions, and NNI's ModelSpeedup where NNI is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gumbel_plugin.shrinking.shrink import Engine


@pytest.fixture(scope="session")
def by_nni() -> Engine:
    """Return what removes channels by NNI's ModelSpeedup."""
    pytest.importorskip("nni")
    from gumbel_nni.compat.exact_speedup import remove_by_nni

    return remove_by_nni


@pytest.fixture(params=["torch_pruning", "nni"])
def engine(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Engine | None]:
    """Return each engine of the adapters; NNI's must do without the help of the other one."""
    yield None if request.param == "torch_pruning" else request.getfixturevalue("by_nni")
    assert "Torch-Pruning's functions do it" not in caplog.text
