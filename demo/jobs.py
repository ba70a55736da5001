"""Work that takes a while: it tells how far it is, waits for its turn, and stops when told."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.1


class Cancelled(Exception):
    """Somebody no longer wants the result."""


class Job:
    """A function in a thread of its own.

    Args:
        work: called with the job; tells events by `job.tell`, and stops where it calls `job.check`.
    """

    def __init__(self, work: Callable[[Job], None]) -> None:
        self._work = work
        self._cancelled = threading.Event()
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="sparsediff-demo-job")

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked it to stop."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask it to stop; it does at its next `check`."""
        self._cancelled.set()

    def check(self) -> None:
        """Called by the work wherever it may stop.

        Raises:
            Cancelled: it should.
        """
        if self._cancelled.is_set():
            raise Cancelled

    def tell(self, event: object) -> None:
        """Hand an event to whoever reads `events`."""
        self._events.put(event)

    def events(self) -> Iterator[object]:
        """Start the work and yield what it tells, until it ends; leaving early cancels it.

        Raises:
            Cancelled: it was cancelled.
            Exception: whatever the work raised.
        """
        self._thread.start()
        try:
            while self._thread.is_alive() or not self._events.empty():
                try:
                    yield self._events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end; returns whether it has."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:
            self._error = error


class Turns:
    """One pipeline, many visitors: one at a time, in the order of asking."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, job: Job, waiting: Callable[[int], None]) -> Iterator[None]:
        """Wait until nobody is before us, then keep the others out.

        Args:
            job: whose cancellation ends the wait.
            waiting: told how many are before us, whenever that changes.

        Raises:
            Cancelled: while waiting.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
        told = None
        try:
            with self._changed:
                while (ahead := self._waiting.index(ticket)) > 0:
                    job.check()
                    if ahead != told:
                        told = ahead
                        waiting(ahead)
                    self._changed.wait(POLL_SECONDS)
            yield
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()
