"""What the store and a stream's pieces cost on this machine, in CPU seconds and bytes: the scale model is fed with it.

    python -m benchmarks.capacity.costs [PART …] [--sizes 100 1000 4000] [--repeats 5] [--ray PYTHON] [--haproxy PATH]

    listing     `Store.entries`, per artifact: the header of every file is read
    unknown     a request that names a concept that there is not: its error tells the names that there are
    load        one concept of the 8B shape (32 layers, width 4096) from the store: read, hashed, checked
    hit         the same again, from the shelf
    compile     a program of `lqr` on it; prepare: its slot, packed; both on the thread of whoever submits
    mirror      the copy of a shared store (`file://`, so that no network counts): one key compared with the place,
                one new key copied, and one key of a listing, over the number of copies that are held
    forward     a piece of a stream through a process that does nothing but pass it on: the least that a gateway in
                Python costs, over asyncio's streams, HTTP's chunks parsed and written again; with --haproxy the same
                through HAProxy
    handle      a piece of a stream through a Ray Serve handle, with --ray: a Python that has Ray

CPU seconds rather than wall time, medians of `--repeats`, since machines are shared; folders are warm in the page
cache. Writes benchmarks/results/capacity-costs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.capacity import forward
from benchmarks.capacity.assumptions import Model
from steering.artifact import SUFFIX
from steering.concept import Concept
from steering.control import Weights
from steering.errors import SpecError
from steering.methods import Lqr, compile_program
from steering.mirror import WHOLE, Mirror
from steering.remote import Remote
from steering.runtime.programs import Prepared
from steering.store import Shelf, Store

RESULTS = Path(__file__).parents[1] / "results"
WARM = 2
"""Calls that do not count: the first ones import, and fault in what the allocator gives back."""
MODEL_NAME = "sha256:" + "0" * 64


def concept_of(name: str, layers: int, width: int) -> Concept:
    """A random concept of a shape, with one kind of gain."""
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(layers + 1, width), dim=-1)
    gains = {"matrix_free": torch.randn(layers, width)}
    gains["matrix_free"][0] = 0
    return Concept(
        name,
        MODEL_NAME,
        direction,
        torch.ones(layers + 1),
        torch.zeros(layers + 1),
        gains,
        tuple(range(1, layers)),
        Weights(),
        "matrix_free",
    )


def cpu_seconds(act: Callable[[], Any], repeats: int, times: int = 1) -> float:
    """Median of CPU seconds of one call, each measured over `times` calls, once it is warm."""
    for _ in range(WARM):
        act()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(times):
            act()
        found.append((time.process_time() - began) / times)
    return statistics.median(found)


def store_costs(sizes: list[int], repeats: int) -> dict[str, Any]:
    """Listing and the error of an unknown name over the number of artifacts, one row a size."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = concept_of("c-0000000", 8, 192).artifact().save(folder)
        have = 1
        for size in sizes:
            for index in range(have, size):
                os.link(first, folder / f"c-{index:07d}.safetensors")
            have = size
            store = Store(folder)
            shelf = Shelf(store, model=MODEL_NAME, depth=8, width=192)
            told: list[str] = []

            def ask(shelf: Shelf = shelf, told: list[str] = told) -> None:
                try:
                    shelf.concept("absent")
                except SpecError as error:
                    told.append(str(error))

            rows.append(
                {
                    "artifacts": size,
                    "listing_seconds": cpu_seconds(store.entries, repeats),
                    "unknown_seconds": cpu_seconds(ask, repeats),
                    "unknown_characters": len(told[-1]),
                }
            )
            print(rows[-1], flush=True)
    return {"rows": rows, "listing_seconds_each": rows[-1]["listing_seconds"] / rows[-1]["artifacts"]}


def concept_costs(repeats: int) -> dict[str, float]:
    """What one concept of the 8B shape costs, from the file to the slot."""
    model = Model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = concept_of("c", model.layers, model.width).artifact().save(folder)
        held = Shelf(Store(folder), model=MODEL_NAME, depth=model.layers, width=model.width)

        def load() -> None:
            Shelf(Store(folder), model=MODEL_NAME, depth=model.layers, width=model.width).concept("c")

        program = compile_program([Lqr(concept="c", setpoint=1.0)], held)
        return {
            "repeats": repeats,
            "file_bytes": path.stat().st_size,
            "program_bytes": Prepared.of(program).n_bytes,
            "load_seconds": cpu_seconds(load, repeats),
            "hit_seconds": cpu_seconds(lambda: held.concept("c"), repeats, 100),
            "compile_seconds": cpu_seconds(lambda: compile_program([Lqr(concept="c", setpoint=1.0)], held), repeats, 5),
            "prepare_seconds": cpu_seconds(lambda: Prepared.of(program), repeats, 5),
        }


def mirror_costs(sizes: list[int], repeats: int) -> dict[str, Any]:
    """What comparing and copying one key costs a replica, over the copies that it holds."""
    rows = []
    for size in sizes:
        with (
            tempfile.TemporaryDirectory() as there,
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        ):
            root = Path(there)
            for index in range(size):
                (root / f"c-{index:07d}{SUFFIX}").write_bytes(b" ")
            remote = Remote.of(f"file://{root}")
            copy = Mirror(remote, Path(name), "file")
            while sum(1 for _ in Path(name).glob("c-*")) < size or not copy.health.is_reachable:
                copy.look()  # which gives up where the machine is busy, while copying goes on
                time.sleep(0.2)
            fresh = iter(range(10**6))

            def miss(copy: Mirror = copy, root: Path = root, fresh: Iterator[int] = fresh) -> None:
                key = f"d-{next(fresh):07d}{SUFFIX}"
                (root / key).write_bytes(b" ")
                copy.look(key, missed=True)

            def ask(copy: Mirror = copy) -> None:
                copy.look(f"c-0000000{SUFFIX}", missed=True)

            rows.append(
                {
                    "held": size,
                    "listing_seconds_each": cpu_seconds(remote.listing, repeats) / size,
                    "ask_seconds": cpu_seconds(ask, repeats, 4),
                    "miss_seconds": cpu_seconds(miss, repeats, 4),
                }
            )
        print(rows[-1], flush=True)
    return {"rows": rows}


def handle_costs(python: str) -> dict[str, Any]:
    """What `benchmarks.capacity.handle` prints, run by another Python."""
    command = [python, "-m", "benchmarks.capacity.handle"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="measured again, the others kept; all without one")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ray", help="a Python that has Ray")
    parser.add_argument("--haproxy", help="the program")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes, repeats = given.sizes, given.repeats
    parts: dict[str, Callable[[], dict[str, Any] | None]] = {
        "store": lambda: store_costs(sizes, repeats),
        "concept": lambda: concept_costs(repeats),
        "mirror": lambda: mirror_costs([max(size, WHOLE + 1) for size in sizes[1:]], repeats),
        "forward": lambda: forward.measured(repeats),
        "proxy": lambda: forward.measured(repeats, given.haproxy) if given.haproxy else None,
        "handle": lambda: handle_costs(given.ray) if given.ray else None,
    }
    if unknown := set(given.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    file = RESULTS / "capacity-costs.json"
    body = json.loads(file.read_text(encoding="utf-8")) if given.parts and file.exists() else {}
    body |= {
        "kind": "costs",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "repeats": repeats,
    }
    body |= {name: part() for name, part in parts.items() if name in (given.parts or parts)}
    file.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
