"""The two ways in which a CPU runs an operator."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["compiled", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What numba compiled, and what runs where there is no numba."""
    if request.param == "reference":
        monkeypatch.setattr("kernels._cpu.jit", None)
    else:
        pytest.importorskip("numba")
    return str(request.param)
