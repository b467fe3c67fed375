"""Two processes that share models, started once for all tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from steering.plant.shared import leave
from steering.plant.team import Crew, Group

CPU = torch.device("cpu")
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: pip install 'setpoint[parallel]'",
)


@pytest.fixture(scope="module")
def team() -> Iterator[tuple[Crew, Group]]:
    """A crew of one follower, and this process's group with it."""
    crew = Crew(2, CPU)
    try:
        with crew.together("join", {}):
            group = Group.join(0, 2, crew.folder, CPU)
        yield crew, group
    finally:
        crew.close()
        leave()
