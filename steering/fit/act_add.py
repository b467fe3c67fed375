"""From two prompts to a plan of ActAdd: the difference of their states, position by position.

    d_{l,i} = h₊[l, i] − h₋[l, i],      l a block's input, i = 0 … P − 1

The shorter prompt is lengthened on the right, by the token of a space, to the longer one's P tokens; the model sees the
padding as it would see spaces. Where both prompts have the same tokens up to i the difference is rounding, and is made
zero: under a tokenizer that begins every text with the same token that is position 0.

Quality: ‖d‖ over the mean norm of the prompts' states, per block. The control is a random direction of the same length
at every position, as the publication has it.
Shapes: d (n, P, D).   Cost: one pass over two prompts.
Source: ActAdd, arXiv:2308.10248, Sec. 3.   Oracle: the states of each prompt run by itself.
Of the published code we leave: nothing that is wrong; its one block is chosen when the plan is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from steering.artifact import MAX_BYTES, checked_name
from steering.errors import SpecError
from steering.fit.concept import FitSettings, Progress, encode_class, provenance
from steering.fit.examples import Example, checked_class
from steering.fit.settings import chosen_blocks
from steering.plan.act_add import ActAddPlan
from steering.plan.base import MAX_RANK
from steering.plant.capture import Pause, capture
from steering.plant.plant import Plant
from steering.types import Site

ROUNDING = 1e-5
"""Differences below this share of the state's norm are rounding: float32 through a few dozen blocks leaves 1e-6."""


@dataclass(frozen=True, kw_only=True)
class ActAddSettings:
    """How two prompts are compared. Raises SpecError for impossible values."""

    layers: tuple[int, ...] | None = None
    """Blocks whose input is compared; null means all."""
    pad: str = " "
    """What lengthens the shorter prompt, one token; where the tokenizer knows it not as one, its padding token does."""
    seed: int = 0
    """Of the random directions."""

    def __post_init__(self) -> None:
        if not isinstance(self.pad, str) or not self.pad:
            raise SpecError("pad", expected="a text of one token", got=self.pad)

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError for one that it does not have."""
        return chosen_blocks(self.layers, depth)

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block, or padding, that the model does not have."""
        self.chosen(plant.depth)
        pad_token(plant, self.pad)

    def reading(self) -> FitSettings:
        """Every token is read."""
        return FitSettings(positions="all", skip=0)


def pad_token(plant: Plant, pad: str) -> int:
    """The token that lengthens a prompt. Raises SpecError where neither it nor a padding token exists."""
    tokenizer = plant.tokenizer
    ids = list(tokenizer(pad, add_special_tokens=False).input_ids)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    for known in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if known is not None and pad == " ":
            return int(known)
    raise SpecError("pad", expected="a text that is one token to this model's tokenizer", got=pad)


def fit_act_add(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: ActAddSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> ActAddPlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or prompt, named) and PlantError (a chat for a model without a template).
    """
    settings = settings or ActAddSettings()
    checked_name(name)
    layers, pad = settings.chosen(plant.depth), pad_token(plant, settings.pad)
    classes = {
        side: checked_class(side, rows, least=1) for side, rows in (("positive", positive), ("negative", negative))
    }
    prompts = []
    for side, rows in classes.items():
        if len(rows) != 1:
            raise SpecError(side, expected="one prompt: act_add compares two", got=len(rows))
        ((ids, _),) = encode_class(plant, side, rows, settings.reading(), pause)
        most = min(MAX_RANK, plant.context - 1)  # what fills the context may have been cut
        if len(ids) > most:
            raise SpecError(f"{side}[0]", expected=f"a prompt of at most {most} tokens", got=len(ids))
        prompts.append(ids)
    P = max(map(len, prompts))
    if 2 * len(layers) * P * plant.width * 4 > MAX_BYTES // 2:
        raise SpecError("layers", expected="fewer layers: the plan would pass half a gigabyte", got=len(layers))
    prompts = [[*ids, *[pad] * (P - len(ids))] for ids in prompts]
    if prompts[0] == prompts[1]:
        raise SpecError("positive", expected="a prompt that differs from the negative one", got=positive[0])
    sites = [Site("resid_pre", layer) for layer in layers]
    found = capture(plant, prompts, sites, [range(P)] * 2, progress=None)
    plus_NPD, minus_NPD = (torch.stack([found[site][side] for site in sites]) for side in (0, 1))
    difference_NPD = plus_NPD - minus_NPD
    size_NP = (plus_NPD.norm(dim=-1) + minus_NPD.norm(dim=-1)) / 2
    length_NP = difference_NPD.norm(dim=-1)
    same_P = next(i for i in range(P) if prompts[0][i] != prompts[1][i])
    is_rounding_NP = (length_NP <= ROUNDING * size_NP) | (torch.arange(P) < same_P)
    difference_NPD = difference_NPD.masked_fill(is_rounding_NP[..., None], 0.0)
    length_NP = length_NP.masked_fill(is_rounding_NP, 0.0)
    random_NPD = torch.randn(difference_NPD.shape, generator=torch.Generator().manual_seed(settings.seed))
    random_NPD = random_NPD / random_NPD.norm(dim=-1, keepdim=True) * length_NP[..., None]
    if progress:
        progress("done", 1.0)
    return ActAddPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality={
            "positions": P,
            "relative_norm": [round(float(x), 4) for x in length_NP.mean(1) / size_NP.mean(1).clamp_min(1e-30)],
        },
        provenance=provenance(asdict(settings) | {"layers": list(layers)}, classes),
        layers=layers,
        difference=difference_NPD.contiguous(),
        control=random_NPD.contiguous(),
    )
