"""The address of the server, taken before anything heavy is loaded, so that a port in use is told at once."""

from __future__ import annotations

import socket

from server.settings import ServerSettings
from steering import SpecError


def listen(settings: ServerSettings) -> socket.socket:
    """A socket bound to the settings' address. Raises SpecError when it cannot be bound."""
    host, port = settings.host.strip("[]"), settings.port
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        why = (error.strerror or "it cannot be used").lower()
        raise SpecError(
            "port", expected="an address that is free", got=f"{host}:{port}", advice=f"{why}, choose another --port"
        ) from error
    return listener


def url(listener: socket.socket) -> str:
    """The address as a client writes it, with the port that was really taken."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
