"""What every test starts from: one thread, fixed seeds, reproducible properties."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# derandomize: the same examples on every machine · deadline: nothing here is timed
settings.register_profile(
    "setpoint", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("setpoint")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Whatever a test draws from torch's own generator is the same in every order of the tests."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
