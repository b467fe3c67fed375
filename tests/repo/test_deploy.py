"""deploy/ and docs/operations.md name metrics, flags and alerts that exist; promtool and systemd agree if installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # transformers needs it: it is where this project is

from server.cli import app
from server.metrics import JOB_STATES, REASONS, REJECTIONS, Metrics
from server.settings import ENV_PREFIX

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def samples() -> dict[str, str]:
    """Every series that a server has by name, with the name that the documentation lists it under."""
    metrics = Metrics(lambda: None)
    metrics.answered("/health/ready", 200)  # a counter that has no series before the first answer
    names: dict[str, str] = {}
    for family in metrics.registry.collect():
        listed = f"{family.name}_total" if family.type == "counter" else family.name
        names |= {sample.name: listed for sample in family.samples}
    return names


METRICS = samples()
RULES: dict[str, Any] = {rule["alert"]: rule for group in read("alerts.yml")["groups"] for rule in group["rules"]}
CASES = read("alerts_test.yml")["tests"]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/setpoint.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]] + [
    annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]
]
COMPOSE = read("compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVERS = ("setpoint", "setpoint-gpu")
UNIT = (DEPLOY / "setpoint.service").read_text(encoding="utf-8")
SERVE = typer.main.get_command(app).commands["serve"].params  # type: ignore[attr-defined]
FLAGS = {flag for parameter in SERVE for flag in (*parameter.opts, *parameter.secondary_opts)}
VARIABLES = {str(parameter.envvar) for parameter in SERVE}


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [*(rule["expr"] for rule in RULES.values()), *QUERIES])
def test_a_query_names_what_a_server_has(query: str) -> None:
    named = set(re.findall(r"\bsetpoint_\w+", query))
    assert named <= set(METRICS), named - set(METRICS)
    assert named or re.search(r"\b(up|ALERTS)\b", query)
    for label, values in (("reason", REJECTIONS), ("finished_reason", REASONS), ("state", JOB_STATES)):
        for asked in re.findall(rf'\b{label}=~?"([^"]+)"', query):
            assert set(asked.split("|")) <= set(values), asked


def test_the_tests_of_alerts_feed_what_a_server_has() -> None:
    fed = {one["series"].split("{")[0] for case in CASES for one in case["input_series"]}
    assert fed <= {*METRICS, "up"}


def test_every_metric_is_documented_and_no_other() -> None:
    table = DOCS.split("<!-- metrics -->")[1].split("<!-- /metrics -->")[0]
    assert sorted(re.findall(r"^\| `(setpoint_\w+)` \| \S", table, flags=re.MULTILINE)) == sorted(set(METRICS.values()))


# -- alerts -----------------------------------------------------------------------------------------------------------


def test_every_alert_is_documented_and_no_other() -> None:
    told = re.findall(r"^### (\w+)\n\n\*(page|ticket)\.\* \S", DOCS.split("## Alerts")[1], flags=re.MULTILINE)
    assert told == [(name, rule["labels"]["severity"]) for name, rule in RULES.items()]
    for name, rule in RULES.items():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


@pytest.mark.parametrize("name", RULES)
def test_every_alert_is_made_to_fire_and_to_be_silent(name: str) -> None:
    expected = [
        bool(one["exp_alerts"]) for case in CASES for one in case["alert_rule_test"] if one["alertname"] == name
    ]
    assert set(expected) == {True, False}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (apt-get install prometheus): rules and queries are not evaluated")
    return found


def checked(*command: str | Path, folder: Path = DEPLOY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def test_prometheus_takes_its_files(promtool: str) -> None:
    # Only the syntax: the file with the key is made by whoever deploys.
    for command in (["check", "config", "--syntax-only", "prometheus.yml"], ["check", "rules", "alerts.yml"]):
        done = checked(promtool, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert read("prometheus.yml")["rule_files"] == ["alerts.yml"]


def test_alerts_fire_when_they_should(promtool: str) -> None:
    done = checked(promtool, "test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("broken", ["vector(1) > 2", 'sum by (job, instance) ({job="setpoint"}) >= 0'])
def test_alerts_that_are_always_silent_or_always_on_are_noticed(broken: str, promtool: str, tmp_path: Path) -> None:
    rules = read("alerts.yml")
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["expr"] = broken
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    shutil.copy(DEPLOY / "alerts_test.yml", tmp_path)
    done = checked(promtool, "test", "rules", "alerts_test.yml", folder=tmp_path)
    assert done.returncode != 0
    noticed = set(re.findall(r"alertname: ?(\w+)", done.stdout + done.stderr))
    assert noticed == set(RULES), done.stdout + done.stderr


def test_the_dashboards_queries_are_promql(promtool: str, tmp_path: Path) -> None:
    filled = [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for query in QUERIES]
    rules = [{"record": f"dashboard:query:{i}", "expr": query} for i, query in enumerate(filled)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    done = checked(promtool, "check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the dashboard ----------------------------------------------------------------------------------------------------


def test_the_dashboard_answers_three_questions() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == ["Is it up?", "Is it fast?", "Is the control holding?"]
    starts = [row["gridPos"]["y"] for row in rows]
    for start, end in zip(starts, [*starts[1:], 10**6], strict=True):
        assert sum(start < panel["gridPos"]["y"] < end for panel in PANELS) >= 4
    assert all(panel["title"] and panel["description"] for panel in PANELS)


def test_no_panels_overlap_or_share_an_id() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for grid in (panel["gridPos"] for panel in DASHBOARD["panels"]):
        own = {(grid["x"] + i, grid["y"] + j) for i in range(grid["w"]) for j in range(grid["h"])}
        assert not own & cells
        assert max(x for x, _ in own) < 24
        cells |= own


def test_grafana_is_given_the_dashboard_and_its_source() -> None:
    (source,) = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    used = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert used | {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read("grafana/provisioning/dashboards/setpoint.yml")["providers"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    assert (DEPLOY / mounted[provider["options"]["path"]] / "setpoint.json").is_file()
    assert (DEPLOY / mounted["/etc/grafana/provisioning"] / "datasources").is_dir()


# -- compose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_is_started_with_flags_that_exist(name: str) -> None:
    service = SERVICES[name]
    command = service["command"]
    assert command[0] == "serve"
    assert {part for part in command if part.startswith("--")} <= FLAGS
    assert {key for key in service["environment"] if key.startswith(ENV_PREFIX)} <= VARIABLES
    assert command[command.index("--store") + 1] in {volume.split(":")[1] for volume in service["volumes"]}
    assert seconds(service["stop_grace_period"]) > float(command[command.index("--drain-seconds") + 1]) + 5


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_checked_and_for_this_machine_alone(name: str) -> None:
    service = SERVICES[name]
    image = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"])
    assert re.search(r":v?\d+\.\d+\.\d+$", image), image
    assert service["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["cap_drop"] == ["ALL"]
    for volume in service["volumes"]:
        if volume.startswith("./"):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume


def test_keys_come_from_outside() -> None:
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (DEPLOY / "env.example").read_text("utf-8"), flags=re.MULTILINE))
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    asked = re.findall(r"\$\{(\w+)(:\?)?", text)
    for variable, is_required in asked:
        if is_required:
            assert example[variable] == "", variable  # named in the example, and empty there
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|TOKEN|SECRET", key):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), key
    assert ".env" in (DEPLOY / ".gitignore").read_text(encoding="utf-8").split()


def test_a_gpu_is_reserved_under_its_profile_alone() -> None:
    cpu, gpu = (dict(SERVICES[name]) for name in SERVERS)
    assert (cpu.pop("profiles"), gpu.pop("profiles")) == (["cpu"], ["gpu"])
    (device,) = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert cpu == gpu


def test_prometheus_finds_the_server_and_the_key() -> None:
    (job,) = (job for job in read("prometheus.yml")["scrape_configs"] if job["job_name"] == "setpoint")
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    for name in SERVERS:
        command = SERVICES[name]["command"]
        assert host in SERVICES[name]["networks"]["default"]["aliases"]
        assert port == command[command.index("--port") + 1]
    (secret,) = SERVICES["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert COMPOSE["secrets"][secret] == {"environment": "SETPOINT_API_KEY"}
    # Compose copies such a secret into the container, which a read-only one refuses.
    assert not SERVICES["prometheus"].get("read_only")


# -- systemd ----------------------------------------------------------------------------------------------------------


def test_the_unit_starts_the_server_with_flags_that_exist_and_lets_it_drain() -> None:
    (command,) = re.findall(r"^ExecStart=\S+/setpoint serve (.*)$", UNIT, flags=re.MULTILINE)
    parts = command.split()
    assert {part for part in parts if part.startswith("--")} <= FLAGS
    assert set(re.findall(rf"\b({ENV_PREFIX}\w+)=", UNIT)) <= VARIABLES
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, flags=re.MULTILINE)
    assert float(patience) > float(parts[parts.index("--drain-seconds") + 1]) + 5
    assert "\nMemoryDenyWriteExecute" not in UNIT  # numba and Triton compile at run time


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: the unit is not verified")
    program = shutil.which("true")
    assert program is not None
    unit = tmp_path / "setpoint.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={program}", UNIT, flags=re.MULTILINE), encoding="utf-8")
    done = checked(analyze, "verify", "--man=no", unit)
    assert done.returncode == 0, done.stderr
    # What is misspelt is told and passed over: it has to be told of this unit, not of the machine's others.
    assert "setpoint.service" not in done.stderr, done.stderr
