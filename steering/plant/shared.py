"""A plant that several processes share: each has a part of every large weight, on a device of its own.

Every family has a plan in transformers: which linear maps are cut by their outputs, which by their inputs, with one sum
over the processes behind each of the latter. The residual stream is whole in every process. What lies between two cuts,
the heads and the neurons, is not: `steering.plant.team.Group.whole` puts it together where a program acts on it.

The process that loads the plant starts the others, and only an engine can run it: what fits and captures do, the others
would not know of. Its fingerprint is that of the whole model, so concepts of one are good for the other.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from steering.errors import PlantError, TeamLost, echo
from steering.plant.fingerprint import fingerprint
from steering.plant.loading import Dtype, attend, load_tokenizer, load_weights
from steering.plant.plant import Plant
from steering.plant.quantised import NONE
from steering.plant.team import Crew, Group, leave
from steering.types import Site

PARAM = "tensor_parallel"
LEAST = (5, 16)
"""The first release of transformers in which a plan and a size are all that it takes."""
HEADS = ("q_proj", "k_proj", "v_proj", "query_key_value")
"""Linear maps that cut the heads where their outputs are cut."""


class SharedPlant(Plant):
    """One process's share of a plant. Made by `load_shared` and, in the other processes, by `load_share`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, group: Group, *, fingerprint: str, name: str
    ) -> None:
        super().__init__(model, tokenizer, fingerprint=fingerprint, name=name)
        self._group = group
        self._crew: Crew | None = None
        self.number = -1
        self.threads = torch.get_num_threads()
        """Threads of torch's before the model was shared."""
        self._is_together = False

    @property
    def group(self) -> Group:
        """The processes that share the model."""
        return self._group

    @property
    def crew(self) -> Crew | None:
        """The other processes, where this one leads them."""
        return self._crew

    def lead(self, crew: Crew, number: int) -> None:
        """Be the one that tells the others what to run; they know this plant by its number."""
        self._crew, self.number = crew, number

    def close(self) -> None:
        """End the other processes. Nothing can run on this plant afterwards."""
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()
            leave()
            torch.set_num_threads(self.threads)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Allow what only works when every process does it now."""
        before, self._is_together = self._is_together, True
        try:
            yield
        finally:
            self._is_together = before

    def shell(self, attn_implementation: str | None = None) -> PreTrainedModel:
        """As of a plant. Raises PlantError where the others do not make one too."""
        self.require_whole()
        return super().shell(attn_implementation)

    def linears_at(self, site: Site) -> list[Tensor]:
        """Raises PlantError: only the other processes have the rest of these weights."""
        self.require_whole()
        return super().linears_at(site)

    def require_whole(self) -> None:
        """Raise PlantError but where all processes do the same."""
        if not self._is_together:
            raise PlantError(
                f"This model is shared by {self._group.size} processes (tensor_parallel), which only run requests: "
                "fit, capture and sweep where one process has it whole; what is fitted there is good here.",
                param=PARAM,
            )


def load_shared(
    name: str,
    config: PreTrainedConfig,
    scheme: str,
    size: int,
    device: torch.device,
    *,
    dtype: Dtype,
    attn: str | None,
    revision: str | None,
) -> Plant:
    """Start the other processes and load the model in all of them. Raises as `Plant.load` does."""
    require_shareable(config, size, device)
    if scheme != NONE:
        raise PlantError(
            f"Several processes cannot share a quantised model, and {echo(name)} is to be {scheme!r}: choose one of "
            "the two.",
            param=PARAM,
        )
    threads = torch.get_num_threads()
    if device.type == "cpu":  # which all of them run on
        torch.set_num_threads(max(1, threads // size))
    crew: Crew | None = None
    try:
        crew = Crew(size, device)
        with crew.together("join", {}):
            group = Group.join(0, size, crew.folder, own_device(device, 0))
        plant = lead_load(crew, group, name, dtype=dtype, attn=attn, revision=revision)
    except BaseException as error:
        lost = None if crew is None else crew.lost
        if crew is not None:
            crew.close()
        leave()
        torch.set_num_threads(threads)
        if lost is not None and not isinstance(error, TeamLost):
            raise TeamLost(lost.message) from error
        raise
    plant.threads = threads
    return plant


def lead_load(
    crew: Crew, group: Group, name: str, *, dtype: Dtype = "auto", attn: str | None = None, revision: str | None = None
) -> SharedPlant:
    """Load a model in all processes of a group, as its rank 0. Raises PlantError, TeamLost."""
    given: dict[str, Any] = {"name": name, "dtype": dtype, "attn": attn, "revision": revision}
    number = crew.name()
    with crew.together("load", {"plant": number, "given": given}):
        plant = load_share(group=group, **given)
    plant.lead(crew, number)
    return plant


def load_share(name: str, group: Group, *, dtype: Dtype, attn: str | None, revision: str | None) -> SharedPlant:
    """This process's share of a model that all of `group` load at the same time. Raises PlantError."""
    plan = distributed(group.size)
    loaded = load_weights(name, revision, dtype, distributed_config=plan)
    # As of `Plant.load`: float16 would change the fingerprint.
    exact = load_weights(name, revision, "auto", distributed_config=plan) if dtype == "float16" else loaded
    identity = fingerprint(exact)
    if attn is not None and attn != "sdpa":
        attend(loaded, attn)
    plant = SharedPlant(loaded, load_tokenizer(name, revision), group, fingerprint=identity, name=name)
    with plant.together():
        _ = plant.massive
    return plant


