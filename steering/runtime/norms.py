"""The norms of an engine's shell: one launch each, and on a GPU one together with the law before it.

A norm written in six torch operators costs a small batch six times what it should. Every norm of the shell whose output
is that of `kernels.norm_` is therefore replaced, for steered and unsteered steps alike: the promise that strength 0
changes no bit holds because both run the same code. Which form a norm has is found by running it beside the kernel's
on random rows, not by its name; one that computes anything else keeps its forward pass, and so does one that somebody
has replaced before. The plant's own model, on which is fitted, keeps all of its own.

On a GPU a law that writes the output of a block waits until the norm that reads it is called, and runs in its launch.
It waits for that very tensor: whatever else looks at the state first (a gate, another law) has the law run before it
looks, by calling `flush`. Who merely keeps the state, to read it later, finds it changed: laws write in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels import bind_norm, norm_
from kernels.binding import Bound
from kernels.norm import FORMS, Form
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.types import Site

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What is computed in float32: a model of another dtype keeps its norms."""

UNITS = 8
"""Largest difference between a norm and its form, in units in the last place of the largest number of a row: another
order of the sum makes one or two, another ε or meaning of the weight thousands."""

SCALES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""Of the rows on which forms are compared: in small ones ε shows, in float16 none overflows."""


class Norm(NamedTuple):
    """What a norm computes: the arguments of `kernels.norm_` behind the rows."""

    weight_E: Tensor
    bias_E: Tensor | None
    form: Form
    eps: float


class _Waiting(NamedTuple):
    """A law that has not run yet: its rows, itself, and its arguments behind them."""

    y_TE: Tensor
    x_TD: Tensor
    run: Bound
    arguments: tuple[Tensor, ...]


class Norms:
    """The norms of one shell. `waits`: laws may wait for them, which pays where a launch costs more than its work."""

    def __init__(self, plant: Plant, shell: nn.Module, waits: bool) -> None:
        self._waiting: _Waiting | None = None
        replaced = set()
        for module in shell.modules():
            norm = norm_of(module, plant.model.dtype, plant.device)
            if norm is not None:
                cast("Any", module).forward = self._forward(norm) if waits else bind_norm(*norm)
                replaced.add(module)
        self.replaced = frozenset(replaced)
        self._awaited = _read_first(plant, shell, replaced) if waits else frozenset()

    def fused(self, site: Site, run: Bound, *arguments: Tensor) -> Bound:
        """The last law that writes `site`: `run`, or, where a norm of ours reads the site next, one that waits for it.

        `arguments`: those of `feedback_` behind the rows. A law that reads more than it writes does not wait: it asks
        for more warps than its norm, and a token's result must not tell how it was launched.
        """
        probe_SRD, gain_SRE = arguments[1:3]
        if site not in self._awaited or probe_SRD.shape[2] > gain_SRE.shape[2]:
            return run

        def wait(y_TE: Tensor, x_TD: Tensor) -> None:
            self.flush()
            self._waiting = _Waiting(y_TE, x_TD, run, arguments)

        return wait

    def flush(self) -> None:
        """Run the law that waits, if one does."""
        if (law := self._waiting) is not None:
            self._waiting = None
            law.run(law.y_TE, law.x_TD)

    def settle(self) -> None:
        """End a step. Raises RuntimeError if a law is still waiting: the step was not steered as it should be."""
        if self._waiting is not None:
            self._waiting = None
            raise RuntimeError("a law waited for a norm that did not come: this model does not read its blocks so")

    def drop(self) -> None:
        """Forget what waits, after a step that failed."""
        self._waiting = None

    def _forward(self, norm: Norm) -> Callable[[Tensor], Tensor]:
        alone = bind_norm(*norm)

        def forward(state: Tensor) -> Tensor:
            if (law := self._waiting) is None:
                return alone(state)
            if law.y_TE.data_ptr() != state.data_ptr() or law.y_TE.shape != state.shape[1:]:
                self.flush()
                return alone(state)
            self._waiting = None
            return norm_(law.y_TE, *norm, law=(law.x_TD, *law.arguments))[None]

        return forward


def norm_of(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Norm | None:
    """What `module` computes of activations of this dtype; None if it is no norm, or none that `norm_` computes."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if dtype not in DTYPES or not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    is_alone = not any(True for _ in (*module.children(), *module.buffers()))
    takes_rows = "forward" not in vars(module) and len(inspect.signature(module.forward).parameters) == 1
    if (
        not is_alone
        or not takes_rows
        or weight.device != device
        or (bias is not None and type(module) is not nn.LayerNorm)
    ):
        return None
    with torch.inference_mode():
        return _measured(module, weight.detach(), None if bias is None else bias.detach(), eps, dtype)


def _measured(
    module: nn.Module, weight_E: Tensor, bias_E: Tensor | None, eps: float, dtype: torch.dtype
) -> Norm | None:
    """The form whose output is closest to that of `module`, if it is its output but for the order of a sum."""
    drawn_TE = torch.randn(len(SCALES), len(weight_E), generator=torch.Generator().manual_seed(0))
    y_1TE = ((1 + drawn_TE) * torch.tensor(SCALES)[:, None]).to(weight_E.device, dtype)[None]
    want_1TE = module(y_1TE)
    if want_1TE.dtype != dtype or want_1TE.shape != y_1TE.shape:
        return None
    size_1T1 = want_1TE.float().abs().amax(-1, keepdim=True)
    found: tuple[float, Norm] | None = None
    for form in FORMS:
        if bias_E is not None and form != "layer":
            continue
        norm = Norm(weight_E, bias_E, form, eps)
        error_1TE = (bind_norm(*norm)(y_1TE).float() - want_1TE.float()).abs() / size_1T1
        mean = error_1TE.mean().item()
        if error_1TE.amax().item() <= UNITS * torch.finfo(dtype).eps and (found is None or mean < found[0]):
            found = mean, norm
    return None if found is None else found[1]


def _read_first(plant: Plant, shell: nn.Module, replaced: set[nn.Module]) -> frozenset[Site]:
    """The outputs of blocks that a replaced norm reads before anything else does."""
    if plant.layout.attn_norm is None:
        return frozenset()
    after = [block.get_submodule(plant.layout.attn_norm) for block in blocks_of(shell, plant.layout)][1:]
    after.append(shell.get_submodule(plant.layout.final))
    return frozenset(Site("resid_post", layer) for layer, module in enumerate(after) if module in replaced)
