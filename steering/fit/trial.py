"""What a fit on calibration texts alone starts from: the texts, and what the model loses under edits of its sites.

    loss(edits) = mean of −log p(x_{t+1} | x_≤t)  over what is read of the texts and predicted where the edits act
    perplexity ratio = exp(loss(edits) − loss())

Read are the tokens of a text, and of a chat that ends with the assistant those of its answer: a user's words are none
that the model has to foretell. Edits act from `first` on, before what is read too; what a dense beginning predicts is
not counted, for it would dilute the ratio. Texts are padded on the right and the pads masked.
Cost: a forward pass of all texts for each loss.   Oracle: the modules replaced by hand, one text at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.edit import Acting, Sparse
from steering.errors import SpecError
from steering.fit.concept import FitSettings, encode_class, held_out
from steering.fit.examples import Example, checked_class
from steering.plant.capture import BATCH_TOKENS, Pause
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.plant.taps import watch
from steering.types import Site

Edits = Mapping[Site, Acting]
READING = FitSettings(positions="auto", skip=1)
"""Position 0 is never read: the first token soaks up attention, and its norm is like no other."""


class Row(NamedTuple):
    """Token ids of a calibration text, and the first position that is read of it, 1 or more."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Texts:
    """Calibration texts: those that are fitted, and those that are measured."""

    fitted: list[Row]
    measured: list[Row]
    measured_on: str

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens are read of each part."""
        return {part: sum(len(ids) - start for ids, start in getattr(self, part)) for part in ("fitted", "measured")}


def calibration(
    plant: Plant, examples: Sequence[Example], *, tokens: int, longest: int, pause: Pause | None = None
) -> tuple[list[Example], Texts]:
    """The checked examples and their rows: every fifth is held out where there are ten or more.

    Of a text the first `longest` tokens are kept, of a chat the last; of each part as many rows as have `tokens`
    tokens together, at least one. Raises SpecError for bad examples, and for a text too short to predict anything.
    """
    checked = checked_class("positive", examples, least=1)
    rows = []
    encoded = encode_class(plant, "positive", checked, READING, pause)
    for n, ((ids, chosen), example) in enumerate(zip(encoded, checked, strict=True)):
        if len(ids) < 3:
            raise SpecError(f"positive[{n}]", expected="a text of three tokens or more", got=example)
        is_answer = not isinstance(example, str) and len(chosen) > 1
        dropped = 0 if isinstance(example, str) else max(0, len(ids) - longest)
        start = max(1, chosen[0] - dropped) if is_answer else 1
        rows.append(Row(ids[dropped : dropped + longest], start))
    held = held_out(len(rows)).tolist()
    fitted = within([row for row, out in zip(rows, held, strict=True) if not out], tokens)
    if not any(held):
        return checked, Texts(fitted, fitted, "fitted")
    measured = within([row for row, out in zip(rows, held, strict=True) if out], tokens)
    return checked, Texts(fitted, measured, "held-out")


def within(rows: list[Row], tokens: int) -> list[Row]:
    """The first of `rows` that together have at most `tokens` tokens, one at least."""
    kept, total = rows[:1], len(rows[0].ids)
    for row in rows[1:]:
        total += len(row.ids)
        if total > tokens:
            break
        kept.append(row)
    return kept


@dataclass(frozen=True, eq=False)
class _Batch:
    """Padded ids (B, T), attention mask, the positions where edits act, and those that are read."""

    ids_BT: Tensor
    mask_BT: Tensor
    edited_BT: Tensor
    read_BT: Tensor


class Trial:
    """A shell of the model whose `sites` can be edited, and the texts on which edits are tried.

    first: the position from which on edits act in each text.
    """

    def __init__(
        self,
        plant: Plant,
        rows: Sequence[Row],
        sites: Sequence[Site],
        first: Sequence[int],
        pause: Pause | None = None,
    ) -> None:
        self._shell = plant.shell()
        self._plant, self._pause = plant, pause
        self._blocks = blocks_of(self._shell, plant.layout)
        self._batches = list(_batches(rows, first, plant.device))
        self._batch = self._batches[0]
        self._edits: Edits = {}
        self._dropped: dict[Site, list[int]] = {}
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for site in dict.fromkeys(sites):
            plant.tap(self._shell, site, self._edit(site))

    def loss(self, edits: Edits | None = None) -> float:
        """Nats per token under `edits`."""
        self._install(edits or {})
        total, count = 0.0, 0
        for batch in self._batches:
            self._batch = batch
            with torch.no_grad():
                logits_BTV = self._shell(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits
            # A label is a token that is read, and predicted where the edits act.
            is_label_BT = batch.edited_BT[:, :-1] & batch.read_BT[:, 1:]
            labels_BT = batch.ids_BT[:, 1:].masked_fill(~is_label_BT, -100)
            total += float(
                torch.nn.functional.cross_entropy(
                    logits_BTV[:, :-1].float().flatten(0, 1), labels_BT.flatten(), ignore_index=-100, reduction="sum"
                )
            )
            count += int(is_label_BT.sum())
        self._edits = {}
        return total / max(count, 1)

    def dropped(self) -> dict[Site, float]:
        """The share of coordinates that each `Sparse` edit of the last `loss` left out."""
        return {site: out / max(of, 1) for site, (out, of) in self._dropped.items()}

    @property
    def batches(self) -> int:
        """In how many batches the texts run."""
        return len(self._batches)

    @property
    def fullest(self) -> int:
        """The batch of which most tokens are read: of unlike texts the first has the shortest."""
        return max(range(self.batches), key=lambda n: int(self._batches[n].read_BT.sum()))

    def note_blocks(self, batch: int = 0) -> None:
        """Run one batch as it is, and keep what each block is called with: `block` runs it again."""
        calls = self._calls = [((), {})] * len(self._blocks)
        self._edits, self._batch = {}, self._batches[batch]

        def note(layer: int) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
            def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls[layer] = (args, kwargs)

            return record

        handles = [watch(self._shell, self._plant.layout, layer, note(layer)) for layer in range(len(calls))]
        with torch.no_grad():
            self._shell.base_model(input_ids=self._batch.ids_BT, attention_mask=self._batch.mask_BT, use_cache=False)
        for handle in handles:
            handle.remove()

    def block_input(self, layer: int) -> Tensor:
        """The noted inputs (tokens, D) of one block, at the tokens that are read."""
        x_BTD: Tensor = self._calls[layer][0][0]
        return x_BTD[self._batch.read_BT].float()

    def block(self, layer: int, edits: Edits | None = None) -> Tensor:
        """Outputs (tokens, D) of one block under `edits`, at the tokens that are read, from the noted inputs."""
        args, kwargs = self._calls[layer]
        self._install(edits or {})
        with torch.no_grad():
            out_BTD: Tensor = self._blocks[layer](*args, **kwargs)
        self._edits = {}
        return out_BTD[self._batch.read_BT].float()

    def _install(self, edits: Edits) -> None:
        self._edits = {site: edit.to(torch.float32, self._plant.device) for site, edit in edits.items()}
        self._dropped = {}
        if self._pause is not None:
            self._pause()

    def _edit(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        def act(x_BTE: Tensor) -> Tensor | None:
            if self._pause is not None:
                self._pause()
            edit = self._edits.get(site)
            if edit is None:
                return None
            # At least in float32, as the kernels compute; what is left alone stays bit for bit.
            x_TE = x_BTE.flatten(0, 1).to(torch.promote_types(x_BTE.dtype, torch.float32))
            edited_T = self._batch.edited_BT.flatten()
            if isinstance(edit, Sparse):
                out = self._dropped.setdefault(site, [0, 0])
                gone_TE = ~edit.kept(x_TE[edited_T], 0)
                out[0] += int(gone_TE.sum())
                out[1] += gone_TE.numel()
            new_BTE = edit(x_TE, x_TE).to(x_BTE.dtype).view_as(x_BTE)
            return torch.where(self._batch.edited_BT[:, :, None], new_BTE, x_BTE)

        return act


def _batches(rows: Sequence[Row], first: Sequence[int], device: torch.device) -> list[_Batch]:
    """The texts in batches of alike lengths, `BATCH_TOKENS` each or one text."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].ids))
    batches, begin = [], 0
    while begin < len(order):
        size = 1
        while begin + size < len(order) and (size + 1) * len(rows[order[begin + size]].ids) <= BATCH_TOKENS:
            size += 1
        part = order[begin : begin + size]
        begin += size
        longest = len(rows[part[-1]].ids)
        ids_BT = torch.tensor([[*rows[n].ids, *[0] * (longest - len(rows[n].ids))] for n in part], device=device)
        position_T = torch.arange(longest, device=device)

        def column(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, device=device)[:, None]

        mask_BT = position_T < column([len(rows[n].ids) for n in part])
        edited_BT = mask_BT & (position_T >= column([first[n] for n in part]))
        read_BT = mask_BT & (position_T >= column([rows[n].start for n in part]))
        batches.append(_Batch(ids_BT, mask_BT.long(), edited_BT, read_BT))
    return batches


def ratio(loss: float, dense: float) -> float:
    """Perplexity over that of the dense model; at most e^80, which JSON can carry and which no number counts as."""
    risen = loss - dense
    return math.exp(80.0 if math.isnan(risen) else min(risen, 80.0))
