"""The shared store on Google's own protocol: an emulator on this machine, through gcsfs.

Needs `pip install 'setpoint[gcs]' gcp-storage-emulator`; skipped without.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from steering import mirror
from steering.errors import StoreUnreachable
from steering.mirror import Mirror, opened
from steering.store import Store
from tests.test_mirror import later, names, tone

pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install 'setpoint[gcs]'")
emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="its emulator is not installed: pip install gcp-storage-emulator"
)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder of a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(mirror, "FRESH", 0.3)
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield "gs://bucket/some/prefix"
    server.stop()


def test_two_replicas_over_one_bucket(bucket: str, tmp_path: Path) -> None:
    one, two = (Store(opened(bucket, tmp_path / name)) for name in ("one", "two"))
    assert names(one) == names(two) == []
    one.save(tone("mine"))
    assert two.load("mine").body["quality"] == {"auroc": [0.5]}
    one.save(tone("mine", 0.75))
    later()
    assert two.load("mine").body["quality"] == {"auroc": [0.75]}
    with one.place.replacing("presets/agent.json") as written:
        written.write_text("{}")
    later()
    two.entries()
    assert (two.folder / "presets" / "agent.json").read_text() == "{}"
    assert isinstance(one.place, Mirror)
    remote = one.place._remote
    for key, version in remote.listing().items():
        assert remote.ask(key) == version
    two.remove("mine")
    later()
    assert names(one) == []
    assert remote.ask("mine.safetensors") is None
    with pytest.raises(StoreUnreachable):
        Store(opened("gs://nowhere/x", tmp_path)).entries()
