"""The README's blocks run, and what it lists is what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steering import REGISTRY, summary

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMAND = str(Path(sys.executable).parent / "setpoint")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server of the embedded model on a free port."""
    environment = os.environ | {"SETPOINT_STORE": str(tmp_path_factory.mktemp("store"))}
    server = subprocess.Popen(
        [COMMAND, "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert server.stdout is not None
    ready = next(line for line in server.stdout if line.startswith("ready "))
    try:
        yield ready.split()[1]
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0


def test_every_block_is_of_a_kind_that_runs() -> None:
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}
    assert len(BLOCKS) >= 5


def test_make_run_serves() -> None:
    assert ("bash", "make run\n") in BLOCKS
    recipe = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "setpoint serve" in recipe


@pytest.mark.parametrize(("kind", "block"), [b for b in BLOCKS if b[1] != "make run\n"])
def test_a_block_runs(kind: str, block: str, url: str, tmp_path: Path) -> None:
    text = block.replace("http://127.0.0.1:8000", url).replace(".venv/bin/setpoint", COMMAND)
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
    environment = os.environ | {"SETPOINT_STORE": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "curl" in block:
        answer = json.loads(done.stdout)
        assert answer["choices"][0]["message"]["content"].strip()
        assert answer["steering"]["tokens_steered"] > 0
        assert all(tracking["mean"] is not None for tracking in answer["steering"]["tracking"].values())


def test_the_table_of_methods_is_the_registry() -> None:
    table = README.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip().splitlines()
    assert table[:2] == ["| type | what it does |", "|---|---|"]
    assert table[2:] == [f"| `{name}` | {summary(REGISTRY[name])} |" for name in sorted(REGISTRY)]


def test_every_number_has_its_command() -> None:
    """Results stand under a heading that names the command which makes them again, and the file that holds them."""
    results = README.split("## Measured")[1].split("\n## ")[0]
    assert "setpoint eval" in results
    for path in re.findall(r"`(benchmarks/\S+?\.(?:json|md|py|png))`", results):
        assert (ROOT / path).is_file(), path
