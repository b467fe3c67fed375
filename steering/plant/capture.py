"""Capture: the tensors of chosen sites, for chosen tokens of many prompts.

    states   x_0 … x_L of a token: the inputs of the L blocks and the output of the last, all before the final norm
             (`output_hidden_states` ends *after* it, which is why taps are used)
    means    per prompt, the mean of a site over the selected positions, without keeping the tokens

Prompts are padded on the right and the pads masked, so a batch of mixed lengths gives what each prompt gives alone.
Position 0 is left out of "all" by default: the first token soaks up attention and its norm swamps every statistic.
Oracle: the loop that runs one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steering.errors import PlantError
from steering.plant.plant import Plant
from steering.types import Site

Positions = Literal["last", "all"] | Sequence[Sequence[int]]
"""Which tokens of each prompt: the last one, all (from `skip` on), or one sequence of indices per prompt: a list, or a
`range(start, stop)` such as the answer's tokens. Negative indices count from the prompt's end."""
Progress = Callable[[int, int], None]
"""Called with the work done and the work to do. What it raises ends the work and goes to the caller."""
Pause = Callable[[], None]
"""Called between small pieces of the work, a layer of a batch or less; may take its time. What it raises ends it."""
BATCH_TOKENS = 1024
"""Most tokens, pads included, of a batch of more than one prompt: bounds memory, and the time between two pauses."""


def state_sites(plant: Plant) -> tuple[Site, ...]:
    """The L + 1 sites of the states x_0 … x_L."""
    return (*(Site("resid_pre", layer) for layer in range(plant.depth)), Site("resid_post", plant.depth - 1))


def capture(
    plant: Plant,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[Site],
    positions: Positions = "all",
    *,
    skip: int = 1,
    batch: int = 16,
    progress: Progress | None = None,
) -> dict[Site, list[Tensor]]:
    """Per site, one float32 CPU tensor (tokens, width) for each of `prompts`, in order.

    `skip` is the number of leading positions that "all" leaves out. `batch` prompts run at a time.
    Raises PlantError for an unknown site, an empty or too long prompt, or a prompt without a selected position.
    """
    chosen = _select(plant, prompts, positions, skip)
    found: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(prompts) for site in sites}

    def keep(site: Site, n: int, x_TD: Tensor) -> None:
        found[site][n] = x_TD.float().cpu()

    _run(plant, prompts, sites, chosen, batch, progress, keep)
    return found


def capture_means(
    plant: Plant,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[Site],
    positions: Positions = "all",
    *,
    skip: int = 1,
    batch: int = 16,
    progress: Progress | None = None,
    pause: Pause | None = None,
    shell: PreTrainedModel | None = None,
) -> dict[Site, Tensor]:
    """Per site, a float32 CPU tensor (N, width): the mean over each prompt's selected positions. Keeps no tokens.

    `shell` is the module tree to run, with the taps that it has; they are called before what is captured here.
    Arguments and errors as of `capture`.
    """
    chosen = _select(plant, prompts, positions, skip)
    means = {site: torch.empty(len(prompts), plant.width_of(site), device=plant.device) for site in sites}

    def keep(site: Site, n: int, x_TD: Tensor) -> None:
        means[site][n] = x_TD.float().mean(0)

    _run(plant, prompts, sites, chosen, batch, progress, keep, pause, shell)
    return {site: mean_ND.cpu() for site, mean_ND in means.items()}


def capture_each(
    plant: Plant,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[Site],
    keep: Callable[[Site, int, Tensor], None],
    positions: Positions = "all",
    *,
    skip: int = 1,
    batch: int = 16,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> None:
    """Give `keep` (site, prompt, its selected rows (tokens, width) on the model's device) as soon as they are computed.

    For statistics that need every token and would not fit in memory as tokens. Arguments and errors as of `capture`.
    """
    _run(plant, prompts, sites, _select(plant, prompts, positions, skip), batch, progress, keep, pause)


def _run(
    plant: Plant,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[Site],
    chosen: Sequence[Tensor],
    batch: int,
    progress: Progress | None,
    keep: Callable[[Site, int, Tensor], None],
    pause: Pause | None = None,
    shell: PreTrainedModel | None = None,
) -> None:
    """Run all prompts; give `keep` (site, prompt, its selected rows (tokens, width)) as soon as they are computed."""
    runs = plant.shell() if shell is None else shell
    part: list[int] = []
    indices: list[Tensor] = []  # on the device once a batch: a copy at each site would stop a GPU every time

    def sort(site: Site) -> Callable[[Tensor], None]:
        def hook(x_BTD: Tensor) -> None:
            for x_TD, n, chosen_T in zip(x_BTD, part, indices, strict=True):
                keep(site, n, x_TD[chosen_T])
            if pause is not None:
                pause()

        return hook

    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # alike lengths together: little padding
    done = 0
    handles = [plant.tap(runs, site, sort(site)) for site in dict.fromkeys(sites)]
    try:
        while done < len(order):
            part[:] = _next_batch(prompts, order[done : done + batch])
            indices[:] = [chosen[n].to(plant.device) for n in part]
            ids_BT, mask_BT = _padded([prompts[n] for n in part], plant.device)
            with torch.no_grad():
                runs.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            done += len(part)
            if progress is not None:
                progress(done, len(order))
    finally:
        for handle in handles:
            handle.remove()


def _next_batch(prompts: Sequence[Sequence[int]], ordered: Sequence[int]) -> list[int]:
    """The first of `ordered`, shortest prompt first, that together stay within `BATCH_TOKENS`; always one."""
    return [n for i, n in enumerate(ordered) if i == 0 or (i + 1) * len(prompts[n]) <= BATCH_TOKENS]


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T), padded on the right with token 0, which the mask hides."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids_BT, (torch.arange(longest, device=device) < length_B[:, None]).long()


def _select(plant: Plant, prompts: Sequence[Sequence[int]], positions: Positions, skip: int) -> list[Tensor]:
    """Per prompt, the indices of the selected tokens, all checked before anything runs."""
    check_prompts(plant, prompts)
    if not isinstance(positions, str) and len(positions) != len(prompts):
        raise PlantError(
            f"positions: expected one entry per prompt ({len(prompts)}), got {len(positions)}.", param="positions"
        )
    chosen = []
    for n, prompt in enumerate(prompts):
        length = len(prompt)
        if positions == "all":
            index = list(range(skip, length))
        elif positions == "last":
            index = [length - 1]
        elif isinstance(positions, str):
            raise PlantError(f"positions: expected 'last', 'all' or indices, got {positions!r}.", param="positions")
        else:
            index = [i + length if i < 0 else i for i in positions[n]]
        if not index or min(index) < 0 or max(index) >= length:
            raise PlantError(
                f"Prompt {n} has {length} tokens and not all of the selected positions: expected at least one position "
                "and each within the prompt.",
                param=f"prompts[{n}]",
            )
        chosen.append(torch.tensor(index))
    return chosen


def check_prompts(plant: Plant, prompts: Sequence[Sequence[int]]) -> None:
    """Raise PlantError unless there is a prompt and each has 1 to `plant.context` tokens of the vocabulary."""
    if not prompts:
        raise PlantError("There are no prompts: expected at least one.", param="prompts")
    for n, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= plant.context:
            raise PlantError(
                f"Prompt {n} has {len(prompt)} tokens: expected 1 to {plant.context}.", param=f"prompts[{n}]"
            )
        if min(prompt) < 0 or max(prompt) >= plant.vocab:
            raise PlantError(
                f"Prompt {n} has tokens from {min(prompt)} to {max(prompt)}: expected 0 to {plant.vocab - 1}.",
                param=f"prompts[{n}]",
            )
