"""The shared store on S3's own protocol: a server of moto's on this machine, through s3fs, and through the real server.

Needs `pip install 'setpoint[s3]' 'moto[server]'`; skipped without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steering import mirror
from steering.errors import ArtifactNotFound, SpecError, StoreUnreachable, StoreUnwritable
from steering.mirror import opened
from steering.store import Store
from tests.test_mirror import later, names, shelf, tone, until

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'setpoint[s3]'")
moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
URL = "s3://bucket/some/prefix"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    found = moto.ThreadedMotoServer(port=0)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def bucket(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the server, whose bucket is empty, and the environment that a server's administrator sets."""
    import botocore.session

    host, port = server.get_host_and_port()
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in (("FRESH", 0.2), ("RETRY", 0.4), ("PATIENCE", 2.0)):
        monkeypatch.setattr(mirror, name, value)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    for one in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=one["Key"])


def replica(folder: Path) -> Store:
    return Store(opened(URL, folder))


def test_two_replicas_over_one_bucket(bucket: Any, tmp_path: Path) -> None:
    one, two = replica(tmp_path / "one"), replica(tmp_path / "two")
    assert names(one) == names(two) == []
    one.save(tone("mine"))
    held = shelf(two)
    assert held.concept("mine").quality == {"auroc": [0.5]}
    for index in range(3):
        one.save(tone("mine", index / 8))  # three within one tick of S3's clock
        later()
        assert held.concept("mine").quality == {"auroc": [index / 8]}
    with one.place.replacing("presets/agent.json") as written:
        written.write_text("{}")
    later()
    two.entries()
    assert (two.folder / "presets" / "agent.json").read_text() == "{}"
    keys = [found["Key"] for found in bucket.list_objects_v2(Bucket="bucket")["Contents"]]
    assert keys == ["some/prefix/mine.safetensors", "some/prefix/presets/agent.json"]
    two.remove("mine")
    later()
    with pytest.raises(ArtifactNotFound):
        one.load("mine")
    assert not two.place.remove("mine.safetensors")


def test_what_another_program_put_there_is_read_and_its_neighbours_are_not(bucket: Any, tmp_path: Path) -> None:
    raw = tone("mine").save(tmp_path).read_bytes()
    for key in ("some/prefix/mine.safetensors", "some/prefix2/other.safetensors", "some/prefix/No.safetensors"):
        bucket.put_object(Bucket="bucket", Key=key, Body=raw)
    store = replica(tmp_path / "one")
    assert names(store) == ["mine"]
    stat = (store.folder / "mine.safetensors").stat()
    head = bucket.head_object(Bucket="bucket", Key="some/prefix/mine.safetensors")
    assert int(stat.st_mtime) == int(head["LastModified"].timestamp())


def test_asking_and_listing_give_one_version(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.remote.WHOLE", 2**10)
    store = replica(tmp_path / "one")
    store.save(tone("mine"))
    big = replace(tone("big"), body={**tone("big").body, "provenance": {"data": "x" * 2**12}})
    store.save(big)
    assert isinstance(store.place, mirror.Mirror)
    remote = store.place._remote
    listed = remote.listing()
    assert set(listed) == {"mine.safetensors", "big.safetensors"}
    for key, version in listed.items():
        assert remote.ask(key) == version
    assert replica(tmp_path / "two").load("big").fingerprint == big.fingerprint


def test_a_server_that_goes_away_and_comes_back(bucket: Any, server: Any, tmp_path: Path) -> None:
    one, two = replica(tmp_path / "one"), replica(tmp_path / "two")
    one.save(tone("mine"))
    two.load("mine")
    _, port = server.get_host_and_port()
    server.stop()
    try:
        later()
        began = time.monotonic()
        assert two.load("mine").body["quality"] == {"auroc": [0.5]}
        assert time.monotonic() - began < 2 * mirror.PATIENCE
        with pytest.raises(StoreUnwritable):
            two.save(tone("mine", 0.75))
        with pytest.raises(StoreUnreachable):
            replica(tmp_path / "three").entries()
        assert replica(tmp_path / "two").load("mine").name == "mine"  # the next process on that machine
    finally:
        server._server_ready = False
        server._port = port
        server.start()
    until(lambda: two.place.health.is_reachable or two.load("mine") is None, 20)
    two.save(tone("mine", 0.75))
    until(lambda: one.load("mine").body["quality"] == {"auroc": [0.75]})


def test_a_bucket_that_is_not_there(bucket: Any, tmp_path: Path) -> None:
    store = Store(opened("s3://nowhere/x", tmp_path))
    with pytest.raises(StoreUnreachable):
        store.entries()
    with pytest.raises(StoreUnwritable):
        store.save(tone("mine"))


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(SpecError, match=r"setpoint\[gcs\]"):
            opened("gs://bucket/x", tmp_path)
