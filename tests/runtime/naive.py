"""The oracle of the engine: one request at a time through unmodified modelling code, laws applied by plain hooks.

No packing, no rows, no kernels: a dynamic cache, a loop, and `Law.__call__` at the tokens that a scope selects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from steering.law import Law
from steering.plant.layouts import layout_of
from steering.plant.taps import tap
from steering.program import Program, Scope, Term
from steering.runtime import Engine, Finished, Request, Sampling
from steering.types import Route, Site, across
from tests.plants import WIDTH

Hook = Callable[[Tensor], Tensor | None]


def law(seed: int, *, read: int = WIDTH, write: int = WIDTH, rank: int = 1, size: float = 1.0) -> Law:
    """A random law that moves a tiny model's state by about a third of its norm."""
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(rank, read, generator=generator) / read**0.5
    gain = size * torch.randn(rank, write, generator=generator) / write**0.5
    return Law.of(probe, torch.randn(rank, generator=generator) * 2, gain)


def across_program(seed: int, layers: Sequence[int] = (1, 2), scope: Scope | None = None, **kwargs: object) -> Program:
    """A program of one term on the blocks' inputs and outputs."""
    laws = {across(layer): law(seed * 100 + layer, **kwargs) for layer in layers}  # type: ignore[arg-type]
    gauges = dict.fromkeys(laws, (0.5, 2.0))
    return Program((Term("c", "lqr", laws, scope or Scope(), target=1.0, gauges=gauges),))


def generate(model: PreTrainedModel, prompt: Sequence[int], n_tokens: int, program: Program | None = None) -> list[int]:
    """`n_tokens` greedy tokens."""
    return [int(logits.argmax()) for logits in logits_of(model, prompt, n_tokens, program)]


def logits_of(
    model: PreTrainedModel, prompt: Sequence[int], n_tokens: int, program: Program | None = None
) -> list[Tensor]:
    """The logits each of `n_tokens` greedy tokens is drawn from, (V,) each."""
    spot = Spot(len(prompt))
    handles = [tap(model, layout_of(model), site, fn) for site, fn in hooks(program or Program(), spot)]
    cache, tokens, rows = DynamicCache(config=model.config), list(prompt), []
    try:
        with torch.inference_mode():
            while len(rows) < n_tokens:
                spot.start = cache.get_seq_length()
                at_T = torch.arange(spot.start, len(tokens))
                step = torch.tensor([tokens[spot.start :]])
                rows.append(model(step, position_ids=at_T[None], past_key_values=cache, use_cache=True).logits[0, -1])
                tokens.append(int(rows[-1].argmax()))
    finally:
        for handle in handles:
            handle.remove()
    return rows


class Spot:
    """Where the pass stands: prompt length, position of its first token, and states kept for later laws."""

    def __init__(self, n_prompt: int) -> None:
        self.n_prompt, self.start = n_prompt, 0
        self.states: dict[Site, Tensor] = {}
        self.asked: dict[int, Tensor] = {}
        self.decided: dict[int, bool] = {}

    def admitted(self, term: Term, route: Route, length: int) -> Tensor:
        """Boolean (length,): which tokens of this pass the term's condition lets a law on `route` act on."""
        if term.gate is None:
            return torch.ones(length, dtype=torch.bool)
        if term.gate.when.on == "token":
            return self.asked[id(term)]
        last = self.n_prompt - 1
        return torch.tensor(
            [
                p >= last and self.decided.get(id(term), False) and (p > last or term.gate.decides(route))
                for p in range(self.start, self.start + length)
            ]
        )

    def selected(self, scope: Scope, length: int) -> Tensor:
        """Boolean (length,): which tokens of this pass the scope selects."""
        prompt = scope.prompt_mask(self.n_prompt)
        return torch.tensor(
            [
                bool(prompt[p]) if p < self.n_prompt else scope.steers_step(p - self.n_prompt)
                for p in range(self.start, self.start + length)
            ]
        )


def hooks(program: Program, spot: Spot) -> list[tuple[Site, Hook]]:
    """What to install: a reader at sites that are read from afar, then the writers, a site's own law first."""
    stages = ("mask", "turn", "law", "sparse")
    found = {route for term in program.terms for route in term.laws}
    routes = sorted(found, key=lambda r: (stages.index(r.form), r.read != r.write))
    writers = [(route.write, writer(program, route, spot)) for route in routes]
    gates = [(term.gate.site, asker(term, spot)) for term in program.terms if term.gate]
    return gates + writers + [(site, reader(site, spot)) for site in {r.read for r in routes if r.read != r.write}]


def asker(term: Term, spot: Spot) -> Callable[[Tensor], None]:
    """Asks a term's gate about the state that its block receives."""

    def ask(x: Tensor) -> None:
        assert term.gate is not None
        z_T = x[0] @ term.gate.probe
        spot.asked[id(term)] = (z_T > term.gate.low) & (z_T < term.gate.high)
        last = spot.n_prompt - 1 - spot.start
        if 0 <= last < len(z_T):
            spot.decided[id(term)] = bool(spot.asked[id(term)][last])

    return ask


def reader(site: Site, spot: Spot) -> Callable[[Tensor], None]:
    """Keeps the state of a site for laws that write elsewhere."""
    return lambda x: spot.states.__setitem__(site, x.clone())


def writer(program: Program, route: Route, spot: Spot) -> Callable[[Tensor], Tensor | None]:
    """Superposition of a route's laws: all of them read the same x. Edits follow each other instead."""

    def write(y: Tensor) -> Tensor:
        x = y if route.read == route.write else spot.states[route.read]
        out = y.clone()
        for term in program.terms:
            if route in term.laws:
                chosen = spot.selected(term.scope, y.shape[1]) & spot.admitted(term, route, y.shape[1])
                x = x if route.form == "law" else out
                moved = term.laws[route](torch.zeros_like(y[0]), x[0])
                out[0, chosen] += moved[chosen]
        return out

    return write


def greedy(n_tokens: int = 10, **kwargs: object) -> Sampling:
    """Greedy sampling of exactly `n_tokens`."""
    return Sampling(**{"max_tokens": n_tokens, "temperature": 0.0, "ignore_eos": True} | kwargs)  # type: ignore[arg-type]


def run(engine: Engine, requests: Sequence[Request]) -> list[Finished]:
    """Run requests on a fresh engine and check that nothing is left in it."""
    done = engine.generate(requests)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_used_ratio) == (0, 0, 0)
    return done
