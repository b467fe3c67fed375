"""The HTTP server and the command line. Imports only public names of `steering`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.app import create_app
    from server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must print its help without loading a model library."""
    if name == "create_app":
        from server.app import create_app

        return create_app
    if name == "ServerSettings":
        from server.settings import ServerSettings

        return ServerSettings
    raise AttributeError(f"module 'server' has no public name {name!r}")
