"""A real server on a free port over a tiny random model, with concepts fitted on it, and some that must be refused."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import uvicorn

from server.app import create_app
from server.host import Host
from server.settings import ServerSettings
from steering import Engine, EngineSettings, FitSettings, Plant, Store, fit_concept
from steering.folder import Folder
from tests.plants import tiny, tiny_tokenizer

CONTEXT = 4096
"""Long enough that a generation outlasts whatever a test does to it."""
FOREIGN = f"sha256:{'0' * 64}"


def tiny_plant() -> Plant:
    """A tiny Llama with a long context."""
    model = tiny("llama")
    model.config.max_position_embeddings = CONTEXT
    return Plant(model, tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="session")
def plant() -> Plant:
    return tiny_plant()


@pytest.fixture(scope="session")
def folder(plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store: two good concepts, one of another model, one damaged file."""
    path = tmp_path_factory.mktemp("store")
    store = Store(path)
    settings = FitSettings(jacobian_prompts=2, skip=1)
    positive = ["the cat is good and happy", "we love the big dog", "they like the nice bird", "a happy day in the sun"]
    negative = ["the cat is bad and sad", "we hate the big dog", "they hate the rude bird", "a sad day in the night"]
    good = fit_concept(plant, "happy", positive, negative, settings)
    store.save(good.artifact())
    animals = fit_concept(plant, "animal", [f"{a} dog" for a in positive], [f"{a} tree" for a in positive], settings)
    store.save(animals.artifact())
    store.save(replace(good, name="foreign", model=FOREIGN).artifact())
    whole = store.save(replace(good, name="broken").artifact())
    raw = bytearray(whole.read_bytes())
    raw[-3] ^= 0xFF
    whole.write_bytes(raw)
    return path


@contextmanager
def serving(
    plant: Plant, folder: Path | Folder, settings: ServerSettings, builtin: Path | None = None, **sizes: int
) -> Iterator[str]:
    """A running server's address."""
    engine = Engine(plant, EngineSettings(**{"max_batch": 8, **sizes}))
    engine.start()
    host = Host(plant, engine, Store(folder, builtin), "tiny")
    app = create_app(settings, host)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def address(plant: Plant, folder: Path) -> Iterator[str]:
    """The session's server."""
    with serving(plant, folder, ServerSettings(body_limit=100_000)) as running:
        yield running


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as http:
        yield http


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, as a user would name it."""
    path = tmp_path_factory.mktemp("models") / "tiny-on-disk"
    model = tiny("llama")
    model.config.max_position_embeddings = CONTEXT
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
