"""The vLLM engine: vLLM's scheduler, kernels and parallelism behind the interface of the native one.

    take the inbox → LLMEngine.step → file what the workers measured → settle, detokenise, deliver

What a token turns into is decided here as in the native engine (`steering.runtime.live`): text, stop strings, ends and
receipts are the same, word for word. The plant is loaded beside vLLM, by default on the CPU: the tokenizer, the
fingerprint, fits, traces and captures live in it, at the price of one more copy of the weights in memory.

An engine exists only after its handshake: every worker has said that it runs our side of one version, so that no
request is ever served unsteered because a plugin was not there.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

from kernels import warm
from steering.errors import Diverged, PlantError, SpecError, SteeringError, TeamLost
from steering.plant.plant import Plant
from steering.runtime.checks import check, diverged, failed
from steering.runtime.desk import Desk, hand_over
from steering.runtime.detokenize import end_tokens, text_decoder
from steering.runtime.live import Deliver, Live
from steering.runtime.request import Finished, Reason, Request
from steering.runtime.sampler import Drawn
from steering.runtime.scheduler import Sequence
from steering.runtime.settings import Stats
from steering.vllm.account import Accounts, Settled
from steering.vllm.attachment import KEY, Attachment
from steering.vllm.figures import Figures
from steering.vllm.handshake import Handshake
from steering.vllm.launch import VllmSettings, launch, reason, require_vllm
from steering.vllm.sampling import parameters, reported


class VllmEngine(Desk):
    """Continuous batching by vLLM of requests that are each steered in their own way.

    Raises SpecError where vLLM is not installed or a setting is not one of its, PlantError where it cannot run the
    model, and SteeringError where the handshake fails.
    """

    settings: VllmSettings

    def __init__(self, plant: Plant, settings: VllmSettings | None = None) -> None:
        settings = settings or VllmSettings()
        super().__init__(settings)
        self.plant = plant
        self.eos = end_tokens(plant)
        self._decode = text_decoder(plant)
        self._figures = Figures()
        self._accounts = Accounts()
        self._llm: Any = None
        self._failure: BaseException | None = None
        self._lost: TeamLost | None = None
        self._on_loss: list[Callable[[TeamLost], None]] = []
        opened = threading.Event()
        # All of vLLM happens on one thread: where it is made it also steps.
        self._thread: threading.Thread | None = threading.Thread(
            target=self._serve, args=(opened,), name="setpoint-vllm", daemon=True
        )
        self._thread.start()
        opened.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    # ── from any thread ──────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def require() -> None:
        """Raises SpecError, which says what to install, where vLLM is not."""
        require_vllm()

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; its events go to `deliver`, on the engine's thread, and end with one `Finished`.

        Raises QueueFull, PlantError if it is longer than a sequence may be, DimensionMismatch or PlantError if its
        program does not fit the model or asks for a site that vLLM's modelling code does not show, and SpecError for
        what vLLM does not have. TeamLost once one of vLLM's workers has ended.
        """
        self._check_open()
        if self._lost is not None:
            raise TeamLost(self._lost.message)
        check(request, self.plant, self.max_model_len, self.settings.max_batch)
        if len(request.prompt) == self.max_model_len:  # only where max_tokens is 0
            raise PlantError(
                f"The prompt has {len(request.prompt)} tokens: expected at most {self.max_model_len - 1} on the vLLM "
                "engine, which draws a token after every prompt; shorten it.",
                param="prompt",
            )
        if request.program.acts:
            self.handshake.check(request.program)
        self._verify(request)
        self._queue(Live.of(Sequence(request), deliver, self._decode, self.eos))

    def on_loss(self, call: Callable[[TeamLost], None]) -> None:
        """Call with the reason if a worker ends that should not; at once if one did. From a thread of vLLM's."""
        with self._wake:
            if self._lost is None:
                self._on_loss.append(call)
                return
        call(self._lost)

    def start(self) -> None:
        """Does nothing: the steps run from the beginning, until `stop`."""

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let the others finish for `drain_seconds`, abort the rest, end vLLM."""
        with self._wake:
            self._closing = True
            self._wake.wait_for(lambda: not self._outstanding, timeout=drain_seconds)
            self._aborts.extend(self._outstanding)
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stats(self) -> Stats:
        """A look at the engine, from any thread; figures of one moment, not of one step."""
        figures, live = self._figures, list(self._live.values())
        running = min(figures.running, len(live))
        programs = [one.request.program for one in live if one.request.program.acts]
        return Stats(
            running=running,
            waiting=len(self._outstanding) - running,
            kv_used_ratio=figures.kv_used_ratio if live else 0.0,
            programs_resident=len({program.fingerprint for program in programs}),
            distinct_programs=len({program.shape for program in programs}),
            steps=self._counts["steps"],
            prompt_tokens=self._counts["prompt_tokens"],
            generated_tokens=self._counts["generated_tokens"],
            saturated_tokens=self._counts["saturated_tokens"],
            nonfinite=self._counts["nonfinite"],
            rejected=self._counts["rejected"],
            preempted=figures.preempted,
            prefix_tokens=figures.prefix_tokens,
            cached_tokens=figures.cached_tokens,
            finished=dict(self._finished),
        )

    def _lose(self) -> None:
        """Note that vLLM's workers are gone, and tell whoever waits for that."""
        with self._wake:
            if self._lost is not None or self._closing:
                return
            self._lost = TeamLost("A worker of vLLM's that shares the model ended: start again.")
            waiting, self._on_loss = self._on_loss, []
        for call in waiting:
            call(self._lost)

    def _verify(self, request: Request) -> None:
        """Ask vLLM whether it can draw as the request says. Raises SpecError."""
        try:
            parameters(request, self.eos).verify(*self._verifying)
        except SteeringError:
            raise
        except ValueError as error:
            raise refused(error) from error

    # ── on the engine's thread ───────────────────────────────────────────────────────────────────────────────────────

    def _serve(self, opened: threading.Event) -> None:
        try:
            self._open()
        except BaseException as error:
            self._failure = error
            return
        finally:
            opened.set()
        while True:
            self._take_inbox()
            if self._live:
                self._step()
                continue
            with self._wake:
                if self._closing and not self._outstanding:
                    break
                if not self._inbox and not self._aborts:
                    self._wake.wait()
        self._llm.engine_core.shutdown()
        self._llm = None
        gc.collect()

    def _open(self) -> None:
        """Make vLLM's engine and shake hands with every worker."""
        self._llm = launch(self.plant, self.settings, self._figures.attach)
        self._executor = self._llm.engine_core.engine_core.model_executor
        self._executor.register_failure_callback(self._lose)
        config = self._llm.vllm_config
        self._verifying = (
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            self._llm.tokenizer,
        )
        self.max_model_len: int = config.model_config.max_model_len
        """Positions a sequence may have: prompt and completion together."""
        try:
            shaken = Handshake.shake(self._llm.collective_rpc, self.plant.width, self.plant.depth)
        except BaseException:
            self._llm.engine_core.shutdown()
            raise
        if self.plant.device.type == "cpu":
            warm()  # the kernels are compiled before the first request needs them
        self.handshake: Handshake = shaken
        """What the workers are and can do."""

    def _take_inbox(self) -> None:
        arrived, aborted = self._take()
        for live in arrived:
            self._live[live.request.id] = live
            self._admit(live)
        for request_id in aborted:
            if request_id in self._live:
                self._finish(self._live[request_id].finished("abort"))

    def _admit(self, live: Live) -> None:
        """Hand a request to vLLM. What it refuses is that request's own affair."""
        from vllm.inputs.engine import tokens_input

        request, extra = live.request, None
        try:
            if request.program.acts:
                extra = {KEY: Attachment.of(request.id, request.program, len(request.prompt)).to_args()}
                self._accounts.open(request.id, request.program, len(request.prompt), live.tally)
            if request.sampling.grammar is not None:
                live.draw.matcher = request.sampling.grammar.matcher()
            prompt = tokens_input(list(request.prompt), cache_salt=request.cache_salt or None)
            self._llm.add_request(request.id, prompt, parameters(request, self.eos, extra))
        except Exception as error:
            wrong = refused(error) if isinstance(error, ValueError) else failed(error)
            self._finish(live.finished("error", error=wrong))

    def _step(self) -> None:
        """One step of vLLM's, and the events that it makes. If it fails as a whole, so does every request."""
        try:
            outputs = self._llm.step()
            self._counts["steps"] += 1
            if self._accounts:
                self._accounts.file(self._llm.collective_rpc("setpoint_take")[0])
        except Exception as error:
            if getattr(self._executor, "is_failed", False):
                self._lose()
            for live in list(self._live.values()):
                wrong = failed(error) if self._lost is None else TeamLost(self._lost.message)
                self._finish(live.finished("error", error=wrong))
            return
        for output in outputs:
            if (one := self._live.get(output.request_id)) is None:
                continue
            try:
                self._commit(one, output)
            except Exception as error:  # that request's own affair
                if output.request_id in self._live:
                    self._finish(one.finished("error", error=failed(error)))

    def _commit(self, live: Live, output: Any) -> None:
        """Take what a step gave one request."""
        if live.admitted is None:
            live.admitted = output.metrics.scheduled_ts
            live.sequence.cached = output.num_cached_tokens or 0
            self._counts["prompt_tokens"] += len(live.request.prompt)
        if output.prompt_logprobs:
            n_top = live.request.sampling.prompt_logprobs or 0
            asked = zip(live.request.prompt, output.prompt_logprobs, strict=False)
            live.judged += [reported(token, found, n_top) for token, found in asked if found is not None]
        (completion,) = output.outputs
        for i, token in enumerate(completion.token_ids):
            if not self._push(live, token, completion.logprobs[i] if completion.logprobs else None):
                return
        if output.finished:  # by a rule of vLLM's own
            self._finish(live.finished(_REASONS.get(completion.finish_reason, "error")))

    def _push(self, live: Live, token: int, logprobs: Any) -> bool:
        """Deliver what one drawn token turns into. False if that was the end."""
        request, sequence = live.request, live.sequence
        settled = self._settle(live, len(sequence.tokens))
        error = self._wrong(request, settled)
        if error is not None:
            self._finish(live.finished("error", error=error))
            return False
        if not request.sampling.max_tokens:  # vLLM draws one nevertheless
            self._finish(live.finished("length"))
            return False
        sequence.tokens.append(token)
        self._counts["generated_tokens"] += 1
        told = None if logprobs is None else reported(token, logprobs, request.sampling.logprobs or 0)
        delta, finished = live.push(Drawn(token, told), settled.trace if request.trace else None)
        if not hand_over(live, delta):
            finished = live.finished("abort")
        if finished is not None:
            self._finish(finished)
        return finished is None

    def _settle(self, live: Live, end: int) -> Settled:
        """What was measured up to position `end`, which goes to the receipt."""
        if live.request.id not in self._accounts:
            return Settled()
        return self._accounts.settle(live.request.id, end, trace=live.request.trace)

    def _wrong(self, request: Request, settled: Settled) -> Diverged | SteeringError | None:
        if settled.is_lost:
            self._counts["nonfinite"] += 1
            return diverged(request)
        return None if settled.error is None else SteeringError(settled.error)

    def _finish(self, finished: Finished) -> None:
        """Take a request out of vLLM, deliver its end."""
        live = self._live.pop(finished.request_id)
        self._accounts.close(finished.request_id)
        try:
            self._llm.abort_request([finished.request_id])  # nothing, where vLLM has ended it
        except Exception as error:
            self._failure = error
        self._leave(live, finished)


_REASONS: dict[str | None, Reason] = {"stop": "stop", "length": "length", "abort": "abort"}
"""Why vLLM ends a request that our own rules would have let go on."""


def refused(error: Exception) -> SpecError:
    """What vLLM refuses, in our words."""
    return SpecError(
        str(getattr(error, "parameter", None) or "request"), expected=f"what vLLM can do ({reason(error)})"
    )
