"""The comparison compares one computation: the same tokens under the same control; and its figures are of one round."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import Absent, Worker, checkpoint, compare, lines, prompts_of
from benchmarks.systems import Generate, Setpoint, Task

DEPTH, WIDTH, TOKENS = 3, 64, 6


@pytest.fixture(scope="module")
def systems() -> Iterator[tuple[Generate, Setpoint]]:
    """The base and this engine, on one small checkpoint under a control that is large enough to be felt."""
    with checkpoint(None, WIDTH, DEPTH) as folder:
        made = torch.load(folder / "control.pt", weights_only=True)
        torch.save(made | {"beta": 2 * made["beta"]}, folder / "control.pt")
        task = Task(folder, "cpu", length=16, batch=4)
        yield Generate(task), Setpoint(task)


def _tokens(system: Any, mode: str, distinct: bool = False) -> list[list[int]]:
    with system.awake(mode):
        return list(system.run(mode, prompts_of(0, 4, 8), TOKENS, distinct))


@pytest.mark.parametrize("mode", ["none", "add", "lqr"])
def test_the_engine_gives_the_tokens_of_hooks_written_from_the_formula(
    mode: str, systems: tuple[Generate, Setpoint]
) -> None:
    base, ours = systems
    assert _tokens(ours, mode) == _tokens(base, mode)
    if mode != "none":
        assert _tokens(base, mode) != _tokens(base, "none")


@pytest.mark.parametrize("mode", ["add", "lqr"])
def test_distinct_requests_have_controls_of_their_own(mode: str, systems: tuple[Generate, Setpoint]) -> None:
    shared, own = (_tokens(systems[1], mode, distinct) for distinct in (False, True))
    assert own[0] == shared[0]
    assert own[1:] != shared[1:]


def test_hooks_are_gone_after_a_run(systems: tuple[Generate, Setpoint]) -> None:
    before = _tokens(systems[0], "none")
    _tokens(systems[0], "lqr")
    assert _tokens(systems[0], "none") == before


def test_a_process_that_ends_is_absent(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="the process ended"):
        Worker("generate", "false", ["", "cpu", "1", "8", "1"], tmp_path / "log")


def test_a_process_that_ends_later_loses_its_own_rows_alone(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"modes": ["none"], "versions": {}}\'\nread asked\necho oh >&2\n')
    python.chmod(0o755)
    worker = Worker("generate", str(python), ["", "cpu", "1", "8", "1"], tmp_path / "log")
    assert worker.ask("none", [[3]], 1, False) == {"error": "the process ended: oh"}
    assert "error" in worker.ask("none", [[3]], 1, False)
    worker.close()


class Scripted:
    """A worker whose every run takes the next of its times."""

    def __init__(self, modes: list[str], seconds: list[float], token: int = 7) -> None:
        self.modes = modes
        self.asked: list[tuple[str, bool]] = []
        self.prompts: list[tuple[int, ...]] = []
        self._seconds = iter(seconds)
        self._token = token

    def ask(self, mode: str, prompts: list[list[int]], tokens: int, distinct: bool) -> dict[str, Any]:
        self.asked.append((mode, distinct))
        self.prompts += map(tuple, prompts)
        if mode == "broken":
            return {"error": "ValueError: no"}
        seconds = next(self._seconds)
        return {"seconds": seconds, "cpu_seconds": seconds / 2, "tokens": [[self._token] * tokens] * len(prompts)}


def test_ratios_are_within_a_round_and_failures_are_rows() -> None:
    # The machine is four times as slow in the second round: the ratios do not notice.
    base = Scripted(["none"], [9.0, 1.0, 4.0])
    peer = Scripted(["none", "add", "broken"], [9.0, 9.0, 4.0, 2.0, 8.0, 16.0], token=8)
    sizes = argparse.Namespace(prompt_tokens=3, tokens=5, repeats=2)
    rows = compare({"generate": base, "peer": peer}, [2], sizes)  # type: ignore[dict-item]
    by_case = {(row["system"], row["mode"]): row for row in rows}
    assert by_case["peer", "broken"]["failed"] == "ValueError: no"
    add = by_case["peer", "add"]
    # rounds go backwards first: add 4 s, none 2 s; then none 8 s, add 16 s
    assert add["to_own_unsteered"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    assert add["to_generate"] == {"median": 0.25, "least": 0.25, "most": 0.25}
    assert (by_case["generate", "none"]["same"], by_case["peer", "none"]["same"], add["same"]) == (1.0, 0.0, None)
    assert add["to_generate_by_cpu"]["median"] == 0.25  # all of them work half of their time
    assert add["cores"] == 0.5
    assert [distinct for _, distinct in base.asked] == [False, True, True]
    assert len(list(lines(rows))) == 1 + len(rows)


def test_no_case_of_a_system_sees_a_prompt_twice() -> None:
    worker = Scripted(["none", "add"], [1.0] * 100)
    sizes = argparse.Namespace(prompt_tokens=16, tokens=1, repeats=4)
    compare({"generate": worker}, [1, 16], sizes)  # type: ignore[dict-item]
    warm, timed = worker.prompts[: 2 * 17], worker.prompts[2 * 17 :]
    assert len(timed) == len(set(timed)) == 2 * 17 * 4
    assert not set(warm) & set(timed)