def own_device(device: torch.device, rank: int) -> torch.device:
    """Where a process of this rank has its share."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def distributed(size: int) -> Any:
    """What `from_pretrained` takes as `distributed_config` for `size` processes."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=size)


def require_shareable(config: PreTrainedConfig, size: int, device: torch.device) -> None:
    """Raise PlantError unless `size` processes of this machine can share a model of this configuration."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise PlantError(f"{PARAM}: expected an integer >= 1, got {size!r}.", param=PARAM)
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise PlantError(
            f"The architecture {text.model_type!r} has no plan by which several processes can share it: start with "
            f"{PARAM} 1.",
            param=PARAM,
        )
    heads = {}
    if any(style == "colwise" and name.endswith(HEADS) for name, style in plan.items()):
        n = int(text.num_attention_heads)
        kv = int(getattr(text, "num_key_value_heads", None) or n)
        heads = {"num_attention_heads": n, "num_key_value_heads": kv}
    for name, count in heads.items():
        if count % size:
            raise PlantError(f"{PARAM}: expected a divisor of {count}, the model's {name}, got {size}.", param=PARAM)
    _require_machine(size, device)


def _require_machine(size: int, device: torch.device) -> None:
    """Raise PlantError unless there is a device for each process, and all that they need."""
    if os.name != "posix":
        raise PlantError("Several processes can share a model on Linux and macOS only.", param=PARAM)
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < LEAST:
        raise PlantError(
            f"Sharing a model needs transformers {LEAST[0]}.{LEAST[1]} or newer, and {transformers.__version__} is "
            "installed: upgrade it.",
            param=PARAM,
        )
    if importlib.util.find_spec("accelerate") is None:
        raise PlantError("Sharing a model needs accelerate: pip install 'setpoint[parallel]'.", param=PARAM)
    if dist.is_initialized():
        raise PlantError(
            "This process is in a group of torch.distributed already: close the plant that shares its model first.",
            param=PARAM,
        )
    if device.type == "cuda" and device.index:
        raise PlantError(
            f"device: expected cuda, of which several processes take the first {size} GPUs, got {device}: choose them "
            "with CUDA_VISIBLE_DEVICES.",
            param="device",
        )
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise PlantError(
            f"{PARAM}: expected at most {torch.cuda.device_count()}, the GPUs of this machine, got {size}.", param=PARAM
        )
    if device.type == "cpu" and torch.accelerator.is_available():
        raise PlantError(
            "A machine with GPUs shares a model on these: start with CUDA_VISIBLE_DEVICES= to use its CPU.",
            param="device",
        )
