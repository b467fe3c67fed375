"""The page of performance says what the results say, and the figure is drawn from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, tables

RATIO = {"median": 0.5, "least": 0.25, "most": 0.75}
SIDE = {"requests": 3, **{f"{n}_{p}_ms": 12.5 for n in ("ttft", "itl", "e2e") for p in ("p50", "p99")}}
PEERS: dict[str, Any] = {
    "model": "tiny", "device": "cpu", "threads": 1, "prompt_tokens": 4, "tokens": 8, "repeats": 2,
    "versions": {"generate": {"torch": "1"}}, "absent": {"vllm": "the process ended"},
    "rows": [
        {"system": "setpoint", "mode": "lqr", "batch": 2, "tokens_per_second": 123.0, "to_generate": RATIO,
         "to_own_unsteered": None, "to_generate_by_cpu": None, "same": None, "cores": 1.0},
        {"system": "nnsight", "mode": "add", "batch": 2, "failed": "ValueError"},
    ],
}  # fmt: skip
LOAD: dict[str, Any] = {
    "device": "cpu", "processor": "x", "model": "embedded", "max_batch": 4, "steered_share": 0.5, "answer_tokens": [2],
    "rows": [{"rate": 2.0, "requests": 5, "outcomes": {"done": 3, "refused": 1, "status 500": 1},
              "tokens_per_second": 9.0, "seconds": 1.0, "all": SIDE, "unsteered": {"requests": 0}, "steered": SIDE}],
}  # fmt: skip


def test_the_page_is_what_the_results_say() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert len(tables.MARKED.findall(page)) >= 5
    assert tables.filled(page, tables.RESULTS) == page, "run python -m benchmarks.tables"


@pytest.mark.parametrize("name", [found[1] for found in tables.MARKED.findall(tables.PAGE.read_text(encoding="utf-8"))])
def test_a_table_without_a_result_says_so_and_keeps_no_figure(name: str, tmp_path: Path) -> None:
    page = f"<!-- table {name} -->\n\n| 0.99 |\n\n<!-- /table -->"
    assert tables.filled(page, tmp_path) == f"<!-- table {name} -->\n\n{tables.ABSENT}\n\n<!-- /table -->"


def test_rows_of_peers_and_of_load() -> None:
    found = tables.peers(PEERS)
    assert "| setpoint | lqr | 2 | 123 | 0.50 (0.25–0.75) | – | – | – | 1.00 |" in found
    assert "| nnsight | add | 2 | failed: ValueError |" in found
    assert "Left out: vllm (the process ended)." in found
    assert "| 2 | 3 | 1 | 1 | 9 | – | 12.5 / 12.5 | – | 12.5 / 12.5 |" in tables.load(LOAD)


def test_an_endurance_run_tells_its_verdict() -> None:
    memory = {"growth": 0.01, "first_mib": 100.0, "last_mib": 101.0}
    body = LOAD | LOAD["rows"][0] | {"memory": memory, "verdict": {"no_request_lost": False, "memory_flat": True}}
    del body["rows"]
    found = tables.load(body)
    assert "no request lost: no, memory flat: yes" in found
    assert "growth 1.0 %" in found


def test_the_figure_has_a_panel_for_each_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match="run the benchmarks"):
        plots.draw(tmp_path, "cpu")
    sizes = []
    for name, body in (("peers", PEERS), ("load", LOAD)):
        (tmp_path / f"{name}-cpu.json").write_text(json.dumps(body))
        picture = plots.draw(tmp_path, "cpu").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(int.from_bytes(picture[16:20], "big"))
    assert sizes[1] == 2 * sizes[0]
