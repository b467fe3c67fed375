"""What the image, the manifests and the chart say of the server is so: flags, variables, addresses, port and user."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from server.access import HEALTH
from server.app import create_app
from server.cli import app
from server.metrics import Metrics
from server.settings import ServerSettings
from steering import SpecError, __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
DOCKERFILE = [line for line in LINES if line and not line.startswith("#")]
CHART = ROOT / "deploy" / "helm" / "setpoint"
MANIFESTS = ROOT / "deploy" / "k8s"
TEMPLATE = (CHART / "templates" / "deployment.yaml").read_text(encoding="utf-8")
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
DEPLOYED = [*sorted(MANIFESTS.rglob("*.*")), *sorted(CHART.rglob("*.*"))]


def said(instruction: str) -> list[str]:
    """The arguments of every such instruction of the image's last stage, or before the first."""
    last = max(n for n, line in enumerate(DOCKERFILE) if line.startswith("FROM "))
    return [line.split(maxsplit=1)[1] for line in DOCKERFILE[last:] if line.split()[0] == instruction]


ENV = dict(pair.split("=", 1) for line in said("ENV") for pair in shlex.split(line))
COMMAND = json.loads(said("ENTRYPOINT")[0]) + json.loads(said("CMD")[0])
HEALTHCHECK = json.loads(said("HEALTHCHECK")[0].split("CMD ")[1])


def manifest(path: str) -> dict[str, Any]:
    """One object."""
    loaded: dict[str, Any] = yaml.safe_load((MANIFESTS / path).read_text(encoding="utf-8"))
    return loaded


DEPLOYMENT = manifest("base/deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
VARIABLES = {one["name"]: one.get("value") for one in CONTAINER["env"]}


def options() -> tuple[set[str], set[str]]:
    """The flags and the variables of `setpoint serve`."""
    root = typer.main.get_command(app)
    parameters = root.commands["serve"].params  # type: ignore[attr-defined]
    flags = {flag for one in parameters for flag in (*one.opts, *one.secondary_opts)}
    return flags, {str(one.envvar) for one in parameters if one.envvar}


def test_every_flag_and_variable_is_one_of_the_server() -> None:
    flags, variables = options()
    for command in (COMMAND, ["setpoint", *CONTAINER["args"]]):
        assert command[:2] == ["setpoint", "serve"]
        assert {word for word in command if word.startswith("-")} <= flags
    texts = [*LINES, *(path.read_text(encoding="utf-8") for path in DEPLOYED)]
    used = {name for text in texts for name in re.findall(r"\bSETPOINT_[A-Z_]+\b", text)}
    assert {"SETPOINT_API_KEY", "SETPOINT_STORE", "SETPOINT_DEVICE", "SETPOINT_DRAIN_SECONDS"} <= used
    assert used <= variables


def test_it_does_not_start_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SETPOINT_")]:
        monkeypatch.delenv(name)
    done = CliRunner().invoke(app, COMMAND[1:], env={k: v for k, v in ENV.items() if k.startswith("SETPOINT_")})
    assert done.exit_code != 0
    assert "API key" in done.output
    with pytest.raises(SpecError, match="API key"):
        ServerSettings(host=COMMAND[COMMAND.index("--host") + 1])
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in CONTAINER["env"] if "KEY" in one["name"]}
    assert set(secrets) == {"SETPOINT_API_KEY", "SETPOINT_ADMIN_KEY"}
    assert VALUES["keys"] == {
        "secret": secrets["SETPOINT_API_KEY"]["name"],
        "apiKey": secrets["SETPOINT_API_KEY"]["key"],
        "adminKey": secrets["SETPOINT_ADMIN_KEY"]["key"],
    }


def test_a_services_variables_are_kept_out() -> None:
    """A service named setpoint would set SETPOINT_PORT to an address, and the server would not start."""
    assert POD["enableServiceLinks"] is False
    assert "enableServiceLinks: false" in TEMPLATE
    done = CliRunner().invoke(app, ["serve"], env={"SETPOINT_PORT": "tcp://10.0.0.1:8000"})
    assert done.exit_code == 2


