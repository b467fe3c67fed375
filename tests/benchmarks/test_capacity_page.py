"""docs/scale.md says what the results say, and the results are those of the code as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.capacity import report
from benchmarks.capacity.assumptions import Model

NAMES = [found[1] for found in tables.MARKED.findall(tables.SCALE.read_text(encoding="utf-8"))]


def _body(name: str) -> Any:
    return json.loads((tables.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_results_say() -> None:
    page = tables.SCALE.read_text(encoding="utf-8")
    assert {f"capacity-{kind}" for kind in report.KINDS} == set(NAMES)
    assert tables.filled(page, tables.RESULTS) == page, "run python -m benchmarks.tables"
    assert tables.ABSENT not in page


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_a_cell_for_each_column(name: str) -> None:
    header, rows, note = report.KINDS[_body(name)["kind"]](_body(name))
    assert rows
    assert {len(row) for row in rows} == {len(header)}
    assert note.endswith(".")


def test_the_results_come_from_the_code_as_it_is() -> None:
    """What is in closed form is computed again; of what is simulated, one row each, the same to the last digit."""
    pytest.importorskip("simpy", reason="pip install setpoint[dev]")
    from benchmarks.capacity import __main__ as capacity
    from benchmarks.capacity.gateway import streamed

    for name, body in (("replica", capacity.replica()), ("bends", capacity.where())):
        assert _same(body, _body(f"capacity-{name}")), f"run python -m benchmarks.capacity {name}"
    held = next(row for row in _body("capacity-gateway")["rows"] if row["way"] == "held")
    cost, step = capacity.costs(), _body("capacity-gateway")["step_ms"] / 1e3
    again = streamed(held["replicas"], capacity.PLACES, step, cost.read_piece + cost.piece, window=capacity.WINDOW)
    assert _same(again, {name: held[name] for name in again}), "run python -m benchmarks.capacity gateway"


def test_the_assumed_sizes_are_those_of_the_files_that_were_measured() -> None:
    concept, header = _body("capacity-costs")["concept"], 4096
    assert concept["program_bytes"] == Model().program_bytes
    assert Model().concept_bytes < concept["file_bytes"] < Model().concept_bytes + header


def test_what_the_text_says_of_the_results_holds() -> None:
    parts = {row["part"]: row for row in _body("capacity-bends")["rows"]}
    assert parts["gateway"]["as_is"] < 1 < parts["gateway"]["remedied"]
    assert parts["handle"]["as_is"] > 1 > parts["handle"]["remedied"]
    assert 7 < parts["disk"]["as_is"] < 100
    assert 0.1 < parts["unknown"]["as_is"] < 1.0
    assert 500 < parts["names"]["as_is"] < 2000
    assert parts["slots"]["as_is"] > _body("capacity-bends")["places"]
    behind = {
        (row["protocol"], row["replicas"]): row["store_behind_seconds"] for row in _body("capacity-fleet")["rows"]
    }
    assert behind["name", 2000] > 0.5 > behind["name", 500]
    busy = next(row for row in _body("capacity-validation")["rows"] if row["rate"] == 16.0)
    for figure in ("ttft_p99_ms", "e2e_p99_ms"):
        assert busy["simulated"][figure] == pytest.approx(busy["measured"][figure], rel=0.1)
    days = {row["way"]: row for row in _body("capacity-day")["rows"]}
    assert days["as is"]["most_replicas"] > 2 * days["capped"]["most_replicas"]
    assert days["warm pool"]["wait_most_seconds"] < days["as is"]["wait_most_seconds"]


def test_the_figure_has_a_panel_for_each_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.capacity"):
        report.draw(tmp_path)
    sizes = []
    for name in ("capacity-validation", "capacity-day"):
        (tmp_path / f"{name}.json").write_text(json.dumps(_body(name)))
        picture = report.draw(tmp_path).read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(int.from_bytes(picture[16:20], "big"))
    assert sizes[1] == 2 * sizes[0]


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two results agree, floats to the last digits, which differ between mathematical libraries."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == pytest.approx(theirs, rel=1e-9)) if isinstance(ours, float) else bool(ours == theirs)
