"""An engine over a model that several processes share: one decides, all run the same steps.

    rank 0     schedules, resolves scopes, draws, accounts; tells the others each step before it runs it
    the rest   have a runner, a pool and a bank like its own, and do what they are told (`steering.runtime.follower`)

What is told of a step is what lies on the host anyway: where its tokens lie, and its frame, once while it stays the
same. Programs are told when they become resident. Each process keeps the keys and values of its own heads; programs and
their kernels are the same in all, as the residual stream is. At a site of which each has a part, `mlp_act`, `attn_act`
and the outputs of single linear maps, the parts are put together, the program acts on the whole, and each goes on with
its own part: neurons and heads have the numbers that they have in the whole model, and all measure the same.

Decode steps are neither recorded nor launched ahead, and nothing is compiled or read column by column.
Oracle: the engine of one process, token for token and receipt for receipt.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from steering.condition import Gate, When
from steering.errors import PlantError, SpecError, TeamLost
from steering.plant.plant import Plant
from steering.plant.shared import SharedPlant
from steering.plant.team import Crew, Group
from steering.runtime.attention import PagedAttention
from steering.runtime.bank import Bank, Wanting, _Slot
from steering.runtime.cache import KVPool
from steering.runtime.launches import Launches
from steering.runtime.placement import Laid
from steering.runtime.programs import Prepared
from steering.runtime.runner import Runner
from steering.runtime.scope import Frame, Spot
from steering.runtime.settings import EngineSettings
from steering.runtime.wiring import wire
from steering.types import Route, Site

Arrays = Sequence[np.ndarray]


class Parts(NamedTuple):
    """What an engine runs a model with, and the positions that a sequence may have."""

    runner: Runner
    bank: Bank
    pool: KVPool
    longest: int


class SharedRunner(Runner):
    """A runner of one of the processes of a group, whose taps see whole states."""

    def __init__(self, plant: Plant, shell: nn.Module, attention: PagedAttention, bank: Bank, group: Group) -> None:
        super().__init__(plant, shell, attention, bank)
        self._shortcuts.few = 0  # sparse linear maps would read weights of which this process has a part
        self._group = group

    @torch.inference_mode()
    def follow(self, laid: Laid, frame: Frame | None, keep: Sequence[int]) -> None:
        """Run a step that somebody else decided on, whose logits nobody here needs."""
        self.forward(laid, frame, keep)

    def _look(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        visits, visit, width = self._visits, self._visits.visit(site), self._plant.width_of(site)

        def look(state: Tensor) -> Tensor | None:
            if state.shape[-1] == width:
                return visit(state)
            if (work := visits.work) is None or not (site in work.writes or site in work.kept):
                return None
            whole = self._group.whole(state, width)
            changed = visit(whole)
            return self._group.own(whole if changed is None else changed)

        return look


class LeadingRunner(SharedRunner):
    """The runner of rank 0, which tells the others what it runs."""

    def __init__(
        self, plant: Plant, shell: nn.Module, attention: PagedAttention, bank: Bank, group: Group, crew: Crew, name: int
    ) -> None:
        super().__init__(plant, shell, attention, bank, group)
        self._crew = crew
        self._name = name
        self._told: Frame | None = None
        weakref.finalize(self, crew.drop, name)

    def forward(
        self, laid: Laid, frame: Frame | None, keep: Sequence[int], drawn_T: Tensor | None = None
    ) -> tuple[Launches | None, Tensor]:
        """As a runner, in all processes."""
        fields: dict[str, Any] = {"engine": self._name, "keep": list(keep), "spans": laid.spans, "frame": None}
        arrays: list[np.ndarray] = [laid.layout_3T, laid.tables_NM]
        if frame is not None and frame is self._told:
            fields["frame"] = "again"
        elif frame is not None:
            fields["frame"], more = packed_frame(frame)
            arrays += more
        self._told = None  # until the step is through: nobody knows what the others have of it if it fails
        with self._crew.together("step", fields, arrays):
            found = super().forward(laid, frame, keep, drawn_T)
        self._told = frame
        return found

    def erase(self, blocks: Sequence[int]) -> None:
        """As a runner, in all processes."""
        with suppress(TeamLost):  # requests end in this way when the others are gone, too
            self._crew.tell("erase", {"engine": self._name, "blocks": list(blocks)})
        super().erase(blocks)


class LeadingBank(Bank):
    """The bank of rank 0, which tells the others what becomes resident and what goes."""

    def __init__(self, slots: int, device: torch.device, crew: Crew, name: int) -> None:
        super().__init__(slots, device)
        self._crew = crew
        self._engine = name

    def _put(self, name: str, prepared: Prepared, wanting: Wanting) -> _Slot:
        slot = super()._put(name, prepared, wanting)
        fields, arrays = packed_program(prepared)
        self._crew.tell("fill", {"engine": self._engine, "name": name, **fields}, arrays)
        return slot

    def _drop(self, name: str) -> None:
        super()._drop(name)
        self._crew.tell("free", {"engine": self._engine, "name": name})


class FollowingBank(Bank):
    """The bank of another process: it takes and gives up what it is told, in the same slots."""

    def fill(self, name: str, prepared: Prepared) -> None:
        """Make a program resident in the lowest free slot."""
        self._put(name, prepared, self._wanting(prepared, self._free[0]))

    def free(self, name: str) -> None:
        """Give up a program's slot."""
        self._drop(name)


