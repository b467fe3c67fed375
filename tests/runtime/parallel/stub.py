"""A follower that does nothing, in a fraction of the time that a real one takes to start.

It says that it is there, and answers a message of kind "fail" with the failure whose fields are in it.
"""

from __future__ import annotations

import json
import socket
import sys


def main() -> None:
    leader = socket.socket(fileno=int(sys.argv[1]))

    def say(kind: str, fields: object) -> None:
        header = json.dumps([kind, fields, []]).encode()
        leader.sendall(len(header).to_bytes(8, "little") + header)

    say("here", {})
    stream = leader.makefile("rb")
    while length := stream.read(8):
        kind, fields, _ = json.loads(stream.read(int.from_bytes(length, "little")))
        if kind == "fail":
            say("failed", fields)


if __name__ == "__main__":
    main()
