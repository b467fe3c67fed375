"""Units are scored as scipy scores them, ties and all, and what is the same in every text is left out."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import mannwhitneyu

from steering.fit.units import aurocs, massive_units, ordinary, without_position_0
from tests.tolerances import CORE


@pytest.mark.parametrize(("n_plus", "n_minus"), [(1, 1), (2, 9), (13, 5)])
def test_each_column_s_auroc_is_scipy_s_with_ties(n_plus: int, n_minus: int) -> None:
    generator = torch.Generator().manual_seed(n_plus)
    plus, minus = (torch.randint(-2, 3, (n, 40), generator=generator).double() for n in (n_plus, n_minus))
    plus[:, :5] += torch.rand(n_plus, 5, generator=generator)  # without ties
    expected = torch.from_numpy(mannwhitneyu(plus.numpy(), minus.numpy(), axis=0).statistic) / (n_plus * n_minus)
    for chunk in (7, 4096):
        torch.testing.assert_close(aurocs(plus, minus, chunk=chunk), expected, **CORE["law"])


def test_position_0_goes_where_another_is_left() -> None:
    rows = [([5, 6, 7], range(3)), ([5], range(1)), ([5, 6, 7], [1, 1, 2])]
    assert [chosen for _, chosen in without_position_0(rows)] == [[1, 2], [0], [1, 1, 2]]


def test_massive_tokens_go_where_another_is_left() -> None:
    x = torch.ones(4, 8)
    x[2, 3] = -5000.0
    assert torch.equal(ordinary(x), torch.ones(3, 8))
    assert torch.equal(ordinary(x[2:3]), x[2:3])
    x[2, 3] = 99.0  # large, but below what any activation may be
    assert torch.equal(ordinary(x), x)


@pytest.mark.parametrize(("large", "found"), [(49.0, []), (-51.0, [4])])
def test_massive_units_are_fifty_times_the_median(large: float, found: list[int]) -> None:
    mean = torch.tensor([1.0, -1.0, 1.0, 1.0, large])
    assert massive_units(mean).nonzero().flatten().tolist() == found
    assert not massive_units(torch.tensor([0.0, 0.0, 0.0, 9.0])).any()  # no median to compare with
