"""What λ means in each unit, and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.control import setpoints
from steering.errors import ControlError, DimensionMismatch, SpecError
from steering.types import Units
from tests.control.cases import directions

UNITS: tuple[Units, ...] = ("centred", "contrast", "absolute")


def concept() -> tuple[torch.Tensor, ...]:
    """Means of negative and positive examples with a common offset, and v, v·μ₋, ‖E‖ of them."""
    negative, positive = 5 + 3 * directions(4, 8, 1), 5 + 3 * directions(4, 8, 2)
    contrast = positive - negative
    magnitude = contrast.norm(dim=1)
    v = contrast / magnitude[:, None]
    return negative, positive, v, (v * negative).sum(1), magnitude


def test_centred_zero_and_one_are_the_two_means() -> None:
    negative, positive, v, offset, magnitude = concept()
    schedule = setpoints("centred", offset, magnitude)
    torch.testing.assert_close(schedule.beta(0.0), (v * negative).sum(1))
    torch.testing.assert_close(schedule.beta(1.0), (v * positive).sum(1))


def test_contrast_is_the_published_target_and_absolute_is_the_projection() -> None:
    *_, offset, magnitude = concept()
    torch.testing.assert_close(setpoints("contrast", offset, magnitude).beta(1.5), 1.5 * magnitude)
    torch.testing.assert_close(setpoints("absolute", offset, magnitude).beta(-2.5), torch.full_like(offset, -2.5))


@settings(deadline=None)
@given(target=st.floats(-1e3, 1e3), units=st.sampled_from(UNITS))
def test_measuring_inverts_the_schedule(target: float, units: Units) -> None:
    *_, offset, magnitude = concept()
    schedule = setpoints(units, offset, magnitude)
    read = schedule.measured(schedule.beta(target))
    torch.testing.assert_close(read, torch.full_like(offset, target), rtol=1e-9, atol=1e-9)


def test_measuring_takes_a_row_for_every_token() -> None:
    *_, offset, magnitude = concept()
    schedule = setpoints("centred", offset, magnitude)
    z_TL = torch.stack([schedule.beta(0.5), schedule.beta(-1.0)])
    torch.testing.assert_close(schedule.measured(z_TL)[:, 0], torch.tensor([0.5, -1.0], dtype=torch.float64))


def test_a_layer_without_contrast_measures_nothing() -> None:
    offset, magnitude = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    read = setpoints("centred", offset, magnitude).measured(torch.tensor([7.0, 10.0]))
    assert math.isnan(read[0])
    assert read[1] == 2.0
    assert setpoints("absolute", offset, magnitude).measured(torch.tensor([7.0, 10.0])).tolist() == [7.0, 10.0]


def test_what_is_wrong_is_named() -> None:
    *_, offset, magnitude = concept()
    with pytest.raises(SpecError, match="expected one of centred, contrast, absolute, got 'percent'"):
        setpoints("percent", offset, magnitude)  # type: ignore[arg-type]
    with pytest.raises(DimensionMismatch):
        setpoints("centred", offset[:2], magnitude)
    magnitude[2] = -1
    with pytest.raises(ControlError, match="row 2"):
        setpoints("centred", offset, magnitude)
    offset[1] = math.nan
    with pytest.raises(ControlError, match="row 1"):
        setpoints("centred", offset, magnitude)
