from __future__ import annotations

from pathlib import Path

import pytest

from server.settings import ServerSettings, default_store
from steering import SpecError


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_a_public_host_needs_a_key(host: str) -> None:
    with pytest.raises(SpecError) as caught:
        ServerSettings(host=host)
    assert caught.value.param == "host"
    ServerSettings(host=host, api_key="k")
    ServerSettings(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_a_loopback_host_does_not(host: str) -> None:
    assert ServerSettings(host=host).is_loopback


@pytest.mark.parametrize(
    "field",
    [
        {"port": 70000},
        {"max_batch": 0},
        {"drain_seconds": -1},
        {"drain_seconds": float("nan")},
        {"api_key": " "},
        {"max_model_len": 0},
        {"queue_limit": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_named(field: dict[str, object]) -> None:
    with pytest.raises(SpecError) as caught:
        ServerSettings(**field)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(field))


def test_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (
        ("PORT", "81"),
        ("STORE", str(tmp_path)),
        ("DRAIN_SECONDS", "2.5"),
        ("INSECURE", "true"),
        ("HOST", "::"),
    ):
        monkeypatch.setenv(f"SETPOINT_{name}", value)
    settings = ServerSettings.from_env()
    assert settings == ServerSettings(port=81, store=tmp_path, drain_seconds=2.5, insecure=True, host="::")
    assert default_store() == tmp_path
    monkeypatch.setenv("SETPOINT_PORT", "eighty")
    with pytest.raises(SpecError, match="SETPOINT_PORT"):
        ServerSettings.from_env()
