"""Behind the step: rows go to memory and to tiers on threads of their own, in order, a bounded amount at a time."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.util import Finalize

from torchcache.errors import described
from torchcache.logging import logger, warn_once
from torchcache.threads import yield_to_training

QUEUE_BYTES = 256 * 1024 * 1024
# What is on its way from a device is held there, too.
ON_DEVICE_BYTES = 64 * 1024 * 1024

Job = Callable[[], object]


class Writer:
    """A thread that runs jobs in order, holding at most ``limit`` bytes of them.

    Parameters
    ----------
    limit : int
        Bytes that may wait, unless nothing waits at all.
    name : str
        The thread's.
    """

    def __init__(self, limit: int = QUEUE_BYTES, name: str = "torchcache-writer") -> None:
        self.limit = limit
        self._name = name
        self._jobs: deque[tuple[int, Job]] = deque()
        self._waiting = 0
        # Entered by itself: an interrupt within a condition's own entering would leave it locked.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def submit(self, size: int, job: Job, wait: bool = True) -> bool:
        """Queue ``job``, which holds ``size`` bytes; where there is no room, wait for it, or leave it and say so."""
        with self._lock:
            if not wait and self._waiting and self._waiting + size > self.limit:
                return False
            self._changed.wait_for(lambda: not self._waiting or self._waiting + size <= self.limit)
            self._waiting += size
            self._jobs.append((size, job))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
                # In a process that multiprocessing started, nothing of atexit runs.
                Finalize(None, flush, exitpriority=0)
            self._changed.notify_all()
        return True

    def flush(self) -> None:
        """Wait until everything submitted so far has run."""
        with self._lock:
            self._changed.wait_for(lambda: not self._jobs)

    def _run(self) -> None:
        yield_to_training()
        while True:
            with self._lock:
                self._changed.wait_for(lambda: bool(self._jobs))
                size, job = self._jobs[0]
            try:
                job()
            except Exception as error:  # the store never stops training, whatever it suffers
                warn_once(f"rows could not be stored ({described(error)}); training goes on without them")
                logger.debug("writer job failed", exc_info=True)
            del job
            with self._lock:
                self._jobs.popleft()
                self._waiting -= size
                self._changed.notify_all()


def _new() -> tuple[Writer, Writer, Writer]:
    return Writer(ON_DEVICE_BYTES, "torchcache-receiver"), Writer(), Writer(name="torchcache-sender")


_receiver, _writer, _sender = _new()


def receiver() -> Writer:
    """What puts rows into memory that come from a device."""
    return _receiver


def writer() -> Writer:
    """What encodes rows, and writes them to disk."""
    return _writer


def sender() -> Writer:
    """What writes to tiers that may be slow, so that the disk does not wait for them."""
    return _sender


def flush() -> None:
    """Wait until every row stored so far is in memory, on disk, and with all other tiers."""
    _receiver.flush()
    _writer.flush()
    _sender.flush()


def _after_fork() -> None:
    # The child has neither the threads nor usable locks; the parent writes what was waiting.
    global _receiver, _writer, _sender
    _receiver, _writer, _sender = _new()


atexit.register(flush)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
