"""The feed-forward modules of an engine's shell, compiled by torch where nobody looks inside.

One region a block, of any number of tokens, so that it is compiled once for all blocks and all batches: seconds at the
start, less when inductor finds what it made in its cache on disk (`TORCHINDUCTOR_CACHE_DIR`). A module is left as it is
from the step on in which a site within it is first tapped: what was compiled calls no hooks.

What it gives is what the module gives but for the order and rounding of its operations. So the promise that a neighbour
changes no bit of a request holds here only as long as nobody's program is first to tap a site within such a module.
Measured on one core at width 192, where a call costs more than it saves: 0.8 of the speed at 1 request, 0.87 at 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from steering.errors import SpecError
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.types import Site

INSIDE = ("mlp_in", "mlp_act", "gate_out", "up_out")
"""Taps that read or change what goes on within a feed-forward module, or replace a linear map of it."""
_ROWS = (1, 2)
"""Tokens of the trial at the start: torch compiles one row apart from any larger number."""


class Compiled:
    """The compiled modules of one shell.

    Raises SpecError where the model has no plain feed-forward modules, or nothing can be compiled on this machine.
    """

    def __init__(self, plant: Plant, shell: nn.Module) -> None:
        self._left_out: set[int] = set()
        if plant.layout.mlp_act is None:
            raise SpecError(
                "compile",
                expected="a model with plain feed-forward modules",
                got="one that mixes experts",
                advice="leave compile out",
            )
        modules = [block.get_submodule(plant.layout.mlp) for block in blocks_of(shell, plant.layout)]
        for layer, module in enumerate(modules):
            cast("Any", module).forward = self._forward(layer, module.forward)
        try:
            with torch.inference_mode():
                for n in _ROWS:
                    x_1TD = torch.zeros(1, n, plant.width, dtype=plant.model.dtype, device=plant.device)
                    for module in modules:
                        module(x_1TD)
        except Exception as error:
            raise SpecError(
                "compile",
                expected="a compiler that torch can use: for C++ on a CPU, for C with Python's headers beside a GPU",
                got=f"{type(error).__name__}",
                advice="install g++ (Debian: apt install g++ python3-dev), or leave compile out",
            ) from error

    def leave_out(self, site: Site) -> None:
        """Run the module as it is if this site, which is going to be tapped, lies within it."""
        if site.tap in INSIDE:
            self._left_out.add(site.layer)

    def _forward(self, layer: int, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        compiled = torch.compile(plain, dynamic=True, fullgraph=True)

        def forward(x_1TD: Tensor) -> Tensor:
            return plain(x_1TD) if layer in self._left_out else compiled(x_1TD)

        return forward
