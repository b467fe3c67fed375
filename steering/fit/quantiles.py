"""Tables of what a model's linear maps read: column norms, quantiles of the scores, tail errors, low-rank rests.

    score_i = |x_i| w_i,   w = 1 or w_i = ‖W_:,i‖ over the stacked maps W that read the site
    quantile_s = the ⌈s N⌉-th smallest of the N scores of all coordinates and tokens that are read

Quantiles are order statistics, at a thousand shares. The published histograms (10 000 bins, both 1 % tails folded in)
assume a density that is symmetric about 0, which an MLP's activations do not have.
Cost: a forward pass of the texts for every `POOLED` numbers, and a sort of each site's.   Oracle: numpy's quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.edit import Acting
from steering.fit.allocation import tail_errors
from steering.fit.trial import Row
from steering.plan.sparsity import Rule, Score, SparseTap, sparse
from steering.plant.capture import Pause, capture_each
from steering.plant.plant import Plant
from steering.types import Site

GRID = 1000
"""Steps of a site's table of quantiles."""
POOLED = 2**26
"""Most numbers of activations that are held at a time: a quarter of a gigabyte. More blocks take more passes."""
TAIL_STEPS, TAIL_TOKENS = 100, 256
"""Thresholds and tokens of a table of CETT."""


@dataclass(frozen=True, eq=False)
class Table:
    """What is known of each site of each block, (n, S): score weights, quantiles at i / GRID, the maps' sizes, rest."""

    layers: tuple[int, ...]
    taps: tuple[SparseTap, ...]
    weight: list[list[Tensor]]
    quantile: list[list[Tensor]]
    rest: list[list[Tensor]]
    size: tuple[int, ...]
    tails: Tensor
    """CETT of each block's MLP (n, TAIL_STEPS + 1) for the allocation that goes by it, else empty."""

    def threshold(self, row: int, site: int, share: float) -> float:
        """The score's quantile at `share`, linear between its neighbours in the table."""
        table, place = self.quantile[row][site], share * GRID
        i = min(int(place), GRID - 1)
        return float(torch.lerp(table[i], table[i + 1], place - i))

    def edits(self, share_nS: Tensor, rule: Rule, rows: Sequence[int] | None = None) -> dict[Site, Acting]:
        """What leaves out these shares; of all blocks, or of `rows`."""
        found: dict[Site, Acting] = {}
        for row in range(len(self.layers)) if rows is None else rows:
            for site, tap in enumerate(self.taps):
                share = float(share_nS[row, site])
                edit = sparse(
                    self.weight[row][site], share, self.threshold(row, site, share), rule, self.rest[row][site]
                )
                if edit is not None:
                    found[Site(tap, self.layers[row])] = edit
        return found


def tabled(
    plant: Plant,
    rows: Sequence[Row],
    layers: tuple[int, ...],
    taps: tuple[SparseTap, ...],
    *,
    score: Score,
    rank: int = 0,
    tails: bool = False,
    progress: Callable[[int, int], None] | None = None,
    pause: Pause | None = None,
) -> Table:
    """Weights, rests and quantiles of every site; some blocks at a time, so that their activations fit in memory.

    tails: whether the first site's tail errors are tabled too.
    """
    tokens = sum(len(ids) - start for ids, start in rows)
    numbers = tokens * sum(plant.width_of(Site(tap, layers[0])) for tap in taps)
    group = max(1, POOLED // max(numbers, 1))
    weight: list[list[Tensor]] = []
    quantile: list[list[Tensor]] = []
    rest: list[list[Tensor]] = []
    errors: list[Tensor] = []
    size: tuple[int, ...] = ()
    place_G = torch.arange(1, GRID + 1) / GRID
    for begin in range(0, len(layers), group):
        part = layers[begin : begin + group]
        found: dict[Site, list[Tensor]] = {Site(tap, layer): [] for layer in part for tap in taps}
        capture_each(
            plant,
            [ids for ids, _ in rows],
            list(found),
            lambda site, n, x_TE: found[site].append(x_TE.float().cpu()),  # noqa: B023 (called before the next pass)
            [range(start, len(ids)) for ids, start in rows],
            pause=pause,
        )
        for layer in part:
            maps = [plant.linears_at(Site(tap, layer)) for tap in taps]
            size = tuple(sum(W_OE.numel() for W_OE in reading) for reading in maps)
            norms = [torch.cat(reading).norm(dim=0) for reading in maps]
            weight.append(norms if score == "wina" else [torch.ones_like(norm_E) for norm_E in norms])
            rest.append([rest_basis(reading, rank) for reading in maps])
            states = [torch.cat(found.pop(Site(tap, layer))) for tap in taps]
            tables = []
            for x_TE, weight_E in zip(states, weight[-1], strict=True):
                ordered = (x_TE.abs() * weight_E).flatten().sort().values
                index = (place_G * len(ordered)).ceil().long().clamp(1, len(ordered)) - 1
                tables.append(torch.cat([torch.zeros(1), ordered[index]]))
                if pause is not None:
                    pause()
            quantile.append(tables)
            if tails:
                every = max(1, len(states[0]) // TAIL_TOKENS)
                steps = tables[0][:: GRID // TAIL_STEPS]
                errors.append(tail_errors(states[0][::every], torch.cat(maps[0]), steps))
            if progress is not None:
                progress(len(weight), len(layers))
    return Table(layers, taps, weight, quantile, rest, size, torch.stack(errors) if errors else torch.empty(0))


def rest_basis(weights: Sequence[Tensor], rank: int) -> Tensor:
    """Top right-singular vectors (rank, E) of the stacked maps, from the smaller Gram matrix in float64."""
    W_OE = torch.cat(list(weights)).double()
    if rank == 0:
        return torch.zeros(0, W_OE.shape[1])
    if W_OE.shape[0] >= W_OE.shape[1]:
        return torch.linalg.eigh(W_OE.mT @ W_OE).eigenvectors.flip(1)[:, :rank].mT.float().contiguous()
    V_ER = W_OE.mT @ torch.linalg.eigh(W_OE @ W_OE.mT).eigenvectors.flip(1)[:, :rank]
    return torch.linalg.qr(V_ER).Q.mT.float().contiguous()
