"""The image, built by buildah and started as Kubernetes starts it: as its user, with a read-only root file system.

It takes minutes and gigabytes, root's rights, and a base image that buildah has: SETPOINT_TEST_BASE names it, and the
tests are skipped without. Any Debian or Ubuntu serves, also one that debootstrap made:

    debootstrap --variant=minbase bookworm rootfs
    c=$(buildah from scratch) && buildah add $c rootfs / && buildah commit --rm $c localhost/debian-base:bookworm

SETPOINT_TEST_BUILDAH is the command with its options (`buildah --root DIR`; where there is no overlay,
STORAGE_DRIVER=vfs), SETPOINT_TEST_BUILD holds further arguments of the build: an index of torch for a CPU, a
certificate of a proxy.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
BASE = os.environ.get("SETPOINT_TEST_BASE")
BUILDAH = shlex.split(os.environ.get("SETPOINT_TEST_BUILDAH", "buildah"))
PORT = "18017"
KEY = "a-key-of-the-test"

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(BASE is None, reason="SETPOINT_TEST_BASE names no base image of buildah's to build from"),
    pytest.mark.skipif(shutil.which(BUILDAH[0]) is None, reason="buildah is not installed"),
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting an image's root needs root's rights"),
]

START = """
mount --bind "$IMAGE_ROOT" "$IMAGE_ROOT" && mount -o remount,ro,bind "$IMAGE_ROOT" || exit 99
mount -t tmpfs -o noexec,mode=1777 none "$IMAGE_ROOT/tmp"
for folder in data cache; do mount -t tmpfs -o mode=755,uid=10001,gid=10001 none "$IMAGE_ROOT/$folder"; done
mount -t proc none "$IMAGE_ROOT/proc" && mount --rbind /dev "$IMAGE_ROOT/dev" || exit 99
exec chroot --userspec=10001:10001 "$IMAGE_ROOT" env -i "$@"
"""


def buildah(*arguments: str | Path) -> str:
    """What buildah prints."""
    environment = {"BUILDAH_ISOLATION": "chroot", **os.environ}
    done = subprocess.run([*BUILDAH, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    """The image's name, built from this tree."""
    name = "localhost/setpoint:test"
    further = shlex.split(os.environ.get("SETPOINT_TEST_BUILD", ""))
    build = ["build", "--format", "docker", "--layers", "--build-arg", f"BASE_IMAGE={BASE}", *further]
    buildah(*build, "--tag", name, ROOT)
    return name


@pytest.fixture(scope="module")
def config(image: str) -> dict[str, Any]:
    """What the image says of itself."""
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    return found


@pytest.fixture(scope="module")
def root(image: str) -> Iterator[Path]:
    """The image's file system."""
    container = buildah("from", image)
    yield Path(buildah("mount", container))
    buildah("umount", container)
    buildah("rm", container)


def started(root: Path, config: dict[str, Any], command: list[str], **variables: str) -> subprocess.Popen[str]:
    """A process of the image in namespaces of its own, with the image's environment and these variables."""
    given = [*config["Env"], "OMP_NUM_THREADS=1", *(f"{name}={value}" for name, value in variables.items())]
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", START, "sh"]
    return subprocess.Popen(
        [*unshare, *given, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"IMAGE_ROOT": str(root)},
    )


@pytest.fixture(scope="module")
def server(root: Path, config: dict[str, Any]) -> Iterator[httpx.Client]:
    """A client of the image's server, with the key; the server ends with 0 when it is told to."""
    command = [*config["Entrypoint"], *config["Cmd"]]
    process = started(root, config, command, SETPOINT_PORT=PORT, SETPOINT_API_KEY=KEY)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready "):
                break
        else:
            pytest.fail("".join(said))
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", headers=headers, timeout=120) as client:
            yield client
        inner = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(inner[0]), signal.SIGTERM)
        assert process.wait(timeout=45) == 0
    finally:
        process.kill()


def test_it_says_who_it_is(config: dict[str, Any]) -> None:
    assert config["User"] == "10001:10001"
    assert set(config["ExposedPorts"]) == {"8000/tcp"}
    assert set(config["Volumes"]) == {"/data", "/cache"}
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python"]


def test_it_holds_neither_tests_nor_git(root: Path) -> None:
    assert not list(root.glob("src"))
    assert not list(root.glob("project"))
    installed = next(root.glob("opt/setpoint/lib/python3*/site-packages"))
    assert {"kernels", "steering", "server"} <= {path.name for path in installed.iterdir()}
    assert not (installed / "tests").exists()
    assert (root / "usr/bin/gcc").exists()
    assert list(root.glob("usr/include/python3*/Python.h"))


def test_without_a_key_it_does_not_start(root: Path, config: dict[str, Any]) -> None:
    process = started(root, config, [*config["Entrypoint"], *config["Cmd"]], SETPOINT_PORT=PORT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, 99)
    assert "API key" in said


def test_it_serves_steered_and_to_holders_of_the_key_alone(server: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me about the park."}], "max_tokens": 12, "seed": 7}
    body["steering"] = {"targets": {"positive": 2}}
    answer = server.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["tokens_steered"] > 0
    assert httpx.post(f"{server.base_url}/v1/chat/completions", json=body).status_code == 401


def test_its_health_check_passes(server: httpx.Client, root: Path, config: dict[str, Any]) -> None:
    check = started(root, config, config["Healthcheck"]["Test"][1:], SETPOINT_PORT=PORT)
    said, _ = check.communicate(timeout=30)
    assert check.returncode == 0, said


def test_a_concept_can_be_fitted_and_kept(server: httpx.Client) -> None:
    """The store can be written to."""
    examples = {"positive": ["A lovely day.", "A charming garden."], "negative": ["A dull day.", "A dreary garden."]}
    job = server.post("/v1/steering/fit", json={"name": "sunny", **examples}).json()["job"]
    until = time.monotonic() + 120
    while (state := server.get(f"/v1/steering/jobs/{job}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < until
        time.sleep(0.5)
    assert state["state"] == "succeeded", state


def test_a_c_compiler_and_the_headers_make_what_is_loaded_from_the_cache(root: Path, config: dict[str, Any]) -> None:
    """What Triton does for a launcher: compile in /tmp, which may be noexec, load from its cache."""
    program = (
        "import os, pathlib, subprocess, sysconfig, importlib.util as u\n"
        "pathlib.Path('/tmp/one.c').write_text('#include <Python.h>\\nstatic struct PyModuleDef m = {"
        'PyModuleDef_HEAD_INIT, \\"one\\"};\\nPyMODINIT_FUNC PyInit_one(void) { return PyModule_Create(&m); }\')\n'
        "folder = pathlib.Path(os.environ['TRITON_CACHE_DIR']); folder.mkdir()\n"
        "subprocess.run(['gcc', '-shared', '-fPIC', '-I' + sysconfig.get_path('include'), '/tmp/one.c', '-o', "
        "str(folder / 'one.so')], check=True)\n"
        "u.module_from_spec(u.spec_from_file_location('one', folder / 'one.so'))\n"
        "print('loaded', os.getuid())\n"
    )
    process = started(root, config, ["python", "-c", program])
    said, _ = process.communicate(timeout=60)
    assert said.splitlines()[-1] == "loaded 10001", said


def test_nothing_else_can_be_written(root: Path, config: dict[str, Any]) -> None:
    program = "import pathlib; pathlib.Path('/opt/setpoint/x').touch()"
    process = started(root, config, ["python", "-c", program])
    said, _ = process.communicate(timeout=60)
    assert "Read-only file system" in said
