"""Work that a step does not need: modules whose output nobody wants, and columns of weights that meet only zeros.

Both replace a module's computation on the engine's own shell, and only in steps whose every token allows it.

    blank    an attention or an MLP whose output every token throws away (`skip_layers`) is not run. Its keys and values
             are then missing from the cache, which only those could read who throw its output away all their lives
    sparse   in decode steps of few tokens on a GPU, the linear maps behind a sparsified site read the columns of their
             weights whose input is not zero. Of B tokens with a share s of zeros each all columns but s^B are read, so
             this pays for single requests. The columns are a second copy of the weight, made when a site is first
             sparse: other trees read the weight at any time, and its layout decides how dense products are rounded
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from kernels import sparse_linear
from steering.errors import PlantError
from steering.plant.plant import Plant
from steering.plant.quantised import is_quantised
from steering.plant.taps import linears_at, site_module
from steering.types import Route, Site

FEW = 4
"""Most tokens of a step whose linear maps read columns apart."""
_INSIDE = {
    "attn_out": ("attn_act", "q_out", "k_out", "v_out"),
    "mlp_out": ("mlp_act", "gate_out", "up_out"),
}
"""Sites within the module that makes a site, which are not there when it is left out."""


class Shortcuts:
    """The shortcuts of one engine. `blank` and `sparse` are the sites of the running step; empty between steps.

    left_out: called with the layer when its attention does not run, and so leaves no keys and values.
    """

    def __init__(self, plant: Plant, shell: nn.Module, left_out: Callable[[int], None]) -> None:
        self._left_out = left_out
        self._plant = plant
        self._shell = shell
        self._ready: set[tuple[str, Site]] = set()
        self.few = FEW if plant.device.type == "cuda" else 0
        """Most tokens of a step with sparse linear maps: on a CPU gathering columns costs more than it saves."""
        self.blank: frozenset[Site] = frozenset()
        self.sparse: frozenset[Site] = frozenset()

    def blankable(self, sites: frozenset[Site], routes: tuple[Route, ...]) -> frozenset[Site]:
        """Those of `sites` whose module can be left out, because no route reads or writes within it; made ready."""
        found = set()
        for site in sites:
            inside = {Site(tap, site.layer) for tap in _INSIDE.get(site.tap, ())}  # type: ignore[arg-type]
            if inside and not any(route.read in inside or route.write in inside for route in routes):
                self._make_blankable(site)
                found.add(site)
        return frozenset(found)

    def sparsifiable(self, sites: frozenset[Site], n_tokens: int) -> frozenset[Site]:
        """Those of `sites` that are read column by column in a step of so many tokens; made ready."""
        if n_tokens > self.few:
            return frozenset()
        return frozenset(site for site in sites if self._make_sparse(site))

    def _make_blankable(self, site: Site) -> None:
        if ("blank", site) in self._ready:
            return
        module = site_module(self._shell, self._plant.layout, site)
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if site not in self.blank:
                return compute(*args, **kwargs)
            nothing = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
            if site.tap != "attn_out":
                return nothing
            self._left_out(site.layer)
            return nothing, None

        module.forward = forward
        self._ready.add(("blank", site))

    def _make_sparse(self, site: Site) -> bool:
        """False where no linear map reads the site, one is stored in a way of its own (Conv1D, quantised), or there is
        no memory for columns."""
        if ("sparse", site) in self._ready:
            return True
        try:
            linears = linears_at(self._shell, self._plant.layout, site)
            if any(type(linear) is not nn.Linear or is_quantised(linear) for linear in linears):
                return False
            columns = [cast("nn.Linear", linear).weight.detach().t().contiguous().t() for linear in linears]
        except (PlantError, torch.OutOfMemoryError):
            return False
        for linear, weight in zip(linears, columns, strict=True):
            self._read_by_column(cast("nn.Linear", linear), weight, site)
        self._ready.add(("sparse", site))
        return True

    def _read_by_column(self, linear: nn.Linear, weight: torch.Tensor, site: Site) -> None:
        compute = linear.forward

        def forward(x_BTD: torch.Tensor) -> torch.Tensor:
            if site not in self.sparse:
                return compute(x_BTD)
            return sparse_linear(x_BTD[0], weight, linear.bias)[None]

        cast("Any", linear).forward = forward
