"""Throughput beside the systems people use instead: Hugging Face, steering libraries, vLLM, and this engine.

    python -m benchmarks.peers [--model DIR] [--width 512] [--layers 16] [--device cpu] [--batch 1 16] [--tokens 64]
                               [--prompt-tokens 16] [--repeats 5] [--threads 1] [--systems setpoint generate …]
                               [--python repeng=/envs/repeng/bin/python …] [--name cpu]

Every system is a process of its own (`benchmarks.systems` says which, and what they are asked for), in its own virtual
environment where one is given: `python -m venv /envs/repeng; /envs/repeng/bin/pip install repeng`, and so on. A system
that is not installed is left out, with the reason in the results. A round runs every case once, one after another, the
next round in the other order, on prompts that nobody has seen; a figure is the median over the rounds of the ratio to a
case of the same round, so that a busy machine slows both alike.

Before anything is timed every system answers the same prompts under the same control. Those of one mode must give the
same tokens as `generate` with plain hooks: what is compared is then the same computation. `same` tells the share of
answers that are equal, which rounding alone can lower. `cores` is CPU time ÷ wall time, all threads of the process
together: a system that takes more cores than it was given is found out, and on a busy machine it is below 1. There the
ratios by CPU time, tokens per CPU second ÷ those of the base, are the steadier ones.

Without a model a random Llama of the given size is run. Writes benchmarks/results/peers-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import random_llama
from benchmarks.systems import SYSTEMS
from steering.demo import MODEL

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
BASE = "generate"
"""The system that the others are compared with, tokens and throughput."""
SECONDS = 600.0
"""Longest wait for one answer; vLLM compiles the model first."""


class Absent(Exception):
    """A system that cannot be run, and why."""


@dataclass(frozen=True)
class Case:
    """One row: a system in one mode at one batch size."""

    system: str
    mode: str
    batch: int


class Worker:
    """A system's process. Raises Absent when it ends before it is ready, or is not ready in time."""

    def __init__(self, name: str, python: str, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        threads = arguments[2]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        command = [python, "-P", str(ROOT / "benchmarks" / "systems.py"), name, *arguments]
        with log.open("w") as written:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True, env=environment
            )
        try:
            ready = self._answer()
        except Absent:
            self.close()
            raise
        self.modes: list[str] = ready["modes"]
        self.versions: dict[str, str] = ready["versions"]

    def ask(self, mode: str, prompts: Sequence[Sequence[int]], tokens: int, distinct: bool) -> dict[str, Any]:
        """Seconds and tokens of one run, or the error: a process that ends here loses its own rows alone."""
        assert self._process.stdin is not None
        asked = {"mode": mode, "prompts": prompts, "tokens": tokens, "distinct": distinct}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return self._answer()
        except (Absent, OSError) as reason:
            return {"error": str(reason)}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what it was not there to read
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(SECONDS, self._process.kill)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if line:
            return dict(json.loads(line))
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        raise Absent(f"the process ended: {said[-1].strip()[:200]}" if said else "the process ended")


