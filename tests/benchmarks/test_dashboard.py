"""The dashboard's picture holds every panel and every series that there is, and Prometheus takes what it is given."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from benchmarks import dashboard, panels
from benchmarks.panels import Prometheus, Series, Span
from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "dashboard.png"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/setpoint.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SPAN = Span(1000.0, 1100.0, scrape=5.0, step=10.0)


class Source(Prometheus):
    """Answers every query with one server's ramp, and remembers what it was asked."""

    def __init__(self, found: list[Series]) -> None:
        super().__init__("nowhere")
        object.__setattr__(self, "found", found)
        object.__setattr__(self, "asked", [])

    def over(self, query: str, span: Span) -> list[Series]:
        self.asked.append(span.filled(query))  # type: ignore[attr-defined]
        return list(self.found)  # type: ignore[attr-defined]


TIMES = tuple(1000.0 + 10 * i for i in range(11))
RAMP: Series = ({"instance": "one", "status": "500"}, TIMES, tuple(0.1 * i for i in range(11)))


def drawn(monkeypatch: pytest.MonkeyPatch, source: Prometheus, path: Path, body: Any = DASHBOARD) -> Any:
    """The figure that was saved."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    panels.draw(body, source, SPAN, "a caption", path)
    monkeypatch.undo()
    pyplot.close(kept[0])
    return kept[0]


def test_every_panel_asks_its_queries_and_shows_a_line_for_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Source([RAMP])
    figure = drawn(monkeypatch, source, tmp_path / "a.png")
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    asked: list[str] = source.asked  # type: ignore[attr-defined]
    assert sorted(asked) == sorted(
        SPAN.filled(query) for query in [*queries, *(one["expr"] for one in DASHBOARD["annotations"]["list"])]
    )
    assert not any("$" in query for query in asked)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert [title for title in titles if title] == [panel["title"] for panel in PANELS]
    lines = sum(len(axis.get_legend_handles_labels()[1]) for axis in figure.axes)
    assert lines == sum(len(panel["targets"]) for panel in PANELS if panel["type"] == "timeseries")
    texts = {text.get_text() for text in figure.texts}
    assert {"Setpoint", "a caption", *(one["title"] for one in DASHBOARD["panels"] if one["type"] == "row")} <= texts
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_panels_lie_on_the_picture_as_on_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = drawn(monkeypatch, Source([RAMP]), tmp_path / "a.png")
    at = {axis.get_title(loc="left"): axis.get_position() for axis in figure.axes}
    for one in PANELS:
        for other in PANELS:
            mine, theirs = one["gridPos"], other["gridPos"]
            if mine["y"] + mine["h"] <= theirs["y"]:
                assert at[one["title"]].y0 > at[other["title"]].y1
            if mine["y"] == theirs["y"] and mine["x"] + mine["w"] <= theirs["x"]:
                assert at[one["title"]].x1 < at[other["title"]].x0


def test_a_panel_without_an_answer_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = drawn(monkeypatch, Source([]), tmp_path / "a.png")
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts.count("No data") == len(PANELS)


def test_what_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for change in ({"type": "heatmap"}, {"fieldConfig": {"defaults": {"unit": "furlongs", "custom": {}}}}):
        body = copy.deepcopy(DASHBOARD)
        body["panels"][-1] |= change
        with pytest.raises(KeyError):
            drawn(monkeypatch, Source([RAMP]), tmp_path / "a.png", body)


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (0.0321, "s", "32.1 ms"), (4.2e-5, "s", "42 µs"), (12.0, "s", "12 s"), (0.0, "s", "0"),
        (700 * 2**20, "bytes", "700 MiB"), (1.5, "reqps", "1.5/s"), (0.125, "percentunit", "12.5 %"),
        (0.0, "percentunit", "0 %"), (1234.0, "none", "1.23k"), (3.0, "none", "3"),
    ],
)  # fmt: skip
def test_quantities_read_as_in_grafana(value: float, unit: str, told: str) -> None:
    assert panels.quantity(value, unit) == told


def test_a_threshold_is_reached_at_its_value() -> None:
    steps = PANELS[0]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert (panels.limit(steps, 0), panels.limit(steps, 1)) == (panels.NAMED["red"], panels.NAMED["green"])


def test_a_line_is_broken_where_nothing_was_scraped() -> None:
    at, value = panels.gaps((0.0, 10.0, 40.0), (1.0, 2.0, 3.0), 10.0)
    assert [one for one in value if math.isfinite(one)] == [1.0, 2.0, 3.0]
    assert math.isnan(value[2])
    assert len(at) == len(value) == 4


def test_the_rate_interval_is_grafanas() -> None:
    assert Span(0, 1, scrape=15, step=15).rate_interval == 60
    assert Span(0, 1, scrape=15, step=120).rate_interval == 135
    assert panels.legend("{{instance}} {{ status }}{{none}}", RAMP[0]) == "one 500"


def test_the_load_is_what_its_description_says() -> None:
    plan = dashboard.planned([1.0, 3.0], 200.0, 0.7, random.Random(0))
    regular, burst = plan[: -dashboard.BURST], plan[-dashboard.BURST :]
    assert len({one.at for one in burst}) == 1
    assert len(burst) > dashboard.PLACES + dashboard.QUEUE
    first = sum(one.at < 100 for one in regular)
    assert 60 < first < 150 < len(regular) - first < 450
    assert all(one.body["messages"][0] == {"role": "system", "content": dashboard.SYSTEM} for one in plan)
    bounded = [one.at for one in plan if one.is_steered and "guard" in one.body["steering"]]
    assert bounded
    assert 100 < min(bounded) < max(bounded) < 150
    assert {v for one in plan if one.is_steered for v in one.body["steering"]["targets"].values()} == set(
        dashboard.SETPOINTS
    )


class _Exposition(BaseHTTPRequestHandler):
    """/metrics of a server that has answered three calls."""

    def do_GET(self) -> None:
        metrics = Metrics(lambda: None)
        metrics.watch_readiness(lambda: True)
        for _ in range(3):
            metrics.answered("/v1/models", 200)
        text, kind = metrics.exposition("")
        self.send_response(200 if self.path == "/metrics" else 404)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def exposed() -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), _Exposition)
    Thread(target=served.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_a_real_prometheus_scrapes_with_the_files_of_deploy_and_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with exposed() as target, dashboard.scraping(target, scrape=0.2) as prometheus:
        until = time.monotonic() + 20
        ready: list[Series] = []
        while not ready and time.monotonic() < until:
            time.sleep(0.2)
            now = time.time()
            span = Span(now - 2, now, 0.2, 0.2)
            ready = prometheus.over('setpoint_ready{job="setpoint"}', span)
        ((labels, _, values),) = ready
        assert labels["instance"] == target
        assert set(values) == {1.0}
        ((_, _, answered),) = prometheus.over('setpoint_http_requests_total{route="/v1/models"}', span)
        assert set(answered) == {3.0}
        assert re.match(r"\d+\.\d+", prometheus.version)
        rules = prometheus._get("rules")["groups"]
        assert {rule["name"] for group in rules for rule in group["rules"]} >= {"SetpointDown", "SetpointNotReady"}
        figure = drawn(monkeypatch, prometheus, tmp_path / "a.png")
        assert len(figure.axes) == 2 * len(PANELS)


def test_without_prometheus_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install prometheus"), dashboard.scraping("127.0.0.1:1"):
        pass


def test_the_docs_show_the_picture() -> None:
    assert "](dashboard.png)" in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert PICTURE.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