def test_nobody_is_root() -> None:
    user = said("USER")[-1].split(":")
    assert len(user) == 2
    assert all(one.isdecimal() and int(one) > 0 for one in user)
    expected = {"runAsNonRoot": True, "runAsUser": int(user[0]), "runAsGroup": int(user[1]), "fsGroup": int(user[1])}
    assert expected.items() <= POD["securityContext"].items()
    for name, value in expected.items():
        assert f"{name}: {json.dumps(value)}\n" in TEMPLATE
    assert any(f"--uid {user[0]} --gid {user[1]}" in line for line in said("RUN"))


def test_no_image_is_of_a_tag_that_moves() -> None:
    named = [line.split("=", 1)[1] for line in DOCKERFILE if line.startswith("ARG BASE_IMAGE=")]
    stages = {line.split()[3] for line in DOCKERFILE if line.startswith("FROM ")}
    used = [line.split()[1] for line in DOCKERFILE if line.startswith("FROM ")]
    named += [one for one in used if one not in stages and one != "${BASE_IMAGE}"] + [CONTAINER["image"]]
    assert len(named) == 2
    for image in named:
        assert re.fullmatch(r"[\w./-]+(:\d[\w.-]*)(@sha256:[0-9a-f]{64})?", image)
    for path in DEPLOYED:
        assert not re.search(r":latest\b|\btag:\s*\"?latest", path.read_text(encoding="utf-8")), path


def test_the_version_is_the_projects() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    tags = {one["name"]: one["newTag"] for one in manifest("base/kustomization.yaml")["images"]}
    assert PROJECT["project"]["version"] == __version__
    assert f"VERSION={__version__}" in said("ARG")
    assert (chart["version"], chart["appVersion"], tags) == (__version__, __version__, {"setpoint": __version__})
    assert CONTAINER["image"] == f"setpoint:{__version__}"


def test_probes_ask_open_routes_that_there_are() -> None:
    paths = set(create_app(ServerSettings(), loads=False).openapi()["paths"])
    probes = {name: CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["path"] for probe in probes.values()} <= paths & HEALTH
    assert probes["livenessProbe"]["path"] == "/health/live"  # the others answer 503 while loading and draining
    assert probes["startupProbe"]["path"] == probes["readinessProbe"]["path"] == "/health/ready"
    assert all(probe["port"] == CONTAINER["ports"][0]["name"] for probe in probes.values())
    assert "/metrics" in paths
    assert "path: /metrics" in (CHART / "templates" / "monitor.yaml").read_text(encoding="utf-8")


def test_all_name_one_port() -> None:
    port = ServerSettings().port
    assert said("EXPOSE") == [str(port)]
    assert ENV["SETPOINT_PORT"] == str(port)
    assert CONTAINER["args"][-2:] == ["--port", str(port)]
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": port}]
    assert manifest("base/service.yaml")["spec"]["ports"] == [{"name": "http", "port": port, "targetPort": "http"}]
    assert VALUES["service"]["port"] == port
    assert f"containerPort: {port}\n" in TEMPLATE


