"""A process that shares a model and follows rank 0: `python -m steering.runtime.follower FD RANK SIZE FOLDER DEVICE`.

It reads messages from a socket that it inherits, and runs what they say: passes over its share of the model. It decides
nothing and draws nothing. When the socket closes, rank 0 is gone, and so is it, in whatever it waits for.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from steering.plant.shared import SharedPlant, load_share, own_device
from steering.plant.team import Group, Message, leave, passed, receive, send
from steering.runtime.parallel import (
    FollowingBank,
    SharedRunner,
    unpacked_frame,
    unpacked_laid,
    unpacked_program,
)
from steering.runtime.scope import Frame
from steering.runtime.settings import EngineSettings
from steering.runtime.wiring import wire

JOINT = ("join", "load", "engine", "step")
"""What rank 0 does at the same time, and may fail in alike. Who fails in anything else has another bank or pool than
the others from there on, and ends."""


@dataclass
class Engine:
    """What this process has of an engine of rank 0, and the frame that was told last."""

    runner: SharedRunner
    bank: FollowingBank
    frame: Frame | None = None


@dataclass
class Follower:
    """One process: its shares of plants, and its part of each engine on them."""

    rank: int
    size: int
    folder: str
    device: torch.device
    group: Group | None = None
    plants: dict[int, SharedPlant] = field(default_factory=dict)
    engines: dict[int, Engine] = field(default_factory=dict)

    def run(self, message: Message) -> None:
        """Do what rank 0 does at the same time."""
        kind, fields, arrays = message
        if kind == "join":
            self.group = Group.join(self.rank, self.size, self.folder, self.device)
        elif kind == "load":
            assert self.group is not None
            self.plants[fields["plant"]] = load_share(group=self.group, **fields["given"])
        elif kind == "engine":
            self.engines[fields["engine"]] = make(self.plants[fields["plant"]], fields["settings"])
        elif kind == "drop":
            self.engines.pop(fields["name"], None)
        else:
            engine = self.engines[fields["engine"]]
            if kind == "step":
                if fields["frame"] is None:
                    frame = None
                elif fields["frame"] == "again":
                    frame = engine.frame
                else:
                    frame = unpacked_frame(fields["frame"], arrays[2:])
                engine.frame = frame
                engine.runner.follow(unpacked_laid(fields, arrays), frame, fields["keep"])
            elif kind == "fill":
                engine.bank.fill(fields["name"], unpacked_program(fields, arrays))
            elif kind == "free":
                engine.bank.free(fields["name"])
            elif kind == "erase":
                engine.runner.erase(fields["blocks"])


def make(plant: SharedPlant, given: Mapping[str, Any]) -> Engine:
    """This process's part of an engine of these settings."""
    settings = EngineSettings(**given)
    with plant.together():
        shell, attention, _ = wire(plant, settings)
    bank = FollowingBank(settings.program_slots, plant.device)
    return Engine(SharedRunner(plant, shell, attention, bank, plant.group), bank)


def main(arguments: list[str]) -> None:
    """Follow until rank 0 says that it ends, or does."""
    fd, rank, size, folder, device = arguments
    # Rank 0 drains on these and then says so; a service manager sends them to every process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _be_quiet()
    leader = socket.socket(fileno=int(fd))
    told: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(leader, told, folder), daemon=True).start()
    follower = Follower(int(rank), int(size), folder, own_device(torch.device(device), int(rank)))
    send(leader, Message("here", {}))
    number = -1
    while (message := told.get()).kind != "end":
        number += 1
        try:
            follower.run(message)
        except Exception as error:  # rank 0 knows whether it met the same
            told_of = {"number": number, "passed": passed(), "error": f"{type(error).__name__}: {error}"}
            send(leader, Message("failed", told_of))
            if message.kind not in JOINT:
                break
    leave()


def listen(leader: socket.socket, told: queue.SimpleQueue[Message], folder: str) -> None:
    """Take messages as they come. When there are no more it removes the folder in which the processes met, and ends the
    process, which may be waiting for rank 0 elsewhere."""
    while (message := receive(leader)) is not None:
        told.put(message)
        if message.kind == "end":
            return
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _be_quiet() -> None:
    """No progress bars and no advice: rank 0 tells once what there is to tell."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main(sys.argv[1:])
