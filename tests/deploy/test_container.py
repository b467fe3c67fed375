"""The image, built by buildah and started as Kubernetes starts it: as its user, with a read-only root file system.

It takes minutes, gigabytes and root's rights: `make deploy-test` asks for it with SETPOINT_TEST_IMAGE=1, and without
that the tests are skipped. It is built upon a Debian that debootstrap makes, or upon the base image of buildah's that
SETPOINT_TEST_BASE names. Base, layers and image stay in buildah's storage, where the next build finds them.

What pip is told by variables here (an index, a folder of wheels, a proxy's certificate) it is told in the build, too.
Where they name neither a further index nor wheels, torch is taken from the index of its builds for a CPU.
SETPOINT_TEST_BUILDAH is the command with its options (`buildah --root DIR`; where there is no overlay,
STORAGE_DRIVER=vfs), SETPOINT_TEST_BUILD holds further arguments of the build.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
IS_ASKED = os.environ.get("SETPOINT_TEST_IMAGE", "") not in ("", "0")
BASE = os.environ.get("SETPOINT_TEST_BASE")
OWN_BASE = "localhost/setpoint-base:bookworm"
BUILDAH = shlex.split(os.environ.get("SETPOINT_TEST_BUILDAH", "buildah"))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PORT = "18017"
KEY = "a-key-of-the-test"
LARGEST = 3.5e9
"""Bytes of the image for a CPU, 2.9e9 when this was written: what is far beyond has taken in what it does not need."""
SLOWEST = 240.0
"""Seconds to readiness with the embedded model: 20 on two busy cores, 60 where ten processes want each of them."""

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not IS_ASKED, reason="the image is built where SETPOINT_TEST_IMAGE=1 asks for it"),
    pytest.mark.skipif(shutil.which(BUILDAH[0]) is None, reason="buildah is not installed (apt-get install buildah)"),
    pytest.mark.skipif(
        BASE is None and shutil.which("debootstrap") is None,
        reason="there is no base image: neither debootstrap (apt-get install debootstrap) nor SETPOINT_TEST_BASE",
    ),
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


def told_to_pip() -> list[str]:
    """Arguments of the build that give its pip what this one's variables say; files that they name are mounted."""
    given = {name: os.environ.get(f"PIP_{name}", "") for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "CERT")}
    if not given["EXTRA_INDEX_URL"] and not given["FIND_LINKS"]:
        given["EXTRA_INDEX_URL"] = CPU_INDEX
    arguments = []
    for name, value in given.items():
        words = value.split()
        for i, word in enumerate(words):
            if Path(word).is_absolute():
                words[i] = f"/host{word}"  # at its own place it might be in the way of what the build writes
                arguments += ["--volume", f"{word}:{words[i]}:ro"]
        arguments += ["--build-arg", f"PIP_{name}={' '.join(words)}"] if words else []
    return arguments


@pytest.fixture(scope="module")
def base() -> str:
    """A base image: the one that is named, or a small Debian, made once."""
    if BASE is not None:
        return BASE
    if not json.loads(buildah("images", "--json", "--filter", f"reference={OWN_BASE}") or "[]"):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # its devices and owners: not on a tmpfs with nodev
            debian = Path(folder) / "root"
            done = subprocess.run(
                ["debootstrap", "--variant=minbase", "bookworm", debian], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            container = buildah("from", "scratch")
            buildah("add", "--quiet", container, debian, "/")
            buildah("commit", "--quiet", "--rm", container, OWN_BASE)
    return OWN_BASE


@pytest.fixture(scope="module")
def image(base: str) -> str:
    """The image's name, built from this tree."""
    name = "localhost/setpoint:test"
    further = [*told_to_pip(), *shlex.split(os.environ.get("SETPOINT_TEST_BUILD", ""))]
    build = ["build", "--format", "docker", "--layers", "--build-arg", f"BASE_IMAGE={base}", *further]
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


@contextmanager
def started(
    root: Path, config: dict[str, Any], command: list[str], **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """A process of the image in namespaces of its own, with the image's environment and these variables."""
    given = [*config["Env"], "OMP_NUM_THREADS=1", *(f"{name}={value}" for name, value in variables.items())]
    unshare = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", START, "sh"]
    process = subprocess.Popen(
        [*unshare, *given, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"IMAGE_ROOT": str(root)},
    )
    try:
        yield process
    finally:
        # Not by `unshare --kill-child`: with its change of user the process is let off that.
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(first(process), signal.SIGKILL)
        process.kill()
        process.wait()


def first(process: subprocess.Popen[str]) -> int:
    """The number of the process that is the first one inside; with it end all of its namespace.

    Raises FileNotFoundError where it has ended.
    """
    if process.poll() is None:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            return int(child)
    raise FileNotFoundError


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    """What took how long."""
    return {}


@pytest.fixture(scope="module")
def server(root: Path, config: dict[str, Any], seconds: dict[str, float]) -> Iterator[httpx.Client]:
    """A client of the image's server, with the key; the server ends with 0 when it is told to."""
    command = [*config["Entrypoint"], *config["Cmd"]]
    began = time.monotonic()
    with started(root, config, command, SETPOINT_PORT=PORT, SETPOINT_API_KEY=KEY) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready "):
                break
        else:
            pytest.fail("".join(said))
        seconds["ready"] = time.monotonic() - began
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", headers=headers, timeout=120) as client:
            yield client
        os.kill(first(process), signal.SIGTERM)
        assert process.wait(timeout=45) == 0


def test_it_says_who_it_is(config: dict[str, Any]) -> None:
    assert config["User"] == "10001:10001"
    assert set(config["ExposedPorts"]) == {"8000/tcp"}
    assert set(config["Volumes"]) == {"/data", "/cache"}
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python"]


def test_it_is_no_larger_and_no_slower_than_it_has_to_be(
    image: str, server: httpx.Client, seconds: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads(json.loads(buildah("inspect", "--type", "image", image))["Manifest"])
    size = sum(layer["size"] for layer in manifest["layers"])  # as they are stored here: not compressed
    with capsys.disabled():
        print(f"\n{image}: {size / 1e9:.2f} GB, ready after {seconds['ready']:.0f} s with caches that are empty")
    assert 1e9 < size < LARGEST
    assert seconds["ready"] < SLOWEST
    assert server.get("/health/ready").status_code == 200


def test_it_holds_neither_tests_nor_git(root: Path) -> None:
    assert not list(root.glob("src"))
    assert not list(root.glob("project"))
    installed = next(root.glob("opt/setpoint/lib/python3*/site-packages"))
    assert {"kernels", "steering", "server"} <= {path.name for path in installed.iterdir()}
    assert not (installed / "tests").exists()
    assert (root / "usr/bin/gcc").exists()
    assert list(root.glob("usr/include/python3*/Python.h"))


def test_without_a_key_it_does_not_start(root: Path, config: dict[str, Any]) -> None:
    with started(root, config, [*config["Entrypoint"], *config["Cmd"]], SETPOINT_PORT=PORT) as process:
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
    with started(root, config, config["Healthcheck"]["Test"][1:], SETPOINT_PORT=PORT) as check:
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
    with started(root, config, ["python", "-c", program]) as process:
        said, _ = process.communicate(timeout=60)
    assert said.splitlines()[-1] == "loaded 10001", said


def test_nothing_else_can_be_written(root: Path, config: dict[str, Any]) -> None:
    program = "import pathlib; pathlib.Path('/opt/setpoint/x').touch()"
    with started(root, config, ["python", "-c", program]) as process:
        said, _ = process.communicate(timeout=60)
    assert "Read-only file system" in said
