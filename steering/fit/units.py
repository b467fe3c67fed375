"""Statistics of single units of a site: what is read of a text, and how well each unit tells two classes apart.

    AUROC_m = (#{z₊ > z₋} + ½ #{z₊ = z₋}) / (n₊ n₋)          for every unit m at once, O(n log n) each

Left out are position 0, which soaks up attention, and tokens with a massive activation (arXiv:2402.17762): a maximum
over a text would be one of them in every text. Massive dimensions are those whose mean is above 50 times the median
over the site's units; where that is 0 there are none.
Source: the area under the ROC curve is Mann and Whitney's U.   Oracle: `scipy.stats.mannwhitneyu`, unit by unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steering.plant.massive import are_massive

MASSIVE_DIMENSION = 50.0
"""|mean| over the median |mean| of a site's units."""


def without_position_0(rows: Sequence[tuple[list[int], Sequence[int]]]) -> list[tuple[list[int], Sequence[int]]]:
    """Encoded examples without position 0 among what is read, but where it is all that there is."""
    return [(ids, [p for p in chosen if p != 0] or list(chosen)) for ids, chosen in rows]


def ordinary(x_TE: Tensor) -> Tensor:
    """The tokens of a text without those with a massive activation; all of them where no other is left."""
    is_massive_T = are_massive(x_TE).any(-1)
    return x_TE if bool(is_massive_T.all()) else x_TE[~is_massive_T]


def massive_units(mean_E: Tensor) -> Tensor:
    """Boolean (E,): the units whose mean is out of all proportion."""
    size_E = mean_E.abs()
    median = float(size_E.median())
    return size_E > MASSIVE_DIMENSION * median if median > 0 else torch.zeros_like(size_E, dtype=torch.bool)


def aurocs(positive_NE: Tensor, negative_NE: Tensor, *, chunk: int = 4096) -> Tensor:
    """Area under the ROC curve (E,), float64, of each column; ties count half."""
    parts = []
    for start in range(0, positive_NE.shape[1], chunk):
        plus_EN = positive_NE[:, start : start + chunk].mT.contiguous()
        minus_EN = negative_NE[:, start : start + chunk].mT.contiguous().sort(dim=1).values
        below, upto = (torch.searchsorted(minus_EN, plus_EN, right=right) for right in (False, True))
        parts.append((below + upto).double().mean(1) / (2 * minus_EN.shape[1]))
    return torch.cat(parts)
