"""What belongs to one visitor: the job that runs for them, and its last result."""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass

from sparsediff.demo.jobs import Job
from sparsediff.demo.meters import Phase
from sparsediff.demo.work import Result

MAX_VISITORS = 64  # remembered; who was idle longest is forgotten first


@dataclass
class Session:
    """One visitor on one tab.

    Attributes:
        job: that runs, or ran last.
        result: the last one.
    """

    job: Job | None = None
    result: Result | None = None

    def start(self, job: Job) -> Job:
        """Run this and nothing else for this visitor."""
        self.cancel()
        self.job = job
        return job

    def cancel(self) -> None:
        """Stop what runs, if anything does."""
        if self.job is not None and not self.job.cancelled:
            # Told among the job's own events: said by whoever asked, it could come after the job's last word and stay.
            self.job.tell(Phase(name="Cancelling", id="cancelling"))
            self.job.cancel()

    def keep(self, result: Result) -> None:
        """Take a new result, and throw away the files of the one it follows."""
        former, self.result = self.result, result
        if former is not None and former.folder != result.folder:
            shutil.rmtree(former.folder, ignore_errors=True)

    def leave(self) -> None:
        """The visitor has gone: stop, and throw everything away."""
        self.cancel()
        if self.result is not None:
            shutil.rmtree(self.result.folder, ignore_errors=True)


class Sessions:
    """Visitors by what Gradio calls them."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str | None) -> Session:
        """The visitor of that name, new if need be."""
        key = name or ""
        with self._lock:
            session = self._held.setdefault(key, Session())
            self._held.move_to_end(key)
            gone = [self._held.popitem(last=False)[1]] if len(self._held) > MAX_VISITORS else []
        for other in gone:
            other.leave()
        return session

    def leave(self, name: str | None) -> None:
        """Forget a visitor."""
        with self._lock:
            session = self._held.pop(name or "", None)
        if session is not None:
            session.leave()
