"""docs/dashboard.png: the provisioned dashboard, over a Prometheus that scraped a server under steered load.

    python -m benchmarks.dashboard [--seconds 360] [--rates 1 2 4] [--steered 0.7] [--output docs/dashboard.png]

Starts Prometheus (`apt-get install prometheus`) with deploy/prometheus.yml and deploy/alerts.yml, of which only the
target, the key and the intervals are others, then `setpoint serve` of the embedded model, so that the picture begins
with a server that is not there yet. Arrivals come at rising rates (`benchmarks.load`), part of them with a setpoint of
their own; a concept is fitted meanwhile, some requests bound their effort so that it saturates, and once more come at
one time than the queue takes. The picture is drawn by `benchmarks.panels`, not by Grafana, and says so. Needs
matplotlib.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.load import TIMEOUT, Arrival, arrivals, run
from benchmarks.panels import Prometheus, Span, draw
from benchmarks.serving import serving
from steering import __version__

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCRAPE = 5.0
"""Seconds between scrapes, 15 in deploy/: minutes must do for a picture that an hour makes there."""
BEFORE = 4 * SCRAPE
PLACES, QUEUE = 8, 16
BURST = 3 * (PLACES + QUEUE)
SYSTEM = "You are a friendly guide of the town. Tell people about its gardens, its music and its food, in a few words."
SETPOINTS = (0.5, 1.0, 1.5, 2.0)
BOUND = 0.02
"""`guard.max_effort` of those that saturate."""
CAPTION = (
    "deploy/grafana/dashboards/setpoint.json over Prometheus {prometheus}, which scraped setpoint {version} (embedded "
    "model, {processor}, {rates} requests a second, {steered:.0%} steered).\nDrawn by python -m benchmarks.dashboard "
    "from the dashboard's own queries, not by Grafana."
)


def free_port() -> int:
    """A port of this machine that was free just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def configuration(target: str, scrape: float) -> dict[str, Any]:
    """deploy/prometheus.yml for one server without a key."""
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    every = f"{round(1e3 * scrape)}ms"
    found["global"] |= {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    found["rule_files"] = [str(DEPLOY / name) for name in found["rule_files"]]
    (job,) = (job for job in found["scrape_configs"] if job["job_name"] == "setpoint")
    del job["authorization"]
    job["static_configs"] = [{"targets": [target]}]
    return found | {"scrape_configs": [job]}


@contextmanager
def scraping(target: str, scrape: float = SCRAPE) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` until the block ends. Raises RuntimeError where it does not start."""
    program = shutil.which("prometheus")
    if program is None:
        raise RuntimeError("expected the program prometheus, found none: apt-get install prometheus")
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "prometheus.yml", Path(folder) / "log"
        file.write_text(yaml.safe_dump(configuration(target, scrape)), encoding="utf-8")
        options = [f"--config.file={file}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
        with log.open("w") as out:
            process = subprocess.Popen([program, *options], stdout=out, stderr=out)
        try:
            until = time.monotonic() + 30
            while not _is_ready(f"http://{address}"):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"Prometheus did not start: {log.read_text()[-500:]}")
                time.sleep(0.1)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait(timeout=30)


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/-/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


def planned(rates: Sequence[float], seconds: float, steered: float, rng: random.Random) -> list[Arrival]:
    """Rising rates, one after the other; bounded effort for a while at the last, and then more than the queue takes.

    All share a system message, as the requests of one application do.
    """
    each = seconds / len(rates)
    found = [
        Arrival(i * each + one.at, one.body)
        for i, rate in enumerate(rates)
        for one in arrivals(rate, each, steered, rng)
    ]
    for one in found:
        if one.is_steered and seconds - each < one.at < seconds - each / 2:
            one.body["steering"]["guard"] = {"max_effort": BOUND}
    burst = arrivals(BURST, 10.0, steered, rng)[:BURST]
    found += [Arrival(seconds - each / 4, one.body) for one in burst]
    for one in found:
        one.body["messages"].insert(0, {"role": "system", "content": SYSTEM})
        if one.is_steered:
            targets = one.body["steering"]["targets"]
            targets |= {name: rng.choice(SETPOINTS) for name in targets}
    return found


async def loaded(address: str, rates: Sequence[float], seconds: float, steered: float) -> dict[str, Any]:
    """What came of the arrivals, with a fit among them."""
    rng = random.Random(0)
    plan = planned(rates, seconds, steered, rng)

    async def fit() -> None:
        await asyncio.sleep(seconds / 3)
        examples = {"positive": ["A lovely day.", "A fine garden."], "negative": ["A dull day.", "A dreary garden."]}
        async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT) as http:
            (await http.post("/v1/steering/fit", json={"name": "sunny", **examples})).raise_for_status()

    fitting = asyncio.ensure_future(fit())
    found = await run(address, plan)
    await fitting
    return found


def main() -> None:
    """Serve, scrape, load and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--steered", type=float, default=0.7)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "dashboard.png")
    given = parser.parse_args()
    port = free_port()
    began = time.time()
    with scraping(f"127.0.0.1:{port}") as prometheus:
        time.sleep(BEFORE)
        options = ["--port", str(port), "--max-batch", str(PLACES), "--queue-limit", str(QUEUE)]
        with serving(None, options) as server:
            found = asyncio.run(loaded(server.address, given.rates, given.seconds, given.steered))
            time.sleep(2 * SCRAPE)
            span = Span(began, time.time(), SCRAPE, SCRAPE)
            caption = CAPTION.format(
                prometheus=prometheus.version,
                version=__version__,
                processor=platform.processor() or platform.machine(),
                rates=", ".join(f"{rate:g}" for rate in given.rates),
                steered=given.steered,
            )
            dashboard = json.loads((DEPLOY / "grafana/dashboards/setpoint.json").read_text(encoding="utf-8"))
            draw(dashboard, prometheus, span, caption, given.output)
    print(json.dumps(found["outcomes"]), given.output)


if __name__ == "__main__":
    main()