def lead(plant: Plant, settings: EngineSettings) -> Parts:
    """The parts of an engine of rank 0; the others make theirs.

    Raises SpecError as an engine does, and for settings that need the model in one process.
    """
    if not isinstance(plant, SharedPlant) or (crew := plant.crew) is None:
        raise PlantError("Only the process that loaded the model can have an engine on it.", param="tensor_parallel")
    for field in ("compile", "graphs", "pipeline"):
        if getattr(settings, field):
            raise SpecError(field, expected="none where several processes share the model", advice="leave it out")
    name = crew.name()
    told = {"plant": plant.number, "engine": name, "settings": asdict(settings)}
    with crew.together("engine", told), plant.together():
        shell, attention, longest = wire(plant, settings)
    bank = LeadingBank(settings.program_slots, plant.device, crew, name)
    runner = LeadingRunner(plant, shell, attention, bank, plant.group, crew, name)
    return Parts(runner, bank, attention.pool, longest)


def packed_program(prepared: Prepared) -> tuple[dict[str, Any], Arrays]:
    """What the bank holds of a program, as fields and arrays."""
    parts = [
        [packed_route(route), [[name, list(shape), dtype == torch.float32] for name, (shape, dtype) in one.items()]]
        for route, one in prepared.parts.items()
    ]
    return {"rank": prepared.rank, "parts": parts}, [prepared.packed.cpu().numpy().view(np.uint8)]


def unpacked_program(fields: Mapping[str, Any], arrays: Arrays) -> Prepared:
    """The same again."""
    parts = {
        unpacked_route(route): {
            name: (torch.Size(shape), torch.float32 if is_real else torch.int32) for name, shape, is_real in one
        }
        for route, one in fields["parts"]
    }
    return Prepared(fields["rank"], torch.from_numpy(arrays[0].view(np.float32)), parts)


def packed_frame(frame: Frame) -> tuple[dict[str, Any], Arrays]:
    """What a frame does, without whose receipt it belongs to."""
    spots, arrays = [], [frame.slot_PT, frame.knobs_TP3R, frame.budget_T]
    for spot in frame.spots:
        gate = {name: getattr(spot.gate, name) for name in ("low", "high", "origin", "scale")}
        spots.append({"term": spot.term, "when": asdict(spot.gate.when), "gate": gate})
        arrays += [spot.tokens_K, spot.channels_R, spot.gate.probe.to("cpu", torch.float32).numpy()]
    routes = [packed_route(route) for route in frame.routes]
    return {"routes": routes, "spots": spots, "blanks": sorted(frame.blanks)}, arrays


def unpacked_frame(fields: Mapping[str, Any], arrays: Arrays) -> Frame:
    """A frame that does the same."""
    slot_PT, knobs_TP3R, budget_T, *rest = arrays
    spots = []
    for n, spot in enumerate(fields["spots"]):
        tokens_K, channels_R, probe_D = rest[3 * n : 3 * n + 3]
        gate = Gate(When(**spot["when"]), torch.from_numpy(probe_D), **spot["gate"])
        spots.append(Spot("", spot["term"], gate, tokens_K, channels_R))
    routes = tuple(unpacked_route(route) for route in fields["routes"])
    blanks = frozenset(Site(*site) for site in fields["blanks"])
    return Frame(routes, slot_PT, knobs_TP3R, budget_T, (), tuple(spots), blanks)


def unpacked_laid(fields: Mapping[str, Any], arrays: Arrays) -> Laid:
    """Where a step's tokens lie."""
    return Laid(arrays[0], arrays[1], tuple(cast("tuple[int, int, int, list[int]]", tuple(s)) for s in fields["spans"]))


def packed_route(route: Route) -> list[Any]:
    """A route as JSON has it."""
    return [list(route.read), list(route.write), route.form]


def unpacked_route(packed: Sequence[Any]) -> Route:
    """The route again."""
    read, write, form = packed
    return Route(Site(*read), Site(*write), form)