@contextmanager
def checkpoint(model: str | None, width: int, layers: int) -> Iterator[Path]:
    """A folder with the model, a tokenizer and the control that every system applies."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        if model:
            shutil.copytree(model, folder)
        else:
            random_llama(width, layers).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(MODEL / name, folder)
        config = json.loads((folder / "config.json").read_text())
        torch.save(control(config["num_hidden_layers"], config["hidden_size"]), folder / "control.pt")
        yield folder


def control(depth: int, width: int) -> dict[str, torch.Tensor]:
    """Unit directions v_LD, gains K_LDD near 0.3 I and setpoints beta_L, as random as they need be to be timed."""
    generator = torch.Generator().manual_seed(0)
    v_LD = torch.nn.functional.normalize(torch.randn(depth, width, generator=generator), dim=1)
    noise_LDD = torch.randn(depth, width, width, generator=generator) / width**0.5
    return {"v": v_LD, "K": 0.3 * torch.eye(width) + 0.1 * noise_LDD, "beta": torch.ones(depth)}


def prompts_of(seed: int, n: int, length: int, mode: str = "") -> list[list[int]]:
    """Prompts of `n` requests in a mode and round; no two of them share one, so that no cache of prefixes is of use."""
    rng = random.Random(f"round {seed} {mode} {n}")
    return [[rng.randrange(3, 1000) for _ in range(length)] for _ in range(n)]


def compare(workers: Mapping[str, Worker], batches: Sequence[int], sizes: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a case: throughput, its ratios to the base and to the system's own unsteered case, and the agreement."""
    cases = [Case(name, mode, n) for n in batches for name, worker in workers.items() for mode in worker.modes]
    failed: dict[Case, str] = {}
    told: dict[Case, list[list[int]]] = {}
    for case in cases:  # also each system's warm-up, at every size that is timed
        answer = workers[case.system].ask(
            case.mode, prompts_of(-1, case.batch, sizes.prompt_tokens), sizes.tokens, False
        )
        if "error" in answer:
            failed[case] = answer["error"]
            continue
        told[case] = answer["tokens"]
        print(f"{case.system:17} {case.mode:5} batch {case.batch:3}: warm, {answer['seconds']:.2f} s", flush=True)
    rates: dict[Case, list[float]] = {case: [] for case in cases if case not in failed}
    cores: dict[Case, list[float]] = {case: [] for case in rates}
    for repeat in range(sizes.repeats):
        for case in list(rates)[:: 1 if repeat % 2 else -1]:
            prompts = prompts_of(repeat, case.batch, sizes.prompt_tokens, case.mode)
            answer = workers[case.system].ask(case.mode, prompts, sizes.tokens, True)
            if "error" in answer:
                failed[case] = answer["error"]
                del rates[case]
                continue
            rates[case].append(sum(map(len, answer["tokens"])) / answer["seconds"])
            cores[case].append(answer["cpu_seconds"] / answer["seconds"])
    by_cpu = {case: [rate / core for rate, core in zip(rates[case], cores[case], strict=True)] for case in rates}
    rows = []
    for case in cases:
        base, own = Case(BASE, "none", case.batch), Case(case.system, "none", case.batch)
        row: dict[str, Any] = {"system": case.system, "mode": case.mode, "batch": case.batch}
        rows.append(row)
        if case in failed:
            row["failed"] = failed[case]
            continue
        row |= {
            "tokens_per_second": statistics.median(rates[case]),
            "cores": statistics.median(cores[case]),
            "to_generate": _ratio(rates, case, base),
            "to_own_unsteered": _ratio(rates, case, own),
            "to_generate_by_cpu": _ratio(by_cpu, case, base),
            "same": _same(told[case], told.get(Case(BASE, case.mode, case.batch))),
        }
    return rows


def _ratio(rates: Mapping[Case, list[float]], case: Case, other: Case) -> dict[str, float] | None:
    """Median and range over the rounds; None where the other was not run."""
    if other not in rates:
        return None
    pairs = [ours / theirs for ours, theirs in zip(rates[case], rates[other], strict=True)]
    return {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}


def _same(told: list[list[int]], reference: list[list[int]] | None) -> float | None:
    """The share of answers that are those of the base; None where it has none under this control."""
    if reference is None:
        return None
    return sum(a == b for a, b in zip(told, reference, strict=True)) / len(reference)


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table as text."""
    heads = ("tok/s", "÷ generate", "÷ unsteered", "by CPU", "same", "cores")
    yield f"{'system':17} {'mode':5} batch " + " ".join(f"{head:>11}" for head in heads)
    for row in rows:
        begin = f"{row['system']:17} {row['mode']:5} {row['batch']:5}"
        if "failed" in row:
            yield f"{begin} failed: {row['failed']}"
            continue
        names = ("to_generate", "to_own_unsteered", "to_generate_by_cpu")
        ratios = [f"{row[name]['median']:.3f}" if row[name] else "–" for name in names]
        same = "–" if row["same"] is None else f"{row['same']:.2f}"
        cells = [f"{row['tokens_per_second']:.0f}", *ratios, same, f"{row['cores']:.2f}"]
        yield f"{begin} " + " ".join(f"{cell:>11}" for cell in cells)


def main() -> None:
    """Start what there is, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint with model.layers; a random Llama without it")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--python", action="append", default=[], metavar="SYSTEM=PATH")
    parser.add_argument("--name", help="of the results, in place of the device")
    given = parser.parse_args()
    pythons = dict(one.split("=", 1) for one in given.python)
    length = given.prompt_tokens + given.tokens
    sizes = [given.device, str(given.threads), str(length), str(max(given.batch))]
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(checkpoint(given.model, given.width, given.layers))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers: dict[str, Worker] = {}
        for name in given.systems:
            try:
                python = pythons.get(name, sys.executable)
                workers[name] = Worker(name, python, [str(folder), *sizes], logs / name)
            except (Absent, OSError) as reason:
                absent[name] = str(reason)
                print(f"{name}: left out, {reason}", flush=True)
                continue
            stack.callback(workers[name].close)
            print(f"{name}: {workers[name].versions}", flush=True)
        rows = compare(workers, given.batch, given)
        versions = {name: worker.versions for name, worker in workers.items()}
    print("\n".join(lines(rows)))
    body = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or "cpu",
        "model": given.model or f"random llama, width {given.width}, {given.layers} layers, vocabulary 4096",
        "threads": given.threads,
        "prompt_tokens": given.prompt_tokens,
        "tokens": given.tokens,
        "repeats": given.repeats,
        "versions": versions,
        "absent": absent,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"peers-{given.name or given.device}.json").write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
