"""How much a state varies over answers to one prompt, coordinate by coordinate: SenD's measure, without a training run.

    V_i = Var_k(e_i^k) · Σ_{k ≥ 2} |e_i^k − e_i^{k−1}|,      e^k = (mean_t h_t + h_last) / 2                 (1)
    eigenscore = log₁₀ det(C + α I) / K,      C (K, K) the covariance of the e^k over coordinates            (2)

SenD takes e^k of one text at K checkpoints of a training; here k runs over K answers that the model draws to one
prompt, or, without drawing, over the positions of one text (e^k = h_k). h is the state over the answer's tokens.
Shapes: e (K, E).   Cost: K·tokens decode steps a prompt, and one pass over what was drawn.
Source: SenD, arXiv:2410.15460, Sec. 3 (V and e), and INSIDE, arXiv:2402.03744 (eigenscore; K = 10 answers at a
temperature of 0.5, α = 10⁻³).   Oracle: numpy's variance and determinant, one coordinate at a time.
Of the published code we leave: the one hidden state `[:, -2]` in the place of the paper's e, and the Chebyshev
estimate of the determinant, whose coefficients are wrong and which a (K, K) matrix does not need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.errors import SpecError
from steering.fit.concept import held_out
from steering.fit.examples import Example
from steering.fit.units import ordinary
from steering.plant.capture import Pause, capture_each
from steering.plant.plant import Plant
from steering.types import Site

ALPHA = 1e-3
EIGENSCORES = 64
"""Most prompts whose states are kept for their eigenscore."""


@dataclass(frozen=True)
class Answers:
    """How answers are drawn: K of them, at most so many tokens, the temperature, the seed."""

    count: int
    length: int
    temperature: float
    seed: int


@dataclass(frozen=True, eq=False)
class Varied:
    """V (E,) averaged over fitted and over held-out prompts, and e (K, E) of some of the latter; float64."""

    fitted_E: Tensor
    held_E: Tensor
    states: list[Tensor]


def sensitivity(e_KE: Tensor) -> Tensor:
    """V (E,) of equation (1)."""
    return e_KE.var(0, correction=0) * e_KE.diff(dim=0).abs().sum(0)


def eigenscore(e_KE: Tensor) -> float:
    """Equation (2), the covariance divided by E − 1: higher where the answers agree less."""
    K = len(e_KE)
    covariance_KK = torch.cov(e_KE.double()).reshape(K, K)
    return float(torch.linalg.slogdet(covariance_KK + ALPHA * torch.eye(K, dtype=torch.float64)).logabsdet) / (
        K * math.log(10)
    )


def prompt_of(plant: Plant, example: Example) -> list[int]:
    """Token ids of what is answered: a text, or a chat without the answer that it may end with."""
    if not isinstance(example, str) and example[-1]["role"] == "assistant" and len(example) > 1:
        return plant.encode(example[:-1])
    return plant.encode(example)


def draw(
    plant: Plant,
    shell: Any,
    ids: Sequence[int],
    answers: Answers,
    generator: torch.Generator,
    pause: Pause | None = None,
) -> list[list[int]]:
    """Some answers to one prompt, each with its end token where it has one."""
    ends = plant.model.generation_config.eos_token_id
    stops = torch.tensor([ends] if isinstance(ends, int) else list(ends or ()), dtype=torch.long)
    fed = torch.tensor(ids, device=plant.device).expand(answers.count, -1)
    drawn, cache = [], None
    is_open_K = torch.ones(answers.count, dtype=torch.bool)
    for _ in range(min(answers.length, plant.context - len(ids))):
        with torch.no_grad():
            out = shell(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        chance_KV = (out.logits[:, -1].float().cpu() / answers.temperature).softmax(-1)
        token_K = torch.multinomial(chance_KV, 1, generator=generator)[:, 0]
        drawn.append(token_K.where(is_open_K, -1))
        is_open_K &= ~torch.isin(token_K, stops)
        if not bool(is_open_K.any()):
            break
        fed = token_K[:, None].to(plant.device)
        if pause is not None:
            pause()
    return [[int(token) for token in row if token >= 0] for row in torch.stack(drawn, dim=1)]


def answer_states(
    plant: Plant,
    ids: Sequence[int],
    answers: Sequence[Sequence[int]],
    sites: Sequence[Site],
    pause: Pause | None = None,
) -> dict[Site, Tensor]:
    """e (K, E) at each site, float64, of K answers to one prompt."""
    found: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(answers) for site in sites}

    def keep(site: Site, k: int, h_TE: Tensor) -> None:
        h_TE = ordinary(h_TE.double().cpu())
        found[site][k] = (h_TE.mean(0) + h_TE[-1]) / 2

    whole = [[*ids, *answer] for answer in answers]
    capture_each(plant, whole, sites, keep, [range(len(ids), len(row)) for row in whole], pause=pause)
    return {site: torch.stack(states) for site, states in found.items()}


def varied_states(
    plant: Plant,
    examples: Sequence[Example],
    encoded: Sequence[tuple[list[int], Sequence[int]]],
    sites: Sequence[Site],
    answers: Answers | None,
    progress: Callable[[int, int], None],
    pause: Pause | None = None,
) -> dict[Site, Varied]:
    """V of each site over some prompts; without `answers` over the positions that are read of each.

    Raises SpecError that names the prompt of which fewer than two positions are read.
    """
    held = held_out(len(examples))
    sums = {site: torch.zeros(2, plant.width_of(site), dtype=torch.float64) for site in sites}
    states: dict[Site, list[Tensor]] = {site: [] for site in sites}
    shell, generator = plant.shell(), torch.Generator().manual_seed(answers.seed if answers else 0)
    for n, example in enumerate(examples):
        if answers is not None:
            ids = prompt_of(plant, example)[-max(1, plant.context - answers.length) :]
            found = answer_states(plant, ids, draw(plant, shell, ids, answers, generator, pause), sites, pause)
        else:
            found = _position_states(plant, encoded[n], sites, n)
        for site, e_KE in found.items():
            sums[site][int(held[n])] += sensitivity(e_KE)
            is_measured = bool(held[n]) or not bool(held.any())
            if answers is not None and is_measured and len(states[site]) < EIGENSCORES:
                states[site].append(e_KE)
        progress(n + 1, len(examples))
        if pause is not None:
            pause()
    n_held = int(held.sum())
    varied: dict[Site, Varied] = {}
    for site, (fitted_E, held_E) in sums.items():
        mean_E = fitted_E / (len(examples) - n_held)
        varied[site] = Varied(mean_E, held_E / n_held if n_held else mean_E, states[site])
    return varied


def _position_states(
    plant: Plant, row: tuple[list[int], Sequence[int]], sites: Sequence[Site], n: int
) -> dict[Site, Tensor]:
    """The states (K, E) of one text's positions, in the place of K answers."""
    ids, chosen = row
    if len(chosen) < 2:
        raise SpecError(f"positive[{n}]", expected="a text with at least two positions to read", got=len(ids))
    found: dict[Site, Tensor] = {}

    def keep(site: Site, _: int, h_TE: Tensor) -> None:
        found[site] = ordinary(h_TE.double().cpu())

    capture_each(plant, [ids], sites, keep, [chosen])
    return found
