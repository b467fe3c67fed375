"""A replica as an actor of Ray Serve."""

from __future__ import annotations

from server.replicas.replica import Replica
from server.settings import ServerSettings
from steering import SteeringError


class Actor(Replica):
    """A replica whose number is its rank among those that Ray Serve runs."""

    def __init__(self, settings: ServerSettings, is_writer: bool) -> None:
        _open_no_port()
        super().__init__(settings, is_writer)

    def _rank(self) -> int:
        from ray import serve

        return int(serve.get_replica_context().rank.rank)


def _open_no_port() -> None:
    """Keep Ray Serve from opening a port of its own in this process.

    It is for calls between deployments that do not go through Ray's core, of which there are none here. It listens on
    every interface, asks for no key, and unpickles what it gets (`ray/serve/_private/replica.py`, 2.60). Raises
    SteeringError for a version of Ray of which this is not known.
    """
    from ray.serve._private import replica

    if not hasattr(replica, "add_port_to_grpc_server"):
        raise SteeringError("This version of Ray was not tried: pip install 'ray[serve]==2.60.*'.")
    replica.add_port_to_grpc_server = lambda server, address: 0
