"""A copy on this machine of a store that several share: refreshed on reading, written through, deletions included.

    reading   what is here was compared with the place less than FRESH seconds ago, or is compared now; what is not
              here is asked for again, whenever it was last asked for
    writing   there first, whole or not at all, then here; where the place does not take it nothing is changed

So what one replica has written is read by every other from FRESH seconds after, by name at once where it is new. Up to
LISTABLE files one listing answers for all of them; beyond, each that is used is asked for. The copy is complete up to
WHOLE files when a process starts; beyond, it has what was used. A place that does not answer is left alone for RETRY
seconds at a time, and reading goes on from the copy.

Files here carry the version that they were copied at, in an index beside them, with their inode, time and size: a file
that another process has replaced since is not taken for it. A version is asked for before its content is read, so that
the content is that version or a later one, which the next comparison finds; what was written here is copied back once,
for the place alone knows what version it was given.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from steering.artifact import partial_file, settle
from steering.copies import Held, Stamp, read_index, stamp, write_index
from steering.errors import StoreUnreachable, StoreUnwritable
from steering.folder import Folder, Health, mirrors
from steering.remote import Remote, Version, is_key, is_url

FRESH = 1.0
"""Seconds for which a comparison holds; of a place with a pace, that many times as long."""
AHEAD = 0.75
"""Part of them after which the next one begins while readers go on."""
RETRY = 5.0
"""Seconds after a failure before the place is asked again."""
PATIENCE = 5.0
"""Seconds that a reader who has a copy waits for a comparison."""
FIRST = 300.0
"""Seconds that a reader without one waits."""
SENDING = 30.0
"""Seconds that a write may take, and one more for each RATE bytes."""
RATE = 2**20
LISTABLE = 64
"""Files up to which one listing compares them all; of more, those that are used are asked for one by one. Read from S3,
a listing takes a processor 6 ms and 0.12 more for each file, a question 2.5."""
WHOLE = 1024
"""Files up to which whatever is listed is copied, so that this machine has all when the place does not answer."""
READERS = 8
"""Files that are copied at a time."""
LISTED, COPIED, PRESETS = "", "*", "presets/"
"""What is compared where it is no key: one listing, whose files are copied while they are few; every file; presets."""
PROBE = "default.json"
"""What is asked for where it matters only whether there is an answer."""
REMEMBERED = 4096
"""Times of comparisons and writes from which on old ones are dropped."""
log = logging.getLogger("setpoint.store")


@dataclass(eq=False)
class Flight:
    """One comparison under way, which any number of readers wait for, until it is late."""

    started: float
    is_late: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Mirror(Folder):
    """The copy of one place in a folder of this machine. Safe for threads, and for processes that share the folder."""

    def __init__(self, remote: Remote, path: Path, title: str) -> None:
        super().__init__(path)
        self.title = title
        self._remote = remote
        self._held, self._has_copy = read_index(path)
        self._is_large: bool | None = None
        """Whether there are more than LISTABLE files; None before the first listing."""
        self._compared: dict[str, float] = {}
        """When each key was last compared, or all of them (monotonic time, of the asking)."""
        self._touched: dict[str, float] = {}
        """When each key was last written or deleted here."""
        self._claims: set[str] = set()
        """Keys whose file is being written, or copied."""
        self._flights: dict[str, Flight] = {}
        self._failed: float | None = None
        self._failures = 0
        self._change = threading.Condition()
        self._indexing = threading.Lock()

    @property
    def health(self) -> Health:
        """Whether the place answered last, and how often it did not. One that did not is asked again, beside whoever
        wants to know: of a server that nobody uses it would else be said for ever."""
        what = PROBE if self._is_large else LISTED
        with self._change:
            if self._failed is not None and not self._is_resting() and what not in self._flights:
                self._start(what)
            return Health(self._failed is None, self._failures)

    @property
    def _fresh(self) -> float:
        return FRESH * self._remote.pace

    def shown(self, key: str) -> str:
        """Where a file is kept, for people."""
        return f"{self.title}/{key}"

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def look(self, key: str | None = None, *, missed: bool = False) -> None:
        """Bring one file here up to date, `presets/`, or all. Raises StoreUnreachable where there is no copy at all."""
        now = time.monotonic()
        since = now if missed else now - self._fresh
        if not self._is_large:
            self._refresh(LISTED, since)
        if self._is_large:
            self._refresh(COPIED if key is None else key, since)
        if self._failed is not None and not self._has_copy:
            raise StoreUnreachable("The store cannot be reached, and there is no copy of it here; try again later.")

    def _refresh(self, what: str, since: float) -> None:
        """Have `what` compared at `since` or later; go on from the copy where that fails or takes too long."""
        patience = PATIENCE if self._has_copy else FIRST
        while True:
            with self._change:
                now, compared = time.monotonic(), self._compared.get(what, -math.inf)
                is_due = compared < since
                if not is_due and now - compared < self._fresh * AHEAD:
                    return
                if self._is_resting():
                    return
                flight = self._flights.get(what) or self._start(what)
            if not is_due or flight.is_late:
                return
            if not flight.done.wait(max(0.0, flight.started + patience - time.monotonic())):
                flight.is_late = True
                self._fail(TimeoutError(f"no answer within {patience:.0f} s"))

    def _is_resting(self) -> bool:
        return self._failed is not None and time.monotonic() < self._failed + RETRY

    def _start(self, what: str) -> Flight:
        flight = self._flights[what] = Flight(time.monotonic())
        threading.Thread(target=self._fly, args=(what, flight), name="setpoint-store", daemon=True).start()
        return flight

    def _fly(self, what: str, flight: Flight) -> None:
        """One comparison. Whatever goes wrong is told, and the copy stays as it is."""
        try:
            # What is here is looked at first: what another process of this machine writes after that is left alone.
            if what in (LISTED, COPIED):
                here = self._here()
                found = self._remote.listing()
                self._is_large = len(found) > LISTABLE
                if what == COPIED or len(found) <= WHOLE:
                    self._copy(found, here, flight.started)
                if not self._has_copy:
                    self._has_copy = True
                    self._write_index()
            elif what == PRESETS:
                here = self._here(PRESETS)
                self._copy(self._remote.listing(PRESETS), here, flight.started)
            else:
                here = {what: stamp(self.path / what)}
                version = self._remote.ask(what)
                found = {} if version is None else {what: version}
                self._copy(found, here, flight.started)
        except Exception as error:  # each file system has errors of its own
            self._fail(error)
        else:
            with self._change:
                self._compared[what] = flight.started
                self._forget()
                is_news, self._failed = self._failed is not None, None
            if is_news:
                log.warning("the store is reached again")
        finally:
            with self._change:
                del self._flights[what]
            flight.done.set()

    def _copy(self, found: Mapping[str, Version], here: Mapping[str, Stamp], started: float) -> None:
        """Make the files, which were `here` before the place was asked at `started`, those that were `found` there."""
        there = {key: Held(version.tag, here.get(key)) for key, version in found.items()}
        gone = [key for key, seen in here.items() if key not in found and seen is not None]
        changed = [*(key for key, held in there.items() if self._held.get(key) != held), *gone]
        _side_by_side([partial(self._apply, key, found.get(key), here.get(key), started) for key in changed])
        if changed:
            self._write_index()

    def _here(self, start: str = "") -> dict[str, Stamp]:
        """The files here, by key, whose key begins so."""
        paths = (path for folder in (self.path, self.path / PRESETS) for path in folder.glob("[!.]*.*"))
        keys = (path.relative_to(self.path).as_posix() for path in paths)
        return {key: stamp(self.path / key) for key in keys if key.startswith(start) and is_key(key)}

    def _apply(self, key: str, version: Version | None, seen: Stamp, started: float) -> None:
        """Make the file here, which was `seen` before, that of the place, as the place was asked about at `started`."""
        with self._change:
            if key in self._claims or self._touched.get(key, float("-inf")) > started:
                return  # what is known is older than what is here
            self._claims.add(key)
        try:
            path = self.path / key
            if version is None:
                if stamp(path) != seen:
                    return  # another process has written it since, which the next comparison sees
                path.unlink(missing_ok=True)
                self._held.pop(key, None)
                return
            with partial_file(path.parent) as copy:
                try:
                    self._remote.read(key, version.size, copy)
                except FileNotFoundError:
                    return  # deleted meanwhile, which the next comparison sees
                except OSError as error:
                    raise StoreUnreachable(str(error)) from error
                # The second is the place's, for whoever shows it; the rest is ours, so that no two are alike.
                written = int(version.modified) * 10**9 + time.time_ns() % 10**9
                os.utime(copy, ns=(written, written))
                held = Held(version.tag, stamp(copy))
                settle(copy, path)
            self._held[key] = held
        finally:
            self._release(key)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def replacing(self, key: str) -> Iterator[Path]:
        """A file to write in place of that of `key`: sent, then named, when the block ends. Raises StoreUnwritable."""
        path = self.path / key
        with partial_file(path.parent) as written:
            yield written
            with self._claimed(key):
                size = written.stat().st_size
                self._send(lambda: self._remote.write(key, written), SENDING + size / RATE)
                settle(written, path)
                self._held[key] = Held(None, None)
        self._write_index()

    def remove(self, key: str) -> bool:
        """Delete one file, there and here; whether it was here. Raises StoreUnwritable."""
        path = self.path / key
        with self._claimed(key):
            was_here = path.is_file()
            self._send(lambda: self._remote.remove(key), SENDING)
            path.unlink(missing_ok=True)
            self._held.pop(key, None)
        self._write_index()
        return was_here

    def _send(self, call: Callable[[], object], seconds: float) -> None:
        """Change something there. Raises StoreUnwritable when it fails or takes too long."""
        failures = list[BaseException]()

        def work() -> None:
            try:
                call()
            except Exception as error:
                failures.append(error)

        sending = threading.Thread(target=work, name="setpoint-store", daemon=True)
        sending.start()
        sending.join(seconds)
        if sending.is_alive():
            self._tell(TimeoutError(f"no answer within {seconds:.0f} s"))
            raise StoreUnwritable("The store does not answer: whether it has taken this is not known; try again later.")
        if failures:
            self._tell(failures[0])
            raise StoreUnwritable("The store did not take this, and nothing was changed; try again later.") from (
                failures[0]
            )

    def sweep(self) -> list[str]:
        """Delete what a killed process left half-written, here and there; returns the names."""
        left = super().sweep()
        try:
            return [*left, *self._remote.sweep()]
        except Exception as error:
            self._fail(error)
        return left

    # ── what both need ───────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _claimed(self, key: str) -> Iterator[None]:
        """Alone with one file; afterwards nothing that was asked for before is applied to it."""
        with self._change:
            if not self._change.wait_for(lambda: key not in self._claims, SENDING):
                raise StoreUnwritable("This name is being written or copied just now; try again later.")
            self._claims.add(key)
        try:
            yield
        finally:
            with self._change:
                self._touched[key] = time.monotonic()
            self._release(key)

    def _release(self, key: str) -> None:
        with self._change:
            self._claims.discard(key)
            self._change.notify_all()

    def _fail(self, error: BaseException) -> None:
        """The place could not be read: remember it, and tell it once until it answers again."""
        with self._change:
            is_news, self._failed = self._failed is None, time.monotonic()
        self._tell(error, is_news)

    def _tell(self, error: BaseException, is_news: bool = True) -> None:
        with self._change:
            self._failures += 1
        if is_news:
            log.warning("the store cannot be reached (%s)", f"{type(error).__name__}: {error}"[:300])

    def _forget(self) -> None:
        """Drop times that decide nothing any more: clients make up names."""
        oldest = min([time.monotonic() - self._fresh, *(flight.started for flight in self._flights.values())])
        for times in (self._touched, self._compared):
            if len(times) > REMEMBERED:
                for key in [key for key, at in times.items() if at < oldest and (key == PRESETS or is_key(key))]:
                    del times[key]

    def _write_index(self) -> None:
        with self._indexing:
            write_index(self.path, dict(self._held), self._has_copy)


def opened(where: Folder | Path | str, copies: Path | None = None) -> Folder:
    """The place that a store is told: a folder, or a URL, of which a copy is kept in `copies`. Raises SpecError."""
    if isinstance(where, Folder):
        return where
    if not is_url(where):
        return Folder(Path(where))
    url = str(where).rstrip("/")
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Mirror(Remote.of(url), (copies or mirrors()) / name, url)


def _side_by_side(calls: list[Callable[[], None]]) -> None:
    """Make calls on a few threads, which end with the process. Raises what the first that failed raised."""
    waiting, failures = iter(calls), list[Exception]()
    lock = threading.Lock()

    def work() -> None:
        while not failures:
            with lock:
                call = next(waiting, None)
            if call is None:
                return
            try:
                call()
            except Exception as error:
                failures.append(error)

    threads = [
        threading.Thread(target=work, name="setpoint-store", daemon=True) for _ in range(min(READERS, len(calls)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