def test_what_is_written_is_on_a_volume() -> None:
    """The root file system is read-only: the store, the caches, HOME and /tmp are mounts, and all are mounted."""
    mounts = {one["mountPath"]: one["name"] for one in CONTAINER["volumeMounts"]}
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert set(mounts) == {*json.loads(said("VOLUME")[0]), "/tmp", "/dev/shm"}
    assert set(mounts.values()) == {one["name"] for one in POD["volumes"]}
    assert ENV["SETPOINT_STORE"] == VARIABLES["SETPOINT_STORE"] == "/data"
    for name in ("HOME", "HF_HOME", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert (ENV[name] + "/").startswith("/cache/"), name


def test_the_chart_says_what_the_manifests_say() -> None:
    """Lines that hold no value of the chart's and stand in the base's deployment stand in the chart's, too."""
    theirs = {line.strip() for line in TEMPLATE.splitlines()}
    ours = [line.strip() for line in (MANIFESTS / "base/deployment.yaml").read_text(encoding="utf-8").splitlines()]
    of_interest = re.compile(r"httpGet|Seconds: \d+$|mountPath|args:|drop:|Privilege|readOnly|runAs|fsGroup|resourceF")
    lines = [line for line in ours if of_interest.search(line) and not line.startswith("terminationGrace")]
    assert len(lines) > 15
    assert set(lines) <= theirs
    assert VALUES["resources"] == CONTAINER["resources"]
    assert (VALUES["autoscaling"]["waiting"], VALUES["autoscaling"]["running"]) == wanted_means()
    assert str(VALUES["drainSeconds"]) == VARIABLES["SETPOINT_DRAIN_SECONDS"]


def wanted_means() -> tuple[str, str]:
    """The means above which the autoscaler adds replicas: waiting and running."""
    wanted = manifest("autoscaling/autoscaler.yaml")["spec"]["metrics"]
    means = {one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"] for one in wanted}
    return means["setpoint_num_requests_waiting"], means["setpoint_num_requests_running"]


def test_the_autoscaler_asks_for_metrics_that_there_are() -> None:
    exposition = Metrics(lambda: None).exposition("")[0].decode()
    gauges = set(re.findall(r"^# TYPE (\w+) gauge$", exposition, flags=re.MULTILINE))
    wanted = {one["pods"]["metric"]["name"] for one in manifest("autoscaling/autoscaler.yaml")["spec"]["metrics"]}
    assert wanted <= gauges
    rule = manifest("autoscaling/prometheus-adapter-values.yaml")["rules"]["custom"][0]
    pattern = rule["seriesQuery"].split('"')[1]
    assert all(re.fullmatch(pattern, name) for name in wanted)
    assert int(wanted_means()[1]) < ServerSettings().max_batch  # more never run, and it would never be reached


def test_a_pod_has_the_time_to_drain() -> None:
    leave = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(VARIABLES["SETPOINT_DRAIN_SECONDS"])
    assert POD["terminationGracePeriodSeconds"] >= leave + drain + 10
    assert leave == VALUES["leaveSeconds"]


def test_a_disruption_budget_lets_a_node_be_drained() -> None:
    assert manifest("base/disruption.yaml")["spec"]["maxUnavailable"] == 1


def test_selectors_find_the_pods() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
    network, disruption = manifest("base/network.yaml")["spec"], manifest("base/disruption.yaml")["spec"]
    for selector in (
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        manifest("base/service.yaml")["spec"]["selector"],
        disruption["selector"]["matchLabels"],
        network["podSelector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels
    claim = next(one for one in POD["volumes"] if one["name"] == "store")["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("base/store.yaml")["metadata"]["name"]


def test_settings_of_the_chart_do_not_repeat_what_it_sets_itself() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    settings = schema["properties"]["settings"]["propertyNames"]
    own = set(re.findall(r"- name: (SETPOINT_\w+)", TEMPLATE)) - {"SETPOINT_DEVICE"}
    assert set(settings["not"]["enum"]) == own | {"SETPOINT_HOST", "SETPOINT_PORT"}
    assert all(re.fullmatch(settings["pattern"], name) for name in options()[1])


def test_every_value_is_described_and_has_a_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))["properties"]
    templates = "".join(path.read_text(encoding="utf-8") for path in (CHART / "templates").iterdir())
    assert set(VALUES) == set(schema) - {"global"}
    for name, value in VALUES.items():
        fields = schema[name].get("properties") if isinstance(value, dict) else None
        assert fields is None or set(fields) == set(value), name
        for path in [f"{name}.{field}" for field in fields or ()] or [name]:
            assert f".Values.{path}" in templates, path


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {
        source
        for line in DOCKERFILE
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    for pattern in packages:
        assert any(fnmatch(source, pattern) for source in copied), pattern
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"} <= copied


class _Health(BaseHTTPRequestHandler):
    """Answers as the server's health check would, with a status that the test sets."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health/ready" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    """A server of one address."""
    served = HTTPServer(("127.0.0.1", 0), _Health)
    Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_the_health_check_tells_ready_from_not(
    status: int, is_healthy: bool, health: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Health, "status", status)
    assert HEALTHCHECK[0] == "python"
    environment = os.environ | {"SETPOINT_PORT": str(health.server_port)}
    done = subprocess.run([sys.executable, *HEALTHCHECK[1:]], env=environment, capture_output=True, check=False)
    assert (done.returncode == 0) is is_healthy
