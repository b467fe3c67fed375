"""Where in vLLM's workers a step begins and ends: on both of its runners, without a line of theirs changed.

    load_model                   the model is there: find its sites; hook those of a model that will be compiled
    execute_model(scheduled)     who ended, who is new
    V1  runner._model_forward    the batch is laid out (`input_batch`), the model runs within
    V2  model_state.prepare_inputs … runner.execute_model's end    likewise

Methods of the worker's own objects are wrapped, not classes, and dummy runs (profiling, warm-up, graph capture) do not
pass here. Two more methods of every worker, for `collective_rpc`:

    setpoint_hello() → dict      what this worker is and can do, or why it can steer nothing (`refused`)
    setpoint_take() → bytes      what was measured since the last time (`steering.vllm.account`); rank 0's alone
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steering.errors import SpecError, SteeringError
from steering.types import TAPS, Tap
from steering.vllm.attachment import PROTOCOL
from steering.vllm.controller import Controller, Ranks
from steering.vllm.sites import RESIDUAL, Sites
from steering.vllm.traced import Traced

TAPS_VARIABLE = "SETPOINT_TAPS"
"""Environment variable: the taps, separated by commas, that a compiled model has. More of them cost more of its
speed: under CUDA graphs each one ends a graph."""
HELLO, TAKE = "setpoint_hello", "setpoint_take"
"""Names of the two methods."""


class Steerable:
    """One worker that steers. It lives as long as the worker, which holds it."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.controller: Controller | None = None
        self.refused = ""
        self._load = worker.load_model
        worker.load_model = self.load_model
        setattr(worker, HELLO, self.hello)
        setattr(worker, TAKE, self.take)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, after which the model has its hooks."""
        result = self._load(*args, **kwargs)
        self.refused = refusal(self.worker.vllm_config)
        if not self.refused:
            self.controller = self._controller()
            if not self.controller.sites.taps:
                self.refused = f"This model cannot be steered: {self.controller.sites.reason}"
        if not self.refused:
            self._wrap(self.worker.model_runner)
        return result

    def _controller(self) -> Controller:
        from vllm.config import CompilationMode
        from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather

        config, runner = self.worker.vllm_config, self.worker.model_runner
        text = config.model_config.hf_text_config
        size = config.parallel_config.tensor_parallel_size
        sites = Sites(runner.get_model(), text.model_type, text.hidden_size, size)
        ranks = Ranks(get_tensor_model_parallel_rank(), size, tensor_model_parallel_all_gather)
        is_compiled = config.compilation_config.mode not in (None, CompilationMode.NONE)
        slots = config.scheduler_config.max_num_seqs
        controller = Controller(sites, ranks, slots, runner.device, is_compiled=is_compiled)
        if is_compiled:
            controller.install_all([tap for tap in compiled_taps() if tap in sites.taps], Traced())
        return controller

    def _wrap(self, runner: Any) -> None:
        if hasattr(runner, "_model_forward"):
            _wrap_v1(runner, self.controller)
        else:
            _wrap_v2(runner, self.controller)

    def hello(self) -> dict[str, Any]:
        """What this worker is and can do."""
        config, controller = self.worker.vllm_config, self.controller
        found: dict[str, Any] = {
            "protocol": PROTOCOL,
            "refused": self.refused,
            "runner": f"{type(self.worker.model_runner).__module__}.{type(self.worker.model_runner).__qualname__}",
            "rank": self.worker.rank,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        }
        if controller is None:
            return found
        taps = controller.sites.taps
        if controller.is_compiled:
            hooked = {site.tap for place in controller.places.values() for site in place.sites}
            taps = tuple(tap for tap in taps if tap in hooked)
        return found | {
            "backend": "transformers" if controller.sites.is_transformers else "native",
            "depth": controller.sites.depth,
            "width": controller.sites.width,
            "taps": list(taps),
            "compiled": controller.is_compiled,
        }

    def take(self) -> bytes:
        """What was measured since the last time."""
        return b"" if self.controller is None else self.controller.take()


def compiled_taps() -> tuple[Tap, ...]:
    """The taps of a compiled model. Raises SpecError if the environment asks for one that does not exist."""
    asked = [tap.strip() for tap in os.environ.get(TAPS_VARIABLE, "").split(",") if tap.strip()]
    for tap in asked:
        if tap not in TAPS:
            raise SpecError(TAPS_VARIABLE, expected=f"taps out of {', '.join(TAPS)}", got=tap)
    return tuple(tap for tap in TAPS if tap in (asked or RESIDUAL))


def refusal(config: Any) -> str:
    """Why an engine of this configuration cannot steer, in one sentence; empty if it can."""
    parallel = config.parallel_config
    reasons = {
        "speculative decoding: it checks several guesses of a token at once": config.speculative_config is not None,
        "pipeline parallelism: use --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "prefill or decode context parallelism": max(
            getattr(parallel, "prefill_context_parallel_size", 1), getattr(parallel, "decode_context_parallel_size", 1)
        )
        > 1,
        "dual batch overlap": bool(getattr(parallel, "enable_dbo", False)),
        "data parallelism within one engine: run replicas": parallel.data_parallel_size > 1,
        "several API servers, which would take each other's measurements: use --api-server-count 1": getattr(
            parallel, "_api_process_count", 1
        )
        > 1,
        "LoRA, whose adapters would change what concepts were fitted on": config.lora_config is not None,
        "an encoder, or inputs other than text": config.model_config.is_encoder_decoder
        or config.model_config.is_multimodal_model,
        "a model that does not generate": config.model_config.runner_type != "generate",
        "a transfer of keys and values to other engines": config.kv_transfer_config is not None,
        "CUDA graphs of whole steps: use -cc.cudagraph_mode=PIECEWISE": _has_full_graphs(config),
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    return f"Setpoint does not steer with {'; nor with '.join(found)}." if found else ""


def _has_full_graphs(config: Any) -> bool:
    mode = config.compilation_config.cudagraph_mode
    return mode is not None and bool(mode.has_full_cudagraphs())


def _wrap_v1(runner: Any, controller: Any) -> None:
    """The older runner: it keeps its batch, and calls the model by a method of its own."""
    execute, forward = runner.execute_model, runner._model_forward
    scheduled: list[Any] = []

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        controller.begin(scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs)
        scheduled.append(scheduler_output)
        try:
            return execute(scheduler_output, *args, **kwargs)
        finally:
            scheduled.clear()

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        if not scheduled:
            return forward(*args, **kwargs)
        batch, lengths = runner.input_batch, scheduled[0].num_scheduled_tokens
        starts = batch.num_computed_tokens_cpu
        names = batch.req_ids[: batch.num_reqs]
        controller.forward([(name, int(starts[i]), lengths[name]) for i, name in enumerate(names)])
        return _run(controller, lambda: forward(*args, **kwargs))

    runner.execute_model, runner._model_forward = execute_model, model_forward


def _wrap_v2(runner: Any, controller: Any) -> None:
    """The newer runner: it lays a batch out anew in every step, and asks its model state for more inputs."""
    execute, state = runner.execute_model, runner.model_state
    prepare = state.prepare_inputs
    is_real: list[bool] = []

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run") or (len(args) > 1 and args[1]):
            return execute(scheduler_output, *args, **kwargs)
        controller.begin(scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs)
        is_real.append(True)
        try:
            return _run(controller, lambda: execute(scheduler_output, *args, **kwargs), lambda: _hidden(runner))
        finally:
            is_real.clear()

    def prepare_inputs(input_batch: Any, req_states: Any) -> Any:
        found = prepare(input_batch, req_states)
        if is_real:
            starts, lengths = input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens
            names = enumerate(input_batch.req_ids)
            controller.forward([(name, int(starts[i]), int(lengths[i])) for i, name in names])
        return found

    runner.execute_model, state.prepare_inputs = execute_model, prepare_inputs


def _hidden(runner: Any) -> Any:
    """The hidden states that the newer runner keeps for sampling; None if it ran nothing."""
    kept = runner.execute_model_state
    return None if kept is None else kept.hidden_states


def _run(controller: Any, call: Callable[[], Any], output: Callable[[], Any] | None = None) -> Any:
    """A forward pass between `forward` and `end`."""
    hidden: Tensor | None = None
    try:
        with controller.running():
            result = call()
        found = result if output is None else output()
        if found is not None and not isinstance(found, torch.Tensor):
            raise SteeringError("The model returned something else than its last hidden states.")
        hidden = found
    finally:
        controller.end(hidden)
    return result
